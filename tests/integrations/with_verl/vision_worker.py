"""One of two processes that train a tiny vision-language model in verl's FSDP2 engine, on CPUs."""

import dataclasses
import functools
import os
import pathlib
import traceback
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from engine_batches import TEMPERATURE
from teacher_worker import Lesson, is_policy, make_engine, make_loss
from vision_samples import FAMILIES, agent_loop_sample, question, verls_processor


@dataclasses.dataclass(frozen=True)
class VisionLesson(Lesson):
    """A lesson of one step.

    Attributes:
        family: of the model.
        packed: verl's ``use_remove_padding``.
        micro: samples of a micro-batch; with 1, one process sees a video, in place of the last
            image, while the other sees nothing.  verl runs the vision tower once for images and
            once for videos, so that no process may have a micro-batch of both.
        sequence_parallel: use Ulysses over both processes, which then have all four samples.
    """

    family: str = "Qwen3-VL"
    packed: bool = True
    micro: int = 1
    sequence_parallel: bool = False
    steps: int = 1


RLSD = {"loss_mode": "fused_sd_rlsd", "teacher": "live"}
SDPO = {
    "teacher": "reference",
    "support": "student_topk",
    "divergence": "reverse_kl",
    "topk": 8,
}
LESSONS = {
    f"{name}, {family}": VisionLesson(settings, family=family, packed=packed, micro=micro)
    for name, settings, packed, micro in (("rlsd", RLSD, True, 1), ("sdpo", SDPO, False, 2))
    for family in FAMILIES
}
LESSONS["rlsd, Ulysses"] = VisionLesson(RLSD, micro=2, sequence_parallel=True)
# each process has two samples; the last one has no context
PROMPTS = (
    question("<red>", "What is this?"),
    question("What is 1+1?"),
    question("Compare ", "<blue>", " with ", "<green>"),
    question("<green>", "What is that?"),
)
FILM = question("<video>", "What is that?")
RESPONSES = ("red", "It is 2.", "the picture", "It")
HINTS = ("It is red.", "2", "Both are in the picture.", None)


def main(rank: int, port: int, folder: str) -> None:
    """Do each lesson, and save its results in ``folder``."""
    os.environ.update(
        VERL_PLATFORM="cpu", TOKENIZERS_PARALLELISM="false", VERL_USE_EXTERNAL_PLUGINS="none"
    )
    torch.set_num_threads(1)
    import cpu_platform
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention
    from verl.models.transformers import qwen2_vl

    # verl's own attention for packed rows of this family needs flash-attn; transformers' eager one
    # keeps the sequences apart by the text positions
    qwen2_vl.qwen2_vl_attn_forward = Qwen2_5_VLAttention.forward
    cpu_platform.use_ulysses_attention()
    dist.all_to_all = cpu_platform.all_to_all_by_gloo
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, lesson in LESSONS.items():
        try:
            left = learn(lesson, pathlib.Path(folder))
        except Exception:
            left = {"error": traceback.format_exc()}
        torch.save(left, pathlib.Path(folder) / f"{name}-{rank}.pt")


def learn(lesson: VisionLesson, folder: pathlib.Path) -> dict[str, Any]:
    from verl.workers import config

    from fused_sd.integrations.transformers import unwrap

    width = 2 if lesson.sequence_parallel else 1
    parallel = functools.partial(config.FSDPEngineConfig, ulysses_sequence_parallel_size=width)
    with mock.patch.object(config, "FSDPEngineConfig", parallel):
        engine = make_engine(lesson, folder / lesson.family)
    if lesson.sequence_parallel:
        unwrap(engine.module).config.get_text_config()._attn_implementation = "packed_ulysses"
    samples = make_samples(lesson)
    with engine.train_mode():
        output = engine.train_batch(make_batch(lesson, samples), make_loss(lesson))
    total = torch.tensor(output["loss"], dtype=torch.float64).sum()
    dist.all_reduce(total)
    # verl reports the norm on the first rank of a sequence-parallel group only
    norm = output["metrics"].get("grad_norm")
    return {"samples": samples, "loss": float(total) / 2, "grad_norm": norm}


def make_samples(lesson: VisionLesson) -> list[dict[str, Any]]:
    """Return all four samples, with what the trainer's stage adds."""
    from fused_sd.integrations.shared.rollouts import Rollout
    from fused_sd.integrations.verl.contexts import AnswerContext, PromptTokenizer
    from fused_sd.integrations.verl.images import Vision
    from fused_sd.integrations.verl.teacher_sequences import teacher_batch

    processor = verls_processor(lesson.family)
    generator = torch.Generator().manual_seed(5)
    words = PromptTokenizer(processor.tokenizer, {}, processor)
    samples, contexts = [], []
    has_film = lesson.micro == 1 or lesson.sequence_parallel
    prompts = (*PROMPTS[:3], FILM if has_film else PROMPTS[3])
    for prompt, response, hint in zip(prompts, RESPONSES, HINTS):
        sample = agent_loop_sample(processor, prompt, response)
        rollout = Rollout(
            prompt=prompt,
            prompt_ids=sample["prompts"].tolist(),
            completion_ids=sample["responses"].tolist(),
            text=response,
            reward=0.0,
            privileged=hint,
            feedback=None,
            index=0,
            group=(),
        )
        contexts.append(AnswerContext().teacher_prompt(rollout, words.beside(rollout)))
        count = len(sample["responses"])
        mask = torch.tensor(float(hint is not None))
        sample |= {
            "self_distillation_mask": mask,
            "loss_mask": sample["response_mask"] * (1 if is_policy(lesson) else mask.long()),
            "old_log_probs": -6 + torch.rand(count, generator=generator),
            "advantages": torch.randn(count, generator=generator),
        }
        samples.append(sample)
    column = {name: [sample[name] for sample in samples] for name in samples[0]}
    vision = Vision(processor, column["input_ids"], column["position_ids"])
    teacher = teacher_batch(column["prompts"], column["responses"], contexts, vision=vision)
    for n, sample in enumerate(samples):
        sample["teacher_input_ids"] = teacher.input_ids[n]
        sample["teacher_position_ids"] = teacher.position_ids[n]
    return samples


def make_batch(lesson: VisionLesson, samples: list[dict[str, Any]]) -> Any:
    """Return this process's two samples."""
    from verl.utils import tensordict_utils as tu

    first = 2 * dist.get_rank()
    own = samples if lesson.sequence_parallel else samples[first : first + 2]
    jagged = functools.partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    columns = {name: [sample[name] for sample in own] for name in own[0] if name != "raw_prompt"}
    pixels = columns.pop("multi_modal_inputs")
    taught = torch.stack(columns.pop("self_distillation_mask"))
    batch = tu.get_tensordict(
        {
            **{name: jagged(column) for name, column in columns.items()},
            "multi_modal_inputs": pixels,
            "self_distillation_mask": taught,
        }
    )
    tu.maybe_fix_3d_position_ids(batch)  # as verl's worker does
    tu.assign_non_tensor(
        batch,
        use_remove_padding=lesson.packed,
        use_fused_kernels=True,
        calculate_entropy=False,
        distillation_use_topk=not is_policy(lesson),
        distillation_only=not is_policy(lesson),
        temperature=TEMPERATURE,
        global_batch_size=4,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=lesson.micro,
    )
    return batch
