"""The runs of two processes that the engine tests compare, and their results."""

import dataclasses
import functools
import itertools
import pathlib
import tempfile
from typing import Any

import engine_worker
import torch
from engine_batches import NO_RESPONSE, VOCAB, Run
from ranks import free_port, spawn

EAGER = {"library": False, "backend": None}
# the runs with a policy loss also clamp log-probabilities
KINDS = {
    f"{'tied' if tied else 'untied'}{', policy' if policy else ''}": {
        "tied": tied,
        "policy": policy,
        "floor": -4.0 if policy else None,
        "watched": not tied and not policy,
    }
    for tied, policy in itertools.product((False, True), repeat=2)
}
BF16 = Run(dtype="bf16", policy=True, steps=1)
EMPTY = Run(loss="summed", lengths=NO_RESPONSE)
RUNS = {
    **{f"{kind}, eager": Run(**settings, **EAGER) for kind, settings in KINDS.items()},
    **{kind: Run(**settings) for kind, settings in KINDS.items()},
    "padded": Run(**KINDS["tied, policy"], packed=False, checkpointing=True),
    "ulysses": Run(**KINDS["untied, policy"], sequence_parallel=True),
    "ulysses, tied": Run(**KINDS["tied"], sequence_parallel=True),
    "adapter, eager": Run(adapter=True, policy=True, **EAGER),
    "adapter": Run(adapter=True, policy=True),
    "bf16, eager": dataclasses.replace(BF16, **EAGER),
    "bf16": BF16,
    "bf16, exact": dataclasses.replace(BF16, exact_head=True),
    "empty, eager": dataclasses.replace(EMPTY, **EAGER),
    "empty": EMPTY,
    "live": Run(loss="live"),
    "live, padded": Run(loss="live", packed=False),
    "live, ulysses": Run(loss="live", sequence_parallel=True),
    "not fused": Run(backend=None, steps=1),
    # last, because verl's own fused kernels replace the forward of the class for good
    "torch": Run(backend="torch", tied=True, loss="policy", steps=1),
    "torch, verl's": Run(library=False, backend="torch", tied=True, loss="policy", steps=1),
}


def save_model(folder: pathlib.Path, *, tied: bool) -> pathlib.Path:
    """A tiny Qwen3 with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(int(tied))
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    where = folder / ("tied" if tied else "untied")
    Qwen3ForCausalLM(config).save_pretrained(where)
    return where


@functools.cache
def remains() -> dict[str, list[dict[str, Any]]]:
    """The results of each run in each of the two processes, which are started once."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for tied in (False, True):
            save_model(folder, tied=tied)
        spawn(engine_worker.main, free_port(), name, RUNS)
        return {
            run: [torch.load(folder / f"{run}-{rank}.pt", weights_only=False) for rank in range(2)]
            for run in RUNS
        }


def assert_same_training(
    one: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float = 1e-5
) -> None:
    """Compare losses and gradient norms of each step, and the parameters after the last."""
    for mine, yours in zip(one, other, strict=True):
        for name in ("losses", "grad_norms"):
            left, right = torch.tensor(mine[name]), torch.tensor(yours[name])
            left, right = left[~left.isnan()], right[~left.isnan()]
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
        assert mine["parameters"].keys() == yours["parameters"].keys()
        for name, parameter in mine["parameters"].items():
            torch.testing.assert_close(
                parameter, yours["parameters"][name], rtol=0, atol=tolerance, msg=name
            )
