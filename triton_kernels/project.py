"""L0: projects every token on the edited latents, and finishes the tokens that this settles."""

import triton
import triton.language as tl

SETTLED = tl.constexpr(1 << 30)
"""Count of a latent that needs no counting; more than there are latents."""


@triton.jit(do_not_specialize=["T", "F"])
def project(
    x,  # [T, d]
    W,  # [N, d]
    b,  # [N] fp32
    features,  # [F] int64; None: the rows of W
    directions,  # [F, d]; None: measure only
    values,  # [F] or [T, F] fp32
    value_stride,  # 0 or F
    mask,  # [T] bool, or None: every token
    y,  # [T, d]; None: x is overwritten
    acts,  # [T, F] fp32
    beaten,  # [T, F] int32; None: p_f is all that is wanted, in `acts`
    decided,  # [T / ROWS] int32: set to 0
    waiting,  # [T] int32: the tokens to count for; None: found out from `beaten`
    length,  # [1] int32: how many those are
    N,
    d,
    T,
    F,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """p_f = W[f] . x + b_f

    acts = NaN if p_f is not finite, p_f if p_f > 0, else 0; beaten = 0 if p_f > 0, else SETTLED
    y = x + sum_f (value_f - acts_f) directions_f       for a token that needs no counting
    """
    r = tl.arange(0, ROWS)
    t = (tl.program_id(0) * ROWS + r).to(tl.int64)
    c = tl.arange(0, BLOCK_D)
    there = t < T
    taken = there
    if mask is not None:
        taken = there & tl.load(mask + t, mask=there, other=0).to(tl.int1)
    inside = there[:, None] & (c < d)[None, :]
    raw = tl.load(x + t[:, None] * d + c[None, :], mask=inside, other=0)  # [ROWS, BLOCK_D]
    row = raw.to(tl.float32)
    out = row
    opened = t < 0
    moved = t < 0

    for i in range(F):
        # An index that is no latent's reads nothing, and its NaN shows.
        f = tl.cast(i, tl.int64)
        if features is not None:
            f = tl.load(features + i)
        known = (f >= 0) & (f < N)
        w = tl.load(W + f * d + c, mask=c < tl.where(known, d, 0), other=0).to(tl.float32)
        bias = tl.load(b + f, mask=known, other=float("nan"))
        if directions is not None:  # asked for before the sum, which waits for all threads
            value = tl.load(values + t * value_stride + i, mask=there, other=0)
            direction = tl.load(directions + i * d + c, mask=c < d, other=0)
        p = tl.sum(row * w[None, :], 1) + bias  # [ROWS]
        finite = tl.abs(p) < float("inf")
        positive = finite & (p > 0) & taken
        if beaten is not None:
            p = tl.where(finite, tl.maximum(p, 0.0), float("nan"))
            tl.store(beaten + t * F + i, tl.where(positive, 0, SETTLED), mask=there)
        tl.store(acts + t * F + i, p, mask=there)
        opened |= positive
        if directions is not None:
            # As if a_f were 0: where it may not be, `add` writes the row.
            delta = tl.where(finite, value, float("nan"))
            out += delta[:, None] * direction.to(tl.float32)[None, :]
            moved |= delta != 0

    if directions is not None:
        changed = moved & taken
        written = tl.where(changed[:, None], out.to(x.dtype.element_ty), raw)
        finished = ~opened
        target = y
        if y is None:
            finished &= changed
            target = x
            # Several threads may hold an element: all have read it before one writes it.
            tl.debug_barrier()
        tl.store(target + t[:, None] * d + c[None, :], written, mask=inside & finished[:, None])
    if decided is not None:
        tl.store(decided + tl.program_id(0), 0)
    if waiting is not None:
        one = opened.to(tl.int32)
        number = tl.sum(one, 0)
        if number > 0:
            place = tl.atomic_add(length, number) + tl.cumsum(one, 0) - 1
            tl.store(waiting + place, t.to(tl.int32), mask=opened)
