"""A drawn call of a loss: all that decides it, as numbers and names, and the tensors made of them.

``draw(seed)`` makes a ``Problem``.  Its ``repr`` is the code that makes it again, and its defaults
are the simplest values, so that shrinking a failure means to put defaults back.

Dimension key:  N tokens, D and D' hidden sizes, V and V' vocabularies, K entries
"""

import random
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from fused_sd import (
    FULL_VOCABULARY,
    Jsd,
    LMHead,
    MixedKl,
    SkewKl,
    StudentTopK,
    TeacherNucleus,
    TeacherTopK,
    UnionTopK,
)
from fused_sd.terms.comparison import REMAINDERS

DTYPES = ("float64", "float32", "bfloat16", "float16")
DIVERGENCES = ("sdpo_loss", "sd_zero_loss", "opsd_loss", "sdft_loss", "gkd_loss")
COMPARING = (*DIVERGENCES, "divergence_loss", "topk_divergence_loss")
SAMPLED = ("policy_loss", "grpo_loss", "rlsd_loss", "rlcsd_loss", "sampled_kl_loss")
LOSSES = (
    *("divergence_loss", "divergence_loss", "divergence_loss", "topk_divergence_loss"),
    *DIVERGENCES,
    *SAMPLED,
    *("cross_entropy_loss", "token_log_probs", "entry_log_probs"),
)
VALUES = ("far", "close", "equal", "offset", "ties", "peaked", "denormal", "zero", "forbidden")
WEIGHTS = ("none", "some", "zeros", "bool", "counts", "signed")
HINTS = 3  # of RLCSD


@dataclass(frozen=True)
class Ids:
    """Stands for given entries: (N, K) drawn ids, of which some are padding or repeated."""

    count: int
    has_padding: bool = False


@dataclass(frozen=True)
class Problem:
    """A call of a loss, and the tensors it is made on.

    Attributes:
        seed: Of the tensors.
        loss: The public function.
        settings: Its keywords that are no tensors.
        options: Those of ``LossOptions`` that are no tensors.
        given: Names of optional tensors that are passed.
        tokens: The leading shape (...).
        hidden_size, teacher_hidden_size: D and D'; None: the teacher has the student's head.
        vocab, teacher_more: V, and by how much V' is larger.
        dtype: Of states and heads.
        values: What the logits are like.
        strides: How states and head lie in memory.
        weights: What ``token_weights`` hold.
        garbage: Whether tokens without a weight hold NaN and ids outside the vocabulary.
        head: Keywords of the student's ``LMHead``; ``bias`` is True.
        trained: The inputs that require a gradient.
    """

    seed: int = 0
    loss: str = "divergence_loss"
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    tokens: tuple[int, ...] = (2,)
    hidden_size: int = 3
    teacher_hidden_size: int | None = None
    vocab: int = 5
    teacher_more: int = 0
    dtype: str = "float64"
    values: str = "far"
    strides: str = "plain"
    weights: str = "none"
    garbage: bool = False
    head: dict[str, Any] = field(default_factory=dict)
    trained: tuple[str, ...] = ("hidden", "weight", "bias")

    def __repr__(self) -> str:
        changed = [
            f"{item.name}={getattr(self, item.name)!r}"
            for item in fields(self)
            if getattr(self, item.name) != getattr(DEFAULT, item.name)
        ]
        return f"Problem({', '.join(changed)})"

    @property
    def num_tokens(self) -> int:
        return torch.Size(self.tokens).numel()

    @property
    def valid(self) -> int:
        """Number of entries that the student can predict."""
        return int(self.head.get("valid_vocab") or self.vocab)

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher is given by its states."""
        if self.loss in SAMPLED:
            return "teacher_hidden" in self.given
        return self.loss in (*DIVERGENCES, "divergence_loss")


DEFAULT = Problem()


class Tensors:
    """The tensors of a problem, in its dtype, in float64, or as eager PyTorch would have them.

    Attributes:
        leaves: What is differentiated, by name.
        hidden, weight, bias: Views of the leaves, as strides say.
        teacher_hidden, teacher_weight, teacher_bias: Constants.
        token_weights: (...), or None.
        more: Tensors of the sampled tokens and of given entries, by keyword.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.problem, self.dtype = problem, dtype
        self.generator = torch.Generator().manual_seed(problem.seed)
        self._sides()
        self.token_weights = self._weights()
        self.more = self._more()
        if problem.garbage and self.token_weights is not None:
            self._spoil(self.token_weights == 0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, top: int, *shape: int) -> Tensor:
        return torch.randint(top, shape, generator=self.generator)

    def _rounded(self, tensor: Tensor) -> Tensor:
        """Numbers that the problem's dtype holds, in the wanted one."""
        return tensor.to(getattr(torch, self.problem.dtype)).to(self.dtype)

    def _leaf(self, name: str, tensor: Tensor) -> Tensor:
        leaf = self._rounded(tensor).requires_grad_(name in self.problem.trained)
        self.leaves[name] = leaf
        return leaf

    def _sides(self) -> None:
        p, n = self.problem, self.problem.num_tokens
        d, v = p.hidden_size, p.vocab
        self.leaves: dict[str, Tensor] = {}
        hidden, weight = self.normal(n, d), self.normal(v, d) * 3 / d**0.5
        bias = self.normal(v)
        own = p.teacher_hidden_size
        teacher = hidden + (0.01 if p.values == "close" else 0.7) * self.normal(n, d)
        teacher_weight = weight
        if own is not None:
            teacher = self.normal(n, own)
            teacher_weight = self.normal(v + p.teacher_more, own) * 3 / own**0.5
        if p.values == "offset":
            hidden[:, 0] = teacher[:, 0] = 1.0
            weight[:, 0] = 1e4
        elif p.values == "ties":
            hidden, weight, bias = hidden.round(), weight.clamp(-1, 1).round(), bias.round()
            teacher, teacher_weight = teacher.round(), teacher_weight.clamp(-1, 1).round()
            teacher_weight = weight if own is None else teacher_weight
        elif p.values == "peaked":
            weight *= 60.0
        elif p.values == "denormal":
            weight *= torch.finfo(getattr(torch, p.dtype)).smallest_normal / 8
        elif p.values == "zero":
            hidden = torch.zeros_like(hidden)
        elif p.values == "forbidden":
            bias[1::3] = -torch.inf
        if p.strides == "expanded":
            hidden = hidden[:1]
        states = self._leaf("hidden", self._stored(hidden))
        self.hidden = self._viewed(states, n).reshape(*p.tokens, d)
        self.weight = self._leaf("weight", weight.T if p.strides == "transposed" else weight)
        if p.strides == "transposed":
            self.weight = self.weight.T
        self.bias = self._leaf("bias", bias) if p.head.get("bias") else None
        if p.values == "equal" and own is None:
            self.teacher_hidden = self.hidden.detach()
        else:
            self.teacher_hidden = self._rounded(teacher).reshape(*p.tokens, teacher.shape[-1])
        if own is None:
            self.teacher_weight, self.teacher_bias = self.weight.detach(), self.bias
        else:
            self.teacher_weight, self.teacher_bias = self._rounded(teacher_weight), None

    def _stored(self, hidden: Tensor) -> Tensor:
        strides = self.problem.strides
        if strides == "transposed":
            return hidden.T
        if strides == "sliced":
            return hidden.repeat_interleave(2, 0).repeat_interleave(2, 1)
        return hidden

    def _viewed(self, stored: Tensor, n: int) -> Tensor:
        strides = self.problem.strides
        if strides == "transposed":
            return stored.T
        if strides == "sliced":
            return stored[::2, 1::2]
        if strides == "expanded" and n:
            return stored.expand(n, -1)
        return stored

    def _weights(self) -> Tensor | None:
        p = self.problem
        kept = self.uniform(*p.tokens) < 0.6
        size = 0.5 + self.uniform(*p.tokens)
        wide = torch.float64 if p.dtype == "float64" else torch.float32
        made = {
            "none": None,
            "some": (kept * size).to(wide),
            "zeros": torch.zeros(p.tokens, dtype=wide),
            "bool": kept,
            "counts": kept * self.integers(3, *p.tokens),
            "signed": (kept * (size - 0.9)).to(wide),
        }
        return made[p.weights]

    def _more(self) -> dict[str, Tensor]:
        """Every tensor that a loss of the sampled tokens or of given entries may take."""
        p, shape = self.problem, self.problem.tokens
        wide = torch.float64 if p.dtype == "float64" else torch.float32
        ids = self.integers(p.valid, *shape)
        if p.values == "forbidden":  # which no policy samples
            ids = ids // 3 * 3
        near = [(-self.uniform(*shape) * 3).to(wide) for _ in range(5)]
        wrong = torch.stack([near[3] + 0.03 * self.normal(*shape) for _ in range(HINTS)], -1)
        advantages = self.normal(*shape).round(decimals=1).to(wide)
        count, padded = 1, False
        support = p.settings.get("support", p.settings.get("entries"))
        if p.loss == "topk_divergence_loss":
            support = p.settings["entries"]
        if isinstance(support, Ids):
            count, padded = support.count, support.has_padding
        scores = self.uniform(*shape, p.valid)
        entries = scores.argsort(-1)[..., :count]  # distinct
        if padded:
            entries = torch.where(self.uniform(*entries.shape) < 0.3, -1, entries)
            entries = torch.where(self.uniform(*entries.shape) < 0.2, entries[..., :1], entries)
        served = (4 * scores).log_softmax(-1)
        served = served.gather(-1, entries.clamp(min=0)).masked_fill(entries < 0, -torch.inf)
        return {
            "token_ids": ids,
            "old_log_probs": near[0],
            "teacher_log_probs": near[1],
            "reference_log_probs": near[2],
            "correct_log_probs": near[3],
            "wrong_log_probs": wrong.clamp(max=0).to(wide),
            "wrong_mask": self.uniform(*shape, HINTS) < 0.6,
            "advantages": advantages,
            "mix": self.uniform(*shape).to(wide),
            "entry_ids": entries,
            "served": served.to(wide if p.settings.get("sent") is None else p.settings["sent"]),
        }

    def _spoil(self, masked: Tensor) -> None:
        """Put garbage where no token counts."""
        self.teacher_hidden = torch.where(masked[..., None], torch.nan, self.teacher_hidden)
        if self.problem.strides != "expanded":  # whose tokens share their memory
            self.hidden.detach()[masked] = torch.nan
        for name in ("old_log_probs", "teacher_log_probs", "reference_log_probs", "advantages"):
            self.more[name] = self.more[name].masked_fill(masked, torch.nan)
        self.more["served"] = self.more["served"].masked_fill(masked[..., None], torch.nan)
        self.more["token_ids"] = self.more["token_ids"].masked_fill(masked, self.problem.vocab + 7)

    def heads(self) -> tuple[LMHead, LMHead]:
        p = self.problem
        shaping = {name: value for name, value in p.head.items() if name != "bias"}
        teacher = dict(shaping)
        if p.teacher_hidden_size is not None and "valid_vocab" in teacher:
            teacher["valid_vocab"] += p.teacher_more
        return (
            LMHead(self.weight, self.bias, **shaping),
            LMHead(self.teacher_weight, self.teacher_bias, **teacher),
        )


class Draw:
    """Random choices by one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def one_of(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def share(self) -> float:
        """A number of (0, 1), sometimes near an end."""
        inside = round(self.random.uniform(0.02, 0.98), 3)
        return float(self.one_of(inside, inside, 0.5, 1e-3, 0.999))

    def up_to(self, most: int) -> int:
        return self.random.randint(1, max(1, most))

    def divergence(self) -> Any:
        share = self.share()
        made = Jsd(share), MixedKl(self.one_of(share, 0.0, 1.0)), SkewKl(share)
        return self.one_of("forward_kl", "reverse_kl", *made)


def draw(seed: int, max_tokens: int = 9, max_vocab: int = 300) -> Problem:
    """Draw a legal call."""
    d = Draw(seed)
    loss = d.one_of(*LOSSES)
    vocab = d.one_of(1, 2, d.up_to(12), d.up_to(60), d.up_to(max_vocab))
    count = d.random.randint(0, max_tokens)
    tokens = d.one_of((count,), (count,), (2, count), (1, 2, count), ())
    values = d.one_of("far", "far", "close", *VALUES)
    head = {}
    if d.chance(0.3) or values == "forbidden":
        head["bias"] = True
    if d.chance(0.25):
        head["logit_scale"] = d.one_of(0.25, 1.7)
    if d.chance(0.25):
        head["softcap"] = d.one_of(2.0, 30.0)
    if d.chance(0.2):
        head["valid_vocab"] = d.up_to(vocab)
    own = d.one_of(None, None, None, d.up_to(9)) if values != "forbidden" else None
    problem = Problem(
        seed=seed,
        loss=loss,
        tokens=tokens,
        hidden_size=d.one_of(1, 3, 8, d.up_to(40)),
        teacher_hidden_size=own,
        vocab=vocab,
        dtype=d.one_of(*DTYPES),
        values=values,
        strides=d.one_of("plain", "plain", "transposed", "sliced", "expanded"),
        weights=d.one_of("none", *WEIGHTS),
        head=head,
        trained=d.one_of(*3 * (("hidden", "weight", "bias"),), ("hidden",), ("weight",), ()),
    )
    values_of = vars(problem) | {"garbage": problem.weights != "none" and d.chance(0.4)}
    settings, given = _settings(d, problem)
    options = _options(d, problem, settings, given)
    values_of |= {"settings": settings, "given": given, "options": options}
    may_differ = loss in SAMPLED or isinstance(settings.get("divergence"), Jsd | SkewKl)
    if own is not None and may_differ and d.chance(0.3):
        values_of["teacher_more"] = d.up_to(5)
    return Problem(**values_of)


def _settings(d: Draw, p: Problem) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The keywords of a loss, and the tensors that are passed beside."""
    valid, given, found = p.valid, [], {}
    if p.loss == "divergence_loss":
        found = {"divergence": d.divergence()} | _support(d, valid)
    elif p.loss == "topk_divergence_loss":
        count = d.up_to(min(valid, 20))
        # the rest of a server's mass needs a token that it does not name
        entries = Ids(max(1, min(count, valid - 1)), d.chance(0.4))
        remainder = d.one_of("tail", "renormalize", "drop")
        found = {"entries": entries, "divergence": d.divergence(), "remainder": remainder}
        found |= _clips(d, remainder)
        if d.chance(0.3) and valid > 1:
            found["sent"] = d.one_of(torch.float16, torch.bfloat16, torch.float32)
    elif p.loss == "sdpo_loss":
        found = {"alpha": d.one_of(0, 1, 0.5, d.share(), d.divergence())}
        found["top_k"] = d.one_of(None, d.up_to(valid))
        if found["top_k"] is not None:
            found["add_tail"] = d.chance(0.6)
            if found["add_tail"] and d.chance(0.3):
                found["tail_floor"] = d.one_of(1e-7, 1e-2)
        if d.chance(0.5):
            given += ["token_ids", "old_log_probs"]
            found["importance_cap"] = d.one_of(None, 2.0, 0.7)
    elif p.loss == "sd_zero_loss":
        found = {"variant": d.one_of("code", "paper")}
        if found["variant"] == "code":
            found |= {"top_k": d.up_to(valid), "forward_weight": d.one_of(0.0, 1.0, d.share())}
    elif p.loss == "opsd_loss":
        found = {"beta": d.one_of(0.0, 1.0, d.share(), d.divergence())}
        found["entry_clip"] = d.one_of(None, 0.05, 1e-3)
        if d.chance(0.5):
            found |= {"top_k": d.up_to(valid), "remainder": d.one_of("tail", "renormalize")}
    elif p.loss == "sdft_loss":
        found = {"alpha": d.one_of(0.0, 0.5, d.share()), "top_k": d.one_of(None, d.up_to(valid))}
    elif p.loss == "gkd_loss":
        found = {"beta": d.one_of(0.0, 1.0, d.share(), d.divergence())}
    elif p.loss == "cross_entropy_loss":
        found = {"ignore_index": d.one_of(-100, 0)}
    elif p.loss == "token_log_probs":
        found = {"entropy": d.chance(0.5)}
    elif p.loss == "entry_log_probs":
        count = d.up_to(min(valid, 20))
        found = {"entries": d.one_of(count, Ids(count)), "tail": d.chance(0.5)}
    else:
        return _sampled(d, p)
    if p.loss != "sdpo_loss" and p.loss in COMPARING and d.chance(0.4):
        given += ["token_ids"]
        if d.chance(0.6):
            given.append("old_log_probs")
            found["cap"] = d.one_of(2.0, 0.5)
    return found, tuple(given)


def _support(d: Draw, valid: int) -> dict[str, Any]:
    k = d.up_to(valid)
    tops = StudentTopK(k), TeacherTopK(k), UnionTopK(k)
    more = TeacherNucleus(k, d.share()), Ids(d.up_to(min(20, valid)), d.chance(0.4))
    support = d.one_of(FULL_VOCABULARY, FULL_VOCABULARY, *tops, *more)
    if support == FULL_VOCABULARY:
        return _clips(d, None)
    remainder = d.one_of(*REMAINDERS)
    found = {"support": support, "remainder": remainder} | _clips(d, remainder)
    if remainder == "teacher_renormalize":
        found["divergence"] = "forward_kl"
    return found


def _clips(d: Draw, remainder: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if remainder != "teacher_renormalize" and d.chance(0.25):
        found["entry_clip"] = d.one_of(0.05, 1e-3, 2.0)
    if d.chance(0.25):
        found["token_clip"] = d.one_of(0.3, (0.01, 0.5), (None, 1.0), (0.05, None))
    if remainder == "tail" and d.chance(0.3):
        found["tail_floor"] = d.one_of(1e-7, 1e-2)
    return found


def _sampled(d: Draw, p: Problem) -> tuple[dict[str, Any], tuple[str, ...]]:
    found: dict[str, Any] = {}
    given = ["token_ids", "old_log_probs"] if d.chance(0.7) else ["token_ids"]
    clips = None, (0.2, 0.2), (0.0, 0.28), (1.0, 3.0), (0.0, 0.0)
    if p.loss != "sampled_kl_loss":
        found["ratio_clip"] = d.one_of(*clips)
        given.append("advantages")
    if p.loss in ("policy_loss", "grpo_loss", "rlsd_loss") and d.chance(0.5):
        found["dual_clip"] = d.one_of(None, 3.0, 1.1)
    if p.loss in ("policy_loss", "grpo_loss") and d.chance(0.5):
        found["kl_coefficient"] = d.one_of(0.04, 1)
        given.append("reference_log_probs")
        if p.loss == "policy_loss":
            found["kl_estimator"] = d.one_of("k1", "k2", "k3")
    if p.loss == "rlsd_loss" or (p.loss == "policy_loss" and d.chance(0.5)):
        given.append(d.one_of("teacher_hidden", "teacher_log_probs"))
        found["evidence_clip"] = d.one_of((0.2, 0.2), (0.0, 0.5), (1.0, 2.0))
        found["mix"] = d.one_of(0.5, 0.0, 1.0, d.share(), "each")
        found["from_old"] = "old_log_probs" in given and d.chance(0.4)
    if p.loss == "sampled_kl_loss":
        given.append(d.one_of("teacher_hidden", "teacher_log_probs"))
        found["estimator"] = d.one_of("k1", "k2", "k3")
        if "old_log_probs" in given:
            found["cap"] = d.one_of(2.0, 0.5)
    if p.loss == "rlcsd_loss":
        given += ["correct_log_probs", "wrong_log_probs"]
        if d.chance(0.5):
            given.append("wrong_mask")
        found["selected_weight"] = d.one_of(1.0, 0.5)
        if d.chance(0.5):
            found["contrast"] = {"temperature": 0.03, "scale": 0.2, "clip": (-0.5, 0.5)}
    return found, tuple(given)


def _options(
    d: Draw, p: Problem, settings: dict[str, Any], given: tuple[str, ...]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if d.chance(0.3):
        found["temperature"] = d.one_of(0.5, 2.0, 1)
    if d.chance(0.3):
        found["chunk_size"] = d.up_to(5)
    if d.chance(0.2):
        found["compact"] = False
    if p.loss in ("token_log_probs", "entry_log_probs"):
        return found
    has_teacher = p.loss in (*DIVERGENCES, "divergence_loss") or "teacher_hidden" in given
    if has_teacher and d.chance(0.2):
        found["teacher_temperature"] = d.one_of(0.7, 1.5)
    metrics = legal_metrics(p, settings, given)
    if metrics and d.chance(0.3):
        found["metrics"] = tuple(d.random.sample(metrics, d.up_to(len(metrics))))
    if p.loss != "rlcsd_loss":
        found["reduction"] = d.one_of("sum", "none", *["mean"] * (p.weights != "signed"))
    return found


def legal_metrics(p: Problem, settings: dict[str, Any], given: tuple[str, ...]) -> list[str]:
    """The metrics that a call can return."""
    if p.loss == "cross_entropy_loss":
        return ["student_log_prob", "student_entropy"]
    if p.loss in SAMPLED:
        found = ["student_log_prob", "student_entropy"]
        if p.loss != "sampled_kl_loss":
            found.append("importance_ratio")
        if {"teacher_hidden", "teacher_log_probs"} & {*given}:
            found.append("teacher_log_prob")
        return found
    found = ["student_entropy"]
    if p.loss != "topk_divergence_loss":
        found += ["forward_kl", "reverse_kl", "jsd", "teacher_entropy", "top1_agreement"]
    top_k = settings.get("top_k", "default")
    is_truncated = settings.get("support", FULL_VOCABULARY) != FULL_VOCABULARY
    if p.loss == "topk_divergence_loss" or is_truncated or isinstance(top_k, int):
        found += ["student_mass", "teacher_mass", "student_tail_mass", "teacher_tail_mass"]
    if "token_ids" in given:
        found.append("student_log_prob")
        if "old_log_probs" in given and settings.get("importance_cap", 1) is not None:
            found += ["importance_ratio"]
    return found
