"""What the base model makes of each context that a teacher reads: is there anything to distil?"""

from collections.abc import Callable
from pathlib import Path

from benchmarks.methods.evaluate import accuracy, respond
from benchmarks.methods.task import Question, Task
from benchmarks.methods.train import load
from fused_sd.integrations.shared.verdicts import CORRECT_PHRASE, DELIMITER, WRONG_PHRASE


def contexts(task: Task) -> dict[str, Callable[[Question], str]]:
    """Prompts of the teachers that know something, by what they know."""
    hinted = task.templates["hinted"]["reprompt_template"]
    sibling = task.templates["sibling"]

    def successful(asked: Question) -> str:
        text = asked.response.strip()
        return str(sibling["reprompt_template"]).format(
            prompt=asked.prompt,
            solution=sibling["solution_template"].format(successful_previous_attempt=text),
            feedback="",
        )

    return {
        "answer (RLSD)": lambda asked: hinted.format(prompt=asked.prompt, privileged=asked.answer),
        "solution (OPSD, SDFT)": lambda asked: hinted.format(
            prompt=asked.prompt, privileged=asked.solution
        ),
        "successful sibling (SDPO)": successful,
    }


def accuracies(task: Task, seed: int, cache: Path) -> dict[str, float]:
    """Greedy accuracy on the validation questions, by context."""
    model, tokenizer = load(task, seed, cache)
    asked = task.questions["validation"]
    found = {"nothing (the student)": accuracy(model, tokenizer, task, asked)}
    for name, context in contexts(task).items():
        prompts = [context(question) for question in asked]
        found[name] = accuracy(model, tokenizer, task, asked, prompts)
    phrases = task.templates["verdict"]
    phrase = {
        True: phrases.get("correct_phrase", CORRECT_PHRASE),
        False: phrases.get("wrong_phrase", WRONG_PHRASE),
    }
    drawn = respond(
        model, tokenizer, [question.prompt for question in asked], task.max_response, sample=True
    )
    for verdict, name in ((False, "own wrong"), (True, "own right")):
        pairs = [
            (question, f"{question.prompt}{text}{DELIMITER}{phrase[verdict]}{DELIMITER}")
            for question, text in zip(asked, drawn.texts)
            if task.is_right(question.prompt, text) == verdict
        ]
        if pairs:
            some, prompts = [asked for asked, _ in pairs], [prompt for _, prompt in pairs]
            label = f"{name} attempt and verdict (SD-Zero)"
            found[label] = accuracy(model, tokenizer, task, some, prompts)
    return found
