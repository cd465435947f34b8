"""FusedGRPOTrainer against TRL's GRPOTrainer: same losses, gradients and metrics, no logits."""

import copy

import method_pairs
import peft
import pytest
import torch
from datasets import Dataset
from largest import Largest
from tiny_vlm import FAMILIES, image, tiny_vlm
from torch import nn
from trl import GRPOConfig, GRPOTrainer
from trl_pairs import CHECKPOINTING, TOKENIZER, assert_same_metrics, rewards

from fused_sd.integrations.trl import FusedGRPOTrainer

TEXTS = Dataset.from_dict({"prompt": ["Solve 2 + 2.", "Add 3 to 4, then 5."] * 4})
IMAGES = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": "What is it?" * (1 + n % 2)}],
            "images": [image(n, 16 * (1 + n % 2), 16)] * (1 + n % 2),
        }
        for n in range(4)
    ]
)


def make(cls, folder, *, model=None, data=TEXTS, processor=TOKENIZER, adapter=None, **settings):
    """A trainer that has not trained yet."""
    defaults = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 6,
        "disable_tqdm": True,
        CHECKPOINTING: False,
        "seed": 1,
    }
    torch.manual_seed(1)
    trainer = cls(
        method_pairs.model(torch.float32) if model is None else model,
        reward_funcs=rewards,
        args=GRPOConfig(**{**defaults, **settings}),
        train_dataset=data,
        processing_class=processor,
        peft_config=adapter,
    )
    trainer.current_gradient_accumulation_steps = 1  # what training sets
    trainer.model.train()
    return trainer


def batch(trainer, *, off_policy=True, **more):
    """Rollouts of the first trainer, with old log-probabilities on both sides of the clips."""
    size = trainer.args.num_generations
    rows = trainer.train_dataset.select([n // size for n in range(4)])
    torch.manual_seed(2)
    inputs = trainer._generate_and_score_completions(list(rows))
    if off_policy:
        shape = inputs["completion_ids"].shape
        inputs["old_per_token_logps"] = torch.randn(shape) * 0.5 - 5
    return {**inputs, **more}


def loss_and_gradients(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    named = trainer.model.named_parameters()
    return float(loss.detach()), {name: p.grad for name, p in named if p.grad is not None}


def assert_same(stock, fused, inputs):
    for trainer in (stock, fused):
        trainer._metrics["train"].clear()
    (loss, gradients), (own_loss, own) = (loss_and_gradients(t, inputs) for t in (stock, fused))
    assert own_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert own.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 0
    for name, gradient in gradients.items():
        assert float((own[name] - gradient).abs().max()) <= 1e-5 * largest, name
    assert_same_metrics(stock, fused)


def pair(folder, **settings):
    """TRL's trainer and ours, with the same weights."""
    model = settings.pop("model", None)
    models = [copy.deepcopy(model), model]
    return [
        make(cls, folder, model=one, **copy.copy(settings))
        for cls, one in zip((GRPOTrainer, FusedGRPOTrainer), models, strict=True)
    ]


CASES = {
    **{kind: {"loss_type": kind} for kind in ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo")},
    "GSPO": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "VESPO": {"loss_type": "vespo"},
    "two-sided": {"delta": 1.5},
    "quantile": {"top_entropy_quantile": 0.5},
    "entropy bonus": {"entropy_coef": 0.3},
    "temperature": {"temperature": 0.6},
    "off-policy mask": {"off_policy_mask_threshold": 0.1},
}


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_metrics_are_stocks(name, tmp_path):
    stock, fused = pair(tmp_path, **CASES[name])
    assert_same(stock, fused, batch(stock))


@pytest.mark.parametrize("adapter", [False, True], ids=["model", "LoRA"])
def test_the_reference_models_kl_is_stocks(adapter, tmp_path):
    method_pairs.model(torch.float32).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    model = method_pairs.model(torch.float32)
    model.config._name_or_path = str(tmp_path / "model")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    stock, fused = pair(tmp_path, model=model, beta=0.5, adapter=config if adapter else None)
    fused.model.load_state_dict(stock.model.state_dict())
    torch.manual_seed(4)
    for parameters in zip(stock.model.parameters(), fused.model.parameters(), strict=True):
        if parameters[0].requires_grad:
            noise = 0.02 * torch.randn_like(parameters[0])
            for parameter in parameters:
                parameter.data += noise
    inputs = batch(stock)
    torch.manual_seed(2)
    own = fused._generate_and_score_completions(list(fused.train_dataset.select([0, 0, 1, 1])))
    torch.testing.assert_close(own["ref_per_token_logps"], inputs["ref_per_token_logps"])
    assert_same(stock, fused, inputs)


def test_the_correction_for_the_rollout_engine_is_stocks(tmp_path):
    stock, fused = pair(tmp_path)
    inputs = batch(stock)
    for trainer in (stock, fused):
        trainer.use_vllm = True
    ratios = torch.rand(inputs["completion_ids"].shape) * 2
    assert_same(stock, fused, {**inputs, "importance_sampling_ratio": ratios})
    assert_same(stock, fused, {**inputs, "importance_sampling_ratio": ratios[:, :1]})


@pytest.mark.parametrize("family", FAMILIES)
def test_images_reach_the_model_as_in_stock(family, tmp_path):
    model, processor = tiny_vlm(family, torch.float32)
    stock, fused = pair(tmp_path, model=model, data=IMAGES, processor=processor)
    inputs = batch(stock)
    assert inputs["num_images"] == [1, 1, 2, 2]
    assert_same(stock, fused, inputs)
    towers = [
        p for name, p in fused.model.named_parameters() if "visual" in name or "vision" in name
    ]
    assert any(p.grad is not None and p.grad.any() for p in towers)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_scored_in_parts_with_their_own_images(family, tmp_path):
    model, processor = tiny_vlm(family, torch.float32)
    trainer = make(FusedGRPOTrainer, tmp_path, model=model, data=IMAGES, processor=processor)
    inputs = batch(trainer)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    names = ("pixel_values", "image_grid_thw", "num_images", "token_type_ids", "mm_token_type_ids")
    fields = {name: inputs.get(name) for name in names}
    length = inputs["completion_ids"].size(1)
    whole, parts = (
        trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, length, batch_size=size, compute_entropy=True, **fields
        )
        for size in (None, 3)
    )
    for one, other in zip(whole[:2], parts[:2], strict=True):
        torch.testing.assert_close(one, other)


def test_sixteen_bit_log_probabilities_are_nearer_to_float64_than_stocks(tmp_path):
    torch.manual_seed(3)
    exact = make(FusedGRPOTrainer, tmp_path, model=method_pairs.model(torch.bfloat16).double())
    stock, fused = pair(tmp_path, model=method_pairs.model(torch.bfloat16))
    inputs = batch(exact)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    length = inputs["completion_ids"].size(1)
    head = exact.model.lm_head.weight

    def states(trainer, hidden):
        """The head's work alone: every model gets the same states."""
        trainer.model.model.norm.register_forward_hook(lambda *_: hidden.to(trainer.model.dtype))
        with torch.no_grad():
            call = trainer._get_per_token_logps_and_entropies
            scores = call(trainer.model, ids, mask, length, compute_entropy=True)
        return [score.double() for score in scores[:2]]

    hidden = torch.randn(*ids.shape, head.size(1)).bfloat16()
    truth, theirs, ours = (states(trainer, hidden) for trainer in (exact, stock, fused))
    for right, near, far in zip(truth, ours, theirs, strict=True):
        for norm in (float("inf"), 2):
            error, stocks = ((value - right).norm(norm) for value in (near, far))
            assert error <= stocks * (1 + 1e-3)
            assert error <= 1e-5 * right.norm(norm)


def test_a_head_in_fp32_on_a_sixteen_bit_model_is_scored_in_fp32(tmp_path):
    untied = method_pairs.model(torch.bfloat16, tie_word_embeddings=False)
    stock, fused = pair(tmp_path, model=untied, cast_lm_head_to_fp32=True)
    assert fused.model.lm_head.weight.dtype == torch.float32
    assert fused._fused
    assert_same(stock, fused, batch(stock))


def test_no_logits_of_the_batch_are_made(tmp_path):
    rows, length = 16, 64
    trainer = make(FusedGRPOTrainer, tmp_path)
    ids = torch.randint(5, len(TOKENIZER), (rows, 1 + length))
    inputs = {
        "prompt_ids": ids[:, :1],
        "completion_ids": ids[:, 1:],
        "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_mask": torch.ones(rows, length, dtype=torch.long),
        "advantages": torch.randn(rows),
        "num_items_in_batch": torch.tensor(rows * length),
    }
    with Largest() as seen:
        loss_and_gradients(trainer, inputs)
    assert seen.numel < rows * length * len(TOKENIZER) / 2


def test_it_trains_and_a_head_that_is_not_understood_is_left_to_stock(tmp_path):
    trainer = make(FusedGRPOTrainer, tmp_path, max_steps=2, num_iterations=2, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 2
    model = method_pairs.model(torch.float32)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.lm_head.__class__ = Doubled
    with pytest.warns(UserWarning, match="runs TRL's own loss"):
        stock, fused = pair(tmp_path, model=model)
    assert not fused._fused
    assert_same(stock, fused, batch(stock))


def test_a_model_that_counts_positions_has_stocks_loss_and_a_warning(tmp_path):
    """TRL pads on the left without position ids: a row's loss depends on its neighbours."""
    with pytest.warns(UserWarning, match="padding before a row .* GPT2LMHeadModel by .*%") as seen:
        stock, fused = pair(tmp_path, model=method_pairs.positional_model())
    assert sum("padding before" in str(warning.message) for warning in seen) == 1
    inputs = batch(stock)
    assert_same(stock, fused, inputs)
    method = method_pairs.make("GRPO", tmp_path, student=method_pairs.positional_model())
    short = int(inputs["prompt_mask"].sum(1).argmin())  # whose neighbours' prompts are longer

    def score(trainer, rows, width):
        ids = torch.cat([inputs["prompt_ids"][rows, -width:], inputs["completion_ids"][rows]], 1)
        mask = torch.cat([inputs["prompt_mask"][rows, -width:], inputs["completion_mask"][rows]], 1)
        length = inputs["completion_ids"].size(1)
        scores = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)[0]
        return scores.detach()[inputs["completion_mask"][rows] != 0]

    whole = inputs["prompt_ids"].size(1)
    own = int(inputs["prompt_mask"][short].sum())
    assert own < whole
    for trainer, depends in ((stock, True), (fused, True), (method, False)):
        shift = score(trainer, [short], whole) - score(trainer, [short], own)
        assert (float(shift.abs().max()) > 0.1) is depends
        assert float(shift.abs().max()) < 1e-5 or depends
