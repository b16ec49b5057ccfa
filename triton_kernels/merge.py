"""The k best of all shares of the latents, in order."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["stride", "k", "count"])
def merge(
    keys,  # [T, count] int64, as `topk` leaves them
    values,  # [T, k] fp32
    indices,  # [T, k] int64
    last,  # [T] int64: the k-th key
    stride,  # from one row of values, and of indices, to the next
    k,
    count,
    BLOCK: tl.constexpr,
):
    """values = the k largest p, descending, ties to the lower index; negative ones as 0."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    lowest = -0x7FFFFFFFFFFFFFFF - 1
    left = tl.load(keys + t * count + i, mask=i < count, other=lowest)
    key = tl.max(left, 0)
    for place in range(k):
        key = tl.max(left, 0)
        left = tl.where(left == key, lowest, left)
        bits = (key >> 32).to(tl.int32)
        p = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(values + t * stride + place, tl.where(p <= 0, 0.0, p))
        tl.store(indices + t * stride + place, 0xFFFFFFFF - (key & 0xFFFFFFFF))
    tl.store(last + t, key)
