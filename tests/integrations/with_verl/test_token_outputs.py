"""The engines' per-token outputs, against verl's functions of logits and float64 formulas."""

import math

import micro_batch
import pytest
import torch
from closeness import assert_close
from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
from verl.workers.config import DistillationLossConfig

from fused_sd import divergence_loss, reference
from fused_sd.integrations.verl.config import SUPPORTS, FusedSDLossConfig
from fused_sd.integrations.verl.config_checks import parameter_field
from fused_sd.integrations.verl.token_outputs import MASSES, token_outputs
from fused_sd.terms.divergence import DIVERGENCES

TEMPERATURE = 0.7


def outputs_of(batch, loss_config, **more):
    """The outputs of every packed row, taught by a server."""
    server = {
        "teacher_token_ids": batch.teacher_ids,
        "teacher_log_probs": batch.teacher_log_probs,
    }
    more = {"temperature": TEMPERATURE, **more}
    return token_outputs(
        batch.hidden, batch.weight, batch.labels, loss_config=loss_config, **server, **more
    )


def taught_locally(batch, loss_config, **more):
    """The random states of a teacher that shares the student's head, and the outputs."""
    teacher = torch.randn(micro_batch.NUM_ROWS, micro_batch.HIDDEN, dtype=torch.float64)
    sides = batch.hidden, batch.weight, batch.labels
    local = teacher, batch.weight.detach()
    return teacher, token_outputs(*sides, loss_config=loss_config, teacher=local, **more)


def logits_of(batch):
    return batch.hidden @ batch.weight.t() / TEMPERATURE


@pytest.mark.parametrize("floor", [None, -2.5], ids=["no clamp", "clamped"])
def test_verls_own_loss_mode_has_verls_values_and_gradients(floor):
    batch = micro_batch.make()
    config = DistillationLossConfig(
        loss_mode="forward_kl_topk",
        topk=micro_batch.TOPK,
        use_policy_gradient=False,
        log_prob_min_clamp=floor,
    )
    verls = compute_forward_kl_topk(
        logits_of(batch)[None],
        batch.data["teacher_logprobs"],
        batch.data["teacher_ids"].long(),
        micro_batch.distillation(config),
        "thd",
    )
    ours = outputs_of(batch, config, token_weights=batch.counted)
    rows = batch.counted
    if floor is not None:
        assert (batch.teacher_log_probs[rows] < floor).any()
    for name in ("distillation_losses", *MASSES):
        # verl's are fp32 whatever the logits are, ours those of the operands
        assert_close(ours[name][rows].double(), verls[name][0, rows].double(), torch.float32, name)
        assert torch.equal(ours[name][~rows], torch.zeros_like(ours[name][~rows]))
    upstream = torch.randn(micro_batch.NUM_ROWS)
    leaves = (batch.hidden, batch.weight)
    expected = torch.autograd.grad((verls["distillation_losses"][0] * upstream)[rows].sum(), leaves)
    found = torch.autograd.grad((ours["distillation_losses"] * upstream).sum(), leaves)
    for name, mine, theirs in zip(("hidden", "head"), found, expected):
        assert_close(mine, theirs, torch.float32, name)


PAIRS = [(name, remainder) for name, known in DIVERGENCES.items() for remainder in known.remainders]


@pytest.mark.parametrize("divergence, remainder", PAIRS)
def test_each_divergence_of_a_servers_entries_is_the_formulas(divergence, remainder):
    batch = micro_batch.make()
    settings = {"divergence": divergence, "remainder": remainder, "topk": micro_batch.TOPK}
    name, parameter = parameter_field(FusedSDLossConfig(), divergence), {}
    if name is not None:
        settings[name] = 0.3
        parameter = {DIVERGENCES[divergence].parameter_name: 0.3}
    config = FusedSDLossConfig(**settings)
    ours = outputs_of(batch, config, token_weights=batch.counted, entropy=True)
    rows, ids = batch.counted, batch.teacher_ids.long()
    served = reference.served_teacher(ids, batch.teacher_log_probs, micro_batch.VOCAB)
    logits = logits_of(batch)
    expected = reference.divergence(
        logits,
        served,
        divergence=divergence,
        support=reference.given_ids(ids, micro_batch.VOCAB),
        remainder=remainder,
        **parameter,
    )
    # the server's fp32 log-probabilities leave the tail's mass known to fp32 alone
    assert_close(
        ours["distillation_losses"][rows], expected[rows], torch.float32, "distillation_losses"
    )
    assert_close(
        ours["log_probs"][rows],
        reference.token_log_prob(logits, batch.labels)[rows],
        torch.float64,
        "log_probs",
    )
    assert_close(ours["entropy"][rows], reference.entropy(logits)[rows], torch.float64, "entropy")
    assert not ours["student_mass"].requires_grad
    upstream = torch.randn(micro_batch.NUM_ROWS, dtype=torch.float64)
    leaves = (batch.hidden, batch.weight)
    want = torch.autograd.grad((expected * upstream)[rows].sum(), leaves)
    got = torch.autograd.grad((ours["distillation_losses"] * upstream).sum(), leaves)
    for name, mine, theirs in zip(("hidden", "head"), got, want):
        assert_close(mine, theirs, torch.float32, name)


def test_importance_multiplies_each_token_by_its_capped_ratio():
    batch = micro_batch.make()
    plain = FusedSDLossConfig(topk=micro_batch.TOPK)
    capped = FusedSDLossConfig(topk=micro_batch.TOPK, importance_cap=1.5)
    without = outputs_of(batch, plain)
    old = without["log_probs"].detach() + torch.linspace(-1, 1, micro_batch.NUM_ROWS)
    ratio = (without["log_probs"] - old).exp().clamp(max=1.5).detach()
    assert (ratio == 1.5).any()
    assert (ratio < 1).any()
    losses = outputs_of(batch, capped, old_log_probs=old)["distillation_losses"]
    expected = without["distillation_losses"] * ratio
    assert_close(losses, expected, torch.float64)
    (got,) = torch.autograd.grad(losses.sum(), batch.hidden)
    (want,) = torch.autograd.grad(expected.sum(), batch.hidden)
    assert_close(got, want, torch.float64)
    with pytest.raises(ValueError, match="importance_cap must come with old_log_probs"):
        outputs_of(batch, capped)


@pytest.mark.parametrize("remainder", ["tail", "renormalize", "drop"])
def test_a_padded_row_of_one_id_repeated_is_finite_and_weighs_nothing(remainder):
    batch = micro_batch.make()
    padded = (batch.teacher_log_probs == 0).all(-1)
    assert (batch.teacher_ids[padded] == 0).all()
    assert int(padded.sum()) == len(micro_batch.LENGTHS)
    config = FusedSDLossConfig(remainder=remainder, topk=micro_batch.TOPK)
    everywhere = outputs_of(batch, config)["distillation_losses"]
    assert everywhere.isfinite().all()
    (gradient,) = torch.autograd.grad(everywhere[padded].sum(), batch.hidden)
    assert gradient.isfinite().all()
    counted = outputs_of(batch, config, token_weights=~padded)
    for name in ("distillation_losses", *MASSES, "log_probs"):
        assert torch.equal(counted[name][padded], torch.zeros_like(counted[name][padded])), name


def test_rows_that_do_not_count_may_hold_anything():
    batch = micro_batch.make()
    config = FusedSDLossConfig(topk=micro_batch.TOPK)
    clean = outputs_of(batch, config, token_weights=batch.counted)
    with torch.no_grad():
        batch.hidden[~batch.counted] = math.nan
        batch.teacher_log_probs[~batch.counted] = math.nan
    dirty = outputs_of(batch, config, token_weights=batch.counted)
    for name, values in clean.items():
        assert torch.equal(dirty[name], values), name
    dirty["distillation_losses"].sum().backward()
    assert batch.weight.grad.isfinite().all()
    assert not batch.hidden.grad[~batch.counted].any()


@pytest.mark.parametrize("topk", [micro_batch.TOPK - 1, micro_batch.TOPK + 1])
def test_a_server_that_sends_other_than_topk_entries_is_refused(topk):
    batch = micro_batch.make()
    message = f"teacher_ids must hold the {topk} entries of distillation_loss.topk, got 4 in shape"
    with pytest.raises(ValueError, match=message):
        outputs_of(batch, FusedSDLossConfig(topk=topk))


def test_a_divergence_without_any_teacher_is_refused():
    batch = micro_batch.make()
    with pytest.raises(ValueError, match="neither teacher_ids and teacher_logprobs in the batch"):
        token_outputs(batch.hidden, batch.weight, batch.labels, loss_config=FusedSDLossConfig())


def test_without_a_distillation_loss_there_are_log_probs_alone():
    batch = micro_batch.make()
    assert set(token_outputs(batch.hidden, batch.weight, batch.labels)) == {"log_probs"}
    both = token_outputs(batch.hidden, batch.weight, batch.labels, log_probs=False, entropy=True)
    assert set(both) == {"entropy"}


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_teacher_in_the_process_is_compared_by_divergence_loss(support):
    batch = micro_batch.make()
    config = FusedSDLossConfig(
        teacher="live", support=support, topk=5, divergence="jsd", chunk_size=4
    )
    more = {"token_weights": batch.counted, "temperature": TEMPERATURE}
    teacher, outputs = taught_locally(batch, config, **more)
    expected = divergence_loss(
        batch.hidden,
        batch.weight,
        teacher,
        batch.weight.detach(),
        divergence=config.comparison.divergence,
        support=config.comparison.support,
        metrics=() if support == "full" else MASSES,
        temperature=TEMPERATURE,
        token_weights=batch.counted.double(),
        reduction="sum",
    )
    assert_close(outputs["distillation_losses"], expected.token_loss, torch.float64)
    ones = batch.counted.double()
    for name in MASSES:
        assert_close(outputs[name], expected.metrics.get(name, ones), torch.float64, name)
    (got,) = torch.autograd.grad(outputs["distillation_losses"].sum(), batch.hidden)
    (want,) = torch.autograd.grad(expected.loss, batch.hidden)
    assert_close(got, want, torch.float64)


def test_rlsd_with_a_teacher_in_the_process_gets_its_log_probs_of_the_tokens():
    batch = micro_batch.make()
    config = FusedSDLossConfig(loss_mode="fused_sd_rlsd", use_task_rewards=False, teacher="live")
    teacher, outputs = taught_locally(batch, config)
    expected = reference.token_log_prob(teacher @ batch.weight.t(), batch.labels)
    assert_close(outputs["teacher_log_probs"], expected.detach(), torch.float64)
    assert not outputs["teacher_log_probs"].requires_grad
    assert set(outputs) == {"teacher_log_probs", "log_probs"}
