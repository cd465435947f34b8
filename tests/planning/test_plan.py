"""Plans: the peak that is promised is the peak that is counted, and what is said of wrong use."""

import inspect
import json
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

import fused_sd
from fused_sd import StudentTopK, TeacherTopK, TokenIds, UnionTopK
from fused_sd.bench.measure import peak_bytes
from fused_sd.bench.problem import Shape, make_problem, variant
from fused_sd.bench.providers import PROVIDERS
from fused_sd.cli import build_parser, main
from fused_sd.engine import layout as chunking
from fused_sd.engine import workspace
from fused_sd.measuring import head_sizes
from fused_sd.measuring.head_sizes import MODELS, head_size
from fused_sd.planning import command
from fused_sd.planning.devices import CARDS
from fused_sd.planning.objectives import OBJECTIVES

CPU = torch.device("cpu")
CLOSE = 0.03  # of the counted peak; a plan promises 0.1
LARGE = 2**40
SHAPE = Shape("wide", 32, 12000)
DEEP = Shape("deep", 256, 3000)  # the head's gradient is most of it
EAGER_OBJECTIVES = (
    *("forward_kl", "reverse_kl", "jsd", "opsd", "topk_tail", "topk_renormalized"),
    *("rlsd", "grpo", "cross_entropy"),
)
PROVIDER = {provider.name: provider for provider in PROVIDERS}
DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Memory that other threads hold is not counted."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def drawn():
    """Operands of either dtype."""
    return {
        (name, shape.name): make_problem(shape, 96, dtype=dtype)
        for shape in (SHAPE, DEEP)
        for name, dtype in DTYPE.items()
    }


@pytest.fixture(scope="module")
def sparse_problems():
    """Operands of a chosen entropy."""

    @lru_cache
    def draw(shape, dtype, entropy):
        return make_problem(shape, 96, dtype=DTYPE[dtype], entropy=entropy)

    return draw


def outputs(problem, **run):
    """Losses with what comes with them."""
    weight = problem.teacher_weight.detach()
    sides = problem.hidden, problem.weight, problem.teacher_hidden, weight
    return {
        "divergence": lambda: fused_sd.divergence_loss(*sides, **run),
        "sdpo": lambda: fused_sd.sdpo_loss(*sides, **run),
        "cross_entropy": lambda: fused_sd.cross_entropy_loss(
            problem.hidden, problem.weight, problem.token_ids, **run
        ),
    }


def losses(problem, **run):
    """Every named loss of a problem, by its objective's name."""
    tokens = problem.hidden, problem.weight, problem.token_ids
    teacher = problem.teacher_hidden, problem.teacher_weight.detach()
    states = dict(zip(("teacher_hidden", "teacher_head"), teacher, strict=True))
    sides = problem.hidden, problem.weight, *teacher
    old = {"old_log_probs": problem.old_log_probs}
    entries = torch.arange(len(problem.hidden) * 32).view(-1, 32) % len(problem.weight)
    given = entries, torch.full(entries.shape, 1 / 40).log()
    per_token = {name: value for name, value in run.items() if name != "reduction"}
    return {
        "divergence": lambda: fused_sd.divergence_loss(*sides, **run).loss,
        "sdpo": lambda: fused_sd.sdpo_loss(*sides, **run).loss,
        "sd_zero": lambda: fused_sd.sd_zero_loss(*sides, **run).loss,
        "opsd": lambda: fused_sd.opsd_loss(*sides, **run).loss,
        "sdft": lambda: fused_sd.sdft_loss(*sides, **run).loss,
        "gkd": lambda: fused_sd.gkd_loss(*sides, **run).loss,
        "topk_divergence": lambda: fused_sd.topk_divergence_loss(*tokens[:2], *given, **run).loss,
        "rlsd": lambda: (
            fused_sd.rlsd_loss(
                *tokens,
                problem.advantages,
                **states,
                **old,
                **run,
            ).loss
        ),
        "grpo": lambda: fused_sd.grpo_loss(*tokens, problem.advantages, **old, **run).loss,
        "cross_entropy": lambda: fused_sd.cross_entropy_loss(*tokens, **run).loss,
        "token_log_probs": lambda: fused_sd.token_log_probs(*tokens, **per_token).log_probs,
    }


def plan_on_cpu(shape, *, num_tokens=96, **settings):
    sizes = {"hidden_size": shape.hidden_size, "vocab": shape.vocab}
    return fused_sd.plan(tokens=num_tokens, device="cpu", **sizes, **settings)


NAMES = tuple(losses(make_problem(Shape("names", 4, 128), 2)))
SETTINGS = (  # shape, dtype, head trained, reduction, share masked, tokens in a chunk
    (SHAPE, "fp32", True, "mean", 0.0, None),
    (SHAPE, "fp32", False, "none", 0.5, 20),
    (SHAPE, "bf16", True, "none", 0.5, 20),
    (SHAPE, "bf16", False, "sum", 0.0, 10),
    (DEEP, "bf16", True, "mean", 0.5, None),
    (DEEP, "fp32", True, "none", 0.0, 30),
)


@pytest.mark.parametrize("shape, dtype, trained, reduction, masked, chunk_size", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_the_planned_peak_is_the_counted_one(
    drawn, name, shape, dtype, trained, reduction, masked, chunk_size
):
    problem = variant(drawn[dtype, shape.name], trainable=trained, mask_share=masked)
    run = {"reduction": reduction, "chunk_size": chunk_size, "token_weights": problem.mask.float()}
    loss = losses(problem, **run)[name]
    counted = peak_bytes(lambda: loss().sum().backward(), CPU)
    planned = plan_on_cpu(
        shape,
        objective=name,
        dtype=dtype,
        train_head=trained,
        reduction=reduction,
        masked=masked,
        chunk_size=chunk_size,
    )
    assert planned.peak_bytes == pytest.approx(counted, rel=CLOSE), planned["fused_sd"].parts


COMPARISONS = (
    (fused_sd.SkewKl(0.8), fused_sd.FULL_VOCABULARY, "tail"),
    (fused_sd.SkewKl(0.8), fused_sd.TeacherNucleus(50, 0.9), "tail"),
    ("forward_kl", fused_sd.TeacherNucleus(20, 0.5), "renormalize"),
    (fused_sd.MixedKl(0.4), fused_sd.UnionTopK(20), "drop"),
)


@pytest.mark.parametrize("divergence, support, remainder", COMPARISONS)
def test_the_planned_peak_of_other_comparisons_is_the_counted_one(
    drawn, divergence, support, remainder
):
    problem = variant(drawn["fp32", SHAPE.name], trainable=True, mask_share=0.0)
    chosen = {"divergence": divergence, "support": support, "remainder": remainder}
    loss = losses(problem, reduction="mean", **chosen)["divergence"]
    counted = peak_bytes(lambda: loss().backward(), CPU)
    planned = plan_on_cpu(SHAPE, objective="divergence", dtype="fp32", **chosen)
    assert planned.peak_bytes == pytest.approx(counted, rel=CLOSE), planned["fused_sd"].parts


SUPPORTS = (  # the support of both sides, or given entries
    StudentTopK(50),
    TeacherTopK(20),
    TokenIds(torch.arange(96 * 40).view(96, 40) % 12000),
)


@pytest.mark.parametrize("support", SUPPORTS, ids=["student", "teacher", "ids"])
@pytest.mark.parametrize("dtype, trained, masked", [("fp32", True, 0.5), ("bf16", False, 0.0)])
def test_a_renormalised_support_holds_neither_gradients_nor_the_other_sides_logits(
    drawn, support, dtype, trained, masked
):
    problem = variant(drawn[dtype, "wide"], trainable=trained, mask_share=masked)
    run = {"support": support, "remainder": "renormalize", "reduction": "mean"}
    loss = losses(problem, token_weights=problem.mask.float(), **run)["divergence"]
    counted = peak_bytes(lambda: loss().backward(), CPU)
    planned = plan_on_cpu(
        SHAPE,
        objective="divergence",
        support=support,
        remainder="renormalize",
        dtype=dtype,
        train_head=trained,
        masked=masked,
    )
    assert planned.peak_bytes == pytest.approx(counted, rel=CLOSE), planned["fused_sd"].parts
    assert planned.chunked_runs == 1
    with pytest.warns(DeprecationWarning, match="chunked_runs"):
        assert planned.walks == 1


def test_a_renormalised_support_costs_one_gemm_and_given_entries_none():
    settings = {"model": "qwen3-8b", "tokens": 16384, "device": "H200", "reduction": "none"}
    unit = 2 * 16384 * 4096 * 151936 / 690e12
    seconds = {
        name: fused_sd.plan(
            objective="divergence", support=support, remainder="renormalize", **settings
        )["fused_sd"].seconds
        for name, support in {
            "teacher": TeacherTopK(64),
            "union": UnionTopK(64),
            "ids": SUPPORTS[2],
        }.items()
    }
    assert seconds == pytest.approx({"teacher": unit, "union": 2 * unit, "ids": 0})
    held = fused_sd.plan(objective="topk_renormalized", **settings)["fused_sd"]
    assert held.peak_bytes < 3 * 2**30
    assert not {"fp32 dW", "fp32 dH"} & set(held.parts)


LOOSE = Shape("loose", 256, 9000)  # where some rows are dense
SPARSE_SETTINGS = [(*SETTINGS[at], 0.6) for at in (0, 1, 3, 4)] + [
    (LOOSE, "fp32", True, "mean", 0.0, None, 1.3),
    (LOOSE, "fp32", True, "none", 0.5, 20, 1.3),
]


@pytest.mark.parametrize(
    "shape, dtype, trained, reduction, masked, chunk_size, entropy", SPARSE_SETTINGS
)
@pytest.mark.parametrize("name", ["divergence", "sdpo", "cross_entropy"])
def test_the_planned_peak_of_a_sparse_gradient_is_the_counted_one(
    sparse_problems, name, shape, dtype, trained, reduction, masked, chunk_size, entropy
):
    drawn = sparse_problems(shape, dtype, entropy)
    problem = variant(drawn, trainable=trained, mask_share=masked)
    run = {"reduction": reduction, "chunk_size": chunk_size, "token_weights": problem.mask.float()}
    tolerance = 2**-8 if entropy < 1 else 2**-12
    loss = outputs(problem, gradient="sparse", tolerance=tolerance, **run)[name]
    certificate = loss().certificate
    dense, kept = certificate.dense[problem.mask], certificate.kept[problem.mask]
    counted = peak_bytes(lambda: loss().loss.sum().backward(), CPU)
    planned = plan_on_cpu(
        shape,
        objective=name,
        dtype=dtype,
        train_head=trained,
        reduction=reduction,
        gradient="sparse",
        kept=round(float(kept[~dense].double().mean())),
        dense_share=float(dense.double().mean()),
        masked=masked,
        chunk_size=chunk_size,
    )
    # where entries crowd in a few columns their sums hold another piece, which is large only here
    close = 0.1 if shape is LOOSE else CLOSE
    assert planned.peak_bytes == pytest.approx(counted, rel=close), planned.estimates[0].parts
    assert bool(dense.any()) == (shape is LOOSE)


def test_dense_rows_cost_the_sum_of_the_heads_gradient_and_their_share_of_the_gemms():
    settings = {"model": "qwen3-8b", "tokens": 16384, "objective": "reverse_kl", "device": "H200"}
    dense = fused_sd.plan(**settings)
    none, some, again = (
        fused_sd.plan(gradient="sparse", dense_share=share, reduction=reduction, **settings)
        for share, reduction in ((0.0, "mean"), (0.25, "mean"), (0.25, "none"))
    )
    assert none.estimates[0].provider == "fused_sd, sparse"
    assert none["fused_sd"].peak_bytes == dense.peak_bytes
    assert none.peak_bytes < dense.peak_bytes - 2**31
    assert none.peak_bytes < some.peak_bytes < dense.peak_bytes
    seconds = dense["fused_sd"].seconds
    shares = [planned.estimates[0].seconds / seconds for planned in (none, some, again)]
    assert shares == pytest.approx([0.5, 0.5 + 0.125, 0.5 + 0.25])
    assert (none.chunked_runs, some.chunked_runs, again.chunked_runs) == (1, 1, 2)
    renormalized = settings | {"objective": "topk_renormalized"}
    kinds = ("dense", "sparse", "auto")
    each = [fused_sd.plan(gradient=kind, **renormalized).estimates for kind in kinds]
    assert each[0] == each[1] == each[2]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_automatic_gradient_may_take_the_memory_of_either_form(reduction):
    settings = {"model": "qwen3-8b", "tokens": 16384, "objective": "reverse_kl", "device": "H200"}

    def estimate(gradient, dense_share):
        planned = fused_sd.plan(
            gradient=gradient, dense_share=dense_share, reduction=reduction, **settings
        )
        return planned.estimates[0]

    all_dense = estimate("sparse", 1.0)
    for share in (0.0, 0.5):
        sparse, auto = estimate("sparse", share), estimate("auto", share)
        assert auto.provider == "fused_sd, auto"
        assert auto.peak_bytes == max(sparse.peak_bytes, all_dense.peak_bytes)
        assert auto.seconds == sparse.seconds
    assert estimate("auto", 0.8).seconds == all_dense.seconds


@pytest.mark.parametrize("dtype, trained, masked", [("fp32", True, 0.5), ("bf16", False, 0.0)])
@pytest.mark.parametrize("objective", EAGER_OBJECTIVES)
def test_the_peak_of_eager_pytorch_is_the_counted_one(drawn, objective, dtype, trained, masked):
    problem = variant(
        drawn[dtype, "wide"],
        objective=objective,
        num_tokens=64,
        trainable=trained,
        mask_share=masked,
    )
    loss = PROVIDER["eager"].build(problem)
    counted = peak_bytes(lambda: loss().backward(), CPU)
    planned = plan_on_cpu(
        SHAPE,
        num_tokens=64,
        objective=objective,
        dtype=dtype,
        train_head=trained,
        masked=masked,
    )
    assert planned["eager"].peak_bytes == pytest.approx(counted, rel=CLOSE), planned["eager"].parts


def from_a_server(hidden, weight, ids, teacher_log_probs):
    """KL of a server's entries and the mass of the rest, as eager code writes it."""
    logits = F.linear(hidden, weight).float()
    student_log_probs = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)

    def with_tail(log_probs):
        inside = log_probs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
        return torch.cat([log_probs, torch.log(-torch.expm1(inside))], -1)

    target = with_tail(teacher_log_probs)
    return F.kl_div(with_tail(student_log_probs), target, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", DTYPE)
def test_the_peak_of_a_servers_entries_in_eager_pytorch_is_the_counted_one(drawn, dtype, trained):
    problem = variant(drawn[dtype, "wide"], num_tokens=64, trainable=trained)
    ids = torch.randint(12000, (64, 32))
    given = problem.hidden, problem.weight, ids, torch.full(ids.shape, 1 / 40).log()
    counted = peak_bytes(lambda: from_a_server(*given).backward(), CPU)
    settings = {"objective": "topk_divergence", "dtype": dtype, "train_head": trained}
    planned = plan_on_cpu(SHAPE, num_tokens=64, **settings)
    assert planned["eager"].peak_bytes == pytest.approx(counted, rel=CLOSE), planned["eager"].parts


def test_an_implementation_that_is_not_planned_is_refused_with_those_that_are():
    planned = fused_sd.plan("qwen3-8b", tokens=64, objective="jsd", device="H200")
    with pytest.raises(KeyError, match="one of fused_sd, eager, got 'Liger chunked JSD'"):
        planned["Liger chunked JSD"]


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("objective", ["jsd", "topk_tail", "cross_entropy"])
def test_the_planned_peaks_are_those_of_the_gpu(objective, trained):
    """Ours are promised; what other implementations take on a GPU, a plan can only estimate."""
    device = torch.device("cuda")
    shape = Shape("test", 1024, 100278)
    problem = make_problem(shape, 4096, objective=objective, device=device, trainable=trained)
    planned = fused_sd.plan(
        tokens=4096,
        hidden_size=1024,
        vocab=100278,
        objective=objective,
        train_head=trained,
        device=device,
    )
    loss = PROVIDER["fused_sd"].build(problem)
    loss().backward()  # cuBLAS takes its workspace once
    problem.hidden.grad = problem.weight.grad = None
    counted = peak_bytes(lambda: loss().backward(), device)
    assert planned["fused_sd"].peak_bytes == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("chunk_size", [None, 10])
def test_the_planned_chunk_is_the_chosen_one(drawn, monkeypatch, chunk_size):
    problem, chosen = variant(drawn["bf16", "wide"], mask_share=0.5), []

    class Recorded(workspace.Workspace):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            chosen.append(tuple(self.layout))

    monkeypatch.setattr("fused_sd.engine.operator.Workspace", Recorded)
    monkeypatch.setattr(chunking, "CPU_BUDGET", 2**20)
    weights = problem.mask.float()
    losses(problem, token_weights=weights, chunk_size=chunk_size)["gkd"]()
    planned = plan_on_cpu(
        SHAPE,
        objective="gkd",
        masked=0.5,
        chunk_size=chunk_size,
    )
    assert chosen == [(planned.chunk, planned.group)]
    assert planned.chunk < planned.active_per_rank


@pytest.mark.parametrize("objective", ["jsd", "cross_entropy"])
def test_the_longest_batch_is_the_last_that_fits(objective):
    settings = {"objective": objective, "device": "H200", "free_bytes": 20 * 2**30}
    planned = fused_sd.plan("qwen3-4b", tokens=16384, **settings)
    assert [estimate.provider for estimate in planned.estimates] == ["fused_sd", "eager"]
    for estimate in planned.estimates:
        for more, fits in ((0, True), (1, False)):
            again = fused_sd.plan("qwen3-4b", tokens=estimate.longest_tokens + more, **settings)
            assert again[estimate.provider].fits is fits


def test_ranks_divide_the_tokens_and_nothing_else():
    settings = {"model": "qwen3-4b", "device": "H200"}
    whole, divided = (
        fused_sd.plan(tokens=count * 4096, world_size=count, **settings) for count in (1, 8)
    )
    assert divided.tokens_per_rank == 4096
    assert divided.peak_bytes == whole.peak_bytes
    assert divided["eager"].longest_tokens == 8 * whole["eager"].longest_tokens


def test_little_memory_makes_a_small_chunk_and_still_a_plan():
    plenty, little, none = (
        fused_sd.plan("qwen3-8b", tokens=16384, device="H200", free_bytes=size)
        for size in (LARGE, 4 * 2**30, 2**20)
    )
    assert plenty.chunk > little.chunk > 0
    assert none.chunk == 1
    assert not none["fused_sd"].fits


def test_a_separate_head_and_tokens_losses_cost_what_they_should():
    settings = {"tokens": 8192, "device": "H200", "objective": "sdft"}
    once = fused_sd.plan("qwen3-8b", **settings)
    twice = fused_sd.plan("qwen3-8b", reduction="none", **settings)
    assert (once.chunked_runs, twice.chunked_runs) == (1, 2)
    times = [planned["fused_sd"].seconds for planned in (once, twice)]
    assert times[1] == pytest.approx(times[0] * 6 / 4)
    smaller = fused_sd.plan("qwen3-8b", teacher="qwen3-0.6b", **settings)
    assert smaller["fused_sd"].seconds < times[0]


def test_the_floors_are_the_spec_sheets_gemms():
    """8 and 6 NVD at 690 TFLOP/s."""
    unit = 2 * 16384 * 4096 * 151936 / 690e12
    settings = {"model": "qwen3-8b", "tokens": 16384, "device": "H200"}
    trained = fused_sd.plan(objective="jsd", **settings)
    frozen = fused_sd.plan(objective="jsd", train_head=False, **settings)
    for planned, provider, gemms in (
        (trained, "fused_sd", 4),
        (frozen, "fused_sd", 3),
        (frozen, "eager", 3),
    ):
        assert planned[provider].seconds == pytest.approx(gemms * unit)
        assert planned[provider].seconds_source == "floor"


def test_models_are_known_by_name_file_and_configuration(tmp_path):
    size = MODELS["Qwen/Qwen3-8B"]
    for name in ("Qwen/Qwen3-8B", "qwen3-8b", "Qwen/Qwen3-8B-Base", "someone/Qwen3-8B"):
        assert head_size(name, None, None) == size
    assert head_size("meta-llama/Meta-Llama-3-8B-Instruct", None, None).vocab == 128256
    config = {"text_config": {"hidden_size": 7, "vocab_size": 11}, "hidden_size": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for model in (config, tmp_path, str(tmp_path / "config.json")):
        assert head_size(model, None, None) == (7, 11)


def test_a_transformers_configuration_is_read():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(hidden_size=64, vocab_size=999)
    assert head_size(config, None, None) == (64, 999)


def test_what_a_configuration_leaves_out_is_transformers_default(tmp_path):
    pytest.importorskip("transformers")
    for config, size in (
        ({"model_type": "gpt2", "n_embd": 96, "vocab_size": 777}, (96, 777)),
        ({"model_type": "gemma3", "text_config": {"hidden_size": 96}}, (96, 262208)),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert head_size(str(tmp_path)) == size
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"model must be a readable config.json, got .*; check"):
        head_size(str(tmp_path))


def test_any_other_model_is_asked_of_the_cache_and_then_of_the_hub(monkeypatch):
    transformers = pytest.importorskip("transformers")
    asked, cached = [], {"someone/cached": 32}

    def from_pretrained(name, local_files_only=False):
        asked.append((name, local_files_only))
        if local_files_only and name not in cached:
            raise OSError("not cached\nmore")
        if name == "someone/gone":
            raise OSError("no such model\nmore")
        return transformers.Qwen3Config(hidden_size=cached.get(name, 48), vocab_size=999)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(
        ValueError, match=r"got 'someone/new' \(not in the cache, and no hub: "
    ) as no:
        head_size("someone/new")
    assert "\n" not in str(no.value)
    assert asked == [("someone/new", True)]
    monkeypatch.setattr(head_sizes, "_why_no_hub", lambda text: "")
    assert head_size("someone/cached") == (32, 999)
    assert asked[1:] == [("someone/cached", True)]
    assert head_size("someone/new") == (48, 999)
    assert asked[2:] == [("someone/new", True), ("someone/new", False)]
    with pytest.raises(ValueError, match=r"got 'someone/gone' \(the hub: no such model\); check"):
        head_size("someone/gone")


def test_a_model_without_transformers_is_said_to_need_it(monkeypatch):
    monkeypatch.setattr(head_sizes, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="transformers is not installed"):
        head_size("someone/new")


@pytest.mark.parametrize("name", CARDS)
def test_every_card_has_rates_and_their_source(name):
    planned = fused_sd.plan("qwen3-8b", tokens=1024, objective="sdft", device=name)
    card = CARDS[name]
    assert 24e9 <= card.memory == pytest.approx(planned.free_bytes)
    assert 0.5 * card.peak < planned.rate == card.rate < card.peak
    assert card.bandwidth == pytest.approx(0.9 * card.peak_bandwidth)
    assert planned["fused_sd"].seconds == pytest.approx(8 * 1024 * 4096 * 151936 / card.rate)
    assert planned.prediction.total > planned["fused_sd"].seconds
    sheet = f"assumed: 70% of the data sheet's {card.peak / 1e12:.4g}"
    assert planned.rate_source == ("as others measured" if name == "H200" else sheet)
    assert f"TFLOP/s, {planned.rate_source}." in str(planned)


def test_a_given_rate_is_called_given_and_an_unknown_one_makes_no_time():
    sizes = {"hidden_size": 64, "vocab": 1000, "tokens": 8}
    given = fused_sd.plan(**sizes, device="B200", rate=1e15)
    assert "at 1000 TFLOP/s, given." in str(given)
    unknown = fused_sd.plan(**sizes, device="cpu")
    assert (unknown.rate, unknown.rate_source) == (None, "")
    assert "TFLOP/s" not in str(unknown)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"tokens": 0}, "tokens must be an integer"),
        ({"model": "no-such-model"}, r"model must be a config.json, .*no-such-model.*no hub"),
        ({"hidden_size": 8}, "model must come without"),
        ({"model": None, "hidden_size": 8}, "model must be given"),
        ({"model": {"hidden_size": 8}}, "hidden_size and vocab_size"),
        ({"model": None, "hidden_size": 8, "vocab": 0}, "vocab must be an integer"),
        (
            {"objective": "ppo"},
            r"objective must be a loss \(sdpo, .*, jsd, .*\), got 'ppo'",
        ),
        ({"objective": None}, "objective must be a loss"),
        ({"objective": "grpo", "divergence": "forward_kl"}, "divergence must be left out"),
        ({"remainder": "rest"}, "remainder must be one of"),
        ({"support": 5}, "support must be FULL_VOCABULARY"),
        ({"dtype": torch.float64}, "dtype must be bf16"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"masked": 1.0}, "masked must lie in"),
        ({"world_size": 0}, "world_size must be"),
        ({"tensor_parallel": 0}, "tensor_parallel must be"),
        ({"tensor_parallel": 4, "world_size": 6}, "world_size must be a multiple"),
        ({"link": 0}, "link must be"),
        ({"device": "H9000"}, "device must be one that PyTorch sees"),
        ({"free_bytes": -1}, "free_bytes must be"),
        ({"rate": 0}, "rate must be"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"gradient": "some"}, "gradient must be one of"),
        ({"kept": 8}, "kept must come with gradient='sparse' or 'auto'"),
        ({"dense_share": 0.1}, "dense_share must come with"),
        ({"gradient": "sparse", "kept": 0}, "kept must be"),
        ({"gradient": "sparse", "dense_share": 2}, "dense_share must lie in"),
        ({"gradient": "sparse", "objective": "token_log_probs"}, "gradient must be 'dense'"),
        ({"gradient": "auto", "dense_share": 2}, "dense_share must lie in"),
        ({"teacher": "qwen3-0.6b", "shared_head": True}, "shared_head must be False"),
    ],
)
def test_wrong_use_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        fused_sd.plan(**({"model": "qwen3-8b", "tokens": 1024, "device": "H200"} | wrong))


def test_every_objective_takes_less_than_eager_pytorch():
    for name in OBJECTIVES:
        for ranks in (1, 8):
            settings = {"objective": name, "device": "H200", "tensor_parallel": ranks}
            planned = fused_sd.plan("qwen3-8b", tokens=16384, **settings)
            assert planned.peak_bytes < planned["eager"].peak_bytes


COMMAND = ["plan", "--model", "qwen3-8b", "--tokens", "16384", "--device", "H200"]


def test_the_command_prints_a_table_that_fits_a_terminal(capsys):
    assert main([*COMMAND, "--objective", "jsd", "--mask", "0.25", "--world-size", "4"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "on each of 4 ranks" in out
    assert ">=" in out
    assert "fit the whole card;\nnot counted are weights, the body's activations" in out
    sparse = ["--losses", "jsd", "--gradient", "sparse", "--dense-share", "0.2"]
    assert main([*COMMAND, *sparse]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "assumed of the sparse gradient: 64 entries a token, 0.2 of the tokens dense" in out
    assert main([*COMMAND, "--parts", "--free", "1GiB", "--support", "union:50"]) == 0
    out = capsys.readouterr().out
    assert "OOM" in out
    assert "fp32 dW" in out


def test_the_command_plans_several_losses(capsys):
    assert main([*COMMAND, "--losses", "SD-Zero,topk_tail,opsd"]) == 0
    out = capsys.readouterr().out
    assert [out.index(f"{name}: qwen3-8b") for name in ("sd_zero", "sdpo", "opsd")]
    assert "each entry cut at 0.05" in out
    assert main([*COMMAND, "--losses", "sdpo,gkd", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [planned["objective"] for planned in printed] == ["sdpo", "gkd"]


def test_the_command_prints_json(capsys):
    given = ["--objective", "divergence", "--divergence", "jsd:0.3", "--support", "teacher:8"]
    assert main([*COMMAND, *given, "--free", "2e10", "--frozen", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["free_bytes"] == 20_000_000_000
    first = printed["estimates"][0]
    assert first["provider"] == "fused_sd"
    assert sum(first["parts"].values()) == first["peak_bytes"]
    sparse = ["--gradient", "sparse", "--kept", "100", "--dense-share", "0.1", "--json"]
    assert main([*COMMAND, "--objective", "sdpo", *sparse]) == 0
    first = json.loads(capsys.readouterr().out)["estimates"][0]
    assert first["provider"] == "fused_sd, sparse"
    assert first["parts"]["entries"] == 8 * 100 * round(0.9 * 16384)


def test_the_command_hands_over_every_parameter_of_a_plan(monkeypatch):
    given = {}
    monkeypatch.setattr(command, "plan", lambda model, **others: given.update(others))
    command.planned(build_parser().parse_args(COMMAND), "gkd")
    assert {"model", *given} == set(inspect.signature(fused_sd.plan).parameters)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--free", "much"],
        ["--divergence", "jsd:2"],
        ["--support", "best"],
        ["--losses", "sdpo,kd"],
        ["--model", "unheard-of"],
        ["--mask", "1"],
    ],
)
def test_the_command_refuses_wrong_use(capsys, wrong):
    assert main([*COMMAND, *wrong]) == 2
    assert "must" in capsys.readouterr().err
