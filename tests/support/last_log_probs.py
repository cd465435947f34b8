"""Log-probabilities of a batch's last tokens: by a request, and from the model's own logits."""

from fused_sd import token_log_probs
from fused_sd.integrations.transformers import Request, completion_positions

NUM_TOKENS = 5
POSITIONS = completion_positions(NUM_TOKENS)


def fused_log_probs(model, ids, **inputs):
    """By a request; ``inputs`` are further arguments, or ``inputs_embeds`` instead of ids."""

    def compute(hidden, head):
        return token_log_probs(hidden, head, ids[:, -NUM_TOKENS:])

    given = _given(ids, inputs)
    return model(**given, fused_sd=Request(compute, POSITIONS)).result.log_probs


def own_log_probs(model, ids, **inputs):
    """From the logits that the model itself returns."""
    logits = model(**_given(ids, inputs), use_cache=False).logits[:, POSITIONS]
    return logits.log_softmax(-1).gather(-1, ids[:, -NUM_TOKENS:, None])[..., 0]


def _given(ids, inputs):
    return inputs if "inputs_embeds" in inputs else {"input_ids": ids, **inputs}
