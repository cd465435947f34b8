"""The official codes' teacher prompts, written down a second time in the form of each source.

YAML stays YAML and Jinja stays Jinja, so that what those languages do with newlines is theirs.
"""

import re
import string

import jinja2
import yaml

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
SDPO_YAML = """
reprompt_template: |-
  {prompt}{solution}{feedback}

  Correctly solve the original question.

solution_template: |-

  Correct solution:

  {successful_previous_attempt}

feedback_template: |-

  The following is feedback from your unsuccessful earlier attempt:

  {feedback_raw}
"""
RLSD_JINJA = """\
{#- Self-distill teacher template: present the GT answer as a reference solution. -#}
{{ question | trim }}

Here is a reference solution:
{{ hint | trim }}

After understanding the reference solution, please try to solve this problem using your own \
approach below. You FIRST think about the reasoning process as an internal monologue enclosed \
within <thought> </thought> tags. The final answer MUST be enclosed within <answer> </answer> tags.
"""
SDFT_TEMPLATE = """
$orig_content

This is an example for a response to the question:
$output_text

Now answer with a response of your own, including the thinking process.
"""


def sdpo(prompt, *, solution=None, feedback=None):
    """lasgroup/SDPO: the templates of actor.yaml, filled as ray_trainer.py fills them."""
    config = yaml.safe_load(SDPO_YAML)
    solution_section = feedback_section = ""
    if solution is not None:
        shown = re.sub(r"<think>.*?</think>\s*", "", solution, flags=re.DOTALL)
        solution_section = config["solution_template"].format(successful_previous_attempt=shown)
    if feedback is not None:
        feedback_section = config["feedback_template"].format(feedback_raw=feedback)
    return config["reprompt_template"].format(
        prompt=prompt, solution=solution_section, feedback=feedback_section
    )


def rlsd(question, hint):
    """iie-ycx/RLSD: teacher_hint_self_distill.jinja, rendered as opsd_algos.py renders it."""
    return jinja2.Template(RLSD_JINJA.strip()).render(question=question, hint=hint)


def opsd_student(problem):
    """siyan-zhao/OPSD and THU-BPM/RLCSD: the student's user turn."""
    return f"Problem: {problem}\n\n{BOXED}"


def opsd(problem, solution):
    """siyan-zhao/OPSD: data_collator.py without ``reason_first``."""
    transition = (
        "\n\nAfter understanding the reference solution and the rationale behind each step, now "
        "articulate your own step-by-step reasoning that derives the same final answer to the "
        "problem below:\n"
    )
    return (
        f"{problem}\n\n"
        f"Here is a reference solution to this problem:\n{solution}\n"
        f"{transition}\n"
        f"{BOXED}"
    )


def rlcsd(problem, solution, answer):
    """THU-BPM/RLCSD: opsd_format.py, privileged_text_mode=solution_answer, neutral wording."""
    return "\n".join(
        [
            f"Problem: {problem.strip()}",
            "",
            "Here is a reference solution to this problem:",
            "=== Reference Solution Begin ===",
            solution.strip(),
            "",
            f"Correct final answer: {answer.strip()}",
            "=== Reference Solution End ===",
            "",
            "After reading the reference solution above, make sure you understand the reasoning "
            "behind each step.",
            "",
            BOXED,
        ]
    )


def sdft(question, demonstration):
    """Continual-Intelligence/Self-Distillation: the teacher's prompt of main.py."""
    template = string.Template(SDFT_TEMPLATE)
    return template.substitute(orig_content=question, output_text=demonstration)
