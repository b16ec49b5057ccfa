"""What the CUDA kernels move between memories, counted where tests/ptx runs them."""

from __future__ import annotations

import pytest
import torch
from ops_cases import DTYPES, integer_case, random_case
from ptx.executor import SECTOR, assert_rows_move_whole

FULL, *HALVES = DTYPES


def bytes_read(traffic) -> int:
    """But not of what waits, a word at a time, for the other blocks."""
    return sum(SECTOR * t.parts for t in traffic if t.kind == "read" and t.bytes > 4 * t.runs)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("hopper", [False, True], ids=["ampere", "hopper"])
@pytest.mark.parametrize("T", [1, 40, 160])
def test_rows_move_in_whole_sectors_without_bank_conflicts(
    cuda_machine, ptx_executor, T, hopper, dtype
):
    case = integer_case(T, 512, 300, 20, 2, dtype, dtype)
    machine, few = cuda_machine.settle(hopper=hopper), case.rows(slice(0, 8))
    assert_rows_move_whole(ptx_executor.traffic(lambda: machine.steer(*case.edit)))
    assert_rows_move_whole(ptx_executor.traffic(lambda: machine.encode(*few.encoder, 20)))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("ladder", ["", "steps"])
def test_a_tokens_whole_scan_reads_the_encoder_once(
    cuda_machine, ptx_executor, monkeypatch, ladder, dtype
):
    monkeypatch.setenv("SAESTEER_LADDER", ladder)
    case = integer_case(1, 512, 1024, 1023, 1, dtype, dtype)
    case.W_enc[case.features] = case.x
    machine = cuda_machine.settle(multiprocessors=2)
    act = []
    work = lambda: act.append(machine.feature_acts(*case.encoder, case.features, case.k))  # noqa: E731
    traffic = ptx_executor.traffic(work)
    read = bytes_read(traffic)
    encoder = case.W_enc.nbytes + case.b_enc.nbytes
    assert act[0].item() > 0 and encoder <= read <= 1.1 * encoder
    # Rows are short enough here to be asked for whole, but for the first tiles of separate kernels
    ahead = sum(SECTOR * t.parts for t in traffic if t.kind == "ahead")
    assert (7 / 8 if ladder else 1) * case.W_enc.nbytes == ahead


@pytest.mark.parametrize(
    ("hopper", "dtype"), [(False, HALVES[0]), (True, HALVES[0]), (False, FULL)]
)
@pytest.mark.parametrize("T", [3, 40, 160])
def test_the_encoder_is_read_until_tokens_are_decided(cuda_machine, ptx_executor, T, hopper, dtype):
    """The first latents beat one feature, and the other's p is below zero."""
    N, k = 8192, 8
    case, bias = integer_case(T, 64, N, k, 2, dtype, dtype), torch.zeros(N)
    bias[:k], bias[-2], bias[-1] = 3, 1, -1
    case = case.but(W_enc=0 * case.W_enc, b_enc=bias, features=torch.tensor([N - 2, N - 1]))
    machine = cuda_machine.settle(hopper=hopper, multiprocessors=1)
    work = lambda: machine.feature_acts(*case.encoder, case.features, k)  # noqa: E731
    assert bytes_read(ptx_executor.traffic(work)) < 0.7 * case.W_enc.nbytes


@pytest.mark.parametrize("T", [3, 70])
def test_preactivations_are_written_and_read_once(cuda_machine, ptx_executor, T):
    """And once more where a thread has some of the k largest: few do."""
    N, k = 4096, 8
    case = random_case(T, 8, N, k, 0, *HALVES[:1] * 2)
    machine = cuda_machine.settle(hopper=True)
    traffic = ptx_executor.traffic(lambda: machine.encode(*case.encoder, k))
    select = [t for t in traffic if "6select" in t.kernel]
    read = sum(SECTOR * t.parts for t in select if t.kind == "read")
    written = sum(t.bytes for t in traffic if t.kind == "written" and t not in select)
    p = 4 * T * N
    assert written == p <= read <= 1.2 * p
