"""SDPO on programs: they are run on tests, and the teacher reads which test fails, and how.

python -m fused_sd.integrations.examples.sdpo_code

Each program runs in a process with limits; ``fused_sd.integrations.verdicts.programs`` says what
they hold and what they do not.  The tasks are made here.  For others pass a dataset with columns
``prompt`` and ``tests``: MBPP's ``test_list`` is such a column under another name.
"""

from fused_sd.integrations.examples.programming import programs
from fused_sd.integrations.examples.start import train
from fused_sd.integrations.trl import SDPOConfig, SDPOTrainer
from fused_sd.integrations.verdicts import CodeVerifier

MODELS = ("Qwen/Qwen2.5-Coder-0.5B-Instruct", "Qwen/Qwen3-1.7B")
# the paper's runs with feedback differ in these from its other runs
WITH_FEEDBACK = {
    "distillation_alpha": 1.0,
    "distillation_topk": 20,
    "teacher_update_rate": 0.01,
    "learning_rate": 1e-6,
}

if __name__ == "__main__":
    judge = CodeVerifier()
    train(
        SDPOTrainer,
        SDPOConfig,
        dataset=programs,
        reward=judge,
        models=MODELS,
        settings=WITH_FEEDBACK,
        feedback_func=judge.feedback,
    )
