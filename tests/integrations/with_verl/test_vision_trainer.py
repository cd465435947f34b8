"""The trainer's stage on samples with images in a real transfer queue."""

from unittest import mock

import pytest
import torch
import transfer_queue as tq
from test_trainer import Workers, queue, run, stage  # noqa: F401  the queue is a fixture
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from vision_samples import agent_loop_sample, question, verls_processor

from fused_sd.integrations.verl.contexts import PromptTokenizer

QUESTIONS = (("<red>", "What is this?"), ("What is 1+1?",), ("<blue>", "and ", "<green>", "?"))
ANSWERS = ("It is red.", "2", "Both are pictures.")
LIVE = (
    "distillation.reference_key=reward_model.ground_truth",
    "distillation.distillation_loss.teacher=live",
    "distillation.distillation_loss.teacher_sync_steps=1",
    "distillation.distillation_loss.rlsd_mix_decay_steps=0",
)


@pytest.fixture(scope="module", params=["Qwen2.5-VL", "Qwen3-VL"])
def processor(request):
    return verls_processor(request.param)


@pytest.fixture
def batch(queue, processor):  # noqa: F811
    rows, keys = [], []
    for place, (parts, answer) in enumerate(zip(QUESTIONS, ANSWERS)):
        sample = agent_loop_sample(processor, question(*parts), "red")
        count = len(sample["responses"])
        rows.append(
            {
                **sample,
                "uid": f"u{place}",
                "session_id": 0,
                "loss_mask": sample["response_mask"],
                "rm_scores": torch.ones(count) / count,
                "rollout_log_probs": -torch.ones(count),
                "old_log_probs": -torch.ones(count),
                "reward_model": {"ground_truth": answer},
                "extra_fields": {},
                "num_turns": 2,
            }
        )
        keys.append(f"u{place}_0_0")
    tags = [{"seq_len": len(row["input_ids"])} for row in rows]
    place = {"keys": keys, "partition_id": "train", "tags": tags}
    tq.kv_batch_put(**place, fields=list_of_dict_to_tensordict(rows))
    meta = upsample_batch_to_divisible_size(KVBatchMeta(**place), 4, 1)
    meta.reorder([2, 3, 0, 1])
    yield meta
    tq.kv_clear(keys=meta.keys, partition_id="train")


def seeing_stage(processor, *overrides, **attributes):
    trainer = stage("rlsd", *LIVE, *overrides, **attributes)
    trainer.tokenizer = processor.tokenizer
    trainer.prompt_tokenizer = PromptTokenizer(processor.tokenizer, {}, processor)
    return trainer


def test_the_teachers_prompts_hold_the_students_images(batch, processor):
    with mock.patch.object(tq, "kv_batch_get", wraps=tq.kv_batch_get) as get:
        trainer = seeing_stage(processor)
        trainer._add_teacher(batch, {})
    (call,) = get.call_args_list
    assert "multi_modal_inputs" not in call.kwargs["select_fields"], "nobody sends pixels"
    found, metrics = run(trainer, batch)
    assert metrics["self_distillation/context_fraction"] == 1
    assert metrics["self_distillation/left_out_fraction"] == 0
    for key, row in found.items():
        ids, positions = row["teacher_input_ids"], row["teacher_position_ids"]
        assert positions.shape == (len(ids), 4)
        assert torch.equal(ids[-len(row["responses"]) :], row["responses"])
        if key.startswith("pad"):
            assert torch.equal(ids, row["input_ids"])
            assert torch.equal(positions.t(), row["position_ids"])
            continue
        shown = processor.tokenizer.decode(ids)
        assert ANSWERS[int(key[1])] in shown
        assert shown.count("<|image_pad|>") == (8, 0, 12)[int(key[1])]
        assert len(ids) > len(row["input_ids"])


def test_a_long_prompt_with_images_gets_no_context(batch, processor):
    found, metrics = run(seeing_stage(processor, "distillation.max_prompt_length=100"), batch)
    assert metrics["self_distillation/left_out_fraction"] == 2 / 3
    assert metrics["self_distillation/truncated_fraction"] == 1
    masks = {key: float(row["self_distillation_mask"]) for key, row in found.items()}
    assert {key for key, mask in masks.items() if mask} == {"u1_0_0"}


def test_a_worker_scores_what_it_sees(batch, processor):
    policy = Workers(scale=-1000.0)
    trainer = seeing_stage(processor, "distillation.scored_by=worker", actor_rollout_wg=policy)
    found, _ = run(trainer, batch)
    ((data, _),) = policy.seen
    for n, key in enumerate(batch.keys):
        ids, positions = data["input_ids"].unbind()[n], data["position_ids"].unbind()[n]
        assert positions.shape == (4, len(ids))
        pixels = data["multi_modal_inputs"][n]
        pixels = getattr(pixels, "data", pixels)
        images = (ids == processor.image_token_id).sum()
        assert len(pixels.get("pixel_values", ())) == 4 * images, "four patches a token"
        if not key.startswith("pad"):
            scores = found[key]["teacher_logprobs"][:, 0]
            assert len(scores) == len(found[key]["input_ids"])
            first = len(found[key]["prompts"]) - 1
            assert torch.equal(scores[first:-1], found[key]["responses"] / -1000.0)


def test_a_prompt_with_images_that_the_teacher_writes_otherwise_is_refused(batch, processor):
    trainer = seeing_stage(processor)
    settings = {"chat_template": processor.chat_template.replace("assistant: ", "model: ")}
    trainer.prompt_tokenizer = PromptTokenizer(processor.tokenizer, settings, processor)
    with pytest.raises(ValueError, match=r"raw_prompt must be tokenised by the teacher"):
        run(trainer, batch)
