"""How often a loss reads its rows of logits, with and without what trainers log."""

from collections import Counter

import pytest
import torch
from cases import make_case

import fused_sd
from fused_sd.torch_kernels import entries, rows, sparse

NAMES = ("forward_kl", "reverse_kl", "jsd", "student_entropy", "teacher_entropy")
LABELS = ("student_log_prob", "teacher_log_prob")
TOP = ("top1_agreement", "topk_overlap")
TAILS = ("student_tail_mass", "teacher_tail_mass", "student_mass", "teacher_mass")
TAIL = {"support": fused_sd.StudentTopK(3), "divergence": fused_sd.Jsd(0.5)}


@pytest.fixture
def count(monkeypatch):
    """Calls of every function that reads whole rows, in a loss of one chunk and its gradient."""
    calls = Counter()

    def watched(module, name):
        function = getattr(module, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("log_normalizer", "lse_and_entropy", "normalizers", "row_metrics"):
        watched(rows, name)
    for name in ("divergence_", "softmax_gradient_"):
        watched(rows, name)
    watched(sparse, "top_k")
    watched(entries, "take_out_")

    def count(**settings):
        calls.clear()
        case = make_case()
        output = fused_sd.divergence_loss(
            *(case.hidden, case.head, case.teacher_hidden, case.head),
            **{"token_ids": case.token_ids, "reduction": "sum", **settings},
        )
        output.loss.backward()
        return Counter(calls)

    return count


def test_the_losses_own_passes_find_the_metrics_of_whole_rows(count):
    """``row_metrics`` and the second ``log_normalizer`` calls are those of ``divergence_``."""
    assert count() == {"normalizers": 1, "log_normalizer": 2, "divergence_": 1}
    found = count(metrics=(*NAMES, *LABELS))
    assert found - Counter(row_metrics=1) == count()


def test_a_truncated_support_reads_its_rows_once_more(count):
    alone = {"top_k": 1, "take_out_": 2, "softmax_gradient_": 1}
    assert count(**TAIL) == alone
    for metrics in (LABELS, TAILS, (*LABELS, *TAILS)):
        assert count(metrics=metrics, **TAIL) == alone
    assert count(metrics=(*NAMES, *LABELS, *TAILS), **TAIL) == {**alone, "row_metrics": 1}


def test_a_side_is_searched_once(count):
    assert count(metrics=TOP, **TAIL)["top_k"] == 2  # the student's is the support's own
    assert count(metrics=TOP[:1], **TAIL)["top_k"] == 2
    support = fused_sd.UnionTopK(3)
    assert count(metrics=TOP, support=support)["top_k"] == 2


def test_whole_rows_are_searched_where_they_are_normalised(count):
    assert count(metrics=TOP[:1]) == count()


def test_an_importance_ratio_reads_nothing_more(count):
    case = make_case()
    cap = fused_sd.ImportanceCap(case.old_log_probs)
    assert count(importance=cap, **TAIL) == count(**TAIL)
    assert count(importance=cap) == count()


@pytest.mark.parametrize("far", [False, True])
def test_the_share_of_clipped_entries_is_counted_over_the_vocabulary(far):
    """Where both sides are near, and where a log-ratio is too large for the fast form."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]]))
    teacher = logits.flip(1)
    if far:
        logits, teacher = (torch.cat([side, side[:, :1] - 90], 1) for side in (logits, teacher))
        teacher[0, -1] += 80
    head = torch.eye(logits.shape[1])
    output = fused_sd.divergence_loss(
        logits,
        head,
        teacher,
        head,
        divergence="reverse_kl",
        entry_clip=0.2,
        metrics=("entry_clip_fraction",),
        reduction="sum",
    )
    # the plain terms s (log s - log t) are 0.5 ln 4, 0.25 ln 2, -0.125 ln 2 and -0.125 ln 4
    assert output.metrics["entry_clip_fraction"].tolist() == pytest.approx([1 / len(head), 0])
