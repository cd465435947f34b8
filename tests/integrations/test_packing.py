"""Rows without padding: the same states, losses and gradients, or a refusal."""

import dataclasses

import pytest
import torch
from closeness import assert_close

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import flash_attention
import tiny_models
from tiny_models import VOCAB, random_ids, tiny_model

from fused_sd import sdft_loss
from fused_sd.integrations.shared import packing
from fused_sd.integrations.shared.completion_scores import CompletionForward, log_probs, with_head
from fused_sd.integrations.shared.packing import check_packing, pack
from fused_sd.integrations.transformers import Request, attach, hidden_states

# PEFT reads an attribute that transformers is about to rename
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

NUM_PROMPT, NUM_COMPLETION = 5, 6
# tokens of prompt and completion
LENGTHS = [(5, 6), (2, 3), (1, 1), (4, 0), (3, 6)]


def ragged(lengths=LENGTHS):
    return tiny_models.ragged(NUM_PROMPT, NUM_COMPLETION, lengths)


def weights_of(mask):
    return mask[:, -NUM_COMPLETION:].float()


def forward(model, padding_free, batch=None):
    ids, mask = batch or ragged()
    return CompletionForward(model, ids, mask, NUM_COMPLETION, padding_free=padding_free)


def loss_of(model, padding_free):
    """A teacher that sees more, and the log-probabilities of the completions."""
    ids, mask = ragged()
    teacher_ids = torch.cat([random_ids(len(ids), 4, seed=1), ids], 1)
    teacher_mask = torch.cat([torch.ones(len(ids), 4, dtype=torch.long), mask], 1)
    teacher_mask[:, :-NUM_COMPLETION] = teacher_mask[:, :-NUM_COMPLETION].sort(1).values
    with torch.no_grad():
        teacher, held = forward(model, padding_free, (teacher_ids, teacher_mask))(with_head(False))
    weights = weights_of(mask)

    def compute(hidden, head):
        loss = sdft_loss(hidden, head, teacher, held.beside(head), token_weights=weights).loss
        return loss, log_probs(ids[:, -NUM_COMPLETION:], weights, 1.0)(hidden, head).log_probs

    loss, sampled = forward(model, padding_free)(compute)
    return loss, sampled * weights


def assert_packed_is_padded(model, dtype):
    """States, losses and gradients."""
    valid = weights_of(ragged()[1]).bool()
    states = [forward(model, free)(hidden_states)[valid] for free in (True, False)]
    assert_close(*states, dtype, "states")
    results, gradients = [], []
    for padding_free in (True, False):
        model.zero_grad()
        loss, sampled = loss_of(model, padding_free)
        (loss + sampled.sum()).backward()
        results.append((loss, sampled))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_close(results[0][0], results[1][0], dtype, "loss")
    assert_close(results[0][1], results[1][1], dtype, "log_probs")
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(float(g.abs().max()) for g in gradients[1].values())
    assert largest > 0
    for name, gradient in gradients[0].items():
        assert_close(gradient / largest, gradients[1][name] / largest, dtype, name)


# eager attention to padding alone is NaN in float64
@pytest.mark.parametrize(
    "dtype, attention",
    [(torch.float32, "sdpa"), (torch.float32, "eager"), (torch.float64, "sdpa")],
    ids=["fp32-sdpa", "fp32-eager", "fp64-sdpa"],
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
def test_packed_states_losses_and_gradients_are_the_padded_ones(family, training, dtype, attention):
    # spread out weights would make fp32 itself differ by more than its bound
    model = tiny_model(family, spread=0.1, attn_implementation=attention)
    assert_packed_is_padded(attach(model.to(dtype).train(training)), dtype)
    assert all(part.training == training for part in model.modules())


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3"])
def test_a_sliding_window_slides_in_each_sequence_alone(family):
    model = tiny_model(family, spread=0.1, sliding_window=3, attn_implementation="eager")
    assert "sliding_attention" in model.config.layer_types
    assert_packed_is_padded(attach(model), torch.float32)


@pytest.mark.parametrize("family", ["Cohere", "Granite", "Phi"])
def test_other_families_pack(family):
    assert_packed_is_padded(attach(tiny_model(family, spread=0.1)), torch.float32)


def test_a_model_with_adapters_packs():
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("Llama"), config).double()
    assert_packed_is_padded(attach(model), torch.float64)


def test_a_checkpointed_model_packs():
    model = tiny_model("Llama").double()
    # renamed in transformers 5.2x
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    assert_packed_is_padded(attach(model.train()), torch.float64)


def test_a_bf16_model_packs():
    model, (_, mask) = attach(tiny_model("Qwen3", spread=0.1).bfloat16()), ragged()
    with torch.no_grad():
        packed, padded = (forward(model, free)(hidden_states).float() for free in (True, False))
    valid = weights_of(mask).bool()
    assert float((packed - padded)[valid].abs().max() / padded[valid].abs().max()) < 0.05


def test_a_state_space_model_is_refused():
    with pytest.raises(
        ValueError, match=r"FalconH1.* must keep sequences .*leave out padding_free"
    ):
        forward(attach(tiny_model("FalconH1")), True)(hidden_states)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_a_prompt_of_trained_vectors_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = attach(peft.get_peft_model(tiny_model("Llama"), config))
    with pytest.raises(ValueError, match=r"must keep sequences .* a difference of inf"):
        forward(model, True)(hidden_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
def test_a_model_that_looks_across_sequences_is_refused(family, dtype, monkeypatch):
    """One whose attention does not read positions sees a plain causal row."""
    model = attach(tiny_model(family, spread=0.1).to(dtype))
    inputs = packing.Packed.inputs

    def blind(packed, model):
        mask = torch.ones_like(packed.input_ids)
        return {**inputs(packed, model), "attention_mask": mask}

    monkeypatch.setattr(packing.Packed, "inputs", blind)
    with pytest.raises(ValueError, match="must keep sequences that share a row apart"):
        check_packing(model)


def test_the_check_is_made_once_for_each_attention(monkeypatch):
    model, calls = attach(tiny_model("Llama").train()), []
    states = packing._states_packed_and_alone
    monkeypatch.setattr(
        packing, "_states_packed_and_alone", lambda m: calls.append(True) or states(m)
    )
    for attention in ("sdpa", "sdpa", "eager", "sdpa"):
        model.set_attn_implementation(attention)
        forward(model, True)(hidden_states)
    assert len(calls) == 2
    assert all(part.training for part in model.modules())


def test_packing_keeps_order_positions_and_boundaries():
    ids, mask = ragged()
    packed = pack(ids, mask)
    assert torch.equal(packed.input_ids[0], ids[mask.bool()])
    assert torch.equal(packed.input_ids[0][packed.index][mask.bool()], ids[mask.bool()])
    lengths = mask.sum(1)
    expected = torch.cat([torch.arange(n) for n in lengths.tolist()])
    assert torch.equal(packed.position_ids[0], expected)
    assert packed.boundaries.tolist() == [0, *lengths.cumsum(0).tolist()]
    assert packed.boundaries.dtype == torch.int32
    assert packed.longest == 11
    assert packed.index.shape == ids.shape


def test_empty_sequences_take_no_part():
    lengths = [(0, 0), (2, 3), (0, 0)]
    ids, mask = ragged(lengths)
    packed = pack(ids, mask)
    assert packed.boundaries.tolist() == [0, 5]
    model = attach(tiny_model("Llama").double())
    states = forward(model, True, (ids, mask))(hidden_states)
    alone = forward(model, False, (ids[1:2], mask[1:2]))(hidden_states)
    assert_close(states[1, :3], alone[0, :3], torch.float64)
    assert states.isfinite().all()


def test_a_batch_of_padding_alone_has_a_loss_of_zero_with_gradients():
    ids, mask = ragged([(0, 0), (0, 0)])
    model = attach(tiny_model("Llama"))

    def compute(hidden, head):
        return sdft_loss(hidden, head, hidden.detach(), head, token_weights=weights_of(mask)).loss

    assert pack(ids, mask).input_ids.shape == (1, 1)
    loss = forward(model, True, (ids, mask))(compute)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# the last is what transformers takes for the first where the package kernels has to fetch it
KERNELS = ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"]


@pytest.mark.parametrize("attention", KERNELS)
def test_flash_attention_is_given_the_boundaries(attention):
    model, packed = tiny_model("Llama"), pack(*ragged())
    assert set(packed.inputs(model)) == {"input_ids", "position_ids"}
    model.config._attn_implementation_internal = attention
    inputs = packed.inputs(model)
    assert inputs["cu_seq_lens_q"] is inputs["cu_seq_lens_k"] is packed.boundaries
    assert inputs["max_length_q"] == inputs["max_length_k"] == packed.longest


@pytest.fixture
def flash(monkeypatch):
    """The calls of a FlashAttention that runs here: transformers' path to it, and its contract."""
    return flash_attention.stand_in(monkeypatch)


def twins(family, dtype, **changes):
    """A model with FlashAttention, and the same one with an attention of PyTorch."""
    made = [attach(tiny_model(family, spread=0.1, **changes).to(dtype)) for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    return flash_attention.use(made[0]), made[1]


def assert_packed_as_padded_by(fused, plain, dtype):
    valid = weights_of(ragged()[1]).bool()
    packed, padded = forward(fused, True)(hidden_states), forward(plain, False)(hidden_states)
    assert_close(packed[valid], padded[valid], dtype)


@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Granite", "Phi"])
def test_flash_attention_packs_to_what_padded_rows_have(flash, family):
    """States, losses and gradients, beside its own padded rows; states beside SDPA's."""
    fused, plain = twins(family, torch.float64)
    assert_packed_is_padded(fused, torch.float64)
    assert_packed_as_padded_by(fused, plain, torch.float64)


def test_flash_attention_attends_inside_the_boundaries_alone(flash):
    fused, _ = twins("Llama", torch.float64)
    forward(fused, True)(hidden_states)
    del flash[:]
    forward(fused, True)(hidden_states)
    assert flash == 2 * [[0, 11, 16, 18, 22, 31]]  # one call for each layer


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3"])
def test_flash_attention_slides_in_each_sequence_alone(flash, family):
    """With Gemma 2's soft cap inside attention, too, which SDPA leaves out."""
    cap = {"attn_logit_softcapping": 2.0} if family == "Gemma2" else {}
    fused, plain = twins(
        family, torch.float32, sliding_window=3, attn_implementation="eager", **cap
    )
    assert_packed_is_padded(fused, torch.float32)  # these families' norms are fp32 in any dtype
    assert_packed_as_padded_by(fused, plain, torch.float32)


def test_flash_attention_packs_a_checkpointed_model_with_adapters(flash):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    inner = flash_attention.use(tiny_model("Llama", spread=0.1))
    # renamed in transformers 5.2x
    enable = getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    model = peft.get_peft_model(inner, config).double()
    model.enable_input_require_grads()
    assert_packed_is_padded(attach(model.train()), torch.float64)


def test_flash_attention_without_boundaries_is_refused(flash, monkeypatch):
    """It reads no positions where it is given boundaries: one long sequence mixes the tokens."""
    fused, _ = twins("Llama", torch.float64)
    inputs = packing.Packed.inputs

    def one_sequence(packed, model):
        length = packed.input_ids.numel()
        whole = torch.tensor([0, length], dtype=torch.int32)
        return inputs(dataclasses.replace(packed, boundaries=whole, longest=length), model)

    monkeypatch.setattr(packing.Packed, "inputs", one_sequence)
    with pytest.raises(ValueError, match=r"with flash_attention_2 attention must keep sequences"):
        check_packing(fused)


@pytest.mark.gpu
def test_flash_attention_packs():
    pytest.importorskip("flash_attn")
    model = tiny_model("Llama", spread=0.1, head_dim=32, attn_implementation="flash_attention_2")
    model = attach(model.cuda().bfloat16())
    batch = tuple(part.cuda() for part in ragged())
    with torch.no_grad():
        states = (forward(model, free, batch)(hidden_states).float() for free in (True, False))
        packed, padded = states
    valid = weights_of(batch[1]).bool()
    assert float((packed - padded)[valid].abs().max() / padded[valid].abs().max()) < 0.05


def test_masks_that_cannot_be_packed_are_refused():
    ids, mask = ragged()
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, L\) like input_ids"):
        pack(ids, mask[:, 1:])
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, L\) like input_ids"):
        pack(ids[0], mask[0])
    with pytest.raises(ValueError, match="input_ids must hold a token"):
        pack(ids[:0], mask[:0])
    mask[0, 4] = 0
    with pytest.raises(ValueError, match=r"one stretch .* 1 with padding inside; move padding"):
        pack(ids, mask)


@pytest.mark.parametrize("length", [NUM_COMPLETION, NUM_PROMPT + NUM_COMPLETION])
def test_a_completion_without_a_prompt_is_refused(length):
    batch = ragged([(5, 6), (0, 3)])
    whole = dataclasses.replace(forward(attach(tiny_model("Llama")), True, batch), length=length)
    with pytest.raises(ValueError, match="have a token of the prompt before each completion"):
        whole(hidden_states)


def test_places_in_the_sequence_are_an_integer_tensor():
    model, ids = attach(tiny_model()), random_ids(2, 8)
    places = torch.tensor([[3, 0, 15], [9, 9, 1]])
    with torch.no_grad():
        states = model(input_ids=ids, fused_sd=Request(hidden_states, places)).result
        everything = model(input_ids=ids, fused_sd=Request(hidden_states)).result
    assert torch.equal(states, everything.view(16, -1)[places])


def test_a_model_that_is_not_attached_says_so():
    with pytest.raises(ValueError, match="attach"):
        forward(tiny_model("Llama"), True)(hidden_states)


def test_vocabularies_smaller_than_the_checks_primes_are_fine():
    assert VOCAB < 7919
    check_packing(attach(tiny_model("Llama", vocab=5)))


def test_a_forward_that_replaces_the_attached_one_is_named():
    model = attach(tiny_model("Llama"))
    model.forward = lambda fused_sd, **inputs: type(model).forward(model, **inputs)
    with pytest.raises(ValueError, match=r"model\.forward must be .* attach last"):
        forward(model, False)(hidden_states)
