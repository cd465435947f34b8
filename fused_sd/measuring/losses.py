"""The losses by the names that ``verify``, ``bench`` and ``plan`` take: one table for all three.

``verify`` has a case for each name, ``bench`` an objective and ``plan`` the choices that decide
memory.  Names are read without regard to case, and a hyphen is an underscore.
"""

import argparse
from collections.abc import Iterable

from fused_sd import checks

# s is the student and t the teacher
LOSSES = {
    "sdpo": "JSD 0.5 on the student's top-100 and one bucket for the rest",
    "sd_zero": "half KL(t || s), half KL(s || t), on the teacher's top-64, renormalised",
    "sd_zero_paper": "KL(s || t) over the vocabulary, as SD-Zero's paper writes it",
    "opsd": "KL(t || s) over the vocabulary, each entry's term cut at 0.05",
    "sdft": "KL(t || s) over the vocabulary",
    "gkd": "JSD 0.5 over the vocabulary",
    "rlsd": "GRPO's, each advantage weighted by what the teacher says of the sampled token",
    "rlcsd": "GRPO's, a contrast of right and wrong hints added to the advantages",
    "sampled_kl": "KL(s || t) estimated from the sampled token: k1",
    "grpo": "the clipped surrogate of the sampled token",
    "cross_entropy": "-log s of given tokens",
    "token_log_probs": "log s of given tokens, which other losses are made of",
    "forward_kl": "KL(t || s) over the vocabulary: sdft without its method",
    "reverse_kl": "KL(s || t) over the vocabulary",
    "jsd": "JSD 0.5 over the vocabulary: gkd without its method",
}
# the names by which ``bench`` stores its results
STORED_NAMES = {"topk_tail": "sdpo", "topk_renormalized": "sd_zero"}


def loss_name(option: str, text: str, more: Iterable[str] = ()) -> str:
    """Return the table's name of a loss.

    Args:
        option: how the error calls what was given.
        text: what was given: a name, in any case, with hyphens or underscores.
        more: names that are known beside those of the table.

    Raises:
        ValueError: no loss has the name; the message lists all that are known.
    """
    name = str(text).strip().lower().replace("-", "_")
    name = STORED_NAMES.get(name, name)
    known = (*LOSSES, *more)
    if name not in known:
        rule = f"be a loss ({', '.join(known)})"
        checks.fail(option, rule, repr(text), "write one of these")
    return name


def loss_names(option: str, text: str, more: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the names of losses in "A,B", each once; "all" names every loss of the table.

    Args:
        option: how the error calls what was given.
        text: the names, as ``loss_name`` takes them, with commas between them.
        more: names that are known beside those of the table.

    Raises:
        ValueError: no loss has one of the names; the message lists all that are known.
    """
    if text.strip().lower() == "all":
        return tuple(LOSSES)
    return tuple(dict.fromkeys(loss_name(option, name, more) for name in text.split(",")))


def add_losses(command: argparse.ArgumentParser, default: str, more: Iterable[str] = ()) -> None:
    """Add ``--losses``; ``bench`` called it ``--objectives`` until all commands had one table."""
    command.add_argument(
        "--losses",
        "--loss",
        default=default,
        metavar="A,B",
        help=f"all, or of {', '.join((*LOSSES, *more))} (default {default})",
    )
    for old in ("--objectives", "--objective"):
        command.add_argument(old, dest="losses", default=default, help=argparse.SUPPRESS)
