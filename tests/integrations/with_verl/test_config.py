"""The settings of a distillation loss: what they become, and what they are refused for."""

import pickle

import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from verl.workers.config import DistillationConfig, DistillationLossConfig

from fused_sd import (
    FULL_VOCABULARY,
    Comparison,
    Jsd,
    MixedKl,
    SkewKl,
    StudentTopK,
    TeacherNucleus,
    TeacherTopK,
    UnionTopK,
)
from fused_sd.integrations.verl.config import SUPPORTS, FusedSDLossConfig, require_own_config
from fused_sd.terms.divergence import DIVERGENCES
from fused_sd.terms.support import NAMED_SUPPORTS

RLSD = {"loss_mode": "fused_sd_rlsd", "use_task_rewards": False}


def test_hydra_makes_it_inside_verls_configuration():
    text = """
    _target_: verl.workers.config.DistillationConfig
    distillation_loss:
      _target_: fused_sd.integrations.verl.config.FusedSDLossConfig
      loss_mode: fused_sd_topk
      topk: 32
      use_task_rewards: true
      loss_max_clamp: null
      log_prob_min_clamp: null
      use_policy_gradient: false
      policy_loss_mode: vanilla
      clip_ratio: 0.2
      clip_ratio_low: 0.2
      clip_ratio_high: 0.2
      divergence: jsd
      beta: 0.25
      chunk_size: 64
    """
    config = instantiate(OmegaConf.create(yaml.safe_load(text)), _convert_="partial")
    assert isinstance(config, DistillationConfig)
    loss = config.distillation_loss
    assert require_own_config(loss) is loss
    assert (loss.topk, loss.beta, loss.chunk_size) == (32, 0.25, 64)
    assert (loss.loss_settings.use_topk, loss.loss_settings.use_estimator) == (True, False)


def test_it_travels_to_the_workers():
    config = FusedSDLossConfig(divergence="jsd", beta=0.3)
    assert pickle.loads(pickle.dumps(config)) == config
    assert OmegaConf.structured(FusedSDLossConfig).remainder == "tail"


@pytest.mark.parametrize(
    "settings, divergence",
    [
        ({}, "forward_kl"),
        ({"divergence": "reverse_kl"}, "reverse_kl"),
        ({"divergence": "jsd", "beta": 0.3}, Jsd(0.3)),
        ({"divergence": "mixed_kl", "forward_weight": 0.7}, MixedKl(0.7)),
        ({"divergence": "skew_kl", "divergence_parameter": 0.7}, SkewKl(0.7)),
        ({"divergence": "skew_kl"}, SkewKl()),
    ],
)
def test_the_divergence_is_the_librarys(settings, divergence):
    clips = {"remainder": "renormalize", "entry_clip": 0.5, "token_clip": 2.0}
    config = FusedSDLossConfig(**settings, topk=7, **clips)
    assert config.comparison == Comparison(divergence, TeacherTopK(7), **clips)
    assert config.comparison is config.comparison


def test_every_divergence_and_support_of_the_library_can_be_chosen():
    for divergence in DIVERGENCES:
        assert FusedSDLossConfig(divergence=divergence).comparison.term.name == divergence
    assert list(SUPPORTS.values()) == list(NAMED_SUPPORTS.values())
    nucleus = {"support": "teacher_nucleus", "topk": 7, "support_mass": 0.5}
    config = FusedSDLossConfig(teacher="live", **nucleus)
    assert config.comparison.support == TeacherNucleus(7, 0.5)


@pytest.mark.parametrize(
    "name, support",
    [
        ("full", FULL_VOCABULARY),
        ("student_topk", StudentTopK(7)),
        ("teacher_topk", TeacherTopK(7)),
        ("union_topk", UnionTopK(7)),
        ("teacher_nucleus", TeacherNucleus(7, 0.95)),
    ],
)
def test_a_teacher_in_the_training_process_is_compared_on_any_support(name, support):
    config = FusedSDLossConfig(teacher="ema", support=name, topk=7)
    assert config.comparison.support == support


def test_evidence_is_the_librarys():
    config = FusedSDLossConfig(**RLSD, rlsd_mix=0.3, rlsd_clip_low=0.1, rlsd_log_prob="old")
    evidence = config.to_evidence()
    assert (evidence.clip, evidence.mix, evidence.log_prob) == ((0.1, 0.2), 0.3, "old")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"divergence": "jsd", "beta": 1.0}, "beta must lie in the open interval"),
        ({"divergence": "mixed_kl", "forward_weight": 2.0}, "forward_weight must lie in"),
        ({"beta": 0.3}, "beta must be left as it is with divergence='forward_kl'"),
        ({"forward_weight": 0.3}, "forward_weight must be left as it is with divergence="),
        ({"divergence_parameter": 0.3}, "divergence_parameter must be left as it is with div"),
        ({"divergence": "skew_kl", "divergence_parameter": 1.0}, "student_weight must lie in"),
        ({"support_mass": 0.5}, "support_mass must be left as it is with support='teacher_topk'"),
        ({"support": "full"}, 'support must be "teacher_topk" with teacher="server"'),
        ({"support": "all", "teacher": "live"}, "support must be one of"),
        ({"teacher": "self"}, "teacher must be one of"),
        ({"ema_rate": 0.1}, "ema_rate must be left as it is with teacher='server'"),
        ({"teacher": "ema", "ema_rate": 2.0}, r"ema_rate must lie in \[0, 1\]"),
        ({"teacher": "ema", "trust_region_mix": 0.1}, "trust_region_mix must be left as it is"),
        ({"topk": None}, "topk must be an integer"),
        ({"remainder": "tails"}, "remainder must be one of"),
        (
            {"teacher": "live", "support": "full", "remainder": "drop"},
            "the full vocabulary leaves no remainder",
        ),
        (
            {"divergence": "reverse_kl", "remainder": "teacher_renormalize"},
            "gives a cross entropy",
        ),
        ({"remainder": "drop", "tail_floor": 1e-7}, "there is no tail bucket whose mass a floor"),
        ({"log_prob_min_clamp": -10.0}, "raised to a floor no longer sum to 1"),
        ({**RLSD, "log_prob_min_clamp": -10.0}, "log_prob_min_clamp must be left as it is with"),
        (
            {"remainder": "drop", "teacher": "live", "log_prob_min_clamp": -10.0},
            "log_prob_min_clamp must be left as it is with loss_mode=.*, teacher='live'",
        ),
        ({"remainder": "drop", "log_prob_min_clamp": 1.0}, "log_prob_min_clamp must be below 0"),
        ({"entry_clip": -1.0}, "entry_clip must be a finite number above 0"),
        ({"token_clip": 1.0, "loss_max_clamp": 2.0}, "token_clip must be a token's only upper"),
        ({"importance_cap": 0.0}, "importance_cap must be a finite number above 0"),
        ({"use_policy_gradient": True}, "its expected policy gradient is 0"),
        ({"use_chunked_topk": True}, "use_chunked_topk must be left as it is"),
        ({"rlsd_mix": 0.1}, "rlsd_mix must be left as it is with loss_mode='fused_sd_topk'"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1"),
        ({"loss_mode": "fused_sd_rlsd"}, "use_task_rewards must be False: RLSD holds the task's"),
        ({**RLSD, "use_policy_gradient": True}, "use_policy_gradient must be False: RLSD is a"),
        ({**RLSD, "loss_max_clamp": 10.0}, "loss_max_clamp must be null"),
        ({**RLSD, "clip_ratio": 0.1}, "clip_ratio must be left as it is"),
        ({**RLSD, "clip_ratio_low": 2.0}, "ratio_clip must be"),
        ({**RLSD, "rlsd_mix": 2.0}, "mix must lie in"),
        ({**RLSD, "rlsd_mix_decay_steps": -1}, "decay_steps must be an integer of at least 0"),
        ({**RLSD, "rlsd_log_prob": "new"}, "log_prob must be one of"),
        ({**RLSD, "rlsd_dual_clip": 1.0}, "dual_clip must be above 1"),
        ({**RLSD, "divergence": "jsd"}, "divergence must be left as it is with loss_mode="),
        ({"loss_mode": "k3", "remainder": "drop"}, "remainder must be left as it is"),
        ({"loss_mode": "k3", "teacher": "ema"}, 'teacher must be "server" with verl'),
        ({"loss_mode": "reverse_kl"}, "Unsupported loss mode"),
    ],
)
def test_wrong_settings_are_refused_with_a_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        FusedSDLossConfig(**settings)


def test_verls_own_losses_may_be_chosen_with_verls_settings():
    config = FusedSDLossConfig(loss_mode="forward_kl_topk", log_prob_min_clamp=-10.0, chunk_size=8)
    assert config.loss_settings.use_topk
    assert FusedSDLossConfig(loss_mode="k1", use_policy_gradient=True).loss_settings.use_estimator


def test_our_losses_need_our_settings():
    plain = DistillationLossConfig(loss_mode="fused_sd_topk", use_policy_gradient=False)
    with pytest.raises(ValueError, match=r"_target_=fused_sd\..*FusedSDLossConfig"):
        require_own_config(plain)
