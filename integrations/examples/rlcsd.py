"""RLCSD on sums: GRPO whose advantages change by the contrast of right and wrong hints.

python -m fused_sd.integrations.examples.rlcsd
"""

from fused_sd.integrations.examples.start import train
from fused_sd.integrations.trl import RLCSDConfig, RLCSDTrainer

if __name__ == "__main__":
    train(RLCSDTrainer, RLCSDConfig)
