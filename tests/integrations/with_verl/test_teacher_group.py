"""A frozen teacher in a worker group of its own: verl's Ray workers and TransferQueue, on CPUs."""

import contextlib
import functools
from unittest import mock

import group_workers
import pytest
import ray
import torch
import transfer_queue as tq
from chat_tokenizer import tokenizer
from group_workers import ENVIRONMENT
from omegaconf import open_dict
from recipes_config import composed
from test_trainer import ANSWERS, QUESTIONS, SESSIONS, WORDS, sample
from transfer_queue import KVBatchMeta
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from fused_sd import LMHead
from fused_sd.integrations.verl import teacher_group, teacher_states
from fused_sd.integrations.verl.teacher_states import STATES
from fused_sd.integrations.verl.trainer import SelfDistillationSync, self_distillation_config

K, TEMPERATURE, VOCAB, D_TEACHER = 8, 0.8, 128, 48
ACTOR = "actor_rollout_ref.actor"
LOSS = "distillation.distillation_loss"
SIBLINGS = {
    "_target_": "fused_sd.integrations.verl.contexts.SiblingContext",
    "success_reward_threshold": 0.5,
}
FULL_JSD = (
    f"{LOSS}.divergence=jsd",
    f"{LOSS}.support=full",
    f"{LOSS}.topk=null",
    "distillation.max_prompt_length=200",
    "distillation.feedback_key=feedback",
)


def save(folder, name, **more):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(len(name))
    Qwen3ForCausalLM(Qwen3Config(**{**settings, **more})).save_pretrained(folder / name)
    tokenizer().save_pretrained(folder / name)
    return str(folder / name)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student and a larger teacher, whose head has padding rows that the student's has not."""
    folder = tmp_path_factory.mktemp("models")
    larger = {"hidden_size": D_TEACHER, "num_hidden_layers": 2, "vocab_size": VOCAB + 32}
    return {
        "student": save(folder, "student"),
        "teacher": save(folder, "teacher", **larger, tie_word_embeddings=True),
    }


def configured(models, *overrides, context=None):
    config = composed(
        "opd",
        f"actor_rollout_ref.model.path={models['student']}",
        "actor_rollout_ref.model.enable_gradient_checkpointing=false",
        f"distillation.worker_group.model_path={models['teacher']}",
        "distillation.worker_group.dtype=fp32",
        "distillation.worker_group.max_token_len_per_gpu=100",
        f"{ACTOR}.fsdp_config.use_torch_compile=false",
        f"{ACTOR}.optim.optimizer=SGD",  # with a rate of 1 it shows the gradients
        f"{ACTOR}.optim.lr=1.0",
        f"{ACTOR}.optim.weight_decay=0",
        f"{ACTOR}.optim.total_training_steps=9",
        f"{ACTOR}.optim.clip_grad=1e9",
        f"{ACTOR}.ppo_mini_batch_size=4",
        f"{ACTOR}.ppo_max_token_len_per_gpu=100",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=100",
        f"actor_rollout_ref.rollout.temperature={TEMPERATURE}",
        "trainer.device=cpu",
        f"{LOSS}.topk={K}",
        *overrides,
    )
    with open_dict(config):
        precision = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
        config.actor_rollout_ref.actor.fsdp_config.mixed_precision = precision
        config.actor_rollout_ref.model.override_config = {"attn_implementation": "eager"}
        if context is not None:
            config.distillation.context = context
    return config


def pool_of(num_processes):
    return RayResourcePool([num_processes], use_gpu=False, max_colocate_count=1)


class Pools:
    """verl's manager of resource pools, for the teacher: two processes without GPUs."""

    def __init__(self):
        self.mapping = {}

    def get_resource_pool(self, role):
        assert self.mapping[role] == "global_pool"
        return pool_of(2)


def bare_trainer(config, **attributes):
    trainer = object.__new__(SelfDistillationSync)
    trainer.tokenizer, trainer.prompt_tokenizer, trainer.processor = tokenizer(), WORDS, None
    trainer.timing_raw, trainer.global_steps = {}, 1
    trainer.resource_pool_manager = Pools()
    follow(trainer, config)
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def follow(trainer, config):
    trainer.config = config
    trainer.self_distillation = trainer.distillation_config = self_distillation_config(config)


@pytest.fixture(scope="module")
def trainer(models):
    """A trainer with worker groups: the teacher's two processes, and the student's one."""
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": ENVIRONMENT},
    )
    config = configured(models)
    settings = config.transfer_queue
    settings.enable = True
    settings.backend.SimpleStorage.num_data_storage_units = 1
    tq.init(settings)
    made = bare_trainer(config)
    made.actor_rollout_wg = RayWorkerGroup(
        resource_pool=pool_of(1),
        ray_cls_with_init=RayClassWithInitArgs(
            cls=ray.remote(group_workers.Student),
            config=config.actor_rollout_ref,
            distillation_config=config.distillation,
            role="actor",
        ),
        device_name="cpu",
    )
    made._place_teacher_group()
    with mock.patch.object(teacher_group, "TeacherWorker", group_workers.Teacher):
        made._start_teacher_group()
    made.actor_rollout_wg.init_model()
    yield made
    tq.close()
    ray.shutdown()


@contextlib.contextmanager
def batch():
    """Four samples in the queue; each has a token that does not count."""
    rows, keys = [], []
    for question, answer, sessions in zip(QUESTIONS, ANSWERS, SESSIONS):
        for place, session in enumerate(sessions):
            row = {**sample(question, answer, *session), "uid": question, "session_id": place}
            row["response_mask"][0] = 0
            rows.append(row)
            keys.append(f"{question}_{place}_0")
    tags = [{"seq_len": len(row["input_ids"])} for row in rows]
    fields = list_of_dict_to_tensordict(rows)
    tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)
    yield KVBatchMeta(keys=keys, tags=tags, partition_id="train")
    tq.kv_clear(keys=keys, partition_id="train")


def column(meta, name):
    found = tq.kv_batch_get(keys=meta.keys, partition_id="train", select_fields=[name])[name]
    return list(found.unbind())


@functools.cache
def model(path):
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float64
    ).eval()


def log_probs(logits):
    return (logits[:, :VOCAB] / TEMPERATURE).log_softmax(-1)


def own_logits(network, ids, num_response):
    """(R, V) at the rows that predict the response."""
    return network(input_ids=ids[None]).logits[0, -num_response - 1 : -1]


def reverse_kl_with_tail(student, teacher):
    kept = student.detach().topk(K).indices
    inside = torch.zeros_like(student, dtype=torch.bool).scatter(-1, kept, True)
    student, teacher = (
        torch.cat(
            [
                side.gather(-1, kept),
                side.masked_fill(inside, -torch.inf).logsumexp(-1, keepdim=True),
            ],
            -1,
        )
        for side in (student, teacher)
    )
    return (student.exp() * (student - teacher)).sum(-1)


def full_jsd(student, teacher):
    mixture = torch.logaddexp(student, teacher) - torch.log(torch.tensor(2.0))
    halves = [(side.exp() * (side - mixture)).sum(-1) for side in (student, teacher)]
    return (halves[0] + halves[1]) / 2


def expected(student, teacher_logits, meta, divergence):
    """The loss of all samples in float64, and the student's gradients."""
    losses, counts = [], 0
    columns = [column(meta, n) for n in ("input_ids", "responses", "loss_mask")]
    for ids, response, mask, shown in zip(*columns, teacher_logits):
        own = log_probs(own_logits(student, ids, len(response)))
        losses.append((divergence(own, log_probs(shown)) * mask).sum())
        counts += int(mask.sum())
    loss = sum(losses) / counts
    names = dict(student.named_parameters())
    gradients = torch.autograd.grad(loss, list(names.values()))
    return float(loss.detach()), dict(zip(names, gradients))


def taught(trainer, meta):
    """The stage and an update: metrics, and the student's weights before and after."""
    metrics, before = {}, trainer.actor_rollout_wg.weights()[0]
    get = tq.kv_batch_get
    with mock.patch.object(tq, "kv_batch_get", side_effect=get) as asked:
        meta = trainer._compute_advantage(meta, metrics)
        trainer._update_actor(meta, metrics)
    for call in asked.call_args_list:  # the driver never holds a state
        assert STATES not in call.kwargs["select_fields"]
    return metrics, before, trainer.actor_rollout_wg.weights()[0]


def assert_taught(found, student, loss, gradients):
    metrics, before, after = found
    assert metrics["actor/loss"] == pytest.approx(loss, rel=1e-5)
    assert loss > 0.01
    for name, gradient in gradients.items():
        step = before[name].double() - after[name].double()
        torch.testing.assert_close(
            step, gradient, rtol=1e-4, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize(
    "settings, context, divergence, num_taught",
    [((), None, reverse_kl_with_tail, 4), (FULL_JSD, SIBLINGS, full_jsd, 2)],
    ids=["reverse KL, own prompt", "JSD, siblings"],
)
def test_the_student_learns_from_both_models_full_logits(
    trainer, models, settings, context, divergence, num_taught
):
    config = configured(models, *settings, context=context)
    follow(trainer, config)
    trainer.actor_rollout_wg.learn_by(config.distillation)
    student, teacher = model(models["student"]), model(models["teacher"])
    with batch() as meta:
        found = taught(trainer, meta)
        student.load_state_dict({n: tensor.double() for n, tensor in found[1].items()})
        with torch.no_grad():
            shown = [
                own_logits(teacher, ids, len(response))
                for ids, response in zip(
                    column(meta, "teacher_input_ids"), column(meta, "responses")
                )
            ]
        assert_taught(found, student, *expected(student, shown, meta, divergence))
        masks = column(meta, "loss_mask")
        sizes = [len(states) for states in column(meta, STATES)]
        assert sizes == [int(mask.sum()) for mask in masks]
        assert sum(size > 0 for size in sizes) == num_taught
        if context is None:
            both = zip(column(meta, "input_ids"), column(meta, "teacher_input_ids"))
            assert all(torch.equal(own, read) for own, read in both)
        metrics = found[0]
        assert metrics["self_distillation/teacher_bytes"] == sum(sizes) * D_TEACHER * 4
        assert metrics["self_distillation/teacher_bytes_per_token"] == D_TEACHER * 4


def test_sixteen_bits_travel_and_teach(trainer, models):
    config = configured(models, "distillation.worker_group.dtype=bf16")
    follow(trainer, config)
    group = trainer.self_distillation.worker_group
    arguments = teacher_group.teacher_model(models["teacher"], config.actor_rollout_ref)
    trainer.teacher_wg.restart(arguments, group, True)
    trainer.actor_rollout_wg.learn_by(config.distillation)
    student, teacher = model(models["student"]), model(models["teacher"])
    with batch() as meta:
        found = taught(trainer, meta)
        assert found[0]["self_distillation/teacher_bytes_per_token"] == D_TEACHER * 2
        student.load_state_dict({n: tensor.double() for n, tensor in found[1].items()})
        weight = teacher_states.received_head().weight.double()
        shown = []
        for ids, response, mask, states in zip(
            *(column(meta, n) for n in ("input_ids", "responses", "loss_mask", STATES))
        ):
            assert states.dtype == torch.bfloat16
            whole = torch.zeros(len(mask), D_TEACHER, dtype=torch.float64)
            whole[mask != 0] = states.double()
            shown.append(whole @ weight.T)
            with torch.no_grad():
                exact = own_logits(teacher, ids, len(response))[mask != 0]
            # a bf16 model of two layers
            assert float((shown[-1][mask != 0] - exact).abs().max() / exact.abs().max()) < 0.05
        loss, gradients = expected(student, shown, meta, reverse_kl_with_tail)
        assert_taught(found, student, loss, gradients)


def test_a_head_travels_with_its_bias_and_shaping(trainer):
    head = LMHead(torch.randn(10, 4), torch.randn(10), 0.5, 30.0, 9)
    with (
        mock.patch.object(teacher_states, "ROWS_OF_A_BLOCK", 4),
        mock.patch.object(teacher_states, "HEAD_PARTITION", "another head"),
    ):
        teacher_states.send_head(head)
        found = teacher_states.received_head()
    for name in ("weight", "bias"):
        assert torch.equal(getattr(found, name), getattr(head, name))
    for name in ("logit_scale", "softcap", "valid_vocab"):
        assert getattr(found, name) == getattr(head, name)
