"""Every method trained on one verifiable task, with equal numbers of generations.

    python -m benchmarks.methods --model tiny --seeds 5

Each method and seed is a part of its own on disk, so that ``--resume`` continues a killed run.
"""
