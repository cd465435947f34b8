"""Every provider that runs here equals the formulas; every other says what it lacks."""

import importlib.metadata
import os
from dataclasses import replace

import pytest
import torch
from closeness import errors

from fused_sd import reference
from fused_sd.bench.problem import OBJECTIVES, Problem
from fused_sd.bench.providers import PROVIDERS, Provider, cce, eager, formulas, quack, verl
from fused_sd.bench.providers.provider import make_provider, why_absent, why_broken

pytestmark = [
    # Dynamo reads non-leaves' gradients
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
    # fla, when it is imported without a GPU
    pytest.mark.filterwarnings("ignore:Triton is not supported on current platform:UserWarning"),
    # fla looks for FlashAttention when it is imported
    pytest.mark.filterwarnings("ignore:Flash Attention is not installed:ImportWarning"),
]
NAMES = [provider.name for provider in PROVIDERS]
COMPILED = [name for name in NAMES if "compile" in name]
PAIRS = [(p, o) for p in PROVIDERS for o in OBJECTIVES if o in p.objectives]
FAST = [(p, o) for p, o in PAIRS if p.name not in COMPILED]
# what needs a GPU, but for Triton's interpreter
INTERPRETED = ("Liger fused_linear_jsd", "Liger fused_linear_cross_entropy", "fla fused_kl_div")
NUM_TOKENS, HIDDEN, VOCAB = 16, 16, 256
# fp32 operands; the formulas differ in their sums and in SDPO's clamp, not in their logits
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
DROPPED = 2.0**-5  # of a gradient that leaves out a share of at most 2^-6 of the row's sum


def make_problem(objective: str, *, frozen: bool, dtype: torch.dtype = torch.float32) -> Problem:
    """One head for both sides, or a frozen one beside the teacher's own.

    Flat enough for the clamp of SDPO's tail not to matter.
    """
    torch.manual_seed(1)
    hidden = torch.randn(NUM_TOKENS, HIDDEN)
    weight = 0.5 * torch.randn(VOCAB, HIDDEN)
    token_ids = torch.randint(VOCAB, (NUM_TOKENS,))
    log_probs = reference.token_log_prob(reference.logits(hidden, weight), token_ids).float()
    teacher_weight = weight + 0.1 * torch.randn_like(weight)
    own, other = weight.to(dtype).requires_grad_(not frozen), teacher_weight.to(dtype)
    return Problem(
        objective=objective,
        hidden=hidden.to(dtype, copy=True).requires_grad_(),
        weight=own,
        teacher_hidden=(hidden + 0.3 * torch.randn_like(hidden)).to(dtype),
        teacher_weight=other if frozen else own,
        mask=torch.arange(NUM_TOKENS) % 5 != 3,
        token_ids=token_ids,
        old_log_probs=log_probs + 0.3 * torch.randn(NUM_TOKENS),
        advantages=torch.randn(NUM_TOKENS),
        entropies=torch.zeros(NUM_TOKENS),
    )


def exact(problem: Problem) -> torch.Tensor:
    """The mean over the mask by the formulas, in the problem's own dtype: pass float64."""
    student = reference.logits(problem.hidden, problem.weight)
    teacher = reference.logits(problem.teacher_hidden, problem.teacher_weight.detach())
    a = reference.token_log_prob(student, problem.token_ids)
    b = reference.token_log_prob(teacher, problem.token_ids)
    policy = a, problem.advantages, problem.old_log_probs
    losses = {
        "forward_kl": lambda: reference.gkd(student, teacher, beta=0.0),
        "reverse_kl": lambda: reference.gkd(student, teacher, beta=1.0),
        "jsd": lambda: reference.gkd(student, teacher, beta=0.5),
        "opsd": lambda: reference.opsd(student, teacher),
        "topk_tail": lambda: reference.sdpo(student, teacher),
        "topk_renormalized": lambda: reference.sd_zero(student, teacher),
        "cross_entropy": lambda: -a,
        "token_log_probs": lambda: -a,
        "grpo": lambda: reference.grpo(*policy),
        "rlsd": lambda: reference.rlsd(a, b, *policy[1:]),
    }
    return reference.token_mean(losses[problem.objective](), problem.mask)


def in_float64(problem: Problem) -> Problem:
    """The same operands, exactly, as new leaves."""
    return replace(
        problem,
        hidden=problem.hidden.detach().double().requires_grad_(),
        weight=problem.weight.detach().double().requires_grad_(problem.weight.requires_grad),
        teacher_hidden=problem.teacher_hidden.double(),
        teacher_weight=problem.teacher_weight.detach().double(),
    )


def assert_equals_reference(provider: Provider, problem: Problem) -> None:
    reason = provider.why_not(problem)
    if provider.name in INTERPRETED and os.environ.get("TRITON_INTERPRET") == "1":
        reason = why_absent(provider.package)
    if reason is not None:
        pytest.skip(f"{provider.name}: {reason}")
    double = in_float64(problem)
    expected, loss = exact(double), provider.build(problem)
    for _ in range(2):  # a loss that is called again is the same
        value = loss()
        assert value.shape == ()
        assert value.item() == pytest.approx(expected.item(), rel=LOSS_TOLERANCE)
    value.backward()
    expected.backward()
    for name in ("hidden", "weight"):
        leaf, exact_leaf = getattr(problem, name), getattr(double, name)
        if not leaf.requires_grad:
            assert leaf.grad is None
            continue
        tolerance = GRADIENT_TOLERANCE if provider.certify is None else DROPPED
        assert errors(leaf.grad, exact_leaf.grad)[0] <= tolerance, name
    assert not problem.hidden.grad[~problem.mask].any()


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "own"])
@pytest.mark.parametrize("provider, objective", FAST, ids=[f"{p.name}-{o}" for p, o in FAST])
def test_equals_the_reference(provider, objective, frozen):
    assert_equals_reference(provider, make_problem(objective, frozen=frozen))


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_equals_the_reference(name):
    """One objective for all: compiling takes seconds, and the function is the eager one."""
    provider = PROVIDERS[NAMES.index(name)]
    assert_equals_reference(provider, make_problem("jsd", frozen=False))


@pytest.mark.parametrize("provider", PROVIDERS, ids=NAMES)
def test_says_what_is_missing(provider):
    """Nothing is imported for a package that is absent; a GPU's provider refuses the CPU."""
    objective = next(o for o in OBJECTIVES if o in provider.objectives)
    reason = provider.why_not(make_problem(objective, frozen=True))
    if provider.package is not None and not is_installed(provider.package):
        assert reason == f"{provider.package} is not installed"
    elif provider.needs_gpu:
        assert reason == "needs CUDA, and the problem is on cpu"
    else:
        assert reason is None
    assert provider.note
    assert set(provider.objectives) <= set(OBJECTIVES)


def is_installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize("provider", PROVIDERS, ids=NAMES)
def test_refuses_an_unknown_objective(provider):
    problem = make_problem("hellinger", frozen=True)
    assert provider.why_not(problem) == "has no hellinger"
    with pytest.raises(ValueError, match=r"objective must be one of .*got 'hellinger'"):
        provider.build(problem)


def test_first_is_this_library_and_it_has_every_objective():
    assert NAMES[0] == "fused_sd"
    assert len(set(NAMES)) == len(NAMES)
    eager_ = PROVIDERS[NAMES.index("eager")]
    assert PROVIDERS[0].objectives == eager_.objectives == set(OBJECTIVES)
    assert set(OBJECTIVES) == {*formulas.DIVERGENCES, *formulas.POLICIES}


def test_a_broken_installation_is_the_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_peer.py").write_text("raise OSError('libcuda.so is missing')\n")
    monkeypatch.syspath_prepend(tmp_path)
    reason = "broken_peer cannot be imported: OSError: libcuda.so is missing"
    assert why_broken("broken_peer") == reason
    provider = make_provider("peer", {"jsd": lambda problem: None}, module="broken_peer", note="")
    assert provider.why_not(make_problem("jsd", frozen=True)) == reason


def sized(num_tokens: int, hidden_size: int, vocab: int, dtype: torch.dtype) -> Problem:
    """A problem of which only sizes are read."""
    hidden, weight = torch.empty(num_tokens, hidden_size), torch.empty(vocab, hidden_size)
    return replace(
        make_problem("cross_entropy", frozen=True), hidden=hidden.to(dtype), weight=weight.to(dtype)
    )


QUACK_REFUSALS = [
    ((16, 16, 256), torch.float32, (9, 0), "needs 16-bit operands, got torch.float32"),
    ((16, 16, 256), torch.bfloat16, (8, 9), "needs a GPU of sm_90 or later, this is sm_89"),
    ((16, 16, 254), torch.bfloat16, (9, 0), "needs D and V divisible by 8, got 16 and 254"),
    ((15, 16, 248), torch.bfloat16, (9, 0), "needs a number of tokens divisible by 8, got 15"),
    ((15, 16, 256), torch.bfloat16, (10, 0), "needs a number of tokens divisible by 8, got 15"),
    ((15, 16, 256), torch.bfloat16, (9, 0), None),
    ((16, 16, 248), torch.float16, (9, 0), None),
]


@pytest.mark.parametrize("sizes, dtype, capability, reason", QUACK_REFUSALS)
def test_quack_says_which_sizes_it_needs(sizes, dtype, capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert quack.refusal(sized(*sizes, dtype)) == reason


def test_others_say_what_their_kernels_need(monkeypatch):
    wanted = "needs a hidden size divisible by 128, got 96"
    assert verl.triton_refusal(sized(4, 96, 8, torch.float32)) == wanted
    assert verl.triton_refusal(sized(4, 256, 8, torch.float32)) is None
    wanted = "needs 16-bit hidden states for its backward, got torch.float32"
    assert cce.refusal(sized(4, 8, 8, torch.float32)) == wanted
    assert cce.refusal(sized(4, 8, 8, torch.bfloat16)) is None
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert eager.no_compiler(sized(4, 8, 8, torch.float32)).startswith("torch.compile needs a C++")
