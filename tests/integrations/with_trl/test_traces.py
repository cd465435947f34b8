"""Revision traces: what is sampled and kept, and the file that a killed run continues."""

import os

import pytest
import torch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from tiny_models import tiny_model
from trl_pairs import TOKENIZER, VOCAB

from fused_sd.integrations.shared.revision_phrases import CORRECT_PHRASE, WRONG_PHRASE
from fused_sd.integrations.trl.collect import collect_traces
from fused_sd.integrations.trl.generators import transformers_generate, vllm_generate
from fused_sd.integrations.trl.revise import TraceConfig
from fused_sd.integrations.trl.trace_filters import is_sycophantic, trim_repeats
from fused_sd.integrations.trl.traces import Trace, load_traces

EOS = TOKENIZER.eos_token_id
QUESTIONS = [{"prompt": f"{n} + 1 = ", "answer": str(n + 1)} for n in range(6)]
ONE = TraceConfig(num_initial=1, num_revisions=1)


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def reward(prompts, completions, answer, **_):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(text.endswith(wanted)) for text, wanted in zip(texts, answer, strict=True)]


class Script:
    """A model that says what it was told: one text for initial responses, one for revisions.

    Even questions are answered right at first.
    """

    def __init__(self, revision="So {answer}", die_after=None):
        self.revision, self.calls, self.die_after = revision, [], die_after
        self.num_tokens = 0

    def __call__(self, prompts):
        if self.die_after is not None and len(self.calls) >= self.die_after:
            raise KeyboardInterrupt
        self.calls.append(prompts)
        said = [[*ids(self.respond(TOKENIZER.decode(prompt))), EOS] for prompt in prompts]
        self.num_tokens += sum(map(len, said))
        return said

    def respond(self, text):
        number = int("".join(c for c in text.split("+")[0] if c.isdigit()))
        if CORRECT_PHRASE in text or WRONG_PHRASE in text:
            return self.revision.format(answer=number + 1)
        return f"It is {number + 1}" if number % 2 == 0 else "It is -5"


def collect(path, script, config=ONE, dataset=QUESTIONS, **settings):
    return collect_traces(script, dataset, reward, TOKENIZER, path, config=config, **settings)


def test_a_trace_is_the_sampled_tokens_with_the_verdict_between_blank_lines(tmp_path):
    traces, _ = collect(tmp_path / "t.jsonl", Script())
    assert [trace.question for trace in traces] == [1, 3, 5]
    trace = traces[0]
    assert trace.prompt_ids == tuple(ids("1 + 1 = "))
    assert trace.initial_ids == tuple(ids("It is -5"))  # its end is gone
    assert trace.verdict_ids == tuple(ids(f"\n\n{WRONG_PHRASE}\n\n"))
    assert trace.revision_ids == (*ids("So 2"), EOS)  # its end is kept
    assert trace.input_ids == (
        trace.prompt_ids + trace.initial_ids + trace.verdict_ids + trace.revision_ids
    )
    assert trace.input_ids[trace.revision_start :] == trace.revision_ids
    assert not trace.initial_correct
    assert (trace.initial_reward, trace.revision_reward) == (0.0, 1.0)


def test_a_revision_is_sampled_after_exactly_the_tokens_that_the_trace_holds(tmp_path):
    script = Script()
    traces, _ = collect(tmp_path / "t.jsonl", script)
    assert script.calls[1] == [list(t.input_ids[: t.revision_start]) for t in traces]


def test_right_responses_are_revised_on_demand_with_a_phrase_of_their_own(tmp_path):
    config = TraceConfig(num_initial=1, num_revisions=1, revise_correct=True)
    traces, counts = collect(tmp_path / "t.jsonl", Script(), config)
    assert [trace.initial_correct for trace in traces] == [True, False] * 3
    assert traces[0].phrase == CORRECT_PHRASE
    assert traces[1].phrase == WRONG_PHRASE
    assert counts.revisions == 6
    assert counts.revisions_of_wrong == 3


def test_counts_say_what_was_right_at_first_and_what_was_corrected(tmp_path):
    script = Script(revision="So 2")  # right for question 1 alone
    traces, counts = collect(
        tmp_path / "t.jsonl", script, TraceConfig(num_initial=2, num_revisions=3)
    )
    assert (counts.questions, counts.initial, counts.initial_correct) == (6, 12, 6)
    assert (counts.revisions, counts.revisions_correct, counts.corrected) == (18, 6, 6)
    assert (counts.kept, counts.duplicates) == (1, 5)  # the script always says the same
    assert len(traces) == 1
    assert counts.initial_accuracy == 0.5
    assert counts.revision_accuracy == counts.correction_rate == pytest.approx(1 / 3)
    assert counts.generated_tokens == script.num_tokens
    assert "50.0%" in str(counts)


def test_rewards_see_messages_where_prompts_are_messages_and_the_revision_alone(tmp_path):
    seen = []

    def record(prompts, completions, answer, **columns):
        assert columns == {}
        seen.append((prompts[-1], completions[-1]))
        return reward(prompts, completions, answer)

    chat = [{"prompt": [{"role": "user", "content": "1 + 1 = "}], "answer": "2"}]
    path = tmp_path / "t.jsonl"
    traces, _ = collect_traces(Script(), chat, record, TOKENIZER, path, config=ONE)
    assert [said for _, said in seen] == [
        [{"role": "assistant", "content": "It is -5"}],
        [{"role": "assistant", "content": "So 2"}],
    ]
    assert all(prompt == chat[0]["prompt"] for prompt, _ in seen)
    assert traces[0].prompt_ids == tuple(ids("user: 1 + 1 = \nassistant: "))
    assert load_traces(path).traces == traces


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_response_without_a_verdict_is_neither_right_nor_wrong(nothing, tmp_path):
    def undecided(completions, answer, **_):
        """Question 1's response and question 5's revision have no verdict."""
        without = ("It is -5", "2"), ("So 6", "6")
        known = zip(zip(completions, answer), reward(None, completions, answer))
        return [nothing if pair in without else right for pair, right in known]

    script, path = Script(), tmp_path / "t.jsonl"
    traces, counts = collect_traces(script, QUESTIONS, undecided, TOKENIZER, path, config=ONE)
    assert [trace.question for trace in traces] == [3]
    assert len(script.calls[1]) == 2  # no phrase says of the first that it was wrong
    assert (counts.initial, counts.initial_correct, counts.undecided) == (5, 3, 2)
    assert (counts.revisions, counts.revisions_of_wrong, counts.corrected) == (1, 1, 1)
    assert (counts.initial_accuracy, counts.correction_rate) == (0.6, 1.0)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([1.0], "reward_func must return a list with one entry for each of 6 completions, got 1"),
        (1.0, "reward_func must return a list .* got a float"),
        (["1"] * 6, "reward_func must return numbers, or None for no verdict, got '1'"),
        ([0.0] * 5 + [float("inf")], "reward_func must return finite numbers, got inf for comp"),
    ],
)
def test_a_malformed_reward_is_refused_before_it_is_written(answers, message, tmp_path):
    path = tmp_path / "t.jsonl"
    with pytest.raises(ValueError, match=message):
        collect_traces(Script(), QUESTIONS, lambda **_: answers, TOKENIZER, path, config=ONE)
    assert load_traces(path).counts.questions == 0


def test_rewards_may_be_a_tensor_or_come_later(tmp_path):
    async def late(prompts, completions, answer):
        return torch.tensor(reward(prompts, completions, answer))

    path = tmp_path / "t.jsonl"
    traces, _ = collect_traces(Script(), QUESTIONS, late, TOKENIZER, path, config=ONE)
    assert [trace.question for trace in traces] == [1, 3, 5]


def test_a_killed_run_goes_on_with_the_questions_that_are_not_in_the_file(tmp_path):
    whole = collect(tmp_path / "whole.jsonl", Script(), questions_per_batch=2)
    path = tmp_path / "t.jsonl"
    with pytest.raises(KeyboardInterrupt):
        collect(path, Script(die_after=3), questions_per_batch=2)  # dies revising question 3
    with path.open("a") as file:
        file.write('{"question": 2, "counts": {"que')  # a kill in the middle of a write
    assert load_traces(path).counts.questions == 2
    script = Script()
    assert collect(path, script, questions_per_batch=2) == whole
    asked = {TOKENIZER.decode(prompt)[0] for call in script.calls for prompt in call}
    assert asked == {"2", "3", "4", "5"}
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_finished_file_is_read_without_a_sample(tmp_path):
    first = collect(tmp_path / "t.jsonl", Script())
    script = Script()
    assert collect(tmp_path / "t.jsonl", script) == first
    assert script.calls == []


def test_a_header_that_was_cut_off_is_written_again(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"format": "fused_sd')
    assert len(collect(path, Script()).traces) == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"config": TraceConfig(num_initial=1, num_revisions=2)}, "num_revisions 1 instead of 2"),
        ({"config": TraceConfig(1, 1, source="other")}, "source '' instead of 'other'"),
        ({"dataset": QUESTIONS[:5]}, "dataset"),
    ],
)
def test_a_file_of_other_traces_is_refused_with_the_difference(tmp_path, change, message):
    path = tmp_path / "t.jsonl"
    collect(path, Script())
    before = path.read_text()
    with pytest.raises(ValueError, match=message):
        collect(path, Script(), **change)
    assert path.read_text() == before


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text('{"a": 1}\nlast line without its end')
    with pytest.raises(ValueError, match="be a file of"):
        collect(path, Script())
    assert path.read_text() == '{"a": 1}\nlast line without its end'


def test_collecting_stops_after_the_batch_that_has_enough(tmp_path):
    reports = []
    traces, counts = collect(
        tmp_path / "t.jsonl",
        Script(),
        questions_per_batch=2,
        max_traces=2,
        report=lambda counts: reports.append(counts.kept),
    )
    assert len(traces) == 2
    assert counts.questions == 4
    assert reports == [1, 2]


def test_an_answer_for_every_prompt_is_demanded(tmp_path):
    with pytest.raises(ValueError, match=r"generate must return a list .* 6 completions, got 5"):
        collect(tmp_path / "t.jsonl", lambda prompts: [[2]] * (len(prompts) - 1))


def test_an_empty_revision_is_counted_and_not_kept(tmp_path):
    def generous(prompts, completions, **_):
        return [float(text == "") for text in completions]

    path = tmp_path / "t.jsonl"
    script = Script(revision="")
    traces, counts = collect_traces(script, QUESTIONS, generous, TOKENIZER, path, config=ONE)
    assert traces == []
    assert (counts.revisions_correct, counts.empty) == (6, 6)


def test_a_trace_without_revision_tokens_is_refused():
    with pytest.raises(ValueError, match="revision_ids must hold at least one token"):
        Trace(0, "a", (5,), (), "", (6,), (), False, 0.0, 1.0)


@pytest.mark.parametrize("drop, kept", [(True, 0), (False, 3)])
def test_revisions_that_reply_to_a_user_are_left_out_on_demand(tmp_path, drop, kept):
    config = TraceConfig(1, 1, drop_sycophantic=drop)
    script = Script(revision="You're absolutely right. So {answer}")
    traces, counts = collect(tmp_path / "t.jsonl", script, config)
    assert len(traces) == kept
    assert counts.sycophantic == 3 - kept


@pytest.mark.parametrize(
    "text",
    [
        "You are right to point this out.",
        "Yes, you're absolutely right: 4",
        "Thank you for the hint. 4",
        "Great question! 4",
        "  Nice catch - it is 4",
    ],
)
def test_openings_that_answer_a_user_are_recognised(text):
    assert is_sycophantic(text)


@pytest.mark.parametrize("text", ["The sum is 4.", "So you are right at 4.", "Good. 4", ""])
def test_other_openings_are_not(text):
    assert not is_sycophantic(text)


def test_a_loop_at_the_end_is_cut_to_one_copy():
    head, block = [9, 8, 7], [1, 2, 3, 4, 5]
    assert trim_repeats(head + block * 6) == head + block
    assert trim_repeats(head + block * 6 + block[:2]) == head + block
    assert trim_repeats(head + block * 2) == head + block * 2  # twice is no loop
    assert trim_repeats(head + block * 6 + [6]) == head + block * 6 + [6]  # nor if more follows
    assert trim_repeats([]) == []


@pytest.mark.parametrize("trims", [True, False])
def test_loops_of_responses_are_cut_and_the_end_of_a_revision_stays(tmp_path, trims):
    class Looping(Script):
        def respond(self, text):
            return super().respond(text) + (" abcdefgh 2" * 5 if "1 + 1" in text else "")

    config = TraceConfig(1, 1, revise_correct=True, trim_repeats=trims)
    traces, _ = collect(tmp_path / "t.jsonl", Looping(), config, QUESTIONS[1:2])
    assert traces[0].revision_ids[-1] == EOS
    text = TOKENIZER.decode(traces[0].initial_ids)
    assert text.count("abcdefgh") == (1 if trims else 5)


def test_transformers_samples_are_those_of_each_prompt_alone_and_end_with_the_end():
    torch.manual_seed(0)
    model = tiny_model(vocab=VOCAB, max_position_embeddings=256).train()
    prompts = [[5, 6, 7, 8], [9], [10, 11]]
    settings = {"max_new_tokens": 12, "temperature": 0.0}
    alone = [transformers_generate(model, TOKENIZER, **settings)([p])[0] for p in prompts]
    end = alone[0][4]  # make one of the tokens the end
    model.generation_config.eos_token_id = [1, end]
    generate = transformers_generate(model, TOKENIZER, batch_size=2, **settings)
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in alone]
    assert generate(prompts) == expected
    assert len(expected[0]) <= 5
    assert model.training


def test_sampling_takes_no_settings_from_the_model():
    torch.manual_seed(0)
    model = tiny_model(vocab=VOCAB, max_position_embeddings=256, spread=0.02)
    model.generation_config.top_k = 1
    model.generation_config.num_return_sequences = 2
    model.generation_config.return_dict_in_generate = True
    generate = transformers_generate(model, TOKENIZER, max_new_tokens=4, top_p=1.0)
    sampled = generate([[5]] * 8)
    assert len(sampled) == 8
    assert len({tuple(ids) for ids in sampled}) > 4


def test_vllm_is_given_token_ids_and_returns_them():
    class Output:
        def __init__(self, token_ids):
            self.token_ids = token_ids
            self.outputs = [self]

    class LLM:
        def generate(self, requests, params):
            return [Output((*request["prompt_token_ids"], params.n)) for request in requests]

    params = type("Params", (), {"n": 1})()
    assert vllm_generate(LLM(), params)([[4, 5], [6]]) == [[4, 5, 1], [6, 1]]
    params.n = 2
    with pytest.raises(ValueError, match="n must be 1"):
        vllm_generate(LLM(), params)
