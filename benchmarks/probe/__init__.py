"""What each part of a step takes on a GPU, in one minute.

python -m benchmarks.probe --out probe.jsonl              one JSON line a measurement
python -m benchmarks.probe --out probe.jsonl --resume     the parts that the file lacks
python -m benchmarks.probe --tiny                         small sizes, on a CPU too
"""
