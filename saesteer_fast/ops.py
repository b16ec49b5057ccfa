"""The torch ops: the functions that call them, their shapes for torch.compile, their gradients, and
their kernels where C++ registers none. The only file that names torch.ops.saesteer.

    torch.ops.saesteer.steer(x, W_enc, b_enc, directions, features, values, k, mask=None,
                             order=None) -> Tensor
    torch.ops.saesteer.steer_(x, ... as above) -> ()                   x is overwritten by x'
    torch.ops.saesteer.feature_acts(x, W_enc, b_enc, features, k, order=None) -> Tensor
    torch.ops.saesteer.project(x, W_enc, b_enc) -> Tensor
    torch.ops.saesteer.add_directions(x, directions, coef) -> Tensor
    torch.ops.saesteer.encode(x, W_enc, b_enc, k) -> (Tensor values, Tensor indices)
    torch.ops.saesteer.decode(values, indices, W_dec, b_dec) -> Tensor

The CPU has compiled kernels. torch.ops.saesteer_triton and torch.ops.saesteer_cuda hold the same
ops, always by Triton and always by the CUDA library. On a GPU torch.ops.saesteer calls these, or
the reference, as choice.py has it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from . import (
    checks,
    compiled,  # noqa: F401  (the ops are in its library)
    gradients,
    reference,
    transforms,
)
from .choice import chosen, on_gpu

_OPS = torch.ops.saesteer
_TRITON = torch.ops.saesteer_triton
_BY_CUDA = torch.ops.saesteer_cuda
_NAMES = ("steer", "steer_", "feature_acts", "project", "add_directions", "encode", "decode")
_SPACES = ("saesteer", "saesteer_triton", "saesteer_cuda")
for _name in _NAMES:
    _schema = str(getattr(_OPS, _name).default._schema).removeprefix(f"saesteer::{_name}")
    for _space in _SPACES[1:]:
        torch.library.define(f"{_space}::{_name}", _schema)


_LATENTS = {
    "steer": ("features", "W_enc"),
    "steer_": ("features", "W_enc"),
    "feature_acts": ("features", "W_enc"),
    "decode": ("indices", "W_dec"),
}
"""The argument that names latents, and the matrix with a row for each."""


def _by_reference(name: str) -> Callable:
    """The reference, which takes and refuses what the op does."""
    check, compute = getattr(checks, name), getattr(reference, name)
    names = [argument.name for argument in getattr(_OPS, name).default._schema.arguments]

    def run(*args):
        if name == "steer_" and not torch.compiler.is_compiling():
            transforms.require_untracked(_OPS.steer_.default, *args)
        check(*args)
        if name in _LATENTS:
            argument, matrix = _LATENTS[name]
            given = dict(zip(names, args, strict=False))  # what has a default may be left out
            indices = given[argument]
            if indices.is_cpu and reference.may_read(indices):
                checks.elements(name, argument, indices, given[matrix].shape[0])
        return compute(*args)

    return run


def _called(space: torch._ops._OpNamespace) -> SimpleNamespace:
    """Its ops, as they are called from here."""
    ops = {name: getattr(space, name).default for name in _NAMES}
    return SimpleNamespace(**{name: transforms.called(op) for name, op in ops.items()})


_AUTO = _called(_OPS)
_REFERENCE = SimpleNamespace(**{name: _by_reference(name) for name in _NAMES})
_BY = {
    "auto": _AUTO,
    "cpu": _AUTO,
    "cuda": _called(_BY_CUDA),
    "triton": _called(_TRITON),
    "reference": _REFERENCE,
}
"""The ops as each implementation computes them; on the CPU "auto" is "cpu"."""


def steer(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    directions: Tensor,
    features: Tensor,
    values: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    order: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Set SAE latents to constants, keeping what the SAE cannot express.

        x' = x + sum_f (value_f - a_f) directions_f,    a_f as `feature_acts` gives it

    x [..., d] fp32, bf16 or fp16; W_enc [N, d], a latent a row, contiguous, any of these dtypes;
    b_enc [N] fp32, b_dec folded in; directions [F, d] = W_dec[features]; features [F] int64,
    distinct; values [F] or [..., F] fp32; mask bool [...], True = steer this token; order as for
    `feature_acts`. Sums are fp32; x' has x's dtype and is rounded once. Tokens outside the mask,
    and tokens that no edit changes, come out bit-identical; a token with NaN or infinity in it
    comes out NaN. Differentiable in x and values. Raises RuntimeError naming the argument,
    ValueError for an unknown `impl`.
    """
    return _BY[chosen(impl, x)].steer(x, W_enc, b_enc, directions, features, values, k, mask, order)


def steer_(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    directions: Tensor,
    features: Tensor,
    values: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    order: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """`steer` that writes x' over x, bit for bit the same, for whoever owns x and has no use for it
    any more.

    Nothing of x's size is allocated; tokens that `steer` would copy are not touched. x must be
    contiguous, and no other argument lie in its memory. Not differentiable: NotImplementedError
    where `steer` would give a gradient, and under the transforms of torch.func.
    """
    _BY[chosen(impl, x)].steer_(x, W_enc, b_enc, directions, features, values, k, mask, order)


def feature_acts(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    features: Tensor,
    k: int,
    *,
    order: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The activations of a few latents of a top-k SAE, without encoding: [..., F] fp32.

        p_j = W_enc[j]·x + b_enc_j
        a_f = p_f if p_f > 0 and fewer than k latents beat f, else 0
        j beats f if p_j > p_f, or p_j = p_f and order_j < order_f

    order [N] int64, contiguous, a permutation: which latent each row of W_enc is, where they are
    not stored by number; j and f, and so `features`, are rows. Rows that are live most often, put
    first, end the counting soonest; the activations are the same. That order is a permutation is
    not checked, and decides ties alone. NaN where p_f is not finite. Other arguments and errors as
    for `steer`; differentiable in x.
    """
    return _BY[chosen(impl, x)].feature_acts(x, W_enc, b_enc, features, k, order)


def project(x: Tensor, W_enc: Tensor, b_enc: Tensor, *, impl: str = "auto") -> Tensor:
    """p = W_enc x + b_enc for a few rows, summed in fp32: [..., F] fp32.

    x [..., d], W_enc [F, d], both fp32, bf16 or fp16; b_enc [F] fp32. A row's p is bit for bit what
    `feature_acts` gives of it where it is live. Differentiable in x. Errors as for `steer`.
    """
    return _BY[chosen(impl, x)].project(x, W_enc, b_enc)


def add_directions(x: Tensor, directions: Tensor, coef: Tensor, *, impl: str = "auto") -> Tensor:
    """x' = x + sum_f coef_f directions_f, summed in fp32, rounded once to x's dtype.

    x [..., d], directions [F, d], both fp32, bf16 or fp16; coef [F] or [..., F] fp32. Tokens whose
    coefficients are all zero come out bit-identical. Differentiable in x and coef. Errors as for
    `steer`.
    """
    return _BY[chosen(impl, x)].add_directions(x, directions, coef)


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations, descending, ties to the lower index, negative ones as 0.

    Values [..., k] fp32 and indices [..., k] int64; NaN counts as the largest, as in torch.topk.
    Arguments and errors as for `steer`; differentiable in x.
    """
    return _BY[chosen(impl, x)].encode(x, W_enc, b_enc, k)


def decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, *, impl: str = "auto"
) -> Tensor:
    """recon = b_dec + sum_i values_i W_dec[indices_i], summed in fp32 and rounded once: [..., d].

    values [..., k] fp32, indices [..., k] int64; W_dec [N, d] and b_dec [d] fp32, bf16 or fp16.
    recon has their dtype, or fp32 where they differ. Differentiable in values. Errors as for
    `steer`.
    """
    return _BY[chosen(impl, values)].decode(values, indices, W_dec, b_dec)


def _by_triton(name: str) -> Callable:
    def run(*args):
        from .triton_kernels import launch  # Triton is optional

        return getattr(launch, name)(*args)

    return run


def _best_on_gpu(name: str) -> Callable:
    def run(x, *args):
        return getattr(_BY[on_gpu(x)], name)(x, *args)

    return run


def _fake(name: str) -> Callable:
    def register(shapes: Callable) -> Callable:
        for space in _SPACES:
            torch.library.register_fake(f"{space}::{name}", shapes)
        return shapes

    return register


@_fake("steer")
def _(x, W_enc, b_enc, directions, features, values, k, mask=None, order=None):
    checks.steer(x, W_enc, b_enc, directions, features, values, k, mask, order)
    return x.new_empty(x.shape)


@_fake("steer_")
def _(x, W_enc, b_enc, directions, features, values, k, mask=None, order=None):
    checks.steer_(x, W_enc, b_enc, directions, features, values, k, mask, order)


@_fake("project")
def _(x, W_enc, b_enc):
    checks.project(x, W_enc, b_enc)
    return x.new_empty((*x.shape[:-1], W_enc.shape[0]), dtype=torch.float32)


@_fake("add_directions")
def _(x, directions, coef):
    checks.add_directions(x, directions, coef)
    return x.new_empty(x.shape)


@_fake("feature_acts")
def _(x, W_enc, b_enc, features, k, order=None):
    checks.feature_acts(x, W_enc, b_enc, features, k, order)
    return x.new_empty((*x.shape[:-1], features.shape[0]), dtype=torch.float32)


@_fake("encode")
def _(x, W_enc, b_enc, k):
    checks.encode(x, W_enc, b_enc, k)
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)


@_fake("decode")
def _(values, indices, W_dec, b_dec):
    checks.decode(values, indices, W_dec, b_dec)
    dtype = torch.promote_types(W_dec.dtype, b_dec.dtype)
    return W_dec.new_empty((*values.shape[:-1], W_dec.shape[1]), dtype=dtype)


for _name in _NAMES:
    torch.library.impl(f"saesteer_triton::{_name}", ("cpu", "cuda"), _by_triton(_name))
    torch.library.impl(f"saesteer::{_name}", "cuda", _best_on_gpu(_name))

for _space in (_OPS, _TRITON, _BY_CUDA):
    for _name, _gradient in gradients.of(_space).items():
        transforms.register(getattr(_space, _name).default, _gradient)
    transforms.register_in_place(_space.steer_.default)
