"""A row in a padded batch is the row alone, however its model counts positions."""

import pytest
import torch
import transformers
from closeness import assert_close, errors

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import tiny_models
from tiny_models import random_ids, tiny_model

from fused_sd.integrations.shared.completion_scores import CompletionForward, log_probs
from fused_sd.integrations.shared.padding import (
    check_padding_behind,
    pad_behind,
    shift_by_padding,
)
from fused_sd.integrations.transformers import attach, hidden_states

NUM_PROMPT, NUM_COMPLETION = 7, 6
LENGTHS = [(7, 6), (3, 4), (1, 6), (5, 2)]  # tokens of prompt and completion

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
DECODER = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
STATE = {"hidden_size": 32, "num_hidden_layers": 2}
DEEPSEEK = {
    **SIZES,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "q_lora_rank": 8,
    "o_lora_rank": 8,
    "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
}
MODELS = {
    # positions from the first column
    "GPT2LMHeadModel": GPT,
    "GPTBigCodeForCausalLM": GPT,
    "OpenAIGPTLMHeadModel": GPT,
    "GPTNeoForCausalLM": {
        **STATE,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "CTRLLMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48},
    "BioGptForCausalLM": SIZES,
    "XGLMForCausalLM": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "BartForCausalLM": DECODER,
    "PegasusForCausalLM": DECODER,
    # blocks from the first column; a state through the padding
    "DeepseekV4ForCausalLM": DEEPSEEK,
    "RwkvForCausalLM": {**STATE, "attention_hidden_size": 32},
    "xLSTMForCausalLM": {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4},
    # positions from the mask; biases instead of positions; rotary
    "OPTForCausalLM": {**STATE, "ffn_dim": 48, "num_attention_heads": 4},
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "LlamaForCausalLM": SIZES,
}
COUNTS_ITSELF = list(MODELS)[:-3]
# a mask from the position ids; the others refuse padding_free
PACKS = ("GPT2", "GPTBigCode", "GPTNeo", "CTRL", "Llama")


def random_model(name, spread=0.25):
    """A tiny model in evaluation mode, whose random weights are large enough to tell positions."""
    cls = getattr(transformers, name)
    tokens = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    model = cls(cls.config_class(**tokens, **MODELS[name])).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return attach(model)


def ragged(lengths=LENGTHS):
    return tiny_models.ragged(NUM_PROMPT, NUM_COMPLETION, lengths)


def batch_and_rows(ids, mask):
    """The batch's forward, and each row's own without padding; which states are wanted."""
    wanted = mask[:, -NUM_COMPLETION:].bool()
    rows = [
        (row[own.bool()][None], torch.ones(1, int(own.sum()), dtype=torch.long), int(n))
        for row, own, n in zip(ids, mask, wanted.sum(1))
    ]
    return (ids, mask, NUM_COMPLETION), rows, wanted


def states_and_gradient(model, batch, wanted=None, **layout):
    """The completions' states (N, D) of one forward, and the gradient of a weighted sum of them."""
    model.zero_grad()
    states = CompletionForward(model, *batch, **layout)(hidden_states)
    states = states[0] if wanted is None else states[wanted]
    (states * torch.linspace(-1, 1, states.size(-1))).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return states.detach(), gradient


@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_a_batch_is_the_row_alone(name):
    model = random_model(name)
    whole, rows, wanted = batch_and_rows(*ragged())
    states, gradient = states_and_gradient(model, whole, wanted)
    alone = [states_and_gradient(model, row) for row in rows]
    assert_close(states, torch.cat([row for row, _ in alone]), torch.float32, "states")
    # All at once, since some are 0 but for rounding, as that of a bias of attention's keys.  xLSTM
    # multiplies rounding: 2e-5 with one BLAS; a row that saw its padding is off by 0.1 and more.
    reference = sum(of_row for _, of_row in alone)
    assert max(errors(gradient, reference)) < 1e-4


@pytest.mark.parametrize("name", COUNTS_ITSELF)
def test_padding_that_stays_before_a_row_is_noticed(name):
    """TRL's own layout, which the swaps of its trainers keep."""
    model = random_model(name)
    assert shift_by_padding(model) > 0
    (ids, mask, length), rows, wanted = batch_and_rows(*ragged())
    kept = CompletionForward(model, ids, mask, length, keeps_padding=True)(hidden_states)[wanted]
    alone = torch.cat([CompletionForward(model, *row)(hidden_states)[0] for row in rows])
    assert (kept - alone).abs().max() > 0.1
    assert not model.training


def test_a_model_that_reads_all_padding_is_refused():
    """CPM-Ant builds its mask from the ids, for padding on the left, and ignores the given one."""
    config = transformers.CpmAntConfig(
        vocab_size=97,
        hidden_size=32,
        num_attention_heads=4,
        dim_head=8,
        dim_ff=48,
        num_hidden_layers=2,
        prompt_length=4,
        segment_types=8,
    )
    torch.manual_seed(0)
    model = attach(transformers.CpmAntForCausalLM(config).eval())
    with pytest.raises(ValueError, match=r"CpmAntForCausalLM must have states that padding behind"):
        check_padding_behind(model)
    for name in ("GPT2LMHeadModel", "RwkvForCausalLM", "DeepseekV4ForCausalLM"):
        check_padding_behind(random_model(name))


@pytest.mark.parametrize("family", ["Qwen3", "Gemma3", "FalconH1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_at_other_positions_is_no_shift(family, dtype):
    assert shift_by_padding(attach(tiny_model(family, spread=0.1).to(dtype))) == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_batch_is_the_padded_one_or_is_refused(name):
    model = random_model(name)
    whole, _, wanted = batch_and_rows(*ragged())
    with torch.no_grad():
        padded = CompletionForward(model, *whole)(hidden_states)[wanted]
        packed = CompletionForward(model, *whole, padding_free=True)
        if name.startswith(PACKS):
            assert_close(packed(hidden_states)[wanted], padded, torch.float32)
            return
        with pytest.raises(ValueError, match="keep sequences that share a row apart"):
            packed(hidden_states)


def test_a_longer_prompt_leaves_the_same_completions_in_place():
    """Student and teacher: other prompts, hence other padding, before the same completions."""
    model = random_model("GPT2LMHeadModel")
    ids, mask = ragged()
    hint = random_ids(len(ids), 5, seed=1)
    longer = torch.cat([hint, ids], 1)
    has_hint = torch.tensor([1, 0, 1, 0])[:, None].expand(-1, 5)
    wider = torch.cat([has_hint, mask], 1)
    wider[:, :-NUM_COMPLETION] = wider[:, :-NUM_COMPLETION].sort(1).values
    compute = log_probs(ids[:, -NUM_COMPLETION:], mask[:, -NUM_COMPLETION:], 1.0)
    with torch.no_grad():
        student = CompletionForward(model, ids, mask, NUM_COMPLETION)(compute).log_probs
        teacher = CompletionForward(model, longer, wider, NUM_COMPLETION)(compute).log_probs
        for row, (one, other) in enumerate(zip(student, teacher)):
            length = int(mask[row, -NUM_COMPLETION:].sum())
            if not has_hint[row].any():
                assert_close(other[:length], one[:length], torch.float32)
            own = longer[row][wider[row].bool()][None]
            logits = model(input_ids=own).logits[0].log_softmax(-1)
            exact = logits[-length - 1 : -1].gather(1, own[0, -length:, None])[:, 0]
            assert_close(other[:length], exact, torch.float32)


def test_token_types_move_with_their_tokens_and_other_inputs_do_not():
    ids, mask = ragged([(2, 1), (3, 6)])
    pixels = torch.rand(ids.shape)
    types = {"token_type_ids": 2 * ids, "pixel_values": pixels}
    inputs, (rows, columns) = pad_behind(ids, mask, NUM_COMPLETION, types)
    assert inputs["attention_mask"].tolist() == [[1] * 3 + [0] * 6, [1] * 9]
    for row in range(2):
        own = ids[row][mask[row].bool()]
        assert torch.equal(inputs["input_ids"][row, : len(own)], own)
    assert torch.equal(inputs["token_type_ids"], 2 * inputs["input_ids"])
    assert inputs["pixel_values"] is pixels
    assert (columns < 0).all()
    assert columns[0, 0] == 1 - 9
    assert columns[1].tolist() == list(range(2 - 9, 8 - 9))
    assert rows.tolist() == [[0], [1]]


def test_virtual_tokens_before_a_row_do_not_move_its_states():
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = attach(peft.get_peft_model(tiny_model("Llama", spread=0.1), config).eval())
    whole, rows, wanted = batch_and_rows(*ragged())
    with torch.no_grad():
        states = CompletionForward(model, *whole)(hidden_states)[wanted]
        alone = [CompletionForward(model, *row)(hidden_states)[0] for row in rows]
    assert_close(states, torch.cat(alone), torch.float32)


def test_a_row_that_fits_is_not_refused_for_its_padding():
    """A long prompt and a long completion, of two rows, are more positions than GPT-2 has."""
    model = random_model("GPT2LMHeadModel")
    ids = random_ids(2, 90)
    mask = torch.zeros_like(ids)
    mask[0, :51] = mask[1, 40:] = 1  # 50 and 10 of the prompt, 1 and 40 of the completion
    assert CompletionForward(model, ids, mask, 40)(hidden_states).shape == (2, 40, 32)


@pytest.mark.parametrize("length", [NUM_COMPLETION, NUM_PROMPT + NUM_COMPLETION])
def test_a_completion_without_a_prompt_is_refused(length):
    batch = ragged([(5, 6), (0, 3)])
    with pytest.raises(ValueError, match="have a token of the prompt before each completion"):
        CompletionForward(random_model("LlamaForCausalLM"), *batch, length)(hidden_states)


def test_rows_of_padding_alone_take_no_part():
    ids, mask = ragged([(0, 0), (2, 3), (0, 0)])
    model = random_model("LlamaForCausalLM")
    states = CompletionForward(model, ids, mask, NUM_COMPLETION)(hidden_states)
    alone = CompletionForward(model, ids[1:2], mask[1:2], NUM_COMPLETION)(hidden_states)
    assert_close(states[1, :3], alone[0, :3], torch.float32)
    nothing = CompletionForward(model, ids[::2], mask[::2], NUM_COMPLETION)(hidden_states)
    assert nothing.shape == (2, NUM_COMPLETION, 32)
    assert nothing.isfinite().all()
