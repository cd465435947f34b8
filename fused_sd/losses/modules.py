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
    """Module twin of ``sdpo_loss``."""

    function = staticmethod(sdpo_loss)


class SDZeroLoss(LossModule):
    """Module twin of ``sd_zero_loss``."""

    function = staticmethod(sd_zero_loss)


class OPSDLoss(LossModule):
    """Module twin of ``opsd_loss``."""

    function = staticmethod(opsd_loss)


class SDFTLoss(LossModule):
    """Module twin of ``sdft_loss``."""

    function = staticmethod(sdft_loss)


class GKDLoss(LossModule):
    """Module twin of ``gkd_loss``."""

    function = staticmethod(gkd_loss)


class RLSDLoss(LossModule):
    """Module twin of ``rlsd_loss``."""

    function = staticmethod(rlsd_loss)


class RLCSDLoss(LossModule):
    """Module twin of ``rlcsd_loss``."""

    function = staticmethod(rlcsd_loss)


class GRPOLoss(LossModule):
    """Module twin of ``grpo_loss``."""

    function = staticmethod(grpo_loss)


class CrossEntropyLoss(LossModule):
    """Module twin of ``cross_entropy_loss``."""

    function = staticmethod(cross_entropy_loss)
