"""attach: heads with parameters, hooks or a forward of their own; arguments beside a request."""

import pytest
import torch
from closeness import assert_close

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import transformers
from last_log_probs import NUM_TOKENS, POSITIONS, fused_log_probs, own_log_probs
from tiny_models import random_ids, tiny_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

from fused_sd import token_log_probs
from fused_sd.integrations.transformers import Request, attach, is_attached

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:.*weight_norm.*deprecated.*:FutureWarning",
)


class Scaled(nn.Linear):
    """A head with a learned factor for each token, which is 1 at the start."""

    def __init__(self, linear, is_buffer):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        ones = torch.ones(linear.out_features)
        if is_buffer:
            self.register_buffer("scale", ones)
        else:
            self.scale = nn.Parameter(ones)

    def forward(self, states):
        return super().forward(states) * self.scale


class Tempered(transformers.LlamaForCausalLM):
    """A learned temperature outside of the head."""

    def __init__(self, config):
        super().__init__(config)
        self.log_temperature = nn.Parameter(torch.zeros(1))

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / self.log_temperature.exp()
        return output


def scaled(is_buffer):
    model = tiny_model("Llama")
    model.lm_head = Scaled(model.lm_head, is_buffer)
    return model


@pytest.mark.parametrize(
    "made, name",
    [
        (lambda: scaled(False), r"lm_head\.scale"),
        (lambda: scaled(True), r"lm_head\.scale"),
        (lambda: Tempered(tiny_model("Llama").config).eval(), "log_temperature"),
    ],
    ids=["parameter", "buffer", "outside"],
)
def test_a_parameter_that_a_request_would_not_read_is_refused_by_name(made, name):
    """Although the model's logits are those of its weight alone, as long as it is new."""
    model = made()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"values of {name} other than now"):
        attach(model)
    assert not is_attached(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_parameter_that_no_logit_reads_is_no_hindrance():
    model, ids = tiny_model("Llama").double(), random_ids(2, 9)
    model.value_head = nn.Linear(32, 1)
    before = model.value_head.weight.clone()
    attach(model)
    assert torch.equal(model.value_head.weight, before)
    assert_close(fused_log_probs(model, ids), own_log_probs(model, ids), torch.float64)


class Factor(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return weight * self.factor


WEIGHTS = {
    "parametrize": lambda head: parametrize.register_parametrization(head, "weight", Factor()),
    "weight_norm": weight_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_a_weight_that_is_made_from_parameters_trains_as_through_logits(make):
    model, ids = tiny_model("Llama").double(), random_ids(2, 9)
    make(model.lm_head)
    attach(model)
    parameters = list(model.parameters())
    fused, own = fused_log_probs(model, ids), own_log_probs(model, ids)
    assert_close(fused, own, torch.float64)
    found = torch.autograd.grad(fused.sum(), parameters)
    expected = torch.autograd.grad(own.sum(), parameters)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for gradient, other in zip(found, expected, strict=True):
        assert_close(gradient / largest, other / largest, torch.float64)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "register", ["forward_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_a_hook_on_logits_is_refused_by_name(register, when):
    model, ids = tiny_model("Llama"), random_ids(2, 9)

    def scale_logits(*arguments):
        return None

    if when == "after":
        attach(model)
    handle = getattr(model.lm_head, f"register_{register}")(scale_logits)
    with pytest.raises(ValueError, match=r"no hook that reads .*scale_logits; remove it"):
        attach(model) if when == "before" else fused_log_probs(model, ids)
    assert is_attached(model) == (when == "after")
    handle.remove()
    attach(model)
    assert torch.allclose(fused_log_probs(model, ids), own_log_probs(model, ids), atol=1e-5)


def test_a_hook_that_changes_what_enters_the_head_changes_it_in_a_request_too():
    model, ids = attach(tiny_model("Llama").double()), random_ids(2, 9)
    before = fused_log_probs(model, ids)
    model.lm_head.register_forward_pre_hook(lambda module, states: (2 * states[0],))
    fused = fused_log_probs(model, ids)
    assert not torch.allclose(fused, before)
    assert_close(fused, own_log_probs(model, ids), torch.float64)


def test_a_forward_that_is_set_on_an_attached_models_head_is_compared():
    model, ids = attach(tiny_model("Llama").double()), random_ids(2, 9)
    linear = model.lm_head.forward
    model.lm_head.forward = lambda states: linear(states) + 0.0  # as TRL's fp32 head does
    assert_close(fused_log_probs(model, ids), own_log_probs(model, ids), torch.float64)
    model.lm_head.forward = lambda states: 2 * linear(states)
    with pytest.raises(ValueError, match="something else to its logits"):
        fused_log_probs(model, ids)


def test_adapters_of_a_mixed_batch():
    """PEFT tells each adapted layer which row is whose: a head would have two weights."""
    ids, names = random_ids(2, 9), ["default", "__base__"]
    for targets in (["q_proj"], ["q_proj", "lm_head"]):
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        model = attach(peft.get_peft_model(tiny_model("Llama"), config).double().eval())
        if "lm_head" in targets:
            with pytest.raises(ValueError, match="leave out adapter_names"):
                fused_log_probs(model, ids, adapter_names=names)
            continue
        fused = fused_log_probs(model, ids, adapter_names=names)
        assert_close(fused, own_log_probs(model, ids, adapter_names=names), torch.float64)


def test_an_adapter_of_another_kind_is_refused():
    config = peft.AdaLoraConfig(target_modules=["lm_head"], total_step=10)
    with pytest.raises(ValueError, match="SVDLinear"):
        attach(peft.get_peft_model(tiny_model("Llama"), config))


REFUSED = {
    "num_logits_to_keep": 3,
    "num_items_in_batch": 7,
    "shift_labels": torch.zeros(2, 9, dtype=torch.long),
    "return_dict": False,
    "use_cache": True,
    "output_hidden_states": True,
    "output_attentions": True,
    "output_router_logits": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_asks_for_more_than_a_request_returns_is_refused(name):
    model, ids = attach(tiny_model("Llama").double()), random_ids(2, 9)
    with pytest.raises(ValueError, match=f"{name} must be left out of a call with fused_sd"):
        fused_log_probs(model, ids, **{name: REFUSED[name]})
    assert_close(fused_log_probs(model, ids), own_log_probs(model, ids), torch.float64)


def test_arguments_that_ask_for_nothing_more_are_taken():
    model, ids = attach(tiny_model("Llama").double()), random_ids(2, 9)
    off = {"labels": None, "return_dict": True, "use_cache": False, "output_hidden_states": False}
    own = own_log_probs(model, ids)
    assert_close(fused_log_probs(model, ids, **off), own, torch.float64)
    request = Request(lambda hidden, head: hidden)
    by_place = model(ids, torch.ones_like(ids), fused_sd=request).result
    assert torch.equal(by_place, model(input_ids=ids, fused_sd=request).result)
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(ids, input_ids=ids, fused_sd=request)


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")  # 5.24 renames it
def test_states_continue_a_cache_that_is_passed():
    model, ids = attach(tiny_model("Llama").double()), random_ids(2, 9)
    own = own_log_probs(model, ids)
    for keeps in (None, True):
        cache = model(input_ids=ids[:, :2], use_cache=True).past_key_values

        def compute(hidden, head):
            return token_log_probs(hidden, head, ids[:, -NUM_TOKENS:])

        asked = Request(compute, POSITIONS)
        output = model(input_ids=ids[:, 2:], past_key_values=cache, use_cache=keeps, fused_sd=asked)
        assert_close(output.result.log_probs, own, torch.float64)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_config_that_returns_tuples_is_refused(when):
    model = tiny_model("Llama")
    if when == "after":
        attach(model)
    model.config.return_dict = False
    with pytest.raises(ValueError, match=r"config\.return_dict must be True"):
        attach(model) if when == "before" else fused_log_probs(model, random_ids(2, 9))
    assert is_attached(model) == (when == "after")
