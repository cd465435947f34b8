"""attach: requests answered inside a model's forward, and what it refuses."""

import copy
import functools
import inspect
import types

import pytest
import torch
from closeness import assert_close
from torch import nn

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import transformers
from last_log_probs import NUM_TOKENS, POSITIONS, fused_log_probs, own_log_probs
from tiny_adapters import ADAPTERS, adapted
from tiny_models import FAMILIES, VOCAB, random_ids, tiny_model

from fused_sd import TeacherTopK, divergence_loss
from fused_sd.engine import gradients
from fused_sd.integrations.transformers import (
    Request,
    attach,
    detach,
    hidden_states,
    is_attached,
)

# PEFT reads an attribute that transformers is about to rename
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def assert_same_log_probs_and_gradients(model, ids):
    values, gradients = [], []
    weights = torch.arange(1.0, NUM_TOKENS + 1).double()
    for log_probs in (fused_log_probs(model, ids), own_log_probs(model, ids)):
        model.zero_grad()
        (log_probs * weights).sum().backward()
        values.append(log_probs)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_close(*values, torch.float64, "log_probs")
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # relative to the largest of them: small gradients are sums of large terms
        largest = max(float(g.abs().max()) for g in gradients[1].values())
        assert_close(gradient / largest, gradients[1][name] / largest, torch.float64, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_the_models_logits(family):
    model = attach(tiny_model(family).double())
    assert_same_log_probs_and_gradients(model, random_ids(3, 12))


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2"])
def test_without_a_request_nothing_changes(family):
    model, ids = tiny_model(family), random_ids(2, 6)
    names = list(inspect.signature(model.forward).parameters)
    before = model(input_ids=ids).logits
    tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    model.train()
    attach(model)
    assert all(part.training for part in model.modules())
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), tokens)
    assert list(inspect.signature(model.forward).parameters) == names


def test_attaching_twice_is_attaching_once_and_detaching_undoes_it():
    model = tiny_model()
    forward = attach(model).forward
    assert attach(model).forward is not None
    assert model.forward.__func__ is forward.__func__
    assert detach(model) is model
    assert not is_attached(model)
    assert "forward" not in model.__dict__
    assert detach(model) is model


def test_detaching_gives_back_a_forward_that_was_wrapped_before():
    model = tiny_model()
    # as accelerate's device hooks leave it: no method
    wrapped = functools.partial(type(model).forward, model)
    model.forward = wrapped
    detach(attach(model))
    assert model.forward is wrapped


def test_detaching_refuses_to_remove_another_wrapper():
    model = attach(tiny_model())
    model.forward = types.MethodType(lambda self, **kwargs: None, model)
    with pytest.raises(ValueError, match="one wrapped since then"):
        detach(model)


def test_a_deep_copy_answers_with_its_own_weights():
    model, ids = attach(tiny_model("Llama")), random_ids(2, 8)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
        assert torch.allclose(fused_log_probs(other, ids), own_log_probs(other, ids), atol=1e-5)
        assert not torch.allclose(fused_log_probs(other, ids), own_log_probs(model, ids))


def test_positions_are_a_slice_or_a_mask():
    model, ids = attach(tiny_model()), random_ids(2, 8)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, POSITIONS] = True
    with torch.no_grad():
        sliced = model(input_ids=ids, fused_sd=Request(hidden_states, POSITIONS)).result
        masked = model(input_ids=ids, fused_sd=Request(hidden_states, mask)).result
        everything = model(input_ids=ids, fused_sd=Request(hidden_states)).result
    assert torch.equal(sliced.flatten(0, 1), masked)
    assert torch.equal(everything[:, POSITIONS], sliced)


@pytest.mark.parametrize("answer", [{"a": 1.0}, [("a", 1.0)], None], ids=repr)
def test_an_answer_may_be_of_any_kind(answer):
    model = attach(tiny_model())
    asked = Request(lambda hidden, head: answer)
    assert model(input_ids=random_ids(1, 4), fused_sd=asked).result == answer


@pytest.mark.parametrize("name", ["labels", "logits_to_keep"])
def test_a_request_refuses_arguments_that_are_about_logits(name):
    model, ids = attach(tiny_model()), random_ids(2, 8)
    with pytest.raises(ValueError, match=name):
        fused_log_probs(model, ids, **{name: ids})


def bend(logits):
    return 30 * torch.tanh(logits / 30)


@pytest.mark.parametrize("doctor", [bend, lambda z: 1.01 * z, lambda z: z + z.argsort()])
@pytest.mark.parametrize("spread", [0.002, 0.3])
def test_a_model_that_does_something_else_to_its_logits_is_refused(doctor, spread):
    """Logits near 0 hide a soft-cap: the check has to enlarge them."""

    class Doctored(transformers.Qwen3ForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = doctor(output.logits)
            return output

    model = Doctored(tiny_model(spread=spread).config).eval()
    with pytest.raises(ValueError, match=r"logits rebuilt .* a difference of .*use its own losses"):
        attach(model)
    assert not is_attached(model)


def test_models_without_a_plain_head_are_refused():
    model = tiny_model("Llama")
    model.lm_head.weight = nn.Parameter(torch.ones(VOCAB, 32, dtype=torch.int8), False)
    with pytest.raises(ValueError, match="unquantised"):
        attach(model)
    with pytest.raises(ValueError, match="output embeddings"):
        attach(tiny_model().model)
    with pytest.raises(ValueError, match="hold a PreTrainedModel"):
        attach(nn.Linear(2, 2))
    settings = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": VOCAB}
    with pytest.raises(ValueError, match="causal language model"):
        attach(transformers.T5ForConditionalGeneration(transformers.T5Config(**settings)))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_train_as_through_logits(settings):
    model, ids = attach(adapted(**settings)), random_ids(3, 12)
    assert_same_log_probs_and_gradients(model, ids)
    with model.disable_adapter(), torch.no_grad():
        base = fused_log_probs(model, ids)
        assert_close(base, own_log_probs(model, ids), torch.float64)
    assert not torch.allclose(base, fused_log_probs(model, ids))


SPARSE = {
    "tied": lambda: tiny_model("Qwen3"),
    "soft-capped": lambda: tiny_model("Gemma2"),
    "bias": lambda: tiny_model("Phi"),
    "adapter": lambda: adapted(target_modules=["q_proj", "lm_head"]),
    "adapter, bias": lambda: adapted("Phi", target_modules=["lm_head"]),
    "saved head": lambda: adapted(modules_to_save=["lm_head"]),
}


@pytest.mark.bits
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("made", SPARSE.values(), ids=SPARSE)
def test_a_request_may_have_a_sparse_gradient_and_gets_its_certificate(
    made, reduction, monkeypatch
):
    """Also by the columns that stand for an adapter of the head."""
    model, ids = attach(made().double()), random_ids(3, 12)
    with torch.no_grad():
        teacher = model(input_ids=ids.flip(1), fused_sd=Request(hidden_states, POSITIONS)).result
    flat = torch.tensor([1.0, 1, 1, 1, 0.03], dtype=torch.float64)[:, None]
    monkeypatch.setattr(gradients, "MOST", 40)
    upstream = torch.arange(1.0, NUM_TOKENS + 1).double() if reduction == "none" else 1.0

    def run(**settings):
        states = []

        def compute(hidden, head):
            hidden.register_hook(states.append)
            output = divergence_loss(
                *(hidden * flat, head, teacher * flat, head),
                temperature=0.3,
                reduction=reduction,
                **settings,
            )
            bound = None
            if output.certificate is not None:
                bound = output.certificate.hidden_bound(head) * flat[:, 0]
            return output, bound

        output, bound = model(input_ids=ids, fused_sd=Request(compute, POSITIONS)).result
        model.zero_grad()
        (output.loss * upstream).sum().backward()
        named = model.named_parameters()
        by_name = {name: p.grad.clone() for name, p in named if p.grad is not None}
        return output, bound, states[0], by_name

    dense, _, exact_states, exact = run()
    sparse, bound, states, found = run(gradient="sparse", tolerance=0.02)
    assert dense.certificate is None
    assert torch.equal(sparse.loss, dense.loss)
    certificate = sparse.certificate
    assert certificate.kept.any()
    assert 0 < certificate.dropped_share <= 0.02
    assert certificate.dense.any() or reduction == "sum"
    error = (states - exact_states).norm(dim=-1)
    assert error.max() > 0
    assert (error <= bound * upstream).all()
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        assert (found[name] - gradient).norm() <= 0.05 * gradient.norm(), name


@pytest.mark.parametrize("made", SPARSE.values(), ids=SPARSE)
def test_a_gradient_of_few_entries_is_that_of_the_models_logits(made):
    model, ids = attach(made().double()), random_ids(3, 12)
    with torch.no_grad():
        other = model(input_ids=ids.flip(1), use_cache=False).logits[:, POSITIONS]
        teacher = model(input_ids=ids.flip(1), fused_sd=Request(hidden_states, POSITIONS)).result
    model.zero_grad()

    def compute(hidden, head):
        support = {"support": TeacherTopK(6), "remainder": "renormalize"}
        return divergence_loss(
            hidden, head, teacher, head, **support, gradient="sparse", reduction="sum"
        )

    output = model(input_ids=ids, fused_sd=Request(compute, POSITIONS)).result
    output.loss.backward()
    assert (output.certificate.kept == 6).all()
    assert output.certificate.dropped_share == 0
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    known, kept = other.topk(6)
    own = model(input_ids=ids, use_cache=False).logits[:, POSITIONS].gather(-1, kept)
    log_s, log_t = own.log_softmax(-1), known.log_softmax(-1)
    loss = (log_s.exp() * (log_s - log_t)).sum()
    loss.backward()
    assert_close(output.loss, loss, torch.float64)
    largest = max(float(gradient.abs().max()) for gradient in found.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in found)
        if name in found:
            pair = found[name] / largest, parameter.grad / largest
            assert_close(*pair, torch.float64, name)


def test_several_adapters_on_a_head_add_up():
    model, ids = attach(adapted(target_modules=["lm_head"])), random_ids(3, 12)
    second = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model.add_adapter("second", second)
    model.double()
    for active in ("second", ["default", "second"]):
        model.base_model.set_adapter(active)
        assert_same_log_probs_and_gradients(model, ids)


def test_a_merged_adapter_is_in_the_weight():
    model, ids = attach(adapted(target_modules=["lm_head"])), random_ids(3, 12)
    model.merge_adapter()
    with torch.no_grad():
        assert_close(fused_log_probs(model, ids), own_log_probs(model, ids), torch.float64)
    with model.disable_adapter(), pytest.raises(ValueError, match="unmerge"):
        fused_log_probs(model, ids)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0"),
        ({"use_dora": True}, "variant"),
        ({"lora_bias": True}, "lora_bias=False"),
    ],
)
def test_an_adapter_of_the_head_that_is_not_reproduced_is_refused(settings, message):
    family = "Phi" if "lora_bias" in settings else "Llama"
    with pytest.raises(ValueError, match=message):
        attach(adapted(family, target_modules=["lm_head"], **settings))


def test_an_fp32_adapter_of_a_16_bit_model_is_not_rounded():
    model = adapted(target_modules=["lm_head"]).bfloat16()
    head = model.get_base_model().lm_head
    head.lora_A.float()
    head.lora_B.float()
    ids = random_ids(2, 12)
    fused_log_probs(attach(model), ids).sum().backward()
    assert head.lora_A["default"].weight.grad.dtype == torch.float32
    assert head.lora_B["default"].weight.grad.abs().max() > 0
    assert head.base_layer.weight.grad is None


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.mark.parametrize("prepared_first", [False, True])
def test_requests_run_in_accelerates_autocast(accelerator, prepared_first):
    model, ids, dtypes = tiny_model(), random_ids(2, 8), []
    module = model.model.layers[0].self_attn.q_proj
    module.register_forward_hook(lambda m, args, output: dtypes.append(output.dtype))
    if prepared_first:
        model = accelerator.prepare_model(model)
        with pytest.raises(ValueError, match=r"autocast=accelerator\.autocast"):
            attach(model)
        attach(model, autocast=accelerator.autocast)
    else:
        model = accelerator.prepare_model(attach(model))
    dtypes.clear()
    fused = fused_log_probs(model, ids)
    assert set(dtypes) == {torch.bfloat16}
    assert fused.dtype == torch.float32
    assert torch.allclose(fused, own_log_probs(model, ids), atol=0.05)
