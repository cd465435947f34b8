"""The data side: what is drawn as text, tokens or messages must come out whole, or be refused.

Texts mix scripts, combining marks, emoji, right-to-left marks, lone surrogates, NUL, braces, chat
tokens and the tags of thoughts.
"""

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy
import torch
from fuzz_junk import judged

import fused_sd
from fused_sd.integrations.shared import prompts, texts, thinking
from fused_sd.integrations.shared.rollouts import Rollout, Sibling
from fused_sd.integrations.shared.thinking import KNOWN_TAGS
from fused_sd.integrations.trl import traces

PIECES = (
    *("a", "Z", "0", " ", "\n", "\t", "é", "e\u0301", "ß", "漢字", "한", "👩‍👩‍👧", "🏳️‍🌈", "\u202e"),
    *(
        "שלום",
        "\u200b",
        "\ufeff",
        "\x00",
        "\x0b",
        "\u2028",
        "{",
        "}",
        "{}",
        "{prompt}",
        "{0}",
        "%s",
    ),
    *("<|im_start|>", "<|im_end|>", "\\", '"', "$", "\\boxed{4}", "Problem: ", "-100", "\r\n"),
    *("\0<part 0>\0", "\0<part 9>\0"),  # as marks of images once were
)
SURROGATES = ("\ud800", "\udfff", "\ude00")
TAGS = [tag for pair in KNOWN_TAGS for tag in pair]
FIRST = 7  # the token id of byte 0: smaller ones are padding


def text(
    r: random.Random, most: int = 8, *, with_tags: bool = False, surrogates: bool = True
) -> str:
    pieces = [*PIECES, *(SURROGATES if surrogates else ()), *(TAGS if with_tags else ())]
    made = "".join(r.choice(pieces) for _ in range(r.randint(0, most)))
    # two surrogates that make one character are that character, as in JSON
    return made.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


# ------------------------------------------------------------------------------------ alignment


def tokens_of(said: str) -> list[int]:
    return [FIRST + byte for byte in said.encode("utf-8", "surrogatepass")]


def said_by(ids: list[int]) -> str:
    return bytes(one - FIRST for one in ids).decode("utf-8", "surrogatepass")


def alignment(r: random.Random) -> Iterator[str]:
    """What is decoded at the aligned positions is the response, behind either prompt."""
    count, packed = r.randint(1, 4), r.random() < 0.4
    responses = [text(r, 5) for _ in range(count)]
    ids = [tokens_of(said) for said in responses]
    # tokens of tools between the model's own have no weight
    marks = [[r.choice([1.0, 1.0, 0.5, 0.0]) for _ in one] for one in ids]
    sides = {}
    for side in ("student", "teacher"):
        rows, row_marks = [], []
        for one, mark in zip(ids, marks):
            prompt = tokens_of("p" + text(r, 4))
            rows.append(prompt + one)
            row_marks.append([0.0] * len(prompt) + mark)
        sides[side] = batch(r, rows, row_marks, packed)
    student, teacher = sides["student"], sides["teacher"]
    given: dict[str, Any] = {"student_response_mask": student["marks"]}
    # without a mask the teacher's sequence must end with the response
    if r.random() < 0.5:
        given["teacher_response_mask"] = (teacher["marks"] != 0).long()
    numbers = {}
    if packed:
        numbers = {f"{side}_sequence_ids": sides[side]["numbers"] for side in sides}
    four = student["ids"], student["mask"], teacher["ids"], teacher["mask"]
    places = fused_sd.align_responses(*four, **given, **numbers)
    fused_sd.check_alignment(places, *four, **numbers)
    wanted = [token for one, mark in zip(ids, marks) for token, m in zip(one, mark) if m]
    if places.token_ids.tolist() != wanted:
        yield "the aligned tokens are not the response's"
    whole = [m for mark in marks for m in mark if m]
    if places.weights.tolist() != whole:
        yield "the weights are not the response mask's"
    if all(m for mark in marks for m in mark):
        found, start = [], 0
        for one in ids:
            found.append(said_by(places.token_ids[start : start + len(one)].tolist()))
            start += len(one)
        if found != responses:
            yield "the decoded responses are not those that were given"
    if places.token_ids.numel():  # a response that differs in one token is refused
        at = int(places.teacher_positions[r.randrange(len(places.teacher_positions))])
        rows = teacher["mask"].flatten().nonzero()[:, 0]
        behind = int(rows[int((rows == at).nonzero()[0]) + 1])
        wrong = teacher["ids"].clone()
        wrong.view(-1)[behind] += 1
        try:
            changed = student["ids"], student["mask"], wrong, teacher["mask"]
            fused_sd.align_responses(*changed, **given, **numbers)
            yield "a teacher with another response was accepted"
        except ValueError as error:
            yield from judged(error)


def batch(
    r: random.Random, rows: list[list[int]], marks: list[list[float]], packed: bool
) -> dict[str, torch.Tensor]:
    """Rows with padding on either side, or all in one row with numbers."""
    numbers = [[n] * len(row) for n, row in enumerate(rows)]
    if packed:
        rows, marks, numbers = ([[*chain.from_iterable(part)]] for part in (rows, marks, numbers))
    length = max(map(len, rows)) + r.randint(0, 3)
    made: dict[str, list[list[Any]]] = {"ids": [], "mask": [], "marks": [], "numbers": []}
    for row, mark, number in zip(rows, marks, numbers):
        left = r.randint(0, length - len(row))
        right = length - len(row) - left
        made["ids"].append([0] * left + row + [0] * right)
        made["mask"].append([0] * left + [1] * len(row) + [0] * right)
        made["marks"].append([0.0] * left + mark + [0.0] * right)
        made["numbers"].append([0] * left + number + [9] * right)
    return {name: torch.tensor(values) for name, values in made.items()}


# ------------------------------------------------------------------------------------- thoughts


def thoughts(r: random.Random) -> Iterator[str]:
    """An answer behind any number of thoughts is found, and cut thoughts leave none."""
    opening, closing = r.choice(KNOWN_TAGS)
    given = (opening, closing) if r.random() < 0.3 else None
    answer, thought = text(r), text(r)
    if any(tag in answer + thought for tag in TAGS):
        return
    found = thinking.without_thinking(f"{opening}{thought}{closing}{answer}", given)
    if found != answer.lstrip():
        yield f"{found!r} is not the answer {answer.lstrip()!r}"
    if thinking.without_thinking(f"{thought}{closing}\n{answer}", given) != answer.lstrip():
        yield "a closing tag alone does not end thoughts"
    if thinking.without_thinking(f"{opening}{thought}", given) != "":
        yield "thoughts that were cut have left something"
    if thinking.without_thinking(thought, given, opened_by=opening) != "":
        yield "thoughts that the prompt opened have left something"
    if thinking.without_thinking(answer, given) != answer:
        yield "a text without thoughts was changed"
    wild = text(r, 20, with_tags=True)
    left = thinking.without_thinking(wild)
    if not set(left) <= set(wild) or len(left) > len(wild):
        yield "what is left was not in the text"


# -------------------------------------------------------------------------------------- prompts


def conversation(r: random.Random, said: str) -> Any:
    """A prompt that ends with a user's turn, as text, messages, or messages in parts."""
    kind = r.choice(["text", "messages", "parts"])
    if kind == "text":
        return said
    turns = [{"role": "system", "content": text(r)}] if r.random() < 0.5 else []
    if kind == "messages":
        return [*turns, {"role": "user", "content": said}]
    images = [{"type": "image", "image": f"picture {n}"} for n in range(r.randint(0, 3))]
    at = r.randint(0, len(images))
    content = [*images[:at], {"type": "text", "text": said}, *images[at:]]
    return [*turns, {"role": "user", "content": content}]


def pictures(prompt: Any) -> list[Any]:
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return [] if isinstance(content, str) else [p for p in content if p["type"] == "image"]


def rewritten(r: random.Random) -> Iterator[str]:
    """A last user turn is read and replaced whole; images stay, each once and in order."""
    said, new = text(r), text(r)
    prompt = conversation(r, said)
    before = json.dumps(prompt)
    if prompts.last_user_text(prompt) != said:
        yield f"read {prompts.last_user_text(prompt)!r} of {said!r}"
    after = prompts.with_user_text(prompt, new)
    if prompts.last_user_text(after) != new or pictures(after) != pictures(prompt):
        yield "the new text or an image is lost"
    template = r.choice(["{prompt}\n{solution}{feedback}", "{solution}{feedback}{prompt}{prompt}"])
    solution, feedback = text(r), text(r)
    made = prompts.reprompted(prompt, template, solution=solution, feedback=feedback)
    filled = template.format(prompt=said, solution=solution, feedback=feedback)
    if prompts.last_user_text(made) != filled:
        yield f"filled to {prompts.last_user_text(made)!r}, not {filled!r}"
    if pictures(made) != pictures(prompt):
        yield "an image is lost or doubled"
    if json.dumps(prompt) != before:
        yield "the student's prompt was changed"


@lru_cache
def chat() -> Any:
    from chatml import chatml_tokenizer

    return chatml_tokenizer()


def chats(r: random.Random) -> Iterator[str]:
    """A response is found behind two chats that a template wrote, and decodes to itself."""
    tokenizer = chat()
    said, response = (text(r, 6, surrogates=False).replace("\x00", "") for _ in range(2))
    for token in ("<|im_start|>", "<|im_end|>"):
        response = response.replace(token, "")
    student = [{"role": "user", "content": said}]
    template = "{prompt}\n\nThe answer: {solution}{feedback}"
    teacher = prompts.reprompted(
        student, template, solution=text(r, 4, surrogates=False), feedback=""
    )
    tail = [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    rows = []
    for messages in (student, teacher):
        head = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        rows.append([*tokenizer(head, add_special_tokens=False).input_ids, *tail])
    ids = [torch.tensor([row]) for row in rows]
    marks = torch.zeros_like(ids[0])
    marks[0, -len(tail) :] = 1
    places = fused_sd.align_responses(
        ids[0],
        torch.ones_like(ids[0]),
        ids[1],
        torch.ones_like(ids[1]),
        student_response_mask=marks,
    )
    found = tokenizer.decode(places.token_ids, skip_special_tokens=True)
    if found != response:
        yield f"decoded {found!r} for {response!r}"


# ---------------------------------------------------------------------------------------- values


def values(r: random.Random) -> Iterator[str]:
    """A dataset's value becomes a text or nothing, or is refused with the row's name."""
    pool = [
        *(None, "", text(r), 0, -1, 2.5, float("nan"), True, [], {}, (), b"x", object(), 1j),
        *(numpy.float32("nan"), numpy.int64(3), numpy.array(["a"]), numpy.array(3.0), [None]),
        *([{"role": "user", "content": text(r)}], [{"content": None}], [{"role": "user"}]),
        *([{"content": [{"type": "text", "text": text(r)}]}], [{"content": [{"type": "image"}]}]),
        *(torch.tensor(2.0), [text(r)], {"content": "x"}, numpy.datetime64("NaT"), range(2)),
        *([{"content": [{"type": "text"}]}], [{"content": 3}], [{"content": [3]}], [[]]),
    ]
    value = r.choice(pool)
    try:
        found = texts.as_text("feedback", value, "the row of 'x'")
        if found is not None and not isinstance(found, str):
            yield f"{value!r} became {found!r}"
    except ValueError as error:
        yield from judged(error)
    rollout = Rollout(
        prompt=conversation(r, text(r)),
        prompt_ids=[1],
        completion_ids=[2],
        text=text(r, with_tags=True),
        reward=r.choice([0.0, 1.0, float("nan")]),
        privileged=value,
        feedback=value,
        index=0,
        group=[Sibling(n, text(r, with_tags=True), r.choice([0.0, 1.0])) for n in range(3)],
    )
    try:
        if rollout.hint is not None and not isinstance(rollout.hint, str):
            yield f"the hint of {value!r} is {rollout.hint!r}"
    except ValueError as error:
        yield from judged(error)


# ---------------------------------------------------------------------------------------- traces


def files(r: random.Random) -> Iterator[str]:
    """A file of traces that was cut off anywhere holds the questions that were whole."""
    lines, kept = [], []
    header = {"format": traces.FORMAT, "config": {"chat_template_kwargs": {"x": text(r)}}}
    for question in range(r.randint(0, 3)):
        prompt = conversation(r, text(r))
        made = traces.Trace(
            question=question,
            prompt=prompt,
            prompt_ids=(1, 2),
            initial_ids=tuple(range(r.randint(0, 3))),
            phrase=text(r),
            verdict_ids=(3,),
            revision_ids=(4, 5),
            initial_correct=r.random() < 0.5,
            initial_reward=r.choice([None, 0.5]),
            revision_reward=1.0,
        )
        mine = [made] * r.randint(0, 2)
        counts = traces.TraceCounts(questions=1, kept=len(mine))
        lines.append(json.dumps(traces.record(question, mine, counts)))
        chat_format = None if isinstance(prompt, str) else header["config"]["chat_template_kwargs"]
        kept.append([replace(one, chat_template_kwargs=chat_format) for one in mine])
    content = "".join(line + "\n" for line in [json.dumps(header), *lines]).encode()
    cut = r.choice([len(content), r.randint(0, len(content))])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traces.jsonl"
        path.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        try:
            found = traces.load_traces(path)
        except ValueError as error:
            if whole:
                yield f"a file with {whole} whole lines was refused: {error}"
            yield from judged(error)
        else:
            wanted = [*chain.from_iterable(kept[: max(whole - 1, 0)])]
            if [asdict(one) for one in found.traces] != [asdict(one) for one in wanted]:
                yield "other traces were read than written"
        if whole or json.dumps(header).encode().startswith(content[:cut]):
            traces.start_file(path, header)  # as a run that goes on does
            if path.read_bytes() != content[: content[:cut].rfind(b"\n") + 1] and whole:
                yield "continuing a file has changed its whole lines"


KINDS: dict[str, Callable[[random.Random], Iterator[str]]] = {
    function.__name__: function
    for function in (alignment, alignment, thoughts, rewritten, chats, values, files)
}


def check(seed: int) -> list[str]:
    r = random.Random(seed)
    kind = r.choice(list(KINDS))
    try:
        return [f"{kind}: {line}" for line in KINDS[kind](r)]
    except ValueError as error:
        return [f"{kind}: {line}" for line in judged(error)] or [f"{kind}: refused: {error}"]


def code(seed: int) -> str:
    return f"{random.Random(seed).choice(list(KINDS))} of seed {seed}"
