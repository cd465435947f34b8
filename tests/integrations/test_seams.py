"""What the integration relies on inside TRL and transformers, by name.

A method that is overridden, or whose result is taken apart, is compared with what it was when the
integration was last checked against it: its syntax tree without docstring, comments and formatting.
A difference says where to look, not that something is broken.  Once it is understood,

    PYTHONPATH=.:tests/support python tests/integrations/test_seams.py --record

adds the installed version to ``seams.json``.
"""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest

for _package in ("trl", "transformers", "peft"):
    pytest.importorskip(_package)

import torch
from seam_record import compare, outline, overridden, record, seen
from tiny_models import random_ids, tiny_model
from torch.utils._pytree import tree_leaves
from transformers.utils import ModelOutput

from fused_sd.integrations import trl as integration
from fused_sd.integrations.transformers import Request, attach, hidden_states

RECORD = Path(__file__).with_name("seams.json")
SDPO, SDFT = "trl.experimental.sdpo.sdpo_trainer", "trl.experimental.sdft.sdft_trainer"
UPSTREAM = ("trl.", "transformers.")
# beside those that are overridden, which are found
TRAINER_METHODS = (
    "__init__",
    "_calculate_rewards",
    "_compute_policy_loss",
    "_compute_rollout_logps",
    "_compute_self_distillation_loss",
    "_compute_server_distillation_loss",
    "_compute_teacher_student_logits",
    "_dispatch_self_distillation_callback",
    "_forward_logits",
    "_get_teacher_context_for_self_distillation",
    "_get_teacher_token_logprobs_from_server",
    "_log_self_distillation_metric",
    "_prepare_inputs",
    "_prepare_training_batch",
    "_record_completion_metrics",
    "_setup_teacher_model",
    "_use_peft_ema_teacher_adapter",
    "compute_loss",
    "sample_rollouts",
)
ABSENT = {"SDFTTrainer._calculate_rewards", "SDFTTrainer._compute_policy_loss"}
RELIED_ON = {
    **{f"SDPOTrainer.{name}": SDPO for name in TRAINER_METHODS},
    **{f"SDFTTrainer.{name}": SDFT for name in TRAINER_METHODS},
    "GRPOConfig.__post_init__": "trl.trainer.grpo_config",
    "GRPOTrainer._compute_loss": "trl.trainer.grpo_trainer",
    "GRPOTrainer._generate": "trl.trainer.grpo_trainer",
    "split_pixel_values_by_grid": "trl.trainer.utils",
    "unsplit_pixel_values_by_grid": "trl.trainer.utils",
    "SuccessfulRolloutTeacherContextBuilder.build": SDPO,
    "DemonstrationTeacherContextBuilder.build": SDFT,
    "DistillationLogits": SDPO,
    "add_tail_bucket": "trl.experimental.sdpo.loss_utils",
    "apply_importance_sampling_clipping": "trl.experimental.sdpo.loss_utils",
    "compute_divergence": "trl.experimental.sdpo.loss_utils",
    "PEFTAdapterEMACallback": "trl.experimental.sdpo.teacher_sync",
    "SyncTeacherModelCallback": "trl.experimental.sdpo.teacher_sync",
    "SFTTrainer.compute_loss": "trl.trainer.sft_trainer",
    "find_packed_sequence_indices": "transformers.masking_utils",
}


def seams():
    """Name and code of everything that is relied on, or overridden in a trainer of ours."""
    found = {name: find(module, name) for name, module in RELIED_ON.items() if name not in ABSENT}
    for trainer in vars(integration).values():
        if inspect.isclass(trainer) and trainer.__module__.startswith("fused_sd"):
            found.update(overridden(trainer, UPSTREAM))
    return found


def find(module, name):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    return found


@pytest.mark.parametrize("name", sorted({*RELIED_ON, *seen(RECORD), *seams()} - ABSENT))
def test_upstream_is_as_it_was(name):
    compare(name, seams, RECORD)


def sample(first, second):
    """Two comments, for the test below."""
    # one
    return {"a": first, **second}


def test_only_code_counts():
    source = inspect.getsource(sample)
    bare = "def sample(first,\n  second):\n    return { 'a' : first, ** second }"
    assert outline(ast.parse(source)) == outline(ast.parse(bare))
    assert outline(ast.parse(bare)) != outline(ast.parse(bare.replace("'a'", "'b'")))
    assert outline(ast.parse(bare)) != outline(ast.parse(bare.replace("second)", "second=0)")))
    assert outline(ast.parse("x = None")) != outline(ast.parse("x = 0"))


def test_a_changed_method_fails_by_name(monkeypatch):
    name = "SDPOTrainer.compute_loss"
    monkeypatch.setitem(RELIED_ON, name, __name__)
    monkeypatch.setattr(sys.modules[__name__], "find", lambda module, name: sample)
    monkeypatch.setattr(sample, "__module__", "trl")
    monkeypatch.setattr(sys.modules[__name__], "overridden", lambda trainer, upstream: {})
    with pytest.raises(AssertionError, match=r"SDPOTrainer\.compute_loss changed"):
        test_upstream_is_as_it_was(name)


def test_a_method_that_is_gone_fails_by_name(monkeypatch):
    monkeypatch.setitem(RELIED_ON, "SDPOTrainer.former", SDPO)
    with pytest.raises(pytest.fail.Exception, match=r"SDPOTrainer\.former is gone"):
        test_upstream_is_as_it_was("SDPOTrainer.former")


def test_overridden_methods_are_found():
    assert "SDPOTrainer._forward_logits" in overridden(integration.FusedSDPOTrainer, UPSTREAM)
    assert "SDFTTrainer._forward_logits" in overridden(integration.FusedSDFTTrainer, UPSTREAM)
    assert not overridden(int, UPSTREAM)


def test_a_model_calls_the_module_of_its_output_embeddings():
    model, ids, entered = tiny_model("Llama"), random_ids(2, 5), []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, args, output: entered.append((args[0], output)))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    handle.remove()
    assert torch.equal(entered[0][1], logits)
    states = entered[0][0]
    assert head.weight.shape == (model.config.get_text_config().vocab_size, states.size(-1))


def test_a_model_calls_the_forward_that_it_is_given():
    model = tiny_model("Llama")
    model.forward = lambda **kwargs: kwargs
    assert model(fused_sd=1) == {"fused_sd": 1}


def test_a_model_output_shows_its_tensors_to_wrappers():
    output = attach(tiny_model())(input_ids=random_ids(1, 4), fused_sd=Request(hidden_states))
    assert isinstance(output, ModelOutput)
    assert any(leaf is output.result for leaf in tree_leaves(output))


def test_positions_that_start_again_separate_sequences():
    from transformers.masking_utils import find_packed_sequence_indices

    found = find_packed_sequence_indices(torch.tensor([[0, 1, 2, 0, 0, 1]]))
    assert found.tolist() == [[0, 0, 0, 1, 2, 2]]
    assert find_packed_sequence_indices(torch.tensor([[0, 1, 2]])) is None


def test_accelerate_keeps_the_forward_that_it_wraps_where_attach_looks():
    accelerate = pytest.importorskip("accelerate")
    assert "_original_forward" in inspect.getsource(accelerate.Accelerator.prepare_model)
    linear = accelerate.cpu_offload(torch.nn.Linear(2, 2))
    assert linear._old_forward.__func__ is torch.nn.Linear.forward
    assert hasattr(linear, "_hf_hook")


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit("the only argument is --record")
    record(seams(), RECORD)
