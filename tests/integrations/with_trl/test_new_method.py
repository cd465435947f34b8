"""A new method's trainer is one file: this one holds IW-OPD's, without a change to the library.

The trainer below is what its author would write: a configuration and a few short methods on the
bases of ``integrations/trl``, with a loss and advantages that the library exports.  The tests prove
that its loss and gradients on a sampled batch are the float64 definition's, and that it trains.

Dimension key:  B sequences, T completion tokens, D hidden size
"""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from closeness import assert_close
from method_pairs import loss_and_gradients, make, model, sample, states
from torch import Tensor

from fused_sd import LMHead, LossOutput, cross_entropy_loss, iw_opd_advantages, reference
from fused_sd.checks import check_non_negative, check_one_of
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
class IWOPDConfig(TeacherSettings, SelfDistillationConfig):
    """IW-OPD's settings; the weight's default is the paper's (arXiv 2606.22600)."""

    unread: ClassVar[tuple[str, ...]] = (
        *SelfDistillationConfig.unread,
        *POLICY_SETTINGS,
    )

    reprompt_template: str = field(
        default="{prompt}\n\nThe reference solution is:\n{privileged}",
        metadata={"help": "The teacher's last user turn, from {prompt} and {privileged}."},
    )
    iw_opd_gamma: float = field(
        default=0.5, metadata={"help": "How much more a sequence's first error weighs."}
    )
    num_generations: int = field(default=1, metadata={"help": "Completions of a prompt."})
    scale_rewards: str = field(default="none", metadata={"help": "Rewards are not read."})
    teacher_model_kind: str = field(
        default="base", metadata={"help": "`base`: the initial weights are the reference."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template("reprompt_template", self.reprompt_template, "prompt", "privileged")
        check_non_negative("iw_opd_gamma", self.iw_opd_gamma, "0.5 is the paper's")
        # a trust region mixes distributions, and this loss reads the sampled tokens alone
        kinds = ("live", "base", "ema", "synced")
        check_one_of("teacher_model_kind", self.teacher_model_kind, kinds)


class IWOPDTrainer(PrivilegedPrompt, SelfDistillationTrainer):
    """IW-OPD (arXiv 2606.22600), with a teacher that reads ``privileged_context``."""

    config_cls = IWOPDConfig
    _name = "IW-OPD"
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
        rollout = inputs.get("old_per_token_logps")
        if rollout is None:  # the current policy sampled: each batch is trained on once
            with torch.no_grad():
                rollout = self.sampled(inputs)(hidden, head).log_probs
        gamma = self.args.iw_opd_gamma
        advantages = iw_opd_advantages(teacher, rollout, inputs["loss_mask"], gamma=gamma)
        options = {**options, "token_weights": advantages * options["token_weights"]}
        output = cross_entropy_loss(hidden, head, inputs["completion_ids"], **options)
        return output._replace(
            token_loss=advantages * output.token_loss,  # for the logs: it comes without weights
            metrics={**output.metrics, "teacher_log_prob": teacher},
        )


def definition(trainer, inputs) -> Tensor:
    """The mean of the reference's token losses, from logits."""
    batch = states(trainer.model, inputs, "student", trainer.teacher.module)
    own = batch.log_prob(batch.student_logits(trainer.temperature))
    teacher = batch.log_prob(batch.teacher_logits(trainer.temperature))
    rollout = inputs.get("old_per_token_logps", own.detach())
    gamma = trainer.args.iw_opd_gamma
    tokens = reference.iw_opd(own, teacher, rollout, batch.mask, gamma=gamma)
    return reference.token_mean(tokens, batch.mask)


@pytest.mark.parametrize("kind", ["live", "base"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on policy", "off policy"])
def test_its_loss_and_gradient_are_the_definitions(kind, off_policy, tmp_path):
    settings = {"temperature": 0.7, "iw_opd_gamma": 0.8, "teacher_model_kind": kind}
    trainer = make((IWOPDTrainer, IWOPDConfig), tmp_path, **settings)
    with torch.no_grad():
        for parameter in trainer.model.parameters():  # away from the reference
            parameter.add_(0.05 * torch.randn_like(parameter))
    inputs = sample(trainer, off_policy=off_policy)
    inputs["loss_mask"][1, 3:] = 0  # the weights start and end within the mask
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
    trainer = make((IWOPDTrainer, IWOPDConfig), tmp_path, **settings)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    assert "self_distillation/evidence_q50" in trainer.state.log_history[0]
