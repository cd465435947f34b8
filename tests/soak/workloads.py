"""Calls of every loss, on ever other shapes and settings."""

import random
from contextlib import suppress

import torch
from footprint import Course, footprint, only_new_objects

import fused_sd
from fused_sd import LMHead

VOCABS, WIDTHS, MOST_TOKENS = (33, 67, 101), (8, 12, 16), 24


class Draw:
    """Inputs of a call; many are drawn anew, and heads are made anew for half of the calls."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.heads = {
            (vocab, width): self.head(vocab, width) for vocab in VOCABS for width in WIDTHS
        }

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def head(self, vocab, width):
        return LMHead(self.normal(vocab, width).requires_grad_())

    def forget(self):
        """Drop what belongs to the latest call, so that every footprint has the same heads."""
        del self.student, self.teacher, self.ids, self.old, self.options
        for head in self.heads.values():
            head.weight.grad = None

    def new(self):
        rng = self.rng
        vocab, width = rng.choice(VOCABS), rng.choice(WIDTHS)
        self.count = rng.randrange(1, MOST_TOKENS)
        head = self.head(vocab, width) if rng.random() < 0.5 else self.heads[vocab, width]
        teacher = LMHead(self.normal(vocab, width)) if rng.random() < 0.5 else head
        hidden = self.normal(self.count, width).requires_grad_()
        self.student, self.teacher = (hidden, head), (self.normal(self.count, width), teacher)
        self.ids = torch.randint(vocab, (self.count,), generator=self.generator)
        self.old = -self.normal(self.count).abs() - 3
        self.top = rng.choice((1, 5, 16))
        self.options = {
            "temperature": rng.choice((1.0, rng.uniform(0.5, 2.0))),
            "reduction": rng.choice(("mean", "sum")),
            "chunk_size": rng.choice((None, 4)),
            "token_weights": (self.ids % 3 > 0).float() + 1e-3,
        }


def calls():
    """Every loss, by a function of drawn inputs."""

    def divergence(drawn):
        rng = drawn.rng
        return fused_sd.divergence_loss(
            *drawn.student,
            *drawn.teacher,
            divergence=rng.choice(
                (
                    "forward_kl",
                    "reverse_kl",
                    fused_sd.Jsd(rng.random()),
                    fused_sd.SkewKl(rng.uniform(0.05, 0.95)),
                )
            ),
            support=rng.choice(
                (
                    fused_sd.FULL_VOCABULARY,
                    fused_sd.StudentTopK(drawn.top),
                    fused_sd.TeacherTopK(drawn.top),
                )
            ),
            metrics=("student_entropy",),
            **drawn.options,
        )

    def sparse(drawn):
        return fused_sd.sdft_loss(
            *drawn.student, *drawn.teacher, gradient="sparse", **drawn.options
        )

    def policy(drawn):
        return fused_sd.grpo_loss(
            *drawn.student, drawn.ids, drawn.old, old_log_probs=drawn.old, **drawn.options
        )

    def rlcsd(drawn):
        scores = -drawn.normal(drawn.count).abs() - 3
        del drawn.options["reduction"]
        return fused_sd.rlcsd_loss(
            *drawn.student, drawn.ids, drawn.old, scores, scores[:, None] - 1, **drawn.options
        )

    def of_pair(function, **settings):
        return lambda drawn: function(*drawn.student, *drawn.teacher, **settings, **drawn.options)

    def of_tokens(function, **settings):
        return lambda drawn: function(*drawn.student, drawn.ids, **settings, **drawn.options)

    return {
        "sdpo": lambda drawn: fused_sd.sdpo_loss(
            *drawn.student,
            *drawn.teacher,
            top_k=drawn.top,
            token_ids=drawn.ids,
            old_log_probs=drawn.old,
            **drawn.options,
        ),
        "sd_zero": lambda drawn: fused_sd.sd_zero_loss(
            *drawn.student, *drawn.teacher, top_k=drawn.top, **drawn.options
        ),
        "opsd": of_pair(fused_sd.opsd_loss),
        "sdft": of_pair(fused_sd.sdft_loss),
        "gkd": of_pair(fused_sd.gkd_loss, beta=0.3),
        "divergence": divergence,
        "sparse": sparse,
        "rlsd": lambda drawn: fused_sd.rlsd_loss(
            *drawn.student,
            drawn.ids,
            drawn.old,
            teacher_hidden=drawn.teacher[0],
            teacher_head=drawn.teacher[1],
            old_log_probs=drawn.old,
            **drawn.options,
        ),
        "grpo": policy,
        "rlcsd": rlcsd,
        "sampled_kl": lambda drawn: fused_sd.sampled_kl_loss(
            *drawn.student,
            drawn.ids,
            teacher_hidden=drawn.teacher[0],
            teacher_head=drawn.teacher[1],
            **drawn.options,
        ),
        "cross_entropy": of_tokens(fused_sd.cross_entropy_loss),
    }


def call_losses(count, warm_up, every, seed=0):
    """Call losses with backward, in a drawn order; every thirtieth call is one that is refused."""
    drawn, functions = Draw(seed), list(calls().values())
    with only_new_objects():
        return Course("losses", *_called(drawn, functions, count, warm_up, every))


def _called(drawn, functions, count, warm_up, every):
    at, prints = [], []
    for number in range(1, count + 1):
        drawn.new()
        call = drawn.rng.choice(functions)
        if number % 30:
            call(drawn).loss.backward()
        else:
            drawn.options["temperature"] = -1.0
            with suppress(ValueError):
                call(drawn)
                raise AssertionError("a temperature below 0 was taken")
        if number >= warm_up and (number - warm_up) % every == 0:
            drawn.forget()
            at.append(number)
            prints.append(footprint())
    return at, prints
