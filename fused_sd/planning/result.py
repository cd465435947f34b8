"""The result of ``fused_sd.plan``: numbers for programs, a table for people."""

from dataclasses import asdict, dataclass
from typing import Any

from fused_sd import checks
from fused_sd.measuring.text import size_text
from fused_sd.planning.prediction import Prediction
from fused_sd.planning.wire import Traffic

LINE = 100
FLOOR, FLOOR_MARK = "floor", ">="


@dataclass(frozen=True)
class Estimate:
    """Memory and time of one implementation of the loss, on one rank.

    Attributes:
        provider: the implementation's name, as in ``fused_sd bench``.
        peak_bytes: bytes beyond the inputs, gradients included.
        parts: bytes held at the peak, by name.
        fits: whether inputs and peak fit the free memory.
        longest_tokens: largest number of tokens, over all ranks, whose inputs and peak would fit
            beside nothing else: no body's weights, activations or optimizer states.
        seconds: time of forward and backward; None: unknown.
        seconds_source: "floor": what the GEMMs alone take at the device's rate, a lower bound; "":
            unknown.
        source: how the formula of the peak was found.
    """

    provider: str
    peak_bytes: int
    parts: dict[str, int]
    fits: bool
    longest_tokens: int
    seconds: float | None
    seconds_source: str
    source: str


@dataclass(frozen=True)
class Plan:
    """The result of ``fused_sd.plan``; ``str`` makes the table that ``fused_sd plan`` prints.

    Attributes:
        compared: the divergence, its support and what becomes of the rest; "" for a loss of the
            sampled token.
        tokens: number of tokens of the whole batch.
        tokens_per_rank, active_per_rank: a rank's tokens, and those of them with a weight.
        tensor_parallel: number of ranks that share a head.
        shard_rows: rows of the head on the rank that has the most.
        free_bytes: bytes that the plan takes to be free.
        is_whole_card: whether ``free_bytes`` is the whole memory of a card.
        chunk, group: tokens whose logits, and whose gradients w.r.t. logits, this library will
            hold at a time.
        chunked_runs: 2 if backward computes the logits again, else 1; ``walks`` is its old name.
        kept, dense_share: what the plan assumes of a sparse gradient: entries a token, and the
            share of dense tokens.  None and 0 for a dense gradient.
        rate, rate_source: FLOP/s that times are computed from, and where they come from; None and
            "": unknown.
        traffic: what a rank sends to the ranks that share its head; None: no rank shares it.
        prediction: this library's time, from rates; None: a rate is unknown, or the gradient is
            sparse.
        estimates: memory and time of each implementation, this library's first.

    Examples:
        >>> import fused_sd
        >>> found = fused_sd.plan(hidden_size=4096, vocab=151936, tokens=16384, device="H200")
        >>> found.compared
        'Jsd(beta=0.5) on StudentTopK(k=100), remainder tail'
        >>> found.chunk < found.group < found.tokens  # logits and gradients at a time
        True
    """

    model: str
    objective: str
    compared: str
    hidden_size: int
    vocab: int
    dtype: str
    train_head: bool
    reduction: str
    tokens: int
    world_size: int
    tensor_parallel: int
    shard_rows: int
    tokens_per_rank: int
    active_per_rank: int
    device: str
    free_bytes: int
    is_whole_card: bool
    chunk: int
    group: int
    chunked_runs: int
    kept: int | None
    dense_share: float
    rate: float | None
    rate_source: str
    traffic: Traffic | None
    prediction: Prediction | None
    estimates: tuple[Estimate, ...]

    @property
    def num_groups(self) -> int:
        """Number of groups of ranks; ranks of one group share a head and have the same tokens."""
        return self.world_size // self.tensor_parallel

    @property
    def peak_bytes(self) -> int:
        """Peak of this library on one rank, in bytes beyond the inputs."""
        return self.estimates[0].peak_bytes

    @property
    def walks(self) -> int:
        """``chunked_runs``, with a warning that its name has changed."""
        checks.deprecated("walks is now called chunked_runs")
        return self.chunked_runs

    def __getitem__(self, provider: str) -> Estimate:
        """Return the estimate of one provider.

        Raises:
            KeyError: the plan has no such provider; the message names those that it has.
        """
        by_name = {estimate.provider: estimate for estimate in self.estimates}
        if provider not in by_name:
            raise KeyError(f"provider must be one of {', '.join(by_name)}, got {provider!r}")
        return by_name[provider]

    def as_dict(self) -> dict[str, Any]:
        """Return all attributes as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = "head trained" if self.train_head else "head frozen"
        counted = (
            ""
            if self.active_per_rank == self.tokens_per_rank
            else (f" ({self.active_per_rank} count)")
        )
        ranks = f" on each of {self.world_size} ranks" if self.num_groups > 1 else ""
        card = ", the whole card" if self.is_whole_card else ""
        lines = [
            f"{self.objective}: {self.model}, {self.hidden_size} x {self.vocab}, {self.dtype}, "
            f"{head}, reduction {self.reduction}",
            *([self.compared] if self.compared else []),
            f"{self.tokens_per_rank} tokens{counted}{ranks}; "
            f"{self.device}, {size_text(self.free_bytes)} free{card}",
            f"fused_sd holds logits of {self.chunk} tokens and gradients of {self.group}"
            + (", and computes logits again in backward" if self.chunked_runs == 2 else ""),
            *self._assumed(),
            *self._shared(),
            "",
            f"{'':26}{'peak':>9}{'':5}{'longest':>12}{'time':>11}  largest part of the peak",
        ]
        for estimate in self.estimates:
            fits = "" if estimate.fits else "  OOM"
            lines.append(
                f"{estimate.provider:26}{size_text(estimate.peak_bytes):>9}{fits:5}"
                f"{estimate.longest_tokens:>12,}{_time_text(estimate):>11}  "
                f"{_largest(estimate.parts)}"
            )
        if len(self.estimates) == 1:
            lines.append("eager PyTorch: what it allocates for this comparison was never counted")
        return "\n".join([*lines, *self._predicted(), "", *self._legend()])

    def _shared(self) -> list[str]:
        if self.traffic is None:
            return []
        sends = self.traffic
        return [
            f"{self.tensor_parallel} ranks share the head, {self.shard_rows} rows or fewer each, "
            "and the tokens; each passes",
            f"{size_text(sends.payload_bytes)} to {sends.num_collectives} collectives, and sends "
            f"{size_text(sends.sent_bytes)} around a ring",
        ]

    def _predicted(self) -> list[str]:
        if self.prediction is None:
            return []
        parts = self.prediction.parts()
        text = " + ".join(f"{name} {milliseconds(seconds)}" for name, seconds in parts.items())
        total = milliseconds(self.prediction.total)
        return ["", f"fused_sd, predicted from rates: {total}", f"  {text}"]

    def _assumed(self) -> list[str]:
        if self.kept is None:
            return []
        dense = f"{self.dense_share:.3g} of the tokens dense" if self.dense_share else "none dense"
        return [f"assumed of the sparse gradient: {self.kept} entries a token, {dense}"]

    def _legend(self) -> list[str]:
        over = " over all ranks" if self.num_groups > 1 else ""
        lines = [
            "peak: on each rank, beyond hidden states and head, gradients included;",
            f"longest: tokens{over} whose hidden states and peak fit {self._memory()};",
            "not counted are weights, the body's activations and gradients, and optimizer states:",
            "plan with the free memory that these leave.",
        ]
        if self.rate is not None:
            rate = f"{self.rate / 1e12:.0f} TFLOP/s, {self.rate_source}"
            lines.append(f"time {FLOOR_MARK}: what the GEMMs alone take at {rate}.")
        return lines

    def _memory(self) -> str:
        return "the whole card" if self.is_whole_card else "what is free"


def _time_text(estimate: Estimate) -> str:
    if estimate.seconds is None:
        return "unknown"
    return f"{FLOOR_MARK} {milliseconds(estimate.seconds)}"


def milliseconds(seconds: float) -> str:
    """Format a time with three digits and its unit: ms below one second, else s."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _largest(parts: dict[str, int]) -> str:
    name, size = max(parts.items(), key=lambda part: part[1])
    return f"{name} {size_text(size)}"
