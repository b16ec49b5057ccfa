"""The op against everything that a careful PyTorch user writes instead, and against the libraries.

ours      saesteer_fast.ops.steer, impl="cpu"
hot-first ours, with the rows of W_enc in the order that SAE.calibrate finds on other tokens
reference the same op, impl="reference": what runs where there are no kernels
naive, lean, smart      baselines.py, by peers.py
naive, compiled; ...    the same under torch.compile, compiled before they are timed
sparsify, sae_lens      the libraries themselves, where installed
linear    one encoder pass and nothing else
copy      a copy of x
L0        ours, on tokens that all end at L0
read      reading W_enc once with all threads
nothing   an op of steer's signature that computes nothing (T=1)

Everything is verified before anything of its shape is timed; who disagrees ends the run. On a GPU
bench/gpu.py compares the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import exactness, native, peers, workloads
from ..peers import feature_acts, steer
from ..tables.contestants import BASELINES, compiled
from ..timing import Contestant, interleaved
from ..workloads import Shape, Workload

ROUNDS = {1.0: 7, 8.0: 5, math.inf: 3}
"""How many, by what one takes at the most in seconds."""
BASELINE_TOKENS = 128
WORST_CALLS = 64
COMPILED = (1, 512)
"""Tokens a call at which the baselines are compiled too: the least and what prefill takes."""
MOST_TOKENS = 2048
"""Up to here the libraries run, and slow ones take seconds a call."""

SHORT = (("bf16", 1, (1, 16, 128, 512)), ("bf16", 4, (1, 128)), ("fp32", 1, (1, 128)))
"""dtype, F, T."""
TOKENS = (1, 16, 128, 512, 2048, 8192)
AXES = {
    "F": [{"F": F} for F in (4, 16)],
    "k": [{"k": k} for k in (16, 64, 192)],
    "d": [{"d": d} for d in (768, 1536, 8192)],
    "N": [{"d": 768, "N": N} for N in (6144, 98304, 1048576)],
}
"""Steps away from the centre, at T=1 and at T=128; N goes with a width at which a million fits."""


@dataclass(frozen=True)
class Case:
    workload: str
    dtype: str
    T: int
    F: int
    d: int
    N: int
    k: int

    @property
    def shape(self) -> Shape:
        return replace(workloads.FULL, d=self.d, N=self.N, k=self.k)

    @property
    def built(self) -> tuple[str, Shape, bool]:
        """What `subject` builds at once."""
        return self.dtype, self.shape, self.workload == "real"

    def __str__(self) -> str:
        parts = [self.workload, self.dtype, f"T{self.T}", f"F{self.F}"]
        usual = workloads.MINIATURE if self.workload == "real" else workloads.FULL
        changed = [n for n in ("d", "N", "k") if getattr(self, n) != getattr(usual, n)]
        return "-".join(parts + [f"{name}{getattr(self, name)}" for name in changed])


def cases(full: bool) -> list[Case]:
    """The short set, or all of it: one axis at a time. Those that are built at once in a row."""
    centre, small = workloads.FULL, workloads.MINIATURE
    planted = Case("planted", "bf16", 1, 1, centre.d, centre.N, centre.k)
    real = Case("real", "bf16", 1, 1, small.d, small.N, small.k)
    found = [replace(planted, dtype=dtype, F=F, T=T) for dtype, F, Ts in SHORT for T in Ts]
    if full:
        found += [replace(planted, T=T) for T in TOKENS]
        steps = [step for axis in AXES.values() for step in axis]
        found += [replace(planted, T=T, **step) for step in steps for T in (1, 128)]
    found += [replace(case, workload="worst") for case in found]
    found += [replace(real, T=T) for T in (TOKENS if full else (1, 128))]
    built = list(dict.fromkeys(case.built for case in found))
    any_T = list(dict.fromkeys(replace(case, T=0) for case in found))
    order = {case: (built.index(case.built), any_T.index(replace(case, T=0))) for case in found}
    return sorted(order, key=order.__getitem__)


def names(case: Case) -> tuple[str, ...]:
    compile_too = case.F == 1 and case.T in COMPILED and case.dtype == "bf16"
    compile_too &= case.shape == workloads.FULL or case.workload == "real"
    return (
        ("ours",)
        + ("hot-first",) * (case.workload != "worst")
        + ("reference",) * (case.T == 1 and case in cases(full=False))
        + BASELINES
        + tuple(map(compiled, BASELINES)) * compile_too
        + peers.NAMES * (case.T <= MOST_TOKENS)
        + ("linear", "copy", "L0", "read")
        + ("nothing",) * (case.T == 1)
    )


def inputs(w: Workload, T: int) -> list[Tensor]:
    """What is verified and timed: all of the stream; worst calls all cost the same."""
    return w.batches(T)[: WORST_CALLS if w.name == "worst" else None]


def compiled_baselines(w: Workload) -> dict[str, Callable[[Tensor], Tensor]]:
    torch.compiler.reset()
    found = peers.baselines(w, lambda run: torch.compile(run, dynamic=False, fullgraph=True))
    return {compiled(name): run for name, run in found.items()}


class Subject(NamedTuple):
    """What the cases of one workload share, whatever their T."""

    w: Workload
    settling: Workload
    """The workload that has tokens which end at L0."""
    libraries: dict[str, peers.Peer]
    agreement: dict[str, float]
    """The share of tokens on which each baseline agrees."""


def subjects(every: list[Case]) -> Callable[[Case], Subject]:
    """A case's subject, verified for all that are like it. Only what was built last is kept."""

    @lru_cache(maxsize=1)
    def built(dtype: str, shape: Shape, real: bool) -> Workload:
        if real:
            return workloads.miniature(dtype)
        most = max(case.F for case in every if case.built == (dtype, shape, real))
        planted, _ = workloads.build(dtype, most, shape)
        return planted

    @lru_cache(maxsize=1)
    def verified(any_T: Case) -> Subject:
        w = whole = built(*any_T.built).first(any_T.F)
        if any_T.workload == "worst":
            w = whole.worst(any_T.shape.worst)
        tokens = [each.T for each in every if replace(each, T=0) == any_T]
        libraries = peers.libraries(w)
        return Subject(w, whole, libraries, verify_all(w, tokens, libraries))

    return lambda case: verified(replace(case, T=0))


@torch.inference_mode()
def verify_all(
    w: Workload, tokens: list[int], libraries: dict[str, peers.Peer]
) -> dict[str, float]:
    if w.name == "worst" and not (feature_acts(w, w.x) > 0).all():
        raise exactness.Disagreement("worst: a token does not need the whole scan")
    for each in (w,) if w.name == "worst" else (w, w.hot_first):
        ours, acts = partial(steer, each), partial(feature_acts, each)
        for T in tokens:
            exactness.check_ours(each, inputs(each, T), ours, acts)
    x = w.x[:BASELINE_TOKENS]
    exactness.check_baseline(w, "reference", steer(w, x, "reference"))
    agreed = {
        name: exactness.check_baseline(w, name, run(x)) for name, run in peers.baselines(w).items()
    }
    for name, peer in libraries.items():
        agreed[name] = exactness.check_baseline(w, name, peer.whole(x, peer.call(x)))
    return agreed


def compile_now(w: Workload, name: str, run: Callable[[Tensor], Tensor], T: int) -> None:
    """Compiles for calls of T tokens and verifies on such calls."""
    calls = w.batches(T)[: max(1, BASELINE_TOKENS // 8 // T)]
    exactness.check_baseline(w, name, torch.cat([run(x) for x in calls]))


def contestants(
    w: Workload, case: Case, settled: list[Tensor], libraries: dict[str, peers.Peer]
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those of `names`, ready to be timed; and why one is not."""
    batches, machine, wanted = inputs(w, case.T), native.load(), names(case)
    b_enc = w.b_enc.to(w.W_enc.dtype)
    fixed = w.W_enc, w.b_enc, w.directions, w.features, w.values, w.k
    late = compiled_baselines(w) if compiled("naive") in wanted else {}
    runs = {name: (run, batches) for name, run in (peers.baselines(w) | late).items()}
    runs |= {name: (library.call, batches) for name, library in libraries.items()}
    runs |= {
        "ours": (lambda x: steer(w, x), batches),
        "hot-first": (lambda x: steer(w.hot_first, x), batches),
        "reference": (lambda x: steer(w, x, "reference"), batches),
        "linear": (lambda x: F.linear(x, w.W_enc, b_enc), batches),
        "copy": (torch.clone, batches),
        "L0": (lambda x: steer(w, x), settled),
        "read": (machine.read, [w.W_enc]),
        "nothing": (lambda x: machine.nothing(x, *fixed), settled),
    }
    chosen, not_run = {}, {}
    for name in wanted:
        if name in late:
            try:
                compile_now(w, name, late[name], case.T)
            except torch._dynamo.exc.TorchDynamoException as error:
                not_run[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                continue
        chosen[name] = Contestant(
            *runs[name], whole=name in ("ours", "hot-first") and w.name != "worst"
        )
    return chosen, not_run


@contextmanager
def measuring(every: list[Case]) -> Iterator[Callable[[Case], dict]]:
    """A case's record: `seconds` a call by contestant and round, `not_run` with the reasons."""
    subject = subjects(every)

    def measure(case: Case) -> dict:
        w, settling, libraries, agreement = subject(case)
        with torch.inference_mode():
            chosen, not_run = contestants(w, case, settling.settled(case.T), libraries)
            once = sum(each.seconds * each.calls for each in chosen.values())
            rounds = next(rounds for most, rounds in ROUNDS.items() if once <= most)
            seconds = interleaved(chosen, rounds)
        found = asdict(case) | w.shares(case.T)
        if w.name != "worst":
            hot = w.hot_first.shares(case.T)
            found |= {f"{name}, hot-first": hot[name] for name in ("work", "read", "spread")}
        found |= {"close": int(w.close.sum()), "agreement": agreement}
        return found | {"not_run": not_run, "seconds": seconds}

    yield measure
