"""The pre-activations of a tile of tokens and consecutive latents; on chip, never stored."""

import triton
import triton.language as tl


@triton.jit
def preacts(
    x,  # [T, d]
    t,  # [BLOCK_M] int64: rows of x
    there,  # [BLOCK_M] bool: rows to read; the others are 0
    W,  # [N, d], or a tensor descriptor of it with blocks [BLOCK_N, BLOCK_K]
    b,  # [N] fp32
    first,  # the tile's first latent
    N,
    d,
    DOT: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """p_j = W[j] . x_t + b_j, summed in fp32: [BLOCK_M, BLOCK_N]; 0 for j >= N.

    DOT is the type that x and W meet in; WHOLE says that BLOCK_K divides d.
    """
    n = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_K)
    j = first + n
    x_at = x + t[:, None] * d + c[None, :]
    if not DESCRIBED:
        w_at = W + tl.cast(first, tl.int64) * d + n[:, None] * d + c[None, :]
    p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, d, BLOCK_K):
        if WHOLE:
            x_in = there[:, None]
            w_in = (j < N)[:, None]
        else:
            inside = (start + c < d)[None, :]
            x_in = there[:, None] & inside
            w_in = (j < N)[:, None] & inside
        rows = tl.load(x_at + start, mask=x_in, other=0)  # [BLOCK_M, BLOCK_K]
        if DESCRIBED:
            w = W.load([first, start])  # [BLOCK_N, BLOCK_K]
        else:
            w = tl.load(w_at + start, mask=w_in, other=0)
        p = tl.dot(rows.to(DOT), w.to(DOT).T, p, input_precision="ieee")
    return p + tl.load(b + j, mask=j < N, other=0)[None, :]
