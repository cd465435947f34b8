"""A drawn loss beside its definition: in float64, and as eager PyTorch computes it.

A number may be off by what rounding explains: by how much the definition's own result moves when
its logits are moved by the rounding of the dtype that logits have, and by that rounding of what is
summed.  Every number is also held against eager PyTorch in the problem's dtype.

Dimension key:  N tokens, D hidden size, V vocabulary, K entries
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import torch
from closeness import EAGER_FLOOR, errors
from fuzz_problem import DEFAULT, DIVERGENCES, SAMPLED, Ids, Problem, Tensors, draw
from torch import Tensor

import fused_sd
from fused_sd import (
    FULL_VOCABULARY,
    Evidence,
    ImportanceCap,
    MixedKl,
    StudentTopK,
    TeacherNucleus,
    TeacherTopK,
    TokenIds,
    UnionTopK,
    generalized_jsd,
    reference,
)
from fused_sd.terms.divergence_term import divergence_term

Outcome = dict[str, Tensor]  # loss, token_loss, d<leaf>, "metric <name>", log-probabilities
DOUBLE = Tensor.double
MOVES, MORE_MOVES = 3, 48  # how often logits are moved by rounding; more where once was not enough
ROUNDING = 4.0  # by how many units in the last place
EAGER_EVERY = 4  # of so many problems one is computed by eager PyTorch, too
FLOOR = torch.finfo(torch.float64).eps  # of the definition's own numbers
SLACK = 4.0  # how much further than the moved results a result may be


counts: Counter[str] = Counter()  # what ``check`` has seen


# ---------------------------------------------------------------------------- the library's call


def arguments(p: Problem, t: Tensors, backend: str = "auto") -> tuple[tuple[Any, ...], Any]:
    """What the public function is called with."""
    head, teacher_head = t.heads()
    more, settings = t.more, dict(p.settings)
    options: dict[str, Any] = {**p.options, "backend": backend, "token_weights": t.token_weights}
    cap = settings.pop("cap", None)
    named = {name: more[name] for name in p.given if name in more}
    if p.loss in (*DIVERGENCES, "divergence_loss", "topk_divergence_loss"):
        if p.loss != "sdpo_loss":
            old = named.pop("old_log_probs", None)
            if old is not None:
                named["importance"] = ImportanceCap(old, cap)
        if isinstance(settings.get("support"), Ids):
            settings["support"] = TokenIds(more["entry_ids"])
        sides: tuple[Any, ...] = (t.hidden, head, t.teacher_hidden, teacher_head)
        if p.loss == "topk_divergence_loss":
            settings.pop("entries"), settings.pop("sent", None)
            sides = t.hidden, head, more["entry_ids"], more["served"]
        return sides, settings | named | options
    if p.loss == "entry_log_probs":
        entries = settings.pop("entries")
        chosen = more["entry_ids"] if isinstance(entries, Ids) else entries
        return (t.hidden, head, chosen), settings | options
    ids = more["token_ids"]
    if p.loss not in SAMPLED:
        return (t.hidden, head, ids), settings | options
    named.pop("token_ids")
    advantages = [named.pop("advantages")] if "advantages" in named else []
    if "teacher_hidden" in p.given:
        named |= {"teacher_hidden": t.teacher_hidden, "teacher_head": teacher_head}
    clip, mix = settings.pop("evidence_clip", None), settings.pop("mix", None)
    from_old = settings.pop("from_old", False)
    if clip is not None:
        mix = more["mix"] if mix == "each" else mix
        settings["evidence"] = Evidence(clip, mix, "old" if from_old else "current")
    if p.loss == "sampled_kl_loss" and "old_log_probs" in named:
        named["importance"] = ImportanceCap(named.pop("old_log_probs"), cap)
    if p.loss == "rlcsd_loss":
        advantages += [named.pop("correct_log_probs"), named.pop("wrong_log_probs")]
    return (t.hidden, head, ids, *advantages), settings | named | options


def upstream(p: Problem, loss: Tensor) -> Tensor:
    """What a loss is multiplied by before it goes back."""
    if not loss.dim():
        return torch.tensor(1.5).to(loss)
    return torch.linspace(-1, 2, max(loss.numel(), 1)).to(loss)[: loss.numel()].reshape(loss.shape)


def fused(p: Problem, backend: str = "auto") -> Outcome:
    """What the library makes of a problem."""
    t = Tensors(p, getattr(torch, p.dtype))
    given, named = arguments(p, t, backend)
    output = getattr(fused_sd, p.loss)(*given, **named)
    found: Outcome = {}
    if p.loss == "token_log_probs":
        found["token_loss"] = output.log_probs.detach()
        loss = output.log_probs
        if output.entropy is not None:
            found["entropy"] = output.entropy.detach()
            loss = loss + 0.3 * output.entropy**2
    elif p.loss == "entry_log_probs":
        found["entries"] = output.log_probs.detach()
        factors = torch.linspace(-1, 1, output.log_probs.shape[-1]).to(output.log_probs)
        loss = (output.log_probs * factors).sum(-1)
        if output.tail is not None:
            found["tail"] = output.tail.detach()
            # the log of no mass has no gradient
            loss = loss + output.tail.masked_fill(output.tail.isneginf(), 0.0)
    else:
        loss = output.loss
        found |= {"loss": loss.detach(), "token_loss": output.token_loss}
        found |= {f"metric {name}": value for name, value in output.metrics.items()}
    return found | gradients(p, t, loss)


def gradients(p: Problem, t: Tensors, loss: Tensor) -> Outcome:
    wanted = {name: leaf for name, leaf in t.leaves.items() if leaf.requires_grad}
    if not wanted:
        assert not loss.requires_grad, "a loss without anything to train requires a gradient"
        return {}
    scaled = (loss * upstream(p, loss)).sum()
    made = torch.autograd.grad(
        scaled, list(wanted.values()), retain_graph=True, materialize_grads=True
    )
    return {f"d{name}": value for name, value in zip(wanted, made, strict=True)}


# ------------------------------------------------------------------------------- the definition


@contextmanager
def in_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let the definitions compute in another dtype than float64."""
    with mock.patch.object(Tensor, "double", lambda self: self.to(dtype)):
        yield


@dataclass
class Moves:
    """By how much the logits are moved, in units of rounding.

    Attributes:
        seed: Of the signs.
        eps: Of the dtype that logits are computed in; 0: they are not moved.
        choices: Whether the supports' choices are made on moved logits.
    """

    seed: int = 0
    eps: float = 0.0
    choices: bool = False

    def of(self, logits: Tensor, size: Tensor, generator: torch.Generator) -> Tensor:
        signs = 2 * torch.rand(logits.shape, generator=generator, dtype=torch.float64) - 1
        moved = logits + ROUNDING * self.eps * signs.to(logits) * size
        return torch.where(logits.isfinite(), moved, logits)


def divergence_settings(p: Problem) -> dict[str, Any]:
    """A named loss's settings as those of ``divergence_loss``."""
    s = dict(p.settings)
    full = {"support": FULL_VOCABULARY, "remainder": "tail"}
    if p.loss == "sdpo_loss":
        top = s.get("top_k")
        remainder = "tail" if s.get("add_tail", True) else "renormalize"
        found = full if top is None else {"support": StudentTopK(top), "remainder": remainder}
        found |= {"divergence": generalized_jsd(s["alpha"]), "tail_floor": s.get("tail_floor")}
        return found | {"cap": s.get("importance_cap")}
    if p.loss == "sd_zero_loss":
        if s["variant"] == "paper":
            return full | {"divergence": "reverse_kl", "cap": s.get("cap")}
        found = {"divergence": MixedKl(s["forward_weight"]), "remainder": "renormalize"}
        return found | {"support": TeacherTopK(s["top_k"]), "cap": s.get("cap")}
    if p.loss in ("opsd_loss", "sdft_loss", "gkd_loss"):
        top, found = s.get("top_k"), dict(full)
        if top is not None:
            made = (StudentTopK if p.loss == "sdft_loss" else TeacherTopK)(top)
            found = {"support": made, "remainder": s.get("remainder", "renormalize")}
        found["divergence"] = generalized_jsd(s["alpha" if p.loss == "sdft_loss" else "beta"])
        return found | {"entry_clip": s.get("entry_clip"), "cap": s.get("cap")}
    return full | {"divergence": "reverse_kl"} | s


def most_likely(logits: Tensor, k: int) -> Tensor:
    """Mask (N, V) of the k largest, equal logits by lowest id."""
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return reference.given_ids(ids, logits.shape[-1])


class Definition:
    """A problem's definition, from the logits of the tokens that count."""

    def __init__(self, p: Problem, dtype: torch.dtype, moves: Moves) -> None:
        self.p, self.moves = p, moves
        self.t = t = Tensors(p, dtype)
        self.wide = dtype if dtype.itemsize > 2 else torch.float32
        n = p.num_tokens
        self.weights = torch.ones(n) if t.token_weights is None else t.token_weights.reshape(-1)
        self.weights = self.weights.to(self.wide)
        self.ids = t.more["token_ids"].reshape(-1)
        if p.loss == "cross_entropy_loss":
            is_target = self.ids != p.settings["ignore_index"]
            self.weights = torch.where(is_target, self.weights, 0)
        self.kept = self.weights != 0
        self.ids = self.ids[self.kept]
        generator = torch.Generator().manual_seed(moves.seed)
        self.student, self.student_choice = self._side("student", generator)
        self.teacher = self.teacher_choice = self.student
        if p.has_teacher:
            self.teacher, self.teacher_choice = self._side("teacher", generator)
        more = self.teacher.shape[-1] - self.student.shape[-1]
        if more > 0:
            self.student, self.student_choice = (
                torch.nn.functional.pad(side, (0, more), value=-torch.inf)
                for side in (self.student, self.student_choice)
            )

    def _side(self, name: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Logits (A, V), and those that choices are made by."""
        p, t = self.p, self.t
        is_student = name == "student"
        head = t.heads()[0 if is_student else 1]
        states = t.hidden if is_student else t.teacher_hidden
        states = states.reshape(len(self.kept), states.shape[-1])[self.kept]
        divisor = p.options.get("temperature", 1.0)
        if not is_student:
            divisor = p.options.get("teacher_temperature") or divisor
        weight, bias = (
            (head.weight, head.bias)
            if is_student
            else (head.weight.detach(), None if head.bias is None else head.bias.detach())
        )
        shaping = head.logit_scale, head.softcap, divisor
        exact = reference.logits(states, weight, bias, *shaping).to(self.wide)
        exact = exact[:, : head.num_tokens]
        if not self.moves.eps:
            return exact, exact.detach()
        with torch.no_grad():
            size = states.abs() @ weight.abs().T
            size = head.logit_scale * (size if bias is None else size + bias.abs()) / divisor
            if head.softcap is not None:  # which flattens them
                size = size.clamp(max=head.softcap / divisor)
            size = size[:, : head.num_tokens].to(exact) + 1
        moved = self.moves.of(exact, size, generator)
        return moved, (moved if self.moves.choices else exact).detach()

    def spread(self, values: Tensor) -> Tensor:
        """Values of the tokens that count, among zeros, in the shape of the tokens."""
        whole = torch.zeros(self.kept.shape + values.shape[1:], dtype=values.dtype)
        whole = whole.index_put((self.kept,), values)
        return whole.reshape(self.p.tokens + values.shape[1:])

    def more(self, name: str) -> Tensor | None:
        """A tensor of the tokens that count, where the problem passes it."""
        if name not in self.p.given:
            return None
        value = self.t.more[name]
        value = value.reshape(len(self.kept), *value.shape[len(self.p.tokens) :])[self.kept]
        return value.to(self.wide) if value.is_floating_point() else value

    def outcome(self) -> Outcome:
        p = self.p
        if p.loss == "token_log_probs":
            value = reference.token_log_prob(self.student, self.ids)
            found = {"token_loss": self.spread(value)}
            if p.settings["entropy"]:
                entropy = reference.entropy(self.student)
                found["entropy"] = self.spread(entropy)
                value = value + 0.3 * entropy**2
            return self._with_gradients(found, self.spread(value))
        if p.loss == "entry_log_probs":
            return self._entries()
        tokens, ratio, metrics = self._tokens()
        values = tokens * ratio
        weights = self.weights[self.kept]
        reduction = p.options.get("reduction", "mean")
        if p.loss == "rlcsd_loss":
            loss = (values * self._rlcsd_weights()).sum()
        elif reduction == "none":
            loss = self.spread(values * weights)
        else:
            loss = (values * weights).sum()
            if reduction == "mean":
                loss = loss / (weights.sum() if len(weights) else 1.0)
        found = {"loss": loss, "token_loss": self.spread(tokens)}
        found |= {f"metric {name}": self.spread(value) for name, value in metrics.items()}
        self.summed = (values * weights).abs().sum()
        return self._with_gradients(found, loss)

    def _with_gradients(self, found: Outcome, loss: Tensor) -> Outcome:
        found = {name: value.detach() for name, value in found.items()}
        self.loss = loss
        if not loss.requires_grad:
            wanted = {k: leaf for k, leaf in self.t.leaves.items() if leaf.requires_grad}
            return found | {f"d{k}": torch.zeros_like(leaf) for k, leaf in wanted.items()}
        return found | gradients(self.p, self.t, loss)

    def magnitudes(self) -> Outcome:
        """The sums of magnitudes behind each gradient, once there is an outcome."""
        p, t = self.p, self.t
        if not self.loss.requires_grad:
            return {}
        scaled = (self.loss * upstream(p, self.loss)).sum()
        [dlogits] = torch.autograd.grad(
            scaled, [self.student], allow_unused=True, materialize_grads=True
        )
        head, _ = t.heads()
        factor = head.logit_scale / p.options.get("temperature", 1.0)
        # probabilities are exp(logit - lse), off by the rounding of the two
        finite = self.student.detach().abs()
        factor *= 1 + float(finite[finite.isfinite()].max()) / 16 if finite.numel() else 1.0
        size = torch.zeros(len(self.kept), p.vocab, dtype=torch.float64)
        size[self.kept, : head.num_tokens] = factor * dlogits.abs()[:, : head.num_tokens]
        states = t.hidden.reshape(len(self.kept), p.hidden_size).abs().nan_to_num(0.0)
        found = {
            "hidden": (t.hidden, (size @ self.t.weight.abs()).reshape(t.hidden.shape)),
            "weight": (t.weight, size.T @ states),
            "bias": (t.bias, size.sum(0)),
        }
        made = {}
        for name, leaf in t.leaves.items():
            if leaf.requires_grad:
                view, sums = found[name]
                [made[f"d{name}"]] = torch.autograd.grad([view], [leaf], [sums.detach()])
        return made

    def _entries(self) -> Outcome:
        p, log_s = self.p, reference.log_probs(self.student)
        entries = p.settings["entries"]
        if isinstance(entries, Ids):
            ids = self.t.more["entry_ids"]
            chosen = ids.reshape(len(self.kept), entries.count)[self.kept]
        else:
            order = self.student_choice.sort(dim=-1, descending=True, stable=True)
            chosen = order.indices[:, :entries]
        found = log_s.gather(-1, chosen)
        factors = torch.linspace(-1, 1, found.shape[-1]).to(found)
        value, outcome = (found * factors).sum(-1), {"entries": self.spread(found)}
        if p.settings["tail"]:
            mask = reference.given_ids(chosen, log_s.shape[-1])
            tail = reference.log_mass(log_s.masked_fill(mask, -torch.inf)).squeeze(-1)
            outcome["tail"] = self.spread(tail)
            value = value + tail.masked_fill(tail.isneginf(), 0.0)
        return self._with_gradients(outcome, self.spread(value))

    def _tokens(self) -> tuple[Tensor, Tensor, Outcome]:
        """Token losses, the ratio that multiplies them, and metrics."""
        p = self.p
        if p.loss == "cross_entropy_loss":
            loss = reference.cross_entropy(self.student, self.ids)
            return loss, torch.ones_like(loss), self._sampled_metrics()
        if p.loss in SAMPLED:
            return self._policy()
        return self._divergence()

    def _divergence(self) -> tuple[Tensor, Tensor, Outcome]:
        p, s = self.p, divergence_settings(self.p)
        term = divergence_term(s["divergence"])
        named = {term.definition.parameter_name: term.parameter} if term.definition.setting else {}
        student, teacher, vocab = self.student, self.teacher, self.student.shape[-1]
        support, mask = s["support"], None
        if p.loss == "topk_divergence_loss" or isinstance(support, Ids):
            ids = self.t.more["entry_ids"]
            ids = ids.reshape(len(self.kept), ids.shape[-1])[self.kept]
            mask = reference.given_ids(ids, vocab)
            if p.loss == "topk_divergence_loss":
                served = self.t.more["served"].reshape(len(self.kept), ids.shape[-1])
                served = served[self.kept]
                with mock.patch.object(Tensor, "double", DOUBLE):
                    teacher = reference.served_teacher(ids, served, vocab).to(self.wide)
        elif isinstance(support, TeacherNucleus):
            choice = self.teacher_choice
            order = choice.sort(dim=-1, descending=True, stable=True).indices[:, : support.k]
            mass = choice.double().softmax(-1).gather(-1, order)
            needed = mass.cumsum(-1) - mass < support.mass
            mask = reference.given_ids(order.masked_fill(~needed, -1), vocab)
        elif support != FULL_VOCABULARY:
            mask = torch.zeros_like(student, dtype=torch.bool)
            if isinstance(support, StudentTopK | UnionTopK):
                mask |= most_likely(self.student_choice, support.k)
            if isinstance(support, TeacherTopK | UnionTopK):
                mask |= most_likely(self.teacher_choice, support.k)
        exact = {"entry_clip": s.get("entry_clip")}
        if mask is not None:
            exact |= {"support": mask, "remainder": s["remainder"]}
            exact |= {"tail_floor": s.get("tail_floor")}
        loss = reference.divergence(student, teacher, divergence=term.name, **named, **exact)
        if mask is not None and s["remainder"] == "renormalize":  # nothing has no share
            has_mass = student.masked_fill(~mask, -torch.inf).isfinite().any(-1)
            loss = torch.where(has_mass, loss, torch.nan)
        clip = s.get("token_clip")
        if clip is not None:
            loss = loss.clamp(*(clip if isinstance(clip, tuple) else (None, clip)))
        ratio, metrics = torch.ones_like(loss), self._divergence_metrics(mask, teacher)
        old = self.more("old_log_probs")
        if old is not None and s.get("cap") is not None:
            log_prob = reference.token_log_prob(student, self.ids)
            ratio = reference.importance(log_prob, old, s["cap"])
            metrics["importance_ratio"] = ratio
        wanted = p.options.get("metrics", ())
        return loss, ratio, {name: metrics[name].detach() for name in wanted}

    def _divergence_metrics(self, mask: Tensor | None, teacher: Tensor) -> Outcome:
        student = self.student.detach()
        wanted, found = self.p.options.get("metrics", ()), {}
        for name in ("forward_kl", "reverse_kl", "jsd"):
            if name in wanted:
                found[name] = reference.divergence(student, teacher, divergence=name)
        found["student_entropy"] = reference.entropy(student)
        found["teacher_entropy"] = reference.entropy(teacher)
        tops = [side.argmax(-1) for side in (self.student_choice, self.teacher_choice)]
        found["top1_agreement"] = (tops[0] == tops[1]).to(self.wide)
        if mask is not None:
            for name, side in (("student", student), ("teacher", teacher)):
                log_x = reference.log_probs(side)
                for kind, where in (("mass", mask), ("tail_mass", ~mask)):
                    mass = log_x.masked_fill(~where, -torch.inf).exp().sum(-1)
                    found[f"{name}_{kind}"] = mass
        if "token_ids" in self.p.given:
            found["student_log_prob"] = reference.token_log_prob(student, self.ids)
        return found

    def _sampled_metrics(self) -> Outcome:
        found = {
            "student_log_prob": reference.token_log_prob(self.student, self.ids).detach(),
            "student_entropy": reference.entropy(self.student).detach(),
        }
        return {k: v for k, v in found.items() if k in self.p.options.get("metrics", ())}

    def _policy(self) -> tuple[Tensor, Tensor, Outcome]:
        p, s = self.p, self.p.settings
        log_prob = reference.token_log_prob(self.student, self.ids)
        old, teacher = self.more("old_log_probs"), self.more("teacher_log_probs")
        if "teacher_hidden" in p.given:
            teacher = reference.token_log_prob(self.teacher, self.ids).detach()
        ones, metrics = torch.ones_like(log_prob).detach(), self._sampled_metrics()
        wanted = p.options.get("metrics", ())
        if "teacher_log_prob" in wanted:
            assert teacher is not None
            metrics["teacher_log_prob"] = teacher
        if p.loss == "sampled_kl_loss":
            loss = getattr(reference, f"sampled_{s['estimator']}")(log_prob, teacher)
            if old is not None:
                ones = reference.importance(log_prob, old, s["cap"])
            return loss * ones, torch.ones_like(ones), metrics
        advantages = self.more("advantages")
        if "evidence_clip" in s:
            mix = s["mix"]
            if mix == "each":
                mix = self.t.more["mix"].reshape(-1)[self.kept].to(self.wide)
            mine = old if s["from_old"] else log_prob
            advantages = reference.rlsd_advantages(
                mine, teacher, advantages, mix=mix, clip=s["evidence_clip"]
            )
        if p.loss == "rlcsd_loss":
            advantages, _ = self._contrast()
        dual = s.get("dual_clip", 3.0 if p.loss == "rlsd_loss" else None)
        clips = {"ratio_clip": s["ratio_clip"], "dual_clip": dual}
        loss = reference.policy(log_prob, advantages, old, **clips)
        if "kl_coefficient" in s:
            estimate = getattr(reference, f"sampled_{s.get('kl_estimator', 'k3')}")
            loss = loss + s["kl_coefficient"] * estimate(log_prob, self.more("reference_log_probs"))
        if "importance_ratio" in wanted:
            anchor = log_prob if old is None else old
            metrics["importance_ratio"] = reference.ratio(log_prob, anchor).detach()
        return loss, ones, metrics

    def _contrast(self) -> tuple[Tensor, Tensor]:
        wrong, mask = self.more("wrong_log_probs"), self.more("wrong_mask")
        assert wrong is not None
        if mask is not None:
            wrong = wrong.masked_fill(~mask, -torch.inf)
        given = self.more("advantages"), self.more("correct_log_probs"), wrong
        return reference.rlcsd_advantages(*given, **self.p.settings.get("contrast", {}))

    def _rlcsd_weights(self) -> Tensor:
        _, selected = self._contrast()
        weights = self.weights[self.kept]
        total = torch.zeros_like(weights)
        for part, scale in ((~selected, 1.0), (selected, self.p.settings["selected_weight"])):
            total = total + scale * weights * part / part.sum().clamp(min=1)
        return total


# ------------------------------------------------------------------------------ the comparison


def exact(p: Problem, moves: Moves | None = None) -> Outcome:
    """What the definition makes of a problem in float64."""
    return Definition(p, torch.float64, moves or Moves()).outcome()


def magnitudes(p: Problem) -> Outcome:
    """Of each gradient, the sum of the magnitudes of the products that it is the sum of."""
    definition = Definition(p, torch.float64, Moves())
    definition.outcome()
    return definition.magnitudes()


def eager(p: Problem) -> Outcome:
    """What eager PyTorch makes of it: logits in the problem's dtype, the rest at least in fp32."""
    dtype = getattr(torch, p.dtype)
    with in_dtype(dtype):
        definition = Definition(p, dtype, Moves())
    with in_dtype(definition.wide):
        return definition.outcome()


@dataclass
class Verdict:
    """How the comparison of one problem ended.

    Attributes:
        failures: A sentence for each number that rounding does not explain.
        numbers: How many tensors were compared.
        with_eager: How many of these were compared with eager PyTorch, too.
        worse: Of these, how many had a larger error than eager PyTorch, by maximum or RMS.
        moved: Whether choices and kinks had to be moved to explain a number.
    """

    failures: list[str]
    numbers: int = 0
    with_eager: int = 0
    worse: int = 0
    moved: bool = False


def compare(p: Problem, backend: str = "auto") -> Verdict:
    """Compare the library with the definition."""
    found, true = fused(p, backend), exact(p)
    verdict = Verdict([])
    assert set(found) == set(true), (set(found), set(true))
    is_narrow = p.dtype != "float64"
    by_eager = eager(p) if is_narrow and p.seed % EAGER_EVERY == 0 else {}
    bounds = Bounds(p, true)
    is_infinite = not bool(true.get("token_loss", torch.zeros(0)).isfinite().all())
    for name, value in found.items():
        verdict.numbers += 1
        if is_infinite and name[0] == "d":  # of a token without a finite loss there is none
            continue
        want, other = true[name], by_eager.get(name)
        if value.shape != want.shape:
            verdict.failures.append(f"{name} has the shape {value.shape}, not {want.shape}")
            continue
        verdict.worse += other is not None and is_worse(value, other, want, floor=EAGER_FLOOR)
        if other is not None:
            verdict.with_eager += 1
        if bounds.explain(name, value, 0) or bounds.explain(name, value, MOVES):
            continue
        if is_narrow and other is None:
            by_eager = eager(p)
            other = by_eager[name]
        # the gradient of states that tokens share is summed by autograd, in the states' dtype
        times = 8.0 if p.strides == "expanded" and name == "dhidden" else 1.0
        if other is not None and not is_worse(value, other, want, times):
            continue
        verdict.moved = True
        if not bounds.explain(name, value, MORE_MOVES):
            verdict.failures.append(f"{name}: {bounds.describe(name, value)}")
    if p.values == "equal" and p.teacher_hidden_size is None:
        verdict.failures += unequal(p, found)
    return verdict


def is_worse(
    value: Tensor, by_eager: Tensor, true: Tensor, times: float = 1.0, floor: float = 0.0
) -> bool:
    """Whether the error is larger than so many times eager's and a floor, by maximum or RMS."""
    finite = true.isfinite()
    pairs = zip(errors(value[finite], true[finite]), errors(by_eager[finite], true[finite]))
    return any(not mine <= times * theirs + floor for mine, theirs in pairs if theirs == theirs)


def unequal(p: Problem, found: Outcome) -> list[str]:
    """Refuse anything but exact zeros of a divergence between equal sides that both sum to 1."""
    s = divergence_settings(p)
    sums_to_one = s["support"] == FULL_VOCABULARY or s["remainder"] in ("tail", "renormalize")
    plain = not any(s.get(name) for name in ("tail_floor", "token_clip", "entry_clip"))
    same = "teacher_temperature" not in p.options
    is_divergence = p.loss in (*DIVERGENCES, "divergence_loss")
    if not (is_divergence and sums_to_one and plain and same):
        return []
    parts = [name for name in found if name[0] in "ldt" and found[name].any()]
    return [f"{name} of a teacher that equals the student is not exactly 0" for name in parts]


class Bounds:
    """How far each of a problem's numbers may be from the definition's."""

    def __init__(self, p: Problem, true: Outcome) -> None:
        self.p, self.true = p, true
        self.dtype = getattr(torch, p.dtype)
        wide = torch.float64 if p.dtype == "float64" else torch.float32
        self.eps, self.tiny = torch.finfo(wide).eps, torch.finfo(wide).smallest_normal
        self.moved: dict[int, list[Outcome]] = {0: []}
        self.sizes: Outcome | None = None

    def _moved(self, count: int) -> list[Outcome]:
        if count not in self.moved:
            choices = count == MORE_MOVES
            made = (Moves(n, self.eps, choices) for n in range(1, 1 + count))
            self.moved[count] = [exact(self.p, moves) for moves in made]
        return self.moved[count]

    def bound(self, name: str, count: int) -> Tensor:
        """The largest difference of each element, by a number of moved results."""
        true = self.true[name]
        apart = torch.zeros_like(true)
        for other in self._moved(count):
            apart = torch.maximum(apart, (other[name] - true).abs().nan_to_num(0.0, posinf=0.0))
        largest = true[true.isfinite()].abs().max() if true.isfinite().any() else 0.0
        bound = 32 * self.eps * (true.abs() + largest) + 8 * self.tiny
        is_rough = name.startswith("metric") or (count == MORE_MOVES and name[0] != "d")
        bound = bound + 16 * (self.eps if is_rough else FLOOR)
        if self.p.dtype == "float64" and self.p.values in ("offset", "peaked"):
            # probabilities are exp(logit - lse), and the lse has float64's rounding of 1e4
            bound = bound + 1e-11 * (true.abs() + largest + 1)
            if name.startswith("d") and self.p.values == "offset":
                bound = bound + 1e-7 * largest
        if name.startswith("d"):  # which is rounded to the operands' dtype
            info = torch.finfo(self.dtype)
            bound = bound + info.eps * true.abs() + 2 * info.smallest_normal * info.eps
            if count:
                self.sizes = magnitudes(self.p) if self.sizes is None else self.sizes
                bound = bound + 16 * self.eps * self.sizes.get(name, 0.0)
                if count == MORE_MOVES:  # probabilities are at most 1, and rounded as that
                    factor = {"dhidden": "weight", "dweight": "hidden"}.get(name)
                    most = self.largest_input(factor) if factor else 1.0
                    bound = bound + 4 * self.eps * (1 + most)
        return bound + SLACK * (apart + apart.max() * name.startswith("d"))

    def largest_input(self, name: str) -> float:
        """The largest finite magnitude of states or head."""
        leaf = Tensors(self.p, torch.float64).leaves[name].detach().abs().nan_to_num(0.0)
        return float(leaf.max()) if leaf.numel() else 0.0

    def explain(self, name: str, value: Tensor, count: int) -> bool:
        """Whether rounding explains the difference."""
        true, value = self.true[name], value.double()
        if not true.numel():
            return True
        finite = true.isfinite()
        limit = torch.finfo(self.dtype if name[0] == "d" else torch.float32).max
        if self.p.dtype != "float64":
            finite &= true.abs() < limit
        # where the definition divides nothing by nothing, any number will do
        same = (value == true) | (true.isnan() & ~value.isnan())
        near = finite & ((value - true).abs() <= self.bound(name, count))
        overflow = ~finite & (value.isinf() | (value.abs() > limit / 2))
        return bool((same | near | overflow).all())

    def describe(self, name: str, value: Tensor) -> str:
        true, value = self.true[name].flatten(), value.double().flatten()
        bound = self.bound(name, MORE_MOVES).flatten()
        excess = ((value - true).abs() / bound).nan_to_num(torch.inf)
        at = int(excess.argmax())
        return f"{float(value[at])!r} for {float(true[at])!r}, {float(bound[at]):.2e} allowed"


def check(seed: int, backend: str = "auto") -> list[str]:
    """Compare a drawn problem; return what rounding does not explain, counting on the way."""
    verdict = compare(drawn(seed, backend), backend)
    counts["numbers compared with float64"] += verdict.numbers
    counts["of them compared with eager PyTorch, too"] += verdict.with_eager
    counts["of these worse than eager PyTorch by more than 1e-6 of the largest"] += verdict.worse
    counts["problems explained by a near-tie or a kink"] += verdict.moved
    return verdict.failures


def drawn(seed: int, backend: str = "auto") -> Problem:
    if backend != "triton":
        return draw(seed)
    small = draw(seed, max_tokens=3, max_vocab=40)
    return replace(small, dtype="float32") if small.dtype == "float64" else small


def code(seed: int, backend: str = "auto") -> str:
    """The simplest problem that fails as the drawn one does, or the drawn one."""
    p = drawn(seed, backend)
    return repr(shrunk(p, backend) if fails(p, backend) else p)


def fails(p: Problem, backend: str) -> bool:
    try:
        return bool(compare(p, backend).failures)
    except Exception:
        return True


def shrunk(p: Problem, backend: str) -> Problem:
    """Put defaults and smaller sizes in the place of what was drawn while it still fails."""
    tries = 200
    while tries:
        for simpler in simplifications(p):
            tries -= 1
            if fails(simpler, backend):
                p = simpler
                break
        else:
            break
        tries = max(tries, 0)
    return p


def simplifications(p: Problem) -> Iterator[Problem]:
    """Legal problems that are simpler in one respect."""
    for item in fields(p):
        value, default = getattr(p, item.name), getattr(DEFAULT, item.name)
        if value != default and item.name not in ("loss", "settings", "given"):
            with_bias = p.values == "forbidden" and item.name in ("head", "teacher_hidden_size")
            if not with_bias and not (item.name == "vocab" and p.settings):
                yield replace(p, **{item.name: default})
    for name in p.options:
        yield replace(p, options={k: v for k, v in p.options.items() if k != name})
    for name in ("entry_clip", "token_clip", "tail_floor", "sent", "contrast", "dual_clip"):
        if name in p.settings:
            yield replace(p, settings={k: v for k, v in p.settings.items() if k != name})
    for name in ("vocab", "hidden_size"):
        if getattr(p, name) > 8 and not p.head.get("valid_vocab"):
            smaller = replace(p, **{name: getattr(p, name) // 2})
            k = [v for v in p.settings.values() if isinstance(getattr(v, "k", v), int)]
            if not k or max(getattr(v, "k", v) for v in k) <= smaller.vocab:
                yield smaller
    for at, size in enumerate(p.tokens):
        if size > 1:
            yield replace(p, tokens=(*p.tokens[:at], size - 1, *p.tokens[at + 1 :]))
