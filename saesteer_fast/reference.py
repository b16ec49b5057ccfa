"""What the ops compute, in plain PyTorch: impl="reference", which runs on any device, and the truth
that tests compare with.

Sums are fp64, which no setting of PyTorch turns into tf32, and are rounded once. Tokens are skipped
as the kernels skip them where the device may be asked; pre-activations, except `encode`'s, are held
for a few latents at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HELD = 1 << 22
"""Numbers held at once, of W_enc in fp64 and of the pre-activations."""


def may_read(t: Tensor) -> bool:
    """Whether Python may ask for its numbers: not while torch.compile or torch.func traces, or a
    CUDA graph is captured."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(t)
    return not (traced or (t.is_cuda and torch.cuda.is_current_stream_capturing()))


def preacts(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """p = x W_enc^T + b_enc in fp64; x [..., d], W_enc [N, d], b_enc [N] -> [..., N]."""
    return F.linear(x.double(), W_enc.double(), b_enc.double())


def rank(p: Tensor, features: Tensor, order: Tensor | None = None) -> Tensor:
    """How many latents beat each feature: p [T, N], features [F] -> [T, F] int64.

    "j beats f": p_j > p_f, or p_j = p_f and order_j < order_f; order [N] int64, the identity
    unless given. NaN beats every number, as in torch.topk.
    """
    everyone = torch.arange(p.shape[-1], device=p.device)
    order = everyone if order is None else order
    return _beaten(p, everyone, order, p[:, features], features, order[features])


def _beaten(
    p: Tensor, rows: Tensor, order: Tensor, p_f: Tensor, features: Tensor, places: Tensor
) -> Tensor:
    """How many of some latents, p [T, n] of `rows` [n] and in `order` [n], beat each feature."""
    counts = []
    for i in range(len(features)):
        mine = p_f[:, i, None]
        beats = ~(p <= mine) | ((p == mine) & (order < places[i]))
        counts.append((beats & (rows != features[i])).sum(-1))
    return torch.stack(counts, -1) if counts else p.new_zeros((len(p), 0), dtype=torch.int64)


def feature_acts(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    features: Tensor,
    k: int,
    order: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """a_f = p_f where p_f > 0 and fewer than k latents beat f, else 0; [..., F] in `dtype`.

    order [N]: which latent each row of W_enc is; `features` are rows. NaN where p_f is not finite:
    a token with NaN or infinity in it has no activations to speak of; and for a feature that is no
    row.
    """
    rows = x.reshape(-1, x.shape[-1])
    known, features = _known(features, W_enc)
    p_f = torch.where(known, preacts(rows, W_enc[features], b_enc[features]), torch.nan)
    with torch.no_grad():
        live = _live(rows, W_enc, b_enc, features, p_f, k, order)
    acts = torch.where(live, p_f, 0).where(p_f.isfinite(), torch.nan)
    return acts.to(dtype).reshape(*x.shape[:-1], features.numel())


def _known(indices: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Which are rows of the matrix, and the indices with 0 in place of the others."""
    known = (indices >= 0) & (indices < len(matrix))
    return known, torch.where(known, indices, 0)


def _live(rows, W_enc, b_enc, features, p_f, k, order) -> Tensor:
    """Where p_f > 0 and fewer than k latents beat f: [T, F]."""
    live = p_f > 0
    if not may_read(rows):
        return live & (_ranked(rows, W_enc, b_enc, features, p_f, order) < k)
    open_ = live.any(-1).nonzero()[:, 0]
    if not len(open_):
        return live
    ranks = _ranked(rows[open_], W_enc, b_enc, features, p_f[open_], order)
    return live.index_put((open_,), live[open_] & (ranks < k))


def _ranked(rows, W_enc, b_enc, features, p_f, order) -> Tensor:
    """`rank`, with no more than some latents of some tokens at once."""
    N, d = W_enc.shape
    everyone = torch.arange(N, device=rows.device)
    order = everyone if order is None else order
    latents = max(1, HELD // d)
    tokens = max(1, HELD // min(latents, N))
    places, ranks = order[features], []
    for x, mine in zip(rows.split(tokens), p_f.split(tokens), strict=True):
        parts = zip(*(t.split(latents) for t in (W_enc, b_enc, everyone, order)), strict=True)
        found = (
            _beaten(preacts(x, W, b), row, place, mine, features, places)
            for W, b, row, place in parts
        )
        ranks.append(sum(found))
    return torch.cat(ranks)


def steer(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    directions: Tensor,
    features: Tensor,
    values: Tensor,
    k: int,
    mask: Tensor | None = None,
    order: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x' = x + sum_f (value_f - a_f) directions_f, rounded once to `dtype`, by default x's.

    Tokens whose mask is False, and tokens that no edit changes, come out bit-identical. A token
    with NaN or infinity in it comes out all NaN, as its reconstruction does.
    """
    acts = feature_acts(x, W_enc, b_enc, features, k, order, dtype=dtype or torch.float32)
    delta = values.double() - acts.double()
    if mask is not None:
        delta = torch.where(mask[..., None], delta, 0)
    return _added(x, directions, delta).to(dtype or x.dtype)


def steer_(x: Tensor, *others: Tensor | int | None) -> None:
    """`steer`, written over x."""
    x.copy_(steer(x, *others))


def truth(*edit: Tensor | int | None) -> Tensor:
    """`steer` in fp64, not rounded."""
    return steer(*edit, dtype=torch.float64)


def _added(x: Tensor, directions: Tensor, coef: Tensor) -> Tensor:
    moved = (coef != 0).any(-1, keepdim=True)
    return torch.where(moved, x.double() + coef.double() @ directions.double(), x.double())


def undecided(x: Tensor, W_enc: Tensor, b_enc: Tensor, features: Tensor, k: int) -> Tensor:
    """Where fp32 accumulation could decide a rank either way: bool [..., F].

    A product of d terms and a bias summed in fp32 in any order err by at most tau = gamma_(d+2)
    sum |w_i x_i| (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), plus what flushing
    subnormal factors and sums loses. A decision is safe when neither the sign of p_f nor the k-th
    place can change.
    """
    rows = x.reshape(-1, x.shape[-1])
    n, u = x.shape[-1] + 2, 2.0**-24
    sizes = rows.double().abs().sum(-1, keepdim=True) + W_enc.double().abs().sum(-1)
    flushed = 2.0**-126 * (2 * n + sizes)
    size = preacts(rows.abs(), W_enc.abs(), b_enc.abs())
    tau = n * u / (1 - n * u) * size + flushed
    p = preacts(rows, W_enc, b_enc)
    inside = torch.empty((rows.shape[0], features.numel()), dtype=torch.bool, device=x.device)
    for i, f in enumerate(features.tolist()):
        gap, slack = p - p[:, f, None], tau + tau[:, f, None]
        sure, possible = gap > slack, gap >= -slack
        sure[:, f] = possible[:, f] = False
        close = (sure.sum(-1) < k) & (possible.sum(-1) >= k) & (p[:, f] > -tau[:, f])
        inside[:, i] = close | (p[:, f].abs() <= tau[:, f])
    return inside.reshape(*x.shape[:-1], features.numel())


def project(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """p = W_enc x + b_enc; W_enc [F, d], b_enc [F] -> [..., F] fp32."""
    return preacts(x, W_enc, b_enc).float()


def add_directions(x: Tensor, directions: Tensor, coef: Tensor) -> Tensor:
    """x' = x + sum_f coef_f directions_f, rounded once to x's dtype."""
    return _added(x, directions, coef.expand(*x.shape[:-1], -1)).to(x.dtype)


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The k largest activations, descending, ties to the lower index: values in `dtype`, indices,
    [..., k]."""
    rows = x.reshape(-1, x.shape[-1])
    W_enc = W_enc.double()  # once for all tokens
    found = [_largest(some, W_enc, b_enc, k) for some in rows.split(max(1, HELD // len(W_enc)))]
    values, indices = (
        torch.cat(parts).reshape(*x.shape[:-1], k) for parts in zip(*found, strict=True)
    )
    return torch.where(values <= 0, 0, values).to(dtype), indices


def _largest(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = preacts(x, W_enc, b_enc).sort(dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """b_dec + sum_i values_i W_dec[indices_i] over values that are not 0, NaN where an index is no
    latent's; [..., d] of what W_dec's and b_dec's promote to."""
    known, indices = _known(indices, W_dec)
    weights = torch.where(known, values.double(), torch.nan)[..., None]
    parts = torch.where(weights != 0, weights * W_dec[indices].double(), 0)
    recon = parts.sum(-2) + b_dec.double()
    return recon.to(torch.promote_types(W_dec.dtype, b_dec.dtype))
