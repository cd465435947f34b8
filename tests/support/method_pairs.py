"""Trainers of the methods on a tiny float64 model, and their batches as official codes see them."""

import functools
import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import transformers
from datasets import Dataset
from official_batches import Batch
from tiny_models import tiny_model
from trl_pairs import CHECKPOINTING, TOKENIZER

from fused_sd.integrations import trl as ours

METHODS = ("SDPO", "SDZero", "RLSD", "RLCSD", "OPSD", "SDFT", "GRPO", "RFT", "IWOPD", "SDPG")
REWARDED = ("SDPO", "SDZero", "RLSD", "RLCSD", "GRPO", "RFT", "SDPG")
DATA = Dataset.from_dict(
    {
        "prompt": ["Solve 2 + 2.", "Add 3 to 4, then 5."] * 4,
        "privileged_context": ["It is 4.", "It is 12, of course."] * 4,
    }
)
GROUP = 4


def rewards(prompts, **_):
    """Every second rollout succeeds."""
    return [float(index % 2) for index in range(len(prompts))]


def feedback(prompts, **_):
    """Every third rollout is told something."""
    return [None if index % 3 else f"Attempt {index} fails." for index in range(len(prompts))]


class RLCSDTrainer(ours.RLCSDTrainer):
    """RLCSD whose completions all give an answer, which a random model never puts into a box."""

    def final_answer(self, text):
        return text[:2]


@functools.cache
def weights(family="Qwen3", **changes):
    torch.manual_seed(0)
    return tiny_model(
        family, vocab=len(TOKENIZER), max_position_embeddings=512, **changes
    ).state_dict()


def model(dtype=torch.float64, family="Qwen3", **changes):
    """The same tiny model, made again."""
    made = tiny_model(family, vocab=len(TOKENIZER), max_position_embeddings=512, **changes)
    made.load_state_dict(weights(family, **changes))
    return made.to(dtype)


def positional_model():
    """A tiny GPT-2: it counts positions from the first column unless it is told them."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(vocab_size=len(TOKENIZER), **sizes, **no_dropout)
    return transformers.GPT2LMHeadModel(config)


TRAINERS = (
    "tools",
    "environment_factory",
    "rollout_func",
    "peft_config",
    "callbacks",
    "eval_dataset",
)


def make(method, folder, *, student=None, data=DATA, processor=TOKENIZER, **settings):
    """A trainer that has not trained yet.

    Args:
        method: one of METHODS, or the trainer and the configuration of another.
        settings: of the configuration, and those of ``TRAINERS``, which the trainer takes.
    """
    pair = method
    if isinstance(method, str):
        pair = (getattr(ours, f"{method}{part}") for part in ("Trainer", "Config"))
        if method == "RLCSD":
            pair = RLCSDTrainer, ours.RLCSDConfig
    trainer, config = pair
    defaults = {
        "output_dir": str(folder),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        CHECKPOINTING: False,
        "per_device_train_batch_size": GROUP,
        "num_generations": GROUP,
        "max_completion_length": 6,
        "disable_tqdm": True,
        "seed": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "temperature": 1.0,
        "max_steps": 2,
    }
    more = {name: settings.pop(name) for name in TRAINERS if name in settings}
    given = {"reward_funcs": settings.pop("reward_funcs", rewards)} if method in REWARDED else {}
    said = settings.pop("feedback_func", feedback if method == "SDPO" else None)
    args = config(**{**defaults, **settings})
    student = model() if student is None else student
    if args.beta:  # TRL loads the reference from where the student came from
        student.config._name_or_path = str(folder / "reference")
        student.save_pretrained(folder / "reference")
    torch.manual_seed(1)
    made = trainer(
        student,
        **given,
        args=args,
        train_dataset=data,
        processing_class=processor,
        feedback_func=said,
        **more,
    )
    made.current_gradient_accumulation_steps = 1  # what training sets
    return made


def sample(trainer, *, off_policy=False, rows=None):
    """A batch of rollouts; off policy with log-probs on both sides of the clips."""
    trainer.model.train()
    rows = trainer.train_dataset.select([0] * GROUP if rows is None else rows)
    inputs = trainer._generate_and_score_completions(list(rows))
    if off_policy:
        own = states(trainer.model, inputs, "student").old
        inputs["old_per_token_logps"] = own + 0.3 * torch.randn_like(own)
    return inputs


def alone(ids, mask):
    """A model's arguments, with positions as in each row alone.

    Rotary angles are fp32 in any model: other positions would leave 1e-8 in float64.
    """
    places = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": places}


def states(student, inputs, side, teacher=None):
    """The batch with logits' makings: states that the model's gradient flows through."""
    length = inputs["completion_ids"].size(1)

    def run(model, ids, mask):
        output = model.model(**alone(ids, mask), use_cache=False)
        return output.last_hidden_state[:, -length - 1 : -1]

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    hidden, head = run(student, ids, mask), student.lm_head.weight
    teacher = student if teacher is None else teacher
    read = inputs.get("teacher_input_ids", ids), inputs.get("teacher_attention_mask", mask)
    with torch.no_grad():
        known = run(teacher, *read)
    own = (hidden @ head.t()).log_softmax(-1)
    own = own.gather(-1, inputs["completion_ids"][..., None])[..., 0].detach()
    old = inputs.get("old_per_token_logps")
    shape = own.shape
    return Batch(
        hidden,
        head,
        known,
        teacher.lm_head.weight.detach(),
        inputs["completion_ids"],
        inputs["loss_mask"].double(),
        torch.ones(shape[0], dtype=torch.float64),
        inputs["advantages"].double()[:, None].expand(shape),
        own if old is None else old,
        own,
        own,
        own,
        own[..., None],
        torch.ones(shape[0], 1, dtype=torch.bool),
    )


def loss_and_gradients(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}
