"""Tiny models and data under the names that TRL's own tests ask the hub for."""

import json
from pathlib import Path

import torch
import transformers
import trl
from trl_pairs import byte_tokenizer

ORGANISATION = "trl-internal-testing"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 4096,
}
# name, class, template: one of those that TRL knows to change for training
MODELS = (
    ("tiny-Qwen2ForCausalLM-2.5", "Qwen2ForCausalLM", "qwen2_5"),
    ("tiny-Qwen2ForSequenceClassification-2.5", "Qwen2ForSequenceClassification", "qwen2_5"),
    ("tiny-Qwen3ForCausalLM", "Qwen3ForCausalLM", "qwen3"),
    ("tiny-Qwen3ForSequenceClassification", "Qwen3ForSequenceClassification", "qwen3"),
    ("tiny-LlamaForCausalLM-3.2", "LlamaForCausalLM", "llama3_2"),
    (
        "tiny-LlamaForSequenceClassification-3.2",
        "LlamaForSequenceClassification",
        "llama3_2",
    ),
    ("tiny-MistralForCausalLM-0.2", "MistralForCausalLM", "qwen2_5"),
)
SENTENCES = (
    "A kettle sings before it boils.",
    "Rain on the roof makes no promises.",
    "Count the stones, then cross the river.",
    "A door that sticks is still a door.",
    "The cat has read this page already.",
    "Salt the water, not the story.",
    "Every map leaves the weather out.",
    "Two clocks never agree for long.",
    "A short rope makes a careful goat.",
    "Sweep the stairs from the top.",
    "The loaf is done when it sounds hollow.",
    "Borrowed boots know another road.",
    "A lamp does not argue with the dark.",
    "Plant beans where the fence is strong.",
    "What is written small is read twice.",
    "The tide keeps no appointments.",
    "Leave the gate as you found it.",
    "An old bridge hums in the wind.",
    "Warm hands, cold dough, good crust.",
)
NUM_TEST = 2


def write(folder: Path) -> None:
    """Write models and data into a folder; from it, their names are paths.

    Args:
        folder: The working directory of the tests.
    """
    transformers.utils.logging.disable_progress_bar()
    root = folder / ORGANISATION
    for name, kind, template in MODELS:
        _write_model(root / name, kind, template)
    _write_data(root / "zen")


def _write_model(place: Path, kind: str, template: str) -> None:
    tokenizer = byte_tokenizer()
    marks = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.eos_token = "<|eot_id|>" if template.startswith("llama") else "<|im_end|>"
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(place)
    config = getattr(transformers, f"{kind.split('For')[0]}Config")(
        **SIZES,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.3,  # sharp enough that a lesson moves every weight
        num_labels=1 if "Classification" in kind else 2,
    )
    torch.manual_seed(0)
    getattr(transformers, kind)(config).save_pretrained(place)


def _write_data(place: Path) -> None:
    place.mkdir(parents=True)
    configs = []
    halves = [(s[: len(s) // 2], s[len(s) // 2 :]) for s in SENTENCES]
    rows = {
        "standard_prompt_only": [{"prompt": start} for start, _ in halves],
        "conversational_prompt_only": [{"prompt": [_said("user", start)]} for start, _ in halves],
        "conversational_language_modeling": [
            {"messages": [_said("user", start), _said("assistant", end)]} for start, end in halves
        ],
    }
    for name, data in rows.items():
        files = []
        for split, part in (("train", data[:-NUM_TEST]), ("test", data[-NUM_TEST:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (place / f"{name}-{split}.jsonl").write_text(lines, encoding="utf-8")
            files.append(f"  - split: {split}\n    path: {name}-{split}.jsonl\n")
        configs.append(f"- config_name: {name}\n  data_files:\n{''.join(files)}")
    card = f"---\nconfigs:\n{''.join(configs)}---\n"
    (place / "README.md").write_text(card, encoding="utf-8")


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
