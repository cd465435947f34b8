"""OPSD on sums: forward KL to the initial model, which reads the solution.

python -m fused_sd.integrations.examples.opsd
"""

from fused_sd.integrations.examples.start import train
from fused_sd.integrations.trl import OPSDConfig, OPSDTrainer

if __name__ == "__main__":
    train(OPSDTrainer, OPSDConfig, reward=None)
