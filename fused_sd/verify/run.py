"""Measuring the losses: errors against float64, and checks of the promises.

Every loss is compared with its definition in float64 on the same operands.  Beside it stands the
definition applied to logits that were rounded to 16 bits, as trainers round them.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fused_sd import reference
from fused_sd.engine.certificate import GradientCertificate
from fused_sd.engine.options import LossOptions
from fused_sd.losses.log_probs import entry_log_probs
from fused_sd.losses.output import LossOutput
from fused_sd.verify import truth
from fused_sd.verify.cases import CASES, Case, Logits, mean_divisor, token_weights
from fused_sd.verify.certified import broken_certificate, sparse
from fused_sd.verify.choices import Choices
from fused_sd.verify.inputs import SAMPLE, Operands, make_operands, with_teacher_at
from fused_sd.verify.promises import (
    Errors,
    Measured,
    Result,
    Sparsity,
    broken_accuracy,
    broken_invariants,
    identical,
)
from fused_sd.verify.truth import Distance, Exact

FP16_SCALE = 1024.0  # the loss's factor before backward, as GradScaler's: fp16 underflows


def verify(verifier: "Verifier") -> Iterator[tuple[Measured | None, list[str]]]:
    """Measure the chosen losses at each KL; yield each measurement and the promises it breaks."""
    cases = [CASES[name] for name in verifier.choices.losses]

    def measured(case: Case) -> tuple[Measured, list[str]]:
        found = verifier.measure(case)
        return found, broken_accuracy(found, verifier.dtype, verifier.on_gpu)

    for kl in verifier.choices.kls:
        verifier.at_kl(kl)
        for case in cases:
            if case.against != "nothing":
                yield measured(case)
    for case in cases:
        if case.against == "nothing":
            yield measured(case)
        yield None, broken_invariants(verifier.run, case, verifier.operands)
        if not case.has_sparse:
            continue
        yield verifier.measure_sparse(sparse(case))
        yield None, broken_invariants(verifier.run, sparse(case), verifier.operands)


class Verifier:
    """Operands of one shape and dtype, and their exact logits, on which losses are measured.

    ``at_kl`` must be called before a loss is measured.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices, self.dtype = choices, choices.dtype
        self.on_gpu = choices.device.type == "cuda"
        self.scale = FP16_SCALE if self.dtype == torch.float16 else 1.0
        self.rounding = torch.float16 if self.dtype == torch.float16 else torch.bfloat16
        # many tokens are computed without leaving the masked ones out, to check that way too
        self.compact = choices.num_tokens <= SAMPLE
        sizes = choices.num_tokens, choices.hidden_size, choices.vocab
        self.student, self.direction = make_operands(
            *sizes, self.dtype, choices.device, choices.seed
        )
        self.active = self.student.active()
        self.student_logits = truth.logits(self.active.hidden, self.student.weight)
        log_s = self.student_logits.log_softmax(-1)
        self.kl = 0.0
        self.entropy = float(-(log_s.exp() * log_s).sum(-1).mean())
        self.top_logit = float(self.student_logits.amax(-1).mean())

    def at_kl(self, kl: float) -> None:
        """Move the teacher to a mean KL(t||s) from the student; ``self.kl`` is the one reached."""
        self.operands = with_teacher_at(self.student, self.direction, kl)
        self.active = self.operands.active()
        self.teacher_logits = truth.logits(self.active.teacher, self.student.weight)
        log_s, log_t = self.student_logits.log_softmax(-1), self.teacher_logits.log_softmax(-1)
        self.kl = float((log_t.exp() * (log_t - log_s)).sum(-1).mean())

    def measure(self, case: Case) -> Measured:
        """Measure the errors of the library and of rounded logits against float64."""
        return self._measured(case, self.run(case, self.operands), *self._truths(case))

    def measure_sparse(self, case: Case) -> tuple[Measured, list[str]]:
        """Measure the errors of a sparse gradient, and return the promises it breaks."""
        output, leaves = self.forward(case, self.operands)
        fused, again = (self.backward(output, leaves) for _ in range(2))
        exact, rounded = self._truths(case)
        alive = self.operands.token_weights != 0
        given = output.certificate
        assert given is not None
        divisor = mean_divisor(case, self.active)
        certificate = GradientCertificate(
            given.kept[alive],
            given.dense[alive],
            given.dropped[alive] / divisor,
            given.norm[alive] / divisor,
        )
        kept = Sparsity.of(certificate, certificate.norm != 0)
        measured = replace(self._measured(case, fused, exact, rounded), kept=kept)
        broken = broken_certificate(measured, certificate, exact, self.active, self.on_gpu)
        if not identical(fused, again):
            rule = "a second backward must be equal to the first to the bit, got another"
            broken.append(f"{case.name}: {rule}")
        return measured, broken

    def run(self, case: Case, operands: Operands) -> Result:
        """Return the library's loss and gradients."""
        return self.backward(*self.forward(case, operands))

    def forward(self, case: Case, operands: Operands) -> tuple[LossOutput, tuple[Tensor, Tensor]]:
        """Return the library's loss, and the leaves (hidden, weight) that it depends on."""
        hidden = operands.hidden.detach().clone().requires_grad_(True)
        weight = operands.weight.detach().clone().requires_grad_(True)
        run: LossOptions = {
            "token_weights": operands.token_weights,
            "reduction": "mean",
            "compact": self.compact,
            "backend": self.choices.backend,
        }
        output = case.fused(replace(operands, hidden=hidden, weight=weight), run)
        return output, (hidden, weight)

    def backward(self, output: LossOutput, leaves: tuple[Tensor, Tensor]) -> Result:
        """Return the loss and its gradients; may be called repeatedly."""
        gradients = torch.autograd.grad(self.scale * output.loss, leaves, retain_graph=True)
        return Result(output.loss.detach(), *gradients)

    def fused_ids(self, case: Case) -> Tensor | None:
        """Return the top-k entries (A, K) that the library's own logits choose.

        The exact definition uses them, because near-ties may be ordered differently in float64.
        """
        if case.chooser is None:
            return None
        hidden = self.active.hidden if case.chooser == "student" else self.active.teacher
        k = case.entries(self.active.vocab)
        return entry_log_probs(
            hidden, self.active.weight, k, backend=self.choices.backend
        ).token_ids

    def exact(self, case: Case, student: Tensor, teacher: Tensor, ids: Tensor | None) -> Exact:
        """Apply the definition to given logits; its support is ``ids``, or None: their top-k."""
        vocab = self.active.vocab
        weights = token_weights(case, self.active)
        if case.chooser is not None and ids is None:
            chooser = student if case.chooser == "student" else teacher
            ids = chooser.topk(case.entries(vocab)).indices

        def token_loss(leaf: Tensor, teacher: Tensor, rows: slice) -> Tensor:
            support = None if ids is None else reference.given_ids(ids[rows], vocab)
            sides = Logits(leaf, teacher, support)
            return case.definition(sides, self.active.tokens(rows))

        return truth.exact(token_loss, student, teacher, weights)

    def _truths(self, case: Case) -> tuple[Exact, Exact]:
        """Apply the definition to exact logits and to rounded ones."""
        exact = self.exact(case, self.student_logits, self.teacher_logits, self.fused_ids(case))
        sides = (self.active.hidden, self.active.teacher)
        student, teacher = (
            truth.rounded_logits(side, self.active.weight, self.rounding) for side in sides
        )
        return exact, self.exact(case, student, teacher, None)

    def _measured(self, case: Case, fused: Result, exact: Exact, rounded: Exact) -> Measured:
        kl = None if case.against == "nothing" else self.kl
        ours, theirs = self._errors(fused, exact, rounded)
        return Measured(case.name, kl, ours, theirs)

    def _errors(self, fused: Result, exact: Exact, rounded: Exact) -> tuple[Errors, Errors]:
        """Errors of the library and of rounded logits, with gradients in the operands' dtype."""
        states, weight = self.active.hidden, self.active.weight
        weight_errors = (Distance(), Distance())
        both = zip(
            truth.weight_gradient(exact.dlogits, states),
            truth.weight_gradient(rounded.dlogits, states),
        )
        for (rows, true), (_, near) in both:
            weight_errors[0].add(fused.dweight[rows].double() / self.scale, true)
            weight_errors[1].add(self._stored(near), true)
        hidden_errors = (Distance(), Distance())
        alive = self.operands.token_weights != 0
        dhidden = truth.hidden_gradient(exact.dlogits, weight)
        by_rounded = truth.hidden_gradient(rounded.dlogits, weight)
        hidden_errors[0].add(fused.dhidden[alive].double() / self.scale, dhidden)
        hidden_errors[1].add(self._stored(by_rounded), dhidden)
        errors = []
        for loss, by_hidden, by_weight in zip(
            (float(fused.loss), rounded.loss), hidden_errors, weight_errors, strict=True
        ):
            off = abs(loss - exact.loss) / max(exact.size, 1e-30)
            worst = max(by_hidden.by_element(), by_weight.by_element())
            errors.append(Errors(off, by_hidden.by_norm(), by_weight.by_norm(), worst))
        return errors[0], errors[1]

    def _stored(self, gradient: Tensor) -> Tensor:
        """Round a float64 gradient to the operands' dtype, as a leaf's gradient is."""
        return (self.scale * gradient).to(self.dtype).double() / self.scale
