"""RLSD on sums: GRPO whose advantages a teacher with the solution weights, token by token.

python -m fused_sd.integrations.examples.rlsd
"""

from fused_sd.integrations.examples.start import train
from fused_sd.integrations.trl import RLSDConfig, RLSDTrainer

if __name__ == "__main__":
    train(RLSDTrainer, RLSDConfig)
