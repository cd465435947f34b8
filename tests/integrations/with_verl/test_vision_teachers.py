"""Images and videos in verl's FSDP2 engine on two processes, against plain models in float64."""

import functools
import pathlib
import tempfile

import pytest
import torch
import vision_worker
from engine_batches import TEMPERATURE
from ranks import free_port, spawn
from tiny_vlm import tiny_vlm
from vision_samples import FAMILIES
from vision_worker import LESSONS

from fused_sd import Evidence, rlsd_loss


@functools.cache
def model_of(family):
    return tiny_vlm(family)[0]


@functools.cache
def remains():
    """What each process has at the end of each lesson."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for family in FAMILIES:
            tiny_vlm(family, torch.float32)[0].save_pretrained(folder / family)
        spawn(vision_worker.main, free_port(), name)
        return {
            lesson: [
                torch.load(folder / f"{lesson}-{rank}.pt", weights_only=False) for rank in range(2)
            ]
            for lesson in LESSONS
        }


def left_of(lesson):
    """The first process's remains; both have the same loss."""
    both = remains()[lesson]
    for one in both:
        assert "error" not in one, one["error"]
    assert both[0]["loss"] == both[1]["loss"]
    return both[0]


def states(family, sample, prefix=""):
    """(R, D) at the rows that predict the response, of transformers' own forward."""
    positions = sample[f"{prefix}position_ids"]
    pixels = {name: one for name, one in sample["multi_modal_inputs"].items() if "seq" not in name}
    hidden = model_of(family).model(
        input_ids=sample[f"{prefix}input_ids"][None],
        position_ids=(positions.t() if prefix else positions)[:, None],
        **{name: one.double() if "pixel" in name else one for name, one in pixels.items()},
    )[0]
    return hidden[0, -len(sample["responses"]) - 1 : -1]


def rlsd(family, sample):
    head = model_of(family).lm_head.weight
    own = states(family, sample)
    with torch.no_grad():
        shown = states(family, sample, "teacher_") @ head.t() / TEMPERATURE
    ids = sample["responses"]
    mix = 0.5 * sample["self_distillation_mask"].double()
    return rlsd_loss(
        own,
        head,
        ids,
        sample["advantages"].double(),
        teacher_log_probs=shown.log_softmax(-1).gather(-1, ids[:, None])[:, 0],
        old_log_probs=sample["old_log_probs"].double(),
        evidence=Evidence((0.2, 0.2), mix.expand(len(ids))),
        ratio_clip=(0.2, 0.2),
        temperature=TEMPERATURE,
        reduction="none",
    ).loss


def sdpo(family, sample):
    head = model_of(family).lm_head.weight
    own = states(family, sample)
    with torch.no_grad():
        shown = (states(family, sample, "teacher_") @ head.t() / TEMPERATURE).log_softmax(-1)
    log_probs = (own @ head.t() / TEMPERATURE).log_softmax(-1)
    kept = log_probs.topk(8).indices
    inside = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, kept, True)
    student, teacher = (
        torch.cat(
            [side.gather(-1, kept), side.masked_fill(inside, -torch.inf).logsumexp(-1, True)], -1
        )
        for side in (log_probs, shown)
    )
    return (student.exp() * (student - teacher)).sum(-1)


@pytest.mark.parametrize("lesson", LESSONS)
def test_loss_and_gradient_are_those_of_the_plain_model(lesson):
    left, family = left_of(lesson), LESSONS[lesson].family
    loss = rlsd if lesson.startswith("rlsd") else sdpo
    model = model_of(family)
    model.zero_grad()
    batch = left["samples"]
    total = sum((loss(family, sample) * sample["loss_mask"]).sum() for sample in batch)
    mean = total / sum(sample["loss_mask"].sum() for sample in batch)
    mean.backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert left["loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert left["grad_norm"] == pytest.approx(torch.stack(norms).norm().item(), rel=1e-4)
    assert model.model.visual.patch_embed.proj.weight.grad.norm() > 0
