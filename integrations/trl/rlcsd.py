"""RLCSD: GRPO whose advantages are changed by a teacher's contrast of right and wrong hints.

Dimension key:  B sequences, T completion tokens, K wrong hints, L positions
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_sd import LMHead, LossOutput, rlcsd_loss
from fused_sd.checks import check_one_of, check_positive_int
from fused_sd.integrations.shared import completion_scores as completion
from fused_sd.integrations.shared.prompts import check_template
from fused_sd.integrations.shared.rollouts import Rollout, without_thinking
from fused_sd.integrations.trl.config import TeacherSettings, check_pair
from fused_sd.integrations.trl.contexts import PrivilegedPrompt
from fused_sd.integrations.trl.grpo import PolicyConfig, PolicyTrainer
from fused_sd.integrations.trl.trainer import Inputs, Options


@dataclass
class RLCSDConfig(TeacherSettings, PolicyConfig):
    """RLCSD's settings; defaults are the official configuration's (arXiv 2606.11709)."""

    reprompt_template: str = field(
        default="Problem: {prompt}\n\nHere is a reference solution to this problem:\n=== Reference "
        "Solution Begin ===\n{privileged}\n=== Reference Solution End ===\n\nAfter reading the "
        "reference solution above, make sure you understand the reasoning behind each step.",
        metadata={"help": "The teacher's last user turn, from {prompt} and {privileged}."},
    )
    correct_hint: str = field(
        default="sibling",
        metadata={"help": "`sibling`: a successful rollout; `reference`: `privileged_context`."},
    )
    max_wrong_hints: int = field(
        default=4, metadata={"help": "K: failed siblings that the teacher sees, one at a time."}
    )
    contrast_temperature: float = field(default=0.02, metadata={"help": "tau_c of the tanh."})
    contrast_scale: float = field(default=1.0, metadata={"help": "beta of the residual."})
    contrast_mix: float = field(default=0.5, metadata={"help": "lambda of the residual."})
    contrast_threshold: float = field(
        default=0.02, metadata={"help": "delta: smaller residuals leave the advantage alone."}
    )
    contrast_clip: list[float] = field(
        default_factory=lambda: [-2.0, 2.0], metadata={"help": "Bounds of the residual."}
    )
    selected_weight: float = field(
        default=1.0, metadata={"help": "eta: weight of the selected tokens' mean."}
    )
    success_reward_threshold: float = field(
        default=0.5, metadata={"help": "Reward from which on a rollout is a correct hint."}
    )
    loss_type: str = field(
        default="bnpo", metadata={"help": "RLCSD has two token means of the micro-batch: bnpo."}
    )
    epsilon_high: float | None = field(default=0.2, metadata={"help": "Upper clip of the ratio."})
    delta: float | None = field(default=None, metadata={"help": "RLCSD has none."})
    teacher_model_kind: str = field(
        default="synced", metadata={"help": "A hard copy, renewed every `teacher_sync_steps`."}
    )
    teacher_sync_steps: int = field(
        default=10, metadata={"help": "Steps between copies (averages with `ema`)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template("reprompt_template", self.reprompt_template, "prompt", "privileged")
        check_one_of("correct_hint", self.correct_hint, ("sibling", "reference"))
        check_positive_int("max_wrong_hints", self.max_wrong_hints)
        check_pair("contrast_clip", self.contrast_clip)
        check_one_of("loss_type", self.loss_type, ("bnpo",))
        check_one_of("delta", self.delta, (None,))  # type: ignore[arg-type]


class RLCSDTrainer(PrivilegedPrompt, PolicyTrainer):
    """RLCSD (arXiv 2606.11709): the teacher scores each rollout with K wrong hints and a right one.

    A rollout without a right hint or without a wrong one has weight 0, as in the official code.
    """

    config_cls = RLCSDConfig
    _name = "RLCSD"

    def reads_privileged(self, args: RLCSDConfig) -> bool:
        return args.correct_hint == "reference"

    def teacher_prompts(self, rollout: Rollout) -> list[int] | None:
        hint = self._correct_hint(rollout)
        if hint is None or not self._wrong_hints(rollout):
            return None
        return self.hinted(rollout, hint)

    def more_inputs(self, rollouts: Sequence[Rollout], output: dict[str, Any]) -> dict[str, Tensor]:
        # Always K rows for each rollout: forwards of sharded models are collective, so that all
        # processes have to run as many.  ``wrong_mask`` takes out those without a hint.
        num_hints = self.args.max_wrong_hints
        hints = [self._wrong_hints(rollout) for rollout in rollouts]
        shown = [
            self.hinted(rollout, row[k]) if k < len(row) else None
            for rollout, row in zip(rollouts, hints)
            for k in range(num_hints)
        ]
        contexts = self.teacher_contexts
        shown = contexts.fitted(shown, rollouts)
        named = contexts.named("wrong_", contexts.inputs(shown, rollouts, output), output)
        is_hint = [prompt is not None for prompt in shown]
        mask = torch.tensor(is_hint, device=output["loss_mask"].device)
        return {
            **{name: rows.view(len(rollouts), num_hints, -1) for name, rows in named.items()},
            "wrong_mask": mask.view(len(rollouts), num_hints),
        }

    def score_teacher(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return log-probabilities with the right hint (B, T) and with the wrong ones (B, T, K)."""
        compute = completion.log_probs(
            inputs["completion_ids"], inputs["loss_mask"], self.temperature
        )
        correct = self.run_teacher(inputs, compute).log_probs
        hinted = [name for name in inputs if name.startswith("wrong_") and name != "wrong_mask"]
        wrong = []
        for k in range(self.args.max_wrong_hints):
            one = inputs | {name: inputs[name][:, k] for name in hinted}
            wrong.append(self.run_teacher(one, compute, prefix="wrong_").log_probs)
        return correct, torch.stack(wrong, -1)

    def method_loss(
        self,
        hidden: Tensor,
        head: LMHead,
        teacher: tuple[Tensor, Tensor],
        inputs: Inputs,
        options: Options,
    ) -> LossOutput:
        args = self.args
        ids = inputs["completion_ids"]
        settings = self.surrogate_settings(inputs)
        # The loss has two averages of its own, so that it takes the mask instead of weights.
        return rlcsd_loss(
            hidden,
            head,
            ids,
            self.token_advantages(inputs),
            *teacher,
            wrong_mask=inputs["wrong_mask"][:, None].expand(*ids.shape, -1),
            token_weights=inputs["loss_mask"] * self.rollout_correction(inputs),
            old_log_probs=settings["old_log_probs"],
            ratio_clip=settings["ratio_clip"],
            selected_weight=args.selected_weight,
            contrast={
                "temperature": args.contrast_temperature,
                "scale": args.contrast_scale,
                "mix": args.contrast_mix,
                "threshold": args.contrast_threshold,
                "clip": tuple(args.contrast_clip),
            },
            temperature=options["temperature"],
            metrics=options["metrics"],
            gradient=options["gradient"],
            tolerance=options["tolerance"],
        )

    def _correct_hint(self, rollout: Rollout) -> str | None:
        if self.args.correct_hint == "reference":
            return rollout.privileged or None
        # The rollout's own text serves only where no other one is right.
        threshold = self.args.success_reward_threshold
        found = rollout.siblings(threshold=threshold, successful=True, itself=False)
        found = found or rollout.siblings(threshold=threshold, successful=True, itself=True)
        return without_thinking(found[0].text).strip() if found else None

    def _wrong_hints(self, rollout: Rollout) -> list[str]:
        threshold = self.args.success_reward_threshold
        found = rollout.siblings(threshold=threshold, successful=False, itself=False)
        shown = found[: self.args.max_wrong_hints]
        return [without_thinking(sibling.text).strip() for sibling in shown]
