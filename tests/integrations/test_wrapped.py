"""Kernels for a model's layers under our losses: the same losses, and a model's own fused head."""

import warnings

import pytest
import torch

pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    liger = pytest.importorskip("liger_kernel.transformers")

from tiny_models import random_ids, tiny_model
from transformers.models.qwen3 import modeling_qwen3

from fused_sd import sdft_loss
from fused_sd.integrations.transformers import Request, attach, is_attached

# Liger's forward hands over the cache by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

# under Triton's interpreter the others fail: they call methods of a plain number
ON_CPU = {"rope": True, "rms_norm": False, "swiglu": False}
ON_GPU = {"rope": True, "rms_norm": True, "swiglu": True}


@pytest.fixture
def patched():
    """Liger replaces names in transformers' module and the class's forward; undone afterwards."""
    names = dict(vars(modeling_qwen3))
    forward = modeling_qwen3.Qwen3ForCausalLM.forward

    def patch(**settings):
        liger.apply_liger_kernel_to_qwen3(**settings)

    yield patch
    modeling_qwen3.Qwen3ForCausalLM.forward = forward
    vars(modeling_qwen3).update(names)


def build(device, seed=0):
    torch.manual_seed(seed)
    return tiny_model("Qwen3", spread=0.1).to(device)


def loss_and_gradients(model, device):
    ids = random_ids(2, 8).to(device)

    def compute(hidden, head):
        return sdft_loss(hidden, head, hidden.detach().flip(0), head).loss

    loss = model(input_ids=ids, fused_sd=Request(compute)).result
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


def assert_same_as_stock(model, stock, device):
    loss, gradients = loss_and_gradients(model, device)
    expected, stock_gradients = stock
    assert torch.allclose(loss, expected, rtol=1e-5)
    for own, other in zip(gradients, stock_gradients, strict=True):
        assert float((own - other).abs().max()) <= 1e-4 * float(other.abs().max())


CASES = [
    pytest.param("cpu", ON_CPU, marks=[], id="cpu"),
    pytest.param("cuda", ON_GPU, marks=pytest.mark.gpu, id="gpu"),
]


@pytest.mark.parametrize("fused_head", [False, True], ids=["own head", "liger's head"])
@pytest.mark.parametrize("device, kernels", CASES)
def test_losses_are_those_of_the_plain_layers(patched, device, kernels, fused_head):
    """Also where Liger has replaced the forward: a request leaves it out."""
    stock = loss_and_gradients(attach(build(device)), device)
    plain = modeling_qwen3.Qwen3ForCausalLM.forward
    patched(**kernels, cross_entropy=False, fused_linear_cross_entropy=fused_head)
    assert (modeling_qwen3.Qwen3ForCausalLM.forward is not plain) == fused_head
    assert_same_as_stock(attach(build(device)), stock, device)


@pytest.mark.parametrize("device, kernels", CASES)
def test_a_class_that_is_patched_after_attaching_answers_still(patched, device, kernels):
    stock = loss_and_gradients(attach(build(device)), device)
    model = attach(build(device))
    patched(**kernels, cross_entropy=False, fused_linear_cross_entropy=True)
    assert_same_as_stock(model, stock, device)
    assert type(model(input_ids=random_ids(1, 4).to(device))).__name__.startswith("Liger")


def test_a_model_that_is_patched_itself_answers(patched):
    """As Trainer does it for use_liger_kernel, before a trainer attaches."""
    stock = loss_and_gradients(attach(build("cpu")), "cpu")
    model = build("cpu")
    patched(**ON_CPU, cross_entropy=False, fused_linear_cross_entropy=True, model=model)
    assert_same_as_stock(attach(model), stock, "cpu")


@pytest.mark.parametrize("fused_head", [False, True])
def test_training_with_ligers_kernels_uses_our_losses(patched, tmp_path, fused_head):
    """Trainer patches the model when training starts; the trainer keeps Liger's head out of it."""
    trl_pairs = pytest.importorskip("trl_pairs")
    from fused_sd.integrations.trl import FusedSDPOTrainer

    tiny_model("Qwen3", vocab=trl_pairs.VOCAB).save_pretrained(tmp_path)
    trl_pairs.TOKENIZER.save_pretrained(tmp_path)
    kernels = {**ON_CPU, "cross_entropy": False, "fused_linear_cross_entropy": fused_head}
    trainer = trl_pairs.make(
        FusedSDPOTrainer,
        tmp_path,
        teacher_model_kind="live",
        max_steps=1,
        use_liger_kernel=True,
        liger_kernel_config=kernels,
    )
    assert trainer.train().global_step == 1
    assert is_attached(trainer.model)
    assert not type(trainer.model(input_ids=random_ids(1, 4))).__name__.startswith("Liger")
