"""RLSD with images: count shapes; the teacher sees the picture and reads what is in it.

python -m fused_sd.integrations.examples.rlsd_images
"""

from fused_sd.integrations.examples.shapes import pictures
from fused_sd.integrations.examples.start import train
from fused_sd.integrations.trl import RLSDConfig, RLSDTrainer

MODELS = ("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-2B-Thinking")

if __name__ == "__main__":
    train(
        RLSDTrainer,
        RLSDConfig,
        dataset=pictures,
        models=MODELS,
        settings={"chat_template_kwargs": None},  # one of the models thinks, by no switch
    )
