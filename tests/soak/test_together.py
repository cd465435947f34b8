"""Threads, forked workers and many models at once."""

import os
import sys
import threading

import pytest
import torch

pytest.importorskip("transformers")

from closeness import assert_close
from last_log_probs import POSITIONS, fused_log_probs, own_log_probs
from tiny_models import random_ids, tiny_model
from torch.utils.data import DataLoader, Dataset

import fused_sd
from fused_sd import LMHead
from fused_sd.integrations.transformers import Request, attach, detach, is_attached

NUM_THREADS, CALLS = 4, 12
VOCAB, WIDTH, TOKENS = 67, 12, 9
LOSSES = {
    "sdpo": lambda *sides: fused_sd.sdpo_loss(*sides, top_k=5),
    "sdft": lambda *sides: fused_sd.sdft_loss(*sides),
    "jsd": lambda *sides: fused_sd.gkd_loss(*sides, beta=0.3),
    "sparse": lambda *sides: fused_sd.sdft_loss(*sides, gradient="sparse", chunk_size=4),
}


def in_threads(work, count=NUM_THREADS):
    """Run ``work(n)`` in threads that start together; return the results, and raise the errors."""
    results, errors, start = {}, [], threading.Barrier(count)

    def run(number):
        try:
            start.wait(60)
            results[number] = work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return [results[number] for number in range(count)]


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", LOSSES)
def test_threads_that_share_a_head_get_what_one_thread_gets(name):
    """Gradients of the shared weight are taken by each thread for itself."""
    weight = draw(0, VOCAB, WIDTH).requires_grad_()
    head, teacher = LMHead(weight), LMHead(draw(1, VOCAB, WIDTH))

    def work(number):
        found = []
        for call in range(CALLS):
            seed = 100 * number + call
            hidden = draw(seed, TOKENS + call, WIDTH).requires_grad_()
            loss = LOSSES[name](hidden, head, draw(seed + 50, TOKENS + call, WIDTH), teacher).loss
            found += [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]
        return found

    alone = [work(number) for number in range(NUM_THREADS)]
    together = in_threads(work)
    for expected, got in zip(alone, together, strict=True):
        assert all(map(torch.equal, expected, got))


def test_threads_that_add_to_one_gradient():
    """``backward`` from all threads into the same ``.grad``: the sum, in whatever order."""
    weight = draw(0, VOCAB, WIDTH).requires_grad_()
    head, teacher = LMHead(weight), LMHead(draw(1, VOCAB, WIDTH))

    def work(number):
        for call in range(CALLS):
            seed = 100 * number + call
            hidden = draw(seed, TOKENS, WIDTH).requires_grad_()
            LOSSES["sdpo"](hidden, head, draw(seed + 50, TOKENS, WIDTH), teacher).loss.backward()

    for number in range(NUM_THREADS):
        work(number)
    expected, weight.grad = weight.grad, None
    in_threads(work)
    assert_close(weight.grad, expected, torch.float64)


def test_a_graph_made_in_one_thread_and_run_in_another():
    weight, hidden = draw(0, VOCAB, WIDTH).requires_grad_(), draw(1, TOKENS, WIDTH).requires_grad_()
    sides = hidden, LMHead(weight), draw(2, TOKENS, WIDTH), LMHead(draw(3, VOCAB, WIDTH))
    expected = torch.autograd.grad(LOSSES["jsd"](*sides).loss, (hidden, weight))
    losses = in_threads(lambda _: LOSSES["jsd"](*sides).loss)
    found = in_threads(lambda number: torch.autograd.grad(losses[number - 1], (hidden, weight)))
    for gradients in found:
        assert all(map(torch.equal, gradients, expected))


def test_one_head_in_two_calls_of_one_graph():
    weight = draw(0, VOCAB, WIDTH).requires_grad_()
    head, teacher = LMHead(weight), LMHead(draw(1, VOCAB, WIDTH))
    sides = [(draw(n, TOKENS, WIDTH), draw(n + 9, TOKENS, WIDTH)) for n in (2, 3)]
    losses = [LOSSES["sdpo"](own, head, other, teacher).loss for own, other in sides]
    (both,) = torch.autograd.grad(losses[0] + 2 * losses[1], weight, retain_graph=True)
    parts = [torch.autograd.grad(loss, weight)[0] for loss in losses]
    assert_close(both, parts[0] + 2 * parts[1], torch.float64)


class Scored(Dataset):
    """Runs losses and tools in a worker, after the parent has run them."""

    def __len__(self):
        return 4

    def __getitem__(self, number):
        weight = draw(0, VOCAB, WIDTH).requires_grad_()
        hidden = draw(number, TOKENS, WIDTH).requires_grad_()
        sides = hidden, LMHead(weight), draw(number + 50, TOKENS, WIDTH), LMHead(weight.detach())
        loss = fused_sd.sdft_loss(*sides).loss
        loss.backward()
        mask = torch.ones(1, 4, dtype=torch.long)
        ids = torch.arange(4)[None] + number
        places = fused_sd.align_responses(ids, mask, ids, mask, student_response_mask=ids > number)
        return loss.detach(), weight.grad, places.student_positions.clone()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="macOS starts workers anew")
@pytest.mark.parametrize("threads", [1, 2])
def test_forked_workers(threads):
    """The parent has run the losses, with helper threads, which a child does not have."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = Scored()
        if threads > 1:  # enough rows for the helpers to be asked
            many = draw(7, 256, 64).float().requires_grad_()
            head = LMHead(draw(8, 4096, 64).float())
            fused_sd.sdft_loss(many, head, draw(9, 256, 64).float(), head).loss.backward()
        expected = [data[number] for number in range(len(data))]
        loader = DataLoader(
            data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        for got, wanted in zip(loader, expected, strict=True):
            for one, other in zip(got, wanted, strict=True):
                assert_close(one.double(), other.double(), torch.float64)
    finally:
        torch.set_num_threads(before)


def test_two_models_attached_at_once():
    models = [attach(tiny_model(family).double()) for family in ("Qwen3", "Gemma2")]
    ids = random_ids(2, 9)
    expected = [own_log_probs(model, ids) for model in models]

    def inside(hidden, head):
        """The other model answers while this one is in its head."""
        return fused_log_probs(models[1], ids)

    found = models[0](input_ids=ids, fused_sd=Request(inside, POSITIONS)).result
    assert_close(found, expected[1], torch.float64)
    for model, wanted in zip(models, expected):
        assert_close(fused_log_probs(model, ids), wanted, torch.float64)
    detach(models[0])
    assert [is_attached(model) for model in models] == [False, True]
    assert_close(fused_log_probs(models[1], ids), expected[1], torch.float64)


def test_threads_with_a_model_each():
    def work(number):
        torch.manual_seed(0)
        model = attach(tiny_model("Llama").double())
        ids = random_ids(2, 9, seed=number)
        for _ in range(5):
            assert_close(fused_log_probs(model, ids), own_log_probs(model, ids), torch.float64)
        return detach(model)

    models = in_threads(work, 3)
    assert not any(map(is_attached, models))


def test_attached_and_detached_a_thousand_times():
    model = tiny_model("Llama", num_hidden_layers=1)
    before, hooks = dict(model.__dict__), len(model.lm_head._forward_hooks)
    count = 1000 if os.environ.get("FUSED_SD_TEST_FULL") else 100
    ids = random_ids(1, 4)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    for number in range(count):
        assert attach(model) is model
        if number % 2:
            attach(model)  # does nothing
        if number % 10 == 0:
            with pytest.raises(ZeroDivisionError):
                model(input_ids=ids, fused_sd=Request(lambda hidden, head: 1 / 0))
        assert detach(model) is model
        detach(model)
    assert model.__dict__.keys() == before.keys()
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__
    assert len(model.lm_head._forward_hooks) == hooks
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_errors_in_threads_leave_the_others_answers():
    model = attach(tiny_model("Llama").double())
    ids = random_ids(2, 9)
    expected = own_log_probs(model, ids).detach()

    def fails(hidden, head):
        raise KeyError("compute")

    def work(number):
        for _ in range(6):
            if number % 2:
                with pytest.raises(KeyError):
                    model(input_ids=ids, fused_sd=Request(fails, POSITIONS))
                with pytest.raises(IndexError):  # before the head
                    model(input_ids=ids + 1000, fused_sd=Request(fails))
            else:
                with torch.no_grad():
                    assert_close(fused_log_probs(model, ids), expected, torch.float64)

    in_threads(work)
    assert "forward" not in model.lm_head.__dict__
    assert_close(fused_log_probs(model, ids), expected, torch.float64)


def test_an_error_in_backward_leaves_the_next_call_sound():
    weight, hidden = draw(0, VOCAB, WIDTH).requires_grad_(), draw(1, TOKENS, WIDTH).requires_grad_()
    sides = hidden, LMHead(weight), draw(2, TOKENS, WIDTH), LMHead(draw(3, VOCAB, WIDTH))
    expected = torch.autograd.grad(LOSSES["sdpo"](*sides).loss, (hidden, weight))
    handle = hidden.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LOSSES["sdpo"](*sides).loss.backward()
    handle.remove()
    hidden.grad = weight.grad = None
    found = torch.autograd.grad(LOSSES["sdpo"](*sides).loss, (hidden, weight))
    assert all(map(torch.equal, found, expected))
