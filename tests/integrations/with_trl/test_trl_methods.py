"""Each method's trainer: its loss on real rollouts is its official code's, gradient included."""

import official
import official_policies
import pytest
import torch
from closeness import assert_close
from method_pairs import METHODS, alone, loss_and_gradients, make, sample, states
from torch import Tensor

from fused_sd import reference

FLOAT = torch.float64
OFF_POLICY = ("GRPO", "RLSD", "RLCSD", "SDPO", "SDPG", "IWOPD")


def rlcsd(batch, inputs, trainer) -> Tensor:
    """The batch with the log-probabilities of each hint."""
    length = inputs["completion_ids"].size(1)

    def score(ids, mask):
        with torch.no_grad():
            logits = trainer.model(**alone(ids, mask)).logits
        chosen = logits[:, -length - 1 : -1].log_softmax(-1)
        return chosen.gather(-1, inputs["completion_ids"][..., None])[..., 0]

    wrong = [
        score(inputs["wrong_input_ids"][:, k], inputs["wrong_attention_mask"][:, k])
        for k in range(inputs["wrong_mask"].size(1))
    ]
    correct = score(inputs["teacher_input_ids"], inputs["teacher_attention_mask"])
    known = {
        "correct": correct,
        "wrong": torch.stack(wrong, -1),
        "wrong_mask": inputs["wrong_mask"],
    }
    fields = {name: known.get(name, value) for name, value in vars(batch).items()}
    return official_policies.rlcsd(
        type(batch)(**fields), official_policies.Contrast(0.02, 1.0, 0.5, 0.02, (-2.0, 2.0))
    )


def cross_entropy(batch, inputs, trainer) -> Tensor:
    return official.token_mean(-batch.log_prob(batch.student_logits()), batch.mask)


def iw_opd(batch, inputs, trainer) -> Tensor:
    return official_policies.iw_opd(batch.with_policies(rollout=batch.old), gamma=0.8)


def sdpg(mode="urkl", **settings):
    """With the old policy as the rollout's, and the reference model's log-probabilities as old."""

    def loss(batch, inputs, trainer) -> Tensor:
        with torch.no_grad():
            initial = states(trainer.ref_model, inputs, "student")
            reference = initial.log_prob(initial.student_logits(trainer.temperature))
        policies = batch.with_policies(rollout=batch.old, old=reference)
        return official_policies.sdpg(
            policies, mode, clip=(0.2, 0.28), temperature=trainer.temperature, **settings
        )

    return loss


def move(model) -> None:
    """Take the student away from its reference."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


def skew(batch, *_) -> Tensor:
    """The skew KL's mean over the micro-batch's tokens."""
    sides = batch.student_logits(), batch.teacher_logits()
    tokens = reference.divergence(*sides, divergence="skew_kl", student_weight=0.8)
    return (tokens * batch.mask).sum() / batch.mask.sum()


def hybrid(batch, *_) -> Tensor:
    """SDPO's equation 3, with 0.3 of the distillation."""
    policy = official_policies.grpo_verl(batch, clip=(0.2, 0.2), dual=1e9)
    return 0.7 * policy + 0.3 * official.sdpo(batch, alpha=0.5, top_k=100, tis_cap=None)


# method: settings of its trainer, and the official code's loss
OFFICIAL = {
    "SDPO, the official configuration": (
        "SDPO",
        {"tail_floor": 1e-7},
        lambda b, *_: official.sdpo(b, alpha=0.5, top_k=100, tis_cap=None),
    ),
    "SDPO with feedback": (
        "SDPO",
        {"distillation_alpha": 1.0, "distillation_topk": 20, "tail_floor": 1e-7},
        lambda b, *_: official.sdpo(b, alpha=1.0, top_k=20, tis_cap=None),
    ),
    "SDPO, renormalised": (
        "SDPO",
        {"distillation_add_tail": False},
        lambda b, *_: official.sdpo(b, alpha=0.5, top_k=100, add_tail=False, tis_cap=None),
    ),
    "SDPO over the vocabulary": (
        "SDPO",
        {"distillation_mode": "full_logits", "distillation_alpha": 1.0},
        lambda b, *_: official.sdpo(b, alpha=1.0, top_k=None, tis_cap=None),
    ),
    "SDPO of the sampled token": (
        "SDPO",
        {"distillation_mode": "sampled_token", "distillation_alpha": 1.0},
        lambda b, *_: official.sdpo_sampled(b),
    ),
    "SDPO and GRPO": ("SDPO", {"tail_floor": 1e-7, "distillation_weight": 0.3}, hybrid),
    "SDPO, GRPO's part alone": (
        "SDPO",
        {"distillation_weight": 0.0},
        lambda b, *_: official_policies.grpo_verl(b, clip=(0.2, 0.2), dual=1e9),
    ),
    "SD-Zero, code": (
        "SDZero",
        {},
        lambda b, *_: official.sd_zero(b, top_k=64, num_tokens=float(b.mask.sum())),
    ),
    "SD-Zero, paper": ("SDZero", {"variant": "paper"}, lambda b, *_: official.sd_zero_paper(b)),
    "OPSD": ("OPSD", {}, lambda b, *_: official.opsd(b, entry_clip=0.05)),
    "OPSD, code of March 2026": (
        "OPSD",
        {
            "distillation_alpha": 0.5,
            "entry_clip": None,
            "distillation_topk": 50,
            "temperature": 1.1,
        },
        lambda b, *_: official.opsd(b, beta=0.5, top_k=50, temperature=1.1),
    ),
    "OPSD, another divergence": (
        "OPSD",
        {"divergence": "skew_kl", "divergence_parameter": 0.8, "entry_clip": None},
        skew,
    ),
    "SDFT": ("SDFT", {"num_loss_tokens_to_skip": 1}, lambda b, *_: official.sdft(b, skip=0)),
    "GRPO": (
        "GRPO",
        {},
        lambda b, *_: official_policies.grpo_verl(b, clip=(0.2, 0.28), dual=3.0),
    ),
    "RLSD": (
        "RLSD",
        {"evidence_decay_steps": 0},
        lambda b, *_: official_policies.rlsd(b),
    ),
    "RLSD, first step of the decay": (
        "RLSD",
        {},
        lambda b, *_: official_policies.rlsd(b, mix=official_policies.rlsd_mix(1, 0.5, 0, 60)),
    ),
    "RLSD, failures alone": (
        "RLSD",
        {"evidence_decay_steps": 0, "negative_only": True},
        lambda b, *_: official_policies.rlsd(b, negative_only=True),
    ),
    "RLSD from old log-probabilities": (
        "RLSD",
        {"evidence_decay_steps": 0, "evidence_log_prob": "old"},
        lambda b, *_: official_policies.rlsd(b, from_old=True),
    ),
    "RLCSD": ("RLCSD", {}, rlcsd),
    "RFT": ("RFT", {}, cross_entropy),
    "IW-OPD": ("IWOPD", {"iw_opd_gamma": 0.8}, iw_opd),
    "IW-OPD, on policy": ("IWOPD", {"iw_opd_gamma": 0.8}, iw_opd),
    "SDPG": ("SDPG", {}, sdpg(beta=1e-3, alpha=1e-3)),
    **{
        f"SDPG, {mode}": (
            "SDPG",
            {"reference_term": mode, "distillation_weight": 0.3, "beta": 0.2},
            sdpg(mode, beta=0.3, alpha=0.2),
        )
        for mode in ("fkl", "rkl", "ufkl", "urkl")
    },
    "SDPG, successes and another temperature": (
        "SDPG",
        {"positive_only": True, "distillation_weight": 0.3, "temperature": 0.8},
        sdpg(beta=0.3, alpha=1e-3, positive_only=True),
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_trainers_loss_and_gradient_are_the_official_codes(name, tmp_path):
    method, settings, definition = OFFICIAL[name]
    live = {} if method in ("GRPO", "RFT") else {"teacher_model_kind": "live"}
    trainer = make(method, tmp_path, **live, **settings)
    inputs = sample(trainer, off_policy=method in OFF_POLICY and "on policy" not in name)
    if method == "SDPG":
        move(trainer.model)
    loss, gradients = loss_and_gradients(trainer, inputs)
    trainer.model.zero_grad()
    exact = definition(states(trainer.model, inputs, "student"), inputs, trainer)
    exact.backward()
    assert exact != 0
    assert_close(loss, exact.detach(), FLOAT, "loss")
    for parameter, truth in trainer.model.named_parameters():
        assert_close(gradients[parameter], truth.grad, FLOAT, parameter)


def test_every_method_is_proved():
    assert {method for method, *_ in OFFICIAL.values()} == set(METHODS)


@pytest.mark.parametrize(
    "method, settings, message",
    [
        ("OPSD", {"divergence": "skew_kl"}, "have its student_weight"),
        ("OPSD", {"divergence": "reverse_kl", "divergence_parameter": 1.0}, "have no parameter"),
        ("SDFT", {"divergence": "kl"}, "divergence must be one of 'forward_kl'"),
        ("SDFT", {"divergence_parameter": 0.5}, "come with divergence"),
        ("SDZero", {"divergence": "reverse_kl"}, "method does not read it"),
        ("SDPO", {"divergence": "jsd", "divergence_parameter": 1.5}, "open interval"),
    ],
)
def test_a_divergence_that_means_nothing_is_refused(method, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(method, tmp_path, **settings)
