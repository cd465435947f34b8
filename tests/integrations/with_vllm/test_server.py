"""TRL's vLLM server, real: HTTP, rollouts and their log-probabilities; weights through a file."""

import pytest
import torch
from cpu_engine import send_by_file
from server import serving
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from vllm_runs import GROUP, assert_same, gap, make, move, sample, save_model

from fused_sd.integrations import trl as ours
from fused_sd.integrations.trl import FusedGRPOTrainer, FusedSDPOTrainer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def address(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with serving(home, folder / "plugin", folder / "log") as url:
        yield url


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, tmp_path):
    send_by_file(monkeypatch, tmp_path)


def served(cls, config, home, address, **settings):
    settings = {"vllm_mode": "server", "vllm_server_base_url": address, **settings}
    return make(cls, config, home, **settings)


TOP_K = {"distillation_mode": "topk_logits", "distillation_topk": 5, "distillation_add_tail": True}
TEACHERS = {
    "forward": {**TOP_K, "distillation_alpha": 0.0},
    "Jensen-Shannon, renormalised": {
        **TOP_K,
        "distillation_alpha": 0.5,
        "distillation_add_tail": False,
    },
    "sampled": {"distillation_mode": "sampled_token", "distillation_alpha": 1.0},
}


@pytest.mark.parametrize("settings", TEACHERS.values(), ids=TEACHERS)
def test_a_teacher_on_the_server_gives_stocks_loss(settings, home, address):
    live = {"teacher_model_kind": "live", "use_teacher_server": True, **settings}
    stock, fused = (
        served(cls, SDPOConfig, home, address, **live) for cls in (SDPOTrainer, FusedSDPOTrainer)
    )
    for trainer in (stock, fused):
        move(trainer)
    rows = fused.train_dataset.select([0] * GROUP)
    inputs = fused._prepare_training_batch(list(rows))
    assert inputs["self_distillation_mask"].any()
    assert_same(stock, fused, inputs)
    name = "self_distillation/server_logprob_abs_diff"
    for trainer in (stock, fused):
        # student and teacher read different prompts, with the same weights
        assert trainer._metrics["train"][name][-1] > 0
    fused.train()
    assert fused.state.global_step == 2


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_server_scores_with_the_weights_that_it_was_sent(temperature, home, address):
    """The teacher's own sequences, by server and trainer: at temperature 1, whatever is asked."""
    live = {"teacher_model_kind": "live", "use_teacher_server": True, "temperature": temperature}
    settings = {**TEACHERS["forward"], **live}
    trainer = served(FusedSDPOTrainer, SDPOConfig, home, address, **settings)
    move(trainer, 0.1)
    inputs = trainer._prepare_training_batch(list(trainer.train_dataset.select([0] * GROUP)))
    length = inputs["completion_ids"].size(1)
    scores = trainer._get_teacher_token_logprobs_from_server(inputs, length)
    ids, mask = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]
    own = logits.log_softmax(-1)
    kept = inputs["completion_mask"].bool()
    sampled = own.gather(-1, inputs["completion_ids"][..., None])[..., 0]
    assert float((scores["actual_logprobs"] - sampled)[kept].abs().max()) < 0.2
    entries = own.gather(-1, scores["topk_token_ids"])
    assert float((scores["topk_logprobs"] - entries)[kept].abs().max()) < 0.2


@pytest.mark.parametrize("method", ["SDPO", "RLCSD"])
def test_a_method_trains_on_the_servers_rollouts(method, home, address):
    pair = (getattr(ours, f"{method}{part}") for part in ("Trainer", "Config"))
    correction = {
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
    }
    settings = {**correction, "num_generations": GROUP}
    trainer = served(*pair, home, address, **settings)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 2
    for row in logged:
        assert 0 < row["sampling/sampling_logp_difference/mean"] < 0.2


def test_rollouts_follow_the_trainer_and_are_corrected_as_stock_does(home, address):
    settings = {
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 1.01,
    }
    stock = served(GRPOTrainer, GRPOConfig, home, address, **settings)
    fused = served(FusedGRPOTrainer, GRPOConfig, home, address, **settings)
    move(fused)
    move(stock)
    inputs = sample(fused)
    assert 1e-4 < gap(inputs) < 0.1
    assert_same(stock, fused, inputs)
    fused.train()
    assert fused.state.global_step == 2
