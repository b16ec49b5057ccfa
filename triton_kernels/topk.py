"""The k largest pre-activations of each token, within each share of the latents."""

import triton
import triton.language as tl

from .keys import NEVER, key_of, latent_in, order_in, order_of
from .preacts import preacts


@triton.jit(do_not_specialize=["T", "k", "shares"])
def topk(
    x,  # [T, d]
    W,  # [N, d], or a tensor descriptor of it
    b,  # [N] fp32
    keys,  # [T, shares, k] int64, in no order
    last,  # [T] int64: only keys below it; None: all
    N,
    d,
    T,
    k,
    shares,
    DOT: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_BEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """keys = the k largest of key_of(order_of(p_j), j).

    A latent is looked at only if it exceeds the k-th best so far, which only rises.
    """
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = i < T
    t = i.to(tl.int64)
    share = tl.program_id(1)
    n = tl.arange(0, BLOCK_N)
    slot = tl.arange(0, BLOCK_BEST).to(tl.int64)

    # Places to fill: distinct, below every key. Those past k are never the lowest.
    best = tl.where(slot < k, slot - 0x7FFFFFFFFFFFFFFF, 0x7FFFFFFFFFFFFFFF)[None, :]
    best = tl.broadcast_to(best, (BLOCK_M, BLOCK_BEST))
    worst = tl.min(best, 1)  # [BLOCK_M]

    if last is not None:
        ceiling = tl.load(last + t, mask=there, other=0)[:, None]
        limit, taken = order_in(ceiling), latent_in(ceiling)

    tiles = tl.cdiv(N, BLOCK_N)
    for tile in range(tiles * share // shares, tiles * (share + 1) // shares):
        first = tile * BLOCK_N
        p = preacts(
            x, t, there, W, b, first, N, d, DOT, DESCRIBED, WHOLE, BLOCK_M, BLOCK_N, BLOCK_K
        )
        s = tl.where((first + n < N)[None, :] & there[:, None], order_of(p), NEVER)
        if last is not None:
            s = tl.where((s < limit) | ((s == limit) & ((first + n)[None, :] > taken)), s, NEVER)
        top = tl.max(s, 1)  # [BLOCK_M]
        bar = order_in(worst)
        # Each row's largest takes the place of the worst, while any row has one.
        while tl.max((top > bar).to(tl.int32), 0) > 0:
            at = tl.min(tl.where(s == top[:, None], n[None, :], BLOCK_N), 1)
            key = key_of(top, first + at)
            entering = (best == worst[:, None]) & (top > bar)[:, None]
            best = tl.where(entering, key[:, None], best)
            s = tl.where(n[None, :] == at[:, None], NEVER, s)
            top = tl.max(s, 1)
            worst = tl.min(best, 1)
            bar = order_in(worst)

    row = keys + (t * shares + share) * k
    tl.store(row[:, None] + slot[None, :], best, mask=there[:, None] & (slot < k)[None, :])
