"""The teacher's sequences, against lists of tokens written by hand."""

import copy
import dataclasses

import numpy as np
import official_prompts as official
import pytest
import torch
from chat_tokenizer import ids, text, tokenizer

from fused_sd.integrations.shared.rollouts import Rollout, Sibling
from fused_sd.integrations.verl.contexts import (
    AnswerContext,
    AttemptContext,
    PromptTokenizer,
    ReferenceContext,
    SiblingContext,
)
from fused_sd.integrations.verl.teacher_sequences import (
    at_student_rows,
    mask_without_context,
    response_rows,
    teacher_batch,
)

PROMPTS = [torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5, 6])]
RESPONSES = [torch.tensor([10, 11, 12]), torch.tensor([], dtype=torch.int64), torch.tensor([13])]
WORDS = PromptTokenizer(tokenizer())


def lists(jagged):
    return [row.tolist() for row in jagged.unbind()]


def test_a_context_stands_before_the_whole_response():
    teacher = teacher_batch(PROMPTS, RESPONSES, [[7, 8, 9], [7], None])
    assert lists(teacher.input_ids) == [[7, 8, 9, 10, 11, 12], [7], [4, 5, 6, 13]]
    assert lists(teacher.position_ids) == [[0, 1, 2, 3, 4, 5], [0], [0, 1, 2, 3]]
    assert teacher.mask.tolist() == [1, 1, 0]
    assert teacher.mask.dtype == torch.float32
    assert teacher.num_truncated == 0
    assert set(teacher.fields()) == {
        "teacher_input_ids",
        "teacher_position_ids",
        "self_distillation_mask",
    }


def test_a_long_context_loses_its_beginning_and_never_the_response():
    teacher = teacher_batch(PROMPTS, RESPONSES, [[7, 8, 9], [7], None], max_prompt_length=2)
    assert lists(teacher.input_ids) == [[8, 9, 10, 11, 12], [7], [4, 5, 6, 13]]
    assert teacher.num_truncated == 1


def test_a_sample_without_a_prompt_or_with_an_empty_context_is_refused():
    with pytest.raises(ValueError, match="contexts must hold a token, got an empty one"):
        teacher_batch(PROMPTS, RESPONSES, [[], None, None])
    with pytest.raises(ValueError, match="prompts must hold a token"):
        teacher_batch([PROMPTS[0][:0]], RESPONSES[:1], [None])
    with pytest.raises(
        ValueError, match="be one for each sample, got 3 prompts, 3 responses and 1"
    ):
        teacher_batch(PROMPTS, RESPONSES, [None])


def test_the_rows_that_predict_the_response_go_onto_the_students():
    teacher = teacher_batch(PROMPTS, RESPONSES, [[7, 8, 9, 9], [7], None])
    # at each row the token that it predicts, as a log-probability would stand there
    offsets = teacher.input_ids.offsets()
    predicted = torch.nested.nested_tensor_from_jagged(
        torch.roll(teacher.input_ids.values(), -1).float(), offsets
    )
    lengths = torch.tensor([3, 0, 1])
    found = response_rows(predicted, lengths)
    assert [row.tolist() for row in found] == [[10, 11, 12], [], [13]]
    placed = at_student_rows(found, PROMPTS)
    assert [row[:, 0].tolist() for row in placed.unbind()] == [
        [0, 10, 11, 12, 0],
        [0],
        [0, 0, 13, 0],
    ]
    assert [row.shape[-1] for row in placed.unbind()] == [1, 1, 1]


def test_verl_reads_the_students_rows_as_a_servers():
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import no_padding_2_padding

    jagged = {
        "prompts": torch.nested.as_nested_tensor(PROMPTS, layout=torch.jagged),
        "responses": torch.nested.as_nested_tensor(RESPONSES, layout=torch.jagged),
    }
    values = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([]), torch.tensor([-4.0])]
    read = no_padding_2_padding(at_student_rows(values, PROMPTS), tu.get_tensordict(jagged))
    assert read.squeeze(-1).tolist() == [[-1, -2, -3], [0, 0, 0], [-4, 0, 0]]


def test_tokens_of_samples_without_a_context_are_not_taught():
    mask = torch.nested.as_nested_tensor(
        [torch.tensor([1, 0, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([1])],
        layout=torch.jagged,
    )
    assert lists(mask_without_context(mask, torch.tensor([1.0, 1.0, 0.0]))) == [[1, 0, 1], [], [0]]


PROMPT = [{"role": "system", "content": "Sum."}, {"role": "user", "content": "1+1?"}]


def rollout(**changes):
    own = Rollout(
        prompt=PROMPT,
        prompt_ids=WORDS.chat(PROMPT),
        completion_ids=[*ids("3"), tokenizer().eos_token_id],
        text="3",
        reward=0.0,
        privileged="2",
        feedback="Too large.",
        index=0,
        group=[Sibling(0, "3", 0.0), Sibling(1, "<think>1, 2</think> It is 2.", 1.0)],
    )
    return dataclasses.replace(own, **changes)


def chat(user):
    return WORDS.chat([PROMPT[0], {"role": "user", "content": user}])


def test_sdpo_shows_the_first_success_without_its_thoughts():
    shown = SiblingContext().teacher_prompt(rollout(), WORDS)
    expected = "1+1?\nCorrect solution:\n\nIt is 2.\n\nCorrectly solve the original question."
    assert text(shown) == text(chat(expected))
    assert text(shown).startswith("<|im_start|>system\nSum.<|im_end|>")
    assert text(shown).endswith("<|im_start|>assistant\n")
    thinking = SiblingContext(remove_thinking_from_demonstration=False)
    assert "<think>1, 2</think>" in text(thinking.teacher_prompt(rollout(), WORDS))


def test_sdpo_has_the_official_prompts_to_the_last_space():
    shown = "<think>1, 2</think> It is 2. \n"
    group = [Sibling(0, "3", 0.0), Sibling(1, shown, 1.0), Sibling(2, "It is two.", 1.0)]
    made = SiblingContext().teacher_prompt(rollout(group=group), WORDS)
    assert text(made) == text(chat(official.sdpo("1+1?", solution=shown)))
    said = "Too large.\n\n"
    alone = rollout(group=[Sibling(0, "3", 0.0)], feedback=said)
    made = SiblingContext().teacher_prompt(alone, WORDS)
    assert text(made) == text(chat(official.sdpo("1+1?", feedback=said)))
    both = SiblingContext(environment_feedback_only_without_solution=False)
    made = both.teacher_prompt(rollout(group=group, feedback=said), WORDS)
    assert text(made) == text(chat(official.sdpo("1+1?", solution=shown, feedback=said)))
    made = SiblingContext().teacher_prompt(dataclasses.replace(alone, feedback=0), WORDS)
    assert text(made) == text(chat(official.sdpo("1+1?", feedback="0")))
    with pytest.raises(ValueError, match=r"feedback must be text, .* got a dict .*'1\+1\?'"):
        SiblingContext().teacher_prompt(rollout(feedback={"line": 3}), WORDS)


def test_opsd_and_rlsd_have_the_official_prompts():
    solution = " It is 2.\n"
    student = [PROMPT[0], {"role": "user", "content": official.opsd_student("1+1? ")}]
    given = rollout(prompt=student, privileged=solution)
    made = ReferenceContext().teacher_prompt(given, WORDS)
    assert text(made) == text(chat(official.opsd("1+1? ", solution)))
    given = rollout(privileged=solution)
    made = AnswerContext().teacher_prompt(given, WORDS)
    assert text(made) == text(chat(official.rlsd("1+1?", solution)))


def test_sdpo_shows_feedback_where_no_sibling_succeeded():
    alone = rollout(group=[Sibling(0, "3", 0.0)])
    shown = text(SiblingContext().teacher_prompt(alone, WORDS))
    assert (
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\nToo large." in shown
    )
    assert "Correct solution" not in shown
    for silent in (
        dataclasses.replace(alone, feedback=None),
        dataclasses.replace(alone, feedback=" "),
    ):
        assert SiblingContext().teacher_prompt(silent, WORDS) is None
    both = SiblingContext(
        environment_feedback_only_without_solution=False, include_own_attempt=True
    )
    shown = text(both.teacher_prompt(rollout(), WORDS))
    assert (
        shown.index("It is 2.") < shown.index("Your earlier attempt:\n\n3") < shown.index("Too l")
    )


def test_a_lone_success_is_its_own_solution_only_where_that_is_asked_for():
    lone = rollout(index=1, feedback=None)
    assert SiblingContext().teacher_prompt(lone, WORDS) is None
    shown = SiblingContext(dont_reprompt_on_self_success=False).teacher_prompt(lone, WORDS)
    assert "It is 2." in text(shown)


def test_opsd_shows_the_reference_and_nothing_without_one():
    context = ReferenceContext("{prompt} Reference: {privileged}")
    assert context.teacher_prompt(rollout(), WORDS) == chat("1+1? Reference: 2")
    assert context.teacher_prompt(rollout(privileged=None), WORDS) is None
    with pytest.raises(ValueError, match=r"reprompt_template must hold \{prompt\}, \{privileged\}"):
        ReferenceContext("{prompt}")


def test_sd_zero_shows_ones_own_response_and_the_verdict():
    context = AttemptContext(correct_phrase="Right.", wrong_phrase="Wrong.")
    prompt = rollout().prompt_ids
    whole = rollout()  # its end token is shown, too
    shown = [*prompt, *ids("3<|im_end|>\n\nWrong.\n\n")]
    assert whole.completion_ids == ids("3<|im_end|>")
    assert context.teacher_prompt(whole, WORDS) == shown
    right = rollout(reward=1.0)
    assert context.teacher_prompt(right, WORDS) == [*prompt, *ids("3<|im_end|>\n\nRight.\n\n")]
    bare = AttemptContext(wrong_phrase="Wrong.", keep_response_end=False)
    assert bare.teacher_prompt(whole, WORDS) == [*prompt, *ids("3\n\nWrong.\n\n")]
    with pytest.raises(ValueError, match="keep_response_end must be True or False, got 'no'"):
        AttemptContext(keep_response_end="no")
    cut = rollout(completion_ids=ids("3 or"))
    assert context.teacher_prompt(cut, WORDS) == [*prompt, *ids("3 or\n\nWrong.\n\n")]
    # the prompt, the attempt, the phrase between its delimiters, and the response again
    length = len(shown) + len(whole.completion_ids)
    assert AttemptContext(wrong_phrase="Wrong.", max_length=length).teacher_prompt(whole, WORDS)
    unknown = dataclasses.replace(whole, reward=float("nan"))
    assert AttemptContext(wrong_phrase="Wrong.").teacher_prompt(unknown, WORDS) is None
    short = AttemptContext(wrong_phrase="Wrong.", max_length=length - 1)
    assert short.teacher_prompt(whole, WORDS) is None


def test_sd_zeros_phrase_is_that_of_the_models_family():
    words = PromptTokenizer(copy.copy(tokenizer()))
    for name, phrase in (
        ("Qwen/Qwen3-1.7B", "Wait, this response is wrong. Let me correct it."),
        ("allenai/Olmo-3-7B-Instruct", "Wrong. I need to redo all."),
    ):
        words.tokenizer.name_or_path = name
        shown = AttemptContext().teacher_prompt(rollout(), words)
        assert text(shown).endswith(f"3<|im_end|>\n\n{phrase}\n\n")


def test_sd_zero_asks_its_reviser_in_the_chat_format_of_phase_1():
    own = copy.copy(tokenizer())
    own.init_kwargs = {**own.init_kwargs, "chat_template_kwargs": {"enable_thinking": False}}
    alike = PromptTokenizer(own, {"enable_thinking": False, "tools": []})
    assert AttemptContext().teacher_prompt(rollout(), alike) is not None
    with pytest.raises(ValueError, match="chat_template_kwargs must be those that the model was"):
        AttemptContext().teacher_prompt(rollout(), PromptTokenizer(own))


def test_thoughts_that_were_cut_off_demonstrate_nothing():
    def shown(*said, **settings):
        group = [Sibling(n, each, 1.0) for n, each in enumerate(said)]
        own = rollout(index=9, group=group, feedback=None)
        made = SiblingContext(**settings).teacher_prompt(own, WORDS)
        return made and text(made)

    expected = text(chat(official.sdpo("1+1?", solution="It is 2.")))
    assert shown("secret</think>\n\nIt is 2.") == expected
    assert shown("<think>secret", "It is 2.") == expected
    assert shown("[THINK]secret[/THINK]It is 2.") == expected
    assert shown("<think>secret") is None
    assert shown("<a>secret</a>It is 2.", thinking_tags=["<a>", "</a>"]) == expected
    with pytest.raises(ValueError, match="thinking_tags must hold an opening tag"):
        SiblingContext(thinking_tags=["<a>"])


def read(responses, *, prompt=PROMPT, header="", reference="extra_info.answer", **columns):
    """The rollouts of a prompt as the trainer's stage reads them from verl's batch."""
    from verl.utils import tensordict_utils as tu

    from fused_sd.integrations.verl.batch_rollouts import read_rollouts

    def jagged(rows):
        return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)

    count = len(responses)
    tokens = [torch.tensor(ids(response)) for response in responses]
    data = tu.get_tensordict(
        {
            "uid": ["u"] * count,
            "raw_prompt": [prompt] * count,
            "extra_fields": [{}] * count,
            "prompts": jagged([torch.tensor([*WORDS.chat(prompt), *ids(header)])] * count),
            "responses": jagged(tokens),
            "rm_scores": jagged([torch.ones(len(each)) / len(each) for each in tokens]),
            "extra_info": [{"answer": None}] * count,
            **columns,
        }
    )
    keys = [f"u_{n}_0" for n in range(count)]
    return read_rollouts(data, keys, tokenizer(), reference_key=reference, feedback_key="feedback")


def test_the_prompts_end_tells_of_thoughts_that_were_cut_off():
    said = ["secret", "more secret</think>It is 2."]
    for header, answers in (("<think>\n", ["", "It is 2."]), ("", ["secret", "It is 2."])):
        rollouts = read(said, header=header)
        assert [each.answer for each in rollouts] == answers
        assert [each.text for each in rollouts] == said
        assert [each.answer for each in rollouts[0].group] == answers
    second = read(said, header="<think>\n")[1]
    assert SiblingContext().teacher_prompt(second, WORDS) is None


@pytest.mark.parametrize("context", [ReferenceContext, AnswerContext])
@pytest.mark.parametrize(
    "value, shown",
    [
        (0, "0"),
        (0.0, "0.0"),
        (False, "False"),
        (np.float32(0.5), "0.5"),
        (np.array([{"role": "assistant", "content": "It is 2."}], dtype=object), "It is 2."),
        (float("nan"), None),
        (None, None),
        ("", None),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_reference_is_text_whatever_its_column_holds(context, value, shown):
    rows = [{"answer": value}, {"answer": "2"}]
    own = read(["3", "4"], extra_info=rows)[0]
    made = context("{prompt} {privileged}").teacher_prompt(own, WORDS)
    assert made == (None if shown is None else chat(f"1+1? {shown}"))


@pytest.mark.parametrize(
    "value", [{"target": 2}, ["2"], np.array(["2"], dtype=object)], ids=["dict", "list", "array"]
)
def test_a_reference_of_another_kind_is_refused_where_it_is_read(value):
    own = read(["3", "4"], extra_info=[{"answer": value}] * 2)[0]
    with pytest.raises(ValueError, match=r"extra_info\.answer must be text, .* got a .*'1\+1\?'"):
        ReferenceContext().teacher_prompt(own, WORDS)
    assert SiblingContext().teacher_prompt(own, WORDS) is not None


def test_a_path_to_no_value_is_refused():
    rows = [{"answer": "2", "index": 0}] * 2
    rule = "reference_key must lead to a value, got extra_info.anwser, where 'anwser' is not among"
    with pytest.raises(ValueError, match=f"{rule} answer, index; name one"):
        read(["3", "4"], extra_info=rows, reference="extra_info.anwser")
    with pytest.raises(ValueError, match="'answer' is not among any keys"):
        read(["3", "4"], extra_info=['{"answer": 2}'] * 2)
    assert read(["3", "4"], extra_info=[rows[0], {}])[0].hint == "2"


def micro_batch(mask, *, num_tokens=4):
    """Two samples of a prompt's token and two of a response; what the engine returns for them."""
    from verl.utils import tensordict_utils as tu

    def jagged(*rows):
        rows = [torch.as_tensor(row, dtype=torch.float32) for row in rows]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    data = tu.get_tensordict(
        {
            "prompts": jagged([1], [2]),
            "responses": jagged([3, 4], [5, 6]),
            "response_mask": jagged([1, 1], [1, 1]).long(),
            "advantages": jagged([1, 1], [1, 1]),
            "old_log_probs": jagged([-1, -1], [-1, -1]),
            "self_distillation_mask": torch.tensor(mask),
        }
    )
    tu.assign_non_tensor(data, batch_num_tokens=num_tokens)
    output = {
        "distillation_losses": jagged([0.5, 0.25, 9], [0.125, 1, 9]),
        "student_mass": jagged([0.75, 0.75, 9], [0.5, 0.5, 9]),
        "teacher_mass": jagged([0.75, 0.75, 9], [0.5, 0.5, 9]),
        "log_probs": jagged([-1, -1, 9], [-1, -1, 9]),
        "teacher_log_probs": jagged([0, 0, 9], [0, 0, 9]),
    }
    return data, output


def settings(**loss):
    from types import SimpleNamespace

    from fused_sd.integrations.verl.config import FusedSDLossConfig

    config = FusedSDLossConfig(use_task_rewards=False, teacher="live", **loss)
    return SimpleNamespace(strategy="fsdp2"), SimpleNamespace(distillation_loss=config)


def test_a_sample_without_a_context_has_no_divergence_and_no_share_in_the_masses():
    from fused_sd.integrations.verl.losses import topk_loss

    data, output = micro_batch([1.0, 0.0])
    losses, metrics = topk_loss(*settings(), output, data)
    assert losses.tolist() == [[0.5, 0.25], [0, 0]]
    assert metrics["distillation/student_mass"] == 0.75
    assert data["batch_num_tokens"] == 4


def test_a_batch_without_any_context_has_loss_0_and_not_0_of_0():
    from fused_sd.integrations.verl.losses import topk_loss

    data, output = micro_batch([0.0, 0.0], num_tokens=0)
    losses, _ = topk_loss(*settings(), output, data)
    assert losses.tolist() == [[0, 0], [0, 0]]
    assert data["batch_num_tokens"] == 1


def test_a_divergence_is_multiplied_by_the_correction_for_the_rollout_engine():
    from fused_sd.integrations.verl.losses import topk_loss

    data, output = micro_batch([1.0, 1.0])
    data["response_mask"] = torch.nested.as_nested_tensor(
        [torch.tensor([1, 0]), torch.tensor([1, 1])], layout=torch.jagged
    )
    data["rollout_is_weights"] = torch.nested.as_nested_tensor(
        [torch.tensor([2.0, float("nan")]), torch.tensor([0.5, 1.0])], layout=torch.jagged
    )
    losses, _ = topk_loss(*settings(), output, data)
    assert losses.tolist() == [[1.0, 0], [0.0625, 1]]


def test_rlsd_without_a_context_is_grpo():
    from fused_sd.integrations.verl.losses import rlsd_loss

    data, output = micro_batch([1.0, 0.0])
    losses, _ = rlsd_loss(*settings(loss_mode="fused_sd_rlsd"), output, data)
    # the evidence is e, cut to 1.2 and mixed half and half with 1
    torch.testing.assert_close(losses, torch.tensor([[-1.1, -1.1], [-1.0, -1.0]]))


def test_rlsd_reads_a_workers_scores_where_the_batch_has_them():
    from fused_sd.integrations.verl.losses import rlsd_loss

    data, output = micro_batch([1.0, 1.0])
    del output["teacher_log_probs"]
    known = [torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -1.0])]
    data["teacher_logprobs"] = at_student_rows(known, [torch.tensor([1]), torch.tensor([2])])
    losses, _ = rlsd_loss(*settings(loss_mode="fused_sd_rlsd"), output, data)
    torch.testing.assert_close(losses, torch.tensor([[-1.0, -1.0], [-0.9, -1.0]]))
