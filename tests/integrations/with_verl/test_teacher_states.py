"""What the trainer and the engine do with a teacher's states, without its workers."""

import pytest
import torch
from chat_tokenizer import tokenizer
from omegaconf import OmegaConf
from recipes_config import composed
from tensordict import TensorDict
from transformers import PreTrainedTokenizerFast, Qwen3Config
from verl.trainer.ppo.utils import Role

from fused_sd import LMHead
from fused_sd.integrations.verl import teacher_states
from fused_sd.integrations.verl.packed_rows import matching_rows, predicting_rows
from fused_sd.integrations.verl.teacher_group import check_vocabulary, share_out
from fused_sd.integrations.verl.teacher_sequences import jagged
from fused_sd.integrations.verl.teacher_states import GroupTeacher, states_at
from fused_sd.integrations.verl.trainer import SelfDistillationSync, self_distillation_config

PROMPTS, CONTEXTS = (3, 2, 4), (5, 2, 1)
MASKS = ([1, 0, 1, 1], [1, 1], [0, 1, 0])
TAUGHT = (True, False, True)


def micro_batch():
    """Each state is (sample, token of the response) where the mask counts it."""
    states = [
        [[n, place] for place, kept in enumerate(mask) if kept] if taught else []
        for n, (mask, taught) in enumerate(zip(MASKS, TAUGHT))
    ]
    own, shown = (
        [torch.arange(prompt + len(mask)) for prompt, mask in zip(prompts, MASKS)]
        for prompts in (PROMPTS, CONTEXTS)
    )
    columns = {
        "input_ids": own,
        "teacher_input_ids": shown,
        "responses": [torch.tensor(mask) for mask in MASKS],
        "response_mask": [torch.tensor(mask) for mask in MASKS],
        teacher_states.STATES: [torch.tensor(one).reshape(-1, 2).float() for one in states],
    }
    fields = {name: jagged(rows) for name, rows in columns.items()}
    return TensorDict(fields, batch_size=len(MASKS))


def test_each_row_gets_the_state_that_predicts_its_token():
    batch = micro_batch()
    rows = predicting_rows(batch)
    offsets = [batch[name].offsets() for name in ("input_ids", "teacher_input_ids")]
    shown = matching_rows(rows, *offsets)
    wanted = [[0, 0], [0, 2], [0, 3], [0, 0], [0, 0], [2, 1]]  # the second sample has none
    assert states_at(batch, shown).tolist() == wanted
    part = torch.tensor([1, 5])  # as a rank of a sequence-parallel group asks
    assert states_at(batch, shown[part]).tolist() == [wanted[1], wanted[5]]
    assert states_at(batch, shown[:0]).shape == (0, 2)


def test_states_of_other_tokens_are_refused():
    batch = micro_batch()
    batch["response_mask"] = jagged([torch.ones(len(mask)) for mask in MASKS])
    with pytest.raises(
        ValueError, match=r"teacher_states must hold a state for each token.*\[3, 0"
    ):
        states_at(batch, torch.tensor([4]))
    del batch[teacher_states.STATES]
    with pytest.raises(ValueError, match="trainer_mode=fused_sd_sync"):
        states_at(batch, torch.tensor([4]))


@pytest.mark.parametrize("rows_of_the_teacher", [6, 8, 5])
def test_the_teachers_head_is_cut_to_the_students_tokens(rows_of_the_teacher, monkeypatch):
    head = LMHead(torch.randn(rows_of_the_teacher, 2), softcap=3.0)
    monkeypatch.setattr(teacher_states, "received_head", lambda: head)
    batch = micro_batch()
    teacher = GroupTeacher()
    local = teacher.rows(batch, torch.tensor([4]))
    assert teacher.head.weight is head.weight
    student = torch.randn(1, 3), LMHead(torch.randn(6, 3))
    if rows_of_the_teacher < 6:
        with pytest.raises(ValueError, match="predicts the student's 6 tokens, got 5 tokens"):
            local(*student)
        return
    states, found = local(*student)
    assert states.tolist() == [[0, 0]]
    assert (found.num_tokens, found.softcap) == (6, 3.0)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize(
    "lengths, max_tokens",
    [([5, 4, 3, 3, 2, 2, 1], 8), ([9, 1, 1], 4), ([2], 8), ([7] * 6, 7), ([1] * 50, 10)],
)
def test_sequences_are_dealt_out_evenly(lengths, max_tokens, num_workers):
    shares = share_out(lengths, num_workers, max_tokens)
    assert len(shares) == num_workers
    assert len({len(share) for share in shares}) == 1, "or a collective would wait for ever"
    forwards = [forward for share in shares for forward in share]
    assert sorted(n for forward in forwards for n in forward) == list(range(len(lengths)))
    for forward in forwards:
        assert len(forward) <= 1 or sum(lengths[n] for n in forward) <= max_tokens


def saved(folder, vocab_size, added=()):
    Qwen3Config(vocab_size=vocab_size).save_pretrained(folder)
    words = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer().backend_tokenizer).from_str(
            tokenizer().backend_tokenizer.to_str()
        )
    )
    words.add_tokens(list(added))
    words.save_pretrained(folder)
    return str(folder), words


def test_a_teacher_must_know_the_students_tokens(tmp_path):
    student, words = saved(tmp_path / "student", 128, ["<a>", "<b>"])
    model = OmegaConf.create({"path": student})
    more, _ = saved(tmp_path / "more", 160, ["<a>", "<b>", "<c>"])
    check_vocabulary(more, model, words)
    swapped, _ = saved(tmp_path / "swapped", 128, ["<b>", "<a>"])
    with pytest.raises(ValueError, match=r"by the same ids, got 2 of \d+ .*such as '<a>'"):
        check_vocabulary(swapped, model, words)
    fewer, _ = saved(tmp_path / "fewer", 120, ["<a>", "<b>"])
    with pytest.raises(ValueError, match="predicts the student's 128 tokens, got 120 tokens"):
        check_vocabulary(fewer, model, words)


@pytest.mark.parametrize("nnodes, pool", [(0, "global_pool"), (1, "teacher_pool")])
def test_the_teacher_has_a_pool_of_its_own_or_the_students(nnodes, pool, monkeypatch):
    from fused_sd.integrations.verl import teacher_group

    monkeypatch.setattr(teacher_group, "check_vocabulary", lambda *given: None)
    trainer = SelfDistillationSync(composed("opd", f"distillation.nnodes={nnodes}"))
    trainer.tokenizer, trainer.processor = tokenizer(), None
    trainer._init_resource_pool_mgr()
    manager = trainer.resource_pool_manager
    assert manager.mapping[Role.TeacherModel] == pool
    assert set(manager.resource_pool_spec) == {"global_pool", pool}
    assert trainer.self_distillation.has_own_pool == bool(nnodes)
    assert not trainer.use_teacher_policy, "no server is started"


@pytest.mark.parametrize(
    "recipe, overrides, message",
    [
        ("opd", ["worker_group.model_path=null"], "worker_group.model_path must name the teacher"),
        ("opd", ["worker_group.dtype=int8"], "worker_group.dtype must be one of 'bf16'"),
        ("opd", ["worker_group.max_token_len_per_gpu=0"], "must be an integer"),
        (
            "opd",
            ["teacher_models.teacher_model.model_path=other"],
            "teacher_models must be left out .* got other",
        ),
        ("opd", ["scored_by=worker"], 'be "engine" for a divergence'),
        ("opd", ["distillation_loss.teacher_sync_steps=5"], "teacher_sync_steps must be left"),
        ("opd", ["distillation_loss.ema_rate=0.5"], "ema_rate must be left as it is"),
        ("opd", ["distillation_loss.trust_region_mix=0.5"], "trust_region_mix must be left"),
        ("sdpo", ["worker_group.model_path=other"], "worker_group must be left as it is unless"),
        ("opd", ["distillation_loss.teacher=server"], "worker_group must be left as it is unless"),
    ],
)
def test_what_does_not_go_with_a_worker_group_is_refused(recipe, overrides, message):
    if overrides == ["distillation_loss.teacher=server"]:
        overrides = [*overrides, "distillation_loss.support=teacher_topk"]
    config = composed(recipe, *(f"distillation.{override}" for override in overrides))
    with pytest.raises(Exception, match=message) as raised:
        self_distillation_config(config)
    assert "ValueError" in repr(raised.value)


def test_a_student_with_images_is_refused():
    trainer = object.__new__(SelfDistillationSync)
    trainer.self_distillation = self_distillation_config(composed("opd"))
    trainer.processor = object()
    with pytest.raises(ValueError, match="be in the training process for a student that sees"):
        trainer._place_teacher_group()
