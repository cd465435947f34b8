"""A collection of revision traces in a process of its own, where something goes wrong."""

import contextlib
import os
from pathlib import Path
from unittest import mock

from killed_runs import fail_once, kill, limit_files
from trl_pairs import TOKENIZER

from fused_sd.integrations.trl import TraceConfig, collect_traces

QUESTIONS = [{"prompt": f"{n} + 1 = ", "answer": str(n + 1)} for n in range(8)]
CONFIG = TraceConfig(num_initial=1, num_revisions=1)


def reward(prompts, completions, answer, **_):
    return [float(text.endswith(wanted)) for text, wanted in zip(completions, answer, strict=True)]


def script(call=None, act=None):
    """A model that is wrong at first and right when it revises, but acts in one call instead."""
    num_calls = 0

    def generate(prompts):
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            act(prompts)
        return [respond(TOKENIZER.decode(prompt)) for prompt in prompts]

    return generate


def respond(text):
    number = int(text.split("+")[0])
    said = f"So {number + 1}" if "\n" in text else "It is -0"
    return [*TOKENIZER(said, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]


def killed_in_a_write(path):
    """When the second batch is written: its end is missing."""
    whole, num_calls = os.fsync, 0

    def sync(descriptor):
        nonlocal num_calls
        whole(descriptor)
        num_calls += 1
        if num_calls == 2:
            os.truncate(path, path.stat().st_size - 20)
            kill()

    return mock.patch("os.fsync", sync)


FAULTS = {  # by name: what happens in the call for the third batch's revisions, and what is patched
    "killed in a call": (lambda prompts: kill(), None),
    "killed in a write": (None, killed_in_a_write),
    "the model fails": (fail_once, None),
    "no room": (lambda prompts: limit_files(2_000), None),
}


def collect(folder, fault=None):
    path = Path(folder, "traces.jsonl")
    act, patch = FAULTS.get(fault, (None, None))
    with contextlib.nullcontext() if patch is None else patch(path):
        collect_traces(
            script(None if act is None else 6, act),
            QUESTIONS,
            reward,
            TOKENIZER,
            path,
            config=CONFIG,
            questions_per_batch=2,
        )
