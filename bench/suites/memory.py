"""The most memory that a steering call holds beyond its inputs and its output, by tokens.

ours, naive, lean, smart    as in op.py

A child process counts every allocation (heap.py). A contestant's calls grow, and what the smaller
ones kept counts against the larger ones. Verified after that, so that nothing is there before it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial

import torch

from .. import ROOT, exactness, heap, peers, workloads
from ..workloads import Shape, Workload
from .op import verify_all

TINY = Shape(d=64, N=128, k=4, stream=64, worst=64)


@dataclass(frozen=True)
class Case:
    workload: str
    dtype: str
    T: int

    def __str__(self) -> str:
        return f"{self.workload}-{self.dtype}-T{self.T}"


def cases(full: bool) -> list[Case]:
    tokens = (1, 8, 64, 512, 2048) if full else (1, 64, 512)
    return [
        Case(workload, dtype, T)
        for dtype in ("bf16", "fp32")[: 1 + full]
        for workload in ("planted", "worst")
        for T in tokens
    ]


@contextmanager
def measuring(every: list[Case]) -> Iterator[Callable[[Case], dict]]:
    """A case's record: `bytes` of one call by contestant."""
    tokens = sorted({case.T for case in every})

    @cache
    def of(dtype: str) -> dict[str, dict]:
        """What a child found with weights of this dtype, by case."""
        settings = {"dtype": dtype, "tokens": tokens, "shape": asdict(workloads.FULL)}
        settings["threads"] = torch.get_num_threads()
        done = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(settings)],
            cwd=ROOT,
            env=heap.environment(),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise exactness.Disagreement(f"memory: the child failed: {done.stderr[-2000:]}")
        return json.loads(done.stdout)

    def measure(case: Case) -> dict:
        return asdict(case) | of(case.dtype)[str(case)]

    yield measure


# ---- the child ----


def held(call: Callable, inputs: list[torch.Tensor]) -> list[int]:
    """The most bytes beyond inputs and output, by input."""
    base, found = heap.live(), []
    for x in inputs:
        y, peak = heap.peak(lambda: call(x))  # noqa: B023
        found.append(peak - base - y.nbytes)
        del y
    return found


def contestants(w: Workload) -> dict[str, Callable]:
    return {"ours": partial(peers.steer, w), **peers.baselines(w)}


@torch.inference_mode()
def measure(dtype: str, tokens: list[int], shape: dict, threads: int) -> dict[str, dict]:
    torch.set_num_threads(threads)
    for tiny in workloads.build(dtype, 1, TINY):
        for call in contestants(tiny).values():
            call(tiny.x)  # starts the threads, and loads what the first call loads
    shape = Shape(**shape | {"stream": max(2048, *tokens), "worst": max(512, *tokens)})
    found = {}
    for w in workloads.build(dtype, 1, shape):
        calls, inputs = contestants(w), [w.x[:T] for T in tokens]
        bytes_ = {name: held(call, inputs) for name, call in calls.items()}
        verify_all(w, tokens, {})
        for i, T in enumerate(tokens):
            facts = {"F": 1, "d": shape.d, "N": shape.N, "k": shape.k, **w.shares(T)}
            of_T = {name: each[i] for name, each in bytes_.items()}
            found[str(Case(w.name, dtype, T))] = facts | {"bytes": of_T}
    return found


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
