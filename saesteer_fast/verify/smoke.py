"""Every kernel alone, on small integers: which one is wrong, and where.

The products are exact in every dtype, so each number that differs from fp64's is a mistake, and
its place in the tile tells of what kind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops, reference


class Size(NamedTuple):
    d: int
    N: int


N, K = 600, 20
FULL = Size(3072, 24576)
"""Of the SAE of Phi-3 Mini."""
TOKENS = {"few": (1, 9, 50), "many": (65, 150), "most": (400, 2200)}
"""Up to 64 tokens other kernels scan than beyond; up to 384, other tiles. Beyond 2,048, tiles come
in groups."""
WIDTHS = {"one panel": 64, "half a panel more": 96, "more panels than stages": 712}
"""Of x and W_enc; the scans take 64 columns at a time."""


def integers(*sizes: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, sizes, generator=random).float()


def compared(found: Tensor, wanted: Tensor) -> dict:
    """Raises AssertionError unless they are equal; it names the first places that are not."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    wrong = ~((found == wanted) | (found.isnan() & wanted.isnan()))
    if wrong.any():
        at = wrong.nonzero()
        first = tuple(at[0].tolist())
        rows, columns = at[:, 0].unique(), at[:, -1].unique()
        error = (found - wanted).abs().nan_to_num(torch.inf, torch.inf).max().item()
        raise AssertionError(
            f"{len(at)} of {wrong.numel()} are wrong, by up to {error:g}; first {first}: "
            f"{found[first].item():g} instead of {wanted[first].item():g}; in {len(rows)} of "
            f"{wrong.shape[0]} tokens ({_listed(rows)}), {len(columns)} of {wrong.shape[-1]} "
            f"columns ({_listed(columns)})"
        )
    return {"compared": wrong.numel()}


def _listed(places: Tensor) -> str:
    listed = ", ".join(str(int(i)) for i in places[:12])
    return listed + (", ..." if len(places) > 12 else "")


def steps(impl: str, device: str) -> dict[str, Callable[[], dict]]:
    """By name: each compares what `impl` gives on `device` with fp64."""
    found: dict[str, Callable[[], dict]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for op in (_project, _add, _level0, _decode):
            found[f"{op.__name__[1:]} {name}"] = partial(op, impl, device, dtype)
        for size, tokens in TOKENS.items():
            for width, d in WIDTHS.items():
                found[f"scan, {size}, {name}, {width}: products"] = partial(
                    _products, impl, device, dtype, tokens, d
                )
            for what in (_counts, _steer, _best):
                found[f"scan, {size}, {name}: {what.__name__[1:]}"] = partial(
                    what, impl, device, dtype, tokens
                )
    for size, tokens in TOKENS.items():
        found[f"scan, {size}, bfloat16, full size: counts"] = partial(
            _counts, impl, device, torch.bfloat16, tokens, *FULL
        )
    return found


def _case(
    device: str, dtype: torch.dtype, T: int, d: int = 200, N: int = N
) -> tuple[Tensor, Tensor, Tensor]:
    x, W = (integers(n, d, seed=s).to(dtype).to(device) for n, s in ((T, 0), (N, 1)))
    return x, W, integers(N, seed=2).to(device)


def _project(impl: str, device: str, dtype: torch.dtype) -> dict:
    x, W, b = _case(device, dtype, 70)
    few = x, W[:7], b[:7]
    return compared(ops.project(*few, impl=impl), reference.preacts(*few))


def _add(impl: str, device: str, dtype: torch.dtype) -> dict:
    x, W, b = _case(device, dtype, 70)
    y = ops.add_directions(x, W[:5], b[:5], impl=impl)
    return compared(y, reference.add_directions(x, W[:5], b[:5]))


def _level0(impl: str, device: str, dtype: torch.dtype) -> dict:
    """k = N: nothing has to be scanned."""
    x, W, b = _case(device, dtype, 70)
    features = torch.tensor([3, N - 1, 64]).to(device)
    acts = ops.feature_acts(x, W, b, features, N, impl=impl)
    return compared(acts, reference.preacts(x, W, b)[:, features].clamp(min=0))


def _decode(impl: str, device: str, dtype: torch.dtype) -> dict:
    x, W, b = _case(device, dtype, 70)
    values, indices = reference.encode(x, W, b, K)
    recon = ops.decode(values, indices, W, x[0], impl=impl)
    return compared(recon, reference.decode(values, indices, W, x[0]))


def _products(impl: str, device: str, dtype: torch.dtype, tokens: tuple, d: int) -> dict:
    """All preactivations, by way of encode with k = N; none is below 0."""
    for T in tokens:
        x, W, b = _case(device, dtype, T, d)
        b += 4 * d
        values, indices = ops.encode(x, W, b, N, impl=impl)
        p = torch.full_like(values, torch.nan).scatter(-1, indices.clamp(0, N - 1), values)
        wanted = reference.preacts(x, W, b)
        found = compared(p, wanted)
    return found


def _counts(
    impl: str, device: str, dtype: torch.dtype, tokens: tuple, d: int = 200, N: int = N
) -> dict:
    """With ties everywhere, by number and in another order; half of the latents are live."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3)).to(device)
    features = torch.arange(0, N, N // 16).to(device)
    for T in tokens:
        case = (*_case(device, dtype, T, d, N), features, N // 2)
        for named in (None, order):
            acts = ops.feature_acts(*case, order=named, impl=impl)
            wanted = reference.feature_acts(*case, named, dtype=torch.float64)
            found = compared(acts, wanted)
    return found


def _steer(impl: str, device: str, dtype: torch.dtype, tokens: tuple) -> dict:
    for T in tokens:
        x, W, b = _case(device, dtype, T)
        features = reference.encode(x[:1], W, b, K)[1][0, -3:]
        edit = x, W, b, W[features].clamp(-1, 1), features, integers(3, seed=4).to(device), K
        truth = reference.truth(*edit).to(dtype)
        compared(ops.steer(*edit, impl=impl), truth)
        ops.steer_(*edit, impl=impl)
        found = compared(x, truth)
    return found


def _best(impl: str, device: str, dtype: torch.dtype, tokens: tuple) -> dict:
    for T in tokens:
        case = (*_case(device, dtype, T), K)
        values, indices = ops.encode(*case, impl=impl)
        wanted = reference.encode(*case, dtype=torch.float64)
        compared(values, wanted[0])
        found = compared(indices, wanted[1])
    return found
