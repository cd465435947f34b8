"""Time, peak memory and errors of this library and of others, on one problem in one run."""
