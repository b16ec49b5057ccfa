"""Adds directions to tokens: to all, or to those that had to be counted for."""

import triton
import triton.language as tl

from .project import SETTLED


@triton.jit(do_not_specialize=["T", "F", "k"])
def add(
    x,  # [T, d]
    directions,  # [F, d]
    values,  # [F] or [T, F] fp32
    value_stride,  # 0 or F
    y,  # [T, d]; None: x is overwritten
    acts,  # [T, F] fp32; None: a_f = 0
    beaten,  # [T, F] int32
    waiting,  # [T] int32: the tokens; None: those that `beaten` says were counted for
    length,  # [1] int32: how many those are
    d,
    T,
    F,
    k,
    BLOCK_D: tl.constexpr,
):
    """y = x + sum_f (value_f - a_f) directions_f,    a_f = acts_f if beaten_f < k, else 0

    NaN stays NaN. A token that nothing changes is copied, or left alone in place; one that was
    settled already is left alone.
    """
    tokens = T
    if waiting is not None:
        tokens = tl.load(length)
    c = tl.arange(0, BLOCK_D)
    for i in range(tl.program_id(0), tokens, tl.num_programs(0)):
        t = tl.cast(i, tl.int64)
        if waiting is not None:
            t = tl.load(waiting + i).to(tl.int64)
        raw = tl.load(x + t * d + c, mask=c < d, other=0)  # [BLOCK_D]
        out = raw.to(tl.float32)
        moved = 0
        fewest = 0
        if acts is not None:
            fewest = SETTLED
        for e in range(F):
            delta = tl.load(values + t * value_stride + e)
            if acts is not None:
                number = tl.load(beaten + t * F + e)
                measured = tl.load(acts + t * F + e)
                delta -= tl.where((number < k) | (measured != measured), measured, 0.0)
                fewest = tl.minimum(fewest, number)
            direction = tl.load(directions + e * d + c, mask=c < d, other=0).to(tl.float32)
            out += delta * direction
            moved |= (delta != 0).to(tl.int32)
        written = tl.where(moved > 0, out.to(x.dtype.element_ty), raw)
        finished = fewest < SETTLED
        target = y
        if y is None:
            finished &= moved > 0
            target = x
            # Several threads may hold an element: all have read it before one writes it.
            tl.debug_barrier()
        tl.store(target + t * d + c, written, mask=c < tl.where(finished, d, 0))
