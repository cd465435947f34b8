"""What a plan says that verl's Megatron loss holds is what it is counted to hold."""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

import fused_sd
from fused_sd.bench.measure import peak_bytes

NUM_TOKENS, HIDDEN, VOCAB, K = 64, 32, 12000, 32
DTYPES = (torch.bfloat16, torch.float32)


def count(rank, folder):
    """The peak of forward and backward in each dtype, on a rank that shares with nobody."""
    from megatron.core import parallel_state
    from verl.trainer.distillation.megatron.losses import _VocabParallelKLDivergence

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=1)
    parallel_state.initialize_model_parallel(1)
    ids = torch.randint(VOCAB, (1, NUM_TOKENS, K))
    log_probs = torch.full(ids.shape, 1 / 40).log()
    found = []
    for dtype in DTYPES:
        hidden = torch.randn(NUM_TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
        weight = torch.randn(VOCAB, HIDDEN, dtype=dtype, requires_grad=True)

        def loss(hidden=hidden, weight=weight):
            logits = (hidden @ weight.t())[None]
            return _VocabParallelKLDivergence.apply(logits, log_probs, ids, None)[0].sum()

        found.append(peak_bytes(lambda loss=loss: loss().backward(), torch.device("cpu")))
    torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def test_the_planned_peak_of_verls_divergence_is_the_counted_one(tmp_path):
    torch.multiprocessing.spawn(count, (str(tmp_path),), nprocs=1)
    for dtype, counted in zip(DTYPES, torch.load(tmp_path / "found.pt"), strict=True):
        planned = fused_sd.plan(
            tokens=NUM_TOKENS,
            hidden_size=HIDDEN,
            vocab=VOCAB,
            objective="topk_divergence",
            dtype=dtype,
            device="cpu",
        )
        assert planned["verl Megatron top-k"].peak_bytes == pytest.approx(counted, rel=0.03)
