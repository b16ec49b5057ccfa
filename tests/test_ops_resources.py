"""What the CPU ops take: the threads they are given, and next to no memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ops_cases import Case, random_case, threads

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
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        seconds[task.name] = (int(fields[11]) + int(fields[12])) * TICK
    return seconds


def shares(work) -> list[float]:
    """The share of each thread in the CPU time of `work`, repeated for a while; largest first."""
    work()
    before, end = cpu_seconds(), time.monotonic() + 0.5
    while time.monotonic() < end:
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
from test_ops_resources import every_token_is_scanned

def kilobytes(name):
    status = open("/proc/self/status").read()
    return int(status.partition(name + ":")[2].split()[0])

threads, T, d, N, F = map(int, sys.argv[1:])
torch.set_num_threads(threads)
small, case = every_token_is_scanned(64, d, N, F), every_token_is_scanned(T, d, N, F)
small.steer(), small.acts()
# Fills what was used before and given back since, so that any further page is a new peak.
ballast = []
while kilobytes("VmRSS") < kilobytes("VmHWM") - 64:
    ballast.append(torch.ones(16384))
before = kilobytes("VmHWM")
y = case.steer()
print(1024 * (kilobytes("VmHWM") - before))
assert (case.acts() > 0).all()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("threads", "T", "d", "N", "F"), [(2, 2048, 16, 24576, 2), (16, 65536, 4, 1024, 1)]
)
def test_no_buffer_as_wide_as_the_dictionary(threads, T, d, N, F):
    """At most 1 MB and 64 bytes a token beside the output; T x N would be hundreds of MB."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (threads, T, d, N, F))],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 4 * T * d + 2**20 + 64 * T
