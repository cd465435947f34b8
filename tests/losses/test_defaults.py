"""What a caller gets who passes tensors alone, and the keywords that a loss does not know."""

import pytest
import torch
from cases import make_case
from closeness import assert_close
from torch.nn import functional

import fused_sd
from fused_sd import checks, reference

ONCE_SUMMED = ["cross_entropy", "divergence", "topk_divergence", "policy", "sampled_kl"]
NAMED = ["sdpo", "sd_zero", "opsd", "sdft", "gkd", "grpo", "rlsd"]


def call(name, case, **options):
    """A loss of a case without any setting of its own, but for a small top-k."""
    sides = case.hidden, case.head, case.teacher_hidden, case.teacher_head
    sampled = case.hidden, case.head, case.token_ids
    ids = torch.arange(3).expand(7, 3)
    given = {
        "cross_entropy": (sampled, {}),
        "divergence": (sides, {}),
        "topk_divergence": ((case.hidden, case.head, ids, -torch.ones(7, 3)), {}),
        "policy": ((*sampled, torch.ones(7)), {}),
        "sampled_kl": (sampled, {"teacher_log_probs": case.old_log_probs}),
        "grpo": ((*sampled, torch.ones(7)), {}),
        "rlsd": ((*sampled, torch.ones(7)), {"teacher_log_probs": case.old_log_probs}),
        "rlcsd": (
            (*sampled, torch.ones(7), case.old_log_probs, case.old_log_probs[:, None] - 1),
            {},
        ),
    }
    tensors, settings = given.get(
        name, (sides, {"top_k": 4} if name in ("sdpo", "sd_zero") else {})
    )
    return getattr(fused_sd, f"{name}_loss")(*tensors, **settings, **options)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(checks, "_said", set())


@pytest.mark.filterwarnings("ignore:.*returns the mean over the tokens that count:UserWarning")
@pytest.mark.parametrize("name", [*ONCE_SUMMED, *NAMED])
def test_a_loss_is_the_mean_over_the_tokens_that_count(name):
    case = make_case()
    weights = torch.tensor([1.0, 0, 2, 1, 0, 0.5, 1], dtype=torch.float64)
    for given, divisor in (({}, 7), ({"token_weights": weights}, weights.sum())):
        total = call(name, case, reduction="sum", **given).loss
        assert_close(call(name, case, **given).loss, total / divisor, torch.float64)


def test_cross_entropy_is_torchs():
    case = make_case()
    ids = case.token_ids.clone()
    ids[2] = -100
    exact = functional.cross_entropy(reference.logits(case.hidden, case.weight), ids)
    with pytest.warns(UserWarning, match="^cross_entropy_loss returns the mean"):
        found = fused_sd.CrossEntropyLoss()(case.hidden, case.weight, ids).loss
    assert_close(found, exact, torch.float64)


@pytest.mark.parametrize("name", ONCE_SUMMED)
def test_a_default_that_was_a_sum_is_said_once_at_the_callers_line(name):
    case = make_case()
    with pytest.warns(
        UserWarning, match=f'^{name}_loss returns the mean .*reduction="sum"'
    ) as caught:
        call(name, case)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    call(name, case)


@pytest.mark.parametrize("name", [*NAMED, "rlcsd"])
def test_a_default_that_has_not_changed_is_not_said(name):
    call(name, make_case())


@pytest.mark.parametrize("name", [*ONCE_SUMMED, *NAMED])
def test_an_unknown_keyword_is_refused_by_the_function_that_was_called(name):
    with pytest.raises(TypeError, match=rf"^{name}_loss\(\) got an unknown keyword 'topk'"):
        call(name, make_case(), topk=5)


def test_a_setting_of_another_loss_is_refused_too():
    for name, setting in {"sdpo": "divergence", "gkd": "support", "grpo": "kl_estimator"}.items():
        with pytest.raises(TypeError, match=rf"^{name}_loss\(\) got an unknown keyword"):
            call(name, make_case(), **{setting: "forward_kl"})


def test_a_module_takes_its_settings_by_name():
    with pytest.raises(TypeError, match=r"SDPOLoss takes settings by keyword, got \(0.5,\)"):
        fused_sd.SDPOLoss(0.5)


def test_weights_of_tokens_that_do_not_count_may_hold_anything():
    """What lies behind a mask is not looked at: padding has no log-probability."""
    case = make_case()
    weights = torch.tensor([1.0, 0, 1, 1, 1, 1, 1])
    old = case.old_log_probs.clone()
    old[1] = torch.nan
    tokens = case.hidden, case.head, case.token_ids, torch.ones(7)
    assert fused_sd.grpo_loss(*tokens, old_log_probs=old, token_weights=weights).loss.isfinite()
    ids = case.token_ids.clone()
    ids[1], weights[1] = -100, torch.nan
    given = {"token_weights": weights, "reduction": "mean"}
    assert fused_sd.cross_entropy_loss(case.hidden, case.head, ids, **given).loss.isfinite()


def test_an_unknown_keyword_is_refused_by_the_loss_that_was_called():
    case = make_case()
    sides = case.hidden, case.head, case.teacher_hidden, case.teacher_head
    for name in ("gkd_loss", "sdft_loss", "opsd_loss", "divergence_loss"):
        message = rf"^{name}\(\) got an unknown keyword 'weights': beside its own it takes token_w"
        with pytest.raises(TypeError, match=message):
            getattr(fused_sd, name)(*sides, weights=None)
