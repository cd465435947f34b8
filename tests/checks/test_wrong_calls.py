"""Every argument of the public functions, given every kind of wrong value.

A wrong value has to be refused by an error of this library that names the argument and is one line:
PyTorch's own error from inside says nothing of the argument, and a value that passes is worse.
What is right after all stands in ``LEGAL``.
"""

import functools
import os
import traceback
import warnings

import pytest
import torch
from wrong_values import SCALARS, tensors_like

import fused_sd

N, D, V = 5, 6, 11
ROOT = os.path.dirname(fused_sd.__file__)

FLAG = {"True"}
SHARE, POSITIVE, COUNT, NUMBER = {"0", "1", "0.5"}, {"1", "0.5"}, {"1"}, {"0", "1", "0.5", "-0.5"}
NUMBER |= {"-7"}
STEPS, NOTHING, HALF, NONE_OF_THEM = {"0", "1"}, {"None"}, {"0.5"}, {"[]"}
NOT_FINITE = {"nan inside", "inf inside"}
DTYPES, INTEGERS = {"float16", "float64"}, {"int32", "int64"}
# values of states and heads are not read, and their gradient is what a loss is for
STATES = {*NOT_FINITE, "negative", "with gradient"}
LOG_PROBS = {"negative", *DTYPES}
MASK = {"bool", *INTEGERS, *DTYPES, "with gradient"}
# other numbers of tokens, where nothing else has a number of tokens
SIZES = {"no tokens", "one axis less", "one axis more", "axis at the end", "shorter", "longer"}
SIZES |= {"narrower", "transposed", "0-d", "empty", "meta"}

LEGAL = {
    **dict.fromkeys(("add_tail", "compact", "entropy", "finite", "reduce_dhidden", "tail"), FLAG),
    **dict.fromkeys(("train_head", "shared_head"), FLAG | NOTHING),
    **dict.fromkeys(("alpha", "beta", "forward_weight", "gamma", "peak", "masked"), SHARE),
    **dict.fromkeys(("dense_share", "rate"), SHARE | NOTHING),
    **dict.fromkeys(("mass", "student_weight"), HALF),
    **dict.fromkeys(("cap", "kl_coefficient", "logit_scale", "temperature"), POSITIVE),
    **dict.fromkeys(("entry_clip", "free_bytes", "importance_cap", "link"), POSITIVE | NOTHING),
    **dict.fromkeys(("softcap", "tail_floor", "teacher_temperature"), POSITIVE | NOTHING),
    **dict.fromkeys(("every", "hidden_size", "k", "tensor_parallel", "tokens", "vocab"), COUNT),
    **dict.fromkeys(("chunk_size", "kept", "top_k", "valid_vocab", "world_size"), COUNT | NOTHING),
    **dict.fromkeys(("warmup_steps", "hold_steps", "decay_steps", "first_step"), STEPS),
    **dict.fromkeys(("scale", "selected_weight", "threshold"), NUMBER),
    **dict.fromkeys(("log_prob_floor", "token_clip"), NUMBER | NOTHING),
    **dict.fromkeys(("contrast", "divergence", "dual_clip", "importance", "ratio_clip"), NOTHING),
    **dict.fromkeys(("process_group", "remainder", "shard_sizes", "support", "teacher"), NOTHING),
    **dict.fromkeys(("tolerance",), NOTHING),
    **dict.fromkeys(("metrics", "with_grad"), NONE_OF_THEM),
    **dict.fromkeys(("student_hidden", "reference_hidden", "reference_head"), STATES),
    "hidden": STATES,
    "teacher_hidden": STATES - {"with gradient"},
    **dict.fromkeys(("student_head", "head"), STATES | {"shorter", "longer"}),  # another vocabulary
    "teacher_head": (STATES | {"shorter", "longer"}) - {"with gradient"},
    **dict.fromkeys(("token_ids", "student_ids", "teacher_ids", "teacher_token_ids"), INTEGERS),
    "entries": INTEGERS | COUNT | {"narrower"},
    **dict.fromkeys(("student_sequence_ids", "teacher_sequence_ids"), INTEGERS | NOTHING),
    **dict.fromkeys(("student_mask", "student_response_mask", "teacher_mask"), MASK),
    "teacher_response_mask": MASK | NOTHING,
    "mask": MASK | SIZES - {"0-d", "one axis less", "one axis more", "axis at the end", "empty"},
    "wrong_mask": {"bool", "None"},
    **dict.fromkeys(("reference_log_probs", "teacher_log_probs"), LOG_PROBS),
    **dict.fromkeys(("correct_log_probs", "wrong_log_probs"), LOG_PROBS | {"with gradient"}),
    "old_log_probs": LOG_PROBS | NOTHING,
    "advantages": LOG_PROBS | INTEGERS | {"bool"},
    "correction": MASK - {"with gradient"} | NOTHING | {"tensor number", "0-d", "one axis less"},
    "token_weights": MASK - {"with gradient"} | {"negative", "None"},
    "num_tokens": {"0", "1", "0.5", "None", "tensor number"},
    "length": {"1", "0.5", "None", "tensor number"},
    "ignore_index": {"0", "1", "-7"},
    "mix": NUMBER,
    "weight": STATES
    | DTYPES
    | SIZES - {"no tokens", "one axis less", "one axis more", "empty"} - {"axis at the end", "0-d"},
    "bias": STATES | NOTHING,
    "weights": {"module", "None"},
    "student": {"module"},
    "dtype": {"dtype"},
    "device": {"None", "device"},
    "argument": set(SCALARS),  # a label for messages
}
# What holds tensors for a loss cannot know the tokens' shape, their weights or device.
HOLDERS = {"Options", "ImportanceCap", "Evidence", "TokenIds", "Alignment", "hidden_bound"}
HELD = MASK | SIZES | STATES | {"tensor", "tensor number"}
# What is right for one function alone.
ALONE = {"entry_log_probs of the likeliest": {"hidden": SIZES - {"meta", "0-d", "empty"}}}
ALONE["rlcsd_advantages"] = dict.fromkeys(  # without weights, padding may hold anything
    ("advantages", "correct_log_probs", "wrong_log_probs"), NOT_FINITE
)
ALONE["iw_opd_advantages"] = dict.fromkeys(
    ("teacher_log_probs", "rollout_log_probs"), LOG_PROBS | {"with gradient"}
)
# places and states that are searched without a gradient
ALONE["detect_shift"] = {"teacher_hidden": STATES | {"transposed"}, "teacher_head": STATES}
ALONE["detect_shift"]["student_hidden"] = STATES | {"transposed"}  # 6 tokens of 6 numbers


def makers():
    """Every public function with right arguments: {name: (function, arguments)}."""
    torch.manual_seed(0)
    hidden, teacher, weight = torch.randn(N, D), torch.randn(N, D), torch.randn(V, D)
    ids, ones, log_probs = torch.arange(N), torch.ones(N), -torch.rand(N) - 0.1
    entries = torch.arange(3).expand(N, 3).clone()
    hints, hint_mask = torch.stack([log_probs] * 2, -1), torch.ones(N, 2, dtype=torch.bool)
    importance = fused_sd.ImportanceCap(log_probs)
    sides = {"student_hidden": hidden, "student_head": weight}
    sides |= {"teacher_hidden": teacher, "teacher_head": weight}
    policy = {"hidden": hidden, "head": weight, "token_ids": ids}
    run = {"token_weights": ones, "temperature": 1.0, "compact": True, "backend": "auto"}
    run |= {"chunk_size": 4, "process_group": None, "reduce_dhidden": True}
    options = {**run, "reduction": "mean", "metrics": ("student_entropy",), "gradient": "dense"}
    options |= {"tolerance": None, "teacher_temperature": 1.0}
    alone = {name: options[name] for name in options if name != "teacher_temperature"}
    sampled = {"token_ids": ids, "importance": importance}
    advantages = {**policy, "advantages": ones, "old_log_probs": log_probs}
    clip = {"ratio_clip": (0.2, 0.2), "dual_clip": 3.0}
    clips = {"tail_floor": None, "entry_clip": 1.0, "token_clip": (0.0, 9.0)}
    contrast = {"correct_log_probs": log_probs, "wrong_log_probs": hints, "wrong_mask": hint_mask}
    rows = torch.arange(1, 8).expand(2, 7).clone()
    mask, response = torch.ones_like(rows), (rows > 4).long()
    numbers = torch.arange(2)[:, None].expand(2, 7).clone()
    texts = {"student_ids": rows, "student_mask": mask, "teacher_ids": rows, "teacher_mask": mask}
    packed = {"student_sequence_ids": numbers, "teacher_sequence_ids": numbers}
    places = fused_sd.align_responses(**texts, student_response_mask=response)
    states = {name: torch.randn(6, D) for name in ("student_hidden", "teacher_hidden")}
    found = fused_sd.gkd_loss(
        hidden.clone().requires_grad_(), weight, teacher, weight, gradient="auto"
    )
    layer, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    size = {"hidden_size": 64, "vocab_size": 1000}
    planned = {"tokens": 100, "hidden_size": 64, "vocab": 1000, "objective": "sdpo"}
    planned |= {"divergence": "forward_kl", "support": fused_sd.StudentTopK(4)}
    planned |= {"remainder": "tail", "dtype": "bf16", "train_head": True, "reduction": "mean"}
    planned |= {"gradient": "sparse", "kept": 3, "dense_share": 0.1, "masked": 0.1}
    planned |= {"tensor_parallel": 1, "world_size": 1, "device": "cpu", "free_bytes": 10**9}
    planned |= {"rate": 1e12, "link": 1e9, "chunk_size": 16}
    topk = {"top_k": 4}
    f = fused_sd
    return {
        "sdpo": (
            f.sdpo_loss,
            {**sides, **options, **topk, "alpha": 0.5, "add_tail": True, "tail_floor": None}
            | {"token_ids": ids, "old_log_probs": log_probs, "importance_cap": 2.0},
        ),
        "sd_zero": (
            f.sd_zero_loss,
            {**sides, **options, **sampled, **topk, "variant": "code", "forward_weight": 0.5},
        ),
        "opsd": (
            f.opsd_loss,
            {**sides, **options, **sampled, **topk, "beta": 0.0, "entry_clip": 0.05}
            | {"remainder": "renormalize", "tail_floor": None},
        ),
        "sdft": (f.sdft_loss, {**sides, **options, **sampled, **topk, "alpha": 0.0}),
        "gkd": (f.gkd_loss, {**sides, **options, **sampled, "beta": 0.5}),
        "divergence": (
            f.divergence_loss,
            {**sides, **options, **sampled, **clips, "divergence": "reverse_kl"}
            | {"support": f.StudentTopK(4), "remainder": "tail", "reduction": "none"}
            | {"with_grad": ("student_log_prob",)},
        ),
        "topk_divergence": (
            f.topk_divergence_loss,
            {"student_hidden": hidden, "student_head": weight, "teacher_token_ids": entries}
            | {"teacher_log_probs": torch.full((N, 3), -2.0), **alone, **sampled, **clips}
            | {"divergence": "forward_kl", "remainder": "drop", "log_prob_floor": -9.0}
            | {"with_grad": ()},
        ),
        "rlsd": (
            f.rlsd_loss,
            {**advantages, **options, **clip, "evidence": f.Evidence()}
            | {"teacher_hidden": teacher, "teacher_head": weight},
        ),
        "rlcsd": (
            f.rlcsd_loss,
            {**advantages, **contrast, **run, "selected_weight": 1.0, "contrast": {"mix": 0.5}}
            | {"correction": ones, "ratio_clip": (0.2, 0.2)},
        ),
        "grpo": (
            f.grpo_loss,
            {**advantages, **alone, **clip}
            | {"reference_log_probs": log_probs, "kl_coefficient": 0.1},
        ),
        "policy": (
            f.policy_loss,
            {**advantages, **alone, **clip, "teacher_log_probs": log_probs}
            | {"evidence": f.Evidence(), "reference_log_probs": log_probs}
            | {"kl_coefficient": 0.1, "kl_estimator": "k3"},
        ),
        "sampled_kl": (
            f.sampled_kl_loss,
            {**policy, **alone, "teacher_hidden": teacher, "teacher_head": weight}
            | {"estimator": "k1", "importance": importance},
        ),
        "cross_entropy": (f.cross_entropy_loss, {**policy, **alone, "ignore_index": -100}),
        "cross_entropy of all": (f.cross_entropy_loss, policy),
        "token_log_probs": (f.token_log_probs, {**policy, **run, "entropy": True}),
        "entry_log_probs": (
            f.entry_log_probs,
            {"hidden": hidden, "head": weight, "entries": entries, "tail": True, **run},
        ),
        "entry_log_probs of the likeliest": (
            f.entry_log_probs,
            {"hidden": hidden, "head": weight, "entries": 3},
        ),
        "Comparison": (
            f.Comparison,
            {"divergence": "reverse_kl", "support": f.StudentTopK(4), "remainder": "tail"}
            | {"tail_floor": 1e-7, "log_prob_floor": None, "entry_clip": 1.0, "token_clip": 1.0},
        ),
        "Options": (f.Options, options),
        "Evidence": (f.Evidence, {"clip": (0.2, 0.2), "mix": ones / 2, "log_prob": "old"}),
        "EvidenceSchedule": (
            f.EvidenceSchedule,
            {"peak": 0.5, "warmup_steps": 2, "hold_steps": 1, "decay_steps": 1, "first_step": 1},
        ),
        "hidden_bound": (found.certificate.hidden_bound, {"head": weight}),
        "ImportanceCap": (f.ImportanceCap, {"old_log_probs": log_probs, "cap": 2.0}),
        "Jsd": (f.Jsd, {"beta": 0.5}),
        "MixedKl": (f.MixedKl, {"forward_weight": 0.5}),
        "SkewKl": (f.SkewKl, {"student_weight": 0.5}),
        "LMHead": (
            f.LMHead,
            {"weight": weight, "bias": torch.ones(V), "logit_scale": 1.0, "softcap": 30.0}
            | {"valid_vocab": 9, "shard_sizes": None},
        ),
        "LMHead of ranks": (
            f.LMHead,
            {"weight": weight, "valid_vocab": 19, "shard_sizes": (11, 11)},
        ),
        "StudentTopK": (f.StudentTopK, {"k": 3}),
        "UnionTopK": (f.UnionTopK, {"k": 3}),
        "TeacherTopK": (f.TeacherTopK, {"k": 3}),
        "TeacherNucleus": (f.TeacherNucleus, {"k": 3, "mass": 0.5}),
        "TokenIds": (f.TokenIds, {"ids": entries}),
        "Teacher": (
            f.Teacher,
            {"student": layer, "kind": "ema", "rate": 0.1, "every": 2, "weights": other},
        ),
        "Teacher.update": (f.Teacher(layer).update, {"finite": True}),
        "Teacher.load_state_dict": (
            f.Teacher(layer).load_state_dict,
            {"state": f.Teacher(layer).state_dict()},
        ),
        "Alignment": (f.Alignment, vars(places)),
        "align_responses": (
            f.align_responses,
            {**texts, **packed}
            | {"student_response_mask": response, "teacher_response_mask": response},
        ),
        "check_alignment": (
            f.check_alignment,
            {"alignment": places, **texts, **packed}
            | {"temperature": 1.0, "teacher_temperature": 1.0},
        ),
        "detect_shift": (
            f.detect_shift,
            {**states, "student_head": weight, "teacher_head": weight}
            | {"alignment": places, "temperature": 1.0},
        ),
        "aggregation_weights": (
            f.aggregation_weights,
            {"mask": mask, "mode": "token_mean", "num_tokens": 3.0, "length": None}
            | {"dtype": torch.float32},
        ),
        "aggregation_weights of a length": (
            f.aggregation_weights,
            {"mask": mask, "mode": "constant_length", "length": 4},
        ),
        "skip_first_tokens": (f.skip_first_tokens, {"mask": mask, "num_tokens": 2}),
        "generalized_jsd": (f.generalized_jsd, {"beta": 0.5, "argument": "beta"}),
        "iw_opd_advantages": (
            f.iw_opd_advantages,
            {"teacher_log_probs": -torch.rand(2, 7), "rollout_log_probs": -torch.rand(2, 7)}
            | {"mask": mask, "gamma": 0.5},
        ),
        "rlcsd_advantages": (
            f.rlcsd_advantages,
            {"advantages": ones, **contrast, "temperature": 0.02, "scale": 1.0, "mix": 0.5}
            | {"threshold": 0.02, "clip": (-2.0, 2.0)},
        ),
        "trust_region_states": (
            f.trust_region_states,
            {"reference_hidden": teacher, "reference_head": weight.clone()}
            | {"student_hidden": hidden, "student_head": weight, "rate": 0.5},
        ),
        "plan": (f.plan, planned),
        "plan of a model": (
            f.plan,
            {"model": size, "tokens": 10, "teacher": size, "shared_head": False, "device": "cpu"},
        ),
    }


CALLS = makers()


def wrong_values(name, argument):
    """Wrong values of an argument, by their names: {name of the value: value}."""
    right = CALLS[name][1][argument]
    values = dict(SCALARS)
    if isinstance(right, torch.Tensor):
        values |= dict(tensors_like(right))
    legal = LEGAL.get(argument, set()) | ALONE.get(name, {}).get(argument, set())
    if name in HOLDERS and isinstance(right, torch.Tensor):
        legal = legal | HELD
    return {kind: value for kind, value in values.items() if kind not in legal}


@functools.cache
def judged(name):
    """What is wrong with the answers to a function's wrong calls, and how many calls it had."""
    function, right = CALLS[name]
    faults, number = [], 0
    for argument in right:
        for kind, value in wrong_values(name, argument).items():
            number += 1
            try:
                function(**{**right, argument: value})
            except Exception as error:
                fault = what_is_wrong(error, argument)
            else:
                fault = "was accepted"
            if fault:
                faults.append(f"{name}({argument}={kind}) {fault}")
    return faults, number


def what_is_wrong(error, argument):
    """Why an error is not one of the library that tells a caller what to do; "": it is."""
    said, last = str(error), traceback.extract_tb(error.__traceback__)[-1]
    if not isinstance(error, ValueError | TypeError) or not last.filename.startswith(ROOT):
        return f"ended in {type(error).__name__} of {last.filename}:{last.lineno}: {said[:200]}"
    if argument not in said:
        return f"does not name the argument: {said}"
    if "\n" in said or len(said) > 1500 or "; " not in said or "got " not in said:
        return f"is no line of rule, value and remedy: {said}"
    return ""


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of reductions that are not named, and nested tensors
        yield


@pytest.mark.parametrize("name", CALLS)
def test_a_right_call_is_answered(name):
    function, right = CALLS[name]
    function(**right)


@pytest.mark.parametrize("name", CALLS)
def test_every_wrong_value_is_refused_by_name(name):
    faults, number = judged(name)
    assert faults == []
    assert number >= 20


def test_there_are_many_kinds_of_wrong_call():
    kinds, calls = set(), 0
    for name, (_, right) in CALLS.items():
        for argument in right:
            values = wrong_values(name, argument)
            kinds |= {(argument, kind) for kind in values}
            calls += len(values)
    print(f"{calls} wrong calls of {len(CALLS)} functions, {len(kinds)} kinds")
    assert len(kinds) >= 120


LOSSES = {name: call for name, call in CALLS.items() if call[0].__name__.endswith("_loss")}


@pytest.mark.parametrize("name", LOSSES)
def test_a_misspelt_keyword_is_refused_by_name(name):
    function, right = LOSSES[name]
    for wrong in ("temprature", "reduce", "labels", "topk"):
        with pytest.raises(
            TypeError, match=rf"{function.__name__}\(\) got an un\w+ keyword.*{wrong}"
        ):
            function(**right, **{wrong: 1})


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cross_entropy of all"])
def test_a_setting_without_its_name_is_refused(name):
    function, right = LOSSES[name]
    with pytest.raises(TypeError, match="positional argument"):
        function(*list(right.values())[:8])
