"""RFT on sums: cross entropy on the model's own correct responses.

python -m fused_sd.integrations.examples.rft
"""

from fused_sd.integrations.examples.start import train
from fused_sd.integrations.trl import RFTConfig, RFTTrainer

if __name__ == "__main__":
    train(RFTTrainer, RFTConfig)
