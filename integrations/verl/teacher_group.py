"""The trainer's side of a frozen teacher in a worker group of its own.

The driver decides which worker reads which samples.  It never holds a state: the workers read the
sequences from the TransferQueue and write the states there, where the training workers find them as
one more column of the batch.

Dimension key:  B samples, K counted response tokens of a sample, D' the teacher's hidden size
"""

import heapq
from collections.abc import Sequence
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from transformers import AutoConfig
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from verl.trainer.ppo.utils import Role
from verl.utils.fs import copy_to_local
from verl.utils.tokenizer import hf_tokenizer
from verl.utils.torch_dtypes import PrecisionType

from fused_sd.checks import fail
from fused_sd.integrations.verl import VENDOR
from fused_sd.integrations.verl.self_distillation import SelfDistillationConfig
from fused_sd.integrations.verl.teacher_sequences import TeacherBatch, jagged, lengths_of
from fused_sd.integrations.verl.teacher_states import STATES, check_num_rows
from fused_sd.integrations.verl.teacher_worker import TeacherWorker


class TeacherGroup:
    """A mixin for verl's trainers that starts the teacher's workers and lets them write states."""

    self_distillation: SelfDistillationConfig
    config: Any
    tokenizer: Any
    processor: Any
    resource_pool_manager: Any
    teacher_wg: Any
    teacher_size: int  # D'

    def _place_teacher_group(self) -> None:
        """Check the student and the vocabulary, and choose GPUs; verl's pools are known, not made.

        verl has made a pool for the teacher if the settings give it nodes.
        """
        if self.processor is not None:
            fail(
                "distillation_loss.teacher",
                "be in the training process for a student that sees images",
                f"'worker_group' and a {type(self.processor).__name__}",
                'pass "live", "ema", "synced" or "reference"',
            )
        check_vocabulary(
            self.self_distillation.worker_group.model_path,
            self.config.actor_rollout_ref.model,
            self.tokenizer,
        )
        mapping = self.resource_pool_manager.mapping
        mapping.setdefault(Role.TeacherModel, "global_pool")

    def _start_teacher_group(self) -> None:
        """Start the workers, in processes of their own on the pool's GPUs.

        verl merges actor, critic and reference into one process for each GPU, but its pools have
        room for more (``ResourcePoolManager.max_colocate_count``).
        """
        config = self.self_distillation
        worker = RayClassWithInitArgs(
            cls=ray.remote(TeacherWorker),
            model=teacher_model(config.worker_group.model_path, self.config.actor_rollout_ref),
            group=config.worker_group,
            offload=not config.has_own_pool,
        )
        self.teacher_wg = RayWorkerGroup(
            resource_pool=self.resource_pool_manager.get_resource_pool(Role.TeacherModel),
            ray_cls_with_init=worker,
            name_prefix="fused_sd_teacher",
            device_name=self.config.trainer.device,
        )
        self.teacher_size = self.teacher_wg.init_model()[0]

    def _add_teacher_states(
        self, batch: KVBatchMeta, data: TensorDict, teacher: TeacherBatch, metrics: dict[str, Any]
    ) -> KVBatchMeta:
        """Have the column ``teacher_states`` written, jagged (B, K, D').

        A sample without a context gets no state and costs no forward.

        Args:
            batch: holds ``teacher``'s columns already.
            data: the samples' ``responses`` and ``response_mask``.
        """
        config = self.self_distillation.worker_group
        is_taught = teacher.mask != 0
        silent = [key for key, taught in zip(batch.keys, is_taught) if not taught]
        if silent:  # the TransferQueue hands out only columns that all samples have
            empty = torch.empty(0, self.teacher_size, dtype=PrecisionType.to_dtype(config.dtype))
            none = TensorDict({STATES: jagged([empty] * len(silent))}, batch_size=len(silent))
            tq.kv_batch_put(keys=silent, partition_id=batch.partition_id, fields=none)
        keys = [key for key, taught in zip(batch.keys, is_taught) if taught]
        lengths = lengths_of(teacher.input_ids)[is_taught].tolist()
        shares = share_out(lengths, self.teacher_wg.world_size, config.max_token_len_per_gpu)
        forwards = [[[keys[n] for n in forward] for forward in share] for share in shares]
        sent = sum(self.teacher_wg.write_states(forwards, batch.partition_id)) if keys else 0
        mask = data["response_mask"].unbind()
        num_tokens = sum(int((row != 0).sum()) for row, taught in zip(mask, is_taught) if taught)
        metrics["self_distillation/teacher_bytes"] = sent
        metrics["self_distillation/teacher_bytes_per_token"] = sent / max(num_tokens, 1)
        if batch.fields is not None and STATES not in batch.fields:
            batch.fields.append(STATES)  # verl's workers read the named columns alone
        return batch


def share_out(lengths: Sequence[int], num_workers: int, max_tokens: int) -> list[list[list[int]]]:
    """Deal sequences out to forwards of about equal length, and those to workers.

    Args:
        lengths: tokens of each sequence.
        num_workers: all get equally many forwards, because a sharded model needs all of them.
        max_tokens: most tokens of a forward; a longer sequence has a forward of its own.

    Returns:
        For each worker its forwards, each the indices of its sequences; some may be empty.
    """
    longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    rounds = max(1, -(-sum(lengths) // (max_tokens * num_workers)))
    while True:
        forwards: list[list[int]] = [[] for _ in range(rounds * num_workers)]
        sizes = [(0, place) for place in range(len(forwards))]
        fits = True
        for n in longest_first:
            size, place = heapq.heappop(sizes)
            fits = fits and (not forwards[place] or size + lengths[n] <= max_tokens)
            forwards[place].append(n)
            heapq.heappush(sizes, (size + lengths[n], place))
        if fits:
            return [forwards[worker::num_workers] for worker in range(num_workers)]
        rounds += 1


def teacher_model(path: str | None, student: DictConfig) -> dict[str, Any]:
    """Return the keywords of the teacher's ``HFModelConfig``.

    Beside its path it is loaded as the student is.

    Args:
        student: ``actor_rollout_ref``.
    """
    model = student.model
    attention = model.get("override_config", {}).get("attn_implementation")
    return {
        "path": path,
        "load_tokenizer": False,
        "use_shm": model.get("use_shm", False),
        "trust_remote_code": model.get("trust_remote_code", False),
        "external_lib": model.get("external_lib"),
        "use_remove_padding": model.get("use_remove_padding", True),
        "override_config": {} if attention is None else {"attn_implementation": attention},
        "enable_gradient_checkpointing": False,
        "use_fused_kernels": True,
        "fused_kernel_options": {"impl_backend": VENDOR},
    }


def check_vocabulary(path: str | None, student: DictConfig, tokenizer: Any) -> None:
    """Make sure that teacher and student give the same meaning to token ids.

    Args:
        path: of the teacher.
        student: ``actor_rollout_ref.model``.
        tokenizer: the student's.

    Raises:
        ValueError: the teacher does not know one of the student's tokens, knows it by another id,
            or has fewer rows in its head.
    """
    trusted = {"trust_remote_code": student.get("trust_remote_code", False)}
    folder = copy_to_local(path)
    own, known = tokenizer.get_vocab(), hf_tokenizer(folder, **trusted).get_vocab()
    others = sorted(token for token, n in own.items() if known.get(token) != n)
    if others:
        fail(
            "distillation.worker_group.model_path",
            "name a model that knows the student's tokens by the same ids",
            f"{len(others)} of {len(own)} that it does not, such as {others[0]!r}",
            "choose a teacher of the student's family",
        )
    folders = (folder, copy_to_local(student.path))
    sizes = [
        AutoConfig.from_pretrained(one, **trusted).get_text_config().vocab_size for one in folders
    ]
    check_num_rows(*sizes)
