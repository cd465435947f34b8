"""``LMHead.of``: the head of a model, for a loss that is called outside of the model's forward."""

import pathlib
import re
from unittest import mock

import pytest
import torch
from closeness import assert_close
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from tiny_adapters import ADAPTERS, adapted
from tiny_classes import CLASSES, tiny_class
from tiny_models import FAMILIES, random_ids, tiny_model

import fused_sd
from fused_sd import LMHead, reference
from fused_sd.integrations.shared import model_head
from fused_sd.integrations.transformers import attach, is_attached, unwrap

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:.*tie_word_embeddings.*:UserWarning",
)
README = pathlib.Path(__file__).parents[2] / "README.md"
IDS = random_ids(2, 9, vocab=80)
# layers or a projection between the backbone and the head, or no forward on ids alone
WITHOUT = {"BertLMHeadModel", "RemBertForCausalLM", "Llama4ForConditionalGeneration"}


def backbone_of(model):
    inner = unwrap(model)
    return inner.model if inner.base_model is inner else inner.base_model


def losses(model, head):
    """Cross entropy of the next tokens: by the library, and from the model's own logits."""
    hidden = backbone_of(model)(input_ids=IDS)[0][:, :-1]
    logits = model(input_ids=IDS).logits[:, :-1]
    own = nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    ours = fused_sd.cross_entropy_loss(hidden, head, IDS[:, 1:], reduction="mean").loss
    return ours, own


def assert_same(model, head):
    gradients = []
    for loss in losses(model, head):
        model.zero_grad()
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        gradients[-1]["loss"] = loss.detach()
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        assert_close(value, gradients[1][name], torch.float64, name)


def made(name):
    if name in FAMILIES:
        return tiny_model(name).double()
    if not hasattr(transformers, name):
        pytest.skip("not in this release of transformers")
    return tiny_class(name)


@pytest.mark.parametrize("name", [*FAMILIES, *sorted(CLASSES.keys() - WITHOUT)])
def test_the_loss_and_its_gradients_are_those_of_the_models_own_logits(name):
    model = made(name)
    logits = model(input_ids=IDS[:1, :2]).logits
    if logits.dtype != torch.float64:
        pytest.skip("casts its logits to fp32")
    assert_same(model, LMHead.of(model))
    assert not is_attached(model)


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_of_layers_and_head_are_in_it(settings):
    model = adapted(**settings)
    assert_same(model, LMHead.of(model))
    with model.disable_adapter(), torch.no_grad():
        base = losses(model, LMHead.of(model))
    assert_close(*base, torch.float64)
    assert not torch.allclose(base[0], losses(model, LMHead.of(model))[0])


def test_a_head_with_fp32_adapters_is_not_rounded_to_16_bits():
    model = adapted(target_modules=["lm_head"]).bfloat16()
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    head = LMHead.of(model)
    assert head.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"hidden must be torch.float32 as head, got .*bfloat16"):
        losses(model, head)


def test_a_bias_behind_a_factor_of_the_states():
    model = tiny_model("Phi").double()
    model.lm_head.register_forward_pre_hook(lambda module, states: (0.5 * states[0],))
    head = LMHead.of(model)
    assert head.logit_scale == pytest.approx(0.5, rel=1e-12)
    assert_same(model, head)


def test_a_head_is_compared_once_and_follows_the_weights():
    model = tiny_model("Granite").double()
    with mock.patch.object(model_head, "_compare", side_effect=model_head._compare) as compare:
        head = LMHead.of(model)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        assert_same(model, head)
        assert_same(model, LMHead.of(model))
        assert compare.call_count == 1
        LMHead.of(tiny_model("Granite"))
        assert compare.call_count == 2


def test_a_model_that_is_attached_stays_so():
    model = attach(tiny_model("Gemma2").double())
    assert_same(model, LMHead.of(model))
    assert is_attached(model)


def test_training_mode_and_16_bits_do_not_matter():
    model = tiny_model("Cohere").bfloat16().train()
    assert LMHead.of(model).logit_scale == FAMILIES["Cohere"]["logit_scale"]
    assert model.training
    scaled = tiny_model("Llama").bfloat16()
    scaled.lm_head.register_forward_pre_hook(lambda module, states: (states[0] / 3,))
    assert LMHead.of(scaled).logit_scale == pytest.approx(1 / 3, rel=1e-3)


class Learned(transformers.LlamaForCausalLM):
    """A learned factor of the states before the head, which is 1 at the start."""

    def __init__(self, config):
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(1))
        self.lm_head.register_forward_pre_hook(lambda module, states: (states[0] * self.gain,))


class Doubled(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class Normed(transformers.LlamaForCausalLM):
    """The states that enter the head are not the backbone's."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_forward_pre_hook(lambda module, states: (states[0].tanh(),))


def sharded():
    model = tiny_model()
    model.lm_head.weight.ds_id = 0
    return model


REFUSED = {
    "a learned factor": (
        lambda: Learned(tiny_model("Llama").config),
        "last_hidden_state.* got states with other values of gain",
    ),
    "logits times 2": (lambda: Doubled(tiny_model("Llama").config), "logits rebuilt .* be those"),
    "another norm": (lambda: Normed(tiny_model("Llama").config), "got states that differ .*attach"),
    "layers before the head": (lambda: tiny_class("BertLMHeadModel"), "got states that differ"),
    "a projection": (lambda: tiny_class("RemBertForCausalLM"), "got states of shape .*attach"),
    "shards": (sharded, "model must have whole parameters.*sharded or offloaded.*attach"),
    "a layer": (lambda: nn.Linear(2, 2), "model must be or hold a PreTrainedModel, got Linear"),
    "a name": (lambda: "gpt2", "model must be or hold a PreTrainedModel, got str"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_scaled_and_capped_product_of_the_last_states_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        LMHead.of(make())


LENGTHS = {"student": 5, "teacher": 8}  # of the longer prompt


def first_example():
    return re.search(r"```python\n(import torch, fused_sd\n.*?)```", README.read_text(), re.S)[1]


@pytest.mark.parametrize("family", ["Qwen3", "Granite", "Cohere", "Gemma2"])
def test_the_readmes_first_example_runs_as_it_stands(family):
    """On padded prompts of two lengths, with the loss that the model's own logits have."""
    model = tiny_model(family).double()
    response = random_ids(2, 4, seed=1)
    ids = {side: random_ids(2, 4 + length, seed=length) for side, length in LENGTHS.items()}
    masks = {side: torch.ones_like(tokens) for side, tokens in ids.items()}
    at = {}  # the states that predict the response; the second row has a shorter prompt
    for side, length in LENGTHS.items():
        places = torch.stack([torch.arange(4) + length, torch.arange(4) + length - 2])
        ids[side].scatter_(1, places, response)
        masks[side][1, -2:] = 0
        at[side] = torch.arange(2)[:, None], places - 1
    counts = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])  # a tool's token among the second's
    response_mask = torch.zeros_like(ids["student"])
    response_mask[at["student"][0], at["student"][1] + 1] = counts
    names = {"model": model, "response_mask": response_mask}
    for side in ids:
        names |= {f"{side}_ids": ids[side], f"{side}_mask": masks[side]}
    example = first_example().replace("top_k=100", "top_k=20")  # of the tiny vocabulary
    exec(compile(example, str(README), "exec"), names)
    output = names["output"]
    found = model.lm_head.weight.grad.clone()
    model.zero_grad()
    student, teacher = (
        model(ids[side], attention_mask=masks[side]).logits[at[side]] for side in LENGTHS
    )
    token_loss = reference.sdpo(student, teacher.detach(), alpha=0.5, k=20)
    exact = (token_loss * counts).sum() / counts.sum()
    assert_close(output.loss, exact, torch.float64)
    exact.backward()
    assert_close(found, model.lm_head.weight.grad, torch.float64)
    assert set(output.metrics) == {"reverse_kl", "student_entropy"}
