"""SD-Zero's second phase on sums; pass the model that sd_zero_phase1 saved.

python -m fused_sd.integrations.examples.sd_zero_phase2 --model sd-zero-srt

Both phases use one chat format: pass ``--thinking`` here if the first phase had it.
"""

from fused_sd.integrations.examples.start import train
from fused_sd.integrations.trl import SDZeroConfig, SDZeroTrainer

if __name__ == "__main__":
    train(SDZeroTrainer, SDZeroConfig)
