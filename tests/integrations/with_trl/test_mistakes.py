"""Mistakes that a stranger makes with the trainers, and what the answer says."""

import pytest

pytest.importorskip("trl")

import trl
from method_pairs import DATA, model, rewards
from trl.experimental.sdpo import SDPOConfig as StockSDPOConfig
from trl_pairs import TOKENIZER

from fused_sd import checks
from fused_sd.integrations import trl as ours

CPU = {"use_cpu": True, "bf16": False, "report_to": []}
SMALL = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4}


def config(folder, method="SDPO", **settings):
    return getattr(ours, f"{method}Config")(str(folder), **{**CPU, **SMALL, **settings})


def srt(folder, traces, args=None):
    args = args or ours.SRTConfig(str(folder), **CPU)
    return ours.SRTTrainer(model(), args, traces, processing_class=TOKENIZER)


def collect(folder, dataset, generate=lambda prompts: [[1]] * len(prompts), **settings):
    return ours.collect_traces(
        generate, dataset, rewards, TOKENIZER, folder / "traces.jsonl", **settings
    )


def other_column():
    return DATA.rename_column("prompt", "question")


# name: what is asked for, and what the answer says
REFUSED = {
    "TRL's configuration of the same name": (
        lambda f: ours.SDPOTrainer(model(), rewards, StockSDPOConfig(str(f), **CPU, **SMALL), DATA),
        r"args must be a fused_sd.integrations.trl.sdpo.SDPOConfig for SDPOTrainer, got "
        r"trl.experimental.sdpo.sdpo_config.SDPOConfig; pass args=SDPOConfig\(...\)",
    ),
    "our configuration for TRL's trainer": (
        lambda f: ours.FusedSDPOTrainer(model(), rewards, config(f), DATA),
        "args must be TRL's configuration for FusedSDPOTrainer, got fused_sd.integrations.trl.sdpo",
    ),
    "data in the place of the configuration": (
        lambda f: ours.OPSDTrainer(model(), None, DATA),
        "args must be a .*OPSDConfig for OPSDTrainer, got datasets.arrow_dataset.Dataset; pass",
    ),
    "a configuration in the place of rewards": (
        lambda f: ours.SDPOTrainer(model(), config(f), DATA),
        "args must be a .*SDPOConfig for SDPOTrainer, got datasets.arrow_dataset.Dataset",
    ),
    "questions under another name": (
        lambda f: ours.SDPOTrainer(model(), rewards, config(f), other_column()),
        "train_dataset must have a column prompt for SDPOTrainer, .*got columns question.*; rename",
    ),
    "questions under another name, for TRL's trainer": (
        lambda f: ours.FusedGRPOTrainer(
            model(),
            rewards,
            trl.GRPOConfig(str(f), **CPU, **SMALL),
            other_column(),
            processing_class=TOKENIZER,
        ),
        "train_dataset must have a column prompt for FusedGRPOTrainer",
    ),
    "questions under another name, for traces": (
        lambda f: collect(f, [{"question": "a"}]),
        "dataset must have a column prompt for collect_traces, .*got columns question",
    ),
    "a function in the place of questions": (
        lambda f: collect(f, rewards),
        "dataset must be a list of rows, got a function; pass generate, dataset, reward_func",
    ),
    "a trainer's configuration for traces": (
        lambda f: collect(f, [{"prompt": "a"}], config=config(f)),
        "config must be a TraceConfig, got SDPOConfig",
    ),
    "SFT's configuration for SRT": (
        lambda f: srt(f, [], trl.SFTConfig(str(f), **CPU)),
        "args must be a .*SRTConfig for SRTTrainer, got trl.trainer.sft_config.SFTConfig",
    ),
    "a dataset for SRT": (
        lambda f: srt(f, DATA),
        "traces must be a list of Trace, got a dict in place 0 of a Dataset; pass load_traces",
    ),
    "a path for SRT": (lambda f: srt(f, "a.jsonl"), "traces must be a list of Trace, got a str"),
    "all that load_traces returns": (
        lambda f: srt(f, ([], None)),
        "traces must be a list of Trace, got a list in place 0 of a tuple",
    ),
    "alpha": (
        lambda f: config(f, distillation_alpha=2),
        r"distillation_alpha must lie in \[0, 1\], got 2",
    ),
    "alpha by name": (
        lambda f: config(f, distillation_alpha="forward"),
        r"distillation_alpha must lie in \[0, 1\], got 'forward'",
    ),
    "no entries": (
        lambda f: config(f, distillation_topk=0),
        "distillation_topk must be an integer of at least 1, got 0",
    ),
    "a mode": (
        lambda f: config(f, distillation_mode="top_k"),
        "distillation_mode must be one of 'sampled_token', .*got 'top_k'",
    ),
    "a weight": (
        lambda f: config(f, distillation_weight=2.0),
        r"distillation_weight must lie in \[0, 1\], got 2.0",
    ),
    "a cap": (
        lambda f: config(f, distillation_is_clip=-1),
        "distillation_is_clip must be .*above 0, got -1; pass None for no bound",
    ),
    "a floor": (lambda f: config(f, tail_floor=-1.0), "tail_floor must be .*above 0, got -1.0"),
    "a clip": (
        lambda f: config(f, "OPSD", num_generations=1, entry_clip=-1),
        "entry_clip must be .*above 0, got -1",
    ),
    "one bound": (
        lambda f: config(f, "RLSD", evidence_clip=0.2),
        "evidence_clip must hold two numbers, the lower and the upper, got 0.2",
    ),
    "a rate": (
        lambda f: config(f, teacher_update_rate=2.0),
        r"teacher_update_rate must lie in \[0, 1\], got 2.0",
    ),
    "no steps": (
        lambda f: config(f, teacher_sync_steps=0),
        "teacher_sync_steps must be an integer of at least 1, got 0",
    ),
    "maps": (
        lambda f: config(f, credit_map_steps=-1),
        "credit_map_steps must be .*at least 0, got -1; 0 writes none",
    ),
    "a template": (
        lambda f: config(f, reprompt_template=3),
        "reprompt_template must be a text, got int; write one with {prompt}",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_answered_with_the_remedy(name, tmp_path):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_trls_top_k_is_of_the_sampling_and_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "_said", set())
    with pytest.warns(UserWarning, match="top_k=20 is TRL's, .* 100 entries, which distillation_t"):
        config(tmp_path, top_k=20)
    config(tmp_path, top_k=20)
    monkeypatch.setattr(checks, "_said", set())
    config(tmp_path, top_k=20, distillation_topk=20)
    config(tmp_path, "OPSD", num_generations=1)  # its own top_k is 20
