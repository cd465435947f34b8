"""The parts of the probe: copies, GEMMs, row functions, losses, chunks, kernels, logits.

Dimension key:  N tokens, C tokens in a chunk, D hidden size, V vocabulary, W columns of a chunk
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

import fused_sd
from benchmarks.probe.probe import Probe
from fused_sd.bench.problem import Problem
from fused_sd.engine.layout import workspace_width
from fused_sd.head.projection import matmul, matmul_add_
from fused_sd.terms.divergence_term import divergence_term
from fused_sd.torch_kernels.rows import RowGradient

CHUNK = 512  # rows of the row functions
METRICS = ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl")  # a trainer's


def copy(probe: Probe) -> None:
    """Bytes that a large copy reads and writes in a second."""
    source = probe.normal(2**16 if probe.tiny else 2**28, dtype=torch.float32)
    target = torch.empty_like(source)
    took, _ = probe.milliseconds(lambda: target.copy_(source))
    probe.say(part="copy", TBps=8 * source.numel() / took / 1e9)


def gemms(probe: Probe) -> None:
    """The head's GEMMs by their number of rows, and what it costs to add to dW."""
    (_, D, V), N = probe.shape, probe.num_tokens
    W, wide = workspace_width(V), torch.float32
    weight, hidden = probe.normal(V, D, scale=D**-0.5), probe.normal(N, D)

    def gemm(name: str, rows: int, run: Callable[[], object], out: torch.dtype = wide) -> None:
        took, _ = probe.milliseconds(run)
        tflops = 2 * rows * V * D / took / 1e9
        probe.say(part="gemms", name=name, rows=rows, out=str(out), ms=took, tflops=tflops)

    probe.warm_up(lambda: matmul(hidden, weight.t()[:, :D], torch.empty_like(hidden)))
    for rows in probe.rows(512, 1024, 2048, 4096, 8192):
        for dtype in dict.fromkeys((wide, probe.dtype)):
            logits = torch.empty(rows, W, dtype=dtype, device=probe.device)[:, :V]
            gemm("logits", rows, partial(matmul, hidden[:rows], weight.t(), logits), dtype)
            del logits
    dlogits = torch.empty(N, W, dtype=probe.dtype, device=probe.device)
    for block in dlogits.split(1024):  # noise and not zeros, which cost less power
        block.normal_(std=1e-3)
    dlogits, dweight = dlogits[:, :V], torch.zeros(V, D, device=probe.device)
    for rows in probe.rows(512, 2048, 4096, 8192):
        dhidden = torch.empty(rows, D, device=probe.device)
        gemm("dH", rows, partial(matmul, dlogits[:rows], weight, dhidden))
    for rows in probe.rows(512, 1024, 2048, 4096, 8192, 16384):
        given = dlogits[:rows].t(), hidden[:rows], dweight
        gemm("dW written", rows, partial(matmul, *given))
        gemm("dW added", rows, partial(matmul_add_, *given))
    narrow = torch.empty(V, D, dtype=probe.dtype, device=probe.device)
    gemm("dW written", N, partial(matmul, dlogits.t(), hidden, narrow), probe.dtype)
    took, _ = probe.milliseconds(lambda: torch.mul(dweight, 1.5, out=narrow))
    probe.say(part="gemms", name="dW scaled and rounded", ms=took)


def rows(probe: Probe) -> None:
    """Every function on whole rows of logits, and the searches in them."""
    if probe.device.type == "cuda":
        from fused_sd.kernels import rows, selection
    else:
        from fused_sd.torch_kernels import rows, selection
    V, C = probe.shape.vocab, 8 if probe.tiny else CHUNK
    W = workspace_width(V) if rows.READS_PADDING else V
    student = probe.normal(C, W, dtype=torch.float32, scale=4.0)
    teacher = student + 0.3 * torch.randn_like(student)
    out, ones = torch.empty_like(student, dtype=probe.dtype), torch.ones(C, device=probe.device)
    sides = rows.normalizers(student, teacher)

    def program(name: str, num_bytes: int, run: Callable[[], object]) -> None:
        took, host = probe.milliseconds(run, 20)
        for_all, rate = took * probe.num_tokens / C, num_bytes * C * W / took / 1e6
        facts = {"ms_for_all_tokens": for_all, "GBps": rate, "host_us": 1e3 * host}
        probe.say(part="rows", name=name, us=1e3 * took, **facts)

    program("log_normalizer", 4, partial(rows.log_normalizer, student))
    program("lse_and_entropy", 4, partial(rows.lse_and_entropy, student))
    program("normalizers", 8, partial(rows.normalizers, student, teacher))
    gradient, given = RowGradient(ones, None, out), (student, teacher, sides)
    for divergence in ("forward_kl", "reverse_kl", fused_sd.Jsd(0.5), fused_sd.MixedKl(0.5)):
        term = divergence_term(divergence)
        both = 18 if term.name == "jsd" else 10
        run = partial(rows.divergence_, *given, term, None)
        program(f"{term.name}: loss", 8, partial(run, None))
        program(f"{term.name}: loss and gradient", both, partial(run, gradient))
        named = {"names": METRICS[:2]}
        program(f"{term.name}: all and entropies", both, partial(run, gradient, **named))
    clipped = divergence_term("forward_kl"), 0.05, gradient
    program("forward_kl, entry clip", 18, partial(rows.divergence_, *given, *clipped))
    softmax = student, sides.student, ones, None, None, out
    program("softmax_gradient", 6, partial(rows.softmax_gradient_, *softmax))
    for names in (("reverse_kl",), METRICS):
        metrics = partial(rows.row_metrics, *given, names)
        program(f"row_metrics: {', '.join(names)}", 8, metrics)
    for k in (1, 100):
        program(f"top_k {k}", 4, partial(selection.top_k, student, k))
    program("select", 2, partial(selection.select, out[:, :V], 2.0**-8, min(512, V)))


def losses(probe: Probe) -> None:
    """Forward and backward of the losses, with and without what trainers log."""
    k, few = min(100, probe.shape.vocab // 2), min(64, probe.shape.vocab // 2)
    top_k = {"divergence": fused_sd.Jsd(0.5), "support": fused_sd.StudentTopK(k)}
    more = (*METRICS, "top1_agreement", "student_tail_mass", "topk_overlap")
    for name, settings in {
        "reverse_kl": {},
        "reverse_kl, no compaction": {"compact": False},  # nothing waits: host_ms is the host's
        "forward_kl": {"divergence": "forward_kl"},
        "jsd": {"divergence": fused_sd.Jsd(0.5)},
        "reverse_kl, what trainers log": {"metrics": METRICS},
        "opsd": {"divergence": "forward_kl", "entry_clip": 0.05},
        "topk_tail": top_k,
        "topk_tail, what trainers log": top_k | {"metrics": more},
        "renormalized": {
            "divergence": fused_sd.MixedKl(0.5),
            "remainder": "renormalize",
            "support": fused_sd.TeacherTopK(few),
        },
        "reverse_kl, sparse": {"gradient": "sparse"},
    }.items():
        probe.loss(name, partial(_divergence, **settings), "losses")
    probe.loss("cross_entropy", _cross_entropy, "losses")


def chunks(probe: Probe) -> None:
    """One loss by the number of tokens in a chunk."""
    for chunk in probe.rows(256, 512, 1024, 2048, 4096):
        name = f"reverse_kl, chunk {chunk}"
        probe.loss(name, partial(_divergence, chunk_size=chunk), "chunks")


def kernels(probe: Probe) -> None:
    """The kernels of a step, by their time."""
    problem, on_gpu = probe.problem(), probe.device.type == "cuda"
    _divergence(problem).backward()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as seen:
        _divergence(problem).backward()
    problem.hidden.grad = problem.weight.grad = None
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, key))
    for event in events[:30]:
        facts = {"calls": event.count, "ms": getattr(event, key) / 1e3}
        probe.say(part="kernels", name=event.key[:110], **facts)


def logits(probe: Probe) -> None:
    """How far the GEMM's fp32 logits are from float64's: a bias would be its truncation."""
    problem = probe.problem()
    hidden, weight = problem.hidden.detach()[:64], problem.weight.detach()
    exact = hidden.double() @ weight.double().t()
    found = torch.empty(exact.shape, device=probe.device)
    matmul(hidden, weight.t(), found)
    error = found.double() - exact
    near_top = exact >= exact.amax(-1, keepdim=True) - 3
    probe.say(
        part="logits",
        top=exact.amax(-1).mean().item(),
        rms=error.square().mean().sqrt().item(),
        bias=error.mean().item(),
        bias_near_the_top=error[near_top].mean().item(),
        worst=error.abs().max().item(),
    )


def _divergence(problem: Problem, **settings: object) -> torch.Tensor:
    sides = problem.hidden, problem.weight, problem.teacher_hidden, problem.weight.detach()
    return fused_sd.divergence_loss(*sides, **{"reduction": "sum", **settings}).loss  # type: ignore[arg-type]


def _cross_entropy(problem: Problem) -> torch.Tensor:
    given = problem.hidden, problem.weight, problem.token_ids
    return fused_sd.cross_entropy_loss(*given, reduction="mean").loss


PARTS: dict[str, Callable[[Probe], None]] = {
    part.__name__: part for part in (copy, gemms, rows, losses, chunks, kernels, logits)
}
