"""The checks of the ops' arguments that Python makes, under each op's name and signature, in the
words of csrc/checks.h. Only `elements` reads numbers, for which a GPU would have to be waited for.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .numbers import FLOATS


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
    op: str = "steer",
) -> None:
    feature_acts(x, W_enc, b_enc, features, k, order, op=op)
    _added(op, x, directions, "values", values, features.shape[0])
    if mask is not None:
        _device(op, x=x, mask=mask)
        _dtype(op, "mask", mask, torch.bool)
        _shape(op, "mask", mask, mask.shape == x.shape[:-1], "x's leading sizes")


def steer_(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    directions: Tensor,
    features: Tensor,
    values: Tensor,
    k: int,
    mask: Tensor | None = None,
    order: Tensor | None = None,
) -> None:
    op = "steer_"
    if not x.is_contiguous():
        hint = "accepted: a contiguous x, or saesteer::steer, which takes any"
        _refuse(op, f"x is not contiguous, and is overwritten where it lies; {hint}")
    read = dict(W_enc=W_enc, b_enc=b_enc, directions=directions, features=features, values=values)
    for name, t in (read | dict(mask=mask, order=order)).items():
        if t is not None and _share_memory(x, t):
            hint = "accepted: a copy of it"
            _refuse(op, f"{name} lies in the memory of x, which is overwritten; {hint}")
    steer(x, W_enc, b_enc, directions, features, values, k, mask, order, op=op)


def feature_acts(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    features: Tensor,
    k: int,
    order: Tensor | None = None,
    *,
    op: str = "feature_acts",
) -> None:
    encode(x, W_enc, b_enc, k, op=op)
    _device(op, x=x, features=features)
    _dtype(op, "features", features, torch.int64)
    _shape(op, "features", features, features.dim() == 1, "[F]")
    if order is not None:
        N = W_enc.shape[0]
        _device(op, x=x, order=order)
        _dtype(op, "order", order, torch.int64)
        wanted = f"[{N}], contiguous, the latent of each row of W_enc"
        _shape(op, "order", order, order.shape == (N,) and order.is_contiguous(), wanted)


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, op: str = "encode") -> None:
    project(x, W_enc, b_enc, op=op)
    N = W_enc.shape[0]
    if not 1 <= k <= N:
        _refuse(op, f"k is {k}; accepted: 1 to {N}, the number of latents")


def project(x: Tensor, W_enc: Tensor, b_enc: Tensor, *, op: str = "project") -> None:
    _device(op, x=x, W_enc=W_enc, b_enc=b_enc)
    _dtype(op, "x", x, *FLOATS)
    _shape(op, "x", x, x.dim() >= 1, "[..., d]")
    d = x.shape[-1]
    fits = W_enc.dim() == 2 and W_enc.shape[1] == d and W_enc.shape[0] >= 1
    _shape(op, "W_enc", W_enc, fits, f"[N, {d}], a latent a row, as wide as x")
    _dtype(op, "W_enc", W_enc, *FLOATS)
    _contiguous(op, "W_enc", W_enc)
    N = W_enc.shape[0]
    folded = " (with W_enc @ b_dec already subtracted, if the SAE does)"
    _dtype(op, "b_enc", b_enc, torch.float32, note=folded)
    _shape(op, "b_enc", b_enc, b_enc.shape == (N,) and b_enc.is_contiguous(), f"[{N}], contiguous")


def add_directions(x: Tensor, directions: Tensor, coef: Tensor) -> None:
    op = "add_directions"
    _dtype(op, "x", x, *FLOATS)
    _shape(op, "x", x, x.dim() >= 1, "[..., d]")
    _shape(op, "directions", directions, directions.dim() == 2, "[F, d], a row of W_dec a feature")
    _added(op, x, directions, "coef", coef, directions.shape[0])


def decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> None:
    op = "decode"
    _device(op, values=values, indices=indices, W_dec=W_dec, b_dec=b_dec)
    _dtype(op, "values", values, torch.float32)
    _shape(op, "values", values, values.dim() >= 1, "[..., k]")
    _dtype(op, "indices", indices, torch.int64)
    _shape(op, "indices", indices, indices.shape == values.shape, "values' shape")
    _dtype(op, "W_dec", W_dec, *FLOATS)
    _shape(op, "W_dec", W_dec, W_dec.dim() == 2, "[N, d], a latent a row")
    _contiguous(op, "W_dec", W_dec)
    _dtype(op, "b_dec", b_dec, *FLOATS)
    _shape(op, "b_dec", b_dec, b_dec.shape == W_dec.shape[1:], "[d], as wide as W_dec")


def elements(op: str, name: str, indices: Tensor, N: int) -> None:
    """Latents are 0 to N - 1; `features` name each of them once."""
    for index in indices[(indices < 0) | (indices >= N)].tolist():
        _refuse(op, f"{name} holds {index}; accepted: 0 to {N - 1}")
    if name == "features":
        seen = set()
        for index in indices.tolist():
            if index in seen:
                _refuse(op, f"features holds {index} twice; a latent can be edited once")
            seen.add(index)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    if torch.compiler.is_dynamo_compiling():  # which knows no storages; shapes alone are traced
        return False
    storages = a.untyped_storage(), b.untyped_storage()
    if not all(map(_address, storages)) and storages[0]._cdata != storages[1]._cdata:
        return False
    (a_begin, a_end), (b_begin, b_end) = _extent(a), _extent(b)
    return a_begin < b_end and b_begin < a_end


def _extent(t: Tensor) -> tuple[int, int]:
    """From the first byte to behind the last, counted from its storage's if that has no address;
    (0, 0) if there is none."""
    if t.numel() == 0:
        return 0, 0
    address = _address(t.untyped_storage())
    steps = zip(t.shape, t.stride(), strict=True)
    begin, size = t.storage_offset(), 1 + sum((n - 1) * step for n, step in steps)
    return address + begin * t.itemsize, address + (begin + size) * t.itemsize


def _address(storage: torch.UntypedStorage) -> int:
    """0 where there is none, as of fake tensors."""
    return 0 if storage.device.type == "meta" else storage.data_ptr()


def _added(op: str, x: Tensor, directions: Tensor, name: str, coef: Tensor, F: int) -> None:
    _device(op, x=x, directions=directions, **{name: coef})
    wanted = "[F, d], a row of W_dec a feature"
    _shape(op, "directions", directions, directions.shape == (F, x.shape[-1]), wanted)
    _dtype(op, "directions", directions, *FLOATS)
    _dtype(op, name, coef, torch.float32)
    fits = coef.shape in ((F,), (*x.shape[:-1], F))
    _shape(op, name, coef, fits, "[F], or x's leading sizes and F")


def _device(op: str, **tensors: Tensor) -> None:
    (first, x), *others = tensors.items()
    for name, t in others:
        if t.device != x.device:
            _refuse(op, f"{name} is on {t.device}, {first} on {x.device}; move one to the other")


def _dtype(op: str, name: str, t: Tensor, *accepted: torch.dtype, note: str = "") -> None:
    if t.dtype not in accepted:
        got, *names = (str(dtype).removeprefix("torch.") for dtype in (t.dtype, *accepted))
        _refuse(op, f"{name} is {got}; accepted: {', '.join(names)}{note}")


def _shape(op: str, name: str, t: Tensor, holds: bool, wanted: str) -> None:
    if not holds:
        _refuse(op, f"{name} has shape {list(t.shape)}; accepted: {wanted}")


def _contiguous(op: str, name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        hint = "a copy of it every call would cost more than the op: call .contiguous() once"
        _refuse(op, f"{name} is not contiguous; {hint}")


def _refuse(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"saesteer::{op}: {message}")
