"""One of two processes that run Megatron's parallelisms on CPUs and compare with references.

Each check returns the largest differences, relative to the largest value compared.
"""

import functools
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ranks
import torch
import torch.distributed as dist
from torch import Tensor

OBJECTIVES = {
    "forward_kl, tail": {"divergence": "forward_kl"},
    "reverse_kl, tail": {"divergence": "reverse_kl"},
    "jsd, renormalize": {"divergence": "jsd", "beta": 0.3, "remainder": "renormalize"},
    "mixed_kl, drop": {"divergence": "mixed_kl", "forward_weight": 0.4, "remainder": "drop"},
    "forward_kl, teacher_renormalize": {"remainder": "teacher_renormalize"},
    "forward_kl_topk": None,  # verl's own
}
FLOORS = (None, -5.0)


@dataclass(frozen=True)
class Layout:
    """How two processes share a model."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    tied: bool = False

    def sizes(self) -> dict[str, int]:
        return {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "context_parallel_size": self.context,
        }


LAYOUTS = {
    "tensor": Layout(tensor=2),
    "tensor, tied": Layout(tensor=2, tied=True),
    "tensor and sequence": Layout(tensor=2, sequence_parallel=True),
    "context": Layout(context=2),
    "pipeline": Layout(pipeline=2),
}


@functools.cache
def results() -> dict[str, list[Any]]:
    """The results of each check on both ranks; the processes start once for all test files."""
    with tempfile.TemporaryDirectory() as folder:
        ranks.spawn(main, folder)
        found = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(2)]
    return {name: [one.get(name, "not reached") for one in found] for name in found[0]}


def main(rank: int, folder: str) -> None:
    """Do each check and save its result, or its error, in ``folder``."""
    os.environ.update(VERL_PLATFORM="cpu", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    import cpu_platform  # noqa: F401, registers the platform
    import megatron_head
    import megatron_models

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=300),  # an error instead of a hang
    )
    megatron_models.stand_in_for_cuda()
    checks: dict[str, Callable[[], Any]] = {}
    for name, layout in LAYOUTS.items():
        checks[f"training, {name}"] = functools.partial(training, layout)
    checks |= {"inference": inference, "sharded objective": sharded_objective}
    for parallel in (False, True):
        for name in OBJECTIVES:
            checks[f"processor, {name}, {parallel}"] = functools.partial(
                megatron_head.processor, name, parallel
            )
    for floor in FLOORS:
        checks[f"oracle, {floor}"] = functools.partial(megatron_head.oracle, floor)
    left = {}
    for name, check in checks.items():
        try:
            left[name] = check()
        except Exception:
            left[name] = traceback.format_exc()
            break  # end, so that the other process's collectives fail instead of waiting
    torch.save(left, f"{folder}/{rank}.pt")


def lay_out(layout: Layout) -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**layout.sizes())


def difference(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape, (value.shape, expected.shape)
    scale = expected.detach().abs().max().clamp(min=1e-30)
    return float((value.detach() - expected.detach()).abs().max() / scale)


def verl_loss(loss_config: Any, policy: bool) -> Callable[..., Any]:
    """Make the loss function as verl's worker does."""
    from verl.trainer.distillation import distillation_ppo_loss
    from verl.workers.config import ActorConfig

    actor = ActorConfig(
        strategy="megatron", ppo_micro_batch_size_per_gpu=2, rollout_n=1, entropy_coeff=0.1
    )
    distillation = SimpleNamespace(distillation_loss=loss_config, enabled=True)
    return functools.partial(distillation_ppo_loss, config=actor, distillation_config=distillation)


def topk_config(policy: bool, floor: float | None) -> Any:
    from verl.workers.config import DistillationLossConfig

    return DistillationLossConfig(
        loss_mode="forward_kl_topk",
        topk=6,
        log_prob_min_clamp=floor,
        loss_max_clamp=None,
        use_task_rewards=policy,
        use_policy_gradient=False,
    )


def trained(layout: Layout, loss: Callable[..., Any], *, fused: bool, policy: bool) -> Any:
    """Run forward and backward of two micro-batches; return the engine and the losses."""
    import megatron_models as models
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    from fused_sd.integrations.verl.megatron_engine import FusedSDMegatronEngine

    lay_out(layout)
    model = models.gpt(
        tensor_parallel=layout.tensor,
        context_parallel=layout.context,
        pipeline_parallel=layout.pipeline,
        sequence_parallel=layout.sequence_parallel,
        tied=layout.tied,
    )
    kind = FusedSDMegatronEngine if fused else MegatronEngineWithLMHead
    engine = models.engine(kind, model, fused=fused)
    output = engine.forward_backward_batch(models.batch(fused=fused, policy=policy), loss)
    return engine, torch.tensor(output.get("loss", []), dtype=torch.float64)


def training(layout: Layout) -> dict[str, float]:
    """Compare our path with verl's path with logits: losses and every parameter's gradient."""
    worst = {}
    for policy, floor in ((False, None), (False, -5.0), (True, -10.0)):
        loss = verl_loss(topk_config(policy, floor), policy)
        expected, expected_losses = trained(layout, loss, fused=False, policy=policy)
        found, losses = trained(layout, loss, fused=True, policy=policy)
        differences = [difference(losses, expected_losses)] if len(losses) else []
        own, theirs = (dict(e.module[0].named_parameters()) for e in (found, expected))
        for name, parameter in theirs.items():
            assert parameter.grad.abs().max() > 0, name
            differences.append(difference(own[name].grad, parameter.grad))
        worst[f"policy={policy}, floor={floor}"] = max(differences)
    return worst


def sharded_objective() -> dict[str, float]:
    """Compare an objective that verl lacks on a sharded vocabulary and on a whole one."""
    from fused_sd.integrations.verl.config import FusedSDLossConfig

    settings = {"divergence": "reverse_kl", "topk": 6, "importance_cap": 2.0}
    config = FusedSDLossConfig(use_task_rewards=False, **settings)
    (whole, expected), (shard, losses) = (
        trained(Layout(tensor=size), verl_loss(config, False), fused=True, policy=False)
        for size in (1, 2)
    )
    rank, model, parts = dist.get_rank(), whole.module[0], shard.module[0]
    rows = [(model.output_layer.weight, parts.output_layer.weight)]
    rows.append((model.embedding.word_embeddings.weight, parts.embedding.word_embeddings.weight))
    norm = model.decoder.final_layernorm.weight.grad
    return {
        "losses": difference(losses, expected),
        "rows": max(difference(b.grad, a.grad.chunk(2)[rank]) for a, b in rows),
        "norm": difference(parts.decoder.final_layernorm.weight.grad, norm),
    }


def inference() -> dict[str, Any]:
    """Compare log-probs and entropy as in ``compute_log_prob``; is verl's processor back after?"""
    import megatron_models as models
    from verl.models.mcore import model_forward_fused
    from verl.utils import tensordict_utils
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead
    from verl.workers.utils.padding import no_padding_2_padding

    from fused_sd.integrations.verl.megatron_engine import FusedSDMegatronEngine

    layout, own = Layout(tensor=2), model_forward_fused.fused_output_processor
    lay_out(layout)
    model, found = models.gpt(tensor_parallel=2), []
    for kind in (MegatronEngineWithLMHead, FusedSDMegatronEngine):
        fused = kind is FusedSDMegatronEngine
        batch = models.batch(fused=fused, policy=True, distil=False)
        engine = models.engine(kind, model, fused=fused)
        tensordict_utils.assign_non_tensor(batch, sp_size=1)
        with torch.no_grad():
            output = engine.forward_backward_batch(batch, None, forward_only=True)["model_output"]
        mask = batch["response_mask"].to_padded_tensor(0)
        assert set(output) == {"log_probs", "entropy"}
        found.append({n: no_padding_2_padding(v, batch) for n, v in output.items()})
    theirs, ours = found
    restored = [model_forward_fused.fused_output_processor is own]
    try:
        with mock.patch.object(model, "forward", side_effect=RuntimeError("in the forward")):
            engine.forward_backward_batch(batch, None, forward_only=True)
    except RuntimeError as error:
        restored += [str(error) == "in the forward"]
    restored += [model_forward_fused.fused_output_processor is own]
    return {
        **{name: difference(ours[name], theirs[name] * mask) for name in theirs},
        "restored": restored,
    }
