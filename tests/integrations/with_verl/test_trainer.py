"""The trainer's stage on samples in a real transfer queue, between verl's own stages.

verl's whole loop needs an inference server and GPUs; here the workers are played by functions.
"""

import pytest
import ray
import torch
import transfer_queue as tq
from chat_tokenizer import ids, text, tokenizer
from recipes_config import composed
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1.trainer_base import get_trainer_cls
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from fused_sd.integrations.verl import trainer as module
from fused_sd.integrations.verl.contexts import PromptTokenizer
from fused_sd.integrations.verl.trainer import SelfDistillationSync, self_distillation_config
from fused_sd.integrations.verl.worker_scores import TEACHER_PARTITION

QUESTIONS = ("1+1?", "2+2?")
# the responses of two sessions each, their rewards and what the reward function says
SESSIONS = (
    (("3", 0.0, "Too large."), ("<think>hm</think> It is 2.", 1.0, "")),
    (("5", 0.0, ""), ("6", 0.0, "Too large by 2.")),
)
ANSWERS = ("two", "four")
WORDS = PromptTokenizer(tokenizer())


@pytest.fixture(scope="module", autouse=True)
def queue():
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    settings = composed("sdpo").transfer_queue
    settings.enable = True
    settings.backend.SimpleStorage.num_data_storage_units = 1
    tq.init(settings)
    yield
    tq.close()
    ray.shutdown()


def prompt_of(question):
    return [{"role": "user", "content": question}]


def sample(question, answer, response, reward, feedback):
    prompt = WORDS.chat(prompt_of(question))
    tokens = [*ids(response), tokenizer().eos_token_id]
    scores = torch.zeros(len(tokens))
    scores[-1] = reward
    return {
        "prompts": torch.tensor(prompt),
        "responses": torch.tensor(tokens),
        "input_ids": torch.tensor([*prompt, *tokens]),
        "position_ids": torch.arange(len(prompt) + len(tokens)),
        "response_mask": torch.ones(len(tokens), dtype=torch.int64),
        "loss_mask": torch.ones(len(tokens), dtype=torch.int64),
        "rm_scores": scores,
        "rollout_log_probs": -torch.ones(len(tokens)),
        "old_log_probs": -torch.arange(1, len(tokens) + 1) / 4,
        "raw_prompt": prompt_of(question),
        "reward_model": {"ground_truth": answer},
        "extra_fields": {"reward_extra_info": {"feedback": feedback}},
        "multi_modal_inputs": {},
        "num_turns": 2,
    }


@pytest.fixture
def batch(queue):
    rows, keys = [], []
    for question, answer, sessions in zip(QUESTIONS, ANSWERS, SESSIONS):
        for place, session in enumerate(sessions):
            uid = f"uid-{question}"
            rows.append({**sample(question, answer, *session), "uid": uid, "session_id": place})
            keys.append(f"{uid}_{place}_0")
    tags = [{"seq_len": len(row["input_ids"])} for row in rows]
    fields = list_of_dict_to_tensordict(rows)
    tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)
    meta = KVBatchMeta(keys=keys, tags=tags, partition_id="train")
    meta = upsample_batch_to_divisible_size(meta, 6, tokenizer().eos_token_id)
    order = [3, 0, 5, 1, 2, 4]  # as after verl's balancing
    meta.reorder(order)
    yield meta
    tq.kv_clear(keys=meta.keys, partition_id="train")


class Workers:
    """verl's log-probability pass: each token's place in the vocabulary stands for the model."""

    def __init__(self, scale):
        self.scale, self.seen = scale, []

    def compute_log_prob(self, meta):
        data = tq.kv_batch_get(keys=meta.keys, partition_id=meta.partition_id)
        self.seen.append((data, dict(meta.extra_info)))
        rows = [torch.roll(row, -1) / self.scale for row in data["input_ids"].unbind()]
        jagged = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        fields = data.empty()
        fields["log_probs"] = jagged
        tq.kv_batch_put(keys=meta.keys, partition_id=meta.partition_id, fields=fields)
        return meta

    compute_ref_log_prob = compute_log_prob


def stage(recipe, *overrides, **attributes):
    """A trainer whose workers were not started."""
    trainer = object.__new__(SelfDistillationSync)
    trainer.config = composed(recipe, *overrides)
    trainer.self_distillation = self_distillation_config(trainer.config)
    trainer.tokenizer, trainer.prompt_tokenizer = tokenizer(), WORDS
    trainer.timing_raw, trainer.ref_in_actor, trainer.use_reference_policy = {}, False, False
    trainer.global_steps = 1
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def run(trainer, batch):
    """By sample: what the stage wrote; and its metrics."""
    metrics = {}
    trainer._compute_advantage(batch, metrics)
    data = tq.kv_batch_get(keys=batch.keys, partition_id="train")
    columns = {
        name: value.unbind() if value.is_nested else value
        for name, value in data.items()
        if isinstance(value, torch.Tensor)
    }
    found = {
        key: {name: column[n] for name, column in columns.items()}
        for n, key in enumerate(batch.keys)
    }
    return found, metrics


def shown(row):
    """The teacher's prompt, and what follows it."""
    length = len(row["teacher_input_ids"]) - len(row["responses"])
    assert torch.equal(row["teacher_position_ids"], torch.arange(length + len(row["responses"])))
    return text(row["teacher_input_ids"][:length]), row["teacher_input_ids"][length:]


def test_sdpo_shows_each_sample_its_siblings_or_feedback(batch):
    found, metrics = run(stage("sdpo"), batch)
    one, two = (f"uid-{question}" for question in QUESTIONS)
    for row in found.values():
        assert torch.equal(shown(row)[1], row["responses"])
        assert "advantages" in row, "verl's own stage has run"
    failure, success = found[f"{one}_0_0"], found[f"{one}_1_0"]
    expected = "1+1?\nCorrect solution:\n\nIt is 2.\n\nCorrectly solve the original question."
    assert shown(failure)[0] == text(WORDS.chat(prompt_of(expected)))
    # a lone success has nothing to see, an unsaid feedback shows nothing
    for silent in (success, found[f"{two}_0_0"]):
        assert shown(silent)[0] == text(silent["prompts"])
    assert "Too large by 2." in shown(found[f"{two}_1_0"])[0]
    taught = {f"{one}_0_0", f"{two}_1_0"}
    for key, row in found.items():
        assert row["self_distillation_mask"] == float(key in taught), key
        # verl's denominator counts the tokens that are taught
        assert row["loss_mask"].tolist() == [int(key in taught)] * len(row["responses"])
        padding = key.startswith("pad")
        assert row["response_mask"].tolist() == [int(not padding)] * len(row["responses"])
    assert metrics["self_distillation/context_fraction"] == 2 / 4
    assert metrics["self_distillation/truncated_fraction"] == 0
    assert metrics["self_distillation/feedback_available_fraction"] == 2 / 4
    with pytest.raises(ValueError, match="got 'hint', and the function returns feedback; return"):
        run(stage("sdpo", "distillation.feedback_key=hint"), batch)


def test_a_limit_cuts_the_teachers_prompt(batch):
    found, metrics = run(stage("sdpo", "distillation.max_prompt_length=30"), batch)
    row = found[f"uid-{QUESTIONS[0]}_0_0"]
    assert len(shown(row)[0].replace("<|im_start|>", "^").replace("<|im_end|>", "$")) == 30
    assert shown(row)[0].endswith("<|im_start|>assistant\n")
    assert metrics["self_distillation/truncated_fraction"] == 1


def test_beside_a_policy_loss_every_token_stays_in_the_denominator(batch):
    found, _ = run(stage("sdpo", "distillation.distillation_loss.use_task_rewards=True"), batch)
    for row in found.values():
        assert torch.equal(row["loss_mask"], row["response_mask"])


def test_opsd_and_rlsd_show_the_reference(batch):
    for recipe, words in (("opsd", "articulate your own"), ("rlsd", "your own approach below.")):
        key = "distillation.reference_key=reward_model.ground_truth"
        found, metrics = run(stage(recipe, key), batch)
        for question, answer in zip(QUESTIONS, ANSWERS):
            for place in range(2):
                prompt = shown(found[f"uid-{question}_{place}_0"])[0]
                assert answer in prompt
                assert words in prompt
        assert metrics["self_distillation/context_fraction"] == 1
        masks = {key: float(row["self_distillation_mask"]) for key, row in found.items()}
        assert {key for key, mask in masks.items() if not mask} == {
            key for key in masks if key.startswith("pad")
        }


def test_sd_zero_shows_the_response_and_the_verdict(batch):
    found, _ = run(stage("sd_zero"), batch)
    one = f"uid-{QUESTIONS[0]}"
    wrong, right = (found[f"{one}_{place}_0"] for place in range(2))
    start = text(wrong["prompts"])
    phrase = "Wait, this response is wrong. Let me correct it."
    assert shown(wrong)[0] == f"{start}3<|im_end|>\n\n{phrase}\n\n"
    attempt = "<think>hm</think> It is 2.<|im_end|>"
    assert shown(right)[0] == f"{start}{attempt}\n\nLet me rephrase the above solution.\n\n"


def test_a_worker_scores_the_privileged_sequences_for_rlsd(batch):
    settings = (
        "distillation.distillation_loss.teacher=live",
        "distillation.distillation_loss.teacher_sync_steps=1",
        "distillation.scored_by=worker",
        "distillation.distillation_loss.rlsd_mix_decay_steps=0",
    )
    policy = Workers(scale=-1000.0)
    found, _ = run(stage("rlsd", *settings, actor_rollout_wg=policy), batch)
    ((data, asked),) = policy.seen
    assert asked["temperature"] == 1.0
    assert not asked["compute_loss"]
    assert any("two" in text(row) for row in data["input_ids"].unbind())
    for key, row in found.items():
        assert "teacher_input_ids" not in row
        scores = row["teacher_logprobs"][:, 0]
        first, last = len(row["prompts"]) - 1, len(scores) - 1
        assert torch.equal(scores[:first], torch.zeros(first))
        assert scores[last] == 0
        has_context = not key.startswith("pad")
        # a sample without a context: the weight of its evidence is 1
        known = row["responses"] / -1000.0 if has_context else row["old_log_probs"]
        torch.testing.assert_close(scores[first:last], known, rtol=0, atol=0)
        assert row["self_distillation_mask"] == float(has_context)
    assert not tq.kv_list(TEACHER_PARTITION).get(TEACHER_PARTITION), "cleared"


def give(batch, reward):
    """Give all samples but verl's padding one reward."""
    keys = [key for key in batch.keys if not key.startswith("pad")]
    data = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["responses"])
    rows = [{"rm_scores": torch.full((len(row),), reward)} for row in data["responses"].unbind()]
    tq.kv_batch_put(keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(rows))


@pytest.mark.parametrize(
    "recipe, reward", [("rlsd", torch.nan), ("rlsd", torch.inf), ("sd_zero", torch.inf)]
)
def test_a_reward_that_nobody_can_learn_from_stops_the_run(batch, recipe, reward):
    give(batch, reward)
    with pytest.raises(ValueError, match=f"must return finite numbers.* got {reward} for sample"):
        run(stage(recipe), batch)


@pytest.mark.parametrize("recipe", ["sdpo", "sd_zero"])
def test_no_verdict_is_neither_right_nor_wrong(batch, recipe):
    give(batch, torch.nan)
    found, metrics = run(stage(recipe, "distillation.feedback_key=null"), batch)
    assert metrics["self_distillation/context_fraction"] == 0
    assert not any(row["loss_mask"].any() for row in found.values())


@pytest.mark.parametrize("step, mix", [(1, 0.5 * 59 / 60), (31, 0.5 * 29 / 60), (61, 0.0)])
def test_rlsds_mix_falls_with_the_training_steps(batch, step, mix):
    found, metrics = run(stage("rlsd", global_steps=step), batch)
    assert metrics["self_distillation/evidence_mix"] == pytest.approx(mix)
    for row in found.values():
        assert float(row["evidence_mix"]) == pytest.approx(mix)


def test_a_worker_has_no_reference_of_a_run_that_starts_from_an_adapter():
    """The model without its adapter is not what such a run starts from; the engine has that."""
    settings = (
        "distillation.distillation_loss.teacher_sync_steps=1",
        "actor_rollout_ref.model.lora_rank=4",
        "actor_rollout_ref.model.lora_adapter_path=phase1",
    )
    worker, engine = (f"distillation.scored_by={scorer}" for scorer in ("worker", "engine"))
    reference, live = (
        f"distillation.distillation_loss.teacher={teacher}" for teacher in ("reference", "live")
    )
    trainer = stage("rlsd", *settings, worker, reference, ref_in_actor=True)
    with pytest.raises(ValueError, match=r"lora_adapter_path must be left out .*got 'phase1'"):
        trainer._check_reference_worker()
    for allowed in ((engine, reference), (worker, live)):
        stage("rlsd", *settings, *allowed, ref_in_actor=True)._check_reference_worker()


def test_a_reference_worker_scores_where_there_is_one(batch):
    settings = (
        "distillation.distillation_loss.teacher=reference",
        "distillation.distillation_loss.teacher_sync_steps=1",
        "distillation.scored_by=worker",
    )
    trainer = stage("rlsd", *settings)
    with pytest.raises(ValueError, match='have a reference worker for "reference"'):
        trainer._check_reference_worker()
    policy, reference = Workers(1.0), Workers(-500.0)
    trainer = stage("rlsd", *settings, actor_rollout_wg=policy, ref_policy_wg=reference)
    trainer.use_reference_policy = True
    trainer._check_reference_worker()
    run(trainer, batch)
    assert (len(policy.seen), len(reference.seen)) == (0, 1)
    adapted = Workers(-500.0)
    trainer = stage("rlsd", *settings, actor_rollout_wg=adapted, ref_in_actor=True)
    run(trainer, batch)
    assert adapted.seen[0][1]["no_lora_adapter"] is True


def test_a_prompt_that_the_teacher_tokenises_otherwise_is_refused(batch):
    trainer = stage("sdpo")
    other = tokenizer().chat_template.replace("<|im_start|>", "")
    trainer.prompt_tokenizer = PromptTokenizer(tokenizer(), {"chat_template": other})
    with pytest.raises(ValueError, match="be tokenised by the teacher as it was by the rollout"):
        run(trainer, batch)
    free = stage("sdpo", "distillation.check_prompts=False")
    free.prompt_tokenizer = trainer.prompt_tokenizer
    assert run(free, batch)[1]["self_distillation/context_fraction"] == 2 / 4


def test_a_reference_that_is_nowhere_is_refused(batch):
    with pytest.raises(ValueError, match="reference_key must begin with a column, got answers"):
        run(stage("opsd", "distillation.reference_key=answers.whole"), batch)
    with pytest.raises(ValueError, match="'proof' is not among ground_truth; name one of them"):
        run(stage("opsd", "distillation.reference_key=reward_model.proof"), batch)


def test_later_outputs_of_a_session_are_taught(batch):
    """What a session said in all of its outputs teaches the others, and each output learns."""
    one = f"uid-{QUESTIONS[0]}"
    first, sibling = f"{one}_1_0", f"{one}_0_0"
    (start,) = tq.kv_batch_get(
        keys=[first], partition_id="train", select_fields=["prompts", "responses"]
    )
    turns = "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    prompt = [*start["prompts"].tolist(), *start["responses"].tolist(), *ids(turns)]
    later = sample(QUESTIONS[0], ANSWERS[0], "Yes, 2.", 1.0, "")
    elsewhere = sample("And now?", ANSWERS[0], "Yes!", 1.0, "")
    rows = [
        {**later, "prompts": torch.tensor(prompt)},
        {**elsewhere, "raw_prompt": prompt_of(QUESTIONS[0])},
        sample(QUESTIONS[0], ANSWERS[0], "It is two.", 1.0, ""),
    ]
    keys = [f"{one}_1_1", f"{one}_3_1", f"{one}_3_0"]
    places = (1, 3, 3)
    rows = [{**row, "uid": one, "session_id": place} for row, place in zip(rows, places)]
    tq.kv_batch_put(keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(rows))
    tag = batch.tags[batch.keys.index(first)]
    meta = KVBatchMeta(keys=[*keys, sibling, first], tags=[tag] * 5, partition_id="train")
    found, metrics = run(stage("sdpo"), meta)

    def asked(solution):
        filled = f"1+1?\nCorrect solution:\n\n{solution}\n\nCorrectly solve the original question."
        return text(WORDS.chat(prompt_of(filled)))

    # the first success in the order of sessions, without its thoughts, with its turns
    whole = "It is 2.\nuser\nSure?\nassistant\nYes, 2."
    assert shown(found[sibling])[0] == asked(whole)
    # the other success is in the session whose last output begins another conversation
    assert shown(found[first])[0] == asked("Yes!")
    said = "<think>hm</think> It is 2.<|im_end|>"
    assert shown(found[keys[0]])[0] == asked("Yes!") + said + turns
    assert text(shown(found[keys[0]])[1]) == "Yes, 2.<|im_end|>"
    assert shown(found[keys[2]])[0] == asked(whole)
    assert shown(found[keys[1]])[0] == text(WORDS.chat(prompt_of("And now?"))), "not taught"
    masks = {key: float(row["self_distillation_mask"]) for key, row in found.items()}
    assert masks == {key: float(key != keys[1]) for key in meta.keys}
    assert found[keys[0]]["loss_mask"].all()
    assert not found[keys[1]]["loss_mask"].any()
    assert metrics["self_distillation/context_fraction"] == 4 / 5
    assert metrics["self_distillation/compacted_fraction"] == 1 / 5
    tq.kv_clear(keys=keys, partition_id="train")


def test_verl_finds_the_trainers():
    module.register()
    module.register()
    for name, trainer in module.TRAINERS.items():
        assert get_trainer_cls(name) is trainer


CORRECTION = "algorithm.rollout_correction"


def as_updated(batch):
    """The columns that verl's workers read for the update, by sample."""
    from verl.utils.transferqueue_utils import _meta_to_realdata, kv_batch_meta2batch_meta

    data = _meta_to_realdata(kv_batch_meta2batch_meta(batch))
    return {
        key: {
            name: column.unbind()[n] if column.is_nested else column[n]
            for name, column in data.items()
            if isinstance(column, torch.Tensor)
        }
        for n, key in enumerate(batch.keys)
    }


@pytest.mark.parametrize("recipe", ["sdpo", "rlsd"])
def test_verls_correction_for_the_rollout_engine_reaches_the_update(batch, recipe):
    settings = (f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_rs=token_k1")
    trainer = stage(recipe, *settings, f"{CORRECTION}.rollout_rs_threshold=0.4_1.5")
    found = as_updated(trainer._compute_advantage(batch, {}))
    num_rejected = 0
    for key, row in found.items():
        if key.startswith("pad"):
            assert not row["loss_mask"].any()
            continue
        ratio = (row["old_log_probs"] - row["rollout_log_probs"]).exp()
        torch.testing.assert_close(row["rollout_is_weights"], ratio.clamp(max=2.0))
        kept = (1 / ratio >= 0.4) & (1 / ratio <= 1.5)  # verl's k1 is the log of the inverse
        assert row["response_mask"].tolist() == kept.tolist()
        counts = kept if recipe == "rlsd" or row["self_distillation_mask"] else kept & False
        assert row["loss_mask"].tolist() == counts.tolist()
        num_rejected += int((~kept).sum())
    assert num_rejected


@pytest.mark.parametrize("bypass_mode", [False, True])
def test_a_batch_without_the_rollout_engines_log_probs_is_not_left_uncorrected(queue, bypass_mode):
    """As of an agent loop that returns none; verl asks for them, see ``run_checks`` otherwise."""
    row = sample(QUESTIONS[0], ANSWERS[0], "2", 1.0, "")
    del row["rollout_log_probs"]
    keys, tags = ["lone_0_0"], [{"seq_len": len(row["input_ids"])}]
    fields = list_of_dict_to_tensordict([{**row, "uid": "lone", "entropy": 0.0 * row["input_ids"]}])
    tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)
    meta = KVBatchMeta(keys=keys, tags=tags, partition_id="train")
    trainer = stage("sdpo", f"{CORRECTION}.bypass_mode={bypass_mode}", actor_rollout_wg=Workers(1))
    with pytest.raises(KeyError, match="rollout_log_probs"):
        trainer._compute_old_log_prob(meta, {})
    tq.kv_clear(keys=keys, partition_id="train")
