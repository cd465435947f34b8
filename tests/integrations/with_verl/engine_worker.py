"""One of two processes that train verl's FSDP2 engine, or the library's, on CPUs."""

import dataclasses
import os
import pathlib
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from engine_batches import Run, make_batch, make_loss
from torch import Tensor


def main(rank: int, port: int, folder: str, runs: dict[str, Run]) -> None:
    """Do each run and save its results in ``folder``."""
    os.environ.update(VERL_PLATFORM="cpu", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    import cpu_platform

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    dist.all_to_all = cpu_platform.all_to_all_by_gloo
    for name, run in runs.items():
        torch.save(train(run, pathlib.Path(folder)), f"{folder}/{name}-{rank}.pt")


def train(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Do one run and return its results."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from fused_sd.integrations.verl.engine import FusedSDEngine

    before = _forwards()
    engine = _engine(FusedSDEngine if run.library else FSDPEngineWithLMHead, run, folder)
    batch, loss = make_batch(run), make_loss(run)
    left: dict[str, Any] = {"losses": [], "grad_norms": [], "rows": []}
    with mock.patch.object(*_counted_outputs(run, left["rows"])):
        if run.loss == "topk":
            left["inferred"] = _infer(engine, batch.clone())
        for _ in range(run.steps):
            with engine.train_mode():
                output = engine.train_batch(batch.clone(), loss)
            left["losses"].append(_summed_over_data(engine, output["loss"]))
            # verl reports it on the first rank of a sequence-parallel group only
            left["grad_norms"].append(float(output["metrics"].get("grad_norm", torch.nan)))
    left["parameters"] = {
        name: parameter.full_tensor().detach().clone()
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    left["untouched"] = _forwards() == before
    if run.watched:
        left["refusals"] = _refusals(engine, batch) if run.library else {}
        with engine.train_mode(), torch.profiler.profile(profile_memory=True) as profile:
            engine.forward_backward_batch(batch.clone(), loss)
        left["largest"] = max(event.self_cpu_memory_usage for event in profile.events())
    return left


def _counted_outputs(run: Run, rows: list[int]) -> tuple[Any, str, Any]:
    """Arguments of ``mock.patch.object``: a ``token_outputs`` that appends its rows to ``rows``."""
    from fused_sd.integrations.verl import token_outputs

    usual = token_outputs.token_outputs

    def counted(hidden: Tensor, head: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        rows.append(len(hidden))
        if not run.exact_head:
            return usual(hidden, head, *args, **kwargs)
        head = dataclasses.replace(head, weight=head.weight.double())
        outputs = usual(hidden.double(), head, *args, **kwargs)
        return {name: values.float() for name, values in outputs.items()}

    return token_outputs, "token_outputs", counted


def _forwards() -> tuple[Any, ...]:
    """The class-level forwards that verl's own fused kernels replace."""
    from transformers import Qwen3ForCausalLM, Qwen3Model

    return Qwen3ForCausalLM.forward, Qwen3Model.forward, torch.nn.Linear.forward


def _engine(kind: type, run: Run, folder: pathlib.Path) -> Any:
    import cpu_platform
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    cpu_platform.use_ulysses_attention()
    torch.manual_seed(0)  # adapters begin at random
    model = HFModelConfig(
        path=str(folder / ("tied" if run.tied else "untied")),
        load_tokenizer=False,
        use_remove_padding=run.packed,
        enable_gradient_checkpointing=run.checkpointing,
        lora_rank=4 if run.adapter else 0,
        target_modules=["q_proj", "down_proj"],
        use_fused_kernels=run.backend is not None,
        fused_kernel_options={"impl_backend": run.backend} if run.backend else {},
        override_config={
            "attn_implementation": "packed_ulysses" if run.sequence_parallel else "eager"
        },
    )
    precision = {"param_dtype": run.dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    engine = kind(
        model_config=model,
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            mixed_precision=precision,
            use_torch_compile=False,
            ulysses_sequence_parallel_size=2 if run.sequence_parallel else 1,
        ),
        optimizer_config=FSDPOptimizerConfig(
            lr=1e-3,
            total_training_steps=run.steps,
            # with Adam's usual eps, a gradient of rounding errors would make a full step
            override_optimizer_config={"eps": 1e-6},
        ),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def _infer(engine: Any, batch: Any) -> dict[str, Tensor]:
    """Log-probabilities and entropy as in verl's ``compute_log_prob``, padded: (B, tokens)."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import no_padding_2_padding

    tu.assign_non_tensor(batch, distillation_use_topk=False, distillation_only=False)
    found = []
    for entropy in (True, False):
        tu.assign_non_tensor(batch, calculate_entropy=entropy)
        with engine.eval_mode():
            found.append(engine.infer_batch(batch.clone())["model_output"])
    both, alone = found
    assert set(both) == {"log_probs", "entropy"}
    assert set(alone) == {"log_probs"}
    torch.testing.assert_close(both["log_probs"].values(), alone["log_probs"].values())
    mask = batch["response_mask"].to_padded_tensor(0)
    return {name: no_padding_2_padding(one, batch) * mask for name, one in both.items()}


def _refusals(engine: Any, batch: Any) -> dict[str, str]:
    """The error messages for settings that verl's fused kernels do not support either."""
    from verl.utils import tensordict_utils as tu

    said = {}
    for name, value in {"calculate_sum_pi_squared": True, "temperature": torch.ones(2)}.items():
        asked = batch.clone()
        tu.assign_non_tensor(asked, distillation_use_topk=False, **{name: value})
        if isinstance(value, Tensor):
            asked[name] = value[: len(asked)]
        try:
            with engine.eval_mode():
                engine.infer_batch(asked)
        except (ValueError, AssertionError) as error:
            said[name] = str(error)
    return said


def _summed_over_data(engine: Any, losses: list[float]) -> float:
    """As verl's worker reports it: summed over micro-batches, a mean over data ranks."""
    loss = torch.tensor(losses, dtype=torch.float64).sum()
    dist.all_reduce(loss, group=engine.get_data_parallel_group())
    return float(loss) / engine.get_data_parallel_size()
