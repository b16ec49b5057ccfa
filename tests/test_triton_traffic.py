"""What the Triton kernels move between memories, counted where tests/ptx runs them, in a process
that test_triton_ptx.py starts."""

from __future__ import annotations

import os

import pytest
import torch
from ops_cases import integer_case
from ptx.executor import assert_rows_move_whole

ARCHITECTURE = os.environ.get("PTX_ARCHITECTURE")
if not ARCHITECTURE:
    pytest.skip("test_triton_ptx.py runs it", allow_module_level=True)

from ptx import triton_driver  # noqa: E402  (it imports Triton)

EXECUTOR = triton_driver.activate(os.environ["PTX_LIBRARY"], int(ARCHITECTURE))


@pytest.mark.parametrize("T", [1, 160])
def test_rows_move_in_whole_sectors_without_bank_conflicts(T):
    case = integer_case(T, 512, 300, 20, 2, torch.bfloat16, torch.bfloat16)
    assert_rows_move_whole(EXECUTOR.traffic(lambda: case.steer("triton")))
    few = case.rows(slice(0, 8))
    assert_rows_move_whole(EXECUTOR.traffic(lambda: few.encode("triton")))
