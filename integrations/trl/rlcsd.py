"""RLCSD: GRPO whose advantages are changed by a teacher's contrast of right and wrong hints.

Dimension key:  B sequences, T completion tokens, K wrong hints, L positions
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_sd import LMHead, LossOutput, rlcsd_loss
from fused_sd.checks import check_one_of, check_positive_int, fail
from fused_sd.integrations.shared import completion_scores as completion
from fused_sd.integrations.shared import templates
from fused_sd.integrations.shared.answers import boxed_answer
from fused_sd.integrations.shared.prompts import check_template
from fused_sd.integrations.shared.rollouts import Rollout, Sibling, shown_text
from fused_sd.integrations.shared.texts import as_text
from fused_sd.integrations.shared.thinking import check_thinking_tags
from fused_sd.integrations.trl.config import TeacherSettings, TokenCorrection, check_pair
from fused_sd.integrations.trl.contexts import PrivilegedPrompt
from fused_sd.integrations.trl.grpo import PolicyConfig, PolicyTrainer
from fused_sd.integrations.trl.trainer import Inputs, Options


@dataclass
class RLCSDConfig(TokenCorrection, TeacherSettings, PolicyConfig):
    """RLCSD's settings; defaults are the official configuration's (arXiv 2606.11709).

    Examples:
        >>> from fused_sd.integrations.trl import RLCSDConfig
        >>> args = RLCSDConfig("out", max_wrong_hints=4)
        >>> args.contrast_clip
        [-2.0, 2.0]
    """

    warmup_steps: float = field(default=50, metadata={"help": "Steps to the peak learning rate."})
    max_completion_length: int | None = field(
        default=16384, metadata={"help": "Tokens to sample at most."}
    )
    top_p: float = field(default=0.95, metadata={"help": "Mass of the tokens to sample from."})
    top_k: int = field(default=20, metadata={"help": "Number of tokens to sample from."})
    max_reprompt_len: int = field(
        default=24576, metadata={"help": "Longest teacher prompt in tokens."}
    )
    reprompt_template: str = field(
        default=templates.RLCSD,
        metadata={"help": "The teacher's last user turn, from {prompt} and {privileged}."},
    )
    hint_template: str = field(
        default=templates.RLCSD_HINT,
        metadata={"help": "{privileged} of right and wrong hints, from {solution} and {answer}."},
    )
    answer_column: str = field(
        default="answer",
        metadata={"help": "Column with the answer of right hints that box none themselves."},
    )
    correct_hint: str = field(
        default="sibling",
        metadata={"help": "`sibling`: a successful rollout; `reference`: `privileged_context`."},
    )
    remove_thinking_from_demonstration: bool = field(
        default=False,
        metadata={
            "help": "Leave thoughts out of the siblings that are hints; the official code does not."
        },
    )
    thinking_tags: list[str] | None = field(
        default=None,
        metadata={"help": "Opening and closing tag of thoughts; None: the pairs that are known."},
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
        default=0.0, metadata={"help": "Reward above which a rollout is a correct hint."}
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
        default=10, metadata={"help": "Rollout batches between copies (averages with `ema`)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template("reprompt_template", self.reprompt_template, "prompt", "privileged")
        check_template("hint_template", self.hint_template, "solution", "answer")
        check_one_of("correct_hint", self.correct_hint, ("sibling", "reference"))
        removes = self.remove_thinking_from_demonstration
        check_thinking_tags(self.thinking_tags, are_read=removes)
        check_positive_int("max_wrong_hints", self.max_wrong_hints)
        check_pair("contrast_clip", self.contrast_clip)
        check_one_of("loss_type", self.loss_type, ("bnpo",))
        if self.delta is not None:
            fail("delta", "be None", repr(self.delta), "RLCSD has no dual clip")


class RLCSDTrainer(PrivilegedPrompt, PolicyTrainer):
    """RLCSD (arXiv 2606.11709): the teacher scores each rollout with K wrong hints and a right one.

    As in the official code, hints are random siblings and never the rollout itself; each names its
    final answer, and a failed sibling without one is no hint.  A rollout without a right hint or
    without a wrong one has weight 0, such as the only success of its group, and so has one without
    a verdict.

    Examples:
        >>> from fused_sd.integrations.examples.arithmetic import last_number, questions, reward
        >>> from fused_sd.integrations.trl import RLCSDConfig, RLCSDTrainer
        >>> class SumsTrainer(RLCSDTrainer):
        ...     def final_answer(self, text):  # where answers are in no box
        ...         return last_number(text)
        >>> model = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> trainer = SumsTrainer(model, reward, RLCSDConfig("out"), questions(64))
        >>> trainer.train()  # doctest: +SKIP
    """

    config_cls = RLCSDConfig
    _name = "RLCSD"
    strips_prompt = True

    def reads_privileged(self, args: RLCSDConfig) -> bool:
        return args.correct_hint == "reference"

    def teacher_prompts(self, rollout: Rollout) -> list[int] | None:
        correct, wrong = self._hints(rollout)
        # Without a verdict there is no advantage, which the contrast changes.
        if math.isnan(rollout.reward) or not correct or not wrong:
            return None
        return self.hinted(rollout, correct)

    def context_flags(self, rollout: Rollout) -> dict[str, bool]:
        correct, wrong = self._hints(rollout)
        return {
            "correct_hint_fraction": correct is not None,
            "wrong_hint_fraction": bool(wrong),
            "answered_fraction": self.final_answer(rollout.text) is not None,
        }

    def final_answer(self, text: str) -> str | None:
        r"""Return the answer that a completion gives, or None: here the last ``\boxed{}``.

        Override this for a task whose answers stand elsewhere.
        """
        return boxed_answer(text)

    def more_inputs(self, rollouts: Sequence[Rollout], output: dict[str, Any]) -> dict[str, Tensor]:
        # Always K rows for each rollout: forwards of sharded models are collective, so that all
        # processes have to run as many.  ``wrong_mask`` takes out those without a hint.
        num_hints = self.args.max_wrong_hints
        hints = [self._hints(rollout)[1] for rollout in rollouts]
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
            token_weights=inputs["loss_mask"],
            correction=self.rollout_correction(inputs),
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

    def _hints(self, rollout: Rollout) -> tuple[str | None, list[str]]:
        """Return a right hint, if there is one, and up to K wrong ones, drawn at random.

        The draw depends on the seed, the step and the rollout alone, so that every call for a batch
        returns the same hints, and so does a resumed run, whose ``_step`` starts again from 0.  The
        text tells apart the batches of rollouts of one step.
        """
        place = (self.args.seed, self.state.global_step, rollout.index, rollout.text)
        draw = random.Random(" ".join(map(str, place)))
        others = [sibling for sibling in rollout.group if sibling.index != rollout.index]
        correct, wrong = self._correct_hints(rollout, others), self._wrong_hints(others)
        shown = draw.sample(wrong, min(len(wrong), self.args.max_wrong_hints))
        return (draw.choice(correct) if correct else None), shown

    def _correct_hints(self, rollout: Rollout, siblings: Sequence[Sibling]) -> list[str]:
        args, name = self.args, self.args.answer_column

        def known() -> str | None:
            return as_text(name, rollout.example.get(name), rollout.row) or None

        if args.correct_hint == "sibling":
            texts = self._shown(s for s in siblings if s.reward > args.success_reward_threshold)
            return self._written(texts, [self.final_answer(text) or known() for text in texts])
        hint = rollout.hint
        if hint is None:
            return []
        answer = known() or self.final_answer(hint)
        if answer is None:
            columns = ", ".join(sorted(rollout.example))
            remedy = r"add that column, or \boxed{} the answer in privileged_context"
            fail("answer_column", "name a column with the answer", f"columns {columns}", remedy)
        return self._written([hint], [answer])

    def _wrong_hints(self, siblings: Sequence[Sibling]) -> list[str]:
        texts = self._shown(s for s in siblings if s.reward <= self.args.success_reward_threshold)
        return self._written(texts, [self.final_answer(text) for text in texts])

    def _shown(self, siblings: Iterable[Sibling]) -> list[str]:
        """Return the texts of siblings; one whose thoughts were cut off is no hint."""
        thoughts, tags = not self.args.remove_thinking_from_demonstration, self.args.thinking_tags
        texts = [shown_text(sibling, thoughts=thoughts, tags=tags) for sibling in siblings]
        return [text for text in texts if thoughts or text.strip()]

    def _written(self, solutions: Sequence[str], answers: Sequence[Any]) -> list[str]:
        """Return a hint for each solution whose answer is known."""
        return [
            self.args.hint_template.format(solution=solution.strip(), answer=str(answer).strip())
            for solution, answer in zip(solutions, answers)
            if answer is not None
        ]
