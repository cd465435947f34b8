"""RLCSD: reinforcement learning with contrastive self-distillation.

Dimension key:  (...) tokens, D and D' hidden sizes, V and V' vocabularies
"""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.engine.options import LossOptions, check_keywords
from fused_sd.head.lm_head import Head
from fused_sd.head.projection import accumulation_dtype
from fused_sd.losses.output import LossOutput
from fused_sd.losses.policy import policy_loss
from fused_sd.terms.advantages import rlcsd_advantages

CONTRAST = set(rlcsd_advantages.__kwdefaults__ or ()) - {"wrong_mask"}


def rlcsd_loss(
    hidden: Tensor,  # (..., D)
    head: Head,  # (V, D)
    token_ids: Tensor,  # (...)
    advantages: Tensor,  # (...)
    correct_log_probs: Tensor,  # (...)
    wrong_log_probs: Tensor,  # (..., K)
    *,
    wrong_mask: Tensor | None = None,  # (..., K)
    old_log_probs: Tensor | None = None,  # (...)
    selected_weight: float = 1.0,
    contrast: dict[str, Any] | None = None,
    correction: Tensor | None = None,  # broadcasts to (...)
    ratio_clip: tuple[float, float] | None = (0.2, 0.2),
    **options: Unpack[LossOptions],
) -> LossOutput:
    """RLCSD: GRPO, with the contrast of a correctly and of wrongly hinted teachers added.

    ``mean over unselected tokens of l(A) + selected_weight * mean over selected tokens of l(A +
    r)`` with l the clipped surrogate; see ``rlcsd_advantages`` for r and the selection.

    Args:
        hidden, head, token_ids, advantages, old_log_probs: as in ``policy_loss``.
        correct_log_probs, wrong_log_probs, wrong_mask: the teacher's log-probabilities of the
            tokens under a correct hint and under K wrong ones.
        selected_weight: eta.
        contrast: keywords for ``rlcsd_advantages``; None: the official configuration's values.
        correction: multiplies each token's loss, as the ratio to a rollout engine does in the
            official code.  A token whose factor is 0 still counts.
        ratio_clip: as in ``policy_loss``.
        **options: as in ``policy_loss``, without reduction: the loss is the sum of two means.
            ``token_weights`` are 0 for tokens that do not count; the two means divide by the number
            of the others.

    Raises:
        ValueError: as ``policy_loss``.

    Reference:
        *RLCSD*, arXiv 2606.11709; official configuration: tau_c 0.02, beta 1, lambda 0.5, delta
        0.02, eta 1, residual in [-2, 2], symmetric ratio clip 0.2, no dual clip.

    Examples:
        >>> import torch, fused_sd
        >>> hidden, head, token_ids = torch.randn(4, 16), torch.randn(100, 16), torch.arange(4)
        >>> advantages, hinted = torch.tensor([1.0, 1.0, -1.0, -1.0]), -torch.rand(4)
        >>> contrast = fused_sd.rlcsd_loss(
        ...     hidden, head, token_ids, advantages, hinted, hinted[:, None].expand(4, 3)
        ... )
        >>> plain = fused_sd.grpo_loss(hidden, head, token_ids, advantages)
        >>> torch.allclose(contrast.loss, plain.loss)  # hints that agree contrast nothing
        True
    """
    if options.get("reduction", "sum") != "sum":
        rule, got = "be left out: the loss is the sum of two means", repr(options["reduction"])
        checks.fail("reduction", rule, got, "weigh the means by token_weights and selected_weight")
    check_keywords("rlcsd_loss", options, LossOptions)
    checks.check_finite("selected_weight", selected_weight, "1.0 weighs both means equally")
    contrast = {} if contrast is None else contrast
    if not isinstance(contrast, dict) or not CONTRAST.issuperset(contrast):
        rule = f"be a dict of {', '.join(sorted(CONTRAST))}"
        checks.fail("contrast", rule, repr(contrast), "pass keywords of rlcsd_advantages")
    tensor_checks.check_tensor("hidden", hidden)
    shaped = rlcsd_advantages(
        advantages, correct_log_probs, wrong_log_probs, wrong_mask=wrong_mask, **contrast
    )
    given = options.get("token_weights")
    owner = advantages.shape, advantages.device, "advantages"
    tensor_checks.check_token_weights(given, *owner, "sum")
    if correction is not None:
        tensor_checks.check_mask("correction", correction)
        correction = tensor_checks.broadcast("correction", correction, owner[0], owner[2])
        tensor_checks.check_per_token("correction", correction, *owner)
    mask = torch.ones_like(shaped.advantages) if given is None else given
    dtype = accumulation_dtype(hidden.dtype)
    weights = torch.zeros_like(mask, dtype=dtype)
    for part, scale in ((~shaped.selected, 1.0), (shaped.selected, selected_weight)):
        counted = torch.where(part, mask, 0).to(dtype)
        weights = weights + scale * counted / (counted != 0).sum().clamp(min=1)
    if correction is not None:
        weights = weights * correction
    hints = {"correct_log_probs": correct_log_probs, "wrong_log_probs": wrong_log_probs}
    _check_hints(hints, wrong_mask, weights)
    weighted: Any = {**options, "token_weights": weights, "reduction": "sum"}
    return policy_loss(
        hidden,
        head,
        token_ids,
        shaped.advantages,
        old_log_probs=old_log_probs,
        ratio_clip=ratio_clip,
        **weighted,
    )


def _check_hints(
    hints: dict[str, Tensor], wrong_mask: Tensor | None, token_weights: Tensor
) -> None:
    """Check the values of the log-probabilities that count; NaN would select no token."""
    if not tensor_checks.is_readable(token_weights):
        return
    wrong_weights = token_weights[..., None].expand_as(hints["wrong_log_probs"])
    if wrong_mask is not None:
        wrong_weights = wrong_weights * wrong_mask
    for name, weights in zip(hints, (token_weights, wrong_weights), strict=True):
        tensor_checks.check_token_values(name, hints[name], weights)
