"""Completions of many prompts, all as token ids, from transformers or vLLM."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fused_sd.checks import check_positive_int, fail

Generate = Callable[[list[list[int]]], list[list[int]]]
"""Takes prompts, returns one completion for each, which ends with its end token if it has one."""


def transformers_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 16384,
    temperature: float = 1.0,
    top_p: float = 0.9,
    batch_size: int = 16,
) -> Generate:
    """Sample from a transformers model, with the global random generator.

    Args:
        model: put in evaluation mode while it generates.
        tokenizer: for the padding token.
        temperature: 0 takes the most likely token.
        top_p: mass of the nucleus; the official SD-Zero code's 0.9, its paper has 0.7.
        batch_size: prompts in one call, padded on the left.
    """
    check_positive_int("max_new_tokens", max_new_tokens)
    check_positive_int("batch_size", batch_size)
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0  # hidden by the mask
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    # what the model's own settings have and these lack would be taken over
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        repetition_penalty=1.0,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )

    sampler: Any = model  # the annotation of its generate is none of a callable

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        was_training = model.training
        model.eval()
        try:
            batches = [
                prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)
            ]
            return [ids for batch in batches for ids in complete(batch)]
        finally:
            model.train(was_training)

    @torch.no_grad()
    def complete(prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        padded = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        output: Any = sampler.generate(
            input_ids=padded.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
        )
        return [_until_end(ids, ends) for ids in output[:, longest:].tolist()]

    return generate


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    """Up to the first end token, and with it."""
    places = [place for place, token in enumerate(ids) if token in ends]
    return ids[: places[0] + 1] if places else ids


def vllm_generate(llm: Any, sampling_params: Any) -> Generate:
    """Sample from a ``vllm.LLM``.

    Args:
        sampling_params: ``vllm.SamplingParams``; ``n`` stays 1, since prompts are repeated.
    """
    if sampling_params.n != 1:
        fail("sampling_params.n", "be 1", sampling_params.n, "let num_initial repeat the prompts")

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = llm.generate(requests, sampling_params)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate
