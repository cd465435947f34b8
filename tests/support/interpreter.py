"""Make Triton's interpreter compute as a GPU does.

The interpreter truncates fp32 to bf16, where a GPU rounds to nearest.  It widens subnormal bf16
numbers to wrong values.  Both conversions are replaced by numpy operations on the bits, which are
faster too.

Liger's programs need two more things.  A ``float`` that a program is launched with is an fp32
scalar, as in compiled programs, and not Python's number.  ``libdevice.rsqrt`` has a body.
"""

import numpy as np


def compute_as_a_gpu() -> None:
    """Patch the interpreter of this process.

    Triton is imported here and not above, because ``TRITON_INTERPRET`` must be set before.
    """
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def rounded(handle: TensorHandle) -> TensorHandle:
        bits = np.ascontiguousarray(handle.data, dtype=np.float32).view(np.uint32)
        nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        is_nan = np.isnan(handle.data)
        return TensorHandle(np.where(is_nan, 0x7FC0, nearest).astype(np.uint16), tl.bfloat16)

    def widened(handle: TensorHandle) -> TensorHandle:
        bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    cast, narrow = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def cast_impl(self, source, target):
        if target.scalar == tl.float32 and source.dtype.scalar == tl.bfloat16:
            return widened(source)
        to_bf16 = target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32
        return rounded(source) if to_bf16 else cast(self, source, target)

    def create_fp_to_fp(self, source, target, rounding):
        to_bf16 = target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32
        return rounded(source) if to_bf16 else narrow(self, source, target, rounding)

    convert = interpreter._implicit_cvt

    def with_fp32_scalars(argument):
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)

    libdevice.rsqrt = lambda value: tl.rsqrt(value)  # looked up late: the interpreter patches tl
    interpreter._implicit_cvt = with_fp32_scalars
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
