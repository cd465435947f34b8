"""A cell: the results of all providers on one problem."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fused_sd.bench.accuracy import Errors
from fused_sd.bench.floor import Floor, products
from fused_sd.bench.measure import Times
from fused_sd.verify.promises import Sparsity

# "checked": the errors are within the bound, and no time was asked for
Status = Literal["ok", "checked", "wrong", "unavailable", "out of memory", "too slow", "failed"]


@dataclass
class Row:
    """The result of one provider."""

    provider: str
    version: str | None  # of its package; None: PyTorch alone
    note: str
    status: Status = "failed"
    reason: str = ""  # why the provider is wrong or did not run
    errors: Errors | None = None
    times: Times | None = None
    peak_bytes: int | None = None  # beyond the operands, gradients included
    kept: Sparsity | None = None  # None: the gradient is dense


@dataclass(frozen=True)
class Cell:
    """Sizes of a problem, its floor, and the results of the providers."""

    objective: str
    hidden_size: int
    vocab: int
    tokens: int
    counted: int  # tokens that the mask keeps
    dtype: str
    trainable: bool
    shared_head: bool
    entropy: float  # nat, the student's mean over the tokens that count
    floor: Floor | None  # None: not timed, or out of memory
    bound: float  # largest error of a provider that is right
    rows: list[Row]

    def ratio(self, row: Row) -> float | None:
        """Return a provider's time divided by the floor's."""
        if self.floor is None or row.times is None:
            return None
        return row.times.p50 / self.floor.milliseconds

    def least_milliseconds(self, row: Row) -> float | None:
        """Return the time of the GEMMs that a provider cannot do without; None: no floor.

        With a sparse gradient those are the logits'.
        """
        if self.floor is None:
            return None
        needed = products(self.objective, self.trainable)
        share = 1.0 if row.kept is None else needed.logits / needed.u
        return share * self.floor.milliseconds

    def tflops(self, row: Row) -> float | None:
        """Return the floor's TFLOP divided by a provider's time; recomputation does not count."""
        if self.floor is None or row.times is None:
            return None
        return self.floor.flop / row.times.p50 / 1e9

    def row_gigabytes(self, row: Row) -> float | None:
        """Return the GB/s of the passes over the logits if they take all time above the floor."""
        if self.floor is None or row.times is None:
            return None
        above = row.times.p50 - self.floor.milliseconds
        return self.floor.row_bytes / above / 1e6 if above > 0 else None

    def as_json(self) -> dict[str, Any]:
        """Return all results, and the ratios computed from them, as plain values."""
        facts = {name: value for name, value in vars(self).items() if name not in ("floor", "rows")}
        floor = None
        if self.floor is not None:
            floor = self.floor._asdict() | {"milliseconds": self.floor.milliseconds}
        rows = []
        for row in self.rows:
            plain = asdict(row)
            for name in ("errors", "times", "kept"):
                part = getattr(row, name)
                plain[name] = None if part is None else part._asdict()
            plain["ratio_to_floor"] = self.ratio(row)
            plain["tflops"] = self.tflops(row)
            plain["row_gigabytes"] = self.row_gigabytes(row)
            rows.append(plain)
        return {**facts, "floor": floor, "rows": rows}
