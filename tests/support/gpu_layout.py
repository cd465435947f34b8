"""A GPU's layout of a chunked run, without a GPU: 16-bit operands stay as they are.

Only the mixed-precision GEMM is replaced, by PyTorch operations with the same result.
"""

from collections import Counter
from typing import Any

from torch import Tensor

from fused_sd.engine import workspace
from fused_sd.head import projection as heads

VOCAB = 509  # a row of so many columns starts at any address


def gpu_layout(monkeypatch: Any) -> Counter[str]:
    """Keep 16-bit operands as they are, as on a GPU, and count the GEMMs of each kind.

    Sums of 16-bit products are exact in float64, so that a row is the same wherever it stands.
    """
    counted: Counter[str] = Counter()

    def multiply(a: Tensor, b: Tensor, out: Tensor, factor: float) -> Tensor:
        assert a.dtype == b.dtype
        kind = "dW" if out.shape[0] == VOCAB else "logits" if out.shape[1] == VOCAB else "dH"
        counted[kind] += 1
        return factor * (a.double() @ b.double())

    def matmul(a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
        out.copy_(multiply(a, b, out, factor))

    def matmul_add_(a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
        out.add_(multiply(a, b, out, factor))

    monkeypatch.setattr(heads, "operand_dtype", lambda hidden: hidden.dtype)
    for module in (heads, workspace):
        monkeypatch.setattr(module, "matmul", matmul)
        monkeypatch.setattr(module, "matmul_add_", matmul_add_)
    return counted
