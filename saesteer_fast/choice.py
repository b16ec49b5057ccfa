"""Who computes the ops: what `impl` and SAESTEER_IMPL ask for, if it can run there; for "auto" on a
GPU what was found right and fastest (verdicts.py), and the reference where nothing was tried.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import compiled, verdicts
from .errors import one_of

Impl = Literal["auto", "cpu", "cuda", "triton", "reference"]
"""Who computes the ops."""
IMPLS: tuple[Impl, ...] = get_args(Impl)

MISSING: dict[str, str | None] = {
    "cuda": compiled.NO_CUDA,
    "triton": None if importlib.util.find_spec("triton") else "Triton is not installed",
}
"""The implementations that have kernels for GPUs, and why each cannot run; None if it can."""

ON_GPU: verdicts.Rows = ((0, ("reference",)),)
"""What impl="auto" runs on a GPU that `saesteer verify` has not tried: from so many tokens on, the
first of these that is there. One row for all shapes, and no kernels in it until bench/results holds
a run of `make gpu` that found them right; it proposes the rows."""

_DEFAULT = os.environ.get("SAESTEER_IMPL") or "auto"
one_of("SAESTEER_IMPL", _DEFAULT, IMPLS)


def chosen(impl: str, x: Tensor) -> str:
    """Who computes an op for x: one of IMPLS, "auto" where the op's own kernel is to choose.

    ValueError if `impl` is unknown, or cannot run where x is.
    """
    argument = "impl"
    if impl == "auto" and _DEFAULT != "auto":
        argument, impl = "SAESTEER_IMPL", _DEFAULT
    if impl == "auto":
        # torch.compile keeps the op, whose kernel chooses: a file may have to be read for that
        if x.is_cuda and not (torch.compiler.is_compiling() or isinstance(x, FakeTensor)):
            return on_gpu(x)
        return impl
    one_of("impl", impl, IMPLS)
    if not _runs(impl, x):
        here = ", ".join(i for i in IMPLS if _runs(i, x))
        hint = " (and triton, under TRITON_INTERPRET=1)" if impl == "triton" and x.is_cpu else ""
        raise ValueError(
            f"{argument}: {impl!r} cannot run for a tensor on {x.device}; accepted: {here}{hint}"
        )
    return impl


def on_gpu(x: Tensor) -> str:
    """Who computes an op for x, which is on a GPU, if nobody is asked for."""
    tokens = x.shape[:-1].numel()
    return _first_there(
        next(impls for least, impls in reversed(_rows(x.device)) if tokens >= least)
    )


def implementations() -> dict[str, str]:
    """What impl="auto" runs for a tensor on each kind of device, and why."""
    isa, _ = compiled.instruction_set()
    said = [f"impl={impl!r}: {reason or 'is there'}" for impl, reason in MISSING.items()]
    found = {"cpu": f"{isa} kernels", "cuda": "; ".join([_said(ON_GPU), *said])}
    for i in range(torch.cuda.device_count()):
        rows = verdicts.read(torch.device("cuda", i))
        tried = _said(rows) if rows else "`saesteer verify` has not tried the kernels on it"
        found[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}: {tried}"
    return found if _DEFAULT == "auto" else {**found, "SAESTEER_IMPL": f"{_DEFAULT}, everywhere"}


def _said(rows: verdicts.Rows) -> str:
    by = [(least, _first_there(impls)) for least, impls in rows]
    if len(by) == 1:
        return f"{by[0][1]} for any number of tokens"
    return ", ".join(f"{impl} from {least} tokens on" for least, impl in by)


def _runs(impl: str, x: Tensor) -> bool:
    if impl == "cpu":
        return x.is_cpu
    if MISSING.get(impl) is not None:
        return False
    if impl == "triton" and x.is_cpu:
        from .triton_kernels import configs

        return configs.INTERPRETED
    return impl not in MISSING or x.is_cuda


def _rows(device: torch.device) -> verdicts.Rows:
    if rows := verdicts.read(device):
        return rows
    _tell_of_idle_kernels(device)
    return ON_GPU


@cache
def _tell_of_idle_kernels(device: torch.device) -> None:
    idle = [impl for impl, reason in MISSING.items() if reason is None]
    if idle and device.type == "cuda" and all(impls == ("reference",) for _, impls in ON_GPU):
        warnings.warn(
            f"plain PyTorch steers on {torch.cuda.get_device_name(device)}, although there are "
            f"kernels ({', '.join(idle)}): `saesteer verify` finds out in minutes whether they are "
            "right on it, and lets them run",
            stacklevel=2,
        )


def _first_there(impls: tuple[str, ...]) -> str:
    return next(impl for impl in impls if MISSING.get(impl) is None)
