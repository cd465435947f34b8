r"""The official runs' teacher prompts: each method's template of the last user turn.

Each constant names the file that it was taken from.  ``{prompt}`` is the student's last user turn,
``{privileged}`` the row's reference; other placeholders are explained at their constants.  A
template that holds ``ANSWER_INSTRUCTION`` (with doubled braces, as ``str.format`` asks) is filled
with the bare problem: the student's turn without "Problem: " and without that instruction, which
the official students' prompts have around it.
"""

ANSWER_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
PROBLEM_PREFIX = "Problem: "

# SDPO: lasgroup/SDPO, verl/trainer/config/actor/actor.yaml.  The defaults of its dataclass (and
# those of TRL's SDPOConfig) end in further newlines; no official run uses them.
SDPO = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question."
SDPO_SOLUTION = "\nCorrect solution:\n\n{successful_previous_attempt}"
SDPO_FEEDBACK = (
    "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}"
)
# Ours: the paper shows the student's own attempt in an ablation, and the official code cannot.
SDPO_ATTEMPT = "\nYour earlier attempt:\n\n{attempt}\n"

# RLSD: iie-ycx/RLSD, examples/visual_rl/format_prompt/teacher_hint_self_distill.jinja.  The
# official code strips the question and the reference.
RLSD = (
    "{prompt}\n\nHere is a reference solution:\n{privileged}\n\nAfter understanding the reference "
    "solution, please try to solve this problem using your own approach below. You FIRST think "
    "about the reasoning process as an internal monologue enclosed within <thought> </thought> "
    "tags. The final answer MUST be enclosed within <answer> </answer> tags."
)

# OPSD: siyan-zhao/OPSD, data_collator.py.
OPSD = (
    "{prompt}\n\nHere is a reference solution to this problem:\n{privileged}\n\n\nAfter "
    "understanding the reference solution and the rationale behind each step, now articulate your "
    "own step-by-step reasoning that derives the same final answer to the problem below:\n\n"
    "Please reason step by step, and put your final answer within \\boxed{{}}."
)

# RLCSD: THU-BPM/RLCSD, src/opsd_format.py, the "neutral" wording of its configurations.  Right and
# wrong hints are written alike; {privileged} is RLCSD_HINT.  The official code strips the problem,
# the solution and the answer.
RLCSD = (
    "Problem: {prompt}\n\nHere is a reference solution to this problem:\n"
    "=== Reference Solution Begin ===\n{privileged}\n=== Reference Solution End ===\n\n"
    "After reading the reference solution above, make sure you understand the reasoning behind "
    "each step.\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
)
RLCSD_HINT = "{solution}\n\nCorrect final answer: {answer}"

# SDFT: Continual-Intelligence/Self-Distillation, main.py.  The paper prints fewer newlines and a
# colon at the end.
SDFT = (
    "\n{prompt}\n\nThis is an example for a response to the question:\n{privileged}\n\nNow answer "
    "with a response of your own, including the thinking process.\n"
)
