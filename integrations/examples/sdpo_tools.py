"""SDPO with a tool: the model calls a calculator, reads its result and answers.

python -m fused_sd.integrations.examples.sdpo_tools

The loss is on the model's own tokens in every turn.  The teacher reads the same turns, tool results
included, behind a prompt with a successful sibling or with feedback.
"""

from fused_sd.integrations.examples.calculations import calculate, feedback, orders, reward
from fused_sd.integrations.examples.start import train
from fused_sd.integrations.trl import SDPOConfig, SDPOTrainer

if __name__ == "__main__":
    train(
        SDPOTrainer,
        SDPOConfig,
        dataset=orders,
        reward=reward,
        feedback_func=feedback,
        tools=[calculate],
        settings={"max_tool_calling_iterations": 4},
    )
