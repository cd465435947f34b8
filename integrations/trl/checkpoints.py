"""Checkpoints that are whole, or are not resumed from.

A run may be killed, or its disk be full, while it writes a checkpoint.  Trainer writes
``trainer_state.json`` last, and only then removes older checkpoints (read in transformers 5.24).
All that a trainer adds is written before: a folder is whole exactly if that file is.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fused_sd.checks import fail

# what torch, safetensors and Python raise where a file cannot be written
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


class WholeCheckpoints:
    """The part of a trainer that saves whole checkpoints and resumes from no other."""

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as Trainer does; ``True`` resumes from the last checkpoint that is whole.

        Raises:
            ValueError: the given checkpoint is not whole, or none is.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole(self.args.output_dir)
        elif resume_from_checkpoint:
            _check_whole(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_beside(self, folder: str) -> None:
        """Write into a checkpoint's folder what Trainer does not; all processes call it."""

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        number = self.state.global_step
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{number}")
        try:
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                # of an earlier run, whose other files are overwritten now
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            self._save_beside(str(folder))
            super()._save_checkpoint(model, trial)
        except WRITE_ERRORS as error:
            raise OSError(
                f"the checkpoint {folder} could not be written: {error}.  Once it can, "
                "train(resume_from_checkpoint=True) goes on from the last one that is whole"
            ) from error


def _is_whole(folder: str | Path) -> bool:
    """Return whether a checkpoint was written to its end."""
    try:
        json.loads(Path(folder, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _check_whole(folder: str) -> None:
    if not _is_whole(folder):
        got = f"{folder} without a readable {TRAINER_STATE_NAME}"
        remedy = "pass an earlier one, or True for the last one that is whole"
        fail("resume_from_checkpoint", "be a checkpoint that was written to its end", got, remedy)


def last_whole(output_dir: str) -> str:
    """Return a run's last whole checkpoint, with a warning if there are later ones."""
    numbers = {
        int(path.name.rpartition("-")[2]): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdecimal()
    }
    folders = [numbers[number] for number in sorted(numbers)]
    whole = [folder for folder in folders if _is_whole(folder)]
    if not whole:
        got = f"{len(folders)} checkpoints, none of them written to its end"
        remedy = "leave it out to start from the beginning"
        fail("resume_from_checkpoint", f"find a whole checkpoint in {output_dir}", got, remedy)
    cut = [folder.name for folder in folders[folders.index(whole[-1]) + 1 :]]
    if cut:
        warnings.warn(
            f"{', '.join(cut)} in {output_dir} was not written to its end: the run goes on from "
            f"{whole[-1].name}",
            stacklevel=3,
        )
    return str(whole[-1])
