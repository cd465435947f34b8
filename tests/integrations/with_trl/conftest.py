"""Tests that need TRL: not collected where it, or what its trainers import, is absent."""

import importlib.util

NEEDED = ("trl", "transformers", "accelerate", "datasets", "peft")
IS_ABSENT = any(importlib.util.find_spec(name) is None for name in NEEDED)
collect_ignore_glob = ["test_*.py"] if IS_ABSENT else []
