"""FusedDistillationTrainer against TRL's own trainer."""

import copy

import peft
import pytest
import torch
from datasets import Dataset
from gkd_pairs import DEFAULTS, assert_same, build, loss_and_gradients
from test_fused_gkd import Largest
from tiny_vlm import FAMILIES, image, tiny_vlm
from trl import DistillationConfig, DistillationTrainer
from trl_pairs import TOKENIZER, VOCAB, assert_same_metrics

from fused_sd import reference
from fused_sd.integrations.trl import FusedDistillationTrainer

pytestmark = [
    # PEFT and TRL read names that transformers is about to rename
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # a loader without a GPU
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

CLASSES = (DistillationTrainer, FusedDistillationTrainer)
TEXTS = Dataset.from_dict({"prompt": ["Solve 2 + 2.", "Add 3 to 4, then 5."] * 4})
IMAGES = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": "What is it?" * (1 + n % 2)}],
            "images": [image(n)] * (1 + n % 2),
        }
        for n in range(4)
    ]
)
PROMPT, COMPLETION = 5, 6


def make(cls, folder, *, student=None, teacher=None, adapter=None, data=TEXTS, **settings):
    """A trainer that has not trained yet."""
    processor = settings.pop("processor", TOKENIZER)
    settings = {"max_completion_length": COMPLETION, **DEFAULTS, **settings}
    torch.manual_seed(1)
    trainer = cls(
        build(0) if student is None else copy.deepcopy(student),
        build(7, hidden_size=48) if teacher is None else copy.deepcopy(teacher),
        args=DistillationConfig(output_dir=str(folder), **settings),
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        processing_class=processor,
        peft_config=None if adapter is None else peft.LoraConfig(r=4, **adapter),
    )
    assert cls is DistillationTrainer or trainer._fused
    return trainer


def batch(**more):
    """Left-padded prompts and right-padded completions."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"prompt": (3, PROMPT), "completion": (3, COMPLETION)}
    ids = {n: torch.randint(2, VOCAB, s, generator=generator) for n, s in shapes.items()}
    masks = {name: torch.ones(shape, dtype=torch.long) for name, shape in shapes.items()}
    masks["prompt"][0, :2] = 0
    masks["completion"][1, 4:] = 0
    return {
        **{f"{name}_ids": value for name, value in ids.items()},
        **{f"{name}_mask": value for name, value in masks.items()},
        "num_items_in_batch": torch.tensor(41),
        **more,
    }


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_gradients_and_metrics_are_trls(beta, temperature, tmp_path):
    trainers = [make(cls, tmp_path, beta=beta, temperature=temperature) for cls in CLASSES]
    tools = torch.ones(3, COMPLETION, dtype=torch.long)
    tools[0, 1:3] = 0
    for more in ({}, {"tool_mask": tools}, {"num_items_in_batch": None}):
        inputs = batch(**more)
        assert_same(*(loss_and_gradients(trainer, inputs) for trainer in trainers))
        assert_same_metrics(*trainers)


def test_lora_gets_trls_gradients(tmp_path):
    adapter = {"target_modules": ["q_proj"], "init_lora_weights": False}
    trainers = [make(cls, tmp_path, adapter=adapter) for cls in CLASSES]
    assert_same(*(loss_and_gradients(trainer, batch()) for trainer in trainers))


def test_a_batch_without_tokens_has_loss_and_gradients_of_0(tmp_path):
    trainer = make(FusedDistillationTrainer, tmp_path)
    empty = torch.zeros(3, COMPLETION, dtype=torch.long)
    inputs = batch(completion_mask=empty, num_items_in_batch=None)
    loss, gradients = loss_and_gradients(trainer, inputs)
    assert float(loss) == 0
    assert set(gradients) == {name for name, _ in trainer.model.named_parameters()}
    assert not any(gradient.any() for gradient in gradients.values())
    assert trainer._metrics["train"]["entropy"] == [0.0]


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_teacher_that_is_nearly_the_student_is_compared_exactly(beta, tmp_path):
    student = build(0)
    teacher = build(0)
    with torch.no_grad():
        teacher.lm_head.weight += 1e-4 * torch.randn_like(teacher.lm_head.weight)
    given = {"student": student, "teacher": teacher, "beta": beta}
    stock, fused = (make(cls, tmp_path, **given) for cls in CLASSES)
    found = [float(loss_and_gradients(trainer, batch())[0]) for trainer in (stock, fused)]
    inputs = batch()
    ids, mask = (
        torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], 1)
        for part in ("ids", "mask")
    )
    with torch.no_grad():
        hidden = student.model(input_ids=ids, attention_mask=mask).last_hidden_state.double()
        hidden = hidden[:, -COMPLETION - 1 : -1]
        sides = [hidden @ model.lm_head.weight.double().t() for model in (student, teacher)]
        kind = "forward_kl" if beta == 0 else "reverse_kl"
        tokens = reference.divergence(*sides, divergence=kind)
        exact = float((tokens * inputs["completion_mask"]).sum() / 41)
    theirs, mine = (abs(value - exact) / exact for value in found)
    assert mine < 1e-3
    assert mine < theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_images_reach_both_models(family, tmp_path):
    student, processor = tiny_vlm(family, torch.float32)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    given = {"student": student, "teacher": teacher, "data": IMAGES, "processor": processor}
    trainers = [make(cls, tmp_path, **given) for cls in CLASSES]
    torch.manual_seed(2)
    trainers[0].model.train()
    inputs = trainers[0]._generate_and_score_completions(list(IMAGES.select(range(2))))
    assert "pixel_values" in inputs
    assert_same(*(loss_and_gradients(trainer, inputs) for trainer in trainers))


RUNS = {
    "accumulated": {"gradient_accumulation_steps": 2},
    "lora": {"adapter": {"target_modules": ["q_proj"], "init_lora_weights": False}},
    "autocast": {"bf16": True},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_training_logs_what_trl_logs(settings, tmp_path):
    """The first step is the same; later ones follow the optimizer's noise."""
    histories = []
    for cls in CLASSES:
        trainer = make(cls, tmp_path, eval_strategy="steps", eval_steps=1, **settings)
        torch.manual_seed(2)
        trainer.train()
        histories.append(trainer.state.log_history)
    stock, fused = histories
    bound = 0.05 if settings.get("bf16") else 1e-4
    assert [set(entry) for entry in stock] == [set(entry) for entry in fused]
    for name in ("loss", "grad_norm", "entropy"):
        assert fused[0][name] == pytest.approx(stock[0][name], rel=bound, abs=1e-5), name


def test_no_logits_of_the_batch_are_made(tmp_path):
    trainer = make(FusedDistillationTrainer, tmp_path)
    rows, length = 16, 64
    inputs = {
        "prompt_ids": torch.randint(2, VOCAB, (rows, 2)),
        "prompt_mask": torch.ones(rows, 2, dtype=torch.long),
        "completion_ids": torch.randint(2, VOCAB, (rows, length)),
        "completion_mask": torch.ones(rows, length, dtype=torch.long),
    }
    with Largest() as seen:
        loss_and_gradients(trainer, inputs)
    assert seen.numel < rows * length * VOCAB / 2
