"""Correctness on the inputs that are timed: whoever disagrees with the truth is not timed.

Ours is held to the exactness of the op: the decision of fp64 wherever its margin exceeds the error
of fp32 sums, and given the decision one rounding plus that error. The baselines round their
pre-activations to the weights' dtype, so some decisions differ; how many is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .peers import feature_acts
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


def check_outputs(w: Workload, outputs: Sequence[Tensor], impl: str = "auto") -> None:
    """The same of what a steered layer gave, [T, d] a call."""
    given, acts = iter(outputs), partial(feature_acts, w, impl=impl)
    check_ours(w, w.batches(len(outputs[0])), lambda x: next(given), acts)


def check_baseline(w: Workload, name: str, y: Tensor) -> float:
    """The share of the tokens y [tokens, d] that agree; Disagreement if it is below 90 %."""
    rows = torch.arange(len(y), device=y.device)
    return check_near(f"{w.name}: {name}", y, steered(w, rows, w.ranks.live[rows]))


def check_near(name: str, got: Tensor, wanted: Tensor) -> float:
    """The share of the tokens on which got [tokens, ...] agrees; Disagreement if below 90 %."""
    error = (got.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)
    share = (error <= AGREES).double().mean().item()
    if share < 0.9:
        raise Disagreement(f"{name} agrees on {share:.0%} of the tokens")
    return share


def check_encode(w: Workload, x: Tensor, values: Tensor, indices: Tensor) -> None:
    """Raises Disagreement unless these are the k largest activations of x [tokens, d], in order,
    as far as fp32 sums tell."""
    every = replace(w, x=x, features=torch.arange(len(w.W_enc)))
    acts, bound = every.preacts.clamp(min=0), every.slack.amax(-1, keepdim=True)
    wanted, there = acts.topk(values.shape[-1]).values, acts.gather(-1, indices)
    for which, other in (("values", wanted), ("indices", there)):
        if not ((values - other).abs() <= bound).all():
            raise Disagreement(f"{w.name}: encode's {which} are not those of the k largest")
    if not (indices.sort().values.diff() > 0).all():
        raise Disagreement(f"{w.name}: encode gives a latent twice")


def check_decode(w: Workload, values: Tensor, indices: Tensor, recon: Tensor) -> None:
    """Raises Disagreement unless recon is b_dec + sum_i values_i W_dec[indices_i], summed in fp32
    and rounded once."""
    terms, bias = values.double()[..., None] * w.W_dec[indices].double(), w.b_dec.double()
    wanted, size = terms.sum(-2) + bias, terms.abs().sum(-2) + bias.abs()
    sums = (values.shape[-1] + 2) * 2.0**-24 * size
    bound = torch.finfo(recon.dtype).eps / 2 * wanted.abs() + sums
    if not ((recon.double() - wanted).abs() <= bound).all():
        raise Disagreement(f"{w.name}: decode's reconstruction differs from fp64's")


def _delta(w: Workload, rows: Tensor, live: Tensor) -> Tensor:
    return w.values.double() - torch.where(live, w.preacts[rows], 0)
