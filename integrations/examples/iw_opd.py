"""IW-OPD on sums: the sampled token's log-ratio to the initial model, which reads the solution.

python -m fused_sd.integrations.examples.iw_opd
"""

from fused_sd.integrations.examples.start import train
from fused_sd.integrations.trl import IWOPDConfig, IWOPDTrainer

if __name__ == "__main__":
    train(IWOPDTrainer, IWOPDConfig, reward=None)
