"""What a dataset must have before a trainer starts."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasets import Dataset, IterableDataset, Value
from transformers import ProcessorMixin

from fused_sd.checks import fail
from fused_sd.integrations.shared.texts import as_text

PROMPT, PRIVILEGED = "prompt", "privileged_context"
BATCH = 1000  # rows that are read together


def check_config(trainer: str, args: Any, wanted: type) -> None:
    """Refuse arguments that are not a trainer's configuration, such as TRL's of the same name."""
    if isinstance(args, wanted):
        return
    needed, got = (f"{kind.__module__}.{kind.__qualname__}" for kind in (wanted, type(args)))
    remedy = f"pass args={wanted.__name__}(...), imported from there"
    fail("args", f"be a {needed} for {trainer}", got, remedy)


class DataChecks:
    """Mixin before ``GRPOTrainer`` that says what is wrong with data before a step is made.

    A stream tells its columns with its rows, which are checked as they come.
    """

    _needed: tuple[str, ...] = (PROMPT,)  # columns; set from the arguments
    _has_sampled = False

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *others: Any,
        **kwargs: Any,
    ) -> None:
        # An environment may write the prompts itself.
        prompts = () if kwargs.get("environment_factory") else (PROMPT,)
        self._needed = (*prompts, *((PRIVILEGED,) if self.reads_privileged(args) else ()))
        self._check("train_dataset", train_dataset)
        self._check("eval_dataset", eval_dataset)
        given = (model, reward_funcs, args, train_dataset, eval_dataset, *others)
        super().__init__(*given, **kwargs)
        if train_dataset is not None:
            check_modalities(type(self).__name__, train_dataset, self.processing_class)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse a stream that ends before its first batch, after which TRL makes no step."""
        output = super().train(*args, **kwargs)
        is_stream = isinstance(self.train_dataset, IterableDataset)
        if is_stream and not self.state.global_step and not self._has_sampled:
            self._refuse_size("a stream that ended before")
        return output

    def get_train_dataloader(self) -> Any:
        """Refuse a dataset that does not fill a batch: TRL's sampler drops it and makes no step."""
        size = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        if size is not None and size < self.args.generation_batch_size // self.num_generations:
            self._refuse_size(f"{size} rows")
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Check a dataset that ``evaluate`` was given, too."""
        if not isinstance(eval_dataset, str):
            self._check("eval_dataset", eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Check the rows, of which a stream has told nothing before, and an evaluation's groups.

        TRL checks these only where ``eval_strategy`` evaluates during training.
        """
        self._has_sampled = True
        size, count = self.num_generations_eval, self.accelerator.num_processes
        if not self.model.training and len(inputs) * count % size:
            rule = f"hold whole groups of num_generations_eval={size} on {count} processes"
            remedy = "make it a multiple, or set num_generations_eval"
            fail("per_device_eval_batch_size", rule, f"a batch of {len(inputs)}", remedy)
        columns = sorted({name for row in inputs for name in row})
        check_columns(type(self).__name__, "the dataset", columns, self._needed)
        if PROMPT in self._needed:
            for n, row in enumerate(inputs):
                _check_prompt("the dataset", row.get(PROMPT), f"row {n} of a batch")
        return super()._generate_and_score_completions(inputs)

    def _check(self, role: str, dataset: Any) -> None:
        """Refuse a dataset without a row, without a needed column or with values of no use."""
        if role == "eval_dataset" and isinstance(dataset, Mapping):
            for name, one in dataset.items():
                self._check(f"eval_dataset[{name!r}]", one)
            return
        if isinstance(dataset, Mapping):
            got = f"a {type(dataset).__name__} of {', '.join(map(repr, dataset))}"
            fail(role, "be one dataset", got, 'choose one of them, such as dataset["train"]')
        columns = getattr(dataset, "column_names", None)
        if columns is not None:
            check_columns(type(self).__name__, role, columns, self._needed)
        if hasattr(dataset, "__len__") and not len(dataset):
            fail(role, "have a row", "an empty dataset", "look at what filtered it")
        # A dataset with a transform makes its rows when they are read.
        if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
            return
        if PROMPT in self._needed:
            for n, prompt in enumerate(_values(dataset, PROMPT)):
                _check_prompt(role, prompt, f"row {n}")
        if PRIVILEGED in self._needed:
            has_any = _check_contexts(role, dataset)
            # A method may read this from arguments that are not set yet.
            needs_signal = getattr(self, "needs_signal", True)
            if not has_any and role != "train_dataset" and needs_signal:
                rule = f"have a row with a {PRIVILEGED}: else its loss is 0, the best there is"
                fail(role, rule, "missing values alone", "evaluate on rows with a context")

    def _refuse_size(self, got: str) -> None:
        needed = self.args.generation_batch_size // self.num_generations
        fail(
            "train_dataset",
            f"fill a batch of {needed} prompts with {self.num_generations} rollouts each",
            got,
            "add rows, or lower per_device_train_batch_size, gradient_accumulation_steps or "
            "steps_per_generation",
        )


_MEANING = {
    PROMPT: ("text or chat messages", "rename the column that holds the questions"),
    PRIVILEGED: (
        "what only the teacher may see",
        "add the reference answer, solution or demonstration under that name",
    ),
}


def check_columns(
    trainer: str, role: str, columns: Iterable[str], needed: Iterable[str] = (PROMPT,)
) -> None:
    """Refuse a dataset without a column that a trainer reads."""
    for column in needed:
        if column not in columns:
            meaning, remedy = _MEANING[column]
            rule = f"have a column {column} for {trainer}, {meaning}"
            fail(role, rule, f"columns {', '.join(columns)}", remedy)


def _check_prompt(role: str, prompt: Any, row: str) -> None:
    rule = "have prompts of text or chat messages"
    if not prompt:
        fail(role, rule, f"{prompt!r} in {row}", "remove the row")
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, list) or not all(isinstance(turn, Mapping) for turn in prompt):
        remedy = 'write a text, or [{"role": "user", "content": text}]'
        fail(role, rule, f"{prompt!r} in {row}", remedy)


def _check_contexts(role: str, dataset: Dataset) -> bool:
    """Refuse contexts that are no text, by their rows' numbers; return whether any is there."""
    # All values of a column have one type: where it is a number or text, one value tells of all.
    is_text = isinstance(dataset.features[PRIVILEGED], Value)
    is_known = False
    for n, value in enumerate(_values(dataset, PRIVILEGED)):
        is_known |= bool(as_text(PRIVILEGED, value, f"row {n} of {role}"))
        if is_text and is_known:
            break
    return is_known


def _values(dataset: Dataset, column: str) -> Iterator[Any]:
    """Yield a column's values, of which images are not decoded."""
    for table in dataset.select_columns([column]).with_format("arrow").iter(BATCH):
        yield from table.column(column).to_pylist()


def check_modalities(name: str, dataset: Any, processing_class: Any) -> None:
    """Refuse images that a text model would not see; warn of what GRPOTrainer does not read."""
    columns = set(getattr(dataset, "column_names", None) or ())
    images = [f"a column {name!r}" for name in sorted(columns & {"image", "images"})]
    is_stream = isinstance(dataset, IterableDataset)
    first = {} if is_stream or not len(dataset) else dataset[0]
    if _shows_images(first.get("prompt")):
        images.append("images in its prompts")
    if images and not isinstance(processing_class, ProcessorMixin):
        fail(
            "processing_class",
            f"be a processor, for the dataset has {images[0]}",
            type(processing_class).__name__,
            "pass a vision-language model and its processor, or remove the column",
        )
    if others := sorted(columns & {"video", "videos", "audio", "audios"}):
        warnings.warn(
            f"{name} reads no {', '.join(others)}: such columns reach the rewards alone",
            stacklevel=4,
        )


def _shows_images(prompt: Any) -> bool:
    """Return whether a prompt's messages hold images, which a text template would not show."""
    contents = [] if isinstance(prompt, str) else [turn["content"] for turn in prompt or ()]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(part.get("type") == "image" for part in parts)
