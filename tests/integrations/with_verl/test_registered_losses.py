"""The losses in verl's registry, as verl's own loss function calls them."""

import math

import micro_batch
import pytest
import torch
from closeness import assert_close
from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.utils import tensordict_utils as tu
from verl.workers.config import DistillationLossConfig

from fused_sd import Evidence, rlsd_loss, token_log_probs
from fused_sd.integrations.verl.config import FusedSDLossConfig
from fused_sd.integrations.verl.token_outputs import token_outputs

VERLS = {
    "topk": micro_batch.TOPK,
    "use_policy_gradient": False,
    "use_task_rewards": False,
    "loss_max_clamp": None,
    "log_prob_min_clamp": None,
}


def output_of(batch, loss_config, **more):
    """The model output of an engine that is ours."""
    terms = token_outputs(
        batch.hidden,
        batch.weight,
        batch.labels,
        loss_config=loss_config,
        teacher_token_ids=batch.teacher_ids,
        teacher_log_probs=batch.teacher_log_probs,
        token_weights=batch.counted,
        **more,
    )
    return {name: batch.jagged(values) for name, values in terms.items()}


def verls_output_of(batch, loss_config):
    """The model output of verl's own engine without fused kernels."""
    found = compute_forward_kl_topk(
        (batch.hidden @ batch.weight.t())[None],
        batch.data["teacher_logprobs"],
        batch.data["teacher_ids"].long(),
        micro_batch.distillation(loss_config),
        "thd",
    )
    return {name: batch.jagged(values[0]) for name, values in found.items()}


def loss_of(batch, loss_config, model_output, strategy="fsdp2"):
    """verl's loss of a micro-batch, and its metrics."""
    return distillation_ppo_loss(
        micro_batch.actor(strategy),
        micro_batch.distillation(loss_config),
        model_output=model_output,
        data=batch.data,
    )


def plain(metrics):
    """Metrics as numbers."""
    return {
        name: value.aggregate() if hasattr(value, "aggregate") else value
        for name, value in metrics.items()
    }


def test_verls_loss_mode_has_verls_loss_gradient_and_metrics_on_our_engines_output():
    batch = micro_batch.make()
    config = DistillationLossConfig(loss_mode="forward_kl_topk", **VERLS)
    expected, verls_metrics = loss_of(batch, config, verls_output_of(batch, config))
    found, metrics = loss_of(batch, config, output_of(batch, config, log_probs=False))
    assert_close(found, expected, torch.float32)
    ours, verls = plain(metrics), plain(verls_metrics)
    # overlaps need the student's own top-k, which verl treats as optional
    assert set(verls) - set(ours) == {
        "distillation/overlap_ratio",
        "distillation/overlap_token_advantage",
    }
    assert ours == pytest.approx({name: verls[name] for name in ours}, rel=1e-5)
    leaves = (batch.hidden, batch.weight)
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)
    ):
        assert_close(mine, theirs, torch.float32)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_topk_loss_is_the_mean_of_the_engines_divergences(divergence):
    batch = micro_batch.make()
    config = FusedSDLossConfig(divergence=divergence, use_task_rewards=False, topk=4)
    output = output_of(batch, config)
    loss, metrics = loss_of(batch, config, output)
    losses = output["distillation_losses"].values()
    assert_close(loss, losses.sum() / 11, torch.float64)
    counted = losses[batch.counted].detach()
    numbers = plain(metrics)
    assert numbers["distillation/loss_min"] == pytest.approx(float(counted.min()))
    assert numbers["distillation/loss_max"] == pytest.approx(float(counted.max()))
    for side in ("student", "teacher"):
        masses = output[f"{side}_mass"].values()[batch.counted]
        assert numbers[f"distillation/{side}_mass"] == pytest.approx(float(masses.mean()))
        assert numbers[f"distillation/{side}_mass_min"] == pytest.approx(float(masses.min()))
        assert numbers[f"distillation/{side}_mass_max"] == pytest.approx(float(masses.max()))


def test_a_dropped_remainder_may_be_negative_and_is_not_clamped():
    """verl's own clamp at 0 has no gradient where the student's mass exceeds the teacher's."""
    batch = micro_batch.make()
    config = FusedSDLossConfig(remainder="drop", use_task_rewards=False, topk=4)
    with torch.no_grad():
        known = (batch.hidden @ batch.weight.t()).log_softmax(-1)
        batch.teacher_log_probs.copy_(known.gather(1, batch.teacher_ids.long()) - 0.5)
    output = output_of(batch, config)
    losses = output["distillation_losses"].values()[batch.counted]
    assert (losses < 0).all()
    loss, metrics = loss_of(batch, config, output)
    assert_close(loss, losses.sum() / 11, torch.float64)
    assert plain(metrics)["distillation/loss_min"] < 0
    (gradient,) = torch.autograd.grad(loss, batch.hidden)
    assert gradient[batch.counted].abs().min() > 0


def test_verls_clamp_bounds_the_topk_loss():
    batch = micro_batch.make()
    free = FusedSDLossConfig(use_task_rewards=False, topk=4)
    output = output_of(batch, free)
    losses = output["distillation_losses"].values()
    bound = float(losses[batch.counted].detach().median())
    bounded = FusedSDLossConfig(use_task_rewards=False, topk=4, loss_max_clamp=bound)
    loss, _ = loss_of(batch, bounded, output)
    assert_close(loss, losses.clamp(max=bound).sum() / 11, torch.float64)


@pytest.mark.parametrize("kind", ["eager", "fused", "veomni"])
def test_the_topk_loss_refuses_what_another_engine_computed(kind):
    """verl's engines know forward KL alone, and none at all with their fused kernels."""
    batch = micro_batch.make()
    config = FusedSDLossConfig(use_task_rewards=False, topk=4)
    output = {"log_probs": batch.jagged(torch.zeros(micro_batch.NUM_ROWS))}
    if kind != "fused":
        output |= verls_output_of(batch, config)
    if kind == "veomni":
        output = {name: output[name] for name in output if "overlap" not in name}
    with pytest.raises(ValueError, match="run in fused_sd's engine") as raised:
        loss_of(batch, config, output, strategy="veomni" if kind == "veomni" else "fsdp2")
    for part in (
        "VERL_ENGINE_VENDOR=fused_sd",
        "use_fused_kernels=True",
        "impl_backend=fused_sd",
        "python -m fused_sd.integrations.verl doctor",
    ):
        assert part in str(raised.value)


def test_our_losses_refuse_verls_settings():
    batch = micro_batch.make()
    for loss_mode in ("fused_sd_topk", "fused_sd_rlsd"):
        config = DistillationLossConfig(loss_mode=loss_mode, **VERLS)
        with pytest.raises(ValueError, match="be a FusedSDLossConfig for loss_mode="):
            loss_of(batch, config, {"log_probs": batch.jagged(torch.zeros(micro_batch.NUM_ROWS))})


def rlsd_batch(dtype=torch.float64):
    """A micro-batch whose teacher's server sends the sampled token's log-probability alone."""
    batch = micro_batch.make(dtype, k=1)
    known = token_log_probs(batch.hidden.detach(), batch.weight.detach(), batch.labels).log_probs
    near = known + 0.3 * torch.randn_like(known)
    batch.teacher_log_probs.copy_(near[:, None])
    spread = 0.4 * torch.randn(micro_batch.NUM_ROWS)
    old = batch.at_responses(known.float() + spread)
    batch.data["old_log_probs"].values().copy_(
        torch.cat([row[:r] for row, (_, r) in zip(old, micro_batch.LENGTHS)])
    )
    return batch


def at_rows(batch, name):
    """A (B, R) tensor of the batch at the packed rows that predict its tokens."""
    values = torch.zeros(micro_batch.NUM_ROWS, dtype=torch.float64)
    start = 0
    for row, (p, r) in zip(batch.data[name].unbind(), micro_batch.LENGTHS):
        values[start + p - 1 : start + p + r - 1] = row.double()
        start += p + r
    return values


RLSD = {"loss_mode": "fused_sd_rlsd", "use_task_rewards": False, "clip_ratio_high": 0.28}


@pytest.mark.parametrize("reference", ["current", "old"])
@pytest.mark.parametrize("dual_clip", [None, 1.05], ids=["no dual clip", "dual clip"])
def test_rlsd_is_the_librarys(reference, dual_clip):
    batch = rlsd_batch()
    config = FusedSDLossConfig(
        **RLSD, rlsd_mix=0.7, rlsd_clip_low=0.15, rlsd_log_prob=reference, rlsd_dual_clip=dual_clip
    )
    output = {"log_probs": batch.jagged(token_log_probs(*student(batch)).log_probs)}
    loss, metrics = loss_of(batch, config, output)
    names = ("importance_ratio", "ratio_clip_fraction", "evidence", "evidence_weight")
    expected = rlsd_loss(
        *student(batch),
        at_rows(batch, "advantages"),
        teacher_log_probs=batch.teacher_log_probs[:, 0],
        old_log_probs=at_rows(batch, "old_log_probs"),
        evidence=Evidence((0.15, 0.2), 0.7, reference),
        dual_clip=dual_clip,
        token_weights=batch.counted.double() / 11,
        metrics=(*names, "evidence_clip_fraction"),
        reduction="sum",
    )
    assert_close(loss, expected.loss, torch.float64)
    (got,) = torch.autograd.grad(loss, batch.hidden)
    (want,) = torch.autograd.grad(expected.loss, batch.hidden)
    assert_close(got, want, torch.float64)
    means = {name: float(v[batch.counted].mean()) for name, v in expected.metrics.items()}
    assert 0 < means["ratio_clip_fraction"] < 1
    assert 0 < means["evidence_clip_fraction"] < 1
    assert plain(metrics) == pytest.approx(
        {
            "distillation/evidence": means["evidence"],
            "distillation/evidence_weight": means["evidence_weight"],
            "distillation/evidence_clip_fraction": means["evidence_clip_fraction"],
            "distillation/pg_clipfrac": means["ratio_clip_fraction"],
            "distillation/ppo_kl": float(
                -expected.metrics["importance_ratio"][batch.counted].log().mean(),
            ),
            "distillation/loss": float(loss.detach()),
            "distillation/loss_min": float(expected.token_loss[batch.counted].min()),
            "distillation/loss_max": float(expected.token_loss[batch.counted].max()),
        }
    )


def test_rlsds_mix_is_the_training_steps_where_it_changes():
    batch = rlsd_batch()
    output = {"log_probs": batch.jagged(token_log_probs(*student(batch)).log_probs)}
    changing = FusedSDLossConfig(**RLSD, rlsd_mix=0.5, rlsd_mix_decay_steps=4)
    with pytest.raises(ValueError, match="come with a trainer of fused_sd"):
        loss_of(batch, changing, output)
    batch.data["evidence_mix"] = torch.full((batch.mask.shape[0],), 0.3)
    found, _ = loss_of(batch, changing, output)
    expected, _ = loss_of(batch, FusedSDLossConfig(**RLSD, rlsd_mix=0.3), output)
    torch.testing.assert_close(found, expected)


def student(batch):
    return batch.hidden, batch.weight, batch.labels


def test_rlsd_without_evidence_is_verls_own_policy_loss():
    """At mix 0 nothing of the teacher is left."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config import ActorConfig

    batch = rlsd_batch()
    output = {"log_probs": batch.jagged(token_log_probs(*student(batch)).log_probs)}
    weights = batch.mask * torch.rand(batch.mask.shape)
    batch.data["rollout_is_weights"] = micro_batch.jagged(
        [row[:r] for row, (_, r) in zip(weights, micro_batch.LENGTHS)]
    )
    loss, metrics = loss_of(batch, FusedSDLossConfig(**RLSD, rlsd_mix=0.0), output)
    config = ActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_high=0.28
    )
    config.global_batch_info.update(dp_size=1, batch_num_tokens=11)
    expected, verls = compute_policy_loss_vanilla(
        batch.data["old_log_probs"].to_padded_tensor(0),
        batch.at_responses(output["log_probs"]),
        batch.data["advantages"].to_padded_tensor(0),
        batch.mask,
        config=config,
        rollout_is_weights=weights,
    )
    assert_close(loss, expected, torch.float32)
    assert plain(metrics)["distillation/ppo_kl"] == pytest.approx(verls["actor/ppo_kl"], rel=1e-5)
    (got,) = torch.autograd.grad(loss, batch.hidden, retain_graph=True)
    (want,) = torch.autograd.grad(expected, batch.hidden)
    assert_close(got, want, torch.float32)


def test_rlsd_does_not_read_tokens_that_do_not_count():
    clean, dirty = (rlsd_batch(torch.float32) for _ in range(2))
    for name in list(clean.data.keys()):
        if isinstance(clean.data[name], torch.Tensor):
            dirty.data[name].values().copy_(clean.data[name].values())
    with torch.no_grad():
        dirty.hidden.copy_(clean.hidden)
        dirty.weight.copy_(clean.weight)
    masked = ~torch.cat([row.bool() for row in dirty.data["response_mask"].unbind()])
    for name in ("advantages", "old_log_probs"):
        dirty.data[name].values()[masked] = math.nan
    dirty.teacher_log_probs[~dirty.counted] = math.nan
    dirty.labels = clean.labels
    losses, gradients = [], []
    for batch in (clean, dirty):
        log_probs = token_log_probs(*student(batch), token_weights=batch.counted.float()).log_probs
        loss, _ = loss_of(batch, FusedSDLossConfig(**RLSD), {"log_probs": batch.jagged(log_probs)})
        losses.append(loss)
        gradients += torch.autograd.grad(loss, batch.hidden)
    assert losses[0].isfinite()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(gradients[0], gradients[1])


def test_rlsd_takes_the_log_probs_of_a_teacher_in_the_engine():
    batch = rlsd_batch()
    log_probs = batch.jagged(token_log_probs(*student(batch)).log_probs)
    served, _ = loss_of(batch, FusedSDLossConfig(**RLSD), {"log_probs": log_probs})
    known = batch.jagged(batch.teacher_log_probs[:, 0].double())
    del batch.data["teacher_logprobs"]
    local = FusedSDLossConfig(**RLSD, teacher="live")
    found, _ = loss_of(batch, local, {"log_probs": log_probs, "teacher_log_probs": known})
    assert_close(found, served, torch.float64)


def test_rlsd_says_what_is_missing():
    batch = rlsd_batch()
    output = {"log_probs": batch.jagged(token_log_probs(*student(batch)).log_probs)}
    batch.data["teacher_logprobs"] = batch.jagged(torch.zeros(micro_batch.NUM_ROWS, 4))
    with pytest.raises(ValueError, match="hold the sampled token's log-probability alone"):
        loss_of(batch, FusedSDLossConfig(**RLSD), output)
    del batch.data["teacher_logprobs"]
    for teacher in ("server", "live"):
        with pytest.raises(ValueError, match=f"for RLSD with teacher='{teacher}', got nothing"):
            loss_of(batch, FusedSDLossConfig(**RLSD, teacher=teacher), output)


@pytest.mark.parametrize("task_rewards", [False, True], ids=["alone", "with a policy loss"])
def test_a_micro_batch_in_which_no_token_counts_has_loss_0(task_rewards):
    """As verl's rejection sampling and padding samples leave; verl's own loss fails on it."""
    from verl.workers.config import ActorConfig

    batch = micro_batch.make()
    batch.data["response_mask"].values().zero_()
    batch.counted[:] = False
    batch.data["ref_log_prob"] = torch.full_like(batch.data["old_log_probs"], -2.0)
    batch.data["rollout_is_weights"] = torch.ones_like(batch.data["old_log_probs"])
    config = FusedSDLossConfig(use_task_rewards=task_rewards, topk=4)
    actor = ActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_kl_loss=True
    )
    distillation = micro_batch.distillation(config)
    output = output_of(batch, config)
    loss, metrics = distillation_ppo_loss(actor, distillation, model_output=output, data=batch.data)
    assert float(loss.detach()) == 0
    gradient, _ = torch.autograd.grad(loss, (batch.hidden, batch.weight))
    assert not gradient.any()
    assert all(math.isfinite(value) for value in plain(metrics).values())


def test_rlsd_has_loss_0_where_no_token_of_the_whole_batch_counts():
    batch = rlsd_batch()
    batch.data["response_mask"].values().zero_()
    tu.assign_non_tensor(batch.data, batch_num_tokens=0)
    log_probs = token_log_probs(*student(batch)).log_probs
    loss, metrics = loss_of(
        batch, FusedSDLossConfig(**RLSD), {"log_probs": batch.jagged(log_probs)}
    )
    assert float(loss.detach()) == 0
    (gradient,) = torch.autograd.grad(loss, batch.hidden)
    assert not gradient.any()
    assert all(math.isfinite(value) for value in plain(metrics).values())


@pytest.mark.parametrize("batch_num_tokens", [11, 5])
def test_the_topk_loss_is_weighted_by_verls_correction(batch_num_tokens):
    batch = micro_batch.make()
    tu.assign_non_tensor(batch.data, batch_num_tokens=batch_num_tokens)
    weights = micro_batch.jagged([2 * torch.rand(r) for _, r in micro_batch.LENGTHS])
    weights.values()[~batch.data["response_mask"].values().bool()] = math.nan
    batch.data["rollout_is_weights"] = weights
    config = FusedSDLossConfig(divergence="reverse_kl", use_task_rewards=False, topk=4)
    output = output_of(batch, config)
    loss, _ = loss_of(batch, config, output)
    at = at_rows(batch, "rollout_is_weights")[batch.counted]
    losses = output["distillation_losses"].values()[batch.counted]
    expected = (losses * at).sum() / batch_num_tokens
    assert_close(loss, expected, torch.float32)
    (got,) = torch.autograd.grad(loss, batch.hidden, retain_graph=True)
    (want,) = torch.autograd.grad(expected, batch.hidden)
    assert_close(got, want, torch.float32)
