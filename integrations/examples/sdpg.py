"""SDPG on sums: GRPO, and a divergence from the model itself when it reads the solution.

python -m fused_sd.integrations.examples.sdpg
"""

from fused_sd.integrations.examples.start import train
from fused_sd.integrations.trl import SDPGConfig, SDPGTrainer

if __name__ == "__main__":
    train(SDPGTrainer, SDPGConfig)
