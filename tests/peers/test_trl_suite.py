"""The comparison with TRL's own tests: what it lets pass, and that it sees a loss 2 % too large."""

import pytest

pytest.importorskip("trl")

import suites
import trl_suite

SAMPLE = """
from datasets import load_dataset
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer


def test_train(tmp_path):
    trainer = SDPOTrainer(
        model="trl-internal-testing/tiny-Qwen2ForCausalLM-2.5",
        reward_funcs=lambda completions, **_: [float(len(c)) % 3 for c in completions],
        args=SDPOConfig(
            str(tmp_path),
            per_device_train_batch_size=3,
            num_generations=3,
            max_completion_length=8,
            max_steps=2,
            logging_steps=1,
            include_environment_feedback=False,
            success_reward_threshold=1.0,
            teacher_model_kind="live",
            report_to="none",
        ),
        train_dataset=load_dataset(
            "trl-internal-testing/zen", "standard_prompt_only", split="train"
        ),
    )
    trainer.train()


def test_fails():
    raise RuntimeError("here as there")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with stand-ins and one file of tests."""
    checkout, made = (tmp_path_factory.mktemp(name) for name in ("checkout", "work"))
    (checkout / "tests").mkdir()
    (checkout / "tests" / "test_sample.py").write_text(SAMPLE)
    trl_suite.prepared(checkout, made)
    return made


@pytest.fixture(scope="module")
def stock(folder):
    return suites.run(trl_suite.SUITE, "tests/test_sample.py", folder, swap=False)


def test_our_trainer_logs_what_trls_does(folder, stock):
    ours = suites.run(trl_suite.SUITE, "tests/test_sample.py", folder, swap=True)
    found = suites.compare("tests/test_sample.py", stock, ours)
    assert found.stock == found.ours == {"passed": 1, "failed": 1}
    assert found.values > 10
    assert found.worst <= 1
    assert not found.lost + found.differ
    assert found.failing == ["test_fails: E   RuntimeError: here as there"]
    assert found.answered >= 4  # student and teacher in two steps
    assert found.counts[0]["logits"] >= 4
    assert found.counts[1]["logits"] == 0


def test_a_wrong_loss_is_seen(folder, stock):
    wrong = suites.run(trl_suite.SUITE, "tests/test_sample.py", folder, swap=True, scale=1.02)
    found = suites.compare("tests/test_sample.py", stock, wrong)
    assert found.ours["passed"] == 1  # a test that asks for no value passes
    assert any(" loss[" in line for line in found.differ)
    assert any(" compute_loss[0]" in line for line in found.differ)
    assert any(" gradient[" in line for line in found.differ)


def test_a_lost_test_and_a_missing_value_are_told():
    line = {"outcome": "passed", "logged": [{"loss": 1.0}], "values": 0, "worst": 0.0}
    line |= {"ours": 1, "counts": {}}
    stock = {"f::a": line, "f::b": line}
    ours = {"f::a": line | {"logged": [{}]}, "f::b": line | {"outcome": "failed", "why": "no"}}
    found = suites.compare("f", stock, ours)
    assert found.differ == ["a: loss is not logged"]
    assert found.lost == ["b: no"]
