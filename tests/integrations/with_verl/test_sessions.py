"""Sessions with turns, tools and several outputs: each output's teacher sequence, written as text.

verl's tool agent runs with a scripted model.  The transfer queue is played by a dict.
"""

import asyncio
import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from chat_tokenizer import ids, tokenizer
from recipes_config import composed
from tensordict import NonTensorStack, TensorDict
from transfer_queue import KVBatchMeta
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.tools.function_tool import FunctionTool
from verl.tools.schemas import OpenAIFunctionToolSchema
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.replica import TokenOutput

from fused_sd.integrations.shared.templates import OPSD, SDPO, SDPO_SOLUTION
from fused_sd.integrations.verl import trainer as module
from fused_sd.integrations.verl.batch_rollouts import read_rollouts
from fused_sd.integrations.verl.contexts import (
    AttemptContext,
    PromptTokenizer,
    ReferenceContext,
    SiblingContext,
)
from fused_sd.integrations.verl.packed_rows import matching_rows, predicting_rows
from fused_sd.integrations.verl.sessions import SessionPrompts
from fused_sd.integrations.verl.trainer import SelfDistillationSync, self_distillation_config

# As Qwen3's: tools before all, their results in a user's turn, and no thoughts in earlier turns
TEMPLATE = """\
{% if tools %}<|im_start|>system
Tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"""
PLAIN = copy.copy(tokenizer())
PLAIN.chat_template = TEMPLATE
WORDS = PromptTokenizer(PLAIN)
UNTHINKING = PromptTokenizer(PLAIN, {"enable_thinking": False})
SAY = "<|im_start|>assistant\n"
QUESTION = [{"role": "user", "content": "1+1?"}]
HINT = ReferenceContext("{prompt} Hint: {privileged}")


def text(tokens):
    return PLAIN.decode(list(tokens))


def user(said):
    return f"<|im_start|>user\n{said}<|im_end|>\n"


def packed(rows):
    """The samples as a transfer queue returns them."""
    columns = {}
    for name in rows[0]:
        values = [each[name] for each in rows]
        is_tensor = isinstance(values[0], torch.Tensor)
        columns[name] = jagged(values) if is_tensor else NonTensorStack(*values)
    return TensorDict(columns, batch_size=len(rows))


def jagged(values):
    return torch.nested.as_nested_tensor(list(values), layout=torch.jagged)


def row(prompt, response, *, uid="u", reward=0.0, mask=None, **columns):
    """An output as verl's agent loop worker writes it, from the texts of prompt and response."""
    tokens = torch.tensor(ids(response))
    scores = torch.zeros(len(tokens))
    scores[-1] = reward
    whole = torch.cat([torch.tensor(ids(prompt)), tokens])
    return {
        "uid": uid,
        "raw_prompt": QUESTION,
        "prompts": torch.tensor(ids(prompt)),
        "responses": tokens,
        "input_ids": whole,
        "response_mask": torch.ones_like(tokens) if mask is None else mask,
        "rm_scores": scores,
        "extra_fields": {},
        "extra_info": {"answer": "2"},
        **columns,
    }


def read(rows, keys=None, words=WORDS, **settings):
    """The rollouts of these samples; without keys they are the outputs of one session."""
    keys = keys or [f"u_0_{n}" for n in range(len(rows))]
    settings = {"reference_key": "extra_info.answer", "feedback_key": None, **settings}
    return read_rollouts(packed(rows), keys, PLAIN, chat=words.chat, **settings)


def taught(context, rollouts, words=WORDS):
    """The teacher's prompts as text, and how many outputs have no place for a context."""
    prompts = SessionPrompts(context, words)
    made = [prompts.teacher_prompt(rollout) for rollout in rollouts]
    return [each and text(each) for each in made], prompts.num_compacted


FIRST = user("1+1?") + SAY
# how a session may go on after "3": its second output's prompt, and the teacher's
LATER = {
    "the tokens so far": (
        FIRST + "3<|im_end|>\n" + user("Sure?") + SAY,
        user("1+1? Hint: 2") + SAY + "3<|im_end|>\n" + user("Sure?") + SAY,
    ),
    "the question again": (FIRST, user("1+1? Hint: 2") + SAY),
    "a summary behind the question": (
        user("1+1?") + user("It is not 3.") + SAY,
        user("1+1? Hint: 2") + user("It is not 3.") + SAY,
    ),
    "another question": (user("Is it 3?") + SAY, None),
    "a question that begins alike": (user("1+1? It is not 3.") + SAY, None),
    "a beginning that was cut off": (FIRST[3:] + "3<|im_end|>\n" + user("Sure?") + SAY, None),
}


@pytest.mark.parametrize("history", LATER)
def test_the_turns_so_far_follow_the_teachers_question(history):
    later, expected = LATER[history]
    rollouts = read([row(FIRST, "3<|im_end|>"), row(later, "2.<|im_end|>")])
    made, num_compacted = taught(HINT, rollouts)
    assert made == [user("1+1? Hint: 2") + SAY, expected]
    assert num_compacted == (expected is None)


def test_a_history_that_was_rendered_anew_may_have_another_header():
    """Qwen3's template leaves the empty thoughts of earlier turns out."""
    closed = SAY + "<think></think>"
    later = user("1+1?") + SAY + "3<|im_end|>\n" + user("Sure?") + closed
    rows = [row(user("1+1?") + closed, "3<|im_end|>"), row(later, "2.<|im_end|>")]
    made, num_compacted = taught(HINT, read(rows, words=UNTHINKING), UNTHINKING)
    hinted = user("1+1? Hint: 2")
    assert made == [hinted + closed, hinted + later.removeprefix(user("1+1?"))]
    assert num_compacted == 0
    assert read(rows, words=UNTHINKING)[0].text == "3\nuser\nSure?\nassistant\n<think></think>2."
    assert read(rows, words=UNTHINKING)[0].answer == "3\nuser\nSure?\nassistant\n2."


def test_a_shortened_history_learns_once_the_loop_tells_its_messages():
    asked = [{"role": "user", "content": "1+1? It is not 3."}]
    said = {"extra_fields": {"raw_prompt": asked}}
    start = user("1+1? It is not 3.") + SAY
    rows = [
        row(FIRST, "3<|im_end|>"),
        row(start, "4<|im_end|>", **said),
        # goes on where the session began, which is not the output before it
        row(FIRST + "3<|im_end|>\n" + user("Sure?") + SAY, "2.<|im_end|>"),
    ]
    made, num_compacted = taught(HINT, read(rows))
    hinted = user("1+1? Hint: 2") + SAY
    assert made[:2] == [hinted, user("1+1? It is not 3. Hint: 2") + SAY]
    assert made[2] == hinted + "3<|im_end|>\n" + user("Sure?") + SAY
    assert num_compacted == 0


def test_messages_that_are_not_those_of_the_prompt_are_refused():
    """They would cost the teacher the turns that the student read."""
    later = FIRST + "3<|im_end|>\n" + user("Sure?") + SAY
    said = {"extra_fields": {"raw_prompt": QUESTION}}
    rollouts = read([row(FIRST, "3<|im_end|>", **said), row(later, "2.<|im_end|>", **said)])
    assert taught(HINT, rollouts[:1]) == ([user("1+1? Hint: 2") + SAY], 0)
    with pytest.raises(ValueError, match="hold the messages that the output's prompt was written"):
        taught(HINT, rollouts[1:])


def test_a_session_is_shown_with_its_turns_and_judged_by_its_last_output():
    later = FIRST + "<think>So?</think>3<|im_end|>\n" + user("Sure?") + SAY
    keys = ["u_7_1", "u_0_0", "u_7_0", "u_2_0", "u_2_1"]  # sessions that failed have none
    rows = [
        row(later, "<think>No.</think>2.<|im_end|>", reward=1.0),
        row(FIRST, "5<|im_end|>"),
        row(FIRST, "<think>So?</think>3<|im_end|>", reward=0.25),
        row(FIRST, "6<|im_end|>"),
        row(user("And now?") + SAY, "8<|im_end|>", reward=0.125),
    ]
    rollouts = read(rows, keys)
    group = [(0, "5", 0.0), (2, "8", 0.125), (7, "3\nuser\nSure?\nassistant\n2.", 1.0)]
    for rollout, place in zip(rollouts, (7, 0, 7, 2, 2)):
        found = [(sibling.index, sibling.answer, sibling.reward) for sibling in rollout.group]
        assert found == group
        assert rollout.index == place
    whole = "<think>So?</think>3\nuser\nSure?\nassistant\n<think>No.</think>2."
    assert [rollouts[n].text for n in (0, 2)] == [whole] * 2
    assert [rollouts[n].reward for n in (0, 2)] == [1.0] * 2
    assert text(rollouts[2].completion_ids) == "<think>So?</think>3<|im_end|>"
    solution = SDPO_SOLUTION.format(successful_previous_attempt=group[2][1])
    shown = SDPO.format(prompt="1+1?", solution=solution, feedback="")
    # neither output of the success is shown itself; the last one of the second has no question
    made, num_compacted = taught(SiblingContext(), rollouts)
    assert made == [None, user(shown) + SAY, None, user(shown) + SAY, None]
    assert num_compacted == 1


def test_feedback_on_a_session_teaches_all_of_its_outputs():
    later = FIRST + "3<|im_end|>\n" + user("Sure?") + SAY
    said = [{"extra_fields": {"reward_extra_info": {"feedback": each}}} for each in ("No.", "No!")]
    rows = [row(FIRST, "3<|im_end|>", **said[0]), row(later, "3<|im_end|>", **said[1])]
    rollouts = read(rows, feedback_key="feedback")
    template = {
        "reprompt_template": "{prompt}{solution}{feedback}",
        "feedback_template": "{feedback_raw}",
    }
    context = SiblingContext(**template, include_own_attempt=True, attempt_template="[{attempt}]")
    made, _ = taught(context, rollouts)
    start = user("1+1?[3\nuser\nSure?\nassistant\n3]No!") + SAY
    assert made == [start, start + later.removeprefix(FIRST)]


def test_sd_zero_revises_each_output_in_its_own_place():
    context = AttemptContext(correct_phrase="Right.", wrong_phrase="Wrong.")
    for history, (later, _) in LATER.items():
        rows = [row(FIRST, "3<|im_end|>"), row(later, "2.<|im_end|>", reward=1.0)]
        made, num_compacted = taught(context, read(rows))
        phrase = "<|im_end|>\n\nRight.\n\n"
        assert made == [f"{FIRST}3{phrase}", f"{later}2.{phrase}"], history
        assert num_compacted == 0


def test_a_context_of_ones_own_needs_to_know_nothing_of_sessions():
    class Own:
        def teacher_prompt(self, rollout, words):
            if math.isnan(rollout.reward):
                return None
            return [*words.chat([{"role": "system", "content": "Sum."}, *rollout.prompt]), 9]

    later = FIRST + "3<|im_end|>\n" + user("Sure?") + SAY
    rows = [row(FIRST, "3<|im_end|>"), row(later, "2.<|im_end|>")]
    made, _ = taught(Own(), read(rows))
    system = "<|im_start|>system\nSum.<|im_end|>\n"
    assert made == [system + each + text([9]) for each in (FIRST, later)]


# ---- through verl's tool agent and our stage ----


def add(a, b):
    return str(a + b)


def schema(name):
    properties = {each: {"type": "integer", "description": each} for each in ("a", "b")}
    parameters = {"type": "object", "properties": properties, "required": ["a", "b"]}
    function = {"name": name, "description": name, "parameters": parameters}
    return OpenAIFunctionToolSchema.model_validate({"type": "function", "function": function})


TOOLS = [FunctionTool(name, add, schema(name)) for name in ("add", "look")]
SCHEMAS = [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in TOOLS]
OFFERED = PromptTokenizer(PLAIN, {"tools": SCHEMAS})


def call(a, b):
    asked = json.dumps({"name": "add", "arguments": {"a": a, "b": b}})
    return f"<tool_call>{asked}</tool_call><|im_end|>"


def result(value):
    return "\n" + user(f"<tool_response>{value}</tool_response>") + SAY


class Queue(dict):
    """The transfer queue: samples by their keys."""

    def kv_batch_get(self, keys, partition_id, select_fields):
        rows = [self[key] for key in keys]
        kept = [name for name in select_fields if name in rows[0]]
        return packed([{name: row[name] for name in kept} for row in rows])

    def kv_batch_put(self, keys, partition_id, fields):
        for name, column in fields.items():
            for key, value in zip(keys, column.unbind() if column.is_nested else column):
                self[key][name] = value

    async def async_kv_batch_put(self, keys, fields, tags, partition_id):
        self.update(zip(keys, fields))


@pytest.fixture
def queue(monkeypatch):
    made = Queue()
    monkeypatch.setattr(module, "tq", made)
    monkeypatch.setattr(agent_loop_tq, "tq", made)
    monkeypatch.setattr(agent_loop_tq, "list_of_dict_to_tensordict", list)
    return made


async def speak(queue, session, turns, *, reward, tools=TOOLS, selected=None):
    """Run a session of verl's tool agent, whose model says these turns."""
    left = iter(turns)

    async def generate(**asked):
        return TokenOutput(token_ids=ids(next(left)))

    config = composed("sdpo", "actor_rollout_ref.rollout.multi_turn.format=hermes")
    agent = ToolAgentLoop(
        DictConfigWrap(config),
        SimpleNamespace(generate=generate),
        PLAIN,
        None,
        RLHFDataset,
        DictConfigWrap(config.data),
        hf_model_type="qwen3",
        tools=ToolListWrap(tools),
    )
    given = {"raw_prompt": QUESTION, "extra_info": {"answer": "2", "tool_selection": selected}}
    output = await agent.run({}, **given)
    output.reward_score = reward
    worker = object.__new__(agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class)
    worker.processor = worker.reward_loop_worker_handles = None
    worker.distillation_enabled = False
    place = {"uid": "u", "session_id": session, "global_steps": 1}
    await worker._agent_loop_postprocess(output, False, **given, **place)
    assert next(left, None) is None


def stage(queue, recipe, *overrides, words=OFFERED):
    """Run the trainer's stage; return its metrics."""
    trainer = object.__new__(SelfDistillationSync)
    trainer.config = composed(recipe, *overrides)
    trainer.self_distillation = self_distillation_config(trainer.config)
    trainer.tokenizer, trainer.prompt_tokenizer, trainer.global_steps = PLAIN, words, 1
    metrics = {}
    meta = KVBatchMeta(keys=list(queue), tags=[{}] * len(queue), partition_id="train")
    trainer._add_teacher(meta, metrics)
    return metrics


def listed(*names):
    return f"<|im_start|>system\nTools: {' '.join(names)}<|im_end|>\n"


def test_verls_tool_agent_learns_what_it_said_and_not_what_its_tools_said(queue):
    asyncio.run(speak(queue, 0, [call(1, 2), call(2, 2), "It is 4.<|im_end|>"], reward=0.0))
    asyncio.run(speak(queue, 1, [call(1, 1), "It is 2.<|im_end|>"], reward=1.0))
    assert stage(queue, "sdpo")["self_distillation/context_fraction"] == 1 / 2
    wrong, right = queue["u_0_0"], queue["u_1_0"]
    start = listed("add", "look") + user("1+1?") + SAY
    assert text(wrong["prompts"]) == start
    said = [call(1, 2), result(3), call(2, 2), result(4), "It is 4.<|im_end|>"]
    assert text(wrong["responses"]) == "".join(said)
    own = [int(n % 2 == 0) for n, part in enumerate(said) for _ in ids(part)]
    assert wrong["loss_mask"].tolist() == wrong["response_mask"].tolist() == own
    assert not right["loss_mask"].any(), "it has no sibling that was right"
    # as TRL's half shows it: calls and results, without special tokens
    shown = "".join([call(1, 1), result(2), "It is 2."])
    shown = shown.replace("<|im_start|>", "").replace("<|im_end|>", "")
    solution = SDPO_SOLUTION.format(successful_previous_attempt=shown)
    asked = SDPO.format(prompt="1+1?", solution=solution, feedback="")
    prompt = listed("add", "look") + user(asked) + SAY
    assert text(wrong["teacher_input_ids"]) == prompt + "".join(said)
    # what the engine scores on both sides
    names = ("input_ids", "responses", "response_mask")
    batch = packed([{name: each[name] for name in names} for each in (wrong, right)])
    rows = predicting_rows(batch)
    teacher = jagged(each["teacher_input_ids"] for each in (wrong, right))
    others = matching_rows(rows, batch["input_ids"].offsets(), teacher.offsets())
    spoken = "".join([*said[::2], call(1, 1), "It is 2.<|im_end|>"])
    for ids_, at in ((batch["input_ids"], rows), (teacher, others)):
        assert text(ids_.values()[at + 1]) == spoken


def test_sd_zero_shows_a_response_with_the_results_of_tools(queue):
    asyncio.run(speak(queue, 0, [call(1, 1), "It is 2.<|im_end|>"], reward=1.0))
    stage(queue, "sd_zero")
    (made,) = queue.values()
    whole = text(made["input_ids"])
    assert whole == listed("add", "look") + user("1+1?") + SAY + text(made["responses"])
    phrase = "\n\nLet me rephrase the above solution.\n\n"
    assert text(made["teacher_input_ids"]) == whole + phrase + text(made["responses"])


@pytest.mark.parametrize(
    "tools, selected, names",
    [
        (TOOLS, ["look"], ["look"]),
        (TOOLS, ["look", "unknown", "add"], ["look", "add"]),
        (TOOLS, [], ["add", "look"]),
        (TOOLS, ["unknown"], []),
        ([], None, []),  # an agent that offers none, beside one that does
    ],
)
def test_the_teacher_reads_the_tools_that_the_student_read(queue, tools, selected, names):
    asyncio.run(speak(queue, 0, ["It is 2.<|im_end|>"], reward=1.0, tools=tools, selected=selected))
    stage(queue, "opsd", "distillation.reference_key=extra_info.answer")
    (made,) = queue.values()
    start = listed(*names) if names else ""
    assert text(made["prompts"]) == start + user("1+1?") + SAY
    asked = user(OPSD.format(prompt="1+1?", privileged="2"))
    assert text(made["teacher_input_ids"]) == start + asked + SAY + "It is 2.<|im_end|>"


def test_a_limit_cuts_the_context_and_not_the_turns(queue):
    later = FIRST + "3<|im_end|>\n" + user("Are you sure of that?") + SAY
    queue["u_0_1"] = row(later, "2.<|im_end|>")
    queue["u_0_0"] = row(FIRST, "3<|im_end|>")
    limit = "distillation.max_prompt_length=20", "distillation.reference_key=extra_info.answer"
    metrics = stage(queue, "opsd", *limit, words=WORDS)
    start = text(ids(user(OPSD.format(prompt="1+1?", privileged="2")) + SAY)[-20:])
    assert text(queue["u_0_0"]["teacher_input_ids"]) == start + "3<|im_end|>"
    whole = start + later.removeprefix(FIRST) + "2.<|im_end|>"
    assert text(queue["u_0_1"]["teacher_input_ids"]) == whole
    assert metrics["self_distillation/truncated_fraction"] == 1
    assert metrics["self_distillation/context_fraction"] == 1
    assert metrics["self_distillation/compacted_fraction"] == 0


def test_prompts_are_checked_where_their_conversation_began(queue):
    """The first sample of a balanced batch may be any output of a session."""
    later = FIRST + "3<|im_end|>\n" + user("Sure?") + SAY
    queue["u_0_1"] = row(later, "2.<|im_end|>")
    queue["u_0_0"] = row(FIRST, "3<|im_end|>")
    key = "distillation.reference_key=extra_info.answer"
    assert stage(queue, "opsd", key, words=WORDS)["self_distillation/context_fraction"] == 1
    with pytest.raises(ValueError, match="be tokenised by the teacher as it was by the rollout"):
        stage(queue, "opsd", key, words=UNTHINKING)
