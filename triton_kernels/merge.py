"""The k best of all shares of the latents, in order."""

import triton
import triton.language as tl

from .keys import latent_in, preact_in


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
    key = tl.max(left, 0)  # of the type that the loop gives it
    for place in range(k):
        key = tl.max(left, 0)
        left = tl.where(left == key, lowest, left)
        p = preact_in(key)
        tl.store(values + t * stride + place, tl.where(p <= 0, 0.0, p))
        tl.store(indices + t * stride + place, latent_in(key))
    tl.store(last + t, key)
