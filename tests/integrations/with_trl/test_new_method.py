"""A new method's trainer is one file: this one holds a made-up method's, beside its tests.

The trainer below is what its author would write: a configuration and a few short methods on the
bases of ``integrations/trl``, with losses that the library exports.  The tests prove that its loss
and gradients on a sampled batch are the float64 definition's, and that it trains.

Dimension key:  B sequences, T completion tokens, D hidden size
"""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from closeness import assert_close
from method_pairs import loss_and_gradients, make, model, sample, states
from torch import Tensor

from fused_sd import LMHead, LossOutput, cross_entropy_loss, reference
from fused_sd.checks import check_positive
from fused_sd.integrations.shared.completion_scores import log_probs
from fused_sd.integrations.shared.output_head import Compute
from fused_sd.integrations.shared.prompts import check_template
from fused_sd.integrations.trl.config import (
    POLICY_SETTINGS,
    SelfDistillationConfig,
    TeacherSettings,
)
from fused_sd.integrations.trl.contexts import PrivilegedPrompt
from fused_sd.integrations.trl.trainer import Inputs, Options, SelfDistillationTrainer

FLOAT = torch.float64


@dataclass
class GatedConfig(TeacherSettings, SelfDistillationConfig):
    """Settings of gated imitation."""

    unread: ClassVar[tuple[str, ...]] = (*SelfDistillationConfig.unread, *POLICY_SETTINGS)

    reprompt_template: str = field(
        default="{prompt}\n\nThe reference solution is:\n{privileged}",
        metadata={"help": "The teacher's last user turn, from {prompt} and {privileged}."},
    )
    gate_scale: float = field(
        default=2.0, metadata={"help": "How sharply tokens are told apart that the teacher likes."}
    )
    num_generations: int = field(default=1, metadata={"help": "Completions of a prompt."})
    scale_rewards: str = field(default="none", metadata={"help": "Rewards are not read."})
    teacher_model_kind: str = field(
        default="base", metadata={"help": "`base`: the initial weights are the reference."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template("reprompt_template", self.reprompt_template, "prompt", "privileged")
        check_positive("gate_scale", self.gate_scale)


class GatedTrainer(PrivilegedPrompt, SelfDistillationTrainer):
    """Gated imitation: cross entropy on own tokens, more where the teacher likes them better."""

    config_cls = GatedConfig
    _name = "Gated imitation"
    needs_rewards = False
    needs_privileged = True
    metrics = ("student_log_prob", "student_entropy")

    def score_teacher(self, inputs: Inputs) -> Tensor:
        """Return the teacher's log-probabilities of the completions (B, T)."""
        return self.run_teacher(inputs, self.sampled(inputs)).log_probs

    def sampled(self, inputs: Inputs) -> Compute:
        """Return a ``compute`` for the log-probabilities of the completions."""
        return log_probs(inputs["completion_ids"], inputs["loss_mask"], self.temperature)

    def method_loss(
        self, hidden: Tensor, head: LMHead, teacher: Tensor, inputs: Inputs, options: Options
    ) -> LossOutput:
        with torch.no_grad():
            student = self.sampled(inputs)(hidden, head).log_probs
        gate = torch.sigmoid(self.args.gate_scale * (teacher - student))
        options = {**options, "token_weights": gate * options["token_weights"]}
        output = cross_entropy_loss(hidden, head, inputs["completion_ids"], **options)
        return output._replace(
            token_loss=gate * output.token_loss,  # for the logs: it comes without weights
            metrics={**output.metrics, "teacher_log_prob": teacher},
        )


def definition(trainer, inputs) -> Tensor:
    """The mean of the token losses, from logits."""
    batch = states(trainer.model, inputs, "student", trainer.teacher.module)
    own = batch.log_prob(batch.student_logits(trainer.temperature))
    teacher = batch.log_prob(batch.teacher_logits(trainer.temperature))
    gate = torch.sigmoid(trainer.args.gate_scale * (teacher - own.detach()))
    return reference.token_mean(-gate * own, batch.mask)


@pytest.mark.parametrize("kind", ["live", "base"])
def test_its_loss_and_gradient_are_the_definitions(kind, tmp_path):
    settings = {"temperature": 0.7, "gate_scale": 1.5, "teacher_model_kind": kind}
    trainer = make((GatedTrainer, GatedConfig), tmp_path, **settings)
    with torch.no_grad():
        for parameter in trainer.model.parameters():  # away from the reference
            parameter.add_(0.05 * torch.randn_like(parameter))
    inputs = sample(trainer)
    inputs["loss_mask"][1, 3:] = 0
    inputs["num_loss_tokens"] = inputs["loss_mask"].sum()
    loss, gradients = loss_and_gradients(trainer, inputs)
    trainer.model.zero_grad()
    exact = definition(trainer, inputs)
    exact.backward()
    assert exact != 0
    assert_close(loss, exact.detach(), FLOAT, "loss")
    for parameter, truth in trainer.model.named_parameters():
        assert_close(gradients[parameter], truth.grad, FLOAT, parameter)
    logged = trainer._metrics["train"]["self_distillation/loss"]
    assert logged == pytest.approx([float(loss)], rel=1e-5)


@pytest.mark.parametrize("kind", ["live", "base"])
def test_it_trains(kind, tmp_path):
    settings = {"student": model(torch.float32), "teacher_model_kind": kind}
    trainer = make((GatedTrainer, GatedConfig), tmp_path, **settings)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    assert "self_distillation/evidence_q50" in trainer.state.log_history[0]
