"""The torch ops: loads the compiled library, gives the ops shapes for torch.compile and gradients,
and chooses who computes them. The only file that names torch.ops.saesteer.

    torch.ops.saesteer.steer(x, W_enc, b_enc, directions, features, values, k, mask=None,
                             order=None) -> Tensor
    torch.ops.saesteer.steer_(x, ... as above) -> ()                   x is overwritten by x'
    torch.ops.saesteer.feature_acts(x, W_enc, b_enc, features, k, order=None) -> Tensor
    torch.ops.saesteer.project(x, W_enc, b_enc) -> Tensor
    torch.ops.saesteer.add_directions(x, directions, coef) -> Tensor
    torch.ops.saesteer.encode(x, W_enc, b_enc, k) -> (Tensor values, Tensor indices)
    torch.ops.saesteer.decode(values, indices, W_dec, b_dec) -> Tensor

The CPU has compiled kernels. torch.ops.saesteer_triton and torch.ops.saesteer_cuda hold the same
ops, always by Triton and always by the CUDA library. On a GPU these run where they were found right
(verdicts.py) or are asked for; elsewhere the reference does.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import checks, gradients, reference, transforms, verdicts

_LIBRARY = Path(__file__).with_name("libsaesteer_ops.so")
try:
    torch.ops.load_library(_LIBRARY)
except OSError as error:
    _here = " (this is the source tree: leave it, or install with -e)"
    _is_source = _LIBRARY.parents[1].joinpath("setup.py").exists()
    raise ImportError(
        f"saesteer_fast's compiled ops do not load from {_LIBRARY}; build them with "
        f"`pip install --no-build-isolation .` under this PyTorch{_here * _is_source}"
    ) from error

from . import _build  # noqa: E402  (speaks of the library, so it comes after it)

_OPS = torch.ops.saesteer
_TRITON = torch.ops.saesteer_triton
_BY_CUDA = torch.ops.saesteer_cuda
_NAMES = ("steer", "steer_", "feature_acts", "project", "add_directions", "encode", "decode")
_SPACES = ("saesteer", "saesteer_triton", "saesteer_cuda")
for _name in _NAMES:
    _schema = str(getattr(_OPS, _name).default._schema).removeprefix(f"saesteer::{_name}")
    for _space in _SPACES[1:]:
        torch.library.define(f"{_space}::{_name}", _schema)


def _load_cuda() -> str | None:
    """Loads the CUDA library; why not, if it cannot be."""
    if reason := _build.facts()["no_cuda_reason"]:
        return f"the CUDA library is not built: {reason}"
    if not torch.backends.cuda.is_built():
        return "this PyTorch is built without CUDA"
    try:
        torch.ops.load_library(_LIBRARY.with_name("libsaesteer_cuda.so"))
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    return None


_NO_CUDA = _load_cuda()


_LATENTS = {
    "steer": ("features", 4, 1),
    "steer_": ("features", 4, 1),
    "feature_acts": ("features", 3, 1),
    "decode": ("indices", 1, 2),
}
"""The argument that names latents, its place, and that of the matrix with a row for each."""


def _by_reference(name: str) -> Callable:
    """The reference, which takes and refuses what the op does."""
    check, compute = getattr(checks, name), getattr(reference, name)

    def run(*args):
        if name == "steer_" and not torch.compiler.is_compiling():
            transforms.require_untracked(_OPS.steer_.default, *args)
        check(*args)
        if name in _LATENTS:
            argument, *places = _LATENTS[name]
            indices, matrix = (args[place] for place in places)
            if indices.is_cpu and reference.may_read(indices):
                checks.elements(name, argument, indices, matrix.shape[0])
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
_DEFAULT = os.environ.get("SAESTEER_IMPL", "auto")
if _DEFAULT not in _BY:
    raise ValueError(f"SAESTEER_IMPL: got {_DEFAULT!r}, accepted are {', '.join(_BY)}")

_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
_CUDA = frozenset(name for name in _NAMES if _has_kernel(f"saesteer_cuda::{name}", "CUDA"))
_HAS_TRITON = importlib.util.find_spec("triton") is not None

KERNELS = ("cuda", "triton")
"""The implementations that have kernels for GPUs."""
_ON_GPU: verdicts.Rows = ((0, ("reference",)),)
"""What impl="auto" runs on a GPU that `saesteer verify` has not tried: from so many tokens on, the
first of these that is there. One row for all shapes, and no kernels in it until bench/results holds
a run of `make gpu` that found them right; it proposes the rows."""


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
    return _chosen("steer", impl, x)(x, W_enc, b_enc, directions, features, values, k, mask, order)


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
    _chosen("steer_", impl, x)(x, W_enc, b_enc, directions, features, values, k, mask, order)


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
    not checked, and decides ties alone. NaN where p_f is not finite. Other arguments as for
    `steer`; differentiable in x.
    """
    return _chosen("feature_acts", impl, x)(x, W_enc, b_enc, features, k, order)


def project(x: Tensor, W_enc: Tensor, b_enc: Tensor, *, impl: str = "auto") -> Tensor:
    """p = W_enc x + b_enc for a few rows, summed in fp32: [..., F] fp32.

    x [..., d], W_enc [F, d], both fp32, bf16 or fp16; b_enc [F] fp32. A row's p is bit for bit the
    one that `feature_acts` ranks. Differentiable in x.
    """
    return _chosen("project", impl, x)(x, W_enc, b_enc)


def add_directions(x: Tensor, directions: Tensor, coef: Tensor, *, impl: str = "auto") -> Tensor:
    """x' = x + sum_f coef_f directions_f, summed in fp32, rounded once to x's dtype.

    x [..., d], directions [F, d], both fp32, bf16 or fp16; coef [F] or [..., F] fp32. Tokens whose
    coefficients are all zero come out bit-identical. Differentiable in x and coef.
    """
    return _chosen("add_directions", impl, x)(x, directions, coef)


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations, descending, ties to the lower index, negative ones as 0.

    Values [..., k] fp32 and indices [..., k] int64; NaN counts as the largest, as in torch.topk.
    Arguments as for `steer`; differentiable in x.
    """
    return _chosen("encode", impl, x)(x, W_enc, b_enc, k)


def decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, *, impl: str = "auto"
) -> Tensor:
    """recon = b_dec + sum_i values_i W_dec[indices_i], summed in fp32 and rounded once: [..., d].

    values [..., k] fp32, indices [..., k] int64; W_dec [N, d] and b_dec [d] fp32, bf16 or fp16.
    recon has their dtype, or fp32 where they differ. Differentiable in values.
    """
    return _chosen("decode", impl, values)(values, indices, W_dec, b_dec)


def implementations() -> dict[str, str]:
    """What impl="auto" runs for a tensor on each kind of device, and why."""
    isa, why = _build.instruction_set()
    there = {impl: missing(impl) for impl in KERNELS}
    said = [f"impl={impl!r}: {reason or 'is there'}" for impl, reason in there.items()]
    found = {"cpu": f"cpu: {isa} kernels, {why}", "cuda": "; ".join([_rows_said(_ON_GPU), *said])}
    for i in range(torch.cuda.device_count()):
        rows = verdicts.read(torch.device("cuda", i))
        tried = _rows_said(rows) if rows else "`saesteer verify` has not tried the kernels on it"
        found[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}: {tried}"
    return found if _DEFAULT == "auto" else {**found, "SAESTEER_IMPL": f"{_DEFAULT}, everywhere"}


def missing(impl: str) -> str | None:
    """Why these kernels for GPUs cannot run, "cuda" or "triton"; None if they can."""
    return {"cuda": _NO_CUDA, "triton": None if _HAS_TRITON else "Triton is not installed"}[impl]


def _rows_said(rows: verdicts.Rows) -> str:
    chosen = [(least, _first_there("steer", impls)) for least, impls in rows]
    if len(chosen) == 1:
        return f"{chosen[0][1]} for any number of tokens"
    return ", ".join(f"{impl} from {least} tokens on" for least, impl in chosen)


def _chosen(name: str, impl: str, x: Tensor) -> Callable:
    """The op as `impl` computes it; ValueError if that cannot run where x is."""
    if impl == "auto":
        impl = _DEFAULT
    if impl == "auto":
        # torch.compile keeps the op, whose kernel chooses: a file may have to be read for that
        if x.is_cuda and not (torch.compiler.is_compiling() or isinstance(x, FakeTensor)):
            return _on_gpu(name, x)
        return getattr(_AUTO, name)
    if impl not in _BY:
        raise ValueError(f"impl: got {impl!r}, accepted are {', '.join(_BY)}")
    if not _runs(name, impl, x):
        here = ", ".join(i for i in _BY if _runs(name, i, x))
        hint = " (and triton, under TRITON_INTERPRET=1)" if impl == "triton" and x.is_cpu else ""
        raise ValueError(
            f"impl: {impl!r} cannot run for a tensor on {x.device}; accepted: {here}{hint}"
        )
    return getattr(_BY[impl], name)


def _runs(name: str, impl: str, x: Tensor) -> bool:
    if impl == "cpu":
        return x.is_cpu
    if impl == "cuda":
        return x.is_cuda and name in _CUDA
    if impl == "triton" and _HAS_TRITON and x.is_cpu:
        from .triton_kernels import configs

        return configs.INTERPRETED
    return impl != "triton" or (_HAS_TRITON and x.is_cuda)


def _on_gpu(name: str, x: Tensor) -> Callable:
    """The op as impl="auto" computes it for x, on a GPU."""
    tokens = x.shape[:-1].numel()
    impls = next(impls for least, impls in reversed(_table(x.device)) if tokens >= least)
    return getattr(_BY[_first_there(name, impls)], name)


def _table(device: torch.device) -> verdicts.Rows:
    if rows := verdicts.read(device):
        return rows
    _tell_of_idle_kernels(device)
    return _ON_GPU


@cache
def _tell_of_idle_kernels(device: torch.device) -> None:
    idle = [impl for impl in KERNELS if missing(impl) is None]
    if idle and device.type == "cuda" and all(impls == ("reference",) for _, impls in _ON_GPU):
        warnings.warn(
            f"plain PyTorch steers on {torch.cuda.get_device_name(device)}, although there are "
            f"kernels ({', '.join(idle)}): `saesteer verify` finds out in minutes whether they are "
            "right on it, and lets them run",
            stacklevel=2,
        )


def _first_there(name: str, impls: tuple[str, ...]) -> str:
    there = {"cuda": name in _CUDA, "triton": _HAS_TRITON, "reference": True}
    return next(impl for impl in impls if there[impl])


def _by_triton(name: str) -> Callable:
    def run(*args):
        from .triton_kernels import launch  # Triton is optional

        return getattr(launch, name)(*args)

    return run


def _best_on_gpu(name: str) -> Callable:
    def run(x, *args):
        return _on_gpu(name, x)(x, *args)

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
    for _name, (_save, _backward) in gradients.of(_space).items():
        transforms.register(getattr(_space, _name).default, _save, _backward)
    transforms.register_in_place(_space.steer_.default)
