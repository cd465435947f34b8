"""Every loss, on every kind of head and of tokens: what is checked where ranks share the head."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from cases import Case
from vocab_parallel_cases import (
    CAP,
    DIVERGENCES,
    REMAINDERS,
    SUPPORTS,
    Check,
    Definition,
    Fused,
    advantages,
    averaged,
    by_selection,
    divergence,
    each,
    joint,
    log_probs,
    named,
    old,
    rlcsd,
    rlcsd_definition,
    sampled,
    summed,
    unweighted,
)

import fused_sd
from fused_sd import reference


def _matrix() -> dict[str, Check]:
    """Every divergence on every support with every remainder, and what may be done to each."""
    checks = {}
    for name in DIVERGENCES:
        checks[f"full {name}"] = Check(*divergence(name))
        for support, remainder in itertools.product(SUPPORTS, REMAINDERS):
            checks[f"{support} {remainder} {name}"] = Check(*divergence(name, support, remainder))
        for clip in ({"entry_clip": 0.02}, {"token_clip": (0.13, 0.9)}):
            checks[f"full {name} {next(iter(clip))}"] = Check(*divergence(name, **clip))
    for support, remainder in itertools.product(SUPPORTS, REMAINDERS):
        both = {"entry_clip": 0.02, "token_clip": (-1.0, 0.12), "importance": True}
        checks[f"{support} {remainder} clips and importance"] = Check(
            *divergence("jsd", support, remainder, **both)
        )
    for support in SUPPORTS:
        checks[f"{support} tail_floor"] = Check(*divergence("jsd", support, tail_floor=1e-2))
        checks[f"{support} teacher_renormalize"] = Check(
            *divergence("forward_kl", support, "teacher_renormalize")
        )
    floor = divergence("forward_kl", "entries", "drop", log_prob_floor=-5.0)
    checks["entries drop log_prob_floor"] = Check(*floor)
    checks["full importance"] = Check(*divergence("jsd", importance=True))
    few = {"valid_vocab": 23}
    most, every = divergence("jsd", "student", k=22), divergence("jsd", "teacher", "drop", k=23)
    checks["student tail, all entries but one"] = Check(*most, problem=few)
    checks["teacher drop, every entry"] = Check(*every, problem=few)
    return checks


def _sampled_tokens() -> dict[str, Check]:
    cases: dict[str, tuple[Fused, Definition]] = {
        "cross entropy": sampled(
            "cross_entropy", lambda a, b, c: -a, has_advantages=False, reduction="sum"
        ),
        "log-probs": log_probs(),
        "log-probs and entropy": log_probs(entropy=True),
        "top-k log-probs": log_probs(entries="top-k"),
        "top-k log-probs and tail": log_probs(entries="top-k", tail=True),
        "given log-probs": log_probs(entries="ids"),
        "given log-probs and tail": log_probs(entries="ids", tail=True),
        "grpo": sampled(
            "grpo",
            lambda a, b, c: reference.grpo(
                a, advantages(c), old(c), reference_log_prob=old(c) - 1, kl_coefficient=0.1
            ),
            old_log_probs=old,
            reference_log_probs=lambda case: old(case) - 1,
            kl_coefficient=0.1,
        ),
        "rlsd": sampled(
            "rlsd",
            lambda a, b, c: reference.rlsd(a, b, advantages(c), old(c)),
            teacher_states=True,
            old_log_probs=old,
        ),
        "rlsd of a server": sampled(
            "rlsd",
            lambda a, b, c: reference.rlsd(a, old(c) - 0.5, advantages(c), old(c)),
            old_log_probs=old,
            teacher_log_probs=lambda case: old(case) - 0.5,
        ),
        "policy with evidence": sampled(
            "policy",
            lambda a, b, c: reference.rlsd(
                a, b, advantages(c), old(c), mix=0.3, ratio_clip=(0.1, 0.3), dual_clip=2.0
            ),
            teacher_states=True,
            old_log_probs=old,
            evidence=fused_sd.Evidence(mix=0.3),
            ratio_clip=(0.1, 0.3),
            dual_clip=2.0,
            reduction="sum",
        ),
    }
    cases |= {f"sampled {estimator}": _sampled_kl(estimator) for estimator in ("k1", "k2", "k3")}
    means = ("grpo", "rlsd", "rlsd of a server")
    values = [name for name in cases if "log-probs" in name]
    checks = {
        name: Check(*pair, weighting=unweighted if name in values else summed)
        for name, pair in cases.items()
    }
    checks |= {name: replace(checks[name], weighting=averaged) for name in means}
    for which in (("jsd",), ("jsd", "student"), ("reverse_kl", "ids", "renormalize")):
        checks[f"log-probs and entropy beside {' '.join(which)}"] = Check(
            *joint(*which), weighting=each
        )
    checks["log-probs and entropy beside a server's"] = Check(
        *joint("forward_kl", "entries"), weighting=each
    )
    return checks | {"rlcsd": Check(rlcsd, rlcsd_definition, weighting=by_selection)}


def _sampled_kl(estimator: str) -> tuple[Fused, Definition]:
    of_sampled = getattr(reference, f"sampled_{estimator}")
    return sampled(
        "sampled_kl",
        lambda a, b, c: of_sampled(a, b) * reference.importance(a, old(c), CAP),
        teacher_states=True,
        has_advantages=False,
        estimator=estimator,
        importance=lambda case: fused_sd.ImportanceCap(old(case), CAP),
        reduction="sum",
    )


def _named() -> dict[str, Check]:
    k = {"top_k": 5}
    return {
        "sdpo": named("sdpo", lambda s, t: reference.sdpo(s, t, k=5), **k),
        "sdpo feedback": named(
            "sdpo", lambda s, t: reference.sdpo(s, t, alpha=1.0, k=5), alpha=1.0, **k
        ),
        "sdpo full": named("sdpo", reference.sd_zero_paper, alpha=1.0, top_k=None),
        "sd_zero": named("sd_zero", lambda s, t: reference.sd_zero(s, t, k=5), **k),
        "sd_zero paper": named("sd_zero", reference.sd_zero_paper, variant="paper"),
        "opsd": named("opsd", reference.opsd),
        "opsd top-k": named(
            "opsd", lambda s, t: reference.opsd_topk(s, t, k=5), remainder="tail", **k
        ),
        "sdft": named("sdft", reference.sdft),
        "sdft top-k": named("sdft", lambda s, t: reference.sdft_trl(s, t, k=5), alpha=0.5, **k),
        "gkd": named("gkd", reference.gkd),
        "gkd end": named("gkd", lambda s, t: reference.gkd(s, t, beta=0.0), beta=0.0),
    }


def _shaped() -> dict[str, Check]:
    """A head's bias, scale and soft-cap, and temperatures, on one loss of every kind."""
    problem = {"logit_scale": 1.3, "softcap": 8.0}
    run = {"temperature": 0.7}
    kinds = {
        "full": Check(*divergence("jsd", entry_clip=0.02)),
        "tail": Check(*divergence("mixed_kl", "student")),
        "renormalize": Check(*divergence("reverse_kl", "ids", "renormalize")),
        "drop": Check(*divergence("forward_kl", "union", "drop")),
        "served": Check(*divergence("forward_kl", "entries")),
        "rlsd": _sampled_tokens()["rlsd"],
        "entropy": _sampled_tokens()["log-probs and entropy"],
        "entries": _sampled_tokens()["top-k log-probs and tail"],
    }
    checks = {}
    for name, check in kinds.items():
        checks[f"shaped {name}"] = replace(check, problem=problem, run=run)
    for name in ("full", "tail", "rlsd"):
        both = {"temperature": 0.7, "teacher_temperature": 1.4}
        checks[f"temperatures {name}"] = replace(kinds[name], problem={"bias": False}, run=both)
    return checks


def _padded() -> dict[str, Check]:
    """Rows of the head that are no tokens: all of the last shard's, and some before."""
    kinds = {
        "full": divergence("jsd"),
        "tail": divergence("jsd", "union"),
        "renormalize": divergence("jsd", "student", "renormalize"),
        "renormalize, given": divergence("jsd", "ids", "renormalize"),
        "drop": divergence("jsd", "teacher", "drop"),
        "served": divergence("jsd", "entries"),
    }
    checks = {f"padded {name}": Check(*pair) for name, pair in kinds.items()}
    for name in ("cross entropy", "rlsd", "log-probs and entropy", "top-k log-probs and tail"):
        checks[f"padded {name}"] = _sampled_tokens()[name]
    checks = {name: replace(check, problem={"valid_vocab": 23}) for name, check in checks.items()}
    # a KL is infinite where only its first argument has mass
    larger = {"full": "reverse_kl", "student": "jsd", "ids": "jsd"}
    for support, name in larger.items():
        remainder = "tail" if support == "full" else "renormalize"
        pair = divergence(name, support, remainder)
        checks[f"teacher knows more, {support}"] = Check(
            *pair, problem={"valid_vocab": 23}, teacher_valid=34
        )
        checks[f"teacher has more rows, {support}"] = Check(*pair, problem={"teacher_vocab": 46})
    pair = divergence("forward_kl")
    checks["teacher knows less"] = Check(*pair, problem={"valid_vocab": 34}, teacher_valid=23)
    return checks


def _metrics() -> dict[str, Check]:
    whole = ("forward_kl", "reverse_kl", "jsd", "student_entropy", "teacher_entropy")
    both = (*whole, "top1_agreement", "student_log_prob", "teacher_log_prob")
    clips = {"entry_clip": 0.02, "token_clip": (None, 0.12), "importance": True}
    cut = ("entry_clip_fraction", "token_clip_fraction")
    ratio = ("importance_ratio", "importance_cap_fraction")
    masses = ("student_mass", "teacher_mass", "student_tail_mass", "teacher_tail_mass")
    checks = {
        "metrics of a full support": Check(
            *divergence("jsd", metrics=(*both, *cut, *ratio), **clips)
        ),
        "metrics of a server": Check(
            *divergence(
                "jsd",
                "entries",
                metrics=(*masses, "student_entropy", "student_log_prob", *cut, *ratio),
                **clips,
            )
        ),
    }
    for support, remainder in itertools.product(SUPPORTS[:4], REMAINDERS):
        names = (*both, *masses, *cut, *ratio) + (("topk_overlap",) if support != "ids" else ())
        pair = divergence("jsd", support, remainder, metrics=names, **clips)
        checks[f"metrics {support} {remainder}"] = Check(*pair)
    return checks


def change_all_masked(case: Case) -> None:
    case.token_weights = torch.zeros_like(case.token_weights)


def change_garbage(case: Case) -> None:
    """What a masked token holds is nobody's concern."""
    masked = case.token_weights == 0
    for tensor in (case.hidden, case.teacher_hidden, case.old_log_probs):
        tensor.data[masked] = torch.nan
    case.token_ids[masked] = torch.tensor([10**6, -100])[: int(masked.sum())]


def change_ties(case: Case) -> None:
    """Five different rows, over and over: equal logits on all ranks, and exactly so."""
    case.hidden = (2 * case.hidden.detach()).round()
    case.teacher_hidden = (2 * case.teacher_hidden).round()
    rows = torch.arange(len(case.weight)) * 7 % 5
    case.weight = case.weight.detach().mul(2).round()[rows]
    case.teacher_weight, case.bias = case.weight, None


def change_silent(value: float) -> Callable[[Case], None]:
    """A shard without mass, whichever it is of two or four: the first, and the third."""

    def change(case: Case) -> None:
        case.bias.data[19:] = value
        case.bias.data[:10] = value

    return change


def _edges() -> dict[str, Check]:
    kinds = {
        "full": Check(*divergence("jsd", entry_clip=0.02)),
        "tail": Check(*divergence("jsd", "student")),
        "drop": Check(*divergence("jsd", "ids", "drop")),
        "renormalize": Check(*divergence("mixed_kl", "teacher", "renormalize")),
        "rlsd": _sampled_tokens()["rlsd"],
        "log-probs": _sampled_tokens()["log-probs and entropy"],
    }
    checks = {}
    for name, check in kinds.items():
        garbage = replace(check, change=change_garbage)
        checks[f"all masked, {name}"] = replace(check, change=change_all_masked)
        checks[f"no tokens, {name}"] = replace(check, problem={"num_tokens": 0})
        checks[f"garbage, {name}"] = garbage
        checks[f"garbage that is computed, {name}"] = replace(garbage, run={"compact": False})
        for size in (1, 2, 7):
            checks[f"chunks of {size}, {name}"] = replace(check, run={"chunk_size": size})
        checks[f"frozen hidden, {name}"] = replace(check, trained=("weight", "bias"))
        checks[f"frozen head, {name}"] = replace(check, trained=("hidden",))
        checks[f"frozen weight, {name}"] = replace(check, trained=("hidden", "bias"))
        checks[f"nothing trained, {name}"] = replace(check, trained=())
        if name in ("full", "tail", "drop"):  # where no KL is infinite
            nothing = replace(check, change=change_silent(-torch.inf))
            checks[f"a shard of nothing, {name}"] = nothing
        if name not in ("log-probs", "rlsd"):
            silent = replace(check, change=change_silent(-1e5))
            checks[f"a shard without mass, {name}"] = silent
            checks[f"a mean, {name}"] = replace(
                check, run={"reduction": "mean"}, weighting=averaged
            )
        if name != "log-probs":
            none = replace(check, run={"reduction": "none"}, weighting=each)
            checks[f"each token, {name}"] = none
            checks[f"each token, frozen head, {name}"] = replace(none, trained=("hidden",))
            checks[f"each token, frozen hidden, {name}"] = replace(none, trained=("weight", "bias"))
    for name, pair in {
        "union": divergence("jsd", "union"),
        "student": divergence("jsd", "student", "drop", k=3),
        "teacher": divergence("jsd", "teacher", "renormalize"),
        "top-k": log_probs(entries="top-k", tail=True),
    }.items():
        weighting = unweighted if name == "top-k" else summed
        checks[f"ties, {name}"] = Check(*pair, change=change_ties, weighting=weighting)
    short = {"vocab": 1201, "num_tokens": 3}  # so few that blocks of columns are searched
    checks["a short list"] = Check(*divergence("jsd", "student", k=1), problem=short)
    return checks


SECTIONS = {
    "matrix": _matrix(),
    "sampled": _sampled_tokens(),
    "named": _named(),
    "shaped": _shaped(),
    "padded": _padded(),
    "metrics": _metrics(),
    "edges": _edges(),
}
CHECKS = {name: check for section in SECTIONS.values() for name, check in section.items()}
