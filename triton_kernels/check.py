"""Checks of the ops' arguments, as far as they need no wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_encoder(op: str, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> None:
    check_rows(op, x, W_enc, b_enc)
    N = W_enc.shape[0]
    if not 1 <= k <= N:
        raise _error(op, f"k is {k}; accepted: 1 to {N}, the number of latents")


def check_rows(op: str, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> None:
    _dtype(op, "x", x, *FLOATS)
    _shape(op, "x", x, x.dim() >= 1, "[..., d]")
    _dtype(op, "W_enc", W_enc, *FLOATS)
    _device(op, x, W_enc=W_enc, b_enc=b_enc)
    d = x.shape[-1]
    fits = W_enc.dim() == 2 and W_enc.shape[1] == d
    _shape(op, "W_enc", W_enc, fits, f"[N, {d}], a latent a row, as wide as x")
    _contiguous(op, "W_enc", W_enc)
    N = W_enc.shape[0]
    _dtype(op, "b_enc", b_enc, torch.float32)
    _shape(op, "b_enc", b_enc, b_enc.shape == (N,) and b_enc.is_contiguous(), f"[{N}], contiguous")


def check_features(op: str, x: Tensor, features: Tensor) -> None:
    _device(op, x, features=features)
    _dtype(op, "features", features, torch.int64)
    _shape(op, "features", features, features.dim() == 1, "[F]")


def check_steer(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    directions: Tensor,
    features: Tensor,
    values: Tensor,
    k: int,
    mask: Tensor | None,
) -> None:
    op = "steer"
    check_encoder(op, x, W_enc, b_enc, k)
    check_features(op, x, features)
    check_add(op, x, directions, "values", values)
    wanted = "the features' rows of W_dec"
    _shape(op, "directions", directions, directions.shape[0] == features.shape[0], wanted)
    if mask is not None:
        _device(op, x, mask=mask)
        _dtype(op, "mask", mask, torch.bool)
        _shape(op, "mask", mask, mask.shape == x.shape[:-1], "x's leading sizes")


def check_order(op: str, x: Tensor, W_enc: Tensor, order: Tensor | None) -> None:
    if order is None:
        return
    N = W_enc.shape[0]
    _device(op, x, order=order)
    _dtype(op, "order", order, torch.int64)
    wanted = f"[{N}], contiguous, the latent of each row of W_enc"
    _shape(op, "order", order, order.shape == (N,) and order.is_contiguous(), wanted)


def check_add(op: str, x: Tensor, directions: Tensor, name: str, coef: Tensor) -> None:
    _dtype(op, "x", x, *FLOATS)
    _shape(op, "x", x, x.dim() >= 1, "[..., d]")
    _device(op, x, directions=directions, **{name: coef})
    _dtype(op, "directions", directions, *FLOATS)
    fits = directions.dim() == 2 and directions.shape[1] == x.shape[-1]
    _shape(op, "directions", directions, fits, f"[F, {x.shape[-1]}], as wide as x")
    _dtype(op, name, coef, torch.float32)
    F = directions.shape[0]
    fits = coef.shape in ((F,), (*x.shape[:-1], F))
    _shape(op, name, coef, fits, f"[{F}], or x's leading sizes and {F}")


def check_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> None:
    op = "decode"
    _device(op, values, indices=indices, W_dec=W_dec, b_dec=b_dec)
    _dtype(op, "values", values, torch.float32)
    _shape(op, "values", values, values.dim() >= 1, "[..., k]")
    _dtype(op, "indices", indices, torch.int64)
    _shape(op, "indices", indices, indices.shape == values.shape, "values' shape")
    _dtype(op, "W_dec", W_dec, *FLOATS)
    _shape(op, "W_dec", W_dec, W_dec.dim() == 2, "[N, d], a latent a row")
    _contiguous(op, "W_dec", W_dec)
    _dtype(op, "b_dec", b_dec, *FLOATS)
    _shape(op, "b_dec", b_dec, b_dec.shape == W_dec.shape[1:], "[d], as wide as W_dec")


def _device(op: str, x: Tensor, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.device != x.device:
            raise _error(op, f"{name} is on {t.device}; accepted: {x.device}, where the tokens are")


def _dtype(op: str, name: str, t: Tensor, *accepted: torch.dtype) -> None:
    if t.dtype not in accepted:
        got, *names = (str(dtype).removeprefix("torch.") for dtype in (t.dtype, *accepted))
        raise _error(op, f"{name} is {got}; accepted: {', '.join(names)}")


def _shape(op: str, name: str, t: Tensor, holds: bool, wanted: str) -> None:
    if not holds:
        raise _error(op, f"{name} has shape {list(t.shape)}; accepted: {wanted}")


def _contiguous(op: str, name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        hint = "a copy every call would cost more than the op: call .contiguous() once"
        raise _error(op, f"{name} is not contiguous; {hint}")


def _error(op: str, message: str) -> RuntimeError:
    return RuntimeError(f"saesteer::{op}: {message}")
