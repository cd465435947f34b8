"""A trainer that refuses, and ``attach`` where it refuses, leave the model as it was."""

import pytest

pytest.importorskip("trl")

import torch
from method_pairs import DATA, model, rewards
from peft import LoraConfig, get_peft_model
from trl_pairs import TOKENIZER

from fused_sd import LMHead
from fused_sd.integrations import trl as ours
from fused_sd.integrations.adapter_teacher import AdapterTeacher
from fused_sd.integrations.transformers import (
    Request,
    attach,
    completion_positions,
    detach,
    hidden_states,
    is_attached,
    unwrap,
)

SETTINGS = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
SMALL = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4}
METHODS = ("SDPO", "SDZero", "RLSD", "RLCSD", "OPSD", "SDFT", "GRPO", "RFT", "IWOPD", "SDPG")
OF_METHOD = {"SDPG": {"beta": 0.0}}  # whose reference TRL would load by the model's name
REWARDED = ("SDPO", "SDZero", "RLSD", "RLCSD", "GRPO", "RFT", "SDPG")


def facts(student):
    """All that a trainer could leave behind on a model."""
    modules = list(student.modules())
    return {
        "keys": list(student.state_dict()),
        "weights": [value.clone() for value in student.state_dict().values()],
        "classes": [type(module) for module in modules],
        "forwards": [module.__dict__.get("forward") for module in modules],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in modules
        ],
        "modes": [module.training for module in modules],
        "needs gradient": [parameter.requires_grad for parameter in student.parameters()],
        "adapters": getattr(student, "peft_config", None),
        "attributes": sorted(vars(student)),
        "attached": is_attached(student),
    }


def assert_unchanged(student, before):
    after = facts(student)
    assert all(map(torch.equal, after.pop("weights"), before.pop("weights")))
    assert after == before


def config(folder, method, **settings):
    given = {**SETTINGS, **SMALL, **settings}
    return getattr(ours, f"{method}Config")(str(folder / "out"), **given)


def trainer(method, folder, *, student, settings=None, data=DATA, reward=rewards, **more):
    given = [reward] if method in REWARDED else [None]
    more = {"processing_class": TOKENIZER, **more}
    args = config(folder, method, **{**OF_METHOD.get(method, {}), **(settings or {})})
    return getattr(ours, f"{method}Trainer")(student, *given, args, data, **more)


def lora(**changes):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **changes})


# name: what is wrong with the arguments of every trainer
WRONG = {
    "no such column": {"data": DATA.rename_column("prompt", "question")},
    "data are a number": {"data": 3},
    "no rows": {"data": DATA.select([])},
    "no adapter": {"peft_config": 3},
    "an adapter and no such column": {
        "peft_config": lora(),
        "data": DATA.rename_column("prompt", "question"),
    },
    "prompts are numbers": {"data": DATA.remove_columns("prompt").add_column("prompt", [1] * 8)},
    # these are found after TRL has put the adapter into the model
    "an adapter and images": {"peft_config": lora(), "data": DATA.add_column("image", ["a"] * 8)},
    "images": {"data": DATA.add_column("image", ["a"] * 8)},
}


NAMED = r"train_dataset|peft_config|processing_class"


@pytest.fixture(scope="module")
def shared():
    """One model for all that refuse: it is as it was."""
    return model()


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("method", METHODS)
def test_a_trainer_that_refuses_leaves_the_model_as_it_was(method, wrong, tmp_path, shared):
    before = facts(shared)
    with pytest.raises((ValueError, TypeError), match=NAMED):
        trainer(method, tmp_path, student=shared, **WRONG[wrong])
    assert_unchanged(shared, before)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("given", ["adapted", "adapting"])
def test_a_teacher_that_is_refused_leaves_no_adapter(given, tmp_path, monkeypatch):
    def refuse(*arguments, **settings):
        raise ValueError("every must be an integer")

    monkeypatch.setattr("fused_sd.integrations.trl.trainer.TeacherContexts", refuse)
    student, more = model(), {"peft_config": lora()}
    if given == "adapted":
        student, more = get_peft_model(student, lora()), {}
    before = facts(student)
    with pytest.raises(ValueError, match="every must"):
        trainer("SDPO", tmp_path, student=student, **more)
    assert_unchanged(student, before)


def test_a_corrected_call_trains_on_the_same_model(tmp_path):
    student = model()
    for wrong in ("an adapter and images", "images"):
        with pytest.raises(ValueError, match="processing_class"):
            trainer("SDPO", tmp_path, student=student, **WRONG[wrong])
    made = trainer("SDPO", tmp_path, student=student, settings={"max_steps": 1})
    made.train()
    assert made.state.global_step == 1


MODELS = {
    "None": None,
    "a text": "gpt2",
    "a class": torch.nn.Linear,
    "a layer": torch.nn.Linear(2, 2),
    "a head": torch.ones(3, 3),
    "a dict": {},
}
OF_A_MODEL = {
    "attach": attach,
    "detach": detach,
    "is_attached": is_attached,
    "unwrap": unwrap,
    "LMHead.of": LMHead.of,
    "AdapterTeacher": AdapterTeacher,
}


@pytest.mark.parametrize("wrong", MODELS)
@pytest.mark.parametrize("name", OF_A_MODEL)
def test_what_is_no_model_is_refused_by_name(name, wrong):
    with pytest.raises(ValueError, match=r"(model|student) must .*, got .*; "):
        OF_A_MODEL[name](MODELS[wrong])


IDS = torch.arange(6).view(2, 3)
REQUESTS = {
    "compute": (3, None, "compute must be a function"),
    "positions as a number": (hidden_states, 3, "positions must be"),
    "positions as a list": (hidden_states, [0, 1], "positions must be"),
    "positions as floats": (hidden_states, torch.ones(2), "positions must be"),
    "a mask of another shape": (hidden_states, torch.ones(2, 2).bool(), "positions must be"),
    "places outside": (hidden_states, torch.tensor([6]), "positions must be"),
    "rows without columns": (hidden_states, (IDS[0],), "positions must be"),
    "columns outside": (hidden_states, (IDS[0] * 0, IDS[0] + 3), "positions must be"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_wrong_request_is_refused_and_the_model_still_answers(name):
    compute, positions, message = REQUESTS[name]
    student = attach(model())
    before = facts(student)
    with pytest.raises(ValueError, match=message):
        student(IDS, fused_sd=Request(compute, positions))
    assert_unchanged(student, before)
    assert student(IDS, fused_sd=Request(hidden_states)).result.shape == (2, 3, 32)


def test_a_request_that_is_none_is_refused():
    student = attach(model())
    for wrong in (3, True, hidden_states, Request):
        with pytest.raises(ValueError, match="fused_sd must be a Request"):
            student(IDS, fused_sd=wrong)


def test_attach_refuses_an_autocast_that_makes_no_context():
    student = model()
    before = facts(student)
    for wrong in (3, True, "bf16"):
        with pytest.raises(ValueError, match="autocast must be a function"):
            attach(student, autocast=wrong)
    assert_unchanged(student, before)


def test_completion_positions_need_a_length():
    for wrong in (0, -1, 2.0, None, "3", True):
        with pytest.raises(ValueError, match="length must be an integer of at least 1"):
            completion_positions(wrong)


def test_a_teacher_refuses_another_models_state_and_keeps_its_own():
    student = get_peft_model(model(), lora())
    other = AdapterTeacher(get_peft_model(model(), lora(target_modules=["k_proj"])))
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(1)  # so that a frozen teacher has an adapter of its own, too
    for kind in ("ema", "frozen"):
        teacher = AdapterTeacher(student, kind=kind)
        before = facts(student)
        state = {**other.state_dict(), "kind": kind}
        with pytest.raises(ValueError, match="state must be those of the same model"):
            teacher.load_state_dict(state)
        assert_unchanged(student, before)
