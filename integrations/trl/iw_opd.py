"""IW-OPD: on-policy distillation by the sampled token, weighted towards the first errors.

Dimension key:  B sequences, T completion tokens, D hidden size
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fused_sd import LMHead, LossOutput, cross_entropy_loss, iw_opd_advantages
from fused_sd.checks import check_non_negative
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


@dataclass
class IWOPDConfig(TeacherSettings, SelfDistillationConfig):
    """IW-OPD's settings; defaults are those of TRL's IWOPDConfig (arXiv 2606.22600).

    TRL's teacher is another model, which reads the student's prompt.  Here it is the model itself,
    which also reads ``privileged_context``.

    Examples:
        >>> from fused_sd.integrations.trl import IWOPDConfig
        >>> IWOPDConfig("out", iw_opd_gamma=0.5).teacher_model_kind
        'base'
    """

    unread: ClassVar[tuple[str, ...]] = (
        *SelfDistillationConfig.unread,
        *POLICY_SETTINGS,
    )

    reprompt_template: str = field(
        default="{prompt}\n\nThe reference solution is:\n{privileged}",
        metadata={"help": "The teacher's last user turn, from {prompt} and {privileged}."},
    )
    iw_opd_gamma: float = field(
        default=0.5, metadata={"help": "How much more a sequence's first error weighs; 0: nothing."}
    )
    teacher_model_kind: str = field(
        default="base", metadata={"help": "`base`: the initial weights are the reference."}
    )
    num_generations: int = field(default=1, metadata={"help": "Completions of a prompt."})
    scale_rewards: str = field(
        default="none", metadata={"help": "Not read: the teacher makes the advantages."}
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "Of the optimizer."})
    max_completion_length: int = field(
        default=512, metadata={"help": "Longest completion, in tokens."}
    )
    top_p: float = field(default=0.95, metadata={"help": "Mass that is sampled from."})
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template("reprompt_template", self.reprompt_template, "prompt", "privileged")
        check_non_negative("iw_opd_gamma", self.iw_opd_gamma, "0.5 is the paper's")


class IWOPDTrainer(PrivilegedPrompt, SelfDistillationTrainer):
    """IW-OPD (arXiv 2606.22600), with a teacher that reads ``privileged_context``.

    A token's advantage is the teacher's log-probability less that of the policy which sampled it:
    vLLM's where it samples, else the old policy's or, where a batch is trained on once, the current
    one's.  Rewards are not needed; where functions are given, their values are logged.

    Examples:
        >>> from fused_sd.integrations.examples.arithmetic import questions
        >>> from fused_sd.integrations.trl import IWOPDConfig, IWOPDTrainer
        >>> model = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> args = IWOPDConfig("out", max_completion_length=256)
        >>> trainer = IWOPDTrainer(model, args=args, train_dataset=questions(64))
        >>> trainer.train()  # doctest: +SKIP
    """

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
        rollout = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
        if rollout is None:
            with torch.no_grad():
                rollout = self.sampled(inputs)(hidden, head).log_probs
        # A token that vLLM could not score has no advantage.
        rollout = torch.where(rollout.isnan(), teacher, rollout)
        gamma = self.args.iw_opd_gamma
        advantages = iw_opd_advantages(teacher, rollout, inputs["loss_mask"], gamma=gamma)
        options = {**options, "token_weights": advantages * options["token_weights"]}
        output = cross_entropy_loss(hidden, head, inputs["completion_ids"], **options)
        return output._replace(
            token_loss=advantages * output.token_loss,  # for the logs: it comes without weights
            metrics={**output.metrics, "teacher_log_prob": teacher, "advantage": advantages},
        )
