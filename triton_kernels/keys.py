"""Keys of latents: order_of(p_j) 2^32 + (2^32 - 1 - j), so that the larger one has the larger p, or
of equal ones the lower j. NaN is above every number, and -0 is 0."""

import triton
import triton.language as tl

NEVER = tl.constexpr(-(1 << 31))
"""Order of what is no latent: below that of every number."""


@triton.jit
def order_of(p):
    """An int32 that orders as p does."""
    bits = (p + 0.0).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(p == p, bits, 0x7FFFFFFF)


@triton.jit
def key_of(order, j):
    return (order.to(tl.int64) << 32) | (0xFFFFFFFF - j.to(tl.int64))


@triton.jit
def order_in(key):
    return (key >> 32).to(tl.int32)


@triton.jit
def latent_in(key):
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def preact_in(key):
    bits = order_in(key)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
