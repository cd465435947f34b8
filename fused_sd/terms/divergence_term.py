"""A divergence as a caller chooses it: a row of the table ``DIVERGENCES``, with its parameter."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.settings import setting
from fused_sd.terms.divergence import DIVERGENCES, Definition, Divergence, Jsd, MixedKl, Term


@setting
class DivergenceTerm(NamedTuple):
    """A divergence as objectives and kernels take it: its name in the table and its parameter."""

    name: str
    parameter: float

    @property
    def definition(self) -> Definition:
        return DIVERGENCES[self.name]

    @property
    def function(self) -> Term:
        return self.definition.function

    @property
    def balance(self) -> float:
        return self.definition.balance(self.parameter)

    @property
    def share_of_mean_ratio(self) -> float | None:
        share = self.definition.share_of_mean_ratio
        return None if share is None else share(self.parameter)

    def plain(self, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        """The term as the papers write it, for sides that need not sum to 1."""
        term, dlog_s = self.function(log_s, log_t, self.parameter)
        if self.balance == 0:
            return term, dlog_s
        s = log_s.exp()
        return term + self.balance * (s - log_t.exp()), dlog_s + self.balance * s

    def clipped(self, log_s: Tensor, log_t: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor]:
        """The plain term cut at ``clip``, for sides that sum to 1, and which entries were cut.

        ``balance (s - t)`` sums to 0 over all entries, so its sum over the uncut entries is minus
        its sum over the cut ones.  The cut entries carry that part, and the others keep the
        balanced term.
        """
        term, dlog_s = self.function(log_s, log_t, self.parameter)
        s = log_s.exp()
        shift = self.balance * (s - log_t.exp())
        cut = term + shift > clip
        dlog_s = torch.where(cut, -self.balance * s, dlog_s)
        return torch.where(cut, clip - shift, term), dlog_s, cut


def divergence_term(divergence: Divergence, argument: str = "divergence") -> DivergenceTerm:
    """The term of a divergence as a caller gives it, in the argument that is named.

    Raises:
        ValueError: when it is neither a name without a parameter nor one of the table's classes.
    """
    if isinstance(divergence, MixedKl) and divergence.forward_weight in (0, 1):
        # one KL alone: where the other is infinite, 0 times it would be NaN
        return DivergenceTerm("forward_kl" if divergence.forward_weight else "reverse_kl", 0.0)
    for name, definition in DIVERGENCES.items():
        if definition.setting is None:
            if isinstance(divergence, str) and divergence == name:
                return DivergenceTerm(name, 0.0)
        elif isinstance(divergence, definition.setting):
            return DivergenceTerm(name, getattr(divergence, definition.parameter_name))
    known = DIVERGENCES.get(divergence) if isinstance(divergence, str) else None
    remedy = "forward is KL(teacher||student), reverse is KL(student||teacher)"
    if known is not None and known.setting is not None:
        remedy = f"pass {_call(known)}, which carries its parameter"
    legal = [
        repr(name) if known.setting is None else _call(known) for name, known in DIVERGENCES.items()
    ]
    rule = f"be {', '.join(legal[:-1])} or {legal[-1]}"
    checks.fail(argument, rule, repr(divergence), remedy)


def _call(definition: Definition) -> str:
    assert definition.setting is not None
    return f"{definition.setting.__name__}({definition.parameter_name})"


def named_divergence(name: str, parameter: float | None = None) -> Divergence:
    """A divergence by its name in the table and its parameter, as configurations hold them.

    Args:
        name: a key of ``DIVERGENCES``.
        parameter: of the divergence's class; None where the divergence has none.

    Raises:
        ValueError: when the name is unknown, or a parameter is missing or superfluous.
    """
    checks.check_one_of("divergence", name, DIVERGENCES)
    known = DIVERGENCES[name]
    if known.setting is None and parameter is not None:
        checks.fail(f"divergence {name!r}", "have no parameter", parameter, "leave it out")
    if known.setting is not None and parameter is None:
        rule, remedy = f"have its {known.parameter_name}", f"pass it, as {_call(known)} takes it"
        checks.fail(f"divergence {name!r}", rule, "none", remedy)
    made: Any = name if known.setting is None else known.setting(parameter)
    return made


def generalized_jsd(beta: float | Divergence, argument: str = "beta") -> Divergence:
    """The divergence that trainers mean by ``beta``: ``Jsd(beta)``, and a KL at either end.

    GKD calls the number beta, SDPO and SDFT call it alpha: it is one number, the teacher's weight
    in the mixture.  0 means KL(t||s) and 1 means KL(s||t), where the formula of the divergence
    would tend to 0.

    Args:
        beta: in [0, 1]; a divergence is returned as it is, for methods that let a caller choose
            another one in the JSD's place.
        argument: what the caller's function calls the number, for messages.

    Raises:
        ValueError: when it is neither a number of [0, 1] nor a divergence.

    Examples:
        >>> import fused_sd
        >>> [fused_sd.generalized_jsd(beta) for beta in (0, 0.5, 1)]
        ['forward_kl', Jsd(beta=0.5), 'reverse_kl']
        >>> fused_sd.generalized_jsd(fused_sd.SkewKl(0.9))
        SkewKl(student_weight=0.9)
    """
    if not isinstance(beta, int | float):
        divergence_term(beta, argument)
        return beta
    checks.check_unit_interval(argument, beta)
    if beta == 0:
        return "forward_kl"
    return "reverse_kl" if beta == 1 else Jsd(beta)
