"""Test the teacher's averages, copies and saved states, and the trust region."""

import copy
import functools
import os
import threading
from types import MethodType

import pytest
import ranks
import torch
from closeness import assert_close, assert_same_up_to_rounding
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from fused_sd import LMHead, Teacher, divergence_loss, trust_region_states

KINDS = ("live", "frozen", "ema", "synced")


class Model(nn.Module):
    """A model with tied weights, dropout, buffers and a part that is not trained."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.to(dtype)
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        return self.head(self.frozen(self.norm(self.dropout(self.embedding(ids)))))


def step(model, size=0.1):
    """Change the trained parameters and the buffers, as an optimiser step does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer += 1


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(model, weights, name=""):
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[key]), (name, key)


def test_live_is_the_student_and_frozen_never_moves():
    model = Model()
    live, frozen = Teacher(model, kind="live"), Teacher(model, kind="frozen")
    before = snapshot(model)
    for _ in range(3):
        step(model)
        assert live.update()
        assert not frozen.update()
    assert live.module is model
    assert live.age == 0
    assert frozen.age == 3
    assert_same(frozen.module, before)
    frozen.sync()
    assert_same(frozen.module, snapshot(model))
    assert frozen.age == 0


@pytest.mark.parametrize("every", [1, 3])
def test_an_average_is_taken_after_every_few_steps(every):
    model = Model()
    teacher = Teacher(model, kind="ema", rate=0.25, every=every)
    expected, frozen = snapshot(model), model.frozen.weight.clone()
    for number in range(1, 8):
        step(model)
        moved = teacher.update()
        assert moved == (number % every == 0)
        assert teacher.age == number % every
        if moved:
            for name, value in snapshot(model).items():
                is_buffer = "running" in name or "num_batches" in name
                expected[name] = value if is_buffer else 0.75 * expected[name] + 0.25 * value
        for name, value in teacher.module.state_dict().items():
            assert_close(value, expected[name], torch.float64, name)
    assert torch.equal(teacher.module.frozen.weight, frozen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("late", [False, True], ids=["trained from the start", "trained later"])
def test_what_was_trained_stays_in_the_average(late, dtype):
    """Frozen parameters keep their distance to the teacher otherwise, and update says it moved."""
    model = Model(dtype)
    model.requires_grad_(not late)
    teacher = Teacher(model, rate=0.25)
    model.requires_grad_(True)
    expected = snapshot(model)["embedding.weight"].double()
    for number in range(6):
        if number < 3:
            step(model)
        model.requires_grad_(number < 2)
        assert teacher.update()
        expected = expected.lerp(model.embedding.weight.detach().double(), 0.25)
    held = teacher.state_dict()["weights"]["embedding.weight"]
    assert_close(held.double(), expected, held.dtype)


def test_a_synced_teacher_is_a_copy_every_few_steps():
    model = Model()
    teacher, held = Teacher(model, kind="synced", every=2), snapshot(model)
    for number in range(1, 6):
        step(model)
        assert teacher.update() == (number % 2 == 0)
        if number % 2 == 0:
            held = snapshot(model)
        assert_same(teacher.module, held)


@pytest.mark.parametrize("kind", ["frozen", "ema", "synced"])
def test_a_step_with_infinite_gradients_does_not_count(kind):
    model = Model()
    teacher = Teacher(model, kind=kind, every=2)
    before = snapshot(model)
    step(model)
    for _ in range(5):
        assert not teacher.update(finite=False)
    assert teacher.age == 0
    assert_same(teacher.module, before)
    teacher.update()
    assert teacher.age == 1


@pytest.mark.parametrize("dtype, rate", [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
def test_16_bit_averages_follow_the_float64_average(dtype, rate):
    """An average in the parameters' own dtype would not move at these rates."""
    model = Model(dtype)
    with torch.no_grad():
        model.head.weight.fill_(1.0)
    teacher = Teacher(model, kind="ema", rate=rate)
    exact, naive = model.head.weight.double(), model.head.weight.clone()
    with torch.no_grad():
        model.head.weight.fill_(1.5)
        for _ in range(400):
            teacher.update()
            exact = exact.lerp(model.head.weight.double(), rate)
            naive = naive.lerp(model.head.weight, rate)
    assert torch.equal(naive, torch.ones_like(naive))
    assert torch.equal(teacher.module.head.weight, exact.to(dtype))
    assert exact[0, 0] > 1.015


def test_a_rate_of_1_copies_and_a_rate_of_0_does_nothing():
    model = Model(torch.bfloat16)
    all_of_it, nothing = Teacher(model, rate=1), Teacher(model, rate=0)
    before = snapshot(model)
    step(model)
    assert all_of_it.update()
    assert not nothing.update()
    assert_same(all_of_it.module, snapshot(model))
    assert_same(nothing.module, before)


def test_syncing_an_average_takes_the_new_weights_as_its_start():
    model = Model(torch.bfloat16)
    teacher = Teacher(model, rate=0.01)
    step(model)
    teacher.update()
    step(model, 10.0)
    teacher.sync()
    assert teacher.age == 0
    assert_same(teacher.module, snapshot(model))
    # the average continues from there, not from its fp32 value before the sync
    teacher.update()
    assert_same(teacher.module, snapshot(model))


def test_acting_has_no_gradient_and_no_dropout_and_leaves_the_modes_as_they_were():
    model, ids = Model(), torch.arange(7)
    model.train()
    model.norm.eval()
    for kind in KINDS:
        teacher = Teacher(model, kind=kind)
        modes = [part.training for part in teacher.module.modules()]
        with teacher.acting() as module:
            assert module is teacher.module
            assert not module.training
            assert not module(ids).requires_grad
            assert torch.equal(module(ids), module(ids))
        with pytest.raises(RuntimeError, match="inside"), teacher.acting():
            raise RuntimeError("inside")
        assert [part.training for part in teacher.module.modules()] == modes
        assert torch.is_grad_enabled()
    assert model.dropout.training
    assert not model.norm.training


def test_the_copy_is_apart_and_never_trained():
    model = Model()
    teacher = Teacher(model)
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    assert not teacher.module.training
    assert teacher.module.head.weight is teacher.module.embedding.weight
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in teacher.module.parameters()}
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False, False]


def test_results_that_a_module_has_kept_do_not_prevent_a_copy():
    """``deepcopy`` refuses them: the last forward's states, or the product of a weight norm."""
    model = Model()
    model.head = nn.Linear(4, 7, bias=False, dtype=torch.float64)
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.head)
    ids = torch.arange(7)
    model.kept = [model(ids)]
    teacher = Teacher(model, kind="synced")
    assert not teacher.module.kept[0].requires_grad
    step(model)
    teacher.update()
    with teacher.acting() as module:
        assert torch.equal(module(ids), model.eval()(ids))


def test_a_given_module_teaches():
    model, other = Model(), Model(torch.bfloat16)
    other.frozen.weight.requires_grad_(True)
    teacher = Teacher(model, kind="ema", rate=0.5, weights=other)
    assert teacher.module is other
    assert not any(parameter.requires_grad for parameter in other.parameters())
    exact = other.head.weight.float().lerp(model.head.weight.float(), 0.5)
    own = other.frozen.weight.clone()
    teacher.update()
    assert torch.equal(other.head.weight, exact.bfloat16())
    # a parameter that is not trained has no average
    assert torch.equal(other.frozen.weight, own)
    wide = [name for name, v in teacher.state_dict()["weights"].items() if v.dtype == torch.float32]
    assert wide == ["embedding.weight", "norm.weight", "norm.bias"]
    teacher.sync()
    assert torch.equal(other.frozen.weight, model.frozen.weight.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_resumed_teacher_goes_on_as_if_nothing_had_happened(kind, dtype, tmp_path):
    torch.manual_seed(0)
    model = Model(dtype)
    settings = {"kind": kind, "rate": 0.01, "every": 2}
    teacher = Teacher(model, **settings)
    for _ in range(3):
        step(model)
        teacher.update()
    torch.save(teacher.state_dict(), tmp_path / "state")
    resumed_model = copy.deepcopy(model)
    resumed = Teacher(resumed_model, **settings)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for number in range(60):
        for student in (model, resumed_model):
            torch.manual_seed(number)
            step(student)
        assert teacher.update() == resumed.update()
        assert teacher.age == resumed.age
    assert_same(resumed.module, snapshot(teacher.module))


def test_going_back_to_an_early_state_forgets_the_masters():
    model = Model(torch.bfloat16)
    teacher = Teacher(model, rate=0.1)
    start = copy.deepcopy(teacher.state_dict())
    step(model, 5.0)
    teacher.update()
    once = snapshot(teacher.module)
    teacher.update()
    teacher.load_state_dict(start)
    teacher.update()
    assert_same(teacher.module, once)


def test_a_wrapper_is_looked_through(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = Model(torch.float32)
        wrapped = nn.parallel.DistributedDataParallel(model)
        teacher = Teacher(wrapped, kind="synced")
        assert type(teacher.module) is Model
        step(model)
        teacher.update()
        assert_same(teacher.module, snapshot(model))
        assert Teacher(wrapped, kind="live").module is wrapped
    finally:
        torch.distributed.destroy_process_group()
    model = Model(torch.float32)
    assert type(Teacher(torch.compile(model)).module) is Model


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "base"}, "kind must be one of 'live', 'frozen'"),
        ({"rate": -0.1}, r"rate must lie in \[0, 1\]"),
        ({"rate": 1.5}, r"rate must lie in \[0, 1\]"),
        ({"rate": float("nan")}, r"rate must lie in \[0, 1\]"),
        ({"every": 0}, "every must be an integer of at least 1"),
        ({"every": 1.5}, "every must be an integer of at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Teacher(Model(), **settings)


def test_weights_that_cannot_teach_are_refused():
    model = Model()
    with pytest.raises(ValueError, match="share no parameter"):
        Teacher(model, weights=model)
    with pytest.raises(ValueError, match="teaches itself"):
        Teacher(model, kind="live", weights=Model())
    with pytest.raises(ValueError, match="on one side only"):
        Teacher(model, weights=nn.Linear(2, 2))
    other = Model()
    other.frozen = nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"frozen\.weight \(4, 4\) and \(5, 4\)"):
        Teacher(model, weights=other)


def test_weights_in_the_students_memory_are_refused():
    """Such parameters are other objects, and yet move with the student's."""
    model, other = Model(), Model()
    other.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(ValueError, match=r"no memory .*got embedding\.weight, which does"):
        Teacher(model, kind="frozen", weights=other)


def hold_in_forward(part):
    original = part.forward
    part.forward = lambda states: original(states)


def hold_in_hook(part):
    part.register_forward_hook(lambda module, args, output: output @ part.weight)


def hold_in_early_hook(part):
    part.register_forward_pre_hook(lambda module, args: (args[0] @ part.weight,))


def hold_in_default(part):
    def hook(module, args, output, held=part):
        return output @ held.weight

    part.register_forward_hook(hook)


def hold_in_inner_function(part):
    parts, method = {"held": [part]}, part.extra_repr
    inner = functools.partial(lambda output: (output, parts, method))
    part.register_forward_hook(lambda module, args, output: inner(output)[0])


@pytest.mark.parametrize(
    "hold",
    [hold_in_forward, hold_in_hook, hold_in_early_hook, hold_in_default, hold_in_inner_function],
)
def test_functions_that_hold_the_student_are_refused(hold):
    """They are not copied: in the teacher's forward they would run the student."""
    model = Model()
    hold(model.frozen)
    name = r"frozen\.(forward|_forward_hooks|_forward_pre_hooks)"
    with pytest.raises(ValueError, match=rf"run its own parts, got {name}.*before the student is"):
        Teacher(model)


def test_methods_and_partials_come_along_with_the_copy():
    """``deepcopy`` lets them refer to the copy."""

    def doubled(module, *args):
        return 2 * type(module).forward(module, *args)

    model, ids = Model(), torch.arange(7)
    model.frozen.forward = MethodType(doubled, model.frozen)
    model.head.forward = functools.partial(doubled, model.head)
    model.frozen.register_forward_hook(lambda module, args, output: output + 1)
    teacher = Teacher(model, kind="frozen")
    with teacher.acting() as module:
        before = module(ids)
    assert torch.equal(before, model.eval()(ids))
    step(model)
    with teacher.acting() as module:
        assert torch.equal(module(ids), before)


def test_a_student_that_cannot_be_copied_is_refused():
    model = Model()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"be copyable, got TypeError: .*lock.*pass weights="):
        Teacher(model)


def test_weights_that_hold_other_tensors_can_be_copied():
    """As quantised weights do, which have no memory of their own."""
    model = Model()
    both = TwoTensor(*(torch.zeros(4, 4, dtype=torch.float64) for _ in range(2)))
    model.frozen.weight = nn.Parameter(both, requires_grad=False)
    teacher = Teacher(model, kind="synced")
    other = copy.deepcopy(model)
    other.frozen.weight = nn.Parameter(TwoTensor(both.a, both.b), requires_grad=False)
    with pytest.raises(ValueError, match=r"got frozen\.weight, which does"):
        Teacher(model, weights=other)
    with torch.no_grad():
        model.frozen.weight.add_(1)
    teacher.update()
    assert torch.equal(teacher.module.frozen.weight.a, torch.ones(4, 4, dtype=torch.float64))


def test_a_student_that_is_not_whole_is_not_copied():
    with torch.device("meta"), pytest.raises(ValueError, match=r"meta device; .*pass weights="):
        Teacher(Model())
    model = Model()
    model.head.weight.data = torch.empty(0, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"empty; .*pass weights="):
        Teacher(model)


def test_weights_that_are_elsewhere_are_not_followed():
    """Following an empty tensor would change nothing, without an error."""
    model, other = Model(), Model()
    for each in (model, other):
        each.frozen.weight.data = torch.empty(0, dtype=torch.float64)
    assert not Teacher(model, kind="frozen", weights=other).update()
    with pytest.raises(ValueError, match=r"frozen\.weight empty; shard the model"):
        Teacher(model, kind="synced", weights=other).update()


def test_a_student_that_changes_its_structure_is_refused():
    model = Model()
    teacher = Teacher(model)
    model.frozen = nn.Identity()
    with pytest.raises(ValueError, match=r"frozen\.bias on one side only"):
        teacher.update()


def test_a_state_of_another_teacher_is_refused():
    model = Model()
    teacher = Teacher(model)
    with pytest.raises(ValueError, match="kind 'ema', got 'frozen'"):
        teacher.load_state_dict(Teacher(model, kind="frozen").state_dict())
    with pytest.raises(ValueError, match="kind 'ema', got None; make that teacher"):
        teacher.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="state must be those of the same model"):
        teacher.load_state_dict(Teacher(nn.Linear(2, 2)).state_dict())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_copy_of_an_attached_model_answers_with_its_own_weights():
    pytest.importorskip("transformers")
    from tiny_models import random_ids, tiny_model

    from fused_sd.integrations.transformers import Request, attach, hidden_states

    model, ids = attach(tiny_model("Llama")), random_ids(2, 8)
    teacher = Teacher(model, kind="synced", every=2)
    request = Request(lambda hidden, head: (hidden, head.weight.clone()))
    with teacher.acting() as module:
        before = module(input_ids=ids, fused_sd=request).result
    step(model)
    teacher.update()
    with teacher.acting() as module:
        held = module(input_ids=ids, fused_sd=request).result
        assert torch.equal(held[0], before[0])
        assert torch.equal(held[1], before[1])
        size = float(held[0].norm(dim=-1).max() * held[1].norm(dim=-1).max())
        logits = module(input_ids=ids).logits
        assert_same_up_to_rounding(logits, held[0] @ held[1].T, 1, size)
        assert not torch.equal(model(input_ids=ids, fused_sd=request).result[0], held[0])
    teacher.update()
    with teacher.acting() as module:
        now = module(input_ids=ids, fused_sd=Request(hidden_states)).result
        assert torch.equal(now, model.eval()(input_ids=ids, fused_sd=request).result[0])


def sharded_teacher(rank: int, folder: str) -> None:
    """Compare averages of shards with those of whole weights, after forwards of the root too."""
    from torch.distributed.fsdp import fully_shard

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(3, 3)).bfloat16()

    def shard(model):
        for part in model[:2]:
            fully_shard(part)
        return fully_shard(model)

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    whole, sharded = make(), shard(make())
    with pytest.raises(ValueError, match="FSDP2 modules; copy it before sharding"):
        Teacher(sharded)
    with pytest.raises(ValueError, match="shard both alike"):
        Teacher(sharded, weights=make())
    settings = {"kind": "ema", "rate": 0.01}
    reference, teacher = (
        Teacher(whole, **settings),
        Teacher(sharded, weights=shard(make()), **settings),
    )
    early = make()
    late = Teacher(early, **settings)  # made first, sharded afterwards
    shard(early), shard(late.module)
    states = torch.ones(2, 6, dtype=torch.bfloat16)
    for number in range(20):
        with torch.no_grad():
            for model in (whole, sharded, early):
                for at, parameter in enumerate(model.parameters()):
                    parameter.add_((number + at) / 16)
        for each in (reference, teacher, late):
            each.update()
            with each.acting() as module:
                output = module(states)
            if each is reference:
                expected = output
            assert torch.equal(output, expected)
        if number == 10:
            resumed = Teacher(sharded, weights=shard(make()), **settings)
            resumed.load_state_dict(teacher.state_dict())
            teacher = resumed
    if rank == 0:
        with open(f"{folder}/passed", "w") as file:
            file.write("yes")


def test_shards_are_averaged_as_whole_weights_are(tmp_path):
    ranks.spawn(sharded_teacher, str(tmp_path))
    assert (tmp_path / "passed").exists()


def sides(same_head, dtype=torch.float64, **shaping):
    """Return the reference's and the student's states and heads; all of them require gradients."""
    hidden = [torch.randn(2, 5, 8, dtype=dtype, requires_grad=True) for _ in range(2)]
    weights = [torch.randn(11, 8, dtype=dtype, requires_grad=True) for _ in range(2)]
    biases = [torch.randn(11, dtype=dtype, requires_grad=True) for _ in range(2)]
    heads = [LMHead(w, b, **shaping) for w, b in zip(weights, biases)]
    return hidden[0], heads[1 if same_head else 0], hidden[1], heads[1]


def logits(hidden, head):
    weight, bias = head.weight[: head.num_tokens], head.bias
    bias = 0 if bias is None else bias[: head.num_tokens]
    return head.logit_scale * (hidden @ weight.T + bias)


HEADS = {
    "one head": (True, {}),
    "one scaled head": (True, {"logit_scale": 0.3}),
    "two heads": (False, {}),
    "two scaled heads": (False, {"logit_scale": 0.3}),
    "padded vocabulary": (False, {"valid_vocab": 9}),
}


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.8])
@pytest.mark.parametrize("same_head, shaping", HEADS.values(), ids=HEADS)
def test_trust_region_states_are_the_average_of_the_logits(same_head, shaping, rate):
    reference, reference_head, student, student_head = sides(same_head, **shaping)
    hidden, head = trust_region_states(reference, reference_head, student, student_head, rate)
    assert not hidden.requires_grad
    assert not head.weight.requires_grad
    assert not head.bias.requires_grad
    assert (head.weight.data_ptr() == student_head.weight.data_ptr()) == same_head
    with torch.no_grad():
        expected = (1 - rate) * logits(reference, reference_head)
        expected += rate * logits(student, student_head)
        # the normalised geometric mean of the two distributions
        teacher = expected.log_softmax(-1)
        own = logits(student, student_head).log_softmax(-1)
        definition = (own.exp() * (own - teacher)).sum()
    assert_close(logits(hidden, head), expected, torch.float64, "logits")
    loss = divergence_loss(
        student, student_head, hidden, head, divergence="reverse_kl", reduction="sum"
    ).loss
    assert_close(loss, definition, torch.float64, "loss")


def test_heads_without_a_bias_of_their_own_scale_and_of_another_width():
    reference, _, student, head = sides(False)
    reference_head = LMHead(torch.randn(11, 3, dtype=torch.float64), logit_scale=2.0)
    reference = reference[..., :3]
    hidden, mixed = trust_region_states(reference, reference_head, student, head, 0.2)
    expected = 0.8 * logits(reference, reference_head) + 0.2 * logits(student, head)
    assert_close(logits(hidden, mixed), expected, torch.float64)
    weight = torch.randn(11, 8, dtype=torch.float64)
    hidden, mixed = trust_region_states(student, weight, student, head.weight, 0.2)
    assert mixed.bias is None
    assert_close(
        logits(hidden, mixed), student @ (0.8 * weight + 0.2 * head.weight).T, torch.float64
    )


@pytest.mark.parametrize("same_head", [True, False])
@pytest.mark.parametrize("rate", [0, 1, 0.0, 1.0])
def test_the_ends_of_the_trust_region_are_exact(same_head, rate):
    four = sides(same_head, torch.bfloat16)
    hidden, head = trust_region_states(*four, rate)
    wanted, wanted_head = four[2 * int(rate)], four[2 * int(rate) + 1]
    assert torch.equal(hidden, wanted)
    assert head.weight.data_ptr() == wanted_head.weight.data_ptr()
    assert not hidden.requires_grad


def test_16_bit_states_are_rounded_once():
    reference, head, student, _ = sides(True, torch.bfloat16)
    hidden, _ = trust_region_states(reference, head, student, head, 0.05)
    expected = torch.lerp(reference.float(), student.float(), 0.05)
    assert hidden.dtype == torch.bfloat16
    assert torch.equal(hidden, expected.bfloat16())
    # with two heads the larger share is not rounded at all
    reference, before, student, now = sides(False, torch.bfloat16)
    hidden, _ = trust_region_states(reference, before, student, now, 0.05)
    assert torch.equal(hidden[..., :8], reference)


def test_trust_regions_that_are_not_linear_or_do_not_fit_are_refused():
    reference, before, student, now = sides(False)
    capped = LMHead(now.weight, softcap=30.0)
    with pytest.raises(ValueError, match=r"student_head must have no soft-cap.*ema"):
        trust_region_states(reference, before, student, capped, 0.1)
    with pytest.raises(ValueError, match="reference_head must have no soft-cap"):
        trust_region_states(reference, capped, student, now, 0)
    with pytest.raises(ValueError, match="the vocabulary of student_head"):
        trust_region_states(reference, before.weight[:10], student, now, 0.1)
    smaller = LMHead(before.weight, valid_vocab=10)
    with pytest.raises(ValueError, match="the vocabulary of student_head"):
        trust_region_states(reference, smaller, student, now, 0.1)
    with pytest.raises(ValueError, match="the dtype of student_hidden"):
        trust_region_states(reference.float(), before.weight.float(), student, now, 0.1)
    with pytest.raises(ValueError, match="at the tokens of student_hidden"):
        trust_region_states(reference[:1], before, student, now, 0.1)
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]"):
        trust_region_states(reference, before, student, now, 1.1)
    with pytest.raises(ValueError, match=r"reference_hidden must be \(..., D\)"):
        trust_region_states(reference[..., :7], before, student, now, 0.1)
