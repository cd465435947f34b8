"""Kernels for a model's layers under our losses: the same losses, and a model's own fused head."""

import warnings
from importlib.util import find_spec

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

pytestmark = [
    pytest.mark.kernels,
    # Liger's forward hands over the cache by a name that transformers is about to drop
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated:FutureWarning"),
    # PEFT and TRL read names that transformers is about to rename
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # a loader without a GPU
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_trl = pytest.mark.skipif(not find_spec("trl"), reason="trl is not installed")
LAYERS = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False}


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


def build():
    torch.manual_seed(0)
    return tiny_model("Qwen3", spread=0.1).to(DEVICE)


def loss_and_gradients(model):
    ids = random_ids(2, 8).to(DEVICE)

    def compute(hidden, head):
        return sdft_loss(hidden, head, hidden.detach().flip(0), head).loss

    loss = model(input_ids=ids, fused_sd=Request(compute)).result
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


def assert_same_as_stock(model, stock):
    loss, gradients = loss_and_gradients(model)
    expected, stock_gradients = stock
    assert torch.allclose(loss, expected, rtol=1e-5)
    for own, other in zip(gradients, stock_gradients, strict=True):
        assert float((own - other).abs().max()) <= 1e-4 * float(other.abs().max())


def is_ligers(model):
    """Whether a plain forward is that of Liger's fused head."""
    return type(model(input_ids=random_ids(1, 4).to(DEVICE))).__name__.startswith("Liger")


@pytest.mark.parametrize("fused_head", [False, True], ids=["own head", "liger's head"])
def test_losses_are_those_of_the_plain_layers(patched, fused_head):
    """Also where Liger has replaced the forward: a request leaves it out."""
    stock = loss_and_gradients(attach(build()))
    plain = modeling_qwen3.Qwen3ForCausalLM.forward
    patched(**LAYERS, fused_linear_cross_entropy=fused_head)
    assert (modeling_qwen3.Qwen3ForCausalLM.forward is not plain) == fused_head
    model = attach(build())
    assert type(model.model.norm).__name__ == "LigerRMSNorm"
    assert type(model.model.layers[0].mlp).__name__ == "LigerSwiGLUMLP"
    assert_same_as_stock(model, stock)


def test_a_class_that_is_patched_after_attaching_answers_still(patched):
    stock = loss_and_gradients(attach(build()))
    model = attach(build())
    patched(**LAYERS, fused_linear_cross_entropy=True)
    assert_same_as_stock(model, stock)
    assert is_ligers(model)


def test_a_model_that_is_patched_itself_answers(patched):
    """As Trainer does it for use_liger_kernel, before a trainer attaches."""
    stock = loss_and_gradients(attach(build()))
    model = build()
    patched(**LAYERS, fused_linear_cross_entropy=True, model=model)
    assert_same_as_stock(attach(model), stock)


SETTINGS = {
    "max_steps": 1,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rms_norm": False, "swiglu": False},  # slow in the interpreter
    "use_cpu": DEVICE == "cpu",
}


def make_sdpo(folder, **settings):
    import trl_pairs

    from fused_sd.integrations.trl import FusedSDPOTrainer

    tiny_model("Qwen3", vocab=trl_pairs.VOCAB).save_pretrained(folder)
    trl_pairs.TOKENIZER.save_pretrained(folder)
    settings = {"teacher_model_kind": "live", **SETTINGS, **settings}
    return trl_pairs.make(FusedSDPOTrainer, folder, **settings)


def make_gkd(folder, **settings):
    import gkd_pairs

    from fused_sd.integrations.trl import FusedGKDTrainer

    return gkd_pairs.make(FusedGKDTrainer, folder, **{**SETTINGS, **settings})


def make_distillation(folder, **settings):
    import gkd_pairs
    from datasets import Dataset
    from trl import DistillationConfig

    from fused_sd.integrations.trl import FusedDistillationTrainer

    return FusedDistillationTrainer(
        gkd_pairs.build(0),
        gkd_pairs.build(7, hidden_size=48),
        args=DistillationConfig(
            str(folder),
            max_completion_length=6,
            **{**gkd_pairs.DEFAULTS, **SETTINGS, **settings},
        ),
        train_dataset=Dataset.from_dict({"prompt": ["Solve 2 + 2."] * 4}),
        processing_class=gkd_pairs.TOKENIZER,
    )


def make_method(folder, **settings):
    import method_pairs

    student = method_pairs.model(torch.float32)
    return method_pairs.make("OPSD", folder, student=student, **{**SETTINGS, **settings})


TRAINERS = [make_sdpo, make_gkd, make_distillation, make_method]


@needs_trl
@pytest.mark.parametrize("make", TRAINERS)
def test_training_with_ligers_layers_uses_our_losses(patched, tmp_path, make):
    """Trainer patches the model when training starts; the trainers keep Liger's head out of it."""
    trainer = make(tmp_path)
    assert trainer.train().global_step == 1
    assert modeling_qwen3.apply_rotary_pos_emb is liger.liger_rotary_pos_emb
    assert is_attached(trainer.model)
    assert not is_ligers(trainer.model)


@needs_trl
@pytest.mark.parametrize("make", TRAINERS)
def test_ligers_head_is_refused(tmp_path, make):
    """Ours say so before the training as TRL's GRPOTrainer does, from which the methods have it."""
    with pytest.raises(ValueError, match=r"liger_kernel_config.*fused_linear_cross_entropy"):
        make(tmp_path, liger_kernel_config={"fused_linear_cross_entropy": True})
