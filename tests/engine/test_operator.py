"""The operator under torch's own checks, and under torch.compile."""

import pytest
import torch
from cases import make_case
from closeness import assert_close

import fused_sd
from fused_sd.engine.operator import RunSettings
from fused_sd.head.lm_head import Shaping
from fused_sd.objectives.divergence import DivergenceObjective
from fused_sd.objectives.token import LogProbObjective
from fused_sd.settings import decode, encode
from fused_sd.terms.surrogate import Surrogate


def arguments(case, rows, inputs, *, reduced, wanted):
    shapings = Shaping(1.0, None), Shaping(0.5, 3.0)
    settings = RunSettings(*shapings, reduced, True, "torch", 3, None, None)
    row_weights = case.token_weights[:, None]
    return (
        case.hidden,
        case.weight,
        case.bias,
        case.teacher_hidden.detach(),
        case.teacher_weight.detach(),
        None,
        row_weights if reduced else (row_weights != 0).double(),
        inputs,
        *encode((rows, settings)),
        wanted,
    )


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("kind", ["full", "student", "log_probs"])
def test_opcheck(reduced, kind):
    case = make_case(bias=True)
    inputs = []
    if kind == "log_probs":
        rows, reduced = LogProbObjective(4, True, True, False), False
    else:
        support = fused_sd.StudentTopK(4) if kind == "student" else fused_sd.FULL_VOCABULARY
        comparison = fused_sd.Comparison(fused_sd.Jsd(0.5), support)
        rows = DivergenceObjective(comparison, metrics=("forward_kl", "student_entropy"))
    args = arguments(case, rows, inputs, reduced=reduced, wanted=[True, True, True])
    torch.library.opcheck(torch.ops.fused_sd.chunked_run, args)


def test_settings_travel_as_text():
    clips = {"entry_clip": 0.05, "token_clip": (None, 3.0)}
    comparison = fused_sd.Comparison(fused_sd.Jsd(0.1), **clips)
    rows = DivergenceObjective(comparison, 2.0, ("a",), ())
    assert decode(*encode(rows)) == rows
    settings = RunSettings(Shaping(1 / 3, None), None, True, False, "auto", None, 2**-8, None)
    assert decode(*encode(settings)) == settings
    given = fused_sd.Comparison(support=fused_sd.TokenIds(torch.zeros(2, 3, dtype=torch.int64)))
    plain = given.without_tensors()
    assert plain.support.num_entries == 3
    assert decode(*encode(plain)) == plain
    policy = Surrogate(ratio_clip=(0.2, 0.3), dual_clip=3.0, kl_coefficient=0.5)
    assert decode(*encode(policy)) == policy


def step(case, **settings):
    """What a trainer compiles: some of the model, the loss, a little arithmetic."""

    def forward(hidden, weight, bias, teacher_hidden, token_weights):
        loss = fused_sd.sdpo_loss(
            hidden * 2,
            fused_sd.LMHead(weight, bias, softcap=20.0),
            teacher_hidden,
            weight.detach(),
            token_weights=token_weights,
            **settings,
        ).loss
        return (loss * 3).sum()

    return forward, (*case.inputs, case.teacher_hidden, case.token_weights)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "settings",
    [{"top_k": 5}, {"top_k": None, "alpha": 1.0}, {"top_k": 5, "reduction": "none"}],
    ids=str,
)
def test_compiled_whole_graph_equals_eager(backend, settings):
    case = make_case(bias=True)
    forward, args = step(case, **settings)
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    one, other = compiled(*args), forward(*args)
    assert_close(one, other, torch.float64)
    pairs = (torch.autograd.grad(loss, case.inputs) for loss in (one, other))
    for value, truth in zip(*pairs, strict=True):
        assert_close(value, truth, torch.float64)


def test_token_path_compiles_whole():
    case = make_case()

    def forward(hidden, weight, ids, old, advantages):
        found = fused_sd.token_log_probs(hidden, weight, ids, entropy=True)
        loss = fused_sd.rlsd_loss(
            hidden, weight, ids, advantages, old_log_probs=old, teacher_log_probs=old
        ).loss
        top = fused_sd.entry_log_probs(hidden, weight, 3, tail=True)
        return loss + found.log_probs.sum() - found.entropy.mean() + top.log_probs.sum()

    args = case.hidden, case.weight, case.token_ids, case.old_log_probs, torch.randn(7).double()
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    one, other = compiled(*args), forward(*args)
    assert_close(one, other, torch.float64)
    inputs = case.hidden, case.weight
    pairs = (torch.autograd.grad(loss, inputs) for loss in (one, other))
    for value, truth in zip(*pairs, strict=True):
        assert_close(value, truth, torch.float64)


def test_inductor_compiles_around_the_loss():
    case = make_case(bias=True, dtype=torch.float32)
    forward, args = step(case, top_k=None)
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    assert_close(compiled(*args), forward(*args), torch.float32)


def test_a_setting_that_changes_from_step_to_step_compiles_twice_at_most():
    case = make_case()
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def forward(hidden, weight, mix):
        evidence = fused_sd.Evidence(mix=mix)
        old = case.old_log_probs
        return fused_sd.rlsd_loss(
            hidden,
            weight,
            case.token_ids,
            case.token_weights,
            teacher_log_probs=old,
            evidence=evidence,
        ).loss

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend=count)
    for mix in (0.1, 0.2, 0.3, 0.4):
        args = case.hidden, case.weight, mix
        assert_close(compiled(*args), forward(*args), torch.float64)
    assert len(compilations) <= 2


def test_activation_checkpointing_recomputes_the_same_gradient():
    case = make_case(bias=True)

    def forward(hidden):
        return fused_sd.sdpo_loss(
            hidden, case.head, case.teacher_hidden, case.teacher_head, top_k=5
        ).loss

    plain = torch.autograd.grad(forward(case.hidden), case.inputs)
    loss = torch.utils.checkpoint.checkpoint(forward, case.hidden, use_reentrant=False)
    for value, truth in zip(torch.autograd.grad(loss, case.inputs), plain, strict=True):
        assert torch.equal(value, truth)


def test_data_parallel_hooks_see_every_gradient():
    """Hooks on the leaves fire once each, as gradient reducers need."""
    case = make_case(bias=True)
    seen = []
    for tensor in case.inputs:
        tensor.register_post_accumulate_grad_hook(lambda t: seen.append(t.shape))
    fused_sd.gkd_loss(
        case.hidden, case.head, case.teacher_hidden, case.teacher_head
    ).loss.backward()
    assert len(seen) == 3
