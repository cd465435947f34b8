"""The correction for a rollout engine: losses with the ratio of the trainer's to its log-probs."""

import dataclasses
import functools

import method_pairs
import official
import official_policies
import pytest
import torch
from closeness import assert_close
from datasets import Dataset
from method_pairs import METHODS, loss_and_gradients, make, sample, states
from rollout_engine import RolloutEngine
from test_trl_methods import OFFICIAL
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer
from trl_pairs import TOKENIZER, assert_same, rewards

from fused_sd.integrations.trl import FusedGRPOTrainer

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
BOUNDS = {
    "vllm_importance_sampling_correction": True,  # also where the official run has none
    "vllm_importance_sampling_clip_max": 2.0,
    "vllm_importance_sampling_clip_min": 0.5,
}


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", RolloutEngine)


def make_grpo(cls, folder, **settings):
    """TRL's trainer or its swap, which samples from the engine."""
    settings = {"num_generations": 2, "per_device_train_batch_size": 4, **settings}
    config = GRPOConfig(
        str(folder), report_to="none", use_cpu=True, bf16=False, use_vllm=True, **settings
    )
    trainer = cls(
        method_pairs.model(torch.float32),
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["Solve 2 + 2.", "Add 3 to 4."] * 4}),
        processing_class=TOKENIZER,
    )
    trainer.current_gradient_accumulation_steps = 1  # what training sets
    trainer.model.train()
    return trainer


def rollouts(trainer, rows=(0, 0, 1, 1)):
    return trainer._generate_and_score_completions(list(trainer.train_dataset.select(rows)))


@pytest.mark.parametrize("mode", MODES)
def test_the_swap_for_grpo_corrects_as_stock_does(mode, tmp_path):
    settings = {"vllm_importance_sampling_mode": mode, **BOUNDS, "beta": 0.0}
    stock, fused = (make_grpo(cls, tmp_path, **settings) for cls in (GRPOTrainer, FusedGRPOTrainer))
    batches = [rollouts(trainer) for trainer in (stock, fused)]
    names = ("completion_ids", "sampling_per_token_logps", "importance_sampling_ratio")
    for name in names:
        torch.testing.assert_close(batches[1][name], batches[0][name])
    assert batches[0]["importance_sampling_ratio"].unique().numel() > 1
    for trainer in (stock, fused):
        trainer._metrics["train"].clear()
    assert_same(stock, fused, batches[1])


def ratio_of(trainer, inputs):
    """The ratio as TRL's documentation defines it, from the batch's log-probabilities."""
    mode, mask = trainer.args.vllm_importance_sampling_mode, inputs["completion_mask"]
    gap = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * mask
    ratio = (gap.sum(-1, keepdim=True) if "sequence" in mode else gap).exp()
    if "truncate" in mode:
        return ratio.clamp(0.5, 2.0)
    return torch.where((ratio >= 0.5) & (ratio <= 2.0), ratio, 0)


def corrected(monkeypatch, ratio):
    """Multiply each token's loss in the official codes, which then average as they do."""

    def times(function, *args, **kwargs):
        return function(*args, **kwargs) * ratio

    def token_mean(function, token_loss, *args):
        return function(token_loss * ratio, *args)

    means = functools.partial(token_mean, official.token_mean)
    monkeypatch.setattr(official, "token_mean", means)
    monkeypatch.setattr(official_policies, "token_mean", means)
    return functools.partial(times, official_policies.dual_clipped)


def iw_opd(batch, inputs, trainer):
    """The engine's log-probabilities make the advantages, too."""
    rollout = inputs["sampling_per_token_logps"]
    return official_policies.iw_opd(batch.with_policies(rollout=rollout), gamma=0.8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "SDFT"])
def test_each_tokens_loss_is_multiplied_by_the_ratio(method, mode, tmp_path, monkeypatch):
    names = {
        "SDPO": "SDPO, the official configuration",
        "SDZero": "SD-Zero, code",
        "IWOPD": "IW-OPD",
    }
    _, settings, definition = OFFICIAL[names.get(method, method)]
    if method == "IWOPD":
        definition = iw_opd
    settings = {**settings, "use_vllm": True, "vllm_importance_sampling_mode": mode, **BOUNDS}
    live = {} if method in ("GRPO", "RFT") else {"teacher_model_kind": "live"}
    trainer = make(method, tmp_path, **live, **settings)
    inputs = sample(trainer)
    ratio = ratio_of(trainer, inputs)
    assert ratio.unique().numel() > 1
    if method not in ("RFT", "OPSD", "SDZero"):  # those read no old policy
        own = inputs["old_per_token_logps"]
        inputs["old_per_token_logps"] = own + 0.3 * torch.randn_like(own)
    loss, gradients = loss_and_gradients(trainer, inputs)
    trainer.model.zero_grad()
    batch = states(trainer.model, inputs, "student")
    dual_clipped = corrected(monkeypatch, ratio)
    if method == "RLCSD":  # averages by itself
        monkeypatch.setattr(official_policies, "dual_clipped", dual_clipped)
    exact = definition(batch, inputs, trainer)
    exact.backward()
    assert exact != 0
    assert_close(loss, exact.detach(), torch.float64, "loss")
    for parameter, truth in trainer.model.named_parameters():
        assert_close(gradients[parameter], truth.grad, torch.float64, parameter)


def test_sdft_weighs_a_sequence_by_its_mean_ratio_as_the_official_code_does(tmp_path):
    mode = {"vllm_importance_sampling_mode": "token_truncate"}
    settings = {**BOUNDS, **mode, "vllm_importance_sampling_clip_min": None}
    more = {"teacher_model_kind": "live", "num_loss_tokens_to_skip": 1}
    trainer = make("SDFT", tmp_path, use_vllm=True, **settings, **more)
    inputs = sample(trainer)
    assert (inputs["loss_mask"].sum(-1) == 0).any()  # the completion of one token
    loss, gradients = loss_and_gradients(trainer, inputs)
    trainer.model.zero_grad()
    batch = states(trainer.model, inputs, "student")
    batch = dataclasses.replace(batch, rollout=inputs["sampling_per_token_logps"])
    exact = official.sdft(batch, skip=0)  # skipped by the loss mask
    exact.backward()
    assert_close(loss, exact.detach(), torch.float64, "loss")
    for parameter, truth in trainer.model.named_parameters():
        assert_close(gradients[parameter], truth.grad, torch.float64, parameter)
    trainer.args.sequence_mean_correction = False
    ratio = inputs["importance_sampling_ratio"]
    torch.testing.assert_close(trainer.rollout_correction(inputs), ratio)


def unknown(trainer, monkeypatch, *, at):
    """Let the engine know nothing of the first token of one completion."""
    generate = trainer.vllm_generation.generate

    def some(*args, **kwargs):
        prompts, completions, scores, _ = generate(*args, **kwargs)
        scores[at][0] = [None]
        return prompts, completions, scores, None

    monkeypatch.setattr(trainer.vllm_generation, "generate", some)


@pytest.mark.parametrize("method", METHODS)
def test_a_token_that_the_engine_could_not_score_is_not_corrected(method, tmp_path, monkeypatch):
    settings = {"vllm_importance_sampling_mode": "token_truncate", **BOUNDS}
    trainer = make(method, tmp_path, use_vllm=True, **settings)
    unknown(trainer, monkeypatch, at=1)
    inputs = sample(trainer)
    assert inputs["sampling_per_token_logps"][1, 0].isnan()
    ratio = inputs["importance_sampling_ratio"]
    assert ratio[1, 0] == 1
    assert ratio.isfinite().all()
    loss, gradients = loss_and_gradients(trainer, inputs)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("longest", [False, True])
def test_a_completion_without_tokens_is_its_end_token(longest, tmp_path, monkeypatch):
    settings = {"vllm_importance_sampling_mode": "token_truncate", **BOUNDS}
    trainer = make("SDPO", tmp_path, use_vllm=True, **settings)
    generate = trainer.vllm_generation.generate

    def silent(*args, **kwargs):
        prompts, completions, scores, _ = generate(*args, **kwargs)
        for n in range(len(prompts)) if longest else (2,):
            completions[n], scores[n] = [], []
        return prompts, completions, scores, None

    monkeypatch.setattr(trainer.vllm_generation, "generate", silent)
    inputs = sample(trainer)
    assert inputs["completion_mask"].sum(-1)[2] == 1
    assert inputs["completion_ids"][2, 0] == TOKENIZER.eos_token_id
    assert inputs["importance_sampling_ratio"][2, 0] == 1
    loss, gradients = loss_and_gradients(trainer, inputs)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_an_engines_rollouts(method, tmp_path):
    settings = {"vllm_importance_sampling_mode": "token_truncate", **BOUNDS}
    trainer = make(method, tmp_path, use_vllm=True, steps_per_generation=2, **settings)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2  # of one batch of rollouts
    assert rows[0]["sampling/importance_sampling_ratio/max"] <= 2
    assert rows[0]["sampling/sampling_logp_difference/mean"] > 0
