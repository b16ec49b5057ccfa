"""The ops' gradients: in the stream, and in what is written to it.

What is live is a constant, as in torch.topk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


class Gradient(NamedTuple):
    of: tuple[str, ...]
    """The arguments that have one."""
    save: Callable
    """setup_context of a torch.autograd.Function: keeps what `backward` needs."""
    backward: Callable


def of(ops: torch._ops._OpNamespace) -> dict[str, Gradient]:
    """Of each op. Whichever kernels a namespace stands for decide backward too."""
    backward = partial(_steer_backward, ops.feature_acts)
    return {
        "steer": Gradient(("x", "values"), _save_steer, backward),
        "feature_acts": Gradient(("x",), _save_feature_acts, _feature_acts_backward),
        "project": Gradient(("x",), _save_project, _project_backward),
        "add_directions": Gradient(("x", "coef"), _save_add_directions, _add_directions_backward),
        "encode": Gradient(("x",), _save_encode, _encode_backward),
        "decode": Gradient(("values",), _save_decode, _decode_backward),
    }


def _shared(x: Tensor, values: Tensor) -> bool:
    """Whether one row of values serves all tokens."""
    return values.dim() == 1 and x.dim() > 1


def _sum_to(slope: Tensor, shared: bool) -> Tensor:
    return slope.sum(tuple(range(slope.dim() - 1))) if shared else slope


def _save_steer(ctx, inputs, output):
    x, W_enc, b_enc, directions, features, values, ctx.k, mask, order = inputs
    ctx.shared = _shared(x, values)
    ctx.save_for_backward(x, W_enc, b_enc, directions, features, mask, order)


def _steer_backward(feature_acts, ctx, grad):
    # dx'/dvalue_f = directions_f;  dx'/dx = 1 - sum over live f of directions_f W_enc[f]^T
    x, W_enc, b_enc, directions, features, mask, order = ctx.saved_tensors
    slope = grad.float() @ directions.float().mT
    if mask is not None:
        slope = slope * mask[..., None]
    grad_x = grad_values = None
    if ctx.needs_input_grad[0]:
        live = feature_acts(x, W_enc, b_enc, features, ctx.k, order) > 0
        grad_x = (grad.float() - (slope * live) @ W_enc[features].float()).to(grad.dtype)
    if ctx.needs_input_grad[5]:
        grad_values = _sum_to(slope, ctx.shared)
    return grad_x, None, None, None, None, grad_values, None, None, None


def _save_feature_acts(ctx, inputs, output):
    x, W_enc, _, features, _, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(output, W_enc, features)


def _feature_acts_backward(ctx, grad):
    acts, W_enc, features = ctx.saved_tensors
    grad_x = (grad * (acts > 0)) @ W_enc[features].float()
    return grad_x.to(ctx.dtype), None, None, None, None, None


def _save_project(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(inputs[1])


def _project_backward(ctx, grad):
    (W_enc,) = ctx.saved_tensors
    return (grad @ W_enc.float()).to(ctx.dtype), None, None


def _save_add_directions(ctx, inputs, output):
    x, directions, coef = inputs
    ctx.shared = _shared(x, coef)
    ctx.save_for_backward(directions)


def _add_directions_backward(ctx, grad):
    (directions,) = ctx.saved_tensors
    return grad, None, _sum_to(grad.float() @ directions.float().mT, ctx.shared)


def _save_encode(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, inputs[1])


def _encode_backward(ctx, grad, _):
    values, indices, W_enc = ctx.saved_tensors
    grad_x = ((grad * (values > 0))[..., None] * W_enc[indices].float()).sum(-2)
    return grad_x.to(ctx.dtype), None, None, None


def _save_decode(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], inputs[2])


def _decode_backward(ctx, grad):
    indices, W_dec = ctx.saved_tensors
    return (W_dec[indices].float() @ grad.float()[..., None]).squeeze(-1), None, None, None
