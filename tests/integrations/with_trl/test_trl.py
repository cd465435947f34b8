"""FusedSDPOTrainer and FusedSDFTTrainer against TRL's own trainers."""

import types

import pytest
import torch
from closeness import errors
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from trl.experimental.sdft import SDFTTrainer
from trl.experimental.sdpo import SDPOTrainer
from trl.experimental.sdpo.loss_utils import (
    compute_full_logit_self_distillation_loss,
    compute_topk_self_distillation_loss,
)
from trl_pairs import (
    COMPLETION,
    MODES,
    PROMPT,
    TEACHERS,
    TOLERANCE,
    VOCAB,
    assert_same,
    assert_same_metrics,
    batch,
    configure,
    loss_and_gradients,
    make,
    pair,
    perturb,
)

from fused_sd import LMHead
from fused_sd.integrations.shared.completion_scores import CompletionForward, HeldHead, with_head
from fused_sd.integrations.transformers import Request, completion_positions, hidden_states
from fused_sd.integrations.trl import FusedSDFTTrainer, FusedSDPOTrainer

pytestmark = [
    # PEFT and TRL read names that transformers is about to rename
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # PEFT, of LoRA on the head
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
    # a loader without a GPU
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A saved model: TRL loads separate teachers from the student's path."""
    folder = str(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    model = tiny_model(vocab=VOCAB, max_position_embeddings=512, tie_word_embeddings=False)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode, tail, alpha", MODES)
@pytest.mark.parametrize("kind", TEACHERS)
def test_sdpo_has_trls_loss_gradients_and_metrics(home, kind, mode, tail, alpha):
    stock, fused = pair(home, kind)
    for old, weight in ((False, 1.0), (True, 1.0), (True, 0.4)):
        configure((stock, fused), mode, tail, alpha, weight)
        assert_same(stock, fused, batch(old=old))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_policy_loss_is_trls(home, loss_type, level):
    trainers = pair(home, "live")
    for weight in (0.0, 0.4):
        configure(trainers, "topk_logits", weight=weight)
        for trainer in trainers:
            trainer.loss_type, trainer.importance_sampling_level = loss_type, level
        for old in (False, True):
            assert_same(*trainers, batch(old=old))
    for trainer in trainers:
        trainer.loss_type, trainer.importance_sampling_level = "dapo", "token"


def test_temperature_divides_both_sides(home):
    trainers = pair(home, "base")
    for mode, _, alpha in (MODES[0], MODES[5], MODES[8]):
        configure(trainers, mode, alpha=alpha)
        for trainer in trainers:
            trainer.temperature = 0.7
        assert_same(*trainers, batch(old=True))
        for trainer in trainers:
            trainer.temperature = 1.0


def test_rollout_log_probs_are_trls_where_the_mask_is_set(home):
    trainers, inputs = pair(home, "live"), batch()
    arguments = [
        inputs[f"{part}_{what}"] for part in ("prompt", "completion") for what in ("ids", "mask")
    ]
    configure(trainers, "full_logits", gradient_accumulation_steps=3, steps_per_generation=2)
    stock, fused = (trainer._compute_rollout_logps(*arguments) for trainer in trainers)
    mask = inputs["completion_mask"].bool()
    assert torch.allclose(fused[mask], stock[mask], atol=1e-5)
    assert not fused.requires_grad
    configure(trainers, "full_logits", gradient_accumulation_steps=2, steps_per_generation=2)
    assert trainers[1]._compute_rollout_logps(*arguments) is None


@pytest.mark.parametrize("mode", ["sampled_token", "topk_logits", "full_logits"])
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_a_batch_without_tokens_has_loss_and_gradients_of_0(home, mode, weight):
    """Whatever the logits are: here a row of the head is infinite and another is not a number."""
    trainer = make(FusedSDPOTrainer, home, teacher_model_kind="base", distillation_mode=mode)
    configure([trainer], mode, weight=weight)
    inputs = batch(mask=(0.0, 0.0, 0.0))
    if weight == 1.0:
        with torch.no_grad():
            trainer.model.lm_head.weight[3] = torch.inf
            trainer.model.lm_head.weight[4] = torch.nan
    else:
        inputs["completion_mask"].zero_()
    loss, gradients = loss_and_gradients(trainer, inputs)
    assert float(loss) == 0
    assert set(gradients) == {name for name, _ in trainer.model.named_parameters()}
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients.values())
    assert trainer._metrics["train"]["self_distillation/distillation_loss"] == [0.0]
    assert trainer._metrics["train"]["sdpo/distillation_loss"] == [0.0]


def test_metrics_beside_trls_are_those_of_the_logits(home):
    stock, fused = pair(home, "base")
    inputs = batch()
    with torch.no_grad():
        aligned = stock._compute_teacher_student_logits(stock.model, stock.teacher_model, inputs)
    mask = aligned.loss_mask
    log_s, log_t = aligned.student_logits.log_softmax(-1), aligned.teacher_logits.log_softmax(-1)
    top = log_s.topk(7).indices
    expected = {
        "student_entropy": -(log_s.exp() * log_s).sum(-1),
        "teacher_entropy": -(log_t.exp() * log_t).sum(-1),
        "forward_kl": (log_t.exp() * (log_t - log_s)).sum(-1),
        "reverse_kl": (log_s.exp() * (log_s - log_t)).sum(-1),
        "student_topk_mass": log_s.gather(-1, top).exp().sum(-1),
        "teacher_topk_mass": log_t.gather(-1, top).exp().sum(-1),
        "sampled_reverse_kl": (log_s - log_t).gather(-1, inputs["completion_ids"][..., None])[
            ..., 0
        ],
    }
    seen = set()
    for mode in ("sampled_token", "topk_logits", "full_logits"):
        configure([fused], mode)
        loss_and_gradients(fused, inputs)
        for name, values in fused._metrics["train"].items():
            short = name.removeprefix("self_distillation/")
            if short in expected:
                mean = float((expected[short] * mask).sum() / mask.sum())
                assert values == [pytest.approx(mean, rel=1e-4)], name
                seen.add(short)
        fused._metrics["train"].clear()
    assert seen == set(expected)


def test_metrics_beside_trls_can_be_left_out(home):
    stock, fused = pair(home, "base")
    fused.log_fused_metrics = False
    try:
        for mode in ("sampled_token", "topk_logits", "full_logits"):
            configure((stock, fused), mode)
            for trainer in (stock, fused):
                loss_and_gradients(trainer, batch(old=True))
            extra = set(fused._metrics["train"]) - set(stock._metrics["train"])
            assert extra <= {"self_distillation/sampled_reverse_kl"}
    finally:
        fused.log_fused_metrics = True
        for trainer in (stock, fused):
            trainer._metrics["train"].clear()


@pytest.mark.parametrize("mode, alpha", [("topk_logits", 0.3), ("full_logits", 1.0)])
def test_bf16_is_nearer_to_float64_than_trls(home, mode, alpha):
    """From the same bf16 states and head; the gradient compared is the head's."""
    inputs = batch(mask=(1.0,) * 8)
    student = [
        torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")
    ]
    # a teacher that is nearly the student: one token of its prompt is another
    teacher = [student[0].clone(), student[1]]
    teacher[0][:, PROMPT - 3] = 2
    inputs["teacher_input_ids"], inputs["teacher_attention_mask"] = teacher
    trainers, results = [], []
    for cls in (SDPOTrainer, FusedSDPOTrainer):
        model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.bfloat16)
        trainers.append(make(cls, home, model=model, teacher_model_kind="live"))
        configure(trainers[-1:], mode, alpha=alpha)
        results.append(loss_and_gradients(trainers[-1], inputs))

    request = Request(hidden_states, completion_positions(COMPLETION))
    weight = model.lm_head.weight.detach().double().requires_grad_()
    with torch.no_grad():
        hidden = [
            model(input_ids=ids, attention_mask=mask, fused_sd=request).result.double()
            for ids, mask in (student, teacher)
        ]
    logits = hidden[0] @ weight.T, hidden[1] @ weight.detach().T
    if mode == "full_logits":
        token_loss = compute_full_logit_self_distillation_loss(*logits, distillation_alpha=alpha)
    else:
        token_loss = compute_topk_self_distillation_loss(
            *logits, distillation_topk=7, distillation_alpha=alpha, distillation_add_tail=True
        )
    mask = inputs["completion_mask"]
    loss = ((token_loss * mask).sum(-1) / mask.sum(-1)).mean()
    loss.backward()
    (theirs, mine), reference = results, float(loss.detach())
    assert abs(float(mine[0]) - reference) < 0.1 * abs(float(theirs[0]) - reference)
    rms = [errors(gradients["lm_head.weight"], weight.grad)[1] for _, gradients in results]
    assert rms[1] < 0.5 * rms[0]


def test_plain_logits_are_left_to_trl(home):
    trainer = pair(home, "live")[1]
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, 11, generator=generator, requires_grad=True)
    given = types.SimpleNamespace(
        student_logits=student,
        teacher_logits=torch.randn(2, 3, 11, generator=generator),
        completion_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]),
        completion_mask=torch.ones(2, 3),
        loss_mask=torch.ones(2, 3),
    )
    for mode in ("sampled_token", "topk_logits", "full_logits"):
        configure([trainer], mode)
        loss = trainer._compute_self_distillation_loss(trainer.model, {}, given)
        theirs = SDPOTrainer._compute_self_distillation_loss(trainer, trainer.model, {}, given)
        assert torch.equal(loss, theirs)
    inputs = {
        "completion_ids": given.completion_ids,
        "completion_mask": given.completion_mask,
        "advantages": torch.ones(2),
    }
    assert torch.isfinite(trainer._compute_policy_loss(inputs, student))
    trainer._metrics["train"].clear()


def test_trls_refusals_are_kept(home):
    trainer = pair(home, "live")[1]
    configure([trainer], "sampled_token", alpha=0.5)
    with pytest.raises(ValueError, match="Only reverse KL"):
        loss_and_gradients(trainer, batch())
    configure([trainer], "topk_logits", distillation_topk=None)
    with pytest.raises(ValueError, match="requires `distillation_topk`"):
        loss_and_gradients(trainer, batch())
    configure([trainer], "other")
    with pytest.raises(ValueError, match="distillation_mode must be one of"):
        loss_and_gradients(trainer, batch())


class Doctored(type(tiny_model())):
    """A model that does something to its logits that its configuration does not say."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output


def test_a_model_that_cannot_be_reproduced_gets_trls_loss_and_one_warning(home):
    stock = make(SDPOTrainer, home, model=Doctored.from_pretrained(home), teacher_model_kind="live")
    with pytest.warns(UserWarning, match="runs TRL's own loss: logits rebuilt") as caught:
        fused = make(
            FusedSDPOTrainer, home, model=Doctored.from_pretrained(home), teacher_model_kind="live"
        )
    assert sum("runs TRL's own loss" in str(warning.message) for warning in caught) == 1
    for weight in (1.0, 0.4, 0.0):
        configure((stock, fused), "full_logits", weight=weight)
        assert_same(stock, fused, batch(old=True))


@pytest.mark.parametrize("mode, tail, alpha", MODES[:7])
def test_a_teacher_on_a_server_gives_trls_loss(home, mode, tail, alpha):
    trainers, inputs = pair(home, "live"), batch(old=True)
    configure(trainers, mode, tail, alpha)
    generator = torch.Generator().manual_seed(3)
    mask = (inputs["completion_mask"] * inputs["self_distillation_mask"][:, None]).bool()
    log_probs = torch.randn(3, COMPLETION, VOCAB, generator=generator).log_softmax(-1)
    top = log_probs.topk(5)
    served = {
        "actual_logprobs": log_probs.gather(-1, inputs["completion_ids"][..., None])[..., 0],
        "topk_logprobs": top.values,
        "topk_token_ids": top.indices.masked_fill(~mask[..., None], 0),
    }
    served["actual_logprobs"][~mask] = -torch.inf
    served["topk_logprobs"][~mask] = -torch.inf
    results = []
    for trainer in trainers:
        trainer._last_loaded_step, syncs = -1, []
        trainer.vllm_generation = types.SimpleNamespace(sync_weights=lambda: syncs.append(1))  # noqa: B023
        trainer._get_teacher_token_logprobs_from_server = lambda inputs, length: served
        trainer.model.train()
        trainer.model.zero_grad()
        loss = trainer._compute_server_distillation_loss(trainer.model, inputs)
        loss.backward()
        assert syncs == [1]
        assert trainer._last_loaded_step == trainer.state.global_step
        results.append((float(loss.detach()), trainer.model.model.embed_tokens.weight.grad))
    (stock_loss, stock), (fused_loss, fused) = results
    assert fused_loss == pytest.approx(stock_loss, rel=1e-5)
    assert errors(fused, stock)[0] < TOLERANCE
    assert_same_metrics(*trainers)
    trainers[1].temperature = 0.5
    with pytest.warns(UserWarning, match="at temperature 1 .* the student's at 0.5"):
        trainers[1]._compute_server_distillation_loss(trainers[1].model, inputs)
    trainers[1].temperature = 1.0
    trainers[1]._metrics["train"].clear()
    served["actual_logprobs"][0, 0] = -torch.inf
    with pytest.raises(ValueError, match="no logprob for a required"):
        trainers[1]._compute_server_distillation_loss(trainers[1].model, inputs)
    for trainer in trainers:
        del trainer._get_teacher_token_logprobs_from_server


@pytest.mark.parametrize("mode, tail, alpha", [MODES[0], MODES[2], MODES[8]])
def test_sdft_has_trls_loss_and_gradients(home, mode, tail, alpha):
    trainers = [
        make(cls, home, teacher_model_kind="base", num_loss_tokens_to_skip=2)
        for cls in (SDFTTrainer, FusedSDFTTrainer)
    ]
    for trainer in trainers:
        perturb(trainer, 0.05)
        trainer.args.distillation_mode, trainer.args.distillation_alpha = mode, alpha
        trainer.args.distillation_topk, trainer.args.distillation_add_tail = 7, tail
    for old in (False, True):
        assert_same(*trainers, batch(old=old))


RUNS = {
    "live full": {"teacher_model_kind": "live", "distillation_mode": "full_logits"},
    "ema top-k, accumulated": {
        "teacher_model_kind": "ema",
        "distillation_mode": "topk_logits",
        "distillation_topk": 5,
        "distillation_add_tail": True,
        "gradient_accumulation_steps": 2,
    },
    "base sampled, hybrid, several iterations": {
        "teacher_model_kind": "base",
        "distillation_mode": "sampled_token",
        "distillation_alpha": 1.0,
        "distillation_weight": 0.5,
        "num_iterations": 2,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 3,
    },
    "lora ema": {
        "teacher_model_kind": "ema",
        "distillation_mode": "full_logits",
        "adapter": {"target_modules": ["q_proj", "lm_head"]},
    },
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_training_logs_what_trl_logs(home, settings):
    """The first step is the same; later ones follow the optimizer's noise."""
    histories = []
    for cls in (SDPOTrainer, FusedSDPOTrainer):
        trainer = make(cls, home, max_steps=2, **settings)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        torch.manual_seed(2)
        trainer.train()
        moved = [
            n
            for n, p in trainer.model.named_parameters()
            if n in before and not torch.equal(p, before[n])
        ]
        assert moved
        histories.append(trainer.state.log_history)
    stock, fused = histories
    assert set(stock[0]) <= set(fused[0])
    assert any(name.startswith("self_distillation/") for name in set(fused[0]) - set(stock[0]))
    for name, value in stock[0].items():
        assert fused[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert fused[1]["loss"] == pytest.approx(stock[1]["loss"], rel=0.05, abs=1e-3)


def test_sdft_trains_under_bf16_autocast(home):
    trainer = make(FusedSDFTTrainer, home, max_steps=2, bf16=True, teacher_model_kind="live")
    assert trainer._fused
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0
    assert "sdft/distillation_loss" in trainer.state.log_history[0]


def test_a_teacher_with_the_students_head_adds_no_second_one():
    head = LMHead(torch.ones(4, 2, requires_grad=True))
    assert HeldHead(head).beside(head) is head
    other = HeldHead(LMHead(torch.ones(4, 2, requires_grad=True), torch.ones(4))).beside(head)
    assert not other.weight.requires_grad
    _, kept = with_head(outlives_forward=True)(torch.ones(1, 2), head)
    assert kept.head.weight.data_ptr() != head.weight.data_ptr()


def test_no_logits_are_made(home, monkeypatch):
    """Neither forward gets past the model's head."""
    trainer = pair(home, "ema")[1]
    assert isinstance(trainer._forward_logits(trainer.model, None, None, 3), CompletionForward)
    forward = type(trainer.model).forward

    def refuse(*args, **kwargs):
        forward(*args, **kwargs)
        raise AssertionError("logits")

    monkeypatch.setattr(type(trainer.model), "forward", refuse)
    for mode in ("sampled_token", "topk_logits", "full_logits"):
        configure([trainer], mode, weight=0.5)
        loss, _ = loss_and_gradients(trainer, batch(old=True))
        assert torch.isfinite(loss)
    trainer._metrics["train"].clear()
