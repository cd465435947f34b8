"""Do the methods learn?  All of them on one verifiable task, from equal numbers of generations.

    python -m benchmarks.methods --model tiny --seeds 5

A run is cut into parts, one for each method and seed, that are kept on disk: a killed run goes on
with ``--resume``.
"""
