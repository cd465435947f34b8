"""RLCSD on sums: GRPO whose advantages change by the contrast of right and wrong hints.

python -m fused_sd.integrations.examples.rlcsd
"""

from fused_sd.integrations.examples.arithmetic import last_number
from fused_sd.integrations.examples.start import train
from fused_sd.integrations.trl import RLCSDConfig, RLCSDTrainer


class SumsTrainer(RLCSDTrainer):
    """RLCSD for answers that are a response's last number and stand in no box."""

    def final_answer(self, text: str) -> str | None:
        return last_number(text)


if __name__ == "__main__":
    train(SumsTrainer, RLCSDConfig)
