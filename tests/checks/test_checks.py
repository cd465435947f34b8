"""Every error a caller can meet, by its text: the rule, the value, the remedy."""

import pytest
import torch
from cases import make_case

import fused_sd
from fused_sd import Evidence, EvidenceSchedule, ImportanceCap, Jsd, LMHead, MixedKl

N, D, V = 7, 12, 67


def distill(case, **changes):
    arguments = {
        "student_hidden": case.hidden,
        "student_head": case.weight,
        "teacher_hidden": case.teacher_hidden,
        "teacher_head": case.teacher_weight.detach(),
        "reduction": "sum",
        **changes,
    }
    return fused_sd.divergence_loss(**arguments)


def sides(case, rows=V):
    teacher_head = torch.randn(rows, D, dtype=torch.float64)
    return case.hidden, case.weight, case.teacher_hidden, teacher_head


def served(case, ids=None, log_probs=None, **changes):
    ids = torch.randint(V, (N, 3)) if ids is None else ids
    log_probs = torch.full((N, 3), -2.0) if log_probs is None else log_probs
    return fused_sd.topk_divergence_loss(
        case.hidden, case.weight, ids, log_probs, **{"reduction": "sum", **changes}
    )


def policy(case, **changes):
    advantages = changes.pop("advantages", torch.ones(N))
    ids = changes.pop("token_ids", case.token_ids)
    return fused_sd.policy_loss(
        case.hidden, case.weight, ids, advantages, **{"reduction": "sum", **changes}
    )


def grad(*shape):
    return torch.zeros(*shape, dtype=torch.float64, requires_grad=True)


class DTensor(torch.Tensor):
    """Stands for torch.distributed's: only the name is looked at."""


BAD = {
    "beta 0": (lambda c: Jsd(0.0), r'beta must lie in the open interval.*0.0.*"forward_kl"'),
    "beta 1": (lambda c: Jsd(1), r'beta must lie in the open interval.*"reverse_kl"'),
    "beta 2": (lambda c: Jsd(2.0), "beta must lie in the open interval.*got 2.0"),
    "forward weight": (lambda c: MixedKl(1.5), r"forward_weight must lie in \[0, 1\], got 1.5"),
    "k 0": (
        lambda c: fused_sd.StudentTopK(0),
        "top_k, the k of StudentTopK, must be an integer of at least 1, got 0",
    ),
    "k float": (
        lambda c: fused_sd.UnionTopK(2.5),
        "k of UnionTopK, must be an integer of at least 1, got 2.5",
    ),
    "k True": (lambda c: fused_sd.TeacherTopK(True), "k of TeacherTopK, must be an integer"),
    "k > V": (
        lambda c: distill(c, support=fused_sd.StudentTopK(68)),
        "top_k, the k of StudentTopK, must be at most .* 67, got 68; .*FULL_VOCABULARY",
    ),
    "divergence name": (
        lambda c: distill(c, divergence="kl"),
        "divergence must be .*got 'kl'; forward is",
    ),
    "divergence jsd": (lambda c: distill(c, divergence="jsd"), r"pass Jsd\(beta\)"),
    "divergence mixed": (lambda c: distill(c, divergence="mixed_kl"), r"pass MixedKl"),
    "support": (lambda c: distill(c, support="full"), "support must be FULL_VOCABULARY.*'full'"),
    "remainder": (
        lambda c: distill(c, support=fused_sd.StudentTopK(3), remainder="renorm"),
        "remainder must be one of 'tail', 'renormalize'.*got 'renorm'",
    ),
    "remainder of the full vocabulary": (
        lambda c: distill(c, remainder="drop"),
        "leaves no remainder.*FullVocabulary.*remainder='drop'.*truncated support",
    ),
    "teacher_renormalize": (
        lambda c: distill(c, support=fused_sd.TeacherTopK(3), remainder="teacher_renormalize"),
        "only a KL from the teacher.*divergence='reverse_kl'",
    ),
    "tail_floor": (
        lambda c: distill(c, support=fused_sd.StudentTopK(3), tail_floor=-1.0),
        "tail_floor must be a finite number above 0, got -1.0",
    ),
    "entry_clip": (lambda c: distill(c, entry_clip=0.0), "entry_clip must be .*above 0, got 0.0"),
    "token_clip": (
        lambda c: distill(c, token_clip=(2.0, 1.0)),
        "token_clip must be .*lower < upper",
    ),
    "token_clip nan": (
        lambda c: distill(c, token_clip=float("nan")),
        "token_clip must be a finite number, got nan",
    ),
    "temperature": (
        lambda c: distill(c, temperature=0.0),
        "temperature must be .*above 0, got 0.0",
    ),
    "temperature inf": (lambda c: distill(c, temperature=float("inf")), "temperature must be"),
    "teacher_temperature": (
        lambda c: distill(c, teacher_temperature=-1),
        "teacher_temperature must be .*above 0, got -1",
    ),
    "reduction": (lambda c: distill(c, reduction="batchmean"), "reduction must be one of 'sum'"),
    "backend": (lambda c: distill(c, backend="cuda"), "backend must be one of 'auto', 'triton'"),
    "backend float64": (
        lambda c: distill(c, backend="triton"),
        "backend must be 'torch' for float64",
    ),
    "chunk_size": (
        lambda c: distill(c, chunk_size=0),
        "chunk_size must be an integer of at least 1",
    ),
    "metric": (
        lambda c: distill(c, metrics=("kl",)),
        "metrics must be one of 'forward_kl'.*got 'kl'",
    ),
    "metrics string": (
        lambda c: distill(c, metrics="jsd"),
        r"metrics must be a sequence of names, got 'jsd'; pass \('jsd',\)",
    ),
    "metric needs": (
        lambda c: distill(c, metrics=("topk_overlap",)),
        "metrics must have top-k support for 'topk_overlap'",
    ),
    "metric needs ids": (
        lambda c: distill(c, metrics=("student_log_prob",)),
        "metrics must have token_ids for 'student_log_prob', got none; pass token_ids",
    ),
    "metric needs states": (
        lambda c: served(c, metrics=("teacher_entropy",)),
        "metrics must have teacher states for 'teacher_entropy'",
    ),
    "hidden size": (
        lambda c: distill(c, student_hidden=torch.zeros(N, 5).double()),
        r"student_hidden must be \(..., D\) with D = 12 as student_head \(67, 12\), got \(7, 5\)",
    ),
    "teacher hidden size": (
        lambda c: distill(c, teacher_hidden=torch.zeros(N, 5).double()),
        "teacher_hidden must be .* as teacher_head",
    ),
    "tokens differ": (
        lambda c: distill(c, teacher_hidden=c.teacher_hidden[:3]),
        r"teacher_hidden must have the tokens \(7,\) of student_hidden, got \(3,\); select",
    ),
    "list": (
        lambda c: distill(c, student_hidden=[1.0]),
        "student_hidden must be a tensor, got list; convert",
    ),
    "integer hidden": (
        lambda c: distill(c, student_hidden=torch.zeros(N, D, dtype=torch.int64)),
        "student_hidden must be float64, float32, bfloat16 or float16",
    ),
    "dtypes": (
        lambda c: distill(c, student_hidden=c.hidden.detach().float()),
        "student_hidden must be torch.float64 as student_head, got torch.float32; cast",
    ),
    "devices": (
        lambda c: distill(c, student_hidden=torch.empty(N, D, device="meta").double()),
        "student_hidden must be on cpu as student_head, got meta",
    ),
    "weight dims": (
        lambda c: LMHead(torch.zeros(3)),
        r"weight must be \(V, D\), got \(3,\); pass lm_head.weight",
    ),
    "sharded weight": (lambda c: LMHead(torch.zeros(0)[:, None]), "ZeRO-3 or FSDP"),
    "quantised weight": (
        lambda c: LMHead(torch.zeros(4, 4, dtype=torch.int8)),
        "weight must be floating point, got torch.int8; a quantised head",
    ),
    "fp8 weight": (
        lambda c: LMHead(torch.zeros(4, 4).to(torch.float8_e4m3fn)),
        "weight must be float64, float32",
    ),
    "dtensor": (
        lambda c: LMHead(torch.zeros(4, 4).as_subclass(DTensor)),
        "weight must be a plain tensor, got a DTensor; call the loss inside the forward",
    ),
    "bias": (
        lambda c: LMHead(torch.zeros(4, 3), torch.zeros(3)),
        r"bias must be \(V,\) with V = 4 as weight, got \(3,\)",
    ),
    "softcap": (lambda c: LMHead(torch.zeros(4, 3), softcap=0.0), "softcap must be .*above 0"),
    "logit_scale": (lambda c: LMHead(torch.zeros(4, 3), logit_scale=0.0), "logit_scale must be"),
    "valid_vocab": (
        lambda c: LMHead(torch.zeros(4, 3), valid_vocab=5),
        "valid_vocab must be an integer from 1 to V = 4, got 5",
    ),
    "teacher hidden gradient": (
        lambda c: distill(c, teacher_hidden=grad(N, D)),
        r"teacher_hidden must not require a gradient.*torch.no_grad\(\).*detach",
    ),
    "teacher head gradient": (
        lambda c: distill(c, teacher_head=grad(V, D)),
        "teacher_head must not require a gradient",
    ),
    "weights shape": (
        lambda c: distill(c, token_weights=torch.ones(N, 1)),
        r"token_weights must be \(7,\), one value for each token.*got \(7, 1\)",
    ),
    "weights gradient": (
        lambda c: distill(c, token_weights=grad(N)),
        "token_weights must not require a gradient",
    ),
    "weights complex": (
        lambda c: distill(c, token_weights=torch.ones(N, dtype=torch.complex64)),
        "token_weights must be real",
    ),
    "importance without ids": (
        lambda c: distill(c, importance=ImportanceCap(c.old_log_probs)),
        "importance must come with token_ids",
    ),
    "importance cap": (lambda c: ImportanceCap(torch.zeros(N), 0.0), "cap must be .*above 0"),
    "old shape": (
        lambda c: distill(c, token_ids=c.token_ids, importance=ImportanceCap(torch.zeros(3))),
        r"old_log_probs must be \(7,\)",
    ),
    "ids range": (
        lambda c: distill(c, token_ids=torch.full((N,), V)),
        r"token_ids must lie in \[0, 67\) wherever the token has a weight, got 67",
    ),
    "ids float": (
        lambda c: distill(c, token_ids=torch.zeros(N)),
        "token_ids must be integer token ids, got torch.float32",
    ),
    "entry ids shape": (
        lambda c: distill(c, support=fused_sd.TokenIds(torch.zeros(N, dtype=torch.int64))),
        r"ids must be \(..., K\) with leading shape \(7,\) as student_hidden",
    ),
    "entry ids range": (
        lambda c: distill(c, support=fused_sd.TokenIds(torch.full((N, 2), 70))),
        "ids must lie below V = 67, got 70; mark padding with a negative id",
    ),
    "vocabularies": (
        lambda c: distill(c, divergence="forward_kl", teacher_head=torch.zeros(70, D).double()),
        r"teacher_head must have no tokens beyond the 67 of student_head.*got 70.*valid_vocab=67",
    ),
    "student vocabulary": (
        lambda c: distill(c, teacher_head=torch.zeros(60, D).double()),
        r"student_head must have no tokens beyond the 60 of teacher_head.*valid_vocab=60",
    ),
    "server shape": (
        lambda c: served(c, log_probs=torch.zeros(N, 2)),
        r"teacher_log_probs must be \(7, 3\) as teacher_token_ids, got \(7, 2\)",
    ),
    "server probabilities": (
        lambda c: served(c, log_probs=torch.full((N, 3), 0.3)),
        "teacher_log_probs must be natural logarithms.*at most 0",
    ),
    "server gradient": (
        lambda c: served(c, log_probs=grad(N, 3)),
        "teacher_log_probs must not require a gradient",
    ),
    "server integers": (
        lambda c: served(c, log_probs=torch.zeros(N, 3, dtype=torch.int64)),
        "teacher_log_probs must be float64, float32",
    ),
    "entries repeat": (
        lambda c: fused_sd.entry_log_probs(
            c.hidden, c.weight, torch.zeros(N, 2, dtype=torch.int64)
        ),
        r"entries must be distinct ids.*got \[0, 0\]",
    ),
    "advantages divergence": (
        lambda c: policy(c, advantages=distill(c)),
        "advantages must not be a divergence.*expected policy gradient is 0",
    ),
    "advantages gradient": (
        lambda c: policy(c, advantages=grad(N)),
        "advantages must not require a gradient",
    ),
    "ratio clip": (
        lambda c: policy(c, ratio_clip=(1.5, 0.2)),
        r"ratio_clip must be \(low, high\).*got \(1.5, 0.2\)",
    ),
    "ratio clip number": (lambda c: policy(c, ratio_clip=0.2), r"ratio_clip must be \(low, high\)"),
    "dual clip": (lambda c: policy(c, dual_clip=0.5), "dual_clip must be above 1, got 0.5"),
    "evidence alone": (
        lambda c: policy(c, evidence=Evidence()),
        "evidence must come with a teacher, got none",
    ),
    "teacher alone": (
        lambda c: policy(c, teacher_log_probs=torch.zeros(N)),
        "teacher must come with evidence",
    ),
    "teacher twice": (
        lambda c: policy(
            c,
            evidence=Evidence(),
            teacher_hidden=c.teacher_hidden,
            teacher_head=c.weight,
            teacher_log_probs=torch.zeros(N),
        ),
        "teacher must be given once",
    ),
    "evidence old": (
        lambda c: policy(c, evidence=Evidence(log_prob="old"), teacher_log_probs=torch.zeros(N)),
        'evidence.log_prob must be "current" without old_log_probs',
    ),
    "evidence mix": (lambda c: Evidence(mix=1.2), r"mix must lie in \[0, 1\], got 1.2"),
    "evidence log_prob": (lambda c: Evidence(log_prob="new"), "log_prob must be one of 'current'"),
    "schedule": (lambda c: EvidenceSchedule(0.5, -1), "warmup_steps must be .*at least 0, got -1"),
    "kl without reference": (
        lambda c: policy(c, kl_coefficient=0.1),
        "reference_log_probs must come together with kl_coefficient > 0.*missing",
    ),
    "kl estimator": (
        lambda c: policy(c, kl_estimator="kl"),
        "kl_estimator must not differentiate log_prob - reference directly.*'kl'; pass 'k1'",
    ),
    "kl coefficient": (
        lambda c: policy(c, kl_coefficient=-1.0),
        "kl_coefficient must be .*least 0",
    ),
    "sampled without teacher": (
        lambda c: fused_sd.sampled_kl_loss(c.hidden, c.weight, c.token_ids, reduction="sum"),
        "teacher_hidden must be given, or teacher_log_probs",
    ),
    "sampled with an estimator that sees no teacher": (
        lambda c: fused_sd.sampled_kl_loss(
            c.hidden,
            c.weight,
            c.token_ids,
            teacher_log_probs=c.old_log_probs,
            estimator="direct",
            reduction="sum",
        ),
        "estimator must not differentiate log_prob - reference directly",
    ),
    "advantages left out": (lambda c: policy(c, advantages=None), "advantages must be a tensor"),
    "a live bias of a policy's teacher": (
        lambda c: policy(
            c,
            evidence=fused_sd.Evidence(),
            teacher_hidden=c.teacher_hidden,
            teacher_head=fused_sd.LMHead(
                c.weight, torch.zeros(67, dtype=torch.float64, requires_grad=True)
            ),
        ),
        "teacher_head.bias must not require a gradient",
    ),
    "hints of other tokens": (
        lambda c: fused_sd.rlcsd_loss(
            *(c.hidden, c.weight, c.token_ids, c.old_log_probs),
            c.old_log_probs[:1],
            c.old_log_probs[:, None],
        ),
        "correct_log_probs must be",
    ),
    "wrong hints without an axis": (
        lambda c: fused_sd.rlcsd_loss(
            *(c.hidden, c.weight, c.token_ids, c.old_log_probs),
            c.old_log_probs,
            c.old_log_probs,
        ),
        "wrong_log_probs must be .*K",
    ),
    "clip of the evidence": (
        lambda c: fused_sd.Evidence(clip=(2.0, 0.1)),
        "^clip must be .*low, high",
    ),
    "variant": (
        lambda c: fused_sd.sd_zero_loss(
            c.hidden, c.weight, c.teacher_hidden, c.weight, variant="official"
        ),
        "variant must be one of 'code', 'paper', got 'official'",
    ),
    "mode": (
        lambda c: fused_sd.aggregation_weights(torch.ones(2, 3), "mean"),
        "mode must be one of 'token_sum'.*got 'mean'",
    ),
    "mask": (
        lambda c: fused_sd.aggregation_weights(torch.ones(3), "token_sum"),
        r"mask must be \(B, T\), got \(3,\)",
    ),
    "length": (
        lambda c: fused_sd.aggregation_weights(torch.ones(2, 3), "constant_length"),
        'length must come with "constant_length", got None',
    ),
    "alpha above 1": (
        lambda c: fused_sd.sdpo_loss(*sides(c), alpha=2.0, top_k=5),
        r"alpha must lie in \[0, 1\], got 2.0",
    ),
    "beta below 0": (
        lambda c: fused_sd.gkd_loss(*sides(c), beta=-1),
        r"beta must lie in \[0, 1\], got -1",
    ),
    "alpha None": (
        lambda c: fused_sd.sdft_loss(*sides(c), alpha=None),
        "alpha must be 'forward_kl', .*got None",
    ),
    "a layer as head": (
        lambda c: distill(c, student_head=torch.nn.Linear(D, V)),
        r"student_head must be a tensor, got the module Linear; pass LMHead.of\(model\)",
    ),
    "a layer in a head": (
        lambda c: LMHead(torch.nn.Linear(D, V)),
        r"weight must be a tensor, got the module Linear; pass LMHead.of\(model\), or its weight",
    ),
    "a head's transpose": (
        lambda c: distill(c, student_head=c.weight.t()),
        r"student_hidden must be \(..., D\) .*student_head as \(V, D\), not its transpose",
    ),
    "logits as states": (
        lambda c: distill(c, student_hidden=grad(N, V)),
        "pass the states that enter lm_head, not logits",
    ),
    "a list of ids": (
        lambda c: fused_sd.cross_entropy_loss(c.hidden, c.weight, [1] * N, reduction="sum"),
        "token_ids must be a tensor, got list; convert it with torch.as_tensor",
    ),
    "lists to align": (
        lambda c: fused_sd.align_responses([[1]], [[1]], [[1]], [[1]], student_response_mask=[[1]]),
        "student_ids must be a tensor, got list; convert it",
    ),
    "a float for evidence": (
        lambda c: policy(c, evidence=0.5),
        r"evidence must be a fused_sd.Evidence, got 0.5; pass fused_sd.Evidence\(...\)",
    ),
    "a float for importance": (
        lambda c: distill(c, token_ids=c.token_ids, importance=2.0),
        "importance must be a fused_sd.ImportanceCap, got 2.0",
    ),
    "a text for dual_clip": (lambda c: policy(c, dual_clip="3"), "dual_clip must be .*got '3'"),
    "a text for kl_coefficient": (
        lambda c: policy(c, kl_coefficient="a"),
        "kl_coefficient must be .* got 'a'",
    ),
    "a text for compact": (lambda c: distill(c, compact="no"), "compact must be True or False"),
    "ignore_index None": (
        lambda c: fused_sd.cross_entropy_loss(
            c.hidden, c.weight, c.token_ids, ignore_index=None, reduction="sum"
        ),
        "ignore_index must be an integer, got None",
    ),
    "half a token to skip": (
        lambda c: fused_sd.skip_first_tokens(torch.ones(2, 3), 1.5),
        "num_tokens must be an integer of at least 0, got 1.5",
    ),
    "a mean over no tokens": (
        lambda c: fused_sd.aggregation_weights(torch.ones(2, 3), "token_mean", num_tokens=0),
        "num_tokens must be a finite number above 0, got 0",
    ),
    "a shift of no alignment": (
        lambda c: fused_sd.detect_shift(c.hidden, c.weight, c.teacher_hidden, c.weight, [1]),
        r"alignment must be a fused_sd.Alignment, got \[1\]",
    ),
    "ids of floats to align": (
        lambda c: fused_sd.align_responses(
            torch.ones(1, 3), *[torch.ones(1, 3).long()] * 3, student_response_mask=torch.ones(1, 3)
        ),
        "student_ids must be integer token ids, got torch.float32",
    ),
    "one clip of a contrast": (
        lambda c: fused_sd.rlcsd_advantages(
            c.old_log_probs, c.old_log_probs, c.old_log_probs[:, None], clip=2.0
        ),
        r"clip must be \(lowest, highest\), two finite numbers, got 2.0",
    ),
    "a mask of other tokens": (
        lambda c: fused_sd.iw_opd_advantages(-torch.ones(2, 3), -torch.ones(2, 3), torch.ones(3)),
        r"teacher_log_probs must be \(3,\), one value for each token of mask",
    ),
    "NaN as weight": (
        lambda c: distill(c, token_weights=torch.full((N,), torch.nan)),
        "token_weights must be finite, got nan; give a token that does not count the value 0",
    ),
    "an infinite weight": (
        lambda c: policy(c, token_weights=torch.full((N,), torch.inf)),
        "token_weights must be finite, got inf",
    ),
    "a negative weight of a mean": (
        lambda c: distill(c, token_weights=-torch.ones(N), reduction="mean"),
        'token_weights must be at least 0 with reduction="mean".*got -1.0; pass reduction="sum"',
    ),
    "a negative mask": (
        lambda c: fused_sd.aggregation_weights(-torch.ones(2, 3), "token_mean"),
        "mask must be finite and at least 0, got -1.0",
    ),
    "NaN in a mask": (
        lambda c: fused_sd.skip_first_tokens(torch.full((2, 3), torch.nan), 1),
        "mask must be finite and at least 0, got nan",
    ),
    "NaN as advantage": (
        lambda c: policy(c, advantages=torch.full((N,), torch.nan)),
        "advantages must be finite wherever the token has a weight, got nan",
    ),
    "old probabilities": (
        lambda c: policy(c, old_log_probs=torch.full((N,), 0.5)),
        "old_log_probs must be natural logarithms of probabilities, at most 0, got 0.5; take",
    ),
    "old probabilities of a divergence": (
        lambda c: distill(
            c, token_ids=c.token_ids, importance=ImportanceCap(torch.full((N,), 0.5))
        ),
        "old_log_probs must be natural logarithms of probabilities",
    ),
    "a teacher's top-k beyond the student's vocabulary": (
        lambda c: fused_sd.sd_zero_loss(*sides(c, rows=70), top_k=4),
        r"teacher_head must have no tokens beyond the 67 of student_head.*got 70.*valid_vocab=67",
    ),
    "a student's top-k beyond the teacher's vocabulary": (
        lambda c: fused_sd.sdpo_loss(*sides(c, rows=60), top_k=4, alpha=1.0),
        r"student_head must have no tokens beyond the 60 of teacher_head.*valid_vocab=60",
    ),
    "an entry that the student lacks": (
        lambda c: distill(
            c,
            teacher_head=sides(c, rows=70)[3],
            divergence="forward_kl",
            support=fused_sd.TokenIds(torch.full((N, 1), 68)),
        ),
        "ids must lie below V = 67, got 68",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_rule_value_and_remedy(name):
    call, message = BAD[name]
    case = make_case(N, D, V)
    with pytest.raises(ValueError, match=message) as error:
        call(case)
    text = str(error.value)
    assert " must " in text
    assert ", got " in text
    assert "; " in text
    assert case.hidden.grad is None


def test_a_live_head_may_be_the_teachers_too():
    case = make_case()
    distill(case, teacher_head=case.weight).loss.backward()
    assert case.weight.grad is not None


def test_ids_are_not_looked_at_where_there_is_no_weight():
    case = make_case()
    ids = torch.where(case.token_weights == 0, -100, case.token_ids)
    distill(case, token_ids=ids, token_weights=case.token_weights, metrics=("student_log_prob",))


def test_a_teacher_under_no_grad_is_not_asked_to_detach():
    case = make_case()
    with torch.no_grad():
        distill(case, teacher_hidden=grad(7, 12))
