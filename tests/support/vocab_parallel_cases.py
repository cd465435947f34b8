"""Every loss beside its definition, on a head that may lie on several ranks.

Dimension key:  N tokens, D hidden size, V vocabulary, K entries of a support
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from cases import Case, make_case
from divergences import EACH
from torch import Tensor

import fused_sd
from fused_sd import LMHead, LossOutput, reference
from fused_sd.terms.support import named_support

K = 12  # more than some shards have
BORDERS = (0, 9, 10, 18, 19, 20, 22, 23, 29, 30, 35, 36, 39)  # ids at both sides of every one
CAP = 1.2  # of importance ratios
REMAINDERS = ("tail", "renormalize", "drop")
MASS = 0.6  # of a nucleus
BESIDE = ("student_log_prob", "student_entropy")
SUPPORTS = ("student", "teacher", "union", "teacher_nucleus", "ids", "entries")
DIVERGENCES = EACH

Outcome = dict[str, Tensor]  # loss, token_loss, gradients, metrics
Fused = Callable[..., LossOutput]  # of a case, both heads and what every loss takes
# of float64 logits: token losses (N,), and where a ratio multiplies them that too
Definition = Callable[[Tensor, Tensor, Case], Tensor | tuple[Tensor, Tensor]]
Weighting = Callable[[Tensor, Case], Tensor]  # token losses to the loss


def summed(tokens: Tensor, case: Case) -> Tensor:
    return (tokens * case.token_weights).sum()


def averaged(tokens: Tensor, case: Case) -> Tensor:
    total = case.token_weights.sum()
    return (tokens * case.token_weights).sum() / torch.where(total == 0, 1, total)


def each(tokens: Tensor, case: Case) -> Tensor:
    return tokens * case.token_weights


def unweighted(tokens: Tensor, case: Case) -> Tensor:
    """Weights only say which tokens count."""
    return tokens.sum()


def by_selection(tokens: Tensor, case: Case) -> Tensor:
    """RLCSD's two means."""
    _, selected = reference.rlcsd_advantages(advantages(case), *hints(case))
    weighted = tokens * case.token_weights
    return sum(
        torch.where(part, weighted, 0).sum() / part.sum().clamp(min=1)
        for part in (selected, ~selected)
    )


@dataclass(frozen=True)
class Check:
    """A loss, its definition, and what it is computed of.

    Attributes:
        fused: the library's call.
        definition: token losses of both sides' logits.
        problem: of ``make_case``.
        change: what becomes of the case.
        teacher_valid: the teacher's ``valid_vocab``, where it is not the student's.
        run: what the call takes beside.
        weighting: how the definition's tokens make the loss.
        trained: inputs that want a gradient.
    """

    fused: Fused
    definition: Definition
    problem: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Case], None] = lambda case: None
    teacher_valid: int | None = None
    run: dict[str, Any] = field(default_factory=dict)
    weighting: Weighting = summed
    trained: tuple[str, ...] = ("hidden", "weight", "bias")

    def case(self, vocab: int, dtype: torch.dtype = torch.float64) -> Case:
        torch.manual_seed(0)
        case = make_case(**{"vocab": vocab, "bias": True, **self.problem})
        case.token_ids = torch.tensor(BORDERS).repeat(2)[1 : 1 + len(case.token_ids)]
        case.token_ids %= case.valid_vocab or vocab
        shaping = case.logit_scale, case.softcap, 1.0, case.valid_vocab
        logits = reference.logits(case.hidden, case.weight, case.bias, *shaping).detach()
        # not far from the student's own, on either side
        case.old_log_probs = case.old_log_probs / 2 + 0.4
        case.old_log_probs += reference.token_log_prob(logits, case.token_ids)
        self.change(case)
        return case.to(dtype)


def upstream(case: Case, loss: Tensor) -> Tensor:
    """What a loss is scaled by before it goes back: a number, or one for each token."""
    factors = torch.arange(1.0, 1 + len(case.token_ids)) if loss.dim() else torch.tensor(3.0)
    return factors.to(loss)


def outcome(
    check: Check, case: Case, student: LMHead, teacher: LMHead, again: bool = False, **run: Any
) -> Outcome:
    """What the library makes of it.

    Args:
        again: go back twice, and halve the gradients.
    """
    inputs = {"hidden": case.hidden, "weight": student.weight, "bias": student.bias}
    trained = {name: inputs[name] for name in check.trained if inputs[name] is not None}
    for name, tensor in inputs.items():
        if tensor is not None:
            tensor.requires_grad_(name in check.trained)
    run = {"token_weights": case.token_weights, "chunk_size": 3, **check.run, **run}
    output = check.fused(case, student, teacher, **run)
    found = {"loss": output.loss.detach(), "token_loss": output.token_loss}
    found |= {f"metric {name}": value for name, value in output.metrics.items()}
    if trained:
        scaled = (output.loss * upstream(case, output.loss)).sum()
        gradients = torch.autograd.grad(scaled, list(trained.values()), retain_graph=again)
        if again:
            second = torch.autograd.grad(scaled, list(trained.values()))
            assert all(torch.equal(*pair) for pair in zip(gradients, second, strict=True))
        found |= dict(zip((f"d{name}" for name in trained), gradients, strict=True))
    return found


def truth(check: Check, vocab: int) -> Outcome:
    """What the definition makes of it, in float64."""
    case = check.case(vocab)
    counted = case.token_weights != 0
    some = replace(
        case,
        **{
            name: getattr(case, name)[counted]
            for name in ("hidden", "teacher_hidden", "token_ids", "old_log_probs", "token_weights")
        },
    )
    shaping = {"logit_scale": case.logit_scale, "softcap": case.softcap}
    temperature = check.run.get("temperature", 1.0)
    student = reference.logits(
        some.hidden,
        case.weight,
        case.bias,
        temperature=temperature,
        valid_vocab=case.valid_vocab,
        **shaping,
    )
    teacher = reference.logits(
        some.teacher_hidden,
        case.teacher_weight,
        temperature=check.run.get("teacher_temperature") or temperature,
        valid_vocab=check.teacher_valid or case.valid_vocab,
        **shaping,
    )
    more = teacher.shape[-1] - student.shape[-1]
    student = torch.nn.functional.pad(student, (0, max(more, 0)), value=-torch.inf)
    teacher = torch.nn.functional.pad(teacher, (0, max(-more, 0)), value=-torch.inf)
    tokens = check.definition(student, teacher, some)
    tokens, ratio = tokens if isinstance(tokens, tuple) else (tokens, 1.0)
    loss = check.weighting(tokens * ratio, some)
    factors = upstream(case, loss)
    scaled = (loss * (factors[counted] if loss.dim() else factors)).sum()
    inputs = {name: getattr(case, name) for name in check.trained}
    inputs = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    gradients = []
    if inputs:
        gradients = torch.autograd.grad(scaled, list(inputs.values()), materialize_grads=True)

    def spread(values: Tensor) -> Tensor:
        return torch.zeros(counted.shape).to(values).index_put((counted,), values.detach())

    found = {"loss": spread(loss) if loss.dim() else loss.detach(), "token_loss": spread(tokens)}
    return found | dict(zip((f"d{name}" for name in inputs), gradients, strict=True))


def entry_ids(case: Case, distinct: bool = False) -> Tensor:
    """(N, K) ids around every border, with padding and a repetition where they may be."""
    known = [at for at in BORDERS if at < (case.valid_vocab or case.weight.shape[0])]
    more = [] if distinct else [-1, known[1]]
    return torch.tensor(known + more).expand(len(case.token_ids), -1)


def most_likely(logits: Tensor, k: int) -> Tensor:
    """Ids (N, K) of the largest, equal logits by lowest id."""
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def served(case: Case) -> tuple[Tensor, Tensor]:
    """A teacher's log-probabilities (N, K) of ids, as a server gives them."""
    ids = entry_ids(case)
    logits = reference.logits(
        case.teacher_hidden,
        case.teacher_weight,
        logit_scale=case.logit_scale,
        softcap=case.softcap,
        valid_vocab=case.valid_vocab,
    )
    found = logits.log_softmax(-1).gather(-1, ids.clamp(min=0))
    dtype = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    return ids, found.masked_fill(ids < 0, -torch.inf).to(dtype)


def advantages(case: Case) -> Tensor:
    """Of both signs, and 0 for one of the tokens."""
    signed = torch.sin(case.token_ids.double())
    return torch.where(case.token_ids == BORDERS[4], 0, signed).to(case.old_log_probs)


def divergence(
    name: str = "reverse_kl",
    support: str = "full",
    remainder: str = "tail",
    *,
    k: int = K,
    importance: bool = False,
    metrics: tuple[str, ...] = (),
    **clips: Any,  # entry_clip, token_clip, tail_floor, log_prob_floor
) -> tuple[Fused, Definition]:
    """A divergence, and its definition."""
    choice, named = DIVERGENCES[name]
    top = {"student": (k,), "teacher": (k,), "union": (k,), "teacher_nucleus": (k, MASS)}

    def fused(case: Case, student: LMHead, teacher: LMHead, **run: Any) -> LossOutput:
        settings = {"divergence": choice, "metrics": metrics, "reduction": "sum", **clips, **run}
        if importance or any("log_prob" in metric for metric in metrics):
            settings["token_ids"] = case.token_ids
        if importance:
            settings["importance"] = fused_sd.ImportanceCap(case.old_log_probs, CAP)
        if support == "entries":
            sides = case.hidden, student, *served(case)
            return fused_sd.topk_divergence_loss(*sides, remainder=remainder, **settings)
        if support != "full":
            chosen = fused_sd.TokenIds(entry_ids(case))
            if support in top:
                chosen = named_support(support, *top[support])
            settings |= {"support": chosen, "remainder": remainder}
        sides = case.hidden, student, case.teacher_hidden, teacher
        return fused_sd.divergence_loss(*sides, **settings)

    def definition(student: Tensor, teacher: Tensor, case: Case) -> Tensor:
        mask, vocab = None, student.shape[-1]
        if support == "teacher_nucleus":
            mask = reference.teacher_nucleus(student, teacher, k, MASS)
        elif support in top:
            mask = torch.zeros_like(student, dtype=torch.bool)
            for side, logits in (("student", student), ("teacher", teacher)):
                if support in (side, "union"):
                    mask |= reference.given_ids(most_likely(logits, k), vocab)
        elif support != "full":
            mask = reference.given_ids(entry_ids(case), vocab)
        if support == "entries":
            teacher = reference.served_teacher(*served(case), vocab)
        exact = {key: clips.get(key) for key in ("entry_clip", "tail_floor")}
        if mask is not None:
            exact |= {"support": mask, "remainder": remainder}
        if "log_prob_floor" in clips:
            sides = (reference.log_probs(side) for side in (student, teacher.detach()))
            log_s, log_t = (side.clamp(min=clips["log_prob_floor"]) for side in sides)
            return reference.terms(log_s, log_t, name, **named)[mask].view(len(student), -1).sum(-1)
        loss = reference.divergence(student, teacher, divergence=name, **named, **exact)
        bounds = clips.get("token_clip")
        if bounds is not None:
            loss = loss.clamp(*bounds)
        if importance:
            log_prob = reference.token_log_prob(student, case.token_ids)
            return loss, reference.importance(log_prob, case.old_log_probs, CAP)
        return loss

    return fused, definition


def joint(*which: str) -> tuple[Fused, Definition]:
    """A divergence, and what a policy loss needs of the same run."""
    alone, defined = divergence(*which)

    def fused(case: Case, student: LMHead, teacher: LMHead, **run: Any) -> LossOutput:
        more = {"with_grad": BESIDE, "token_ids": case.token_ids}
        output = alone(case, student, teacher, reduction="none", **more, **run)
        beside = (
            output.with_grad["student_log_prob"] + 0.3 * output.with_grad["student_entropy"] ** 2
        )
        loss = output.loss + beside * case.token_weights.to(beside)
        return LossOutput(loss, output.token_loss + beside.detach(), output.metrics)

    def definition(student: Tensor, teacher: Tensor, case: Case) -> Tensor:
        log_prob = reference.token_log_prob(student, case.token_ids)
        beside = log_prob + 0.3 * reference.entropy(student) ** 2
        return defined(student, teacher, case) + beside

    return fused, definition


def named(name: str, definition: Callable[[Tensor, Tensor], Tensor], **settings: Any) -> Check:
    """A divergence under its paper's name; its mean."""
    function = getattr(fused_sd, f"{name}_loss")

    def fused(case: Case, student: LMHead, teacher: LMHead, **run: Any) -> LossOutput:
        return function(case.hidden, student, case.teacher_hidden, teacher, **settings, **run)

    return Check(fused, lambda s, t, case: definition(s, t), weighting=averaged)


def log_probs(
    entropy: bool = False, entries: str | None = None, tail: bool = False
) -> tuple[Fused, Definition]:
    """A number of each token's log-probabilities, which goes back through all of them."""

    def fused(case: Case, student: LMHead, teacher: LMHead, **run: Any) -> LossOutput:
        if entries is None:
            ids = case.token_ids
            found = fused_sd.token_log_probs(case.hidden, student, ids, entropy=entropy, **run)
            values = found.log_probs + (0 if found.entropy is None else 0.3 * found.entropy**2)
            return LossOutput(values.sum(), values.detach(), {})
        which = K if entries == "top-k" else entry_ids(case, distinct=True)
        top = fused_sd.entry_log_probs(case.hidden, student, which, tail=tail, **run)
        values = (top.log_probs * weights(top.log_probs)).sum(-1)
        values = values + (0 if top.tail is None else top.tail)
        return LossOutput(values.sum(), values.detach(), {"ids": top.token_ids})

    def weights(entries: Tensor) -> Tensor:
        return torch.arange(1.0, 1 + entries.shape[-1]).to(entries) / entries.shape[-1]

    def definition(student: Tensor, teacher: Tensor, case: Case) -> Tensor:
        if entries is None:
            log_prob = reference.token_log_prob(student, case.token_ids)
            return log_prob + (0.3 * reference.entropy(student) ** 2 if entropy else 0)
        log_s = reference.log_probs(student)
        ids = entry_ids(case, distinct=True)
        if entries == "top-k":
            ids = most_likely(student, K)
        values = (log_s.gather(-1, ids) * weights(ids.double())).sum(-1)
        if not tail:
            return values
        outside = log_s.masked_fill(reference.given_ids(ids, student.shape[-1]), -torch.inf)
        return values + outside.logsumexp(-1)

    return fused, definition


def sampled(
    name: str,
    definition: Callable[[Tensor, Tensor, Case], Tensor],  # of log-probs of the sampled tokens
    teacher_states: bool = False,
    has_advantages: bool = True,
    **settings: Any,
) -> tuple[Fused, Definition]:
    """A loss of the sampled tokens; settings may be functions of the case."""
    function = getattr(fused_sd, f"{name}_loss")

    def fused(case: Case, student: LMHead, teacher: LMHead, **run: Any) -> LossOutput:
        given = {key: v(case) if callable(v) else v for key, v in settings.items()}
        if teacher_states:
            given |= {"teacher_hidden": case.teacher_hidden, "teacher_head": teacher}
        sampled = (advantages(case),) if has_advantages else ()
        return function(case.hidden, student, case.token_ids, *sampled, **{**given, **run})

    def exact(student: Tensor, teacher: Tensor, case: Case) -> Tensor:
        pair = (reference.token_log_prob(side, case.token_ids) for side in (student, teacher))
        return definition(*pair, case)

    return fused, exact


def hints(case: Case) -> tuple[Tensor, Tensor]:
    """RLCSD's log-probabilities under a right and under wrong hints."""
    right = case.old_log_probs
    return right, torch.stack([right - 0.02, right + 0.01], -1)


def rlcsd(case: Case, student: LMHead, teacher: LMHead, **run: Any) -> LossOutput:
    sides = case.hidden, student, case.token_ids, advantages(case), *hints(case)
    return fused_sd.rlcsd_loss(*sides, old_log_probs=case.old_log_probs - 1, **run)


def rlcsd_definition(student: Tensor, teacher: Tensor, case: Case) -> Tensor:
    log_prob = reference.token_log_prob(student, case.token_ids)
    return reference.rlcsd(log_prob, advantages(case), *hints(case), case.old_log_probs - 1)


def old(case: Case) -> Tensor:
    return case.old_log_probs
