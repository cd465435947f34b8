"""SDPGTrainer: its schedule, its reference, and what it refuses."""

import pytest
import torch
from method_pairs import DATA, loss_and_gradients, make, sample


def scheduled(weight, step, total, warmup, decay):
    """The official code's weight at a step, the first of which is 1."""
    if step < warmup:
        weight = weight * step / warmup
    if decay and step >= total - decay:
        weight = weight * max(total - step, 0) / decay
    return weight


@pytest.mark.parametrize("warmup, decay", [(0, 0), (3, 0), (0, 4), (4, 5)])
def test_the_weight_follows_the_official_schedule(warmup, decay, tmp_path):
    trainer = make(
        "SDPG",
        tmp_path,
        distillation_weight=0.5,
        distillation_warmup_steps=warmup,
        distillation_decay_steps=decay,
    )
    trainer.state.max_steps = 8
    for done in range(8):
        trainer.state.global_step = done
        expected = scheduled(0.5, done + 1, 8, warmup, decay)
        assert trainer.scheduled_weight() == pytest.approx(expected)
        assert trainer.scalar_metrics() == {"distillation_weight": pytest.approx(expected)}


def test_a_schedule_counts_batches_of_rollouts_not_steps(tmp_path):
    """Four steps train on one batch: two iterations over two halves."""
    trainer = make(
        "SDPG",
        tmp_path,
        distillation_weight=1.0,
        distillation_warmup_steps=2,
        distillation_decay_steps=2,
        steps_per_generation=2,
        num_iterations=2,
        max_steps=16,
    )
    trainer.state.max_steps = 16
    found = []
    for done in range(16):
        trainer.state.global_step = done
        found.append(trainer.scheduled_weight())
    assert found == [0.5] * 4 + [1.0] * 4 + [0.5] * 4 + [0.0] * 4


def test_a_row_without_an_answer_is_not_distilled(tmp_path):
    data = DATA.map(lambda row, n: {"privileged_context": None if n else "It is 4."}, True)
    trainer = make("SDPG", tmp_path, data=data, num_generations=2, distillation_weight=0.3)
    inputs = sample(trainer, rows=[0, 0, 1, 1])
    assert trainer.distilled(inputs)[:, 0].tolist() == [0.3, 0.3, 0.0, 0.0]
    assert (inputs["loss_mask"].sum(1) > 0).all()


def test_a_reference_holds_the_policy_back_and_can_be_left_out(tmp_path):
    """Without rewards and without distillation only the term to the reference is left."""
    given = {"distillation_weight": 0.0, "reward_funcs": lambda prompts, **_: [0.0] * len(prompts)}
    bound = make("SDPG", tmp_path, beta=0.5, **given)
    free = make("SDPG", tmp_path, beta=0.0, **given)
    assert free.ref_model is None
    inputs = sample(bound)
    with torch.no_grad():
        for trainer in (bound, free):
            torch.manual_seed(0)
            for parameter in trainer.model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    loss, gradients = loss_and_gradients(bound, inputs)
    logged = bound._metrics["train"]["self_distillation/reference_term"]
    assert logged == [pytest.approx(float(loss) / 0.5, rel=1e-5)]
    assert float(loss) > 0
    assert any(gradient.any() for gradient in gradients.values())
    loss, gradients = loss_and_gradients(free, inputs)
    assert float(loss) == 0
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gradient": "sparse"}, "method does not read it"),
        ({"reference_term": "kl"}, "reference_term must be one of 'fkl', 'rkl', 'ufkl', 'urkl'"),
        ({"distillation_weight": -1.0}, "distillation_weight must"),
        ({"reprompt_template": "{prompt}"}, "hold {prompt}, {privileged}"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make("SDPG", tmp_path, **settings)
