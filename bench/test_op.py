"""The op against everything that a careful PyTorch user writes instead.

ours      saesteer_fast.ops.steer, impl="cpu"
naive, lean, smart      saesteer_fast.reference
linear    one encoder pass and nothing else
copy      a copy of x
L0        ours, on tokens that all end at L0
read      reading W_enc once with all threads
nothing   an op of steer's signature that computes nothing (T=1)

Everything is verified before anything is timed; who disagrees ends the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer_fast import ops, reference

from . import native, verify, workloads
from .timing import Contestant, interleaved
from .workloads import Workload

ROUNDS = 7
BASELINE_TOKENS = 128
WORST_CALLS = 64


@dataclass(frozen=True)
class Case:
    workload: str
    dtype: str
    T: int
    F: int

    def __str__(self) -> str:
        return f"{self.workload}-{self.dtype}-T{self.T}-F{self.F}"


COMMON = ("ours", "naive", "lean", "smart", "linear", "copy", "L0", "read")


def cases(full: bool) -> list[Case]:
    return [
        Case(workload, dtype, T, F)
        for dtype, F, tokens in (
            ("bf16", 1, (1, 16, 128, 512)),
            ("bf16", 4, (1, 128)),
            ("fp32", 1, (1, 128)),
        )
        for workload in ("planted", "worst")
        for T in tokens
    ]


def names(case: Case) -> tuple[str, ...]:
    return COMMON + ("nothing",) * (case.T == 1)


def inputs(w: Workload, T: int) -> list[Tensor]:
    """What is verified and timed: all of the planted stream; worst calls all cost the same."""
    return w.batches(T)[: None if w.name == "planted" else WORST_CALLS]


def steer(w: Workload, x):
    return ops.steer(x, w.W_enc, w.b_enc, w.directions, w.features, w.values, w.k, impl="cpu")


def baselines(w: Workload) -> dict:
    """Each takes x; all other inputs are prepared in W_enc's dtype."""
    b_enc = w.b_enc.to(w.W_enc.dtype)
    dense = w.W_enc, b_enc, w.W_dec, w.b_dec, w.features, w.values, w.k
    rows = w.W_enc, b_enc, w.directions, w.features, w.values, w.k
    return {
        "naive": lambda x: reference.naive(x, *dense),
        "lean": lambda x: reference.lean(x, *dense),
        "smart": lambda x: reference.smart(x, *rows),
    }


@pytest.fixture(scope="session")
def verified(request) -> dict[tuple[str, str, int], tuple[Workload, dict[str, float]]]:
    """Workloads by name, dtype and F, with the share of tokens on which each baseline agrees."""
    checked, every = {}, cases(request.config.getoption("full"))
    for dtype in dict.fromkeys(case.dtype for case in every):
        edited = dict.fromkeys(case.F for case in every if case.dtype == dtype)
        for whole in workloads.build(dtype, max(edited)):
            for features in edited:
                w = whole.first(features)
                key = w.name, dtype, features
                tokens = [c.T for c in every if (c.workload, c.dtype, c.F) == key]
                checked[key] = w, verify_all(w, tokens)
    return checked


@torch.inference_mode()
def verify_all(w: Workload, tokens: list[int]) -> dict[str, float]:
    def feature_acts(x):
        return ops.feature_acts(x, w.W_enc, w.b_enc, w.features, w.k, impl="cpu")

    if w.name == "worst" and not (feature_acts(w.x) > 0).all():
        raise verify.Disagreement("worst: a token does not need the whole scan")
    for T in tokens:
        verify.check_ours(w, inputs(w, T), lambda x: steer(w, x), feature_acts)
    x = w.x[:BASELINE_TOKENS]
    return {name: verify.check_baseline(w, name, run(x)) for name, run in baselines(w).items()}


@pytest.fixture(scope="session")
def seconds(record, verified) -> Callable[[Case], dict[str, list[float]]]:
    """Seconds a call of one case, by contestant and round; measured once."""

    @cache
    def of(case: Case) -> dict[str, list[float]]:
        w, agreement = verified[case.workload, case.dtype, case.F]
        planted, _ = verified["planted", case.dtype, case.F]
        with torch.inference_mode():
            found = interleaved(contestants(w, case.T, planted.settled(case.T)), ROUNDS)
        facts = {"d": w.x.shape[1], "N": len(w.W_enc), "k": w.k, **w.shares(case.T)}
        facts |= {"close": int(w.close.sum()), "agreement": agreement, "seconds": found}
        record("op", asdict(case) | facts)
        return found

    return of


def contestants(w: Workload, T: int, settled: list[Tensor]) -> dict[str, Contestant]:
    batches, machine = inputs(w, T), native.load()
    b_enc = w.b_enc.to(w.W_enc.dtype)
    fixed = w.W_enc, w.b_enc, w.directions, w.features, w.values, w.k
    chosen = {
        "ours": Contestant(lambda x: steer(w, x), batches, whole=w.name == "planted"),
        **{name: Contestant(run, batches) for name, run in baselines(w).items()},
        "linear": Contestant(lambda x: F.linear(x, w.W_enc, b_enc), batches),
        "copy": Contestant(torch.clone, batches),
        "L0": Contestant(lambda x: steer(w, x), settled),
        "read": Contestant(machine.read, [w.W_enc]),
    }
    if T == 1:
        chosen["nothing"] = Contestant(lambda x: machine.nothing(x, *fixed), settled)
    return chosen


def test_op(replay, seconds, case, name):
    replay(str(case), seconds(case)[name])
