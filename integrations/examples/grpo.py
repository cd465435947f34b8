"""GRPO on sums: the baseline, on the rollouts of the other methods.

python -m fused_sd.integrations.examples.grpo
"""

from fused_sd.integrations.examples.start import train
from fused_sd.integrations.trl import GRPOConfig, GRPOTrainer

if __name__ == "__main__":
    train(GRPOTrainer, GRPOConfig)
