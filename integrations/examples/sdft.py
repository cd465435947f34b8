"""SDFT on sums: forward KL to the model's moving average, which reads a demonstration.

python -m fused_sd.integrations.examples.sdft
"""

from fused_sd.integrations.examples.start import train
from fused_sd.integrations.trl import SDFTConfig, SDFTTrainer

if __name__ == "__main__":
    train(SDFTTrainer, SDFTConfig, reward=None)
