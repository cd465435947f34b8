"""attach: models whose weights accelerate's hooks fetch, from the CPU's memory or from disk."""

import copy

import pytest
import torch
from closeness import assert_close

pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from last_log_probs import fused_log_probs, own_log_probs
from tiny_models import random_ids, tiny_model
from torch import nn

from fused_sd.integrations.shared.answering import _input_device, _on_device
from fused_sd.integrations.transformers import (
    Request,
    attach,
    detach,
    hidden_states,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
CPU = torch.device("cpu")


def by_cpu(model, folder):
    accelerate.cpu_offload(model, execution_device=CPU)


def by_disk(model, folder):
    accelerate.disk_offload(model, str(folder), execution_device=CPU)


def by_map(model, folder):
    """As ``device_map="auto"`` does where memory is short."""
    tied = model.config.tie_word_embeddings
    places = {"model": "cpu", "lm_head": "cpu" if tied else "disk"}
    settings = {"main_device": "cpu", "offload_dir": str(folder), "force_hooks": True}
    accelerate.dispatch_model(model, places, **settings)


def by_layers(model, folder):
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    settings = {"main_device": "cpu", "offload_dir": str(folder), "force_hooks": True}
    accelerate.dispatch_model(model, places, **settings)


@pytest.mark.parametrize("first", ["attach", "offload"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])  # Qwen3's head is tied
@pytest.mark.parametrize("offload", [by_cpu, by_disk, by_map, by_layers])
def test_log_probs_and_gradients_are_those_of_the_models_logits(family, offload, first, tmp_path):
    model, ids = tiny_model(family).double(), random_ids(2, 9)
    expected = own_log_probs(model, ids).detach()
    if first == "attach":
        attach(model)
    offload(model, tmp_path)
    attach(model)
    assert_close(fused_log_probs(model, ids), expected, torch.float64)
    # Weights that are fetched get no gradient that stays; the states before them do.
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 9, 32, dtype=torch.float64, generator=generator).requires_grad_()
    gradients = [
        torch.autograd.grad(log_probs(model, ids, inputs_embeds=inputs).sum(), inputs)[0]
        for log_probs in (fused_log_probs, own_log_probs)
    ]
    assert_close(*gradients, torch.float64, "gradient")
    assert_close(fused_log_probs(copy.deepcopy(model), ids), expected, torch.float64, "copy")
    assert_close(own_log_probs(detach(model), ids), expected, torch.float64, "detached")
    assert_close(fused_log_probs(attach(model), ids), expected, torch.float64, "attached again")


def test_hooks_that_are_removed_leave_an_attached_model():
    model, ids = tiny_model("Llama").double(), random_ids(2, 9)
    expected = own_log_probs(model, ids).detach()
    by_cpu(model, None)
    attach(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert_close(fused_log_probs(model, ids), expected, torch.float64)
    assert_close(own_log_probs(detach(model), ids), expected, torch.float64)


def test_an_adapter_of_an_offloaded_head_is_fetched_with_it():
    settings = {"r": 4, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    model = peft.get_peft_model(tiny_model("Llama"), peft.LoraConfig(**settings)).double().eval()
    ids = random_ids(2, 9)
    expected = own_log_probs(model, ids).detach()
    accelerate.cpu_offload(model, execution_device=CPU)
    attach(model)
    assert_close(fused_log_probs(model, ids), expected, torch.float64)
    with model.disable_adapter():
        assert_close(fused_log_probs(model, ids), own_log_probs(model, ids), torch.float64)


def test_an_adapter_that_an_offloaded_head_is_given_has_no_values_and_is_refused():
    """PEFT makes it on the meta device; the model's own forward would compute noise."""
    model = accelerate.cpu_offload(tiny_model("Llama"), execution_device=CPU)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head"]))
    attach(model)  # as for a model that is sharded, the first request compares
    with pytest.raises(ValueError, match="make its adapters before it is offloaded"):
        fused_log_probs(model, random_ids(2, 9))


def test_a_stray_parameter_that_is_offloaded_is_refused():
    model = tiny_model("Llama")
    model.lm_head.scale = nn.Parameter(torch.ones(1))
    accelerate.cpu_offload(model, execution_device=CPU)
    with pytest.raises(ValueError, match=r"lm_head\.scale must be in memory"):
        attach(model)


def test_what_compute_is_given_lies_where_the_inputs_lie():
    """Of a model on several devices: its own logits come back to the inputs' device."""
    model, ids = tiny_model("Phi"), random_ids(2, 9)
    assert _input_device(model) is None
    by_cpu(model, None)
    attach(model)
    head = model(input_ids=ids, fused_sd=Request(lambda hidden, head: [head])).result[0]
    assert _input_device(model) == CPU
    states = model(input_ids=ids, fused_sd=Request(hidden_states)).result
    assert _on_device(states, head, CPU) == (states, head)
    assert _on_device(states, head, None) == (states, head)
    moved, moved_head = _on_device(states, head, torch.device("meta"))
    assert moved.device == moved_head.weight.device == moved_head.bias.device
    assert moved.device.type == "meta"
    assert moved_head.logit_scale == head.logit_scale
