"""The barriers, waits and fences of the CUDA kernels are needed, and tests/ptx would miss them:
without any one of these it finds a race, a wrong number or a wait without end.

Not among them: barriers that let a block end early, since without them it does more than it must,
and sync_warp, because the race detector takes a warp as a whole."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from ops_cases import DTYPES, Case, integer_case, same_bits
from ptx.cuda import Machine
from ptx.executor import Executor

from saesteer_fast import reference

F32, BF16, _ = DTYPES
CASE = integer_case(150, 328, 200, 20, 3, BF16, BF16)
# Tokens are decided by other blocks while one multiplies their panels.
LONG = integer_case(60, 1096, 300, 1, 1, BF16, BF16)
WIDE = integer_case(70, 72, 300, 20, 3, F32, F32)
# Without features it is encoded; so many latents are selected otherwise than a few.
MOST = integer_case(2, 8, 2051, 600, 0, BF16, BF16)
STEPS = {"SAESTEER_LADDER": "steps"}
MMA = "3mma4PlanILi{}E"

# By the kernel's name: what runs it, under which settings and variables
RUNS: dict[str, tuple[Case, dict, dict]] = {
    "scan_groupsILb1E": (CASE, dict(hopper=True), {}),
    "scan_16bitINS0_" + MMA.format(128): (CASE, {}, {}),
    "scan_16bitINS0_" + MMA.format(64): (CASE.rows(slice(0, 60)), {}, STEPS),
    "scan_16bitINS0_" + MMA.format(16): (LONG.rows(slice(0, 3)), {}, STEPS),
    "scan_any": (WIDE, {}, STEPS),
    "6select": (MOST, {}, {}),
    "ladder_onceINS1_3MmaINS0_" + MMA.format(64): (
        LONG,
        dict(multiprocessors=5),
        {},
    ),
}
COPIES = ["cp.async.wait_group", "cp.async.commit_group", "bar.sync"]
NEEDED = {
    "scan_groupsILb1E": [*COPIES, "fence.proxy", "wgmma.wait_group"],
    "scan_16bitINS0_" + MMA.format(128): COPIES,
    "scan_16bitINS0_" + MMA.format(64): COPIES,
    "scan_16bitINS0_" + MMA.format(16): COPIES,
    "scan_any": ["bar.sync"],
    "6select": ["bar.sync"],
    "ladder_onceINS1_3MmaINS0_" + MMA.format(64): [*COPIES, "ld.acquire"],
}
SEEDS = range(3)


def is_right(machine: Machine, case: Case) -> bool:
    try:
        if not case.features.numel():
            indices = machine.encode(*case.encoder, case.k)[1]
            exact = reference.encode(*case.encoder, case.k, dtype=torch.float64)
            return torch.equal(indices, exact[1])
        y = machine.steer(*case.edit)
    except RuntimeError:
        return False
    return same_bits(y + 0.0, case.truth().to(case.x.dtype) + 0.0)


@pytest.mark.parametrize(("kernel", "words"), [(k, w) for k in NEEDED for w in NEEDED[k]])
def test_nothing_can_be_left_out(
    kernel, words, cuda_machine: Machine, ptx_executor: Executor, monkeypatch
):
    case, settings, variables = RUNS[kernel]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    seen = []
    try:
        for which in count():
            ptx_executor.leave_out(kernel, words, which)
            right = all(
                is_right(cuda_machine.settle(seed=seed, **settings), case) for seed in SEEDS
            )
            if right and ptx_executor.left_out() < 0:
                break
            # One that is never reached, by this case, cannot be missed.
            seen.append(not right or not ptx_executor.left_out())
    finally:
        ptx_executor.leave_out(None)
    assert seen and all(seen), seen
    assert is_right(cuda_machine.settle(**settings), case)
