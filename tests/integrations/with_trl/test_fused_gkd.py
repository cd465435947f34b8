"""FusedGKDTrainer against TRL's own trainer.

Dimension key:  V vocabulary
"""

import random

import gkd_pairs
import pytest
import torch
from closeness import errors
from gkd_pairs import assert_same, batch, build, loss_and_gradients, make
from largest import Largest
from transformers import Qwen3ForCausalLM
from trl.experimental.gkd import GKDTrainer
from trl_pairs import VOCAB

from fused_sd import reference
from fused_sd.integrations.trl import FusedGKDTrainer
from fused_sd.terms.divergence_term import generalized_jsd

pytestmark = [
    # PEFT and TRL read names that transformers is about to rename
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # PEFT, of LoRA on the head
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
    # a loader without a GPU
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

CLASSES = (GKDTrainer, FusedGKDTrainer)
BETAS = (0.0, 0.1, 0.5, 1.0)
LORA = {"init_lora_weights": False}
# TRL refuses LoRA on the head
ADAPTERS = {
    "layers": {"target_modules": ["q_proj", "v_proj"], **LORA},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], **LORA},
}


def pair(folder, **settings):
    """TRL's trainer and ours, each with models of its own."""
    made = [make(cls, folder, **{k: v() for k, v in settings.items()}) for cls in CLASSES]
    assert made[1]._fused
    return made


def constant(value):
    return lambda: value


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2", "Phi", "Granite"])
def test_loss_and_gradients_are_trls(family, tmp_path):
    """The teacher is of the same family and of another width."""
    teacher = {"hidden_size": 48} if family != "Gemma2" else {}
    trainers = pair(
        tmp_path,
        student=lambda: build(0, family),
        teacher=lambda: build(7, family, **teacher),
    )
    for beta in BETAS:
        for given in ({}, {"num_items_in_batch": torch.tensor(37)}, {"num_items_in_batch": 29}):
            for trainer in trainers:
                trainer.beta = beta
            assert_same(*(loss_and_gradients(trainer, batch(), **given) for trainer in trainers))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_get_trls_gradients(kind, tmp_path):
    trainers = pair(tmp_path, adapter=constant(ADAPTERS[kind]))
    assert_same(*(loss_and_gradients(trainer, batch()) for trainer in trainers))


def test_a_teacher_in_16_bits_teaches_a_student_in_32(tmp_path):
    trainers = pair(tmp_path, teacher=lambda: build(7, dtype=torch.bfloat16))
    # TRL rounds the teacher's logits and log-probabilities to bf16
    assert_same(*(loss_and_gradients(t, batch()) for t in trainers), tolerance=0.02)


@pytest.mark.parametrize("rows", ["none", "one"])
def test_rows_without_labels_count_for_nothing(rows, tmp_path):
    trainer = make(FusedGKDTrainer, tmp_path)
    inputs = batch(labels=rows == "one")
    if rows == "one":
        inputs["labels"][1] = -100
        assert_same(
            loss_and_gradients(make(GKDTrainer, tmp_path), inputs),
            loss_and_gradients(trainer, inputs),
        )
        return
    loss, gradients = loss_and_gradients(trainer, inputs)
    assert float(loss) == 0
    assert set(gradients) == {name for name, _ in trainer.model.named_parameters()}
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("beta", BETAS)
def test_bf16_is_nearer_to_float64_than_trls(beta, tmp_path):
    """From the same bf16 states and heads; the gradient compared is the head's."""
    inputs = batch(rows=8, length=24)

    def teacher():  # nearly the student
        model = build(0, dtype=torch.bfloat16)
        with torch.no_grad():
            model.lm_head.weight += 0.01 * torch.randn_like(model.lm_head.weight)
        return model

    trainers = pair(tmp_path, student=lambda: build(0, dtype=torch.bfloat16), teacher=teacher)
    found = []
    for trainer in trainers:
        trainer.beta = beta
        loss, gradients = loss_and_gradients(trainer, inputs)
        found.append((loss, gradients["lm_head.weight"]))

    def logits(model):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad():
            hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
        weight = model.lm_head.weight.detach().double().requires_grad_()
        return hidden.double() @ weight.t(), weight

    (student, weight), (known, _) = (
        logits(model) for model in (trainers[1].model, trainers[1].teacher_model)
    )
    mask = inputs["labels"][:, 1:] != -100
    tokens = reference.divergence(student, known.detach(), **named(beta))
    exact = tokens[mask].sum() / mask.sum()
    exact.backward()
    for part, truth in ((0, exact), (1, weight.grad)):
        theirs, mine = (errors(one[part].double(), truth)[1] for one in found)
        assert mine < theirs


def named(beta):
    """The reference's keywords of a generalised JSD."""
    divergence = generalized_jsd(beta)
    if isinstance(divergence, str):
        return {"divergence": divergence}
    return {"divergence": "jsd", "beta": beta}


def test_no_logits_of_the_batch_are_made(tmp_path):
    inputs = batch(rows=16, length=65)
    logits = 16 * 64 * VOCAB
    largest = []
    for cls in CLASSES:
        trainer = make(cls, tmp_path)
        with Largest() as seen:
            loss_and_gradients(trainer, inputs)
        largest.append(seen.numel)
    assert largest[0] >= logits
    assert largest[1] < logits / 2


def test_neither_model_makes_logits_its_own_way(tmp_path, monkeypatch):
    trainer = make(FusedGKDTrainer, tmp_path)
    forward = Qwen3ForCausalLM.forward

    def refuse(*args, **kwargs):
        forward(*args, **kwargs)  # a request ends it at the head
        raise AssertionError("logits")

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", refuse)
    assert torch.isfinite(loss_and_gradients(trainer, batch())[0])


def test_a_head_that_cannot_be_reproduced_is_left_to_trl(tmp_path):
    class Doctored(Qwen3ForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.sin()
            return output

    def doctored():
        plain = build(7)
        model = Doctored(plain.config)
        model.load_state_dict(plain.state_dict())
        return model

    with pytest.warns(UserWarning, match="runs TRL's own loss: logits rebuilt"):
        fused = make(FusedGKDTrainer, tmp_path, teacher=doctored())
    stock = make(GKDTrainer, tmp_path, teacher=doctored())
    assert_same(*(loss_and_gradients(trainer, batch()) for trainer in (stock, fused)), tolerance=0)


RUNS = {
    "given answers": {"lmbda": 0.0},
    "the student's answers, accumulated": {"lmbda": 1.0, "gradient_accumulation_steps": 3},
    "the teacher's answers": {"lmbda": 0.0, "seq_kd": True, "beta": 0.0},
    "recomputed layers": {"lmbda": 0.5, "gradient_checkpointing": True},
    "lora": {"lmbda": 0.0, "adapter": ADAPTERS["layers"]},
    "autocast": {"lmbda": 0.0, "bf16": True},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_training_logs_what_trl_logs(settings, tmp_path):
    """The first step is the same; later ones follow the optimizer's noise."""
    histories = []
    for cls in CLASSES:
        trainer = make(
            cls,
            tmp_path,
            eval_strategy="steps",
            eval_steps=1,
            eval_dataset=gkd_pairs.DATA,
            **settings,
        )
        torch.manual_seed(2)
        random.seed(2)  # decides whose answers a batch holds
        trainer.train()
        histories.append(trainer.state.log_history)
    stock, fused = histories
    bound = 0.02 if settings.get("bf16") else 1e-4
    assert [set(entry) for entry in stock] == [set(entry) for entry in fused]
    for name in ("loss", "grad_norm"):
        assert fused[0][name] == pytest.approx(stock[0][name], rel=bound, abs=1e-5), name
    assert fused[1]["eval_loss"] == pytest.approx(stock[1]["eval_loss"], rel=max(bound, 1e-2))


def test_an_evaluation_that_wants_logits_gets_them(tmp_path):
    trainers = [make(cls, tmp_path) for cls in CLASSES]
    found = [
        trainer.prediction_step(trainer.model, batch(), prediction_loss_only=False)
        for trainer in trainers
    ]
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0], found[1][0])
