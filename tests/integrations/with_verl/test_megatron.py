"""verl's Megatron engine: with the losses in place of the output layer it trains as with logits.

Megatron-Core 0.18 calls an output processor; with an older one, which is refused, the tests' own
model calls it as 0.18 does.
"""

import functools
import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")

import megatron_models
import megatron_worker
from verl.models.mcore import model_forward_fused

from fused_sd.integrations.verl import doctor, plugin
from fused_sd.integrations.verl.megatron_engine import FusedSDMegatronEngine
from fused_sd.integrations.verl.megatron_output import OutputProcessor

FLOAT32 = 1e-6  # verl's path forms probabilities in float32, of float64 states too
FLOAT64 = 1e-12


def found(name):
    """On both ranks."""
    both = megatron_worker.results()[name]
    for one in both:
        assert isinstance(one, dict), one
    return both


@pytest.mark.parametrize("layout", megatron_worker.LAYOUTS)
def test_losses_and_every_gradient_are_those_of_verls_path_with_logits(layout):
    for differences in found(f"training, {layout}"):
        assert len(differences) == 3
        assert max(differences.values()) < FLOAT32, differences


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("objective", megatron_worker.OBJECTIVES)
def test_the_output_processor_has_values_and_gradients_of_the_whole_vocabulary(
    objective, sequence_parallel
):
    for differences in found(f"processor, {objective}, {sequence_parallel}"):
        assert {"loss", "log_probs", "entropy", "dhidden", "dweight"} == set(differences)
        assert max(differences.values()) < FLOAT64, differences


def test_training_on_a_shared_vocabulary_is_training_on_a_whole_one():
    for differences in found("sharded objective"):
        assert {"losses", "rows", "norm"} == set(differences)
        assert max(differences.values()) < FLOAT64, differences


def test_inference_has_log_probs_and_entropy_of_the_tokens_that_count():
    for differences in found("inference"):
        assert max(differences["log_probs"], differences["entropy"]) < FLOAT32, differences


def test_verls_output_processor_is_back_after_a_step_and_after_an_error():
    for differences in found("inference"):
        assert differences["restored"] == [True, True, True]


def process(**special):
    layer, weight = special.pop("layer", None), torch.randn(8, 4)
    hook = {
        "hidden_states": torch.randn(3, 1, 4),
        "output_layer": layer,
        "output_weight": weight,
        "labels": torch.zeros(1, 3, dtype=torch.long),
        "context": SimpleNamespace(temperature=1.0),
        "config": SimpleNamespace(sequence_parallel=False, defer_embedding_wgrad_compute=False),
    }
    return OutputProcessor(lambda packed: packed, torch.ones(1, 3), 8)(**{**hook, **special})


def column_parallel(bias=None):
    layer = object.__new__(megatron_models.ColumnParallelLinear)
    torch.nn.Module.__init__(layer)
    layer.bias, layer.tp_group = bias, SimpleNamespace(size=lambda: 1)
    return layer


def test_log_probs_are_the_only_column_where_nothing_else_is_asked_for():
    output = process(layer=column_parallel())
    assert output.log_probs.shape == (1, 3, 1)
    assert output.entropy is None


def test_a_bias_and_the_scale_of_the_logits_are_in_the_log_probs():
    states, weight, bias = torch.randn(3, 1, 4), torch.randn(8, 4), torch.randn(8)
    output = process(
        layer=column_parallel(bias),
        hidden_states=states,
        output_weight=weight,
        scale_logits=lambda logits: 0.5 * logits,
    )
    expected = (0.5 * (states[:, 0] @ weight.t() + bias)).log_softmax(-1)[:, 0]
    torch.testing.assert_close(output.log_probs[0, :, 0], expected)


def test_an_output_layer_that_does_more_than_a_product_is_refused():
    class Capped(megatron_models.ColumnParallelLinear):
        def forward(self, *args, **kwargs):
            raise AssertionError

    with pytest.raises(ValueError, match=r"output_layer must be Megatron's.*got .*Capped"):
        process(layer=object.__new__(Capped))


def test_a_deferred_gradient_of_the_embeddings_is_refused():
    config = SimpleNamespace(sequence_parallel=False, defer_embedding_wgrad_compute=True)
    with pytest.raises(ValueError, match="defer_embedding_wgrad_compute must be off"):
        process(layer=column_parallel(), config=config)


def test_tensors_of_another_length_than_the_labels_are_refused():
    labels = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"be packed as the labels \(1, 4\), got \(1, 3\)"):
        process(layer=column_parallel(), labels=labels, hidden_states=torch.randn(4, 1, 4))


class Model(torch.nn.Module):
    """One without Megatron's hook."""

    config = SimpleNamespace(context_parallel_size=1)


def test_a_model_without_the_hook_is_refused():
    with pytest.raises(ValueError, match=r"take Megatron-Core's output_processor, got Model"):
        megatron_models.engine(FusedSDMegatronEngine, Model(), fused=True)


def test_settings_for_which_verl_would_drop_the_fused_forward_are_refused():
    with pytest.raises(ValueError, match=r"impl_backend=fused_sd must .* got .*mtp.enable=True"):
        megatron_models.engine(FusedSDMegatronEngine, Model(), fused=True, mtp=True)


@pytest.mark.parametrize("fused, backend", [(False, "fused_sd"), (True, "torch")])
def test_without_being_asked_for_the_step_is_verls(fused, backend, monkeypatch):
    engine = megatron_models.engine(FusedSDMegatronEngine, Model(), fused=fused, backend=backend)
    verls = megatron_models.MegatronEngineWithLMHead
    monkeypatch.setattr(verls, "forward_step", lambda self, *given: given)
    given = (object(), object(), object(), object())
    assert engine.forward_step(*given) == given


def test_a_teacher_in_the_training_process_is_refused():
    engine = megatron_models.engine(FusedSDMegatronEngine, Model(), fused=False)
    config = SimpleNamespace(distillation_loss={"teacher": "ema"})
    loss = functools.partial(print, distillation_config=config)
    batch = megatron_models.batch(fused=True, policy=False)
    with pytest.raises(ValueError, match=r"teacher must be \"server\" with Megatron"):
        engine._output_processor(batch, Model(), loss)


@pytest.mark.parametrize("has_hook", [False, True])
def test_the_doctor_tells_of_a_megatron_without_the_hook(has_hook, monkeypatch):
    name = "_supports_output_processor_hook"
    monkeypatch.setattr(model_forward_fused, name, lambda model: has_hook)
    monkeypatch.setattr(plugin, "STATUS", {"megatron": plugin.REGISTERED})
    parts = doctor._parts(loaded_by_verl=True)
    told = [found.value for found in parts if found.name == "megatron, fused"]
    assert len(told) == (0 if has_hook else 1)
    assert all(re.match(r"off: megatron-core must be >=0\.18.* got \d", reason) for reason in told)
