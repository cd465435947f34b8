"""A group of certified gradients makes the host wait once, and launches few kernels."""

import pytest
import torch
from cases import make_case
from launches import Launches

pytest.importorskip("triton")
import fused_sd
from fused_sd.engine import gradients
from fused_sd.engine.auto_gradients import AutoGradients

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter"),
    # the interpreter computes both branches of a select in numpy, which warns of inf - inf
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


@pytest.fixture
def groups(monkeypatch):
    """The waits and launches of every group that is accumulated."""
    counted = []

    def counted_with(accumulate):
        def counting(self, group):
            with monkeypatch.context() as patch, Launches(patch) as launches:
                accumulate(self, group)
            counted.append(launches)

        return counting

    for form in (gradients.CertifiedGradients, AutoGradients):
        monkeypatch.setattr(form, "accumulate", counted_with(form.accumulate))
    monkeypatch.setattr(gradients, "MOST", 12)
    return counted


def certificate_of(dense_every, reduction, num_tokens=40, **how):
    """The certificate of tokens that are nearly decided, but for every so many flat ones."""
    case = make_case(num_tokens, 16, 211, peak=20.0)
    tolerance = 2**-4  # with which every decided row is sparse, and flat ones in a sum too
    if dense_every:
        tolerance = 2**-9
        case.hidden.data[::dense_every] *= 0.02
    case.teacher_hidden = case.hidden.detach() * 1.05
    case = case.to(torch.float32)
    output = fused_sd.divergence_loss(
        *(case.hidden, case.head, case.teacher_hidden, case.teacher_head),
        **{"gradient": "sparse", "tolerance": tolerance, "reduction": reduction, **how},
        chunk_size=5,
        backend="triton",
    )
    return output.certificate


@pytest.mark.parametrize("reduction, most_launches", [("sum", 66), ("none", 16)])
@pytest.mark.parametrize("dense_every", [0, 1, 4])
def test_a_group_of_sparse_gradients_waits_once(groups, dense_every, reduction, most_launches):
    certificate = certificate_of(dense_every, reduction)
    assert certificate.dense.any() == bool(dense_every)
    assert len(groups) >= 4
    for group in groups:
        assert group.waits == {"tolist": 1}
        by_program = {name: group.kernels[name] for name in ("trim", "compact")}
        assert by_program == {"trim": 1, "compact": int(dense_every != 1)}
    if dense_every != 1:  # where no row moves and nothing is multiplied
        assert sum(groups[0].kernels.values()) <= most_launches + 2 * bool(dense_every)


def test_what_an_automatic_gradient_does_not_search_waits_for_nothing(groups):
    certificate = certificate_of(1, "sum", gradient="auto")
    assert certificate.dense.all()
    assert [group.waits["tolist"] for group in groups] == [1, 0] * 4
    assert all(group.waits.total() == group.waits["tolist"] for group in groups)
    for group in groups[1::2]:
        assert not group.kernels["block_statistics"] + group.kernels["trim"]
        assert group.kernels["linalg_vector_norm"] == 1


def test_an_automatic_gradient_that_pays_waits_once_more_in_all(groups):
    certificate = certificate_of(0, "sum", gradient="auto")
    assert not certificate.dense.any()
    assert sum(group.waits.total() for group in groups) == 4 + 1
