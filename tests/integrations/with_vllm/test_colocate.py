"""TRL's colocated vLLM, real: rollouts, their log-probabilities, and the correction from them."""

import dataclasses

import official
import official_policies
import pytest
import torch
from closeness import assert_close
from cpu_engine import load_in_process
from method_pairs import METHODS, states
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from vllm_runs import (
    GROUP,
    assert_same,
    gap,
    loss_and_gradients,
    make,
    move,
    sample,
    save_model,
)

from fused_sd.integrations import trl as ours
from fused_sd.integrations.trl import FusedGRPOTrainer

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    load_in_process(monkeypatch)


def colocated(cls, config, home, **settings):
    settings = {"vllm_mode": "colocate", "vllm_max_model_length": 128, **settings}
    return make(cls, config, home, **settings)


def test_the_engine_has_the_trainers_weights_in_fewer_bits(home):
    trainer = colocated(FusedGRPOTrainer, GRPOConfig, home)
    assert trainer.vllm_generation.llm.llm_engine.model_config.dtype is torch.bfloat16
    first = sample(trainer)
    assert 1e-4 < gap(first) < 0.1
    move(trainer)
    trainer._last_loaded_step = trainer.state.global_step  # as if nothing had been trained
    assert gap(sample(trainer)) > 0.5
    trainer._last_loaded_step = -1
    assert 1e-4 < gap(sample(trainer)) < 0.1


@pytest.mark.parametrize("mode", MODES)
def test_the_corrected_loss_is_stocks(mode, home):
    # bf16 puts about half of all ratios above 1
    settings = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.0}
    stock = colocated(GRPOTrainer, GRPOConfig, home, **settings)
    fused = colocated(FusedGRPOTrainer, GRPOConfig, home, **settings)
    inputs = sample(fused, rows=16)
    ratio = inputs["importance_sampling_ratio"]
    assert ratio.shape == (16, 1 if "sequence" in mode else inputs["completion_ids"].size(1))
    mask = inputs["completion_mask"].bool()
    ratio = ratio.expand_as(mask)[mask]
    assert ((ratio > 0) & (ratio < 1)).any()
    assert (ratio == (0 if "mask" in mode else 1)).any()
    assert_same(stock, fused, inputs)


def sdpo(batch, **_):
    return official.sdpo(batch, alpha=0.5, top_k=100)


def sdft(batch, **_):
    return official.sdft(batch, skip=0)  # skipped by the loss mask


def grpo(batch, num_tokens, **_):
    corrected = {"correct": True, "num_tokens": num_tokens}
    return official_policies.grpo_trl(batch, clip=(0.2, 0.28), **corrected)


# method: settings, and the official code's loss with its correction, from both log-probabilities
OFFICIAL = {
    "SDPO": ({"tail_floor": 1e-7, "teacher_model_kind": "live"}, sdpo),
    "SDFT": ({"teacher_model_kind": "live"}, sdft),
    "GRPO": ({"loss_type": "dapo", "delta": None}, grpo),
}


@pytest.mark.parametrize("method", OFFICIAL)
def test_a_methods_loss_has_the_official_correction(method, home):
    more, definition = OFFICIAL[method]
    trainer = of_method(method, home, dtype=torch.float64, **more)
    inputs = sample(trainer)
    assert gap(inputs) > 1e-4
    loss, gradients = loss_and_gradients(trainer, inputs)
    trainer.model.zero_grad()
    batch = states(trainer.model, inputs, "student")
    batch = dataclasses.replace(batch, rollout=inputs["sampling_per_token_logps"])
    number = {"num_tokens": inputs["num_loss_tokens"]}
    exact = definition(batch, **number)
    exact.backward()
    assert exact != definition(dataclasses.replace(batch, rollout=batch.old), **number)
    assert_close(loss, exact.detach(), torch.float64, "loss")
    for name, truth in trainer.model.named_parameters():
        assert_close(gradients[name], truth.grad, torch.float64, name)


def of_method(method, home, **settings):
    """One of our trainers, with the correction of most official runs."""
    correction = {
        "vllm_importance_sampling_correction": True,  # also where the official run has none
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 2.0,
    }
    pair = (getattr(ours, f"{method}{part}") for part in ("Trainer", "Config"))
    return colocated(*pair, home, **{**correction, "num_generations": GROUP, **settings})


def test_the_engine_has_the_students_adapter_and_not_the_teachers(home):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    trainer = of_method("SDPO", home, adapter=lora, teacher_model_kind="ema")
    names = [name for name, _ in trainer.model.named_parameters()]
    assert any(".teacher." in name for name in names)
    move(trainer, 1.0, named=".teacher.")
    assert gap(sample(trainer)) < 0.1
    move(trainer, named=".default.")
    assert gap(sample(trainer)) > 0.2  # nothing was trained: the engine has the weights of before
    trainer._last_loaded_step = -1
    assert gap(sample(trainer)) < 0.1


def test_the_swap_for_grpo_trains(home):
    assert_trained(colocated(FusedGRPOTrainer, GRPOConfig, home))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains(method, home):
    assert_trained(of_method(method, home))


def assert_trained(trainer):
    """Two batches of rollouts, each from the weights of its step."""
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 2
    for row in logged:
        assert 0 < row["sampling/sampling_logp_difference/mean"] < 0.2
