"""What the methods' trainers share: contexts, teachers, accumulation, checkpoints, bad input."""

import dataclasses
import itertools
import sys

import official_prompts as official
import peft
import pytest
import torch
from closeness import assert_close
from datasets import Dataset
from method_pairs import (
    DATA,
    GROUP,
    METHODS,
    alone,
    loss_and_gradients,
    make,
    model,
    positional_model,
    rewards,
    sample,
)
from transformers import TrainerCallback, TrainingArguments
from trl import GRPOTrainer as StockGRPOTrainer
from trl.trainer.utils import split_tensor_dict
from trl_pairs import CHECKPOINTING, TOKENIZER

from fused_sd.integrations import trl as ours

FLOAT = torch.float64
LORA = {"target_modules": ["q_proj", "v_proj"]}


def teacher_texts(trainer, inputs):
    """What the teacher reads before each completion."""
    length = inputs["completion_ids"].size(1)
    rows = zip(inputs["teacher_input_ids"], inputs["teacher_attention_mask"])
    kept = [ids[:-length][mask[:-length].bool()] for ids, mask in rows]
    return [TOKENIZER.decode(ids) for ids in kept]


def changed(trainer, before):
    """Whether training has moved the teacher's and the student's weights."""
    with trainer.teacher.acting() as module:
        teacher = {n: p.clone() for n, p in module.named_parameters()}
    student = dict(trainer.model.named_parameters())
    return (
        any(not torch.equal(teacher[n], p) for n, p in before.items()),
        any(not torch.equal(student[n], p) for n, p in before.items()),
    )


def after_sibling(text):
    return official.sdpo("Solve 2 + 2.", solution=text)


def test_sdpo_shows_the_first_successful_sibling_or_the_feedback(tmp_path):
    trainer = make("SDPO", tmp_path)
    inputs = sample(trainer)
    texts = trainer.scored.texts  # rollouts 1 and 3 succeed; 0 and 3 are told something
    first, third = after_sibling(texts[1]), after_sibling(texts[3])
    assert teacher_texts(trainer, inputs) == [first, third, first, first]
    assert inputs["self_distillation_mask"].tolist() == [1, 1, 1, 1]


def test_sdpo_shows_feedback_the_attempt_and_a_sibling_together(tmp_path):
    trainer = make(
        "SDPO",
        tmp_path,
        environment_feedback_only_without_solution=False,
        include_own_attempt=True,
    )
    inputs = sample(trainer)
    text = teacher_texts(trainer, inputs)[0]
    assert f"Your earlier attempt:\n\n{trainer.scored.texts[0]}\n" in text
    assert "feedback from your unsuccessful earlier attempt:\n\nAttempt 0 fails." in text
    assert "Correct solution:" in text


def test_sdpo_without_a_sibling_learns_from_feedback_alone(tmp_path):
    trainer = make("SDPO", tmp_path, reward_funcs=lambda prompts, **_: [0.0] * len(prompts))
    inputs = sample(trainer)
    assert inputs["self_distillation_mask"].tolist() == [1, 0, 0, 1]
    assert "Attempt 3 fails." in teacher_texts(trainer, inputs)[3]


def test_sdpo_reads_feedback_from_the_data_where_no_function_says_it(tmp_path):
    nothing = {"reward_funcs": lambda prompts, **_: [0.0] * len(prompts)}
    trainer = make("SDPO", tmp_path, feedback_func=None, **nothing)
    assert all("earlier attempt:\n\nIt is 4." in t for t in teacher_texts(trainer, sample(trainer)))


def test_thinking_is_left_out_of_a_demonstration(tmp_path):
    trainer = make("SDPO", tmp_path)
    inputs = sample(trainer)
    texts = ["no", "<think>\nhidden\n</think>\nshown", "no", "no"]
    trainer.scored = dataclasses.replace(trainer.scored, texts=texts)
    inputs.update(trainer.teacher_contexts.build(inputs))
    text = teacher_texts(trainer, inputs)[0]
    assert "shown" in text
    assert "hidden" not in text
    assert "think" not in text


@pytest.mark.parametrize("method", ["RLSD", "OPSD", "SDFT"])
def test_the_privileged_context_is_in_the_teachers_prompt_alone(method, tmp_path):
    trainer = make(method, tmp_path)
    inputs = sample(trainer)
    expected = trainer.args.reprompt_template.format(prompt="Solve 2 + 2.", privileged="It is 4.")
    assert teacher_texts(trainer, inputs) == [expected] * GROUP
    student = TOKENIZER.batch_decode(inputs["prompt_ids"], skip_special_tokens=True)
    assert student == ["Solve 2 + 2."] * GROUP


def test_a_long_teacher_prompt_loses_its_beginning(tmp_path):
    trainer = make("OPSD", tmp_path, max_reprompt_len=12)
    inputs = sample(trainer)
    whole = trainer.args.reprompt_template.format(prompt="Solve 2 + 2.", privileged="It is 4.")
    assert inputs["teacher_input_ids"].size(1) == 12 + inputs["completion_ids"].size(1)
    assert all(whole.endswith(text) for text in teacher_texts(trainer, inputs))
    metrics = trainer._metrics["train"]
    assert metrics["self_distillation/truncated_reprompt_fraction"] == [1.0]


@pytest.mark.parametrize("method", METHODS)
def test_two_accumulated_steps_are_one_step_of_all(method, tmp_path):
    """With "dapo", whose mean is over all tokens whatever the split."""
    extra = {"num_loss_tokens_to_skip": 1} if method == "SDFT" else {}
    if method == "RLCSD":
        pytest.skip("its two means are the micro-batch's")
    trainer = make(method, tmp_path, loss_type="dapo", per_device_train_batch_size=8, **extra)
    inputs = sample(trainer, rows=[0] * GROUP + [1] * GROUP)
    inputs["loss_mask"][GROUP:, 2:] = 0  # the halves have different numbers of tokens
    inputs["num_loss_tokens"] = inputs["loss_mask"].sum()
    _, whole = loss_and_gradients(trainer, inputs)
    trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = 2
    parts = split_tensor_dict(inputs, 2)
    gradients = [loss_and_gradients(trainer, part)[1] for part in parts]
    for name, gradient in whole.items():
        assert_close(gradients[0][name] + gradients[1][name], gradient, FLOAT, name)


@pytest.mark.parametrize("method", METHODS)
def test_packed_sequences_give_the_same_loss(method, tmp_path):
    """To what rotary angles, which transformers forms in fp32, leave of other positions."""
    smooth = {"contrast_temperature": 1.0} if method == "RLCSD" else {}
    trainer = make(method, tmp_path, **smooth)
    inputs = sample(trainer, rows=[0] * GROUP)
    loss, gradients = loss_and_gradients(trainer, inputs)
    trainer.args.padding_free = True
    packed, others = loss_and_gradients(trainer, inputs)
    assert_close(packed, loss, torch.float32, "loss")
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, torch.float32, name)


def test_positions_that_a_model_counts_are_those_of_each_row(tmp_path):
    """Of both sides: packed rows have position ids that start again, padded ones have none."""
    trainer = make(
        "OPSD", tmp_path, student=positional_model(), per_device_train_batch_size=2 * GROUP
    )
    inputs = sample(trainer, rows=[0] * GROUP + [1] * GROUP)
    assert not inputs["prompt_mask"].all()
    loss, gradients = loss_and_gradients(trainer, inputs)
    trainer.args.padding_free = True
    packed, others = loss_and_gradients(trainer, inputs)
    assert_close(packed, loss, torch.float32, "loss")
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "LoRA"])
def test_a_method_trains(method, adapter, tmp_path):
    config = None if adapter is None else peft.LoraConfig(r=4, **adapter)
    trainer = make(method, tmp_path, student=model(torch.float32), peft_config=config)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before.get(n, p))}
    assert moved
    if adapter is not None:
        assert all("lora_" in name for name in moved)
    assert trainer.state.global_step == 2
    logged = trainer.state.log_history[0]
    assert logged["self_distillation/active_token_fraction"] > 0
    if trainer.has_teacher:
        assert "self_distillation/evidence_q50" in logged or method == "RLCSD"


@pytest.mark.parametrize(
    "kind, moves", [("live", True), ("base", False), ("ema", True), ("synced", True)]
)
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "LoRA"])
def test_a_teacher_follows_as_its_kind_says(kind, moves, adapter, tmp_path):
    config = None if adapter is None else peft.LoraConfig(r=4, **adapter)
    settings = {"teacher_model_kind": kind, "teacher_sync_steps": 1}
    trainer = make("OPSD", tmp_path, student=model(torch.float32), peft_config=config, **settings)
    probe = {"input_ids": torch.tensor([[5, 6, 7]])}

    def teacher_logits():
        with trainer.teacher.acting() as module:
            return module(**probe).logits.clone()

    before = teacher_logits()
    trainer.train()
    assert torch.equal(teacher_logits(), before) is not moves
    is_copied = adapter is None and kind != "live"
    assert (trainer.teacher.module is trainer.model) is not is_copied


def test_a_trust_region_teacher_lies_between_reference_and_student(tmp_path):
    trainer = make(
        "SDPO",
        tmp_path,
        teacher_model_kind="trust_region",
        teacher_update_rate=0.3,
        distillation_mode="full_logits",
        distillation_alpha=1.0,
    )
    inputs = sample(trainer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    loss, _ = loss_and_gradients(trainer, inputs)
    length = inputs["completion_ids"].size(1)

    def logits(module, ids, mask):
        with torch.no_grad():
            return module(**alone(ids, mask)).logits[:, -length - 1 : -1]

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    student = logits(trainer.model, ids, mask)
    known = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
    mixed = torch.lerp(logits(trainer.teacher.module, *known), student, 0.3).log_softmax(-1)
    own = student.log_softmax(-1)
    kl = (own.exp() * (own - mixed)).sum(-1)
    counted = inputs["loss_mask"]
    assert_close(loss, (kl * counted).sum() / counted.sum(), FLOAT, "loss")


SPARSE = [(method, {}) for method in METHODS if method != "SDPG"]
SPARSE += [("SDPO", {"distillation_weight": 0.4}), ("SDPO", {"distillation_weight": 0.0})]
SPARSE += [("SDPO", {"distillation_mode": "sampled_token", "distillation_alpha": 1.0})]
SPARSE += [("SDZero", {"variant": "paper"})]
SPARSE += [("SDPO", {"gradient": "auto"})]


@pytest.mark.parametrize("method, settings", SPARSE)
def test_a_sparse_gradient_is_near_the_dense_one_and_says_how_near(method, settings, tmp_path):
    tolerance = 2**-6
    trainer = make(
        method,
        tmp_path,
        **{"gradient": "sparse", **settings},
        gradient_tolerance=tolerance,
        temperature=0.5,
    )
    inputs = sample(trainer)
    loss, sparse = loss_and_gradients(trainer, inputs)
    logged = {
        name.removeprefix("self_distillation/gradient_"): values[0]
        for name, values in trainer._metrics["train"].items()
        if "/gradient_" in name
    }
    trainer.args.gradient, trainer.args.gradient_tolerance = "dense", None
    exact, dense = loss_and_gradients(trainer, inputs)
    assert loss == exact
    assert sparse.keys() == dense.keys()
    error = sum((sparse[name] - gradient).square().sum() for name, gradient in dense.items()) ** 0.5
    size = sum(gradient.square().sum() for gradient in dense.values()) ** 0.5
    has_entries = method == "SDZero" and not settings
    assert (error == 0) == has_entries
    assert error < tolerance * size
    assert logged["dense_fraction"] == 0
    assert logged["entries"] == 64 if has_entries else 0 < logged["entries"] < len(TOKENIZER)
    assert (logged["dropped_fraction"] == 0) == has_entries
    assert logged["dropped_fraction"] <= tolerance
    assert len(trainer._metrics["train"]["self_distillation/gradient_entries"]) == 1


def test_training_with_sparse_gradients_logs_what_they_keep(tmp_path):
    trainer = make(
        "SDPO",
        tmp_path,
        student=model(torch.float32),
        peft_config=peft.LoraConfig(r=4, **LORA),
        gradient="sparse",
        bf16=True,
        per_device_train_batch_size=GROUP // 2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=GROUP,
        **{CHECKPOINTING: True},
    )
    trainer.eval_dataset = DATA.select(range(2))
    trainer.train()
    for logged in trainer.state.log_history[:2]:
        assert logged["grad_norm"] > 0
        assert 0 < logged["self_distillation/gradient_entries"] <= len(TOKENIZER)
        assert 0 <= logged["self_distillation/gradient_dense_fraction"] < 1
        assert 0 < logged["self_distillation/gradient_dropped_fraction"] <= 2**-8
    assert not any("gradient_" in name for name in trainer.evaluate())


def broken(folder, **settings):
    """A trainer with its first weights, one of whose gradients is NaN."""
    trainer = make("SDPO", folder, student=model(torch.float32), max_steps=1, **settings)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * torch.nan)
    trainer.args.max_grad_norm = 0
    trainer.train()
    return trainer, before


def test_an_infinite_gradient_changes_nothing(tmp_path):
    trainer, before = broken(tmp_path, teacher_sync_steps=5)
    assert changed(trainer, before) == (False, False)
    assert trainer._teacher_callback.num_skipped == 1
    assert trainer.teacher.age == 0  # the step does not count


def test_a_teacher_does_not_follow_a_student_that_an_infinite_gradient_broke(tmp_path):
    trainer, before = broken(tmp_path, skip_nonfinite_gradients=False)
    assert changed(trainer, before) == (False, True)


def test_a_resumed_run_has_the_teacher_that_it_had(tmp_path):
    settings = {"teacher_update_rate": 0.3, "save_strategy": "steps", "save_steps": 1}
    first = make("SDPO", tmp_path, student=model(torch.float32), max_steps=2, **settings)
    first.train()
    second = make("SDPO", tmp_path, student=model(torch.float32), max_steps=2, **settings)
    second.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-1")
    with first.teacher.acting() as one, second.teacher.acting() as two:
        for name, parameter in one.named_parameters():
            assert torch.allclose(dict(two.named_parameters())[name], parameter, atol=1e-6), name


def test_rlsds_evidence_fades_with_the_steps(tmp_path):
    trainer = make("RLSD", tmp_path, evidence_decay_steps=10)
    inputs = sample(trainer)
    mixes = []
    for trainer.state.global_step in (0, 4, 9, 50):
        mixes.append(float(trainer.evidence(inputs).mix.max()))
    assert mixes == pytest.approx([0.45, 0.25, 0.0, 0.0])


def test_a_batch_without_any_signal_has_no_loss_and_no_gradient(tmp_path):
    nothing = {"reward_funcs": lambda prompts, **_: [0.0] * len(prompts)}
    for method in ("SDPO", "RFT", "RLCSD"):
        data = DATA.remove_columns("privileged_context")
        trainer = make(method, tmp_path, feedback_func=None, data=data, **nothing)
        inputs = sample(trainer)
        assert inputs["loss_mask"].sum() == 0
        loss, gradients = loss_and_gradients(trainer, inputs)
        assert loss == 0
        assert gradients
        assert not any(gradient.any() for gradient in gradients.values())


def test_rlsd_without_a_reference_is_grpo(tmp_path):
    data = DATA.map(lambda _: {"privileged_context": ""})
    settings = {"scale_rewards": "none"}
    pair = [make(m, tmp_path, data=data, **settings) for m in ("RLSD", "GRPO")]
    inputs = sample(pair[0])
    (loss, gradients), (other, others) = (loss_and_gradients(t, inputs) for t in pair)
    assert_close(loss, other, FLOAT, "loss")
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, FLOAT, name)


def test_a_completion_that_ends_at_once_is_its_end(tmp_path, monkeypatch):
    trainer = make("SDPO", tmp_path)
    stock = StockGRPOTrainer._generate_single_turn

    def some_empty(*args):
        return [[], *stock(*args)[0][1:]], None

    monkeypatch.setattr(StockGRPOTrainer, "_generate_single_turn", some_empty)
    inputs = sample(trainer)
    assert inputs["completion_mask"][0].sum() == 1
    loss, _ = loss_and_gradients(trainer, inputs)
    assert loss.isfinite()


def test_evaluation_reports_a_loss_and_changes_nothing(tmp_path):
    trainer = make("OPSD", tmp_path, student=model(torch.float32), per_device_eval_batch_size=GROUP)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.eval_dataset = DATA.select(range(2))
    trainer.model.eval()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert changed(trainer, before) == (False, False)


@pytest.mark.filterwarnings("ignore:std")  # TRL forms one for its logs
def test_evaluation_on_one_completion_each_has_a_loss(tmp_path):
    trainer = make(
        "GRPO",
        tmp_path,
        student=model(torch.float32),
        num_generations_eval=1,
        per_device_eval_batch_size=2,
    )
    trainer.eval_dataset = DATA.select(range(2))
    trainer.model.eval()
    inputs = trainer._generate_and_score_completions(list(trainer.eval_dataset))
    assert torch.equal(inputs["advantages"], inputs["rewards"])
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]  # no NaN


# settings that TRL reads where they matter, or only with vLLM, which is not run here
TRLS_OWN = {
    "trust_remote_code",
    "use_transformers_paged",
    "transformers_continuous_batching_config",
    "log_completions_hub_repo",
    "sequence_mean_correction",  # ours, of vLLM's ratios
}
READ_WITH = {  # settings under which others are read
    "SDPO": {
        "distillation_weight": 0.5,
        "scale_rewards": "group",
        "include_own_attempt": True,
        "environment_feedback_only_without_solution": False,
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_is_read_or_refused(method, tmp_path, monkeypatch):
    config, read = getattr(ours, f"{method}Config"), set()

    class Watched(config):
        def __getattribute__(self, name):
            caller = sys._getframe(1)
            package = caller.f_globals.get("__name__", "").split(".")[0]
            if package in ("fused_sd", "trl") and caller.f_code.co_name != "__post_init__":
                read.add(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(ours, f"{method}Config", Watched)
    settings = READ_WITH.get(method, {})
    make(method, tmp_path, student=model(torch.float32), max_steps=1, **settings).train()
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(config)} - inherited - TRLS_OWN
    ignored = own - read - set(config.unread)
    assert {name for name in ignored if not name.startswith("vllm_")} == set()
    assert set(config.unread) <= own


@pytest.mark.parametrize("method", ["SDPO", "RLSD"])
def test_a_batch_that_is_used_again_has_the_ratio_to_its_sampler(method, tmp_path):
    trainer = make(
        method,
        tmp_path,
        student=model(torch.float32),
        num_iterations=2,
        steps_per_generation=2,
        per_device_train_batch_size=GROUP // 2,
        max_steps=4,
    )
    batches = []
    trainer.add_callback(Seen(lambda: batches.append(trainer._buffered_inputs)))
    trainer.train()
    assert len({id(batch) for batch in batches}) == 1
    assert len(batches) == 4
    ids, old = (
        torch.cat([part[name] for part in batches[0]])
        for name in ("completion_ids", "old_per_token_logps")
    )
    assert old.shape == ids.shape
    log = trainer.state.log_history
    if method == "RLSD":
        ratios = [entry["self_distillation/importance_ratio"] for entry in log[:4]]
        assert ratios[0] == pytest.approx(1.0, abs=1e-5)
        assert abs(ratios[2] - 1) > 1e-3


class Seen(TrainerCallback):
    """Calls a function at the end of each step."""

    def __init__(self, call):
        self.call = call

    def on_step_end(self, *args, **kwargs):
        self.call()


def test_a_truncated_completion_has_no_loss_where_it_is_masked(tmp_path, monkeypatch):
    end = TOKENIZER.eos_token_id

    def scripted(*_):
        return [[7, 8, end], [7, 8, 9], [7, end], [9, 9, 9]], None

    monkeypatch.setattr(StockGRPOTrainer, "_generate_single_turn", scripted)
    for method in ("SDPO", "SDZero"):
        for padding_free in (False, True):
            trainer = make(
                method, tmp_path, mask_truncated_completions=True, padding_free=padding_free
            )
            inputs = sample(trainer)
            assert (inputs["loss_mask"].sum(1) > 0).tolist() == [True, False, True, False]
            loss, gradients = loss_and_gradients(trainer, inputs)
            assert loss.isfinite()
            assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_rewards_are_weighted_and_none_counts_for_nothing(tmp_path):
    trainer = make(
        "GRPO",
        tmp_path,
        reward_funcs=[rewards, lambda prompts, **_: [None, 1.0, None, None]],
        reward_weights=[1.0, 0.5],
        scale_rewards="none",
    )
    inputs = sample(trainer)
    assert inputs["rewards"].tolist() == [0.0, 1.5, 0.0, 1.0]
    assert inputs["advantages"].tolist() == pytest.approx([-0.625, 0.875, -0.625, 0.375])


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("GRPO", "RFT")])
def test_a_conversation_keeps_its_system_message_and_template(method, tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Solve 2 + 2."},
    ]
    data = Dataset.from_dict({"prompt": [turns] * 8, "privileged_context": ["It is 4."] * 8})
    trainer = make(method, tmp_path, data=data, max_completion_length=4)
    inputs = sample(trainer)
    for text in teacher_texts(trainer, inputs):
        assert text.startswith("system: Be brief.\nuser: ")
        assert "Solve 2 + 2." in text
        assert method == "SDZero" or text.endswith("\nassistant: ")
    loss, _ = loss_and_gradients(trainer, inputs)
    assert loss.isfinite()


def test_a_row_without_privileged_context_has_no_weight(tmp_path):
    data = DATA.map(lambda row, n: {"privileged_context": None if n else "It is 4."}, True)
    for method, signal in (("OPSD", [1, 0]), ("RLSD", [1, 0])):
        trainer = make(method, tmp_path, data=data, num_generations=2)
        inputs = sample(trainer, rows=[0, 0, 1, 1])
        assert inputs["self_distillation_mask"].tolist() == [signal[0]] * 2 + [signal[1]] * 2
        active = inputs["loss_mask"].sum(1) > 0
        assert active.tolist() == [True, True, method == "RLSD", method == "RLSD"]


def test_rows_may_come_from_a_stream(tmp_path):
    student = model(torch.float32)
    trainer = make("OPSD", tmp_path, student=student, data=DATA.to_iterable_dataset())
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_path_is_a_model(tmp_path):
    model(torch.float32).save_pretrained(tmp_path / "model")
    trainer = make("SDPO", tmp_path, student=str(tmp_path / "model"), max_steps=1)
    loss, _ = loss_and_gradients(trainer, inputs := sample(trainer))
    other = make("SDPO", tmp_path, student=model(torch.float32))
    assert_close(loss_and_gradients(other, inputs)[0], loss, torch.float32, "loss")


@pytest.mark.parametrize("kind", ["live", "base", "ema", "synced", "trust_region"])
def test_lora_packed_and_checkpointed_gives_the_same_gradient(kind, tmp_path):
    config = peft.LoraConfig(r=4, **LORA, init_lora_weights=False)
    trainer = make("SDPO", tmp_path, peft_config=config, teacher_model_kind=kind)
    inputs = sample(trainer)
    loss, gradients = loss_and_gradients(trainer, inputs)
    trainer.args.padding_free = True
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    other, others = loss_and_gradients(trainer, inputs)
    assert_close(other, loss, torch.float32, "loss")
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, torch.float32, name)


@pytest.mark.parametrize("method", ["SDPO", "OPSD", "RLSD"])
def test_bf16_autocast_is_near_fp32(method, tmp_path):
    inputs, losses = None, []
    for bf16 in (False, True):
        trainer = make(method, tmp_path, student=model(torch.float32), bf16=bf16)
        inputs = sample(trainer) if inputs is None else inputs
        losses.append(float(loss_and_gradients(trainer, inputs)[0]))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05, abs=0.02)


def test_a_resumed_adapter_has_the_teacher_that_it_had(tmp_path):
    settings = {"teacher_update_rate": 0.3, "save_strategy": "steps", "save_steps": 1}
    pair = [
        make(
            "SDPO",
            tmp_path,
            student=model(torch.float32),
            peft_config=peft.LoraConfig(r=4, **LORA),
            **settings,
        )
        for _ in range(2)
    ]
    pair[0].train()
    pair[1].train(resume_from_checkpoint=f"{tmp_path}/checkpoint-1")
    first, second = (dict(trainer.model.named_parameters()) for trainer in pair)
    moved = [name for name in first if "lora_B" in name]
    assert any(first[name].any() for name in moved if "teacher" in name)
    for name in moved:
        assert torch.allclose(second[name], first[name], atol=1e-6), name


@pytest.mark.parametrize("kind", ["base", "ema"])
def test_a_second_training_of_an_adapter_teaches_with_the_student_of_then(kind, tmp_path):
    """The first trainer's teacher is still an adapter of the model."""
    config = peft.LoraConfig(r=4, **LORA)
    first = make("SDPO", tmp_path, student=model(torch.float32), peft_config=config)
    first.train()
    again = make("SDPO", tmp_path, student=first.model.eval(), teacher_model_kind=kind)
    probe = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        student = again.model.eval()(**probe).logits
    with again.teacher.acting() as module:
        taught = module(**probe).logits
    with first.teacher.acting() as module:
        assert not torch.allclose(module(**probe).logits, student, atol=1e-5)
    assert_close(taught, student, torch.float32)


def test_vllm_is_set_up_as_trl_sets_it_up(tmp_path, monkeypatch):
    from trl.trainer import grpo_trainer

    made = []

    class Engine:
        vllm_client = None

        def __init__(self, **settings):
            made.append(settings)
            self.vllm_client = self

        def get_server_info(self):
            return {"model_config": {"logprobs_mode": "processed_logprobs"}}

        def sync_weights(self):
            made.append("synced")

        def generate(self, prompts, images, num_generations, profiler):
            completions = [[5] * (1 + n % 3) for n in range(len(prompts))]
            return prompts, completions, [[[-1.0] for _ in ids] for ids in completions], None

    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Engine)
    asked = {"vllm_mode": "server", "vllm_server_port": 8123, "vllm_max_model_length": 99}
    trainer = make("SDPO", tmp_path, use_vllm=True, **asked)
    inputs = sample(trainer)
    assert made[0]["mode"] == "server"
    assert made[0]["server_port"] == 8123
    assert made[0]["max_model_length"] == 99
    assert made[1] == "synced"
    assert inputs["completion_mask"].sum(1).tolist() == [1, 2, 3, 1]


def without(column):
    return DATA.remove_columns(column)


# name: what is asked for, and what the answer says
REFUSED = {
    "no reward": (
        lambda f: make("GRPO", f, reward_funcs=None),
        "reward_funcs must be given to GRPOTrainer",
    ),
    "no privileged context": (
        lambda f: make("OPSD", f, data=without("privileged_context")),
        "train_dataset must have a column privileged_context for OPSDTrainer",
    ),
    "no reference among RLCSD's hints": (
        lambda f: make("RLCSD", f, data=without("privileged_context"), correct_hint="reference"),
        "train_dataset must have a column privileged_context for RLCSDTrainer",
    ),
    "a group of one": (
        lambda f: make("GRPO", f, num_generations=1),
        "num_generations must be at least 2 where rewards are scaled",
    ),
    "another method's configuration": (
        lambda f: ours.OPSDTrainer(
            model(), args=ours.SDFTConfig(str(f), use_cpu=True, bf16=False), train_dataset=DATA
        ),
        "args must be a .*OPSDConfig for OPSDTrainer",
    ),
    "a setting that is not read": (
        lambda f: make("RLSD", f, top_entropy_quantile=0.5),
        "top_entropy_quantile must be left as it is in RLSDConfig",
    ),
    "a KL to a reference": (
        lambda f: make("GRPO", f, beta=0.1),
        "beta must be left as it is in GRPOConfig",
    ),
    "a teacher that is none": (
        lambda f: make("OPSD", f, teacher_model_kind="best"),
        "teacher_model_kind must be one of 'live'",
    ),
    "a template without its place": (
        lambda f: make("OPSD", f, reprompt_template="{prompt}"),
        r"reprompt_template must hold \{prompt\}, \{privileged\}",
    ),
    "a template with another place": (
        lambda f: make("OPSD", f, reprompt_template="{prompt}{privileged}{hint}"),
        "reprompt_template must hold no placeholders but",
    ),
    "a tail of everything": (
        lambda f: make("OPSD", f, distillation_add_tail=True),
        "distillation_add_tail must be False over the full vocabulary",
    ),
    "k beside the whole vocabulary": (
        lambda f: make("SDPO", f, distillation_mode="full_logits", distillation_topk=5),
        "distillation_topk must be None",
    ),
    "a prompt that ends with an answer": (
        lambda f: sample(make("OPSD", f, data=ended())),
        "prompt must end with a user turn",
    ),
    "two questions at test time": (
        lambda f: make_discovery(f, DATA),
        "train_dataset must be one question",
    ),
    "a stream at test time": (
        lambda f: make_discovery(f, DATA.to_iterable_dataset()),
        "train_dataset must be one question, got a stream",
    ),
    "a mixture without a divergence": (
        lambda f: make("RLSD", f, teacher_model_kind="trust_region"),
        "teacher_model_kind must be one of 'live', 'base', 'ema', 'synced', got 'trust_region'",
    ),
    "feedback that is no text": (
        lambda f: sample(make("SDPO", f, feedback_func=lambda prompts, **_: [["a"]] * 4)),
        "feedback_func must be text, .* got a list .* in answer 0",
    ),
    "a support of the whole vocabulary": (
        lambda f: make("SDZero", f, variant="paper", distillation_topk=5),
        'distillation_topk must be left as it is for variant="paper"',
    ),
    "feedback for some": (
        lambda f: sample(make("SDPO", f, feedback_func=lambda prompts, **_: ["no"])),
        "feedback_func must return a list with one entry for each of 4 completions, got 1",
    ),
    "feedback that is not returned": (
        lambda f: sample(make("SDPO", f, feedback_func=lambda prompts, **_: None)),
        "feedback_func must return a list .* got a NoneType",
    ),
    "no room for the teacher": (
        lambda f: make("OPSD", f, max_reprompt_len=0),
        "max_reprompt_len must be",
    ),
    "a tolerance that nothing reads": (
        lambda f: make("RLSD", f, gradient_tolerance=0.01),
        "gradient_tolerance must come with gradient='sparse' or 'auto', got 0.01; pass",
    ),
    "a tolerance of everything": (
        lambda f: make("RFT", f, gradient="sparse", gradient_tolerance=1),
        r"gradient_tolerance must lie in the open interval \(0, 1\), got 1; 2\*\*-8 is the default",
    ),
    "a gradient that is neither": (
        lambda f: make("OPSD", f, gradient="certified"),
        "gradient must be one of 'dense', 'sparse', 'auto', got 'certified'",
    ),
    "an average that is none": (
        lambda f: make("SDPO", f, loss_type="mean"),
        "loss_type must be one of 'bnpo'",
    ),
}


def ended():
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It"}]
    return DATA.remove_columns("prompt").add_column("prompt", [turns] * len(DATA))


def make_discovery(folder, data, **settings):
    args = ours.DiscoveryConfig(
        str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        num_generations=GROUP,
        per_device_train_batch_size=GROUP,
        max_completion_length=4,
        max_attempts=12,
        disable_tqdm=True,
        **settings,
    )
    attempts = itertools.count(1)
    return ours.DiscoveryTrainer(
        model(torch.float32),
        lambda prompts, **_: [float(next(attempts) == 7) for _ in prompts],
        args,
        data,
        processing_class=TOKENIZER,
        feedback_func=lambda prompts, **_: ["Try again."] * len(prompts),
    )


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_a_remedy(name, tmp_path):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_discovery_ends_with_the_first_success(tmp_path):
    trainer = make_discovery(tmp_path, DATA.select([0]))
    trainer.train()
    assert trainer.first_success == 7
    assert len(trainer.rewards) == 8
    assert trainer.solution == trainer.scored.texts[2]
    assert ours.discovery_probability([7, None, 3, 20], 10) == 0.5


def test_discovery_gives_up_after_its_attempts(tmp_path):
    trainer = make_discovery(tmp_path, DATA.select([0]), stop_at_success=False)
    trainer.train()
    assert len(trainer.rewards) == 12
    assert trainer.first_success == 7


def test_discovery_goes_on_counting_when_it_is_resumed(tmp_path):
    settings = {"stop_at_success": False, "save_strategy": "steps", "save_steps": 1}
    first = make_discovery(tmp_path, DATA.select([0]), **settings)
    first.train()
    resumed = make_discovery(tmp_path, DATA.select([0]), **settings)  # its attempt 7 passes, too
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.rewards == [0.0] * 10 + [1.0, 0.0]
    assert resumed.first_success == 11
    resumed.evaluate(DATA.select([0]))  # samples no attempts
    assert len(resumed.rewards) == 12
    (tmp_path / "checkpoint-1" / "attempts.json").unlink()
    with pytest.raises(ValueError, match=r"must hold attempts\.json, got .*; resume from"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_grpos_part_of_sdpo_needs_no_signal(tmp_path):
    nothing = {"reward_funcs": lambda prompts, **_: [0.0] * len(prompts)}
    data = DATA.remove_columns("privileged_context")
    settings = {"distillation_weight": 0.0, "feedback_func": None, "data": data, **nothing}
    trainer = make("SDPO", tmp_path, **settings)
    inputs = sample(trainer)
    assert inputs["self_distillation_mask"].sum() == 0
    assert torch.equal(inputs["loss_mask"], inputs["completion_mask"])


def test_the_sampled_tokens_evidence_is_logged(tmp_path):
    mode = {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}
    trainer = make("SDPO", tmp_path, **mode)
    loss_and_gradients(trainer, sample(trainer))
    assert "self_distillation/evidence_q50" in trainer._metrics["train"]
