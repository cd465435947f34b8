"""SD-Zero whole: collection of traces, training on them, and distillation of the reviser.

All samples count: the arm gets as many generations as its rivals, responses and revisions of the
collection among them, and phase 2 gets the steps that remain.  Phase 1 asks the first questions of
the shuffled training part, and phase 2 the others, as in the paper.  A phase 1 that phase 2 follows
may have a learning rate of its own.
"""

import dataclasses
import math
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, set_seed

from benchmarks.methods.arms import Arm, PhaseOne
from benchmarks.methods.evaluate import look
from benchmarks.methods.experiments import Scale
from benchmarks.methods.reviser import judge, phrases
from benchmarks.methods.tasks import Task
from benchmarks.methods.train import build, common_settings, load, train
from fused_sd.integrations.trl import (
    SRTConfig,
    SRTTrainer,
    Trace,
    TraceConfig,
    collect_traces,
    split_traces,
    transformers_generate,
)
from fused_sd.integrations.trl.traces import Collected

# traces of a step: both phases then take about as many optimizer steps as the rivals do, and not
# six times as many, as they would with the official script's 4
BATCH = 8
REVISION_STAGE = 1 / 6  # of the traces, for the second stage: the official script's 1000 of 6000
QUARTERS = 4  # phase 2 is evaluated after each
SAMPLED = 512  # sequences in one call of generate


def run(
    task: Task, arm: Arm, rate: float, seed: int, scale: Scale, cache: Path, *, part: str
) -> dict[str, Any]:
    """Run SD-Zero's phases from the base model.

    Returns:
        What ``train.train`` returns, with a curve over all generations whose steps are those of
        both phases; ``phase_one``, what it used and made; and ``states``, the model as its own
        reviser ("base", "phase one" and, after a phase 2, "end"), see ``reviser.judge``.

    Raises:
        ValueError: The arm has no phase one, or the task trains an adapter or has images.
    """
    phase_one = checked(task, arm)
    model, tokenizer = load(task, cache)
    questions = task.questions[part][: scale.num_questions]
    states = {"base": judge(model, tokenizer, task, questions, seed)}
    curve = [{"step": 0, "generations": 0, **look(model, tokenizer, task, questions)}]
    asked, others = divided(task, phase_one, scale, seed)
    set_seed(seed)
    with tempfile.TemporaryDirectory() as output:
        common = common_settings(seed, output)
        started = time.perf_counter()
        collected = collect(asked, phase_one, model, tokenizer, Path(output, "traces.jsonl"))
        first_rate = rate if phase_one.rate is None else phase_one.rate
        steps = train_phase_one(collected.traces, phase_one, model, tokenizer, first_rate, common)
        seconds = time.perf_counter() - started
        used = sampled(collected)
        states["phase one"] = judge(model, tokenizer, task, questions, seed)
        values = {
            "phase_one": {
                "questions": len(asked.questions["train"]),
                "generations": used,
                "steps": steps,
                "seconds": seconds,
                "counts": dataclasses.asdict(collected.counts),
            },
            "states": states,
        }
        rest = phase_two(arm, scale, used)
        if not rest.steps:
            reached = look(model, tokenizer, task, questions)
            curve.append({"step": steps, "generations": used, **reached})
            return {**values, "curve": curve, "seconds": seconds}
        trainer = build(
            others, renewed(arm, rest), model, tokenizer, rate=rate, scale=rest, **common
        )
        result = train(trainer, others, part, rest, before=used)
    states["end"] = judge(trainer.model, tokenizer, task, questions, seed)
    curve += [{**point, "step": steps + point["step"]} for point in result["curve"]]
    return {**values, "curve": curve, "seconds": seconds + result["seconds"]}


def checked(task: Task, arm: Arm) -> PhaseOne:
    """Return an arm's first phase, which must be there, on a task that it can train on."""
    if arm.phase_one is None:
        raise ValueError(f"arm must have a phase_one, got {arm.name!r}; call train.run")
    if task.lora_rank is not None or task.questions["train"][0].images:
        raise ValueError(
            f"task must train whole models on texts, got {task.name!r}; use the arm of phase 2"
        )
    return arm.phase_one


def divided(task: Task, phase_one: PhaseOne, scale: Scale, seed: int) -> tuple[Task, Task]:
    """Return the task with the training questions of phase 1, and with those of phase 2.

    Phase 1 gets as many questions as its share of the generations pays for if each takes the most,
    and no greater share of the questions than of the generations.
    """
    questions = list(task.questions["train"])
    random.Random(seed).shuffle(questions)
    budget = scale.steps * scale.generations
    paid = int(phase_one.share * budget) // phase_one.generations_per_question
    count = min(paid, int(phase_one.share * len(questions)))

    def asking(chosen: list[Any]) -> Task:
        return dataclasses.replace(task, questions={**task.questions, "train": chosen})

    return asking(questions[:count]), asking(questions[count:])


def collect(task: Task, phase_one: PhaseOne, model: Any, tokenizer: Any, path: Path) -> Collected:
    """Collect the traces of all training questions."""
    verdicts = phrases(task)
    return collect_traces(
        transformers_generate(
            model, tokenizer, max_new_tokens=task.max_response, batch_size=SAMPLED
        ),
        task.rows("answer"),
        task.reward,
        tokenizer,
        path,
        config=TraceConfig(
            num_initial=phase_one.num_initial,
            num_revisions=phase_one.num_revisions,
            revise_correct=phase_one.revise_correct,
            correct_phrase=verdicts.correct,
            wrong_phrase=verdicts.wrong,
        ),
        questions_per_batch=SAMPLED,
    )


def sampled(collected: Collected) -> int:
    """Return how many responses and revisions the collection has sampled."""
    counts = collected.counts
    return counts.initial + counts.revisions + counts.undecided


def stages(phase_one: PhaseOne, traces: Sequence[Trace], seed: int) -> dict[str, Sequence[Trace]]:
    """Return the traces of each objective, in the order of the trainings.

    Where no trace was kept, or where the stages of the official code cannot both have one, phase 1
    has nothing to learn from and there is no training.
    """
    if phase_one.objective != "sequential":
        return {phase_one.objective: traces} if traces else {}
    if len(traces) < 2:
        return {}
    count = max(round(REVISION_STAGE * len(traces)), 1)
    return dict(split_traces(traces, count, seed=seed))


def train_phase_one(
    traces: Sequence[Trace],
    phase_one: PhaseOne,
    model: Any,
    tokenizer: Any,
    rate: float,
    common: dict[str, Any],
) -> int:
    """Train the model on traces, and return the number of optimizer steps.

    Epochs, schedule and warm-up are ``SRTConfig``'s defaults, the official script's.
    """
    steps = 0
    for objective, chosen in stages(phase_one, traces, common["seed"]).items():
        config = SRTConfig(
            objective=objective, learning_rate=rate, per_device_train_batch_size=BATCH, **common
        )
        trainer = SRTTrainer(model, config, chosen, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        steps += trainer.state.global_step
    return steps


def phase_two(arm: Arm, scale: Scale, used: int) -> Scale:
    """Return the size of phase 2: the whole steps that the other generations pay for."""
    left = scale.steps * scale.generations - used
    steps = 0 if arm.trainer == "SRTTrainer" else left // scale.generations
    return dataclasses.replace(scale, steps=steps, look_every=max(math.ceil(steps / QUARTERS), 1))


def renewed(arm: Arm, scale: Scale) -> Arm:
    """Return the arm whose teacher, if it is a synced one, is renewed after half of phase 2.

    The paper renews it at a plateau, after some 400 steps; here the step is fixed beforehand.
    """
    if arm.settings.get("teacher_model_kind") != "synced":
        return arm
    half = QUARTERS // 2 * scale.look_every
    return dataclasses.replace(arm, settings={**arm.settings, "teacher_sync_steps": half})
