"""What the ops compute, in plain PyTorch: the truth that tests compare with and the baselines that
benchmarks run against.

`feature_acts`, `steer`, `encode` and `decode` follow the definition directly, at any precision;
`truth` is `steer` in fp64 over the stored inputs, unrounded. `naive`, `lean` and `smart` are three
ways a careful PyTorch user writes the same edit with full-width products:

    naive   encode, top-k, scatter, clamp, two dense decodes (the textbook form)
    lean    one encode, top-k, two sparse decodes
    smart   one encode, compare and count, one row of W_dec a feature (the identity of `steer`)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 25
"""Pre-activations held at once by the reference: tokens are taken in groups of CHUNK / N."""


def preacts(x: Tensor, W_enc: Tensor, b_enc: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """p = x W_enc^T + b_enc in `dtype`; x [..., d], W_enc [N, d], b_enc [N] -> [..., N]."""
    return F.linear(x.to(dtype), W_enc.to(dtype), b_enc.to(dtype))


def rank(p: Tensor, features: Tensor, order: Tensor | None = None) -> Tensor:
    """How many latents beat each feature: p [T, N], features [F] -> [T, F] int64.

    "j beats f": p_j > p_f, or p_j = p_f and order_j < order_f; order [N] int64, the identity
    unless given. NaN beats every number, as in torch.topk.
    """
    if order is None:
        order = torch.arange(p.shape[-1], device=p.device)
    counts = []
    for f in features.tolist():
        p_f = p[:, f, None]
        beats = ~(p <= p_f) | ((p == p_f) & (order < order[f]))
        beats[:, f] = False
        counts.append(beats.sum(-1))
    return torch.stack(counts, -1) if counts else p.new_zeros((p.shape[0], 0), dtype=torch.int64)


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
    a token with NaN or infinity in it has no activations to speak of.
    """
    rows = x.reshape(-1, x.shape[-1])
    acts = rows.new_empty((rows.shape[0], features.numel()), dtype=dtype)
    step = max(1, CHUNK // W_enc.shape[0])
    for start in range(0, rows.shape[0], step):
        p = preacts(rows[start : start + step], W_enc, b_enc, dtype)
        p_f = p[:, features]
        live = (p_f > 0) & (rank(p, features, order) < k)
        acts[start : start + step] = torch.where(live, p_f, 0).where(p_f.isfinite(), torch.nan)
    return acts.reshape(*x.shape[:-1], features.numel())


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
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x' = x + sum_f (value_f - a_f) directions_f, in `dtype`, rounded once to x's dtype.

    Tokens whose mask is False, and tokens that no edit changes, come out bit-identical. A token
    with NaN or infinity in it comes out all NaN, as its reconstruction does.
    """
    y = _steered(x, W_enc, b_enc, directions, features, values, k, mask, order, dtype)
    return y.to(x.dtype)


def steer_(x: Tensor, *others: Tensor | int | None) -> None:
    """`steer`, written over x."""
    x.copy_(steer(x, *others))


def truth(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    directions: Tensor,
    features: Tensor,
    values: Tensor,
    k: int,
    mask: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """`steer` in fp64, not rounded."""
    return _steered(x, W_enc, b_enc, directions, features, values, k, mask, order, torch.float64)


def _steered(x, W_enc, b_enc, directions, features, values, k, mask, order, dtype) -> Tensor:
    acts = feature_acts(x, W_enc, b_enc, features, k, order, dtype=dtype)
    delta = values.to(dtype) - acts
    if mask is not None:
        delta = torch.where(mask[..., None], delta, 0)
    return _added(x, directions, delta, dtype)


def _added(x, directions, coef, dtype) -> Tensor:
    moved = (coef != 0).any(-1, keepdim=True)
    sum_ = x.to(dtype) + coef.to(dtype) @ directions.to(dtype)
    return torch.where(moved, sum_, x.to(dtype))


def undecided(x: Tensor, W_enc: Tensor, b_enc: Tensor, features: Tensor, k: int) -> Tensor:
    """Where fp32 accumulation could decide a rank either way: bool [..., F].

    A product of d terms and a bias summed in fp32 in any order err by at most tau = gamma_(d+1)
    sum |w_i x_i| (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), plus what flushing
    subnormal factors and sums loses. A decision is safe when neither the sign of p_f nor the k-th
    place can change.
    """
    rows = x.reshape(-1, x.shape[-1])
    n, u = x.shape[-1] + 2, 2.0**-24
    sizes = rows.double().abs().sum(-1, keepdim=True) + W_enc.double().abs().sum(-1)
    flushed = 2.0**-126 * (n + sizes)
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


def project(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """p = W_enc x + b_enc in `dtype`; W_enc [F, d], b_enc [F] -> [..., F]."""
    return preacts(x, W_enc, b_enc, dtype)


def add_directions(
    x: Tensor, directions: Tensor, coef: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """x' = x + sum_f coef_f directions_f in `dtype`, rounded once to x's dtype."""
    return _added(x, directions, coef.expand(*x.shape[:-1], -1), dtype).to(x.dtype)


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The k largest activations, descending, ties to the lower index: values, indices [..., k]."""
    p = preacts(x, W_enc, b_enc, dtype)
    values, indices = p.sort(dim=-1, descending=True, stable=True)
    values, indices = values[..., :k], indices[..., :k]
    return torch.where(values <= 0, 0, values), indices


def decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """b_dec + sum_i values_i W_dec[indices_i], summed in values' dtype; [..., d] of what W_dec's
    and b_dec's promote to."""
    rows = W_dec[indices].to(values.dtype)
    recon = (values[..., None] * rows).sum(-2) + b_dec.to(values.dtype)
    return recon.to(torch.promote_types(W_dec.dtype, b_dec.dtype))


def naive(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    features: Tensor,
    values: Tensor,
    k: int,
) -> Tensor:
    """The textbook path: dense activations, clamp, decode(a') + (x - decode(a))."""
    top = _topk(x, W_enc, b_enc, k)
    acts = top.values.new_zeros((*x.shape[:-1], W_enc.shape[0]))
    acts.scatter_(-1, top.indices, top.values)
    bias = b_dec.to(acts.dtype)
    error = x - F.linear(acts, W_dec.mT, bias)
    acts[..., features] = values.to(acts.dtype)
    return (F.linear(acts, W_dec.mT, bias) + error).to(x.dtype)


def lean(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    features: Tensor,
    values: Tensor,
    k: int,
) -> Tensor:
    """One encode; both decodes read only the rows of W_dec that are live."""
    rows = x.reshape(-1, x.shape[-1])
    top = _topk(rows, W_enc, b_enc, k)
    error = rows - _bag(top.indices, top.values, W_dec, b_dec)
    kept = (top.indices[..., None] != features).all(-1)
    clamped = values.to(top.values.dtype).expand(rows.shape[0], -1)
    acts = torch.cat([top.values * kept, clamped], -1)
    indices = torch.cat([top.indices, features.expand(rows.shape[0], -1)], -1)
    return (_bag(indices, acts, W_dec, b_dec) + error).to(x.dtype).reshape(x.shape)


def smart(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    directions: Tensor,
    features: Tensor,
    values: Tensor,
    k: int,
) -> Tensor:
    """The identity with a full-width product: no top-k, no decode."""
    p = _product(x, W_enc, b_enc)
    p_f = p[..., features]
    beaten = torch.stack([(p > p_f[..., i, None]).sum(-1) for i in range(len(features))], -1)
    acts = torch.where((p_f > 0) & (beaten < k), p_f, 0)
    return x + ((values - acts).to(directions.dtype) @ directions).to(x.dtype)


def _product(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, W_enc.dtype)
    return F.linear(x.to(dtype), W_enc.to(dtype), b_enc.to(dtype))


def _topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int):
    return F.relu(_product(x, W_enc, b_enc)).topk(k, dim=-1)


def _bag(indices: Tensor, acts: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    weights = acts.to(W_dec.dtype)
    recon = F.embedding_bag(indices, W_dec, per_sample_weights=weights, mode="sum")
    return recon + b_dec.to(W_dec.dtype)
