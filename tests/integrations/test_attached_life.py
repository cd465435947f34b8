"""What may happen to an attached model: copies, threads, errors, other sizes and dtypes."""

import contextlib
import copy
import io
import pickle
import threading

import pytest
import torch
from closeness import assert_close
from torch import nn

pytest.importorskip("transformers")

import transformers
from last_log_probs import NUM_TOKENS, POSITIONS, fused_log_probs, own_log_probs
from tiny_models import random_ids, tiny_model

from fused_sd import token_log_probs
from fused_sd.integrations.transformers import (
    Request,
    attach,
    hidden_states,
    is_attached,
)


def assert_answers(model, ids):
    with torch.no_grad():
        assert_close(fused_log_probs(model, ids), own_log_probs(model, ids), torch.float64)


def assert_untouched(head):
    """No request has left anything on the head."""
    assert "forward" not in head.__dict__
    assert not head._forward_hooks


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("bring", [pickled, saved])
def test_a_model_that_was_pickled_is_plain_and_can_be_attached_again(bring):
    model, ids = attach(tiny_model("Llama").double()), random_ids(2, 9)
    other = bring(model)
    assert not is_attached(other)
    with torch.no_grad():
        assert torch.equal(own_log_probs(other, ids), own_log_probs(model, ids))
    assert_answers(attach(other), ids)
    assert is_attached(model)


def test_a_saved_model_has_the_weights_of_a_plain_one(tmp_path):
    model, ids = attach(tiny_model("Llama").double()), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.state_dict().keys() == other.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(own_log_probs(other, ids), own_log_probs(model, ids))


def test_a_copy_shares_the_autocast():
    class Accelerator:
        def autocast(self):
            return contextlib.nullcontext()

        def __deepcopy__(self, memo):
            raise AssertionError("an accelerator holds models and optimizers")

    model = attach(tiny_model("Llama").double(), autocast=Accelerator().autocast)
    assert_answers(copy.deepcopy(model), random_ids(2, 9))


def test_a_compute_may_call_the_model():
    model, ids, other = attach(tiny_model("Llama").double()), random_ids(2, 9), random_ids(2, 9)

    def compute(hidden, head):
        own, fused = own_log_probs(model, other), fused_log_probs(model, other)
        return token_log_probs(hidden, head, ids[:, -NUM_TOKENS:]).log_probs, own, fused

    outer, own, fused = model(input_ids=ids, fused_sd=Request(compute, POSITIONS)).result
    assert_close(outer, own_log_probs(model, ids), torch.float64)
    assert_close(own, own_log_probs(model, other), torch.float64)
    assert_close(fused, own, torch.float64)
    assert_untouched(model.lm_head)


def test_threads_may_share_a_model():
    """The first waits in its compute until the others have run, with and without a request."""
    model = attach(tiny_model("Llama").double())
    inputs = [random_ids(2, 9, seed=seed) for seed in range(3)]
    found, inside, others_ran = {}, threading.Event(), threading.Event()

    def first():
        def compute(hidden, head):
            inside.set()
            assert others_ran.wait(60)
            return token_log_probs(hidden, head, inputs[0][:, -NUM_TOKENS:]).log_probs

        found[0] = model(input_ids=inputs[0], fused_sd=Request(compute, POSITIONS)).result

    def second():
        """Runs its backbone while the head of the first is replaced, and before that, too."""
        assert inside.wait(60)
        found[1] = fused_log_probs(model, inputs[1])
        found[2] = own_log_probs(model, inputs[2])
        others_ran.set()

    # a thread that holds its request before the head is called
    held, go = threading.Event(), threading.Event()

    def third():
        def wait(module, arguments):
            if threading.current_thread() is threads[2]:
                held.set()
                assert go.wait(60)

        handle = model.model.register_forward_pre_hook(wait)
        found[3] = fused_log_probs(model, inputs[0])
        handle.remove()

    threads = [threading.Thread(target=run) for run in (first, second, third)]
    threads[2].start()
    assert held.wait(60)
    threads[0].start()
    threads[1].start()
    for thread in threads[:2]:
        thread.join(60)
    go.set()
    threads[2].join(60)
    for key, ids in ((0, inputs[0]), (1, inputs[1]), (2, inputs[2]), (3, inputs[0])):
        assert_close(found[key], own_log_probs(model, ids), torch.float64, str(key))
    assert_untouched(model.lm_head)


def test_an_error_leaves_the_model_as_it_was():
    model, ids = attach(tiny_model("Llama").double()), random_ids(2, 9)

    def fails(hidden, head):
        raise RuntimeError("compute")

    for request, error in (
        (Request(fails), RuntimeError),
        (Request(hidden_states, torch.zeros(3, 3, dtype=torch.bool)), ValueError),
    ):
        with pytest.raises(error):
            model(input_ids=ids, fused_sd=request)
        assert_untouched(model.lm_head)
    with pytest.raises(IndexError):  # before the head
        model(input_ids=ids + 1000, fused_sd=Request(hidden_states))
    assert_untouched(model.lm_head)
    assert_answers(model, ids)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Phi"])
def test_a_vocabulary_of_another_size(family):
    model = attach(tiny_model(family).double())
    for size in (120, 80):
        model.resize_token_embeddings(size, mean_resizing=False)
        assert_answers(model, random_ids(2, 9, vocab=size))
        request = Request(lambda hidden, head: head.weight.shape[0])
        assert model(input_ids=random_ids(1, 4, vocab=80), fused_sd=request).result == size


def test_weights_that_are_tied_after_attaching():
    model = attach(tiny_model("Llama").double())
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_answers(model, random_ids(2, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_that_is_cast_after_attaching(dtype):
    model, ids = attach(tiny_model("Llama").double()).to(dtype), random_ids(2, 9)
    with torch.no_grad():
        states = model(input_ids=ids, fused_sd=Request(hidden_states, POSITIONS)).result
        fused = fused_log_probs(model, ids)
        logits = states.double() @ model.lm_head.weight.T.double()
    assert states.dtype == dtype
    exact = logits.log_softmax(-1).gather(-1, ids[:, -NUM_TOKENS:, None])[..., 0]
    assert_close(fused, exact, torch.float32)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model, ids = attach(tiny_model("Llama").double()), random_ids(2, 9)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(fused_log_probs(model, ids).sum(), parameters)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    fused_log_probs(model, ids).sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert_close(parameter.grad, gradient, torch.float64)


# torch hides this warning, which its own look at a tensor causes, unless warnings are errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["model", "head"])
def test_compiled_models_answer_and_are_not_compiled_again(how):
    model = attach(tiny_model("Llama", num_hidden_layers=1).double())
    ids = random_ids(2, 9)
    expected = own_log_probs(model, ids).detach()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = model
    if how == "model":
        compiled = torch.compile(model, backend=backend)
    else:
        model.lm_head = torch.compile(model.lm_head, backend=backend)
    fused_log_probs(compiled, ids)
    count = len(graphs)
    assert how == "head" or count
    log_probs = fused_log_probs(compiled, ids)
    log_probs.sum().backward()
    assert len(graphs) == count
    assert_close(log_probs, expected, torch.float64)
    assert model.model.embed_tokens.weight.grad.abs().max() > 0
    torch._dynamo.reset()


def test_data_parallel_over_several_devices_is_refused():
    wrapped = nn.DataParallel(tiny_model("Llama"))
    wrapped.device_ids = [0, 1]
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        attach(wrapped)
    assert not is_attached(wrapped)
