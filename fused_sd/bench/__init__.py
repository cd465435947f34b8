"""Benchmark: time, peak memory and errors of this library and of others on the same operands."""
