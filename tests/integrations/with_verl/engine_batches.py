"""Training runs of the engine, with the samples and the loss that verl would give its actor.

verl is imported inside functions, because each process chooses verl's platform first.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

VOCAB, TOPK, CONTEXT, TEMPERATURE = 512, 8, 4, 0.8
# Prompt and response lengths of the four samples.  Ulysses packs the first two: they have an odd
# number of tokens, and all rows of the first process belong to a prompt.
LENGTHS = ((30, 6), (3, 12), (4, 6), (4, 9))
NO_RESPONSE = ((5, 9), (3, 12), (17, 0), (4, 0))  # the second process's


@dataclass(frozen=True)
class Run:
    """One training run of both processes.

    Attributes:
        library: run the library's engine instead of verl's own.
        backend: ``fused_kernel_options.impl_backend``; None: no fused kernels.
        tied: tie the head's weight to the embeddings.
        policy: add a policy loss and an entropy bonus to the distillation loss.
        loss: "topk": verl's forward KL on the server's top-k.  "live": the library's full reverse
            KL to the model itself in a privileged context.  "policy": the policy loss alone.
            "summed": a sum of divergences and log-probabilities, for processes without response
            tokens, where verl's metrics fail.
        adapter: train LoRA, but not on the head, which verl cannot shard then.
        dtype: dtype of parameters in forward and backward.
        exact_head: compute everything behind the backbone in float64.
        sequence_parallel: use Ulysses over both processes, which then share their samples.
        packed: verl's ``use_remove_padding``.
        checkpointing: checkpoint the layers' activations.
        floor: verl's ``log_prob_min_clamp``.
        lengths: prompt and response lengths of the four samples.
        steps: number of optimiser steps.
        watched: also record what the engine refuses and its largest allocation.
    """

    library: bool = True
    backend: str | None = "fused_sd"
    tied: bool = False
    policy: bool = False
    loss: str = "topk"
    adapter: bool = False
    dtype: str = "fp32"
    exact_head: bool = False
    sequence_parallel: bool = False
    packed: bool = True
    checkpointing: bool = False
    floor: float | None = None
    lengths: tuple[tuple[int, int], ...] = LENGTHS
    steps: int = 3
    watched: bool = False


def make_loss(run: Run) -> Callable[..., Any]:
    from verl.trainer.distillation import distillation_ppo_loss
    from verl.workers.config import (
        DistillationConfig,
        DistillationLossConfig,
        FSDPActorConfig,
        FSDPEngineConfig,
    )
    from verl.workers.utils.losses import ppo_loss

    from fused_sd.integrations.verl.config import FusedSDLossConfig

    actor = FSDPActorConfig(
        strategy="fsdp2",
        ppo_micro_batch_size_per_gpu=1,
        rollout_n=1,
        entropy_coeff=0.1 if run.policy else 0.0,
        fsdp_config=FSDPEngineConfig(strategy="fsdp2"),
    )
    if run.loss == "policy":
        return functools.partial(ppo_loss, config=actor)
    if run.loss == "live":
        settings = {"divergence": "reverse_kl", "support": "full", "use_task_rewards": False}
        loss = FusedSDLossConfig(teacher="live", **settings)
    else:
        loss = DistillationLossConfig(
            loss_mode="forward_kl_topk",
            topk=TOPK,
            log_prob_min_clamp=run.floor,
            loss_max_clamp=None,
            use_task_rewards=run.policy,
            use_policy_gradient=False,
        )
    function = summed_loss if run.loss == "summed" else distillation_ppo_loss
    distillation = DistillationConfig(distillation_loss=loss)
    return functools.partial(function, config=actor, distillation_config=distillation)


def summed_loss(
    config: Any,
    distillation_config: Any,
    model_output: Any = None,
    data: Any = None,
    dp_group: Any = None,
    student_logits: Tensor | None = None,
) -> Any:
    """Sum of divergences minus log-probabilities over all processes' tokens.

    Like verl's loss it is also called as logits processor, with ``student_logits``.
    """
    from verl.trainer.distillation.losses import compute_topk_loss

    if student_logits is not None:
        return compute_topk_loss(config, distillation_config, data, student_logits, "thd")
    losses = model_output["distillation_losses"].values() - model_output["log_probs"].values()
    counted = torch.cat(
        [
            torch.cat([mask.new_zeros(len(prompt) - 1), mask, mask.new_zeros(1)])
            for prompt, mask in zip(data["prompts"].unbind(), data["response_mask"].unbind())
        ]
    )
    total = torch.where(counted == 1, losses, 0).sum()
    return total / data["batch_num_tokens"] * data["dp_size"], {}


def make_batch(run: Run) -> Any:
    """This process's samples: all four under Ulysses, else two of them."""
    from verl.utils import tensordict_utils as tu

    samples = list(make_samples(run.lengths))
    if not run.sequence_parallel:
        samples = samples[2 * dist.get_rank() : 2 * dist.get_rank() + 2]
    tensors = {
        name: torch.nested.as_nested_tensor([s[name] for s in samples], layout=torch.jagged)
        for name in samples[0]
    }
    batch = tu.get_tensordict(tensors)
    tu.assign_non_tensor(
        batch,
        use_remove_padding=run.packed,
        use_fused_kernels=run.backend is not None,
        calculate_entropy=run.policy,
        distillation_use_topk=run.loss != "policy",
        distillation_only=run.loss in ("topk", "live") and not run.policy,
        temperature=TEMPERATURE,
        global_batch_size=4,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2 if run.sequence_parallel else 1,
    )
    return batch


def make_samples(lengths: tuple[tuple[int, int], ...]) -> Iterator[dict[str, Tensor]]:
    """Samples as verl's trainer gives them to an actor, and each with a privileged context."""
    generator = torch.Generator().manual_seed(7)
    for prompt, response in lengths:
        length = prompt + response
        ids = torch.randint(2, VOCAB, (length,), generator=generator)
        logits = 3 * torch.randn(length, VOCAB, generator=generator)
        top = logits.log_softmax(-1).topk(TOPK)
        mask = torch.ones(response, dtype=torch.int64)
        mask[3:5] = 0  # a tool's answer
        context = torch.randint(2, VOCAB, (CONTEXT + prompt % 3,), generator=generator)
        yield {
            "input_ids": ids,
            "teacher_input_ids": torch.cat([context, ids]),
            "teacher_position_ids": torch.arange(len(context) + length),
            "position_ids": torch.arange(length),
            "prompts": ids[:prompt],
            "responses": ids[prompt:],
            "response_mask": mask,
            "loss_mask": mask,
            "teacher_ids": top.indices.int(),
            "teacher_logprobs": top.values,
            "old_log_probs": -6 + torch.rand(response, generator=generator),
            "advantages": torch.randn(response, generator=generator),
        }
