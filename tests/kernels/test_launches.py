"""How many kernels a chunk launches beside its GEMMs, and how often a loss waits for the GPU."""

import pytest
import torch
from cases import make_case

import fused_sd
from fused_sd.checks import tensors

pytest.importorskip("triton")
from launches import Launches

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
CHUNK = 3
TAIL = {"support": fused_sd.StudentTopK(3), "divergence": fused_sd.Jsd(0.5)}


@pytest.fixture
def count(gemms, monkeypatch):
    """Kernels and waits of a loss over some chunks of one group, as on a GPU."""

    def count(num_chunks, weighted=False, backward=False, **settings):
        case = make_case(num_chunks * CHUNK, 32, 509).to(torch.bfloat16)
        weights = torch.ones(num_chunks * CHUNK) if weighted else None
        how = {"chunk_size": CHUNK, "backend": "triton", "reduction": "sum", **settings}
        if "student_log_prob" in settings.get("metrics", ()):
            how["token_ids"] = case.token_ids
        with pytest.MonkeyPatch.context() as patch, Launches(patch) as launches:
            patch.setattr(tensors, "is_readable", lambda tensor: False)  # as on a GPU
            output = fused_sd.divergence_loss(
                *(case.hidden, case.head, case.teacher_hidden, case.head),
                token_weights=weights,
                **how,
            )
            if backward:
                output.loss.backward()
        return launches

    return count


def of_a_chunk(count, **settings):
    """Kernels that one chunk more launches."""
    return count(4, **settings).kernels - count(3, **settings).kernels


@pytest.mark.parametrize(
    "settings",
    [{}, {"divergence": "forward_kl"}, {"divergence": fused_sd.Jsd(0.5)}, {"temperature": 0.7}],
    ids=["reverse", "forward", "jsd", "temperature"],
)
def test_a_chunk_launches_few_kernels(count, settings):
    found = of_a_chunk(count, **settings)
    assert found.total() <= 4, found


@pytest.mark.parametrize("settings", [{}, TAIL], ids=["full", "tail"])
def test_nothing_waits_without_weights_and_one_thing_with(count, settings):
    assert not count(4, backward=True, **settings).waits
    assert count(4, backward=True, weighted=True, **settings).waits == {"nonzero": 1}


RENORMALIZED = {"support": fused_sd.TeacherTopK(3), "remainder": "renormalize"}
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "student_entropy", "teacher_entropy")
LOGGED = (*DIVERGENCES, "top1_agreement", "student_log_prob", "teacher_log_prob")
TAILS = ("student_tail_mass", "teacher_tail_mass", "topk_overlap")


@pytest.mark.parametrize(
    "settings, most",
    [
        (TAIL, 9),
        ({**TAIL, "entry_clip": 0.05}, 9),
        (RENORMALIZED, 21),
        ({"metrics": DIVERGENCES}, 3),
        ({"metrics": LOGGED}, 12),
        ({**TAIL, "metrics": (*LOGGED, *TAILS)}, 48),
    ],
    ids=["tail", "tail, clip", "renormalized", "divergences", "logged", "tail, logged"],
)
def test_supports_and_metrics_add_few_kernels(count, settings, most):
    found = of_a_chunk(count, **settings)
    assert found.total() <= most, found
