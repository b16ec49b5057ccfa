"""Correctness on the inputs that are timed: whoever disagrees with the truth is not timed.

Ours is held to the exactness of the op: the decision of fp64 wherever its margin exceeds the error
of fp32 sums, and given the decision one rounding plus that error. The baselines round their
pre-activations to the weights' dtype, so some decisions differ; how many is recorded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .workloads import Workload

AGREES = 0.02
"""Relative error of a token that a baseline may make: several roundings in bf16, but less than one
latent too many or too few."""


class Disagreement(AssertionError):
    """Two implementations differ by more than rounding; no time of theirs means anything."""


def steered(w: Workload, rows: Tensor, live: Tensor) -> Tensor:
    """x' of the stream's tokens `rows` in fp64, given which features are live: [rows, d]."""
    return w.x[rows].double() + _delta(w, rows, live) @ w.directions.double()


def check_ours(
    w: Workload,
    batches: list[Tensor],
    steer: Callable[[Tensor], Tensor],
    feature_acts: Callable[[Tensor], Tensor],
) -> None:
    """Raises Disagreement unless ours keeps its promise; `batches` are the stream's first."""
    x, tokens = torch.cat(batches), len(batches[0])
    live = torch.cat([feature_acts(batch) for batch in batches]) > 0
    got = torch.cat([steer(batch) for batch in batches])
    rows = torch.arange(len(x), device=x.device) % len(w.x)

    wrong = (live != w.ranks.live[rows]) & ~w.close[rows]
    if wrong.any():
        raise Disagreement(f"{w.name}, T={tokens}: {int(wrong.sum())} decisions differ from fp64's")

    wanted, size = steered(w, rows, live), w.directions.double().abs()
    terms = x.double().abs() + _delta(w, rows, live).abs() @ size
    bound = (
        torch.finfo(x.dtype).eps / 2 * wanted.abs()
        + w.slack[rows] @ size
        + (len(w.features) + 2) * 2.0**-24 * terms
    )
    excess = (got.double() - wanted).abs() / bound
    if not (excess <= 1).all():
        raise Disagreement(
            f"{w.name}, T={tokens}: x' is {excess.max().item():.3g} times its error bound away"
        )


def check_baseline(w: Workload, name: str, y: Tensor) -> float:
    """The share of the tokens y [tokens, d] that agree; Disagreement if it is below 90 %."""
    rows = torch.arange(len(y), device=y.device)
    wanted = steered(w, rows, w.ranks.live[rows])
    error = (y.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    share = (error <= AGREES).double().mean().item()
    if share < 0.9:
        raise Disagreement(f"{w.name}: {name} agrees on {share:.0%} of the tokens")
    return share


def _delta(w: Workload, rows: Tensor, live: Tensor) -> Tensor:
    return w.values.double() - torch.where(live, w.preacts[rows], 0)
