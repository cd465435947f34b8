"""attach: classes whose head stands elsewhere, or whose config says too much or too little."""

import pytest
import torch
from closeness import errors

pytest.importorskip("transformers")

import transformers
from tiny_classes import CLASSES, tiny_class
from tiny_models import tiny_model

from fused_sd import token_log_probs
from fused_sd.integrations.transformers import Request, attach, completion_positions, is_attached

NUM_TOKENS = 5
POSITIONS = completion_positions(NUM_TOKENS)


@pytest.fixture(autouse=True)
def llama4_runs(monkeypatch):
    """In 5.24, Llama 4 with a vision tower reads a field that its text model's output lacks."""
    from transformers.models.llama4 import modeling_llama4

    if hasattr(modeling_llama4, "MoeCausalLMOutputWithPast"):
        output = modeling_llama4.MoeCausalLMOutputWithPast
        monkeypatch.setattr(output, "image_outputs", None, raising=False)


@pytest.mark.parametrize("name", CLASSES)
def test_log_probs_and_gradients_are_those_of_the_models_logits(name):
    if not hasattr(transformers, name):
        pytest.skip("not in this release of transformers")
    model = attach(tiny_class(name))
    ids = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(0))

    def compute(hidden, head):
        return token_log_probs(hidden, head, ids[:, -NUM_TOKENS:])

    fused = model(input_ids=ids, fused_sd=Request(compute, POSITIONS)).result.log_probs
    logits = model(input_ids=ids, use_cache=False).logits[:, POSITIONS]
    own = logits.log_softmax(-1).gather(-1, ids[:, -NUM_TOKENS:, None])[..., 0]
    tolerance = 1e-10 if logits.dtype == torch.float64 else 1e-6  # some cast their logits to fp32
    assert errors(fused, own)[0] < tolerance
    parameters = list(model.parameters())
    found = torch.autograd.grad(fused.sum(), parameters, allow_unused=True)
    expected = torch.autograd.grad(own.sum(), parameters, allow_unused=True)
    largest = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    for gradient, other in zip(found, expected, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None:
            assert float((gradient - other).abs().max()) < tolerance * largest


@pytest.mark.parametrize(
    "family, setting, changed",
    [
        ("Gemma2", "final_logit_softcapping", None),
        ("Gemma2", "final_logit_softcapping", 3.0),
        ("Granite", "logits_scaling", 2.0),
        ("FalconH1", "lm_head_multiplier", 1.0),
    ],
)
def test_a_setting_that_changes_after_attaching_is_read_again(family, setting, changed):
    model = attach(tiny_model(family).double())
    setattr(model.config, setting, changed)
    if family == "FalconH1":
        model.model.lm_head_multiplier = changed
    ids = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(0))

    def compute(hidden, head):
        return token_log_probs(hidden, head, ids[:, -NUM_TOKENS:]).log_probs

    with torch.no_grad():
        fused = model(input_ids=ids, fused_sd=Request(compute, POSITIONS)).result
        logits = model(input_ids=ids, use_cache=False).logits[:, POSITIONS]
    own = logits.log_softmax(-1).gather(-1, ids[:, -NUM_TOKENS:, None])[..., 0]
    assert errors(fused, own)[0] < 1e-10


class NeedsImages(transformers.LlamaForCausalLM):
    def forward(self, input_ids, pixel_values, **kwargs):
        return super().forward(input_ids, **kwargs)


class OwnProduct(transformers.LlamaForCausalLM):
    """Reads the head's weight without calling its module."""

    def forward(self, input_ids, **kwargs):
        hidden = self.model(input_ids, use_cache=False).last_hidden_state
        logits = hidden @ self.lm_head.weight.T
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


class Padded(transformers.LlamaForCausalLM):
    """Has more logits than its head has rows."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = torch.nn.functional.pad(output.logits, (0, 3))
        return output


class EmbeddingHead(transformers.LlamaForCausalLM):
    def get_output_embeddings(self):
        return self.model.embed_tokens


@pytest.mark.parametrize(
    "made, message",
    [
        (NeedsImages, r"NeedsImages must run on token ids alone.*pixel_values"),
        (OwnProduct, r"call the module of its output embeddings \(Linear\)"),
        (Padded, "a difference of inf"),
        (EmbeddingHead, "be a linear layer, got an Embedding"),
    ],
)
def test_a_model_whose_logits_cannot_be_made_is_refused_by_name(made, message):
    model = made(tiny_model("Llama").config).eval()
    with pytest.raises(ValueError, match=message):
        attach(model)
    assert not is_attached(model)
    assert "forward" not in model.lm_head.__dict__
    assert not model.lm_head._forward_hooks
