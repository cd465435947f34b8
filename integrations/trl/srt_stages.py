"""SRT as SD-Zero's official code runs it: two trainings one after the other, on different traces.

The paper trains both terms jointly, which is ``SRTTrainer`` with its defaults.

The second stage differs from the official one by default.  There the user's turn holds the initial
response and the phrase; here the assistant's turn does, because traces are sampled so, and because
phase 2 asks the reviser so.  ``official_stages`` writes both stages as the official code does.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fused_sd.checks import check_positive_int, fail
from fused_sd.integrations.trl.srt import SRTConfig, SRTTrainer
from fused_sd.integrations.trl.traces import Trace


def split_traces(
    traces: Sequence[Trace], num_revision_traces: int = 1000, *, seed: int = 0
) -> dict[str, list[Trace]]:
    """Split traces into those of the two stages, in random order.

    "revision" gets ``num_revision_traces`` traces: first those whose initial response was right,
    then others.  "generation" gets the remaining traces whose initial response was wrong.

    Raises:
        ValueError: a stage is left without traces.

    Examples:
        >>> import dataclasses
        >>> from fused_sd.integrations.trl import Trace, split_traces
        >>> trace = Trace(
        ...     question=0, prompt="2 + 2 =", prompt_ids=(5, 6), initial_ids=(7,), phrase="Wrong.",
        ...     verdict_ids=(8,), revision_ids=(9, 10), initial_correct=False, initial_reward=0.0,
        ...     revision_reward=1.0,
        ... )
        >>> right = dataclasses.replace(trace, initial_correct=True)
        >>> stages = split_traces([trace, right, trace], num_revision_traces=1)
        >>> {name: len(traces) for name, traces in stages.items()}
        {'generation': 2, 'revision': 1}
    """
    check_positive_int("num_revision_traces", num_revision_traces)
    rng = random.Random(seed)
    right = [trace for trace in traces if trace.initial_correct]
    wrong = [trace for trace in traces if not trace.initial_correct]
    for group in (wrong, right):  # in the official code's order, to draw what it draws
        rng.shuffle(group)
    num_wrong = max(num_revision_traces - len(right), 0)
    stages = {
        "generation": wrong[num_wrong:],
        "revision": right[:num_revision_traces] + wrong[:num_wrong],
    }
    rng.shuffle(stages["revision"])
    for name, group in stages.items():
        if not group:
            fail(
                "traces",
                f"leave some for the {name} stage",
                f"{len(wrong)} from wrong and {len(right)} from right responses with "
                f"num_revision_traces={num_revision_traces}",
                "collect more, or choose another num_revision_traces",
            )
    return stages


def sequential_srt(
    model: str | PreTrainedModel | nn.Module,
    args: SRTConfig,
    traces: Sequence[Trace] | Mapping[str, Sequence[Trace]],
    *,
    num_revision_traces: int = 1000,
    **kwargs: Any,
) -> SRTTrainer:
    """Train the generation stage, then the revision stage from its weights, each with ``args``.

    Checkpoints go to the folders ``generation`` and ``revision`` of ``args.output_dir``.

    Args:
        model: a causal language model or its name.
        args: the settings of both stages.
        traces: are split by ``split_traces`` with ``args.seed``; or the stages themselves, such as
            ``official_stages`` returns.
        num_revision_traces: of the second stage, where traces are split here.
        kwargs: further arguments of ``SRTTrainer``, for both stages.

    Returns:
        The second stage's trainer, after training; its ``save_model`` writes the result.

    Raises:
        ValueError: a stage has no traces, or parameters are sharded.

    Examples:
        >>> from fused_sd.integrations.trl import SRTConfig, load_traces, sequential_srt
        >>> args = SRTConfig("out", num_train_epochs=1)
        >>> traces, _ = load_traces("traces.jsonl")  # doctest: +SKIP
        >>> trainer = sequential_srt("Qwen/Qwen2.5-0.5B-Instruct", args, traces)  # doctest: +SKIP
        >>> trainer.save_model("out")  # doctest: +SKIP
    """
    stages: Mapping[str, Sequence[Trace]] = (
        traces
        if isinstance(traces, Mapping)
        else split_traces(traces, num_revision_traces, seed=args.seed)
    )
    for objective in ("generation", "revision"):
        selected = stages[objective]
        settings = dataclasses.replace(
            args, objective=objective, output_dir=str(Path(args.output_dir or ".") / objective)
        )
        trainer = SRTTrainer(model, settings, selected, **kwargs)
        # A second trainer cannot wrap a model whose parameters the first has sharded.
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            remedy = "run each stage with SRTTrainer and split_traces, in a process of its own"
            fail("args", "shard no parameters", "FSDP or DeepSpeed", remedy)
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model)
        kwargs.pop("peft_config", None)  # the model has its adapter now
        kwargs.setdefault("processing_class", trainer.processing_class)
    return trainer
