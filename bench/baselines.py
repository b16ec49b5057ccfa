"""The baselines: three ways in which a careful PyTorch user writes the same edit, with full-width
products, in the dtypes of x and W_enc.

    naive   encode, top-k, scatter, clamp, two dense decodes (the textbook form)
    lean    one encode, top-k, two sparse decodes
    smart   one encode, compare and count, one row of W_dec a feature (the identity of `steer`)

x [..., d]; W_enc [N, d]; b_enc [N], b_dec folded in; W_dec [N, d]; b_dec [d]; directions
[F, d] = W_dec[features]; features [F] int64; values [F]; each gives x' [..., d].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
