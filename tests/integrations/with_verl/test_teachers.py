"""Teachers inside verl's FSDP2 engine on two processes, against plain models in float64."""

import copy
import functools
import pathlib
import tempfile
from types import SimpleNamespace

import pytest
import teacher_worker
import torch
from chat_tokenizer import text, tokenizer
from corrections import CASES
from engine_batches import TEMPERATURE
from engine_runs import save_model
from ranks import free_port, spawn
from teacher_worker import CAP, EVERY, LESSONS, MIX, RANK, RATE, RECIPE, K

from fused_sd import Evidence, rlsd_loss

HEAD = "base_model.model.lm_head.original_module.weight"


@functools.cache
def remains():
    """What each process has at the end of each lesson, and the untrained model."""
    from transformers import Qwen3ForCausalLM

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = Qwen3ForCausalLM.from_pretrained(
            save_model(folder, tied=False), attn_implementation="eager", dtype=torch.float64
        )
        tokenizer().save_pretrained(folder / "untied")
        save_model(folder, tied=True)
        save_adapter(model, folder / "adapter")
        spawn(teacher_worker.main, free_port(), name)
        found = {
            lesson: [
                torch.load(folder / f"{lesson}-{rank}.pt", weights_only=False) for rank in range(2)
            ]
            for lesson in (*LESSONS, *CASES, RECIPE)
        }
    return found, model.eval()


def save_adapter(model, where):
    """Save an adapter that has been trained, with DoRA, and with a head of its own."""
    from peft import LoraConfig, get_peft_model

    kinds = {"use_dora": True, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    config = LoraConfig(r=RANK, lora_alpha=16, task_type="CAUSAL_LM", **kinds)
    adapted = get_peft_model(copy.deepcopy(model).float(), config)
    torch.manual_seed(2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(where)


def left_of(lesson):
    """The first process's remains; both have whole weights and the same loss."""
    both = remains()[0][lesson]
    for one in both:
        assert "error" not in one, one["error"]
    for mine, yours in zip(both[0]["steps"], both[1]["steps"], strict=True):
        assert mine["loss"] == yours["loss"]
    return both[0]


@torch.no_grad()
def log_probs(weights, ids, num_response):
    """(R, V) float64 at the rows that predict the response."""
    model = remains()[1]
    model.load_state_dict({name: tensor.double() for name, tensor in weights.items()})
    logits = model(input_ids=ids[None]).logits[0, -num_response - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1)


def sides(sample, student, teacher):
    """Both sides' log-probabilities, and the mask of the tokens that are taught."""
    num_response = len(sample["responses"])
    own = log_probs(student, sample["input_ids"], num_response)
    shown = log_probs(teacher, sample["teacher_input_ids"], num_response)
    return own, shown, sample["loss_mask"].double()


def mean(batch, token_loss):
    """verl's token-mean over all processes, of the loss of each sample's tokens."""
    losses = [(token_loss(sample) * sample["loss_mask"]).sum() for sample in batch]
    return float(sum(losses) / sum(sample["loss_mask"].sum() for sample in batch))


def assert_weights(found, expected, *, atol):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor.double(), expected[name].double(), rtol=0, atol=atol, msg=name
        )


def averaged(teacher, student, rate):
    return {
        name: (1 - rate) * tensor.double() + rate * student[name].double()
        for name, tensor in teacher.items()
    }


def test_a_moving_average_teaches_over_the_whole_vocabulary():
    left = left_of("ema")
    teacher = left["steps"][0]["before"]  # a copy of the student as it started
    for step, taken in enumerate(left["steps"]):
        student = taken["before"]

        def token_loss(sample, student=student, teacher=teacher):
            own, shown, _ = sides(sample, student, teacher)
            return (own.exp() * (own - shown)).sum(-1)

        assert taken["loss"] == pytest.approx(mean(left["batch"], token_loss), rel=1e-5), step
        assert taken["loss"] > 0.01
        after = left["steps"][step + 1]["before"] if step < 2 else left["after"]
        teacher = averaged(teacher, after, RATE)
        assert_weights(taken["teacher"], teacher, atol=1e-6)
    start, end = left["steps"][0]["before"], left["after"]
    assert max(float((end[name] - start[name]).abs().max()) for name in start) > 0.01


def test_a_teacher_is_saved_and_loaded_with_the_checkpoint():
    left = left_of("ema")
    again, last = left["resumed"][0], left["steps"][2]
    assert again["loss"] == last["loss"]
    for name in ("before", "teacher"):
        assert_weights(again[name], last[name], atol=0)
    assert_weights(left["after resumed"], left["after"], atol=1e-7)
    assert not any("holds no teacher" in said for said in left["resumed said"])


def test_a_checkpoint_without_a_teacher_says_where_the_teacher_starts():
    left = left_of("ema")
    assert any("holds no teacher: the teacher starts as its student is" in s for s in left["said"])
    assert_weights(left["bereft"]["before"], left["steps"][2]["before"], atol=0)
    assert left["bereft"]["loss"] != left["steps"][2]["loss"], "the saved teacher lags behind"


def test_a_trust_region_lies_between_the_start_and_the_student():
    left = left_of("trust region")
    start = left["steps"][0]["before"]
    for taken in left["steps"]:
        student = taken["before"]

        def token_loss(sample, student=student):
            own, reference, _ = sides(sample, student, start)
            _, ahead, _ = sides(sample, student, student)
            shown = ((1 - MIX) * reference + MIX * ahead).log_softmax(-1)
            kept = own.topk(K).indices
            buckets = [with_tail(side, kept) for side in (own, shown)]
            divergence = (buckets[0].exp() * (buckets[0] - buckets[1])).sum(-1)
            sampled = own.gather(-1, sample["responses"][:, None])[:, 0]
            ratio = (sampled - sample["old_log_probs"]).clamp(-20, 20).exp().clamp(max=CAP)
            return divergence * ratio

        assert taken["loss"] == pytest.approx(mean(left["batch"], token_loss), rel=1e-5)
        assert_weights(taken["teacher"], start, atol=0)


def with_tail(log_probs, kept):
    """Log-probabilities (R, K + 1) of the kept entries and of all others together."""
    inside = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, kept, True)
    tail = log_probs.masked_fill(inside, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, kept), tail], -1)


def test_rlsd_weighs_the_advantages_as_the_library_does():
    left = left_of("synced, rlsd")
    teacher = left["steps"][0]["before"]
    for step, taken in enumerate(left["steps"]):
        student = taken["before"]

        def token_loss(sample, student=student, teacher=teacher):
            own, shown, _ = sides(sample, student, teacher)
            ids = sample["responses"]
            mix = 0.5 * sample["self_distillation_mask"].double()
            # log-probabilities as hidden states of an identity head: the library's own loss
            return rlsd_loss(
                own,
                torch.eye(own.shape[1], dtype=torch.float64),
                ids,
                sample["advantages"].double(),
                teacher_log_probs=shown.gather(-1, ids[:, None])[:, 0],
                old_log_probs=sample["old_log_probs"].double(),
                evidence=Evidence((0.2, 0.2), mix.expand(len(ids))),
                ratio_clip=(0.2, 0.2),
                reduction="none",
            ).loss

        assert taken["loss"] == pytest.approx(mean(left["batch"], token_loss), rel=1e-5), step
        after = left["steps"][step + 1]["before"] if step < 2 else left["after"]
        if (step + 1) % EVERY == 0:
            teacher = after
        assert_weights(taken["teacher"], teacher, atol=0)


def test_a_gradient_that_is_not_finite_teaches_the_teacher_nothing():
    broken = left_of("synced, rlsd")["broken"]
    before, between, after = broken["students"]
    assert_weights(between, before, atol=0)
    assert_weights(after, before, atol=0)
    assert_weights(broken["teachers"][1], broken["teachers"][0], atol=0)
    assert broken["ages"] == (1, 1)


def test_a_batch_of_several_updates_moves_the_teacher_once():
    left = left_of("ema, three updates")
    first, second = left["steps"]
    teacher = averaged(first["before"], second["before"], RATE)
    assert_weights(first["teacher"], teacher, atol=1e-6)
    teacher = averaged(teacher, left["after"], RATE)
    assert_weights(second["teacher"], teacher, atol=1e-6)
    # an update that is left out does not keep the teacher from following the others
    before, between, after = left["broken"]["students"]
    assert_weights(between, before, atol=0)
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 0.01
    assert_weights(left["broken"]["teachers"][1], averaged(teacher, after, RATE), atol=1e-6)


@pytest.mark.parametrize("teacher", ["live", "ema"])
def test_the_same_weights_in_the_same_context_have_nothing_to_teach(teacher):
    left = left_of(f"{teacher}, same context")
    (taken,) = left["steps"]
    assert taken["loss"] == 0
    assert taken["grad_norm"] == 0
    assert (taken["teacher"] is None) == (teacher == "live")


def adapted(weights):
    """The model's own weights in float64, with what its adapter adds to each or puts in its place.

    LoRA adds ``16 / r * B A``; DoRA then gives each row of the sum its own length.
    """
    weights = {
        name.removeprefix("base_model.model.").replace(".default", ""): tensor.double()
        for name, tensor in weights.items()
    }
    found = {}
    for name, tensor in weights.items():
        layer, _, last = name.partition(".base_layer.")
        whole = f"{layer}.{last}"
        if ".original_module." in name:
            found[name.replace(".original_module", "")] = weights[
                name.replace("original_module", "modules_to_save")
            ]
        elif last and f"{layer}.lora_A.weight" in weights:
            down, up = (weights[f"{layer}.lora_{factor}.weight"] for factor in "AB")
            tensor = tensor + 16 / RANK * up @ down
            if (length := weights.get(f"{layer}.lora_magnitude_vector.weight")) is not None:
                tensor = tensor * (length / tensor.norm(dim=1))[:, None]
            found[whole] = tensor
        elif last:
            down, up = (weights[f"{layer}.lora_embedding_{factor}"] for factor in "AB")
            found[whole] = tensor + 16 / RANK * (up @ down).T
            # the head is tied to the embedding, without the latter's adapter
            down, up = (weights[f"lm_head.lora_{factor}.weight"] for factor in "AB")
            found["lm_head.weight"] = tensor + 16 / RANK * up @ down
        elif "lora_" not in name and ".modules_to_save." not in name:
            found[name] = tensor
    return found


def without_adapter(weights):
    base = {name: tensor for name, tensor in weights.items() if "lora_" not in name}
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in base.items()
    }


def assert_reverse_kl(taken, batch, student, teacher, mix=0.0):
    """The loss of one update is that of whole weights in float64."""

    def token_loss(sample):
        own, shown, _ = sides(sample, student, teacher)
        if mix:
            _, ahead, _ = sides(sample, student, student)
            shown = ((1 - mix) * shown + mix * ahead).log_softmax(-1)
        return (own.exp() * (own - shown)).sum(-1)

    assert taken["loss"] == pytest.approx(mean(batch, token_loss), rel=1e-5)
    assert taken["loss"] > 1e-3


def gradient_norm(batch, student, teacher):
    """The norm of the gradient of the trained weights, in float64."""
    leaves = {name: t.double().requires_grad_() for name, t in trained(student).items()}
    whole, model = adapted({**student, **leaves}), remains()[1]

    def token_loss(sample):
        num_response = len(sample["responses"])
        inputs = {"input_ids": sample["input_ids"][None]}
        logits = torch.func.functional_call(model, whole, (), inputs).logits
        own = (logits[0, -num_response - 1 : -1] / TEMPERATURE).log_softmax(-1)
        shown = log_probs(teacher, sample["teacher_input_ids"], num_response)
        return (own.exp() * (own - shown)).sum(-1)

    num_tokens = sum(sample["loss_mask"].sum() for sample in batch)
    loss = sum((token_loss(sample) * sample["loss_mask"]).sum() for sample in batch) / num_tokens
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return float(torch.nn.utils.get_total_norm(gradients))


def plain_names(weights):
    """Names without the parts in which PEFT's own dictionaries and its layers differ."""
    parts = (".default", ".modules_to_save", ".weight")
    return {
        functools.reduce(lambda n, p: n.replace(p, ""), parts, n): t for n, t in weights.items()
    }


def trained(weights):
    return {n: t for n, t in weights.items() if "lora_" in n or ".modules_to_save." in n}


def assert_taught(left, rule):
    """Each update's loss and gradient, with a teacher that takes the trained weights by a rule.

    Args:
        rule: the teacher's and the student's weights after a step, and its number -> the teacher's.
    """
    start = teacher = left["steps"][0]["before"]
    after = [*(taken["before"] for taken in left["steps"][1:]), left["after"]]
    for step, (taken, student) in enumerate(zip(left["steps"], after, strict=True)):
        assert_reverse_kl(taken, left["batch"], adapted(taken["before"]), adapted(teacher))
        expected = gradient_norm(left["batch"], taken["before"], adapted(teacher))
        assert taken["grad_norm"] == pytest.approx(expected, rel=1e-4)
        teacher = {**teacher, **trained(rule(teacher, student, step))}
        assert_weights(taken["teacher"], teacher, atol=1e-6)
    moved = {name: float((left["after"][name] - start[name]).abs().max()) for name in start}
    assert max(moved[name] for name in trained(start)) > 0.01
    assert not any(moved[name] for name in moved.keys() - trained(start).keys())


def test_with_lora_the_reference_is_the_model_without_adapter():
    left = left_of("lora")
    start = without_adapter(left["steps"][0]["before"])
    for taken in left["steps"]:
        assert taken["teacher"] is None
        assert_reverse_kl(taken, left["batch"], adapted(taken["before"]), start)


def test_with_lora_an_average_of_the_adapter_teaches():
    assert_taught(
        left_of("lora, ema"), lambda teacher, student, _: averaged(teacher, student, RATE)
    )


def test_with_lora_a_copy_of_the_adapter_teaches():
    """The model's head is its embedding; each has an adapter of its own."""
    left = left_of("lora, synced")
    assert_taught(left, lambda teacher, student, step: teacher if (step + 1) % EVERY else student)
    broken = left["broken"]
    before, between, after = broken["students"]
    assert_weights(between, before, atol=0)
    assert_weights(after, before, atol=0)
    assert_weights(broken["teachers"][1], broken["teachers"][0], atol=0)


def test_the_reference_of_a_run_that_starts_from_an_adapter_is_that_adapter():
    left = left_of("lora, from an adapter")
    start = left["steps"][0]["before"]
    assert float((adapted(start)["lm_head.weight"] - start[HEAD].double()).abs().max()) > 0.1
    for taken in left["steps"]:
        sides = adapted(taken["before"]), adapted(start)
        if taken is not left["steps"][0]:
            assert float((sides[0]["lm_head.weight"] - sides[1]["lm_head.weight"]).abs().max()) > 0
        assert_weights(taken["teacher"], start, atol=0)
        assert_reverse_kl(taken, left["batch"], *sides, mix=MIX)


@pytest.mark.parametrize("lesson", ["lora, ema", "lora, from an adapter"])
def test_an_adapters_teacher_is_saved_and_loaded_with_the_checkpoint(lesson):
    left = left_of(lesson)
    again, last = left["resumed"][0], left["steps"][-1]
    assert again["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert_weights(again["before"], last["before"], atol=0)
    assert_weights(again["teacher"], last["teacher"], atol=1e-6)
    assert left["saved"]["weights"].keys() == trained(left["after"]).keys()
    assert_weights(left["after resumed"], left["after"], atol=1e-6)


@pytest.mark.parametrize("lesson", [name for name in LESSONS if name.startswith("lora")])
def test_with_lora_only_what_is_trained_is_held_twice(lesson):
    for one in remains()[0][lesson]:
        sizes = one["sizes"]
        assert sizes["trained"] < sizes["all"] / 2
        assert sizes["teacher"] == (0 if lesson == "lora" else sizes["trained"])


@pytest.mark.parametrize("lesson", [name for name in LESSONS if name.startswith("lora")])
def test_the_rollout_engine_is_sent_the_students_adapter_alone(lesson):
    left = left_of(lesson)
    student = left["broken"]["students"][-1] if "broken" in left else left["after"]
    own = plain_names(trained(student))
    for sent in map(plain_names, left["sent"]):
        # PEFT adds the base of layers with the vocabulary; verl's layers are without the root's
        adapter = {name: t for name, t in sent.items() if not name.endswith(".base_layer")}
        assert_weights(adapter, {name: own[name] for name in adapter}, atol=0)
    assert own.keys() <= plain_names(left["sent"][0]).keys()


@pytest.mark.parametrize("held", ["_loaded", "_teacher"])
def test_a_checkpoint_knows_that_the_run_started_from_an_adapter(held):
    """Also where the run resumes without the adapter's path: all weights are in the checkpoint."""
    from fused_sd.integrations.verl.teachers import TeachingEngine

    engine = object.__new__(TeachingEngine)
    engine._is_lora = True
    engine.model_config = SimpleNamespace(lora_adapter_path=None)
    assert engine._base_is_start
    setattr(engine, held, {"kind": "frozen"})
    assert not engine._base_is_start


def test_an_adapters_teacher_under_fsdp1_is_refused():
    from fused_sd.integrations.verl.config import FusedSDLossConfig
    from fused_sd.integrations.verl.teachers import TeachingEngine

    for kind, path in (("ema", None), ("synced", None), ("reference", "phase1")):
        engine = object.__new__(TeachingEngine)
        engine._is_lora = True
        engine.model_config = SimpleNamespace(lora_adapter_path=path)
        engine.engine_config = SimpleNamespace(strategy="fsdp")
        with pytest.raises(ValueError, match=r"actor.strategy must be .fsdp2. .* got 'fsdp'"):
            engine._teacher_module(FusedSDLossConfig(teacher=kind, topk=K)).__enter__()


def test_verls_worker_follows_the_recipe_on_what_the_stage_writes():
    """SDPO: Jensen-Shannon over the student's top 100 and their tail, taught by an average."""
    both = remains()[0][RECIPE]
    for one in both:
        assert "error" not in one, one["error"]
    assert both[0]["engine"] == "TeachingEngine"
    batch = [sample for one in both for sample in one["samples"]]
    assert [float(sample["self_distillation_mask"]) for sample in batch] == [1, 0, 1, 1]
    assert "Correct solution:\n\nIt is 2." in text(batch[0]["teacher_input_ids"].tolist())
    teacher = both[0]["steps"][0]["before"]
    for step, taken in enumerate(both[0]["steps"]):
        student = taken["before"]

        def token_loss(sample, student=student, teacher=teacher):
            own, shown, _ = sides(sample, student, teacher)
            log_s, log_t = (with_tail(side, own.topk(100).indices) for side in (own, shown))
            mixture = torch.logaddexp(log_s, log_t) - torch.log(torch.tensor(2.0))
            halves = [(log.exp() * (log - mixture)).sum(-1) for log in (log_s, log_t)]
            return (halves[0] + halves[1]) / 2

        (loss,) = taken["metrics"]["loss"]
        assert loss == pytest.approx(mean(batch, token_loss), rel=1e-5)
        after = both[0]["steps"][1]["before"] if step == 0 else both[0]["after"]
        teacher = averaged(teacher, after, 0.05)
        assert_weights(taken["teacher"], teacher, atol=1e-6)
