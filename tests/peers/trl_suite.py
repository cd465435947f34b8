"""TRL's own tests with its trainers and with ours in their place.

    python tests/peers/trl_suite.py CHECKOUT [FILE ...] [--only EXPRESSION] [--mode MODE]

CHECKOUT is a folder with TRL's package ``tests``, of any version: it runs against the installed
TRL.  FILEs are relative to it; without any, those of FILES run.  Nothing is downloaded: models and
data are tiny stand-ins under the hub's names.  Each file runs twice in fp32, and what is compared
are logged values, the loss of each call and the gradient's norm after each step.  The exit status
is 1 if a test is lost with our trainers, or if a value differs.
"""

import sys
from pathlib import Path

import suites

FILES = (
    "tests/experimental/test_sdpo_trainer.py",
    "tests/experimental/test_sdft_trainer.py",
    "tests/experimental/test_self_distillation_trainer_behavior.py",
    "tests/experimental/test_gkd_trainer.py",
    "tests/test_grpo_trainer.py",
)
MODES = ("", "sampled_token", "topk_logits", "full_logits")


def prepared(checkout: Path, folder: Path) -> None:
    """Copy TRL's tests into a working directory, and write the stand-ins there."""
    import trl_stand_ins

    suites.copied(checkout, folder, "tests")
    trl_stand_ins.write(folder)


SUITE = suites.Suite(
    "TRL",
    "trl_plugin",
    FILES,
    prepared,
    counts=("logits",),
    environment={
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": "cache",
        "TORCHDYNAMO_DISABLE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    },
)

if __name__ == "__main__":
    sys.path[:0] = [str(suites.ROOT), str(suites.ROOT / "tests" / "support")]
    sys.exit(suites.main(SUITE, __doc__, mode=MODES))
