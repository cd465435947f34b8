"""The names of the metrics: one meaning each, the same for all losses.

A metric is returned per token, detached, and 0 for a token of weight 0.
"""

from collections.abc import Collection, Mapping, Sequence

from fused_sd import checks

# What a divergence loss can return, and what each metric needs of the call beside the student's
# logits.
METRIC_NEEDS: dict[str, tuple[str, ...]] = {
    "forward_kl": ("teacher states",),
    "reverse_kl": ("teacher states",),
    "jsd": ("teacher states",),
    "student_entropy": (),
    "teacher_entropy": ("teacher states",),
    "top1_agreement": ("teacher states",),
    "student_mass": ("truncated support",),
    "teacher_mass": ("truncated support",),
    "student_tail_mass": ("truncated support",),
    "teacher_tail_mass": ("truncated support",),
    "topk_overlap": ("teacher states", "top-k support"),
    "student_log_prob": ("token_ids",),
    "teacher_log_prob": ("token_ids", "teacher states"),
    "entry_clip_fraction": ("entry_clip",),
    "token_clip_fraction": ("token_clip",),
    "importance_ratio": ("importance",),
    "importance_cap_fraction": ("importance",),
}

NEED_REMEDIES = {
    "teacher states": "call divergence_loss with the teacher's hidden states and head",
    "truncated support": "pass a support other than FULL_VOCABULARY, such as StudentTopK(100)",
    "top-k support": "pass StudentTopK, TeacherTopK, UnionTopK or TeacherNucleus as support",
    "token_ids": "pass token_ids, the sampled tokens",
    "entry_clip": "pass entry_clip",
    "token_clip": "pass token_clip",
    "importance": "pass importance=ImportanceCap(...)",
}

# Names that the losses of the sampled token had of their own, and the names that all losses share.
DEPRECATED = {
    "log_prob": "student_log_prob",
    "entropy": "student_entropy",
    "ratio": "importance_ratio",
}


def current_names(argument: str, names: Sequence[str], legal: Collection[str]) -> dict[str, str]:
    """Map each name that a caller gave to the current one, with a warning where it has changed.

    Args:
        argument: of the caller, for messages.
        names: as the caller gave them.
        legal: the current names that the loss knows.

    Raises:
        ValueError: when the names are no sequence of names, or one is unknown.
    """
    checks.check_names(argument, names)
    known = {}
    for name in names:
        renamed = DEPRECATED.get(name)
        if renamed is not None and renamed in legal:
            checks.deprecated(f"{argument}: {name!r} is now called {renamed!r}, as in every loss")
            known[name] = renamed
            continue
        checks.check_one_of(argument, name, legal)
        known[name] = name
    return known


def check_metric_needs(names: Collection[str], given: Mapping[str, bool]) -> None:
    """Refuse a metric that the call cannot form."""
    for name in names:
        for need in METRIC_NEEDS[name]:
            if not given[need]:
                checks.fail("metrics", f"have {need} for {name!r}", "none", NEED_REMEDIES[need])
