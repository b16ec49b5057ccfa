"""What the CPU ops take: the threads they are given, and next to no memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from ops_cases import Case, random_case, threads

from bench import heap

TASKS = Path("/proc/self/task")
TICK = 1 / os.sysconf("SC_CLK_TCK")


def every_token_is_scanned(T: int, d: int, N: int, F: int = 1) -> Case:
    """The worst case: every feature is live in every token, so all latents are counted."""
    case = random_case(T, d, N, 32, F)
    W_enc, b_enc = case.W_enc.clone(), case.b_enc.clone()
    W_enc[case.features] = 0
    b_enc[case.features] = 1e3
    return case.but(W_enc=W_enc, b_enc=b_enc)


def cpu_seconds() -> dict[str, float]:
    """CPU time of each thread of this process."""
    seconds = {}
    for task in TASKS.iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            seconds[task.name] = (int(fields[11]) + int(fields[12])) * TICK
    return seconds


def shares(work) -> list[float]:
    """The share of each thread in the CPU time of `work`, repeated for many ticks of it however
    busy the machine is; largest first."""
    work()
    before, end = cpu_seconds(), time.process_time() + 60 * TICK
    while time.process_time() < end:
        work()
    spent = [s - before.get(task, 0) for task, s in cpu_seconds().items()]
    return sorted((s / sum(spent) for s in spent), reverse=True)


@pytest.mark.skipif(not TASKS.exists(), reason="reads Linux's /proc/self/task")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("op", ["steer", "acts", "encode"])
def test_all_threads_work(op):
    """One token shares out latents, many share out tokens."""
    for case in (every_token_is_scanned(1, 512, 16384), every_token_is_scanned(256, 128, 4096)):
        with threads(2):
            first, second, *_ = shares(getattr(case, op))
            assert second > 0.2, f"one thread did {first:.0%} of the work"
        with threads(1):
            assert shares(getattr(case, op))[0] > 0.95


MEASURE = """
import sys
import torch
from bench import heap
from test_ops_resources import every_token_is_scanned

threads, T, d, N, F = map(int, sys.argv[1:])
torch.set_num_threads(threads)
small, case = every_token_is_scanned(64, d, N, F), every_token_is_scanned(T, d, N, F)
small.steer(), small.acts()
assert (case.acts() > 0).all()
for call in (case.steer, case.steer_):
    base = heap.live()
    y, peak = heap.peak(call)
    print(peak - base - (0 if y is None else y.nbytes))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts glibc's allocations")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("threads", "T", "d", "N", "F"),
    [(2, 2048, 16, 24576, 2), (16, 65536, 4, 1024, 1), (2, 2048, 1024, 256, 2)],
)
def test_no_buffer_as_wide_as_the_dictionary_or_in_place_as_x(threads, T, d, N, F):
    """At most 1 MB and 64 bytes a token beside the output; T x N would be hundreds of MB. In place
    there is none: T x d would be up to 8 MB."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (threads, T, d, N, F))],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=heap.environment() | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))},
    )
    assert run.returncode == 0, run.stderr
    taken = list(map(int, run.stdout.split()))
    assert len(taken) == 2 and all(0 < size <= 2**20 + 64 * T for size in taken)
