"""Data that no trainer can use is refused before a step is made."""

import copy

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from method_pairs import DATA, METHODS, make
from trl.chat_template_utils import qwen3_chat_template
from trl_pairs import TOKENIZER

BARE = DATA.remove_columns("privileged_context")
CHAT = [{"role": "user", "content": "2 + 2?"}]


def rows(prompts, contexts="It is 4."):
    contexts = [contexts] * len(prompts) if isinstance(contexts, str | None) else contexts
    return Dataset.from_dict({"prompt": prompts, "privileged_context": contexts})


@pytest.mark.parametrize("method", METHODS)
def test_a_dataset_without_prompts_is_refused_by_every_method(method, tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset must have a column prompt for \w+, text"):
        make(method, tmp_path, data=DATA.rename_column("prompt", "question"))


@pytest.mark.parametrize(
    "data, message",
    [
        (
            DatasetDict(train=DATA, test=DATA),
            "train_dataset must be one dataset, got a DatasetDict of 'train', 'test'; choose one",
        ),
        ({"train": DATA}, "train_dataset must be one dataset, got a dict of 'train'"),
        (DATA.select([]), "train_dataset must have a row, got an empty dataset"),
        (rows(["2 + 2?"] * 7 + [""]), "train_dataset must have prompts .*, got '' in row 7"),
        (rows([CHAT, []]), r"train_dataset must have prompts .*, got \[\] in row 1"),
        (rows(["2 + 2?", None]), "train_dataset must have prompts .*, got None in row 1"),
        (BARE, "train_dataset must have a column privileged_context for OPSDTrainer"),
    ],
    ids=["DatasetDict", "dict", "empty", "''", "[]", "None", "no context"],
)
def test_a_dataset_of_no_use_is_refused_when_the_trainer_is_made(data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make("OPSD", tmp_path, data=data)


def test_rows_that_a_selection_leaves_out_do_not_count(tmp_path):
    data = rows(["", "2 + 2?", "3 + 3?"], [None, "4", "6"])
    make("OPSD", tmp_path, data=data.select([2, 1]))


@pytest.mark.parametrize(
    "data, message",
    [
        (DATA.rename_column("prompt", "question"), "the dataset must have a column prompt"),
        (BARE, "the dataset must have a column privileged_context"),
        (rows([""] * 4), "the dataset must have prompts .*, got '' in row 0 of a batch"),
    ],
    ids=["no prompt", "no context", "empty prompt"],
)
def test_a_stream_or_a_transform_is_refused_at_its_first_row(data, message, tmp_path):
    def stream():
        yield from data

    unknown = IterableDataset.from_generator(stream)
    assert unknown.column_names is None
    with pytest.raises(ValueError, match=message):
        make("OPSD", tmp_path, data=unknown).train()
    if "prompt" in data.column_names and "privileged_context" in data.column_names:
        hidden = data.with_transform(lambda batch: batch)
        with pytest.raises(ValueError, match=message):
            make("OPSD", tmp_path, data=hidden).train()


def test_fewer_rows_than_a_batch_are_refused_before_a_step(tmp_path):
    settings = {"per_device_train_batch_size": 8}  # two prompts
    rule = "train_dataset must fill a batch of 2 prompts with 4 rollouts each, got "
    one = DATA.select([0])
    with pytest.raises(ValueError, match=f"{rule}1 rows; add rows, or lower"):
        make("OPSD", tmp_path, data=one, **settings).train()
    with pytest.raises(ValueError, match=f"{rule}a stream that ended before"):
        make("OPSD", tmp_path, data=one.to_iterable_dataset(), **settings).train()
    two = make("OPSD", tmp_path, data=DATA.select([0, 1]), max_steps=1, **settings)
    two.train()
    assert two.state.global_step == 1


NONE = rows(["2 + 2?"] * 4, None)
BAD = {
    "no context": (BARE, "must have a column privileged_context"),
    "no context in any row": (NONE, "must have a row with a privileged_context: else its loss is"),
    "no prompt": (DATA.remove_columns("prompt"), "must have a column prompt"),
    "no row": (DATA.select([]), "must have a row, got an empty dataset"),
}


@pytest.mark.parametrize("name", BAD)
def test_evaluation_data_of_no_use_is_refused(name, tmp_path):
    data, message = BAD[name]
    with pytest.raises(ValueError, match=f"eval_dataset {message}"):
        make("OPSD", tmp_path, eval_dataset=data)
    with pytest.raises(ValueError, match=rf"eval_dataset\['b'\] {message}"):
        make("OPSD", tmp_path, eval_dataset={"a": DATA, "b": data})
    trainer = make("OPSD", tmp_path, eval_dataset={"a": DATA, "b": DATA})
    for given in (data, {"a": data}, DatasetDict(test=data)):
        with pytest.raises(ValueError, match=f"eval_dataset {message}"):
            trainer.evaluate(eval_dataset=given)


def test_several_datasets_are_evaluated_on_after_the_checks(tmp_path):
    losses = make("OPSD", tmp_path, eval_dataset={"a": DATA, "b": DATA}).evaluate()
    assert losses["eval_a_loss"] > 0
    assert losses["eval_b_loss"] > 0


def test_a_stream_to_evaluate_on_is_refused_too(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset must have a column privileged_context"):
        make("OPSD", tmp_path, eval_dataset=BARE.to_iterable_dataset())


def test_methods_whose_loss_needs_no_context_evaluate_on_rows_without(tmp_path):
    make("RLSD", tmp_path, eval_dataset=NONE)
    make("GRPO", tmp_path, eval_dataset=BARE)
    with pytest.raises(ValueError, match="eval_dataset must have a column privileged_context"):
        make("RLSD", tmp_path, eval_dataset=BARE)


class Environment:
    def reset(self, **_) -> str:
        """Write the prompt."""
        return "2 + 2?"

    def answer(self, text: str) -> str:
        """
        Say the answer.

        Args:
            text: The answer.
        """
        return text


def test_an_environment_may_write_the_prompts(tmp_path):
    data = Dataset.from_dict({"question": ["2 + 2?"] * 4})
    words = copy.copy(TOKENIZER)
    words.chat_template = qwen3_chat_template
    given = {"environment_factory": Environment, "feedback_func": None, "processor": words}
    assert make("SDPO", tmp_path, data=data, **given).train_dataset is data
