"""A loss that does not fit into memory says which chunk takes less, and leaves no gradient."""

import math
import re

import pytest
import torch

import fused_sd

TOKENS, WIDTH, VOCAB = 64, 8, 1000
DEVICE = "CUDA out of memory. Tried to allocate 2.00 GiB."
ADVICE = re.compile(r"chunk_size=(\d+) takes ([\d,]+) MiB instead")


def sides(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS, WIDTH), (VOCAB, WIDTH), (TOKENS, WIDTH), (VOCAB, WIDTH)
    drawn = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    return [one.requires_grad_(n < 2) for n, one in enumerate(drawn)]


def limited(monkeypatch, num_values, error):
    """Let no tensor of more values be allocated by the loss."""
    whole = torch.Tensor.new_empty

    def new_empty(self, size, **settings):
        if math.prod((size,) if isinstance(size, int) else size) > num_values:
            raise error
        return whole(self, size, **settings)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def run(tensors, **settings):
    hidden, head, *teacher = tensors
    settings = {"divergence": "reverse_kl", "reduction": "mean", **settings}
    fused_sd.divergence_loss(hidden, head, *teacher, **settings).loss.mean().backward()


def out_of_memory(tensors, **settings):
    """What the error says, or None where there is none."""
    try:
        run(tensors, **settings)
    except torch.OutOfMemoryError as error:
        return str(error)
    return None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_chunk_that_is_named_fits_at_last_and_no_gradient_counts_twice(reduction, monkeypatch):
    tensors, wanted = sides(), sides()
    run(wanted, reduction=reduction)
    # of logits; an objective's own memory comes on top
    limited(monkeypatch, 12 * (VOCAB + 8), torch.OutOfMemoryError(DEVICE))
    settings, tried = {"reduction": reduction}, [TOKENS]
    while (said := out_of_memory(tensors, **settings)) is not None:
        assert said.startswith(DEVICE)
        assert tensors[0].grad is tensors[1].grad is None
        settings["chunk_size"] = int(ADVICE.search(said)[1])
        assert settings["chunk_size"] < tried[-1]
        tried.append(settings["chunk_size"])
    assert len(tried) > 3
    for found, expected in zip(tensors[:2], wanted[:2], strict=True):
        assert torch.allclose(found.grad, expected.grad, atol=1e-7)


def test_an_error_in_backwards_own_run_is_explained_too(monkeypatch):
    hidden, head, *teacher = sides()
    loss = fused_sd.divergence_loss(
        hidden, head, *teacher, divergence="reverse_kl", reduction="none", chunk_size=8
    ).loss
    limited(monkeypatch, 8 * VOCAB + 500, torch.OutOfMemoryError(DEVICE))
    with pytest.raises(torch.OutOfMemoryError, match="chunks of 8 tokens, and the head's gradient"):
        loss.sum().backward()
    assert hidden.grad is head.grad is None
    monkeypatch.undo()
    loss.sum().backward()  # nothing was used up
    assert hidden.grad.isfinite().all()


def test_a_real_allocators_error_is_explained():
    """Terabytes of logits, which no system gives, of states and a head that take none."""
    tokens = 2**21
    hidden, head = torch.zeros(1, 1).expand(tokens, 1), torch.zeros(1, 1).expand(tokens, 1)
    ids = torch.zeros(tokens, dtype=torch.long)
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        fused_sd.cross_entropy_loss(hidden, head, ids, reduction="sum", chunk_size=tokens)
    assert ADVICE.search(str(caught.value))[1] == str(tokens // 2)
    accelerate = pytest.importorskip("accelerate.utils.memory")
    assert accelerate.should_reduce_batch_size(caught.value)


def test_other_errors_are_left_as_they_are(monkeypatch):
    limited(monkeypatch, 100, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match=r"^something else$"):
        run(sides())


def test_where_no_chunk_is_smaller_none_is_named(monkeypatch):
    limited(monkeypatch, 100, torch.OutOfMemoryError(DEVICE))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(sides(), chunk_size=1)
    assert "chunk_size" not in str(caught.value)
    assert "A frozen head, LoRA or gradient='sparse'" in str(caught.value)
