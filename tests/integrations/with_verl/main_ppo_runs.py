"""Runs of ``main_ppo`` on a tiny model, by the command that a user types."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[3]
COMMAND = ROOT / "integrations" / "examples" / "verl_on_cpu.sh"
STEPS, SAVED_AFTER = 5, 3
# a small run of every recipe: 8 responses and one update a step
SETTINGS = (
    "data.train_batch_size=2",
    "data.max_prompt_length=128",
    "data.max_response_length=12",
    "data.shuffle=false",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
    "trainer.logger=[file]",
    f"trainer.total_training_steps={STEPS}",
    f"trainer.save_freq={SAVED_AFTER}",
    "trainer.test_freq=2",
)


def make_config(words: Any, size: int) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(words),
        hidden_size=size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def make_inputs(folder: pathlib.Path) -> None:
    """Write two random models and the questions of both splits."""
    import torch
    from chat_tokenizer import tokenizer
    from datasets import Dataset
    from transformers import Qwen3ForCausalLM

    words = tokenizer()
    for seed, (name, size) in enumerate({"model": 32, "teacher": 48}.items()):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(make_config(words, size)).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    for name, places in {"train": range(10, 22), "test": range(30, 34)}.items():
        rows = [
            {
                "data_source": "sums",
                "prompt": [{"role": "user", "content": f"{place}+1?"}],
                "reward_model": {"style": "rule", "ground_truth": str(place + 1)},
                "extra_info": {"index": place, "answer": f"{place}+1 is {place + 1}."},
            }
            for place in places
        ]
        Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")


def compute_score(solution_str: str, ground_truth: str, **_: Any) -> dict[str, Any]:
    """Call about one random response in four right, and say something about the others."""
    is_right = sum(map(ord, solution_str)) % 4 == 0
    said = "" if is_right else f"It is not {len(solution_str)}, but {ground_truth}."
    return {"score": float(is_right), "feedback": said}


class Run:
    """One ``main_ppo`` process, which trains in a folder and leaves its log there."""

    def __init__(self, recipe: str, folder: pathlib.Path, name: str, *settings: str) -> None:
        self.metrics_file = folder / f"{name}.jsonl"
        self.log = folder / f"{name}.log"
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("VERL_")},
            "PATH": os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "RECIPE": recipe,
            "VERL_FILE_LOGGER_PATH": str(self.metrics_file),
        }
        command = [
            str(COMMAND),
            str(folder / "model"),
            f"data.train_files={folder}/train.parquet",
            f"data.val_files={folder}/test.parquet",
            f"reward.custom_reward_function.path={__file__}",
            f"trainer.default_local_dir={folder}/checkpoints",
            *SETTINGS,
            *settings,
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def metrics(self) -> dict[int, dict[str, Any]]:
        """Return what verl logged so far: a step's numbers by its number; 0 is before training."""
        lines = self.metrics_file.read_text().splitlines() if self.metrics_file.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return {line["step"]: line["data"] for line in found}

    def wait(self, timeout: float = 600) -> dict[int, dict[str, Any]]:
        """Return the metrics of a run that ended well."""
        try:
            code = self.process.wait(timeout)
        finally:
            self.end()
        assert code == 0, self.log.read_text(errors="replace")[-6000:]
        return self.metrics()

    def kill_after(self, step: int, timeout: float = 600) -> dict[int, dict[str, Any]]:
        """Kill the driver, without a warning, once a step is logged; return the metrics."""
        limit = time.monotonic() + timeout
        while step not in self.metrics():
            ended = self.process.poll() is not None or time.monotonic() > limit
            assert not ended, self.log.read_text(errors="replace")[-6000:]
            time.sleep(0.1)
        self.process.kill()
        self.process.wait()
        self.end()
        return self.metrics()

    def end(self) -> None:
        """Leave no process behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
