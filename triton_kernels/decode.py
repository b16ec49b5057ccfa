"""Sparse decode: reads only the rows of W_dec that are live."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["k"])
def decode(
    values,  # [T, k] fp32
    indices,  # [T, k] int64
    W_dec,  # [N, d]
    b_dec,  # [d]
    y,  # [T, d]
    N,
    d,
    k,
    BLOCK_D: tl.constexpr,
):
    """y = b_dec + sum_i values_i W_dec[indices_i], NaN for an index out of range."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = c < d
    out = tl.load(b_dec + c, mask=inside, other=0).to(tl.float32)
    for i in range(k):
        value = tl.load(values + t * k + i)
        j = tl.load(indices + t * k + i)
        known = (j >= 0) & (j < N)
        value = tl.where(known, value, float("nan"))
        width = tl.where(known & (value != 0), d, 0)
        row = tl.load(W_dec + j * d + c, mask=c < width, other=0)
        out += value * row.to(tl.float32)
    tl.store(y + t * d + c, out.to(y.dtype.element_ty), mask=inside)
