"""L1 and L2: counts the latents that beat each open feature, until k do."""

import triton
import triton.language as tl

from .preacts import preacts
from .project import SETTLED


@triton.jit
def beating(p, p_f, feature, order, first, N, BLOCK_N: tl.constexpr):
    """How many of the latents from `first` on, p [BLOCK_M, BLOCK_N], beat p_f [BLOCK_M] > 0."""
    n = tl.arange(0, BLOCK_N)
    f = feature - first
    if order is not None:
        latents = tl.load(order + first + n, mask=first + n < N, other=0)
        known = (feature >= 0) & (feature < N)
        latent = tl.load(order + feature, mask=known, other=0)
        lower = (p == p_f[:, None]) & (latents < latent)[None, :]
        beats = ~(p <= p_f[:, None]) | lower
        number = tl.sum((beats & (n != f)[None, :]).to(tl.int32), 1)
    elif (f >= 0) & (f < BLOCK_N):
        beats = tl.where((n < f)[None, :], ~(p < p_f[:, None]), ~(p <= p_f[:, None]))
        number = tl.sum((beats & (n != f)[None, :]).to(tl.int32), 1)
    else:
        # Where ties beat, p >= p_f is p > the number before p_f.
        before = (p_f.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
        bar = tl.where(f >= BLOCK_N, before, p_f)
        number = tl.sum((~(p <= bar[:, None])).to(tl.int32), 1)
    return number


@triton.jit(do_not_specialize=["T", "F", "k", "low", "high"])
def count(
    x,  # [T, d]
    W,  # [N, d], or a tensor descriptor of it
    b,  # [N] fp32
    features,  # [F] int64: rows of W
    order,  # [N] int64: the latent of each row; None: its own number
    acts,  # [T, F] fp32: p_f where it is positive
    beaten,  # [T, F] int32
    decided,  # [tiles of tokens] int32: 1 where nothing is left to count
    waiting,  # [T] int32: the tokens to count for; None: every token
    length,  # [1] int32: how many those are
    N,
    d,
    T,
    F,
    k,
    low,
    high,
    DOT: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """beaten_f += #{j : p_j > p_f, or p_j = p_f and order_j < order_f}; f itself is left out by its
    index.

    Does nothing unless low < (tokens to count for) <= high: each size has its own tiles. A tile
    whose tokens are all decided is skipped. Counts are integers, so their order is no matter. p_f
    is summed in another order than p_j: a tie within fp32's rounding may fall either way.
    """
    tokens = T
    if waiting is not None:
        tokens = tl.load(length)
    across = tl.cdiv(N, BLOCK_N)
    down = tl.cdiv(tokens, BLOCK_M)
    tiles = tl.where((tokens > low) & (tokens <= high), across * down, 0)

    if waiting is None:
        # Mostly nobody is open. A count a thread: all of them learn the same.
        live = 0
        for start in range(0, T * F, 256):
            at = start + tl.arange(0, 256)
            so_far = tl.load(beaten + at, mask=at < T * F, other=SETTLED, volatile=True)
            live |= tl.max((so_far < k).to(tl.int32), 0)
        tiles = tl.where(live > 0, tiles, 0)

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # GROUP tiles of tokens pass over W together: their x stays in the cache, W is shared.
        group = tile // (GROUP * across)
        depth = tl.minimum(down - group * GROUP, GROUP)
        within = tile - group * GROUP * across
        first = (within // depth) * BLOCK_N
        m = group * GROUP + within % depth
        i = m * BLOCK_M + tl.arange(0, BLOCK_M)
        there = i < tokens
        t = i.to(tl.int64)
        if waiting is not None:
            t = tl.load(waiting + i, mask=there, other=0).to(tl.int64)

        # Who is undecided? Counts change while they are read, but threads must not differ in where
        # they go: an atomic is read by one of them, for all.
        opened = 0
        for e in range(F):
            so_far = tl.load(beaten + t * F + e, mask=there, other=SETTLED, volatile=True)
            opened |= tl.max((so_far < k).to(tl.int32), 0)
        tl.atomic_or(decided + m, 1, mask=opened == 0, sem="relaxed")
        if tl.atomic_add(decided + m, 0, sem="relaxed") == 0:
            p = preacts(
                x, t, there, W, b, first, N, d, DOT, DESCRIBED, WHOLE, BLOCK_M, BLOCK_N, BLOCK_K
            )
            # Count; a column past N is 0 and beats no p_f > 0
            for e in range(F):
                p_f = tl.load(acts + t * F + e, mask=there, other=0)
                number = beating(p, p_f, tl.load(features + e), order, first, N, BLOCK_N)
                found = (p_f > 0) & (number > 0)
                tl.atomic_add(beaten + t * F + e, number, mask=found, sem="relaxed")
