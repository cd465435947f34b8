"""The methods' defaults against the official runs, their prompts string by string, their hints."""

import dataclasses

import official_prompts as official
import pytest
import torch
from closeness import assert_close
from datasets import Dataset
from method_pairs import GROUP, loss_and_gradients, make, sample
from trl_pairs import TOKENIZER

from fused_sd.integrations import trl as ours

LEARNING = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay")
LENGTHS = ("max_completion_length", "max_reprompt_len", "num_generations")
SAMPLING = ("temperature", "top_p", "top_k")
CORRECTION = ("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max")
CONSTANT, PER_TOKEN = "constant_with_warmup", ("token_truncate", 2.0)
TRLS = ("sequence_mask", 3.0)
UNCORRECTED = ("RLSD", "OPSD", "SDZero", "GRPO")
RUNS = {
    # the names above in their order; sources are in docs/official_runs.md
    "SDPO": ((1e-5, CONSTANT, 10, 0.01), (8192, 10240, 8), (1.0, 1.0, 0), PER_TOKEN),
    "RLSD": ((1e-6, CONSTANT, 0, 0.01), (4096, 16384, 8), (1.0, 1.0, 0), TRLS),
    "RLCSD": ((1e-6, CONSTANT, 50, 0.01), (16384, 24576, 8), (1.0, 0.95, 20), PER_TOKEN),
    "OPSD": ((5e-6, "linear", 0, 0.0), (1024, 20000, 1), (1.1, 0.95, 20), TRLS),
    "SDFT": ((5e-5, "cosine", 0.1, 0.0), (1024, 10240, 1), (1.0, 1.0, 0), PER_TOKEN),
    "SDZero": ((5e-6, CONSTANT, 20, 0.01), (8192, 32768, 1), (1.0, 1.0, 0), TRLS),
    "GRPO": ((1e-6, CONSTANT, 0, 0.01), (4096, None, 8), (1.0, 1.0, 0), TRLS),
    "Discovery": ((1e-6, CONSTANT, 0, 0.01), (8192, 10240, 16), (1.0, 1.0, 0), PER_TOKEN),
}
LOSSES = {
    "SDPO": {"distillation_alpha": 0.5, "distillation_topk": 100, "teacher_update_rate": 0.05},
    "RLSD": {"evidence_mix": 0.5, "evidence_decay_steps": 60, "teacher_sync_steps": 20},
    "RLCSD": {"teacher_sync_steps": 10, "max_wrong_hints": 4, "success_reward_threshold": 0.0},
    "OPSD": {"distillation_alpha": 0.0, "entry_clip": 0.05, "teacher_model_kind": "base"},
    "SDFT": {"distillation_alpha": 0.0, "num_loss_tokens_to_skip": 3, "teacher_update_rate": 0.01},
    "SDZero": {"forward_weight": 0.5, "distillation_topk": 64, "teacher_model_kind": "base"},
    "GRPO": {"epsilon": 0.2, "epsilon_high": 0.28, "delta": 3.0, "scale_rewards": "group"},
    "Discovery": {"distillation_alpha": 1.0, "distillation_topk": 20, "teacher_update_rate": 0.01},
}
SOLUTION = " First four.\n<think>Or five?</think>\nIt is 4. \n"


@pytest.mark.parametrize("method", RUNS)
def test_the_defaults_are_the_official_runs(method, tmp_path):
    cpu = {"use_cpu": True, "bf16": False, "report_to": "none"}
    config = getattr(ours, f"{method}Config")(str(tmp_path), **cpu)
    for names, values in zip((LEARNING, LENGTHS, SAMPLING, CORRECTION), RUNS[method], strict=True):
        assert tuple(getattr(config, name, None) for name in names) == values
    assert {name: getattr(config, name) for name in LOSSES[method]} == LOSSES[method]
    assert config.vllm_importance_sampling_correction is (method not in UNCORRECTED)
    assert config.max_grad_norm == 1.0
    assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.999)


def test_sdpo_thinks_not(tmp_path):
    trainer = make("SDPO", tmp_path)
    assert trainer.chat_template_kwargs == {"enable_thinking": False}


def teacher_texts(inputs, name="teacher"):
    """What the teacher reads before each completion; of wrong hints, before each of K."""
    length = inputs["completion_ids"].size(1)
    ids, mask = inputs[f"{name}_input_ids"], inputs[f"{name}_attention_mask"].bool()
    if ids.dim() == 3:
        rows = [
            {**inputs, f"{name}_input_ids": i, f"{name}_attention_mask": m}
            for i, m in zip(ids, mask)
        ]
        return [teacher_texts(row, name) for row in rows]
    return [TOKENIZER.decode(row[:-length][kept[:-length]]) for row, kept in zip(ids, mask)]


@pytest.mark.parametrize(
    ("method", "student", "expected"),
    [
        ("OPSD", official.opsd_student("Solve 2 + 2. "), official.opsd("Solve 2 + 2. ", SOLUTION)),
        ("RLSD", "\nSolve 2 + 2. ", official.rlsd("\nSolve 2 + 2. ", SOLUTION)),
        ("SDFT", "Solve 2 + 2. ", official.sdft("Solve 2 + 2. ", SOLUTION)),
    ],
)
def test_a_teachers_prompt_is_the_official_one(method, student, expected, tmp_path):
    rows = {"prompt": [student] * 8, "privileged_context": [SOLUTION] * 8}
    inputs = sample(make(method, tmp_path, data=Dataset.from_dict(rows)))
    assert teacher_texts(inputs) == [expected] * GROUP


def test_rlsds_teacher_reads_the_bare_question_where_a_column_has_it(tmp_path):
    rows = {
        "prompt": [[{"role": "user", "content": "[MATHEMATICS Tasks] Solve 2 + 2."}]] * 8,
        "problem": ["Solve 2 + 2."] * 8,
        "privileged_context": ["4"] * 8,
    }
    data = Dataset.from_dict(rows)
    inputs = sample(make("RLSD", tmp_path, data=data, question_column="problem"))
    turn = official.rlsd("Solve 2 + 2.", "4")
    assert teacher_texts(inputs) == [f"user: {turn}\nassistant: "] * GROUP
    with pytest.raises(
        ValueError, match="question_column must name a column of texts, got None in"
    ):
        sample(make("RLSD", tmp_path, data=data, question_column="question"))


def rlcsd(tmp_path, texts, rewards, *, data=None, **settings):
    """A trainer and a batch whose rollouts have these texts and rewards."""
    methods = (ours.RLCSDTrainer, ours.RLCSDConfig)
    given = {"reward_funcs": lambda prompts, **_: rewards}
    student = official.opsd_student("Solve 2 + 2.")
    rows = {"prompt": [student] * 8, "answer": ["42"] * 8} if data is None else data
    trainer = make_with(methods, tmp_path, Dataset.from_dict(rows), **given, **settings)
    inputs = sample(trainer)
    return trainer, rebuilt(trainer, inputs, texts)


def make_with(pair, tmp_path, data, *, reward_funcs, **settings):
    class Rewarded(pair[0]):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, reward_funcs=reward_funcs, **kwargs)

    return make((Rewarded, pair[1]), tmp_path, data=data, **settings)


def rebuilt(trainer, inputs, texts):
    trainer.scored = dataclasses.replace(trainer.scored, texts=texts)
    return {**inputs, **trainer.teacher_contexts.build(inputs)}


def hint(text, answer):
    return official.rlcsd("Solve 2 + 2.", text, answer)


BOXED = [" So \\boxed{4}.\n", "<think>Hm.</think> \\boxed{5}", "Six.", "\\boxed{7}"]


def test_rlcsd_never_shows_a_sole_success_its_own_text(tmp_path):
    trainer, inputs = rlcsd(tmp_path, BOXED, [1.0, 0.0, 0.0, 0.0])
    assert inputs["self_distillation_mask"].tolist() == [0, 1, 1, 1]
    assert teacher_texts(inputs)[1:] == [hint(BOXED[0], "4")] * 3
    assert official.opsd_student("Solve 2 + 2.") == teacher_texts(inputs)[0], "nothing to show"
    logged = trainer._metrics["train"]
    assert logged["self_distillation/correct_hint_fraction"][-1] == 0.75
    assert logged["self_distillation/answered_fraction"][-1] == 0.75


def test_rlcsds_wrong_hints_keep_their_thoughts_and_have_an_answer(tmp_path):
    _, inputs = rlcsd(tmp_path, BOXED, [1.0, 0.0, 0.0, 0.0])
    wrong = teacher_texts(inputs, "wrong")
    five, seven = hint(BOXED[1], "5"), hint(BOXED[3], "7")
    shown = [
        {text for text, real in zip(row, mask) if real}
        for row, mask in zip(wrong, inputs["wrong_mask"])
    ]
    # the third has no box: it is nobody's hint, and learns from the two others
    assert shown == [{five, seven}, {seven}, {five, seven}, {five}]


def test_rlcsd_takes_an_answer_from_the_data_for_a_success_without_a_box(tmp_path):
    texts = ["It is 42.", "\\boxed{5}", "\\boxed{}", "Six."]
    _, inputs = rlcsd(tmp_path, texts, [1.0, 0.0, 1.0, 0.0])
    assert teacher_texts(inputs)[0] == hint("\\boxed{}", "42")
    assert teacher_texts(inputs)[2] == hint("It is 42.", "42")
    unknown = {"prompt": ["Solve 2 + 2."] * 8}
    _, inputs = rlcsd(
        tmp_path, ["It is 42.", "\\boxed{5}", "\\boxed{6}", "Six."], [1.0, 0, 0, 0], data=unknown
    )
    assert inputs["self_distillation_mask"].tolist() == [0, 0, 0, 0]


def test_rlcsd_counts_any_reward_above_0_as_a_success(tmp_path):
    texts = ["\\boxed{4}", "\\boxed{5}", "\\boxed{6}", "\\boxed{7}"]
    _, inputs = rlcsd(tmp_path, texts, [0.1, 0.0, -0.5, None])
    # a rollout without a verdict is on neither side
    assert inputs["self_distillation_mask"].tolist() == [0, 1, 1, 0]
    assert inputs["wrong_mask"].sum(1).tolist() == [2, 1, 1, 2]


def test_rlcsd_draws_its_hints_at_random_and_again_the_same(tmp_path):
    texts = [f"\\boxed{{{n}}}" for n in range(8)]
    rewards = [1.0] * 4 + [0.0] * 4
    settings = {"per_device_train_batch_size": 8, "num_generations": 8, "max_wrong_hints": 2}
    data = {"prompt": ["Solve 2 + 2."] * 8, "answer": ["42"] * 8}
    trainer = make_with(
        (ours.RLCSDTrainer, ours.RLCSDConfig),
        tmp_path,
        Dataset.from_dict(data),
        reward_funcs=lambda prompts, **_: rewards,
        **settings,
    )
    inputs = sample(trainer, rows=[0] * 8)
    drawn, again = (teacher_texts(rebuilt(trainer, inputs, texts)) for _ in range(2))
    assert drawn == again
    assert len(set(drawn[4:])) > 1, "the failures do not all see one success"
    trainer.state.global_step += 1
    assert teacher_texts(rebuilt(trainer, inputs, texts)) != drawn
    for row, mask in zip(
        teacher_texts(rebuilt(trainer, inputs, texts), "wrong"), inputs["wrong_mask"]
    ):
        assert len({text for text, real in zip(row, mask) if real}) == int(mask.sum())


def test_rlcsds_reference_hint_has_the_answer_of_the_data(tmp_path):
    rows = {
        "prompt": ["Solve 2 + 2."] * 8,
        "privileged_context": ["2 + 2 is 4."] * 8,
        "answer": ["4"] * 8,
    }
    settings = {"correct_hint": "reference"}
    _, inputs = rlcsd(tmp_path, BOXED, [1.0, 0.0, 0.0, 0.0], data=rows, **settings)
    assert teacher_texts(inputs) == [hint("2 + 2 is 4.", "4")] * GROUP
    del rows["answer"]
    with pytest.raises(ValueError, match="answer_column must name a column with the answer"):
        rlcsd(tmp_path, BOXED, [1.0, 0.0, 0.0, 0.0], data=rows, **settings)


def thinker(tmp_path, **settings):
    return make("RLSD", tmp_path, max_completion_length=40, teacher_model_kind="live", **settings)


def thinking(trainer, inputs, said="So <thought>2+2</thought>4"):
    """The batch with a scripted completion in its first row."""
    ids = TOKENIZER(said, add_special_tokens=False)["input_ids"]
    length = inputs["completion_ids"].size(1)
    assert len(ids) <= length
    inputs["completion_ids"][0, : len(ids)] = torch.tensor(ids)
    completions = [ids, *trainer.scored.completion_ids[1:]]
    texts = [said, *trainer.scored.texts[1:]]
    trainer.scored = dataclasses.replace(trainer.scored, completion_ids=completions, texts=texts)
    return inputs | trainer.more_inputs(trainer.teacher_contexts._rollouts(inputs), inputs), ids


def test_rlsd_weighs_thoughts_alone(tmp_path):
    trainer = thinker(tmp_path, thought_only=True, evidence_decay_steps=0)
    inputs, ids = thinking(trainer, sample(trainer))
    mask = inputs["thought_mask"]
    inside = [TOKENIZER.decode([token]) for token, kept in zip(ids, mask[0]) if kept]
    assert "".join(inside) == "2+2"
    mix = trainer.evidence(inputs).mix
    assert torch.equal(mix, 0.5 * mask.double())


def test_rlsd_outside_of_thoughts_is_grpo(tmp_path):
    trainer = thinker(tmp_path, thought_only=True)
    inputs = sample(trainer)
    nothing, everything = (
        inputs | {"thought_mask": torch.full_like(inputs["thought_mask"], value)}
        for value in (False, True)
    )
    outside = loss_and_gradients(trainer, nothing)[1]
    inside = loss_and_gradients(trainer, everything)[1]
    trainer.args.thought_only = False
    whole = loss_and_gradients(trainer, inputs)[1]
    trainer.args.evidence_mix = 0.0
    grpo = loss_and_gradients(trainer, inputs)[1]
    for name, gradient in whole.items():
        assert_close(inside[name], gradient, torch.float64, name)
        assert_close(outside[name], grpo[name], torch.float64, name)
    assert any((whole[name] - grpo[name]).abs().max() > 1e-6 for name in whole)


def test_rlsd_refuses_thoughts_that_nobody_asks_for(tmp_path):
    with pytest.raises(ValueError, match="thought_only must be False where reprompt_template asks"):
        make("RLSD", tmp_path, thought_only=True, reprompt_template="{prompt} {privileged}")
