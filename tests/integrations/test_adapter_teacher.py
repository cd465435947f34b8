"""A second adapter as the teacher: its weights, and everything about the student untouched."""

import copy
import os

import pytest
import ranks
import torch
from closeness import assert_close
from torch import nn

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_models import random_ids, tiny_model

from fused_sd.integrations.shared.adapter_teacher import ADAPTER, AdapterTeacher, make_teacher
from fused_sd.integrations.transformers import Request, attach
from fused_sd.teaching.parameters import copy_module
from fused_sd.teaching.teacher import Teacher

# PEFT reads an attribute that transformers is about to rename
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]

IDS = random_ids(2, 8)
KINDS = ("live", "frozen", "ema", "synced")


def scaled(model):
    """As after ``scale_layer``: the configuration does not know of it."""
    for layer in model.modules():
        if isinstance(getattr(layer, "scaling", None), dict):
            layer.scaling["default"] *= 3


def second(model):
    """Another adapter trains, made active by the inner model alone."""
    step(model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter("second")


TIED = {"family": "Qwen3", "ensure_weight_tying": True}
ADAPTERS = {
    "layers": {},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
    "tokens": {"trainable_token_indices": [3, 5]},
    "dropout": {"lora_dropout": 0.5},
    "tied": {**TIED, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tied embedding": {**TIED, "target_modules": ["embed_tokens"]},
    "tied saved": {**TIED, "modules_to_save": ["embed_tokens", "lm_head"]},
    "replicated layers": {"layer_replication": [(0, 2), (0, 2)]},
    "scaled": {"prepare": scaled},
    "second": {"prepare": second},
    "named teacher": {"adapter": ADAPTER},
}
# these change the base weights, and not again when they are copied
CHANGE_BASE = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
if hasattr(peft, "KasaConfig"):  # not in older versions of PEFT
    CHANGE_BASE["kasa"] = {"kasa_config": peft.KasaConfig()}


def adapted(
    *,
    trained=True,
    dtype=torch.float64,
    family="Llama",
    adapter="default",
    prepare=None,
    **settings,
):
    """A student; ``trained``: whether its adapter does something."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings})
    model = peft.get_peft_model(tiny_model(family), config, adapter_name=adapter)
    if prepare is not None:
        prepare(model)
    model = model.to(dtype)
    if trained:
        step(model)
    return model.train()


def step(model, size=0.1):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def student_logits(model):
    """In evaluation mode, by a copy."""
    return logits(copy_module(model).eval())


def teacher_logits(teacher):
    with teacher.acting() as module:
        return logits(module)


def trained_values(model):
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_every_kind_teaches_what_it_should(settings, trained):
    model = adapted(trained=trained, **settings)
    base = model.get_base_model()
    start = student_logits(model)
    frozen = make_teacher(model, kind="frozen")
    assert type(frozen) is AdapterTeacher
    assert_close(teacher_logits(frozen), start, torch.float64, "frozen")
    step(model)
    assert_close(teacher_logits(frozen), start, torch.float64, "frozen")
    assert not torch.allclose(student_logits(model), start)
    assert make_teacher(model, kind="live").module is model
    assert model.get_base_model() is base

    model = adapted(trained=trained, **settings)
    synced = make_teacher(model, kind="synced", every=2)
    step(model)
    assert not synced.update()
    assert_close(teacher_logits(synced), start, torch.float64, "synced, before")
    assert synced.update()
    assert_close(teacher_logits(synced), student_logits(model), torch.float64, "synced")


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_an_average_is_that_of_each_trained_weight(settings):
    model = adapted(**settings)
    teacher = make_teacher(model, kind="ema", rate=0.25)
    expected = trained_values(model)
    for _ in range(3):
        step(model)
        teacher.update()
        for name, value in trained_values(model).items():
            expected[name] = 0.75 * expected[name] + 0.25 * value
    reference = copy_module(model).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name in expected:
                parameter.copy_(expected[name])
    assert_close(teacher_logits(teacher), logits(reference), torch.float64)


def test_a_frozen_teacher_of_a_new_adapter_needs_no_second_one():
    for settings in ({}, ADAPTERS["saved head"], ADAPTERS["embedding"]):
        model = adapted(trained=False, **settings)
        assert make_teacher(model, kind="frozen").uses_base
        assert list(model.peft_config) == ["default"]
    assert not make_teacher(adapted(trained=True), kind="frozen").uses_base
    model = adapted(trained=False, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight[0, 0] += 1
    assert not make_teacher(model, kind="frozen").uses_base


def test_16_bit_adapters_are_averaged_in_fp32():
    model = adapted(dtype=torch.bfloat16)
    teacher = make_teacher(model, kind="ema", rate=1e-3)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    student, own = (layer.lora_A[name].weight for name in ("default", ADAPTER))
    assert own.dtype == torch.bfloat16
    with torch.no_grad():
        student.fill_(1.0)
        teacher.sync()
        exact = student.double()
        student.fill_(1.5)
    for _ in range(300):
        teacher.update()
        exact = exact.lerp(student.double(), 1e-3)
    assert torch.equal(own, exact.bfloat16())
    assert own[0, 0] > 1.1


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raises", [False, True])
def test_acting_leaves_the_student_as_it_was(kind, trained, raises):
    model = adapted(trained=trained, modules_to_save=["lm_head"], lora_dropout=0.5)
    frozen_layer = model.get_base_model().model.layers[1].self_attn.q_proj.lora_A["default"]
    frozen_layer.weight.requires_grad_(False)  # a choice that PEFT would undo
    model.get_base_model().model.layers[0].eval()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    teacher = make_teacher(model, kind=kind)
    assert {n: p.requires_grad for n, p in model.named_parameters() if n in flags} == flags
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    modes = [part.training for part in model.modules()]
    values = trained_values(model)
    try:
        with teacher.acting() as module:
            assert not module(input_ids=IDS).logits.requires_grad
            assert torch.equal(module(input_ids=IDS).logits, module(input_ids=IDS).logits)
            if raises:
                raise RuntimeError
    except RuntimeError:
        assert raises
    assert model.active_adapter == "default"
    assert model.active_adapters == ["default"]
    now = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: now.pop(name) for name in flags} == flags
    assert not any(now.values()), "the teacher's own"
    assert [part.training for part in model.modules()] == modes
    assert torch.is_grad_enabled()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in gradients), name
        if name in gradients:
            assert torch.equal(parameter.grad, gradients[name]), name
    for name, value in trained_values(model).items():
        assert torch.equal(value, values[name]), name
    assert not model.get_base_model().lm_head.disable_adapters


def test_a_training_step_never_touches_the_teacher():
    model = adapted(modules_to_save=["lm_head"])
    teacher = make_teacher(model, kind="ema")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before, student = teacher_logits(teacher), student_logits(model)
    for _ in range(2):
        with teacher.acting() as module:
            target = module(input_ids=IDS).logits
        (model(input_ids=IDS).logits - target - 1).square().mean().backward()
        optimizer.step()
    assert torch.equal(teacher_logits(teacher), before)
    assert not torch.allclose(student_logits(model), student)


def test_an_attached_student_answers_as_its_teacher():
    model = attach(adapted(modules_to_save=["lm_head"]))
    teacher = make_teacher(model, kind="frozen")
    start = student_logits(model)
    step(model)
    request = Request(lambda hidden, head: hidden @ head.weight.T)
    with teacher.acting() as module:
        assert_close(module(input_ids=IDS, fused_sd=request).result, start, torch.float64)


@pytest.mark.parametrize("kind", ["frozen", "ema"])
def test_saved_students_load_without_the_teacher(kind, tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    make_teacher(model, kind=kind)
    step(model)
    expected = student_logits(model)
    base = copy.deepcopy(model).unload().double()
    for folder, settings in (("all", {}), ("one", {"selected_adapters": ["default"]})):
        model.save_pretrained(tmp_path / folder, **settings)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).double()
        assert list(loaded.peft_config) == ["default"]
        assert_close(logits(loaded.eval()), expected, torch.float64, folder)
    assert (tmp_path / "all" / ADAPTER).is_dir()
    assert not (tmp_path / "one" / ADAPTER).exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_teacher_goes_on(kind, first, dtype, tmp_path):
    """A resumed student's adapter does something, though its frozen teacher may be the base."""
    model = adapted(trained=first, dtype=dtype)
    settings = {"kind": kind, "rate": 0.01}
    teacher = make_teacher(model, **settings)
    for _ in range(3):
        step(model)
        teacher.update()
    torch.save(teacher.state_dict(), tmp_path / "state")
    for trained in (False, True):
        other = adapted(trained=trained, dtype=dtype)
        resumed = make_teacher(other, **settings)
        with torch.no_grad():
            values = trained_values(model)
            for name, parameter in other.named_parameters():
                if name in values:
                    parameter.copy_(values[name])
        resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        assert resumed.age == teacher.age
        assert torch.equal(teacher_logits(resumed), teacher_logits(teacher))
        torch.manual_seed(1)
        step(model)
        torch.manual_seed(1)
        step(other)
        for _ in range(20):
            assert resumed.update() == teacher.update()
        assert torch.equal(teacher_logits(resumed), teacher_logits(teacher))
        torch.save(teacher.state_dict(), tmp_path / "state")


@pytest.mark.parametrize("synced", [True, False], ids=["own adapter", "base"])
def test_a_state_of_another_kind_is_refused_and_changes_nothing(synced):
    model = adapted(trained=False)
    teacher = make_teacher(model, kind="frozen")
    if synced:
        step(model)
        teacher.sync()
    adapters = list(model.peft_config)
    for state in (model.state_dict(), {"kind": "ema", "weights": {}}):
        with pytest.raises(ValueError, match="state must be of kind 'frozen'"):
            teacher.load_state_dict(state)
        assert list(model.peft_config) == adapters


def test_syncing_a_frozen_teacher_takes_the_student_of_now():
    model = adapted(trained=False)
    teacher = make_teacher(model, kind="frozen")
    step(model)
    teacher.sync()
    now = student_logits(model)
    assert_close(teacher_logits(teacher), now, torch.float64)
    step(model)
    assert_close(teacher_logits(teacher), now, torch.float64)


@pytest.mark.parametrize("settings", CHANGE_BASE.values(), ids=CHANGE_BASE)
def test_initialisations_that_change_the_base_are_not_repeated(settings):
    model = adapted(**settings, trained=False)
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    start = student_logits(model)
    teacher = make_teacher(model, kind="frozen")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert torch.equal(layer.base_layer.weight, base)
    assert_close(teacher_logits(teacher), start, torch.float64)


def test_a_wrapped_student_is_looked_through(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(adapted(trained=False))
        teacher = make_teacher(wrapped, kind="frozen")
        assert type(teacher) is AdapterTeacher
        assert teacher.module is wrapped
        start = teacher_logits(teacher)
        step(wrapped)
        assert torch.equal(teacher_logits(teacher), start)
    finally:
        torch.distributed.destroy_process_group()


def sharded_teacher(rank: int, folder: str) -> None:
    """Training and teaching by shards and whole: the same teachers and students."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    answers = []
    for shards in (False, True):
        model = adapted(modules_to_save=["lm_head"], dtype=torch.float32)
        teacher = make_teacher(model, kind="ema", rate=0.3)
        if shards:
            for layer in model.get_base_model().model.layers:
                fully_shard(layer)
            fully_shard(model)
            with pytest.raises(ValueError, match="make the teacher earlier"):
                make_teacher(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            with teacher.acting() as module:
                target = module(input_ids=IDS, use_cache=False).logits
            output = model(input_ids=IDS, use_cache=False).logits
            (output - target - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            # a second forward leaves the root whole
            teacher_logits(teacher)
            teacher.update()
        answers += [logits(model), teacher_logits(teacher)]
    if rank == 0:
        worst = [float((answers[at] - answers[at + 2]).abs().max()) for at in range(2)]
        moved = float((answers[0] - answers[1]).abs().max())
        with open(f"{folder}/worst", "w") as file:
            file.write(f"{max(worst)} {moved}")


def test_a_sharded_student_teaches_as_a_whole_one(tmp_path):
    ranks.spawn(sharded_teacher, str(tmp_path))
    worst, moved = map(float, (tmp_path / "worst").read_text().split())
    assert worst < 1e-4 * moved


def test_other_students_get_a_whole_copy():
    plain = tiny_model("Llama")
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    ia3 = peft.get_peft_model(tiny_model("Llama"), config)
    given = adapted()
    for student, settings in ((plain, {}), (ia3, {}), (given, {"weights": adapted()})):
        teacher = make_teacher(student, kind="synced", **settings)
        assert type(teacher) is Teacher
        step(student)
        teacher.update()
        assert torch.equal(teacher_logits(teacher), student_logits(student))


@pytest.mark.parametrize("kind", ["frozen", "ema", "synced"])
def test_a_later_teacher_copies_the_student_of_now(kind):
    """A second training of one model finds the first one's adapter in it."""
    model = adapted(trained=False)
    first = make_teacher(model, kind="ema", rate=0.5)
    start = student_logits(model)
    step(model)
    first.update()
    held, now = teacher_logits(first), student_logits(model)
    assert not torch.allclose(held, now)
    later = make_teacher(model, kind=kind)
    assert list(model.peft_config) == ["default", ADAPTER, f"{ADAPTER}_2"]
    assert_close(teacher_logits(later), now, torch.float64)
    step(model)
    later.update()
    assert torch.equal(teacher_logits(first), held)
    # the student goes back to its start, where a frozen teacher is the model without adapters
    for parameter in (p for n, p in model.named_parameters() if "lora_B.default" in n):
        parameter.data.zero_()
    again = make_teacher(model, kind=kind)
    assert again.uses_base == (kind == "frozen")
    assert_close(teacher_logits(again), start, torch.float64)


@pytest.mark.parametrize("settings", [ADAPTERS["saved head"], ADAPTERS["tokens"], {}])
def test_a_deleted_teacher_leaves_nothing_behind(settings):
    model = adapted(**settings)
    keys, expected = list(model.state_dict()), student_logits(model)
    adapters = list(model.peft_config)
    teacher = make_teacher(model, kind="ema")
    state = peft.get_peft_model_state_dict(model)
    assert not any(ADAPTER in name for name in state)
    model.delete_adapter(ADAPTER)
    assert list(model.state_dict()) == keys
    assert list(model.peft_config) == adapters
    with pytest.raises(ValueError, match="hold 'teacher', got deleted; make a new teacher"):
        teacher_logits(teacher)
    make_teacher(model, kind="ema")
    assert_close(logits(copy.deepcopy(model).merge_and_unload().eval()), expected, torch.float64)


def test_a_copy_that_fails_leaves_the_model_as_it_was():
    class Uncopied(nn.Linear):
        def __deepcopy__(self, memo):
            raise NotImplementedError

    model = adapted()
    last = model.get_base_model().model.layers[-1].self_attn.q_proj
    last.lora_B["default"].__class__ = Uncopied
    keys = list(model.state_dict())
    with pytest.raises(NotImplementedError):
        make_teacher(model, kind="ema")
    assert list(model.state_dict()) == keys
    assert list(model.peft_config) == ["default"]


def test_acting_keeps_an_adapter_that_the_inner_model_made_active():
    model = adapted(prepare=second)
    teacher = make_teacher(model, kind="ema")
    expected = student_logits(model)
    teacher_logits(teacher)
    assert model.active_adapters == ["second"]
    assert model.active_adapter == "default", "which PEFT leaves as it was"
    assert torch.equal(student_logits(model), expected)


@pytest.mark.parametrize("trained", [False, True])
def test_a_model_whose_adapters_were_changed_is_refused(trained):
    model = adapted(trained=trained)
    teachers = [make_teacher(model, kind=kind) for kind in ("frozen", "ema")]
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    for teacher in teachers:
        with pytest.raises(ValueError, match=r"'default' active, .*got \['second'\]"):
            teacher_logits(teacher)
    with pytest.raises(ValueError, match="'default' active"):
        teachers[1].update()
    model.set_adapter("default")
    model.merge_adapter()
    for teacher in teachers:
        with pytest.raises(ValueError, match=r"no merged adapter, .*call unmerge_adapter"):
            teacher_logits(teacher)
    assert model.get_base_model().model.layers[0].self_attn.q_proj.merged


def test_adapters_that_cannot_be_doubled_are_refused():
    with pytest.raises(ValueError, match="hold a PeftModel"):
        AdapterTeacher(tiny_model("Llama"))
    for bias in ("all", "lora_only"):
        with pytest.raises(ValueError, match=r"'default' alone, .*bias trained too; .*use Teacher"):
            make_teacher(adapted(family="Phi", bias=bias))
    model = adapted()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'default' alone, .*norm\.weight trained too"):
        make_teacher(model)
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="no merged adapter, got default merged into"):
        make_teacher(model)
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one active adapter"):
        make_teacher(model)
    with pytest.raises(ValueError, match="rate must lie"):
        make_teacher(adapted(), rate=2)
