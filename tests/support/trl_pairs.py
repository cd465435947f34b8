"""TRL's trainers and ours on the same tiny model, and a comparison of their losses."""

import dataclasses
import functools
import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import peft
import pytest
import tokenizers
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments
from trl.experimental.sdft import SDFTConfig
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from fused_sd.integrations.trl import FusedSDPOTrainer

PROMPT, TEACHER_PROMPT, COMPLETION = 5, 8, 6
TOLERANCE = 1e-5  # fp32; of the largest gradient, and of the loss
_NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
# transformers 5.23 renamed the setting
CHECKPOINTING = next(
    n for n in ("activation_checkpointing", "gradient_checkpointing") if n in _NAMES
)


def byte_tokenizer():
    """A byte-level BPE tokenizer trained on one line."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(["Solve 2 + 2 and add 3 to 4."] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


TOKENIZER = byte_tokenizer()
VOCAB = len(TOKENIZER)


def rewards(prompts, **_):
    """Every second rollout succeeds."""
    return [float(index % 2) for index in range(len(prompts))]


def make(cls, home, *, adapter=None, model=None, **settings):
    """A trainer that has not trained yet."""
    is_sdpo = issubclass(cls, SDPOTrainer)
    defaults = {
        "output_dir": f"{home}/out",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "num_generations": 2 if is_sdpo else 1,
        "max_completion_length": COMPLETION,
        "disable_tqdm": True,
        "seed": 1,
    }
    config = (SDPOConfig if is_sdpo else SDFTConfig)(**{**defaults, **settings})
    data = Dataset.from_dict(
        {
            "prompt": ["Solve 2+2.", "Add 3 to 4."] * 4,
            "privileged_context": ["It is 4.", "It is 7."] * 4,
        }
    )
    torch.manual_seed(1)
    trainer = cls(
        AutoModelForCausalLM.from_pretrained(home) if model is None else model,
        **({"reward_funcs": rewards} if is_sdpo else {}),
        args=config,
        train_dataset=data,
        processing_class=TOKENIZER,
        peft_config=None if adapter is None else peft.LoraConfig(r=4, **adapter),
    )
    trainer.current_gradient_accumulation_steps = 1  # what training sets
    return trainer


def batch(*, old=False, mask=(1.0, 1.0, 0.0), seed=0):
    """What TRL's losses read: left-padded prompts, right-padded completions."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape):
        return torch.randint(2, VOCAB, shape, generator=generator)

    rows = len(mask)
    completion = ids(rows, COMPLETION)
    completion_mask = torch.ones(rows, COMPLETION, dtype=torch.long)
    completion_mask[1, 4:] = 0
    prompt_mask = torch.ones(rows, PROMPT, dtype=torch.long)
    prompt_mask[0, :2] = 0
    teacher_mask = torch.ones(rows, TEACHER_PROMPT, dtype=torch.long)
    teacher_mask[1, :3] = 0
    inputs = {
        "prompt_ids": ids(rows, PROMPT),
        "prompt_mask": prompt_mask,
        "completion_ids": completion,
        "completion_mask": completion_mask,
        "teacher_input_ids": torch.cat([ids(rows, TEACHER_PROMPT), completion], 1),
        "teacher_attention_mask": torch.cat([teacher_mask, completion_mask], 1),
        "self_distillation_mask": torch.tensor(mask),
        "advantages": torch.randn(rows, generator=generator),
    }
    if old:  # ratios on both sides of the clips
        inputs["old_per_token_logps"] = torch.randn(rows, COMPLETION, generator=generator) - 6
    return inputs


def perturb(trainer, scale):
    """Move the student away from its teacher, alike in every trainer."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def loss_and_gradients(trainer, inputs):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.detach(), {name: p.grad for name, p in named if p.grad is not None}


def assert_same(stock, fused, inputs):
    """Same loss, same gradients, and at least the metrics that TRL logs."""
    (loss, gradients), (own_loss, own) = (loss_and_gradients(t, inputs) for t in (stock, fused))
    # a sum of terms of both signs is compared with what it is a sum of
    assert abs(float(loss - own_loss)) <= TOLERANCE * max(abs(float(loss)), 1.0)
    assert own.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 0
    for name, gradient in gradients.items():
        assert float((own[name] - gradient).abs().max()) <= TOLERANCE * largest, name
    assert_same_metrics(stock, fused)


def assert_same_metrics(stock, fused):
    theirs, ours = stock._metrics["train"], fused._metrics["train"]
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
    for metrics in (theirs, ours):
        metrics.clear()


TEACHERS = {
    "live": {"teacher_model_kind": "live"},
    "base": {"teacher_model_kind": "base"},
    "ema": {"teacher_model_kind": "ema"},
    "lora base": {
        "teacher_model_kind": "base",
        "adapter": {"target_modules": ["q_proj", "v_proj"]},
    },
    "lora ema": {"teacher_model_kind": "ema", "adapter": {"target_modules": ["q_proj", "lm_head"]}},
    "saved head base": {
        "teacher_model_kind": "base",
        "adapter": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    },
}
MODES = [
    ("sampled_token", True, 1.0),
    *[("topk_logits", tail, alpha) for tail in (False, True) for alpha in (0.0, 0.3, 1.0)],
    *[("full_logits", True, alpha) for alpha in (0.0, 0.3, 1.0)],
]


@functools.cache
def pair(home, kind):
    """TRL's trainer and ours, with the same weights."""
    pair = [make(cls, home, **TEACHERS[kind]) for cls in (SDPOTrainer, FusedSDPOTrainer)]
    for trainer in pair:
        for callback in trainer.callback_handler.callbacks:
            if type(callback).__name__ == "PEFTAdapterEMACallback":  # makes the teacher's adapter
                callback.on_train_begin(trainer.args, trainer.state, trainer.control)
        # an adapter's student must move further: the gradient of a student that is near its teacher
        # is a difference of nearly equal numbers, and differs between CPUs
        perturb(trainer, 0.1 if kind == "lora ema" else 0.05)
    assert pair[1]._fused
    return pair


def configure(trainers, mode, tail=True, alpha=1.0, weight=1.0, **settings):
    values = {
        "distillation_mode": mode,
        "distillation_add_tail": tail,
        "distillation_alpha": alpha,
        "distillation_weight": weight,
        "distillation_topk": 7,
        **settings,
    }
    for trainer in trainers:
        for name, value in values.items():
            assert hasattr(trainer.args, name), name
            setattr(trainer.args, name, value)
