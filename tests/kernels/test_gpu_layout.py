"""A chunked run with a GPU's layout, tested without one: 16-bit operands, separate memory for
gradients, one GEMM for both sides of a shared head (the fixture ``gemms``).
"""

from collections import Counter

import pytest
import torch
from cases import make_case
from closeness import assert_close
from gpu_layout import VOCAB

import fused_sd
from fused_sd.engine import gradients, workspace
from fused_sd.engine.layout import Layout, Room, RunSize, choose_layout, workspace_bytes
from fused_sd.head import projection as heads
from fused_sd.head.vocab_shard import VocabShard
from fused_sd.torch_kernels import sparse

pytest.importorskip("triton")
from fused_sd.kernels import rows as kernels

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU shows the real thing"),
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]
CHUNK = 3
BACKENDS = ["torch", "triton"]
SETTINGS = {
    "reverse": {},
    "jsd": {"divergence": fused_sd.Jsd(0.5)},
    "clipped": {"divergence": "forward_kl", "entry_clip": 0.05},
    "temperatures": {"temperature": 0.7, "teacher_temperature": 1.3},
    "token clip": {"divergence": "forward_kl", "token_clip": 0.5},
    "tail": {"support": fused_sd.StudentTopK(3), "divergence": fused_sd.Jsd(0.5)},
    "renormalized": {"support": fused_sd.TeacherTopK(3), "remainder": "renormalize"},
}


def sixteen_bit_case(num_tokens=24, **settings):
    return make_case(num_tokens, 32, VOCAB, **settings).to(torch.bfloat16)


def losses(case, backend, shared=False, **settings):
    """The loss in a chunked run as on a GPU, and its value in float64."""
    double = case.to(torch.float64)
    ours = {"backend": backend, "chunk_size": CHUNK}
    for one, how in ((case, ours), (double, {"backend": "torch"})):
        teacher = one.head if shared else one.teacher_head
        sides = one.hidden, one.head, one.teacher_hidden, teacher
        output = fused_sd.divergence_loss(
            *sides, token_weights=one.token_weights, **{"reduction": "sum", **settings}, **how
        )
        yield output.loss, torch.autograd.grad(output.loss.sum(), one.inputs)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_in_their_own_memory(name, backend, shared, gemms):
    case = sixteen_bit_case(softcap=30.0 if name == "jsd" else None)
    (loss, found), (exact, expected) = losses(case, backend, shared, **SETTINGS[name])
    assert_close(loss, exact, torch.float32)
    for value, truth in zip(found, expected, strict=True):
        assert (value.double() - truth).norm() <= 6e-3 * truth.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [False, True])
def test_bias_and_scale_are_the_gemms(backend, shared, gemms):
    case = sixteen_bit_case(bias=True, logit_scale=1.7, softcap=20.0)
    (loss, found), (exact, expected) = losses(case, backend, shared)
    assert_close(loss, exact, torch.float32)
    for value, truth in zip(found, expected, strict=True):
        assert (value.double() - truth).norm() <= 6e-3 * truth.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_with_a_gradient_leave_the_padding_as_it_was(backend, gemms):
    """Their gradient is written over the logits, which the next chunk's GEMM fills again."""
    case, found = sixteen_bit_case(), []
    for one, how in (
        (case, {"backend": backend, "chunk_size": CHUNK}),
        (case.to(torch.float64), {"backend": "torch"}),
    ):
        output = fused_sd.divergence_loss(
            *(one.hidden, one.head, one.teacher_hidden, one.teacher_head),
            **{"token_ids": one.token_ids, "with_grad": ("student_log_prob",), **how},
            reduction="none",
        )
        loss = output.loss.sum() + output.with_grad["student_log_prob"].sum()
        found.append((loss, *torch.autograd.grad(loss, one.inputs)))
    assert_close(found[0][0], found[1][0], torch.float32)
    for value, truth in zip(found[0][1:], found[1][1:], strict=True):
        assert (value.double() - truth).norm() <= 6e-3 * truth.norm()


def run(case, shared=False, **settings):
    teacher = case.head if shared else case.teacher_head
    sides = case.hidden, case.head, case.teacher_hidden, teacher
    weights = case.token_weights
    return fused_sd.divergence_loss(
        *sides,
        token_weights=weights,
        chunk_size=CHUNK,
        backend="torch",
        **{"reduction": "sum", **settings},
    ).loss


def test_gemms_are_few(gemms):
    case = sixteen_bit_case()
    num_active = int((case.token_weights != 0).sum())
    chunks, groups = -(-num_active // CHUNK), -(-num_active // (4 * CHUNK))
    assert groups > 1
    run(case).backward()
    assert gemms == {"logits": 2 * chunks, "dH": groups, "dW": groups}
    gemms.clear()
    run(case, shared=True).backward()
    assert gemms == {"logits": chunks, "dH": groups, "dW": groups}  # one GEMM for both sides


def test_what_is_not_asked_for_is_not_multiplied(gemms):
    case = sixteen_bit_case()
    with torch.no_grad():
        run(case)
    assert set(gemms) == {"logits"}
    gemms.clear()
    case.weight.requires_grad_(False)
    run(case).backward()
    assert set(gemms) == {"logits", "dH"}
    gemms.clear()
    case.token_weights.zero_()
    run(case).backward()
    assert not gemms
    assert (case.hidden.grad == 0).sum() >= 8 * 32  # the masked of the run before, attached now
    gemms.clear()
    advantages = torch.zeros_like(case.token_weights)
    fused_sd.policy_loss(
        case.hidden, case.head, case.token_ids, advantages, reduction="sum"
    ).loss.backward()
    assert not gemms


GIVEN = torch.arange(4).expand(24, 4)
ENTRIES = {  # GEMMs with the head for each chunk
    "teacher": (1, {"support": fused_sd.TeacherTopK(3), "remainder": "renormalize"}),
    "student": (1, {"support": fused_sd.StudentTopK(3), "remainder": "renormalize"}),
    "union": (2, {"support": fused_sd.UnionTopK(3), "remainder": "renormalize"}),
    "ids": (0, {"support": fused_sd.TokenIds(GIVEN), "remainder": "renormalize"}),
}


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_gradient_of_few_entries_needs_no_gemm(name, reduction, gemms):
    """Only the side that chooses entries needs whole logits, and backward needs no GEMM."""
    case = sixteen_bit_case()
    logits, settings = ENTRIES[name]
    run(case, reduction=reduction, **settings).sum().backward()
    chunks = -(-int((case.token_weights != 0).sum()) // CHUNK)
    assert gemms == Counter({"logits": logits * chunks})


@pytest.mark.parametrize("sides", ["ids", "student"])
def test_a_renormalized_teacher_is_known_by_its_entries(sides, gemms):
    support = fused_sd.TokenIds(GIVEN) if sides == "ids" else fused_sd.StudentTopK(3)
    how = {"divergence": "forward_kl", "remainder": "teacher_renormalize"}
    run(sixteen_bit_case(), support=support, **how).backward()
    assert gemms["logits"] == 6  # the student's alone


def test_a_teacher_server_needs_no_gemm(gemms):
    case = sixteen_bit_case()
    log_probs = torch.full(GIVEN.shape, -2.0)
    output = fused_sd.topk_divergence_loss(
        case.hidden, case.head, GIVEN, log_probs, remainder="renormalize", reduction="sum"
    )
    output.loss.backward()
    assert not gemms


def test_what_reads_whole_rows_makes_them(gemms):
    """An importance ratio or a metric of whole rows needs whole logits with any support."""
    case = sixteen_bit_case()
    ids, settings = case.token_ids, ENTRIES["ids"][1]
    cap = fused_sd.ImportanceCap(case.old_log_probs)
    for more, sides in (({"importance": cap, "token_ids": ids}, 1), ({"metrics": ("jsd",)}, 2)):
        gemms.clear()
        run(case, **settings, **more).backward()
        assert gemms == Counter({"logits": 6 * sides})


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_sparse_gradient_needs_no_gemm_where_no_row_is_dense(reduction, gemms, monkeypatch):
    case = sixteen_bit_case(peak=20.0)
    loss = run(case, gradient="sparse", tolerance=0.1, reduction=reduction)
    loss.sum().backward()
    assert set(gemms) == {"logits"}
    gemms.clear()
    monkeypatch.setattr(gradients, "MOST", 2)
    case = sixteen_bit_case(peak=0.1)  # flat: every row is dense
    loss = run(case, gradient="sparse", tolerance=0.1, reduction=reduction)
    ran = gemms["dH"], gemms["dW"]
    assert all(ran) == (reduction == "sum")  # in forward, while the chunk's rows are at hand
    loss.sum().backward()
    assert gemms["dH"] == gemms["dW"] > 0


@pytest.mark.parametrize("sixteen_bit", [False, True])
@pytest.mark.parametrize("has_gradient", [False, True])
@pytest.mark.parametrize("has_teacher", [False, True])
def test_workspaces_take_the_bytes_that_are_planned(
    sixteen_bit, has_gradient, has_teacher, request
):
    if sixteen_bit:
        request.getfixturevalue("gemms")
    dtype = torch.bfloat16 if sixteen_bit else torch.float32
    hidden, weight = torch.randn(90, 8, dtype=dtype), torch.randn(VOCAB, 8, dtype=dtype)
    student = heads.Projection(hidden, weight, None, heads.Shaping(1.0, None))
    teacher = student if has_teacher else None
    dots, whole = sparse.entry_logits, VocabShard(None, VOCAB)
    needs = workspace.Needs((True, True), has_gradient, 0, Room(0, 0), chunk_size=7)
    made = workspace.Workspace(student, teacher, needs, dots, whole)
    held = [made.logits] if made.dlogits is None else [made.logits, made.dlogits]
    size = RunSize(VOCAB, 1 + has_teacher, 4, dtype.itemsize, has_gradient, 0)
    assert size.in_place == (has_gradient and not sixteen_bit)
    assert made.layout == (7, 14 if size.in_place else 28)
    assert sum(tensor.nbytes for tensor in held) == workspace_bytes(size, made.layout)
    limit = 40 * workspace_bytes(size, Layout(1, 1))
    chunk, group = choose_layout(size, 10**6, Room(limit, 0))
    assert workspace_bytes(size, Layout(chunk, group)) <= limit
    longer = Layout(chunk + 1, group + group // chunk)
    assert workspace_bytes(size, longer) > limit


@pytest.mark.bits
def test_a_gradient_of_zero_is_sparse_and_needs_no_gemm(gemms):
    case = sixteen_bit_case()
    output = fused_sd.divergence_loss(
        *(case.hidden, case.head, case.hidden.detach(), case.head),
        gradient="sparse",
        reduction="sum",
    )
    output.loss.backward()
    assert set(gemms) == {"logits"}
    assert (case.hidden.grad == 0).all()
    assert (case.weight.grad == 0).all()


def test_kernels_compare_whole_rows_with_their_padding(gemms, monkeypatch):
    """A row of 509 columns starts at any address; 512 columns can be loaded 16 bytes at a time."""
    widths, find = set(), kernels.normalizers

    def normalizers(student, teacher, *rest):
        widths.update((student.shape[1], teacher.shape[1]))
        return find(student, teacher)

    monkeypatch.setattr(kernels, "normalizers", normalizers)
    case = sixteen_bit_case(num_tokens=3)
    sides = case.hidden, case.head, case.teacher_hidden, case.teacher_head
    fused_sd.divergence_loss(*sides, backend="triton", reduction="sum")
    assert widths == {512}


@pytest.mark.parametrize("freeze", ["hidden", "weight"])
def test_each_input_can_be_frozen(freeze, gemms):
    case = sixteen_bit_case()
    whole = torch.autograd.grad(run(case), (case.hidden, case.weight))
    getattr(case, freeze).requires_grad_(False)
    left = case.weight if freeze == "hidden" else case.hidden
    alone = torch.autograd.grad(run(case), left)[0]
    assert torch.equal(alone, whole[freeze == "hidden"])


@pytest.mark.parametrize("shared", [False, True])
def test_losses_by_token_recompute_their_chunks(shared, gemms):
    case = sixteen_bit_case()
    row_weights = torch.randn(24)
    by_token = run(case, shared, reduction="none")
    found = torch.autograd.grad((by_token * row_weights).sum(), (case.hidden, case.weight))
    case.token_weights = case.token_weights * row_weights
    expected = torch.autograd.grad(run(case, shared), (case.hidden, case.weight))
    for value, truth in zip(found, expected, strict=True):
        assert (value.float() - truth.float()).norm() <= 6e-3 * truth.float().norm()


def test_the_token_path_has_one_side(gemms):
    case = sixteen_bit_case()
    for settings in ({}, {"entropy": True}):
        gemms.clear()
        for value in torch.autograd.grad(
            sum(
                part.sum()
                for part in fused_sd.token_log_probs(
                    case.hidden, case.head, case.token_ids, chunk_size=CHUNK, **settings
                )
                if part is not None
            ),
            (case.hidden, case.weight),
        ):
            assert value.isfinite().all()
        assert gemms == {"logits": 16, "dH": 2, "dW": 2}  # once for the values, once more backward
