"""verl's vocabulary-parallel KL, which holds every rank's logits, and the library's agree."""

import pytest

pytest.importorskip("megatron.core")

import megatron_worker


@pytest.mark.parametrize("floor", megatron_worker.FLOORS)
def test_forward_kl_on_the_teachers_topk_is_verls(floor):
    for differences in megatron_worker.results()[f"oracle, {floor}"]:
        assert isinstance(differences, dict), differences
        assert {"loss", "dhidden", "dweight"} <= set(differences)
        # verl forms probabilities in float32 and subtracts logits from their log-sum-exp
        assert max(differences.values()) < 2e-6, differences
