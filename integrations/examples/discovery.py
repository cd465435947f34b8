"""Test-time self-distillation: train on one sum until a response passes.

python -m fused_sd.integrations.examples.discovery --num_questions 1
"""

from fused_sd.integrations.examples.arithmetic import feedback
from fused_sd.integrations.examples.start import train
from fused_sd.integrations.trl import DiscoveryConfig, DiscoveryTrainer

if __name__ == "__main__":
    found = train(DiscoveryTrainer, DiscoveryConfig, feedback_func=feedback)
    print(f"first success: attempt {found.first_success} of {len(found.rewards)}")
