"""Test-time self-distillation on single hard questions, against best-of-k of the frozen base.

A question is hard where the base model was wrong in every one of a number of samples.  The trainer
sees the verdict on each attempt and nothing else.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback

from benchmarks.methods import arithmetic
from benchmarks.methods.evaluate import respond
from benchmarks.methods.settings import Discovery
from benchmarks.methods.task import Question, Task
from benchmarks.methods.train import device, load
from fused_sd.integrations.trl import DiscoveryConfig, DiscoveryTrainer

OTHER = 1_000_000  # seed of samples that no other part of the experiment draws
TEMPLATES: dict[str, Any] = {  # the contexts of SD-Zero's reviser: question, own attempt, verdict
    "reprompt_template": "{prompt}{solution}{feedback}",
    "attempt_template": "{attempt}",
    "feedback_template": arithmetic.VERDICT.format("{feedback_raw}"),
}


def attempts(
    model: Any, tokenizer: Any, task: Task, asked: Question, count: int, seed: int
) -> list[bool]:
    """Verdicts of responses sampled from a model that does not learn."""
    prompts = [asked.prompt] * count
    said = respond(model, tokenizer, prompts, task.max_response, sample=True, seed=seed).texts
    return [task.is_right(*pair) for pair in zip(prompts, said)]


def first(verdicts: Sequence[bool]) -> int | None:
    """Number of the first success, from 1."""
    return verdicts.index(True) + 1 if True in verdicts else None


def hard_questions(
    model: Any, tokenizer: Any, task: Task, part: str, chosen: Discovery, seed: int
) -> list[Question]:
    """The first questions of a part that the base model fails in every sample."""
    found: list[Question] = []
    for asked in task.questions[part]:
        if not any(attempts(model, tokenizer, task, asked, chosen.hard_samples, seed)):
            found.append(asked)
        if len(found) == chosen.num_questions:
            break
    return found


def discover(
    task: Task, asked: Question, rate: float, seed: int, chosen: Discovery, cache: Path
) -> int | None:
    """The attempt that passed first while the model learned from its failures."""
    model, tokenizer = load(task, seed, cache)

    def verdicts(prompts: list[str], completions: list[str], **_: object) -> list[str | None]:
        right = [task.is_right(*pair) for pair in zip(prompts, completions)]
        return [None if passed else arithmetic.WRONG for passed in right]

    with tempfile.TemporaryDirectory() as output:
        trainer = DiscoveryTrainer(
            model=model,
            reward_funcs=task.reward,
            args=DiscoveryConfig(
                output_dir=output,
                max_attempts=chosen.max_attempts,
                learning_rate=rate,
                lr_scheduler_type="constant",
                max_completion_length=task.max_response,
                distillation_topk=chosen.topk,
                include_own_attempt=True,
                observe=False,
                activation_checkpointing=False,
                use_cpu=device() == "cpu",
                bf16=False,
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                diagnostics_warning_interval=0,
                **TEMPLATES,
            ),
            train_dataset=Dataset.from_list([{"prompt": asked.prompt}]),
            processing_class=tokenizer,
            feedback_func=verdicts,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.first_success


def compare(
    task: Task, rate: float, seed: int, chosen: Discovery, cache: Path, part: str = "held_out"
) -> dict[str, Any]:
    """First successes of both on the same hard questions."""
    model, tokenizer = load(task, seed, cache)
    asked = hard_questions(model, tokenizer, task, part, chosen, seed)
    # other samples than those that made the questions hard
    frozen = [
        first(attempts(model, tokenizer, task, question, chosen.max_attempts, OTHER + number))
        for number, question in enumerate(asked)
    ]
    torch.manual_seed(seed)
    learning = [discover(task, question, rate, seed, chosen, cache) for question in asked]
    return {
        "questions": [question.prompt for question in asked],
        "best of k": frozen,
        "self-distillation": learning,
    }
