"""Self-Revision Training: masks, terms against plain log-softmax, steps, stages, adapters."""

import copy
import dataclasses
import inspect
import os
from types import SimpleNamespace

import pytest
import torch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import accelerate
import peft
import transformers
from closeness import assert_close
from tiny_models import random_ids, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_pairs import TOKENIZER, VOCAB

from fused_sd.integrations.examples import sd_zero_phase1 as example
from fused_sd.integrations.shared.chat_format import recorded_chat_format
from fused_sd.integrations.trl.generators import transformers_generate
from fused_sd.integrations.trl.revise import TraceConfig
from fused_sd.integrations.trl.srt import SRTConfig, SRTTrainer
from fused_sd.integrations.trl.srt_data import TraceCollator, sft_dataset, trace_dataset
from fused_sd.integrations.trl.srt_stages import sequential_srt, split_traces
from fused_sd.integrations.trl.traces import Trace, load_traces

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
EOS = TOKENIZER.eos_token_id


def trace(seed, initial=4, revision=5, correct=False, prompt=3):
    """A trace of random tokens."""
    tokens = random_ids(prompt + initial + 2 + revision, vocab=VOCAB, seed=seed).tolist()
    parts = torch.tensor(tokens).split([prompt, initial, 2, revision])
    prompt_ids, initial_ids, verdict_ids, revision_ids = (tuple(p.tolist()) for p in parts)
    return Trace(
        seed, "?", prompt_ids, initial_ids, "!", verdict_ids, revision_ids, correct, 0.0, 1.0
    )


# lengths that differ, so that a mean of means is not the mean
TRACES = [trace(1, 4, 5), trace(2, 0, 9, correct=True), trace(3, 7, 1), trace(4, 2, 3, prompt=6)]


def trainer(tmp_path, traces=TRACES, *, model=None, **settings):
    """A trainer of a tiny model in float64, and other arguments than settings by their name."""
    torch.manual_seed(0)
    arguments = {k: settings.pop(k) for k in ("peft_config", "eval_dataset") if k in settings}
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
    }
    model = new_model() if model is None else model
    args = SRTConfig(**{**defaults, **settings})
    return SRTTrainer(model, args, traces, processing_class=TOKENIZER, **arguments)


def new_model():
    torch.manual_seed(0)
    return tiny_model(vocab=VOCAB, max_position_embeddings=128, spread=0.1).double()


def plain_terms(model, traces):
    """L_gen and L_rev by their definitions, one trace at a time, without a batch or a mask."""
    sums, counts = {"generation": 0.0, "revision": 0.0}, {"generation": 0, "revision": 0}
    for item in traces:
        tokens = torch.tensor([item.input_ids])
        log_probs = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        chosen = log_probs.gather(-1, tokens[0, 1:, None])[:, 0]
        for name, start in (
            ("generation", len(item.prompt_ids)),
            ("revision", len(item.prompt_ids + item.initial_ids + item.verdict_ids)),
        ):
            sums[name] = sums[name] - chosen[start - 1 :].sum()
            counts[name] += len(item.input_ids) - start
    return {name: sums[name] / counts[name] for name in sums}


def plain_loss(model, traces, objective):
    terms = plain_terms(model, traces)
    return sum(terms.values()) if objective == "joint" else terms[objective]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_masks_are_the_assistants_turn_and_the_revision():
    rows = list(trace_dataset([trace(1, 2, 3), trace(2, 0, 1, correct=True)]))
    batch = TraceCollator(pad_to_multiple_of=4)(rows)
    first = list(trace(1, 2, 3).input_ids)
    assert batch["input_ids"][0].tolist() == first + [0] * 2
    assert batch["attention_mask"].tolist() == [[1] * 10 + [0] * 2, [1] * 6 + [0] * 6]
    assert batch["generation_mask"].tolist() == [
        [0] * 3 + [1] * 7 + [0] * 2,
        [0] * 3 + [1] * 3 + [0] * 6,
    ]
    assert batch["revision_mask"].tolist() == [
        [0] * 7 + [1] * 3 + [0] * 2,
        [0] * 5 + [1] + [0] * 6,
    ]
    assert batch["corrected"].tolist() == [True, False]


@pytest.mark.parametrize("objective", ["joint", "generation", "revision"])
def test_loss_and_gradient_are_those_of_the_definition(tmp_path, objective):
    ours = trainer(tmp_path, objective=objective, gradient_checkpointing=False)
    batch = next(iter(ours.get_train_dataloader()))
    ours.model.train()
    loss = ours.compute_loss(ours.model, batch)
    loss.backward()
    got = gradients(ours.model)
    model = new_model()
    reference = plain_loss(model, TRACES, objective)
    reference.backward()
    assert_close(loss, reference, torch.float64, "loss")
    wanted = gradients(model)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(got[name], gradient, torch.float64, name)


def train_once(tmp_path, batch, accumulate, traces=TRACES):
    """Weights after one step of SGD, and what was logged."""
    ours = trainer(
        tmp_path,
        traces,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=0.5,
        warmup_steps=0,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        gradient_checkpointing=False,
    )
    ours.train()
    assert ours.state.global_step == 1
    return dict(ours.model.named_parameters()), ours.state.log_history[0]


@pytest.mark.parametrize("batch, accumulate", [(4, 1), (2, 2), (1, 4)])
def test_a_step_is_the_same_however_it_is_accumulated(tmp_path, batch, accumulate):
    assert_one_step(*train_once(tmp_path, batch, accumulate))


def assert_one_step(weights, logged):
    """The step of plain gradient descent on the definition, and its numbers in the log."""
    model = new_model()
    terms = plain_terms(model, TRACES)
    sum(terms.values()).backward()
    for name, parameter in model.named_parameters():
        assert_close(weights[name], parameter - 0.5 * parameter.grad, torch.float64, name)
    assert logged["loss"] == pytest.approx(sum(terms.values()).item(), rel=1e-6)
    assert logged["generation_loss"] == pytest.approx(terms["generation"].item(), rel=1e-9)
    assert logged["revision_loss"] == pytest.approx(terms["revision"].item(), rel=1e-9)
    assert logged["corrected_fraction"] == 0.75
    assert logged["num_tokens"] == sum(len(item.input_ids) for item in TRACES)


def test_the_revisions_objective_logs_no_loss_of_tokens_it_did_not_score(tmp_path):
    ours = trainer(tmp_path, objective="revision", max_steps=1)
    ours.train()
    logged = ours.state.log_history[0]
    assert "generation_loss" not in logged
    assert logged["revision_loss"] == pytest.approx(logged["loss"], rel=1e-6)


def test_evaluation_measures_the_terms_on_traces_held_out(tmp_path):
    held_out = [trace(9, 3, 4), trace(10, 1, 6)]
    ours = trainer(tmp_path, eval_dataset=held_out, per_device_eval_batch_size=1)
    found = ours.evaluate()
    terms = plain_terms(new_model(), held_out)
    for name, value in terms.items():
        assert found[f"eval_{name}_loss"] == pytest.approx(value.item(), rel=1e-9)
    again = ours.evaluate(held_out[:1])  # traces given on the spot
    terms = plain_terms(new_model(), held_out[:1])
    assert again["eval_loss"] == pytest.approx(sum(terms.values()).item(), rel=1e-6)


@pytest.mark.parametrize("adapted", [False, True])
def test_training_lowers_both_terms(tmp_path, adapted):
    adapter = {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"])}
    ours = trainer(
        tmp_path,
        max_steps=12,
        learning_rate=0.02,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **(adapter if adapted else {}),
    )
    ours.train()
    first, *_, last = (log for log in ours.state.log_history if "loss" in log)
    for name in ("generation_loss", "revision_loss"):
        assert last[name] < 0.9 * first[name], name
    for name, parameter in ours.model.named_parameters():
        assert parameter.requires_grad == (not adapted or "lora" in name)


@pytest.mark.parametrize("objective", ["joint", "revision"])
def test_a_sparse_gradient_is_near_the_definitions_and_says_how_near(tmp_path, objective):
    settings = {"gradient": "sparse", "gradient_tolerance": 2**-6, "gradient_checkpointing": False}
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ours = trainer(tmp_path, objective=objective, max_steps=1, **settings, **halves)
    found = []
    ours.optimizer = torch.optim.SGD(ours.model.parameters(), lr=1.0)
    ours.optimizer.register_step_pre_hook(lambda *_: found.append(gradients(ours.model)))
    ours.train()
    model = new_model()
    plain_loss(model, TRACES, objective).backward()
    wanted = gradients(model)
    error = sum((found[0][name] - g).square().sum() for name, g in wanted.items()) ** 0.5
    assert 0 < error < 2**-6 * sum(g.square().sum() for g in wanted.values()) ** 0.5
    logged = ours.state.log_history[0]
    assert 0 < logged["gradient_entries"] < VOCAB
    assert logged["gradient_dense_fraction"] == 0
    assert 0 < logged["gradient_dropped_fraction"] <= 2**-6


def test_an_adapters_gradient_is_that_of_the_definition(tmp_path):
    torch.manual_seed(3)
    model = peft.get_peft_model(new_model(), peft.LoraConfig(r=2, target_modules=["v_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    plain_loss(model, TRACES, "joint").backward()
    wanted = gradients(model)
    model.zero_grad()
    ours = trainer(tmp_path, model=model, gradient_checkpointing=False)
    ours.compute_loss(ours.model, next(iter(ours.get_train_dataloader()))).backward()
    got = gradients(model)
    assert wanted
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(got[name], gradient, torch.float32, name)  # PEFT keeps adapters in fp32


def test_long_traces_are_left_out_with_their_number_and_never_cut(tmp_path):
    with pytest.warns(UserWarning, match="2 of 4 traces are longer than max_length=13"):
        ours = trainer(tmp_path, max_length=13)
    assert [row["input_ids"] for row in ours.train_dataset] == [
        list(item.input_ids) for item in TRACES if len(item.input_ids) <= 13
    ]


def test_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(ValueError, match="hold one of at most max_length tokens, got 0 traces"):
        trainer(tmp_path, [])
    with (
        pytest.warns(UserWarning, match="4 of 4"),
        pytest.raises(ValueError, match="4 traces and max_length=5"),
    ):
        trainer(tmp_path, max_length=5)


@pytest.mark.parametrize(
    "setting",
    [
        {"packing": True},
        {"padding_free": True},
        {"assistant_only_loss": True},
        {"completion_only_loss": True},
        {"loss_type": "dft"},
        {"label_smoothing_factor": 0.1},
        {"objective": "both"},
        {"gradient_tolerance": 0.1},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_without_a_meaning_for_traces_are_refused(tmp_path, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SRTConfig(str(tmp_path), use_cpu=True, bf16=False, **setting)


def test_the_defaults_are_the_official_scripts(tmp_path):
    args = SRTConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (args.num_train_epochs, args.learning_rate, args.max_length) == (3, 5e-6, 32768)
    assert (args.warmup_steps, args.weight_decay, args.adam_beta2) == (0.05, 1e-4, 0.95)
    assert (args.lr_scheduler_type, args.per_device_train_batch_size) == ("cosine", 1)
    assert args.get_warmup_steps(100) == 5


def test_records_for_other_trainers_have_labels_where_each_term_has_its_loss():
    item = trace(1, 2, 3)
    tokens = list(item.input_ids)
    generation = {"input_ids": tokens, "labels": [-100] * 3 + tokens[3:]}
    revision = {"input_ids": tokens, "labels": [-100] * 7 + tokens[7:]}
    assert list(sft_dataset([item], "generation")) == [generation]
    assert list(sft_dataset([item], "revision")) == [revision]
    assert list(sft_dataset([item])) == [generation, revision]


def test_stages_share_no_trace_and_right_responses_are_revised_first():
    traces = [trace(seed, correct=seed % 3 == 0) for seed in range(12)]  # 4 right, 8 wrong
    stages = split_traces(traces, 6, seed=1)
    assert sum(item.initial_correct for item in stages["revision"]) == 4
    assert not any(item.initial_correct for item in stages["generation"])
    together = stages["revision"] + stages["generation"]
    assert sorted(item.question for item in together) == list(range(12))
    assert len(stages["revision"]) == 6
    assert split_traces(traces, 6, seed=1) == stages
    few = split_traces(traces, 3)
    assert len(few["revision"]) == 3
    assert len(few["generation"]) == 8
    with pytest.raises(ValueError, match="leave some for the generation stage"):
        split_traces(traces, 12)
    with pytest.raises(ValueError, match="num_revision_traces"):
        split_traces(traces, 0)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_second_stage_starts_from_the_firsts_weights(tmp_path, adapted):
    traces = [trace(seed) for seed in range(6)]
    first = trainer(tmp_path, traces, num_train_epochs=2, learning_rate=0.01, warmup_steps=0)
    args = dataclasses.replace(first.args, objective="joint")
    adapter = peft.LoraConfig(r=2, target_modules=["v_proj"]) if adapted else None

    def fresh():
        return {"model": new_model(), "peft_config": adapter}

    last = sequential_srt(
        args=args, traces=traces, num_revision_traces=3, processing_class=TOKENIZER, **fresh()
    )
    stages = split_traces(traces, 3, seed=args.seed)
    start = fresh()
    one = SRTTrainer(
        start.pop("model"),
        dataclasses.replace(args, objective="generation"),
        stages["generation"],
        processing_class=TOKENIZER,
        **start,
    )
    one.train()
    two = SRTTrainer(
        one.model,
        dataclasses.replace(args, objective="revision"),
        stages["revision"],
        processing_class=TOKENIZER,
    )
    middle = {name: value.clone() for name, value in two.model.state_dict().items()}
    two.train()
    assert any(not torch.equal(middle[n], v) for n, v in two.model.state_dict().items())
    for name, value in two.model.state_dict().items():
        assert_close(last.model.state_dict()[name], value, torch.float64, name)
    assert last.args.output_dir.endswith("revision")


@pytest.mark.parametrize("stages", [[], ["--stages", "--stage2-traces", "1"]])
def test_the_example_collects_trains_and_saves(tmp_path, monkeypatch, capsys, stages):
    start, output = tmp_path / "start", tmp_path / "output"
    tiny_model(vocab=VOCAB, max_position_embeddings=512).save_pretrained(start)
    TOKENIZER.save_pretrained(start)
    # random weights: an initial response is wrong, a revision is right
    calls = []

    def reward(prompts, **_):
        calls.append(len(prompts))
        return [float(len(calls) % 2 == 0)] * len(prompts)

    monkeypatch.setattr(example, "reward", reward)
    options = ["--questions", "2", "--max-new-tokens", "8", "--epochs", "1", "--cpu", *stages]
    example.main(["--model", str(start), "--output", str(output), *options])
    assert calls == [6, 18]
    assert "corrected 100.0%" in capsys.readouterr().out
    assert len(load_traces(output / "traces.jsonl").traces) >= 2
    trained = AutoModelForCausalLM.from_pretrained(output)
    before = AutoModelForCausalLM.from_pretrained(start)
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_precision_trains_on_the_same_loss(tmp_path, checkpointing):
    settings = {"gradient_checkpointing": checkpointing, "max_steps": 3, "learning_rate": 0.01}
    ours = trainer(tmp_path, model=new_model().float(), bf16=True, **settings)
    ours.train()
    first, *_, last = (log for log in ours.state.log_history if "revision_loss" in log)
    terms = plain_terms(new_model(), TRACES)
    assert first["loss"] == pytest.approx(sum(terms.values()).item(), rel=0.01)
    assert last["loss"] < first["loss"]
    assert next(ours.model.parameters()).dtype == torch.float32


def test_a_model_with_a_loss_of_its_own_is_refused(tmp_path):
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(**sizes, **heads, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config)
    with pytest.raises(ValueError, match="router_aux_loss_coef must be 0"):
        trainer(tmp_path, model=model)
    trainer(tmp_path, model=model, router_aux_loss_coef=0.0, max_steps=1).train()


def test_sequences_in_parts_are_refused(tmp_path, monkeypatch):
    parts = SimpleNamespace(cp_enabled=True, sp_enabled=False, sp_backend="torch", tp_size=1)

    class Accelerator(accelerate.Accelerator):  # one process cannot make such a mesh
        parallelism_config = property(lambda self: parts if hasattr(self, "step") else None)

    monkeypatch.setattr("transformers.trainer.Accelerator", Accelerator)
    with pytest.raises(ValueError, match="parallelism_config must keep sequences whole"):
        trainer(tmp_path)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_saved_tokenizer_remembers_the_traces_chat_format(tmp_path, adapted):
    told = [dataclasses.replace(item, chat_template_kwargs={"a": 1}) for item in TRACES[:2]]
    adapter = peft.LoraConfig(r=2, target_modules=["v_proj"]) if adapted else None
    ours = SRTTrainer(
        new_model(),
        SRTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        [*told, TRACES[2]],  # the last one does not know its own
        processing_class=copy.deepcopy(TOKENIZER),
        peft_config=adapter,
    )
    ours.save_model(str(tmp_path))
    assert recorded_chat_format(AutoTokenizer.from_pretrained(tmp_path)) == {"a": 1}


def test_traces_of_two_chat_formats_are_refused(tmp_path):
    told = [
        dataclasses.replace(item, chat_template_kwargs={"a": n}) for n, item in enumerate(TRACES)
    ]
    with pytest.raises(ValueError, match="traces must agree in chat_template_kwargs"):
        trainer(tmp_path, told)
    unknown = trainer(tmp_path)
    assert recorded_chat_format(unknown.processing_class) is None


def test_the_settings_are_those_of_the_official_script(tmp_path):
    args = SRTConfig(str(tmp_path), use_cpu=True, bf16=False)
    official = {
        "learning_rate": 5e-6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # a share of all steps
        "weight_decay": 1e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "max_grad_norm": 1.0,
        "max_length": 32768,
    }
    assert {name: getattr(args, name) for name in official} == official
    config = TraceConfig()
    assert (config.num_initial, config.num_revisions, config.revise_correct) == (3, 3, False)
    defaults = inspect.signature(transformers_generate).parameters
    sampling = {"max_new_tokens": 16384, "temperature": 1.0, "top_p": 0.9}
    assert {name: defaults[name].default for name in sampling} == sampling


def test_what_has_no_meaning_for_traces_is_no_argument(tmp_path):
    args = SRTConfig(str(tmp_path), use_cpu=True, bf16=False)
    for name in ("data_collator", "compute_loss_func", "compute_metrics", "formatting_func"):
        with pytest.raises(ValueError, match=f"{name} must be left out"):
            SRTTrainer(new_model(), args, TRACES, processing_class=TOKENIZER, **{name: print})
