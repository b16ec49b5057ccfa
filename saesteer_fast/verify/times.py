"""How long `steer` takes on a GPU with an SAE of Phi-3 Mini's size, called as eager models do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor

from .. import ops
from .smoke import FULL, compared, integers

TOKENS = (1, 16, 64, 512, 2048, 8192)
K, VALUE = 32, 3.0
ENDS_AT_L0, NEEDS_ALL = -(2.0**20), 2.0**20
"""The latent's bias: with one no token is live, with the other all are, beaten by nobody."""
CALLS = 20
NAME = "T={}"


def steps(impl: str, device: str) -> dict[str, Callable[[], list[float]]]:
    """By name: each looks at what `impl` gives for so many tokens, then times it."""
    return {NAME.format(T): partial(seconds, impl, device, T) for T in TOKENS}


def seconds(impl: str, device: str, T: int) -> list[float]:
    """Seconds a call: where every token ends at L0, and where every one needs the whole scan."""
    x, W_enc = integers(T, FULL.d, seed=0).bfloat16().to(device), _encoder(device)
    b_enc, features = torch.zeros(FULL.N, device=device), torch.tensor([FULL.N // 3]).to(device)
    values, row = torch.tensor([VALUE], device=device), W_enc[features]
    found = []
    for bias in (ENDS_AT_L0, NEEDS_ALL):
        b_enc[features] = bias
        call = partial(ops.steer, x, W_enc, b_enc, row, features, values, K, impl=impl)
        acts = (x.double() @ row.double().mT + bias).clamp(min=0)
        compared(call(), (x.double() + (VALUE - acts) * row.double()).to(x.dtype))
        found.append(_timed(call, device))
    return found


def by_tokens(found: Mapping[str, Mapping]) -> dict[int, list[float]]:
    """What `steps` found."""
    return {T: found[name]["found"] for T in TOKENS if (name := NAME.format(T)) in found}


def wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)


@cache
def _encoder(device: str) -> Tensor:
    return integers(FULL.N, FULL.d, seed=1).bfloat16().to(device)


def _timed(call: Callable[[], Tensor], device: str) -> float:
    """Seconds a call in the best of three rounds; the first warms up."""
    rounds = []
    for _ in range(4):
        wait(device)
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        wait(device)
        rounds.append((time.perf_counter() - start) / CALLS)
    return min(rounds[1:])
