"""RLSD: GRPO whose advantages a teacher that knows the answer weights, token by token.

Dimension key:  B sequences, T completion tokens, D hidden size
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_sd import Evidence, EvidenceSchedule, LMHead, LossOutput, rlsd_loss
from fused_sd.checks import check_one_of, check_unit_interval, fail
from fused_sd.integrations.shared import completion_scores as completion
from fused_sd.integrations.shared import templates
from fused_sd.integrations.shared.answers import tokens_between
from fused_sd.integrations.shared.prompts import check_template, with_user_text
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.trl.config import TeacherSettings, check_pair
from fused_sd.integrations.trl.contexts import PrivilegedPrompt
from fused_sd.integrations.trl.grpo import PolicyConfig, PolicyTrainer
from fused_sd.integrations.trl.trainer import Inputs, Options

THOUGHT = ("<thought>", "</thought>")


@dataclass
class RLSDConfig(TeacherSettings, PolicyConfig):
    """RLSD's settings; defaults are the official script's (arXiv 2604.03128).

    ``privileged_context`` is the reference; the official script gives only the final answer.

    Examples:
        >>> from fused_sd.integrations.trl import RLSDConfig
        >>> RLSDConfig("out", evidence_mix=0.5).teacher_model_kind
        'synced'
        >>> RLSDConfig("out", beta=0.1)  # the method has no such term: refused, not ignored
        Traceback (most recent call last):
        ValueError: beta must be left as it is in RLSDConfig, ...
    """

    max_completion_length: int | None = field(
        default=4096, metadata={"help": "Tokens to sample at most."}
    )
    max_reprompt_len: int = field(
        default=16384, metadata={"help": "Longest teacher prompt in tokens."}
    )
    question_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the question that the teacher reads, `problem` in the official "
            "data; None: the student's last user turn, whose instructions it then repeats."
        },
    )
    reprompt_template: str = field(
        default=templates.RLSD,
        metadata={"help": "The teacher's last user turn, from {prompt} and {privileged}."},
    )
    teacher_model_kind: str = field(
        default="synced", metadata={"help": "A hard copy, renewed every `teacher_sync_steps`."}
    )
    teacher_sync_steps: int = field(
        default=20,
        metadata={"help": "Rollout batches between copies (averages with `ema`); paper 10."},
    )
    evidence_clip: list[float] = field(
        default_factory=lambda: [0.2, 0.2],
        metadata={"help": "How far a token's weight may be below and above 1."},
    )
    evidence_mix: float = field(
        default=0.5, metadata={"help": "Lambda: share of the weighted advantage at its peak."}
    )
    evidence_warmup_steps: int = field(
        default=0, metadata={"help": "Rollout batches from 0 to the peak."}
    )
    evidence_hold_steps: int = field(default=0, metadata={"help": "Rollout batches at the peak."})
    evidence_decay_steps: int = field(
        default=60,
        metadata={"help": "Rollout batches from the peak to 0; 0 keeps the peak."},
    )
    evidence_log_prob: str = field(
        default="current",
        metadata={"help": "The student's log-probabilities: of the `current` or the `old` policy."},
    )
    negative_only: bool = field(
        default=False, metadata={"help": "Weigh the tokens of failed completions alone."}
    )
    thought_only: bool = field(
        default=False,
        metadata={
            "help": "Weigh the tokens between <thought> and </thought> alone; the others train as "
            "in GRPO."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template("reprompt_template", self.reprompt_template, "prompt", "privileged")
        check_unit_interval("evidence_mix", self.evidence_mix)
        check_pair("evidence_clip", self.evidence_clip)
        check_one_of("evidence_log_prob", self.evidence_log_prob, ("current", "old"))
        if self.thought_only and THOUGHT[0] not in self.reprompt_template:
            fail(
                "thought_only",
                f"be False where reprompt_template asks for no {THOUGHT[0]}",
                True,
                "tell the teacher to think between the tags, as the default template does",
            )


class RLSDTrainer(PrivilegedPrompt, PolicyTrainer):
    """RLSD (arXiv 2604.03128): evidence inside GRPO's clipped surrogate.

    The dataset's ``privileged_context`` is the reference answer or solution; a row without one
    trains as in GRPO.

    Examples:
        >>> from fused_sd.integrations.examples.arithmetic import questions, reward
        >>> from fused_sd.integrations.trl import RLSDConfig, RLSDTrainer
        >>> model = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> dataset = questions(64).select_columns(["prompt", "privileged_context", "answer"])
        >>> trainer = RLSDTrainer(model, reward, RLSDConfig("out"), dataset)
        >>> trainer.train()  # doctest: +SKIP
    """

    config_cls = RLSDConfig
    _name = "RLSD"
    needs_privileged = True
    needs_signal = False
    strips_prompt = True
    metrics = (*PolicyTrainer.metrics, "evidence", "evidence_weight", "evidence_clip_fraction")

    def question(self, rollout: Rollout) -> Any:
        column = self.args.question_column
        if column is None:
            return rollout.prompt
        question = rollout.example.get(column)
        if not isinstance(question, str):
            columns = ", ".join(sorted(rollout.example))
            got = f"{question!r} in a row with {columns}"
            fail("question_column", "name a column of texts", got, "name another, or None")
        return with_user_text(rollout.prompt, question)

    def context_flags(self, rollout: Rollout) -> dict[str, bool]:
        return {"thought_fraction": THOUGHT[0] in rollout.text} if self.args.thought_only else {}

    def more_inputs(self, rollouts: Sequence[Rollout], output: dict[str, Any]) -> dict[str, Tensor]:
        """Return which tokens are thoughts (B, T), if only they are weighed."""
        if not self.args.thought_only:
            return {}
        thoughts = torch.zeros_like(output["completion_ids"], dtype=torch.bool)
        for row, rollout in zip(thoughts, rollouts):
            pieces = [self._tokenizer.decode([token]) for token in rollout.completion_ids]
            inside = torch.tensor(tokens_between(pieces, *THOUGHT), dtype=torch.bool)
            row[: len(pieces)] = inside.to(row.device)
        return {"thought_mask": thoughts}

    def score_teacher(self, inputs: Inputs) -> Tensor:
        """Return the teacher's log-probabilities of the completions (B, T)."""
        ids, mask = inputs["completion_ids"], inputs["loss_mask"]
        compute = completion.log_probs(ids, mask, self.temperature)
        return self.run_teacher(inputs, compute).log_probs

    def scalar_metrics(self) -> dict[str, float]:
        return {"evidence_mix": self.schedule().value}

    def schedule(self) -> EvidenceSchedule:
        """Return lambda's schedule at the current batch of rollouts."""
        args = self.args
        schedule = EvidenceSchedule(
            args.evidence_mix,
            args.evidence_warmup_steps,
            args.evidence_hold_steps,
            args.evidence_decay_steps,
        )
        schedule.num_steps = self.num_rollout_batches
        return schedule

    def evidence(self, inputs: Inputs) -> Evidence:
        """Return the evidence's clip, and each token's mix at the current step.

        The mix is 0 where a row has no reference, with ``negative_only`` where the advantage is not
        negative, and with ``thought_only`` outside of thoughts: those tokens train as in GRPO.
        """
        args = self.args
        weighed = inputs["self_distillation_mask"].double()
        if args.negative_only:
            weighed = weighed * (inputs["advantages"] < 0)
        low, high = args.evidence_clip
        mix = (self.schedule().value * weighed)[:, None].expand(inputs["completion_ids"].shape)
        if args.thought_only:
            mix = mix * inputs["thought_mask"]
        return Evidence((low, high), mix, args.evidence_log_prob)

    def method_loss(
        self, hidden: Tensor, head: LMHead, teacher: Tensor, inputs: Inputs, options: Options
    ) -> LossOutput:
        return rlsd_loss(
            hidden,
            head,
            inputs["completion_ids"],
            self.token_advantages(inputs),
            teacher_log_probs=teacher,
            evidence=self.evidence(inputs),
            **self.surrogate_settings(inputs),
            **options,
        )
