"""The example's rollout engine: what it samples, and what it says of that."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from chat_tokenizer import ids, tokenizer
from main_ppo_runs import make_config

from fused_sd.integrations.examples.verl_on_cpu.generation import Request, Sampling, complete
from fused_sd.integrations.examples.verl_on_cpu.rollout import TransformersServer

PROMPTS = [ids("1+1?"), ids("What is two and two?"), ids("9")]


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    made = Qwen3ForCausalLM(make_config(tokenizer(), 32)).eval()
    for parameter in made.parameters():  # a random model is nearly uniform
        parameter.data *= 3
    return made


def sample(model, sampling, seeds=(5, 6, 7), ends=()):
    requests = [Request(one, 8, sampling, seed) for one, seed in zip(PROMPTS, seeds)]
    return complete(model, requests, pad=tokenizer().pad_token_id, ends=ends)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(1.3, top_k=5)])
def test_log_probs_are_those_of_the_distribution_that_is_sampled(model, sampling):
    for prompt, (tokens, log_probs) in zip(PROMPTS, sample(model, sampling)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
        logits /= sampling.temperature
        if sampling.top_k > 0:
            least = logits.topk(sampling.top_k).values[:, -1:]
            logits = logits.where(logits >= least, -torch.inf)
        own = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(log_probs).double(), own, rtol=0, atol=1e-4)


def test_temperature_0_takes_the_likeliest_token(model):
    for prompt, (tokens, _) in zip(PROMPTS, sample(model, Sampling(0.0))):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        assert tokens == logits.argmax(-1).tolist()


def test_a_seed_samples_the_same_response_in_any_batch(model):
    together = sample(model, Sampling())
    alone = complete(
        model,
        [Request(PROMPTS[1], 8, Sampling(), 6)],
        pad=tokenizer().pad_token_id,
        ends=(),
    )
    assert alone[0][0] == together[1][0]
    assert sample(model, Sampling(), seeds=(1, 2, 3))[1][0] != together[1][0]


def test_frequencies_are_the_probabilities(model):
    few = Sampling(top_k=3)
    requests = [Request(PROMPTS[0], 1, few, seed) for seed in range(3000)]
    drawn = complete(model, requests, pad=tokenizer().pad_token_id, ends=())
    expected = {tokens[0]: torch.tensor(said[0]).exp().item() for tokens, said in drawn}
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    for token, probability in expected.items():
        share = sum(tokens == [token] for tokens, _ in drawn) / len(drawn)
        assert abs(share - probability) < 5 * (probability * (1 - probability) / len(drawn)) ** 0.5


def test_a_response_ends_with_its_end(model):
    (whole, _), *_ = sample(model, Sampling())
    (cut, log_probs), *_ = sample(model, Sampling(), ends=(whole[2],))
    assert cut == whole[: whole.index(whole[2]) + 1]
    assert len(log_probs) == len(cut)


@pytest.mark.parametrize(
    "asked, media, message",
    [
        ({"stop": ["."]}, {}, "sampling_params must be among logprobs, .* got \\['stop'\\]"),
        ({}, {"image_data": [1]}, "the prompt must be text .* got image_data"),
        ({}, {"audio_data": [1]}, "the prompt must be text .* got audio_data"),
    ],
)
def test_what_the_engine_does_not_read_is_refused(asked, media, message):
    server = object.__new__(TransformersServer)
    server.config = SimpleNamespace(prompt_length=8, response_length=8)
    with pytest.raises(ValueError, match=message):
        asyncio.run(server.generate("1", prompt_ids=[1], sampling_params=asked, **media))
