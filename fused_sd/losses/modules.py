"""The named losses as modules that hold their settings and call the functions."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, get_args, get_type_hints

from torch import nn

from fused_sd import checks
from fused_sd.losses.gkd import gkd_loss
from fused_sd.losses.grpo import grpo_loss
from fused_sd.losses.opsd import opsd_loss
from fused_sd.losses.output import LossOutput
from fused_sd.losses.rlcsd import rlcsd_loss
from fused_sd.losses.rlsd import rlsd_loss
from fused_sd.losses.sd_zero import sd_zero_loss
from fused_sd.losses.sdft import sdft_loss
from fused_sd.losses.sdpo import sdpo_loss
from fused_sd.losses.token import cross_entropy_loss


class LossModule(nn.Module):
    """A loss whose keyword settings are given once; a call may override them.

    Args:
        settings: keywords of the function of the same name.

    Raises:
        ValueError: when the function has no such keyword.
    """

    function: ClassVar[Callable[..., LossOutput]]

    def __init__(self, *positional: Any, **settings: Any) -> None:
        super().__init__()
        if positional:
            name = type(self).__name__
            raise TypeError(f"{name} takes settings by keyword, got {positional!r}; name each")
        legal = _keywords(type(self).function)
        for name in settings:
            checks.check_one_of(f"setting of {type(self).__name__}", name, legal)
        self.settings = settings

    def forward(self, *tensors: Any, **settings: Any) -> LossOutput:
        """Call the function: see its documentation."""
        return type(self).function(*tensors, **{**self.settings, **settings})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def _keywords(function: Callable[..., LossOutput]) -> tuple[str, ...]:
    """Names of a loss's keyword settings, with the options that it passes on."""
    names: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            names.append(parameter.name)
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            (passed_on,) = get_args(parameter.annotation)  # the dict inside Unpack[...]
            names += get_type_hints(passed_on)
    return tuple(names)


class SDPOLoss(LossModule):
    """Module twin of ``sdpo_loss``.

    Examples:
        >>> import torch, fused_sd
        >>> loss = fused_sd.SDPOLoss(alpha=1.0, top_k=20, tail_floor=1e-7)
        >>> loss
        SDPOLoss(alpha=1.0, top_k=20, tail_floor=1e-07)
        >>> hidden, head = torch.randn(4, 16), torch.randn(100, 16)
        >>> loss(hidden, head, hidden, head).loss.item()  # a teacher that knows no more
        0.0
    """

    function = staticmethod(sdpo_loss)


class SDZeroLoss(LossModule):
    """Module twin of ``sd_zero_loss``.

    Examples:
        >>> import torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> (student, teacher), head = torch.randn(2, 4, 16), torch.randn(100, 16)
        >>> loss = fused_sd.SDZeroLoss(variant="code", top_k=8)
        >>> code = loss(student, head, teacher, head).loss
        >>> paper = loss(student, head, teacher, head, variant="paper").loss  # overrides
        >>> bool(code != paper)
        True
    """

    function = staticmethod(sd_zero_loss)


class OPSDLoss(LossModule):
    """Module twin of ``opsd_loss``.

    Examples:
        >>> import fused_sd
        >>> fused_sd.OPSDLoss(clip=0.05)  # a misspelt setting is found when the module is made
        Traceback (most recent call last):
        ValueError: setting of OPSDLoss must be one of 'beta', 'entry_clip', ...
        >>> fused_sd.OPSDLoss(entry_clip=0.05)
        OPSDLoss(entry_clip=0.05)
    """

    function = staticmethod(opsd_loss)


class SDFTLoss(LossModule):
    """Module twin of ``sdft_loss``.

    Examples:
        >>> import torch, fused_sd
        >>> losses = {"sdft": fused_sd.SDFTLoss(top_k=10), "gkd": fused_sd.GKDLoss(beta=0.9)}
        >>> list(torch.nn.ModuleDict(losses).parameters())  # nothing to train or to save
        []
    """

    function = staticmethod(sdft_loss)


class GKDLoss(LossModule):
    """Module twin of ``gkd_loss``.

    Examples:
        >>> import torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> (student, teacher), head = torch.randn(2, 4, 16), torch.randn(100, 16)
        >>> sharp, flat = fused_sd.GKDLoss(), fused_sd.GKDLoss(temperature=100.0)
        >>> loss = flat(student, head, teacher, head).loss
        >>> bool(loss < 0.01 * sharp(student, head, teacher, head).loss)  # flat distributions agree
        True
    """

    function = staticmethod(gkd_loss)


class RLSDLoss(LossModule):
    """Module twin of ``rlsd_loss``.

    Examples:
        >>> import torch, fused_sd
        >>> hidden, head, token_ids = torch.randn(2, 16), torch.randn(100, 16), torch.tensor([3, 5])
        >>> own = fused_sd.token_log_probs(hidden, head, token_ids).log_probs
        >>> loss = fused_sd.RLSDLoss(evidence=fused_sd.Evidence(mix=1.0), dual_clip=None)
        >>> output = loss(hidden, head, token_ids, torch.ones(2), teacher_log_probs=own - 1)
        >>> output.token_loss  # the teacher likes both less: praise shrinks by the clip's 0.2
        tensor([-0.8000, -0.8000])
    """

    function = staticmethod(rlsd_loss)


class RLCSDLoss(LossModule):
    """Module twin of ``rlcsd_loss``.

    Examples:
        >>> import torch, fused_sd
        >>> hidden, head, token_ids = torch.randn(2, 16), torch.randn(100, 16), torch.tensor([3, 5])
        >>> loss = fused_sd.RLCSDLoss(selected_weight=0.0)
        >>> right, wrong = torch.tensor([-0.1, -1.0]), torch.tensor([[-3.0], [-1.0]])
        >>> output = loss(hidden, head, token_ids, torch.ones(2), right, wrong)
        >>> round(output.loss.item(), 3)  # only the second token, on which the hints agree, is left
        -1.0
    """

    function = staticmethod(rlcsd_loss)


class GRPOLoss(LossModule):
    """Module twin of ``grpo_loss``.

    Examples:
        >>> import torch, fused_sd
        >>> hidden, head, token_ids = torch.randn(2, 16), torch.randn(100, 16), torch.tensor([3, 5])
        >>> loss = fused_sd.GRPOLoss(kl_coefficient=0.1, reduction="sum")
        >>> own = fused_sd.token_log_probs(hidden, head, token_ids).log_probs
        >>> output = loss(hidden, head, token_ids, torch.zeros(2), reference_log_probs=own)
        >>> output.loss.item()  # no advantage, and a policy that is its reference
        0.0
    """

    function = staticmethod(grpo_loss)


class CrossEntropyLoss(LossModule):
    """Module twin of ``cross_entropy_loss``.

    Examples:
        >>> import torch, fused_sd
        >>> loss = fused_sd.CrossEntropyLoss(ignore_index=0, reduction="none")
        >>> hidden, head = torch.zeros(3, 16), torch.randn(100, 16)
        >>> loss(hidden, head, torch.tensor([0, 7, 9])).loss.exp().round()  # 0 is padding
        tensor([  1., 100., 100.])
    """

    function = staticmethod(cross_entropy_loss)
