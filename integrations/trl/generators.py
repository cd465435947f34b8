"""Functions that sample completions from transformers or vLLM, with token ids in and out."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fused_sd.checks import check_positive_int, fail

Generate = Callable[[list[list[int]]], list[list[int]]]
"""Takes prompts and returns one completion for each, up to its end token if it has one."""


def transformers_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 16384,
    temperature: float = 1.0,
    top_p: float = 0.9,
    batch_size: int = 16,
) -> Generate:
    """Return a function that samples from a transformers model, with the global random generator.

    Args:
        model: is in evaluation mode while it generates.
        tokenizer: gives the padding token.
        max_new_tokens: the longest completion.
        temperature: 0 takes the most likely token.
        top_p: mass of the nucleus; 0.9 is the official SD-Zero code's, 0.7 the paper's.
        batch_size: the number of prompts in one call; they are padded on the left.

    Raises:
        ValueError: a number is not positive.

    Examples:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> from fused_sd.integrations.trl import transformers_generate
        >>> name = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> model, tokenizer = (
        ...     kind.from_pretrained(name) for kind in (AutoModelForCausalLM, AutoTokenizer)
        ... )
        >>> generate = transformers_generate(model, tokenizer, max_new_tokens=4, temperature=0)
        >>> completions = generate(tokenizer(["2 + 2 =", "3 + 4 ="]).input_ids)
        >>> len(completions), max(map(len, completions)) <= 4
        (2, True)
    """
    check_positive_int("max_new_tokens", max_new_tokens)
    check_positive_int("batch_size", batch_size)
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0  # any token, since the mask hides it
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    # generate fills settings that are left out here from the model's own generation config, which
    # for many models has a top_k and a repetition penalty, and may have a number of sequences.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        repetition_penalty=1.0,
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=False,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )

    sampler: Any = model  # the type checker does not take its ``generate`` for a function

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
    """Return the tokens up to the first end token, that token included."""
    places = [place for place, token in enumerate(ids) if token in ends]
    return ids[: places[0] + 1] if places else ids


def vllm_generate(llm: Any, sampling_params: Any) -> Generate:
    """Return a function that samples from a ``vllm.LLM``.

    Args:
        llm: the engine.
        sampling_params: ``vllm.SamplingParams`` with n=1: ``num_initial`` repeats prompts instead.

    Raises:
        ValueError: n is not 1.

    Examples:
        >>> from vllm import LLM, SamplingParams
        >>> from fused_sd.integrations.trl import vllm_generate
        >>> llm = LLM("Qwen/Qwen2.5-0.5B-Instruct")
        >>> generate = vllm_generate(llm, SamplingParams(top_p=0.9, max_tokens=4096))
    """
    if sampling_params.n != 1:
        fail("sampling_params.n", "be 1", sampling_params.n, "let num_initial repeat the prompts")

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = llm.generate(requests, sampling_params)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate
