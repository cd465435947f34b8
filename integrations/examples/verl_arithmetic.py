"""Sums for verl: a parquet file for each split, and a reward function with feedback.

python -m fused_sd.integrations.examples.verl_arithmetic FOLDER
"""

import argparse
import pathlib
from typing import Any

from datasets import Dataset

from fused_sd.integrations.examples.arithmetic import feedback, questions, reward


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any
) -> dict[str, Any]:
    """Return the score, and the feedback that SDPO's teacher reads.

    To be named in verl's setting ``reward.custom_reward_function``.
    """
    (score,) = reward([solution_str], [ground_truth])
    (answer,) = feedback([solution_str], [ground_truth])
    return {"score": score, "feedback": answer or ""}


def split(num: int, *, seed: int) -> Dataset:
    """Make a dataset with verl's columns; ``extra_info.answer`` is the worked solution."""
    rows = [
        {
            "data_source": "sums",
            "prompt": question["prompt"],
            "reward_model": {"style": "rule", "ground_truth": question["answer"]},
            "extra_info": {"index": n, "answer": question["privileged_context"]},
        }
        for n, question in enumerate(questions(num, seed=seed))
    ]
    return Dataset.from_list(rows)


def main() -> None:
    """Write the two splits into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, num) in enumerate({"train": 4096, "test": 256}.items()):
        split(num, seed=seed).to_parquet(folder / f"{name}.parquet")


if __name__ == "__main__":
    main()
