"""SDPO on sums: the teacher sees a successful sibling, or feedback on the response.

python -m fused_sd.integrations.examples.sdpo
"""

from fused_sd.integrations.examples.arithmetic import feedback
from fused_sd.integrations.examples.start import train
from fused_sd.integrations.trl import SDPOConfig, SDPOTrainer

if __name__ == "__main__":
    train(SDPOTrainer, SDPOConfig, feedback_func=feedback)
