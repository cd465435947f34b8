"""``python -m benchmarks.methods.in_verl``: verl's ``main_ppo`` on SmolLM2's plurals, on CPUs.

The task, the budget and the adapter are those of the experiment "plurals", which trains with TRL;
the learning rate is the middle of its grid.  This needs an environment with verl; the model must
have been converted before, by ``python -m fused_sd.demo`` or by the experiment with TRL.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from benchmarks.methods.arms import GROUP
from benchmarks.methods.experiments import EXPERIMENTS
from benchmarks.methods.tasks.plurals import LORA_RANK, MAX_RESPONSE, TEMPLATES, make
from fused_sd.demo.model import DEFAULT_CACHE, model_directory

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "integrations" / "examples" / "verl_on_cpu.sh"
ACCURACY = "val-core/plurals/acc/mean@1"
BARE_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""A chat template that adds nothing: the model continues the question, as it does with TRL."""


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any
) -> float:
    """Score a response for verl: 1.0 if it is the plural up to its quotation mark."""
    return float(solution_str.split('"')[0] == ground_truth)


def settings(method: str, seed: int) -> Iterator[str]:
    """Yield the settings beside the recipe's."""
    scale, (_, rate, _) = EXPERIMENTS["plurals"].scale, EXPERIMENTS["plurals"].rates
    yield f"actor_rollout_ref.model.custom_chat_template='{BARE_TEMPLATE}'"
    yield f"actor_rollout_ref.model.lora_rank={LORA_RANK}"
    yield f"actor_rollout_ref.model.lora_alpha={2 * LORA_RANK}"
    yield "actor_rollout_ref.model.lora.merge=true"
    yield f"actor_rollout_ref.rollout.n={GROUP}"
    yield f"actor_rollout_ref.rollout.seed={seed}"
    yield f"actor_rollout_ref.actor.ppo_mini_batch_size={scale.prompts}"
    yield f"actor_rollout_ref.actor.optim.lr={rate}"
    yield "actor_rollout_ref.actor.optim.lr_warmup_steps=5"
    yield "actor_rollout_ref.actor.optim.weight_decay=0"
    yield f"data.seed={seed}"
    yield f"data.train_batch_size={scale.prompts}"
    yield "data.max_prompt_length=64"
    yield f"data.max_response_length={MAX_RESPONSE}"
    yield f"trainer.total_training_steps={scale.steps}"
    yield f"trainer.test_freq={scale.look_every}"
    yield "trainer.resume_mode=disable"
    yield "trainer.logger=[file]"
    templates = TEMPLATES[{"sdpo": "sibling", "rlsd": "hinted"}[method]]
    for name, template in templates.items():
        yield f'+distillation.context.{name}="{template}"'
    if method == "rlsd":
        yield "distillation.distillation_loss.teacher_sync_steps=10"
        yield "distillation.reference_key=extra_info.answer"


def write_inputs(folder: Path) -> None:
    """Write both splits, and the model with the end of a response that the task has."""
    task = make()
    for name, part in {"train": "train", "test": "held_out"}.items():
        rows = [
            {
                "data_source": "plurals",
                "prompt": [{"role": "user", "content": question.prompt}],
                "reward_model": {
                    "style": "rule",
                    "ground_truth": question.response.split('"')[0],
                },
                "extra_info": {"index": place, "answer": question.answer},
            }
            for place, question in enumerate(task.questions[part])
        ]
        Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
    from transformers import AutoTokenizer, GenerationConfig

    shutil.copytree(model_directory(DEFAULT_CACHE), folder / "model", dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    (newline,) = tokenizer("\n")["input_ids"]
    ends = GenerationConfig.from_pretrained(folder / "model")
    ends.eos_token_id = [tokenizer.eos_token_id, newline]
    ends.save_pretrained(folder / "model")


def run(method: str, seed: int, folder: Path, others: list[str]) -> dict[str, Any]:
    """Train once; return the held-out accuracy by step, and the last step's metrics."""
    metrics = folder / f"{method}-{seed}.jsonl"
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "RECIPE": method,
        "VERL_FILE_LOGGER_PATH": str(metrics),
    }
    data = [
        str(folder / "model"),
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/test.parquet",
        f"reward.custom_reward_function.path={__file__}",
        f"trainer.default_local_dir={folder}/checkpoints",
    ]
    command = [str(COMMAND), *data, *settings(method, seed), *others]
    with (folder / f"{method}-{seed}.log").open("wb") as log:
        subprocess.run(
            command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, check=True
        )
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    curve = {line["step"]: line["data"][ACCURACY] for line in lines if ACCURACY in line["data"]}
    return {"method": method, "seed": seed, "accuracy": curve, "last": lines[-1]["data"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods.in_verl", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="receives data, logs and results")
    parser.add_argument("--methods", nargs="+", choices=("sdpo", "rlsd"), default=["sdpo", "rlsd"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], help="further settings of verl")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_inputs(folder)
    for method in options.methods:
        for seed in range(options.seeds):
            result = run(method, seed, folder, options.set)
            print(method, seed, result["accuracy"], flush=True)
            with (folder / "results.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
