"""The named losses as modules: they hold the settings and call the functions."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, get_args, get_type_hints

from torch import nn

from fused_sd import checks
from fused_sd.losses import distillation_methods as losses
from fused_sd.losses import policy_methods as rl_losses
from fused_sd.losses import token as token_losses
from fused_sd.losses.output import LossOutput


class LossModule(nn.Module):
    """A loss whose keyword settings are given once; those of a call go over them.

    Args:
        settings: keywords of the function of the same name.

    Raises:
        ValueError: when the function has no such keyword.
    """

    function: ClassVar[Callable[..., LossOutput]]

    def __init__(self, **settings: Any) -> None:
        super().__init__()
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
    """Names of a loss's keyword settings, those that it hands on included."""
    names: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            names.append(parameter.name)
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            (handed_on,) = get_args(parameter.annotation)  # the dict inside Unpack[...]
            names += get_type_hints(handed_on)
    return tuple(names)


class SDPOLoss(LossModule):
    """Module twin of ``sdpo_loss``."""

    function = staticmethod(losses.sdpo_loss)


class SDZeroLoss(LossModule):
    """Module twin of ``sd_zero_loss``."""

    function = staticmethod(losses.sd_zero_loss)


class OPSDLoss(LossModule):
    """Module twin of ``opsd_loss``."""

    function = staticmethod(losses.opsd_loss)


class SDFTLoss(LossModule):
    """Module twin of ``sdft_loss``."""

    function = staticmethod(losses.sdft_loss)


class GKDLoss(LossModule):
    """Module twin of ``gkd_loss``."""

    function = staticmethod(losses.gkd_loss)


class RLSDLoss(LossModule):
    """Module twin of ``rlsd_loss``."""

    function = staticmethod(rl_losses.rlsd_loss)


class RLCSDLoss(LossModule):
    """Module twin of ``rlcsd_loss``."""

    function = staticmethod(rl_losses.rlcsd_loss)


class GRPOLoss(LossModule):
    """Module twin of ``grpo_loss``."""

    function = staticmethod(rl_losses.grpo_loss)


class CrossEntropyLoss(LossModule):
    """Module twin of ``cross_entropy_loss``."""

    function = staticmethod(token_losses.cross_entropy_loss)
