"""The CUDA kernels against the fp64 truth, every path: as the PTX that nvcc makes of them, run by
tests/ptx, and, where there is one, on a real GPU. What only that can show is in test_gpu.py."""

from __future__ import annotations

import ctypes
import math
import threading
from itertools import pairwise, product

import pytest
import torch
from ops_cases import (
    DTYPES,
    Case,
    assert_steered,
    gamma,
    integer_case,
    off_by_one,
    permutation,
    preact_bound,
    random_case,
    rounded,
    same_bits,
)
from ptx.cuda import Machine

from saesteer_fast import reference

F32, BF16, F16 = DTYPES
NAN, INF = math.nan, math.inf


class Gpu:
    """The ops on a real GPU, for tensors on the CPU."""

    def __getattr__(self, name: str):
        op = getattr(torch.ops.saesteer_cuda, name)

        def run(*arguments):
            found = op(*map(there, arguments))
            return tuple(t.cpu() for t in found) if isinstance(found, tuple) else found.cpu()

        return run

    def steer_(self, x: torch.Tensor, *others) -> torch.Tensor:
        """A copy of x, overwritten."""
        copy = there(x)
        torch.ops.saesteer_cuda.steer_(copy, *map(there, others))
        return copy.cpu()


def there(t):
    """A tensor on the GPU, as far from 16-byte alignment as here."""
    if not isinstance(t, torch.Tensor):
        return t
    off = t.data_ptr() % 16 // t.element_size()
    return torch.cat([t.new_zeros(off), t.flatten()]).cuda()[off:].view(t.shape)


@pytest.fixture(params=["ampere", "hopper", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request):
    if request.param != "gpu":
        cuda_machine = request.getfixturevalue("cuda_machine")
        return cuda_machine.settle(hopper=request.param == "hopper")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return Gpu()


def acts(machine: Machine, case: Case) -> torch.Tensor:
    return machine.feature_acts(*case.encoder, case.features, case.k, case.order)


def steered(machine: Machine, case: Case) -> torch.Tensor:
    return machine.steer(*case.edit, case.mask, case.order)


def assert_right(machine: Machine, case: Case) -> torch.Tensor:
    """steer and feature_acts decide as fp64 does, wherever fp32 can tell; who is live."""
    a, y = acts(machine, case), steered(machine, case)
    live, undecided = a > 0, case.undecided()
    exact = reference.feature_acts(*case.encoder, case.features, case.k, dtype=torch.float64) > 0
    assert torch.equal(live[~undecided], exact[~undecided])
    p = reference.preacts(case.x, case.W_enc[case.features], case.b_enc[case.features])
    bound = preact_bound(case.x, case.W_enc[case.features], case.b_enc[case.features])
    assert ((a.double() - p).abs() <= bound)[live].all() and (a[~live] == 0).all()
    assert_steered(case, y, live)
    if case.mask is not None:
        assert same_bits(y[~case.mask], case.x[~case.mask])
    return live


# ---- the arithmetic of the ladder ----

NUMBERS = [NAN, INF, -INF, 0.0, -0.0, 2.0**-149, 2.0**-148, 2.0**-126, -1.0, 1.0, 1 + 2.0**-23]
NUMBERS += [1 - 2.0**-24, 3.4028234e38, -3.4028234e38]


def test_beats_is_the_order_of_the_reference(cuda_machine):
    """Every pair of numbers, with the other latent before and after f."""
    for p_j, p_f, before in product(NUMBERS, NUMBERS, (True, False)):
        if not cuda_machine.pure("is_undecided", ctypes.c_bool, ctypes.c_float(p_f)):
            assert not (p_f > 0 and math.isfinite(p_f))
            continue
        assert p_f > 0 and math.isfinite(p_f)
        pair = torch.tensor([[p_j, p_f] if before else [p_f, p_j]])
        f = 1 if before else 0
        expected = reference.rank(pair, torch.tensor([f])).item() == 1
        numbers = ctypes.c_float(p_j), ctypes.c_float(p_f)
        beats = cuda_machine.pure("is_beaten", ctypes.c_bool, numbers[0], 1 - f, numbers[1], f)
        side = cuda_machine.pure(
            "is_beaten_from_one_side", ctypes.c_bool, *numbers, ctypes.c_bool(before)
        )
        assert beats == side == expected, (p_j, p_f, before)
        assert not cuda_machine.pure("is_beaten", ctypes.c_bool, numbers[0], f, numbers[1], f)


def test_what_is_settled(cuda_machine):
    def settled(p: float, beaten: int) -> float:
        rank = ctypes.c_int64(beaten), ctypes.c_int64(4)
        return cuda_machine.pure("settled", ctypes.c_float, ctypes.c_float(p), *rank)

    assert settled(2.5, 3) == 2.5 and settled(2.5, 4) == 0 == settled(-1.0, 0) == settled(0.0, 0)
    assert all(math.isnan(settled(p, n)) for p in (NAN, INF, -INF) for n in (0, 4))


def test_keys_sort_as_the_reference_does(cuda_machine):
    p = torch.tensor([*NUMBERS, *NUMBERS], dtype=torch.float32)
    keys = [
        cuda_machine.pure("key_of", ctypes.c_uint64, ctypes.c_float(v), ctypes.c_uint32(i))
        for i, v in enumerate(p.tolist())
    ]
    ours = sorted(range(len(p)), key=keys.__getitem__, reverse=True)
    assert ours == p.sort(descending=True, stable=True).indices.tolist()
    for i, key in enumerate(keys):
        assert cuda_machine.pure("index_of", ctypes.c_int64, ctypes.c_uint64(key)) == i
        value = cuda_machine.pure("preact_of", ctypes.c_float, ctypes.c_uint64(key))
        assert value == p[i] or (math.isnan(value) and p[i].isnan())


# ---- every path of steer and feature_acts ----

PATHS = {
    # T, d, N, k, F, x, W
    "fp32, few": (7, 31, 65, 8, 2, F32, F32),
    "fp32, many": (150, 33, 129, 8, 3, F32, F32),
    "mixed, few": (16, 67, 64, 4, 5, BF16, F32),
    "mixed, many": (90, 40, 300, 8, 2, F32, F16),
    "odd width": (70, 65, 129, 8, 2, BF16, BF16),
    "one token": (1, 200, 129, 8, 1, BF16, BF16),
    "16-bit, fewest": (16, 72, 257, 8, 9, F16, F16),
    "16-bit, few": (50, 136, 129, 8, 2, BF16, BF16),
    "16-bit, many": (200, 200, 600, 16, 3, BF16, BF16),
    "fp16, many": (300, 64, 257, 8, 1, F16, F16),
    "16-bit, most": (600, 64, 300, 8, 1, BF16, BF16),
    "longer than the stages": (80, 712, 140, 8, 2, BF16, BF16),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_steer_and_feature_acts_are_the_truth(machine, path, masked):
    T, d, N, k, F, dtype, weights = PATHS[path]
    case = random_case(T, d, N, k, F, dtype, weights, per_token=masked, masked=masked)
    live = assert_right(machine, case)
    assert T < 20 or 0 < live.double().mean() < 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [40, 150])
def test_integers_are_exact(machine, dtype, T):
    """Ties are everywhere, so that every latent's place counts."""
    for weights in DTYPES:
        case = integer_case(T, 40, 300, 8, 3, dtype, weights, per_token=True)
        exact = reference.feature_acts(*case.encoder, case.features, case.k, dtype=torch.float64)
        assert torch.equal(acts(machine, case).double(), exact)
        assert same_bits(machine.steer(*case.edit) + 0.0, case.truth().to(dtype) + 0.0)
        values, indices = reference.encode(*case.encoder, case.k, dtype=torch.float64)
        ours = machine.encode(*case.encoder, case.k)
        assert torch.equal(ours[0].double(), values) and torch.equal(ours[1], indices)
        recon = reference.decode(values, indices, case.W_dec, case.b_dec)
        assert torch.equal(machine.decode(*ours, case.W_dec, case.b_dec), recon)


@pytest.mark.fault(25)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_ties_go_to_the_lower_latent(machine, dtype):
    """All latents alike: the k first are live, wherever they lie in a tile."""
    N, k = 300, 131
    ones = torch.ones(70, 8, dtype=dtype)
    case = random_case(70, 8, N, k, 0).but(
        x=ones, W_enc=ones[:1].expand(N, 8).contiguous(), b_enc=torch.zeros(N)
    )
    features = torch.tensor([0, 1, 63, 64, 127, 128, 130, 131, 255, 256, 299])
    live = acts(machine, case.but(features=features)) > 0
    assert torch.equal(live, (features < k).expand(70, -1))
    assert torch.equal(machine.encode(*case.encoder, k)[1], torch.arange(k).expand(70, k))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("T", [9, 50, 130])
def test_rows_in_another_order_change_no_bit(machine, dtype, T):
    """Ties go to the lower latent, wherever its row is; without `order` they would not."""
    N, k = 270, 131
    natural = integer_case(T, 16, N, 12, 5, dtype, dtype, per_token=True)
    exact = reference.feature_acts(*natural.encoder, natural.features, 12, dtype=torch.float64)
    alike = natural.but(
        x=torch.ones_like(natural.x),
        W_enc=torch.ones_like(natural.W_enc),
        b_enc=torch.zeros(N),
        features=torch.tensor([0, 63, 130, 131, 269]),
        k=k,
    )
    unsaid = 0
    for order in (permutation(N), torch.arange(N).flip(0)):
        stored = natural.stored(order)
        assert torch.equal(acts(machine, stored).double(), exact)
        assert same_bits(steered(machine, stored) + 0.0, natural.truth().to(dtype) + 0.0)
        unsaid += not torch.equal(acts(machine, stored.but(order=None)).double(), exact)
        live = acts(machine, alike.stored(order)) > 0
        assert torch.equal(live, (alike.features < k).expand(T, -1))
    assert unsaid == 2


def test_scans_can_be_left_out(cuda_machine, monkeypatch):
    """What each of them gives alone: how one that is wrong is found, and done without."""
    case = integer_case(150, 200, 300, 20, 3, BF16, BF16)
    cuda_machine.settle(hopper=True)
    for only in ("", "mma", "simt"):
        monkeypatch.setenv("SAESTEER_SCAN", only)
        assert same_bits(cuda_machine.steer(*case.edit) + 0.0, case.truth().to(BF16) + 0.0)
    monkeypatch.setenv("SAESTEER_SCAN", "wgmm")
    with pytest.raises(RuntimeError, match="SAESTEER_SCAN is 'wgmm'; accepted: mma, simt"):
        cuda_machine.steer(*case.edit)


def test_every_latent_may_be_live(machine):
    for dtype in (F32, BF16):
        case = random_case(70, 40, 65, 65, 3, dtype, dtype)
        assert torch.equal(
            assert_right(machine, case),
            machine.project(case.x, case.W_enc[case.features], case.b_enc[case.features]) > 0,
        )


@pytest.mark.fault(22, 28)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_change_changes_no_bit(machine, dtype):
    case = random_case(90, 40, 129, 16, 5, dtype, dtype)
    x = case.x.clone()
    x[:, 3] = -0.0
    case = case.but(x=x)
    assert (acts(machine, case) > 0).any()
    assert same_bits(machine.steer(*case.but(values=acts(machine, case)).edit), x)
    none = case.but(features=case.features[:0], values=case.values[:0])
    assert same_bits(machine.steer(*none.edit), x)
    assert acts(machine, none).shape == (90, 0)
    empty = case.rows(slice(0, 0))
    assert machine.steer(*empty.edit).shape == (0, 40)
    assert all(t.shape == (0, 16) for t in machine.encode(*empty.encoder, 16))


@pytest.mark.fault(1, 2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_row_spoils_no_other(machine, dtype, bad):
    good = random_case(80, 40, 129, 8, 3, dtype, dtype)
    x = good.x.clone()
    x[5, 39] = x[79, 0] = bad
    rows = torch.zeros(80, dtype=torch.bool)
    rows[[5, 79]] = True
    case = good.but(x=x)
    y, a = machine.steer(*case.edit), acts(machine, case)
    assert y[rows].isnan().all() and a[rows].isnan().all()
    assert same_bits(y[~rows], machine.steer(*good.edit)[~rows])
    assert same_bits(a[~rows], acts(machine, good)[~rows])
    values, indices = machine.encode(*case.encoder, case.k)
    expected, places = reference.encode(*case.encoder, case.k)
    assert torch.equal(values[rows].isnan(), expected[rows].isnan())
    assert torch.equal(indices[rows], places[rows])


@pytest.mark.fault(20)
def test_latents_that_do_not_exist_spoil_what_depends_on_them(machine):
    case = random_case(80, 40, 129, 8, 3, BF16, BF16)
    for index in (-1, 129, 2**40, -(2**63)):
        features = case.features.clone()
        features[1] = index
        wrong = case.but(features=features)
        a = acts(machine, wrong)
        assert a[:, 1].isnan().all()
        assert same_bits(a[:, ::2].contiguous(), acts(machine, case)[:, ::2].contiguous())
        directions = case.directions
        edit = *wrong.encoder, directions, features, wrong.values, wrong.k
        assert machine.steer(*edit).isnan().all()
        indices = torch.tensor([[0, 128], [index, 0], [1, 2]])
        y = machine.decode(torch.ones(3, 2), indices, case.W_dec, case.b_dec)
        assert torch.equal(y.isnan().any(-1), torch.tensor([False, True, False]))


@pytest.mark.fault(7)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_rows(machine, dtype):
    for d in (40, 39):
        case = random_case(70, d, 129, 8, 3, dtype, dtype, per_token=True)
        y, a, (values, indices) = (
            machine.steer(*case.edit),
            acts(machine, case),
            machine.encode(*case.encoder, 8),
        )
        shifted = off_by_one(case.x)
        assert shifted.data_ptr() % 16
        assert_right(machine, case.but(x=shifted))
        assert torch.equal(machine.encode(shifted, *case.encoder[1:], 8)[1], indices)
        moved = case.but(W_enc=off_by_one(case.W_enc))
        # The product of another kernel may differ in the last bit; L0's may not.
        rows = [(c.W_enc[:9], c.b_enc[:9]) for c in (case, moved)]
        assert same_bits(*(machine.project(case.x, *row) for row in rows))
        assert_right(machine, moved)
        assert (values > 0).any() and same_bits(acts(machine, case), a)
        assert same_bits(machine.steer(*case.edit), y)


def at_once(op, machine: Machine, case: Case, monkeypatch) -> torch.Tensor:
    """What `op` gives in one launch; in three it gives the same."""
    before = machine.launches()
    found = op(machine, case)
    assert machine.launches() == before + 1
    monkeypatch.setenv("SAESTEER_LADDER", "steps")
    assert same_bits(found, op(machine, case)) and machine.launches() == before + 4
    monkeypatch.delenv("SAESTEER_LADDER")
    return found


@pytest.mark.parametrize(
    ("T", "F"),
    [(1, 1), (1, 17), (2, 4), (3, 1), (4, 4), (5, 17), (16, 4), (17, 1), (64, 1), (64, 4)],
)
def test_one_launch_gives_the_bits_of_three(cuda_machine, monkeypatch, T, F):
    """All settled by L0, some, none; each dtype, and, of few tokens, what no tensor core takes."""
    pairs = [(BF16, BF16), (F16, F16), (F32, F32), (BF16, F32)]
    taken = [*product(pairs, (64, 67))] if T <= 16 else [*product(pairs[:2], (64,))]
    for place, ((dtype, weights), d) in enumerate(taken):
        case = random_case(T, d, 140, 8, F, dtype, weights, per_token=place % 2 > 0, masked=T > 3)
        rest = torch.ones(140, dtype=torch.bool).index_fill(0, case.features, False)
        machine = cuda_machine.settle(multiprocessors=1 + T % 4, seed=T + d)
        # What is open is tried in every case, either extreme in every other; so are the orders.
        for push in (0.0, (-1e4, 1e4)[(place // 2 + T) % 2]):
            pushed = case.but(b_enc=torch.where(rest, case.b_enc, case.b_enc + push))
            stored = pushed.stored(permutation(140)) if (push == 0) == (place + F) % 2 else pushed
            y, a = (at_once(op, machine, stored, monkeypatch) for op in (steered, acts))
            assert y.isfinite().all() and (push == 0 or (a > 0).any() == (push > 0))


def test_what_one_launch_does_not_take_goes_in_steps(cuda_machine, monkeypatch):
    """Directions of another dtype than what tensor cores multiply, and many that none takes."""
    for T, launches in (16, 1), (17, 3):
        case = random_case(T, 64, 140, 8, 2, F32, F32)
        before = cuda_machine.settle().launches()
        steered(cuda_machine, case)
        assert cuda_machine.launches() == before + launches
    case = random_case(3, 64, 140, 8, 2, BF16, BF16)
    edit = list(case.edit)
    edit[3] = edit[3].float()
    before = cuda_machine.settle().launches()
    assert same_bits(cuda_machine.steer(*edit), steered(cuda_machine, case))
    assert cuda_machine.launches() == before + 4
    monkeypatch.setenv("SAESTEER_LADDER", "step")
    with pytest.raises(RuntimeError, match="SAESTEER_LADDER is 'step'; accepted: steps"):
        steered(cuda_machine, case)


def test_a_context_that_has_a_part_of_the_device(cuda_machine):
    """As a green one: where blocks cannot all run together, the steps are launched one by one."""
    for dtype in (F32, BF16):
        case = random_case(5, 64, 300, 8, 2, dtype, dtype)
        y = cuda_machine.settle(multiprocessors=5).steer(*case.edit)
        before = cuda_machine.settle(multiprocessors=5, usable=0).launches()
        assert same_bits(cuda_machine.steer(*case.edit), y)
        assert cuda_machine.launches() == before + 3
        assert cuda_machine.pure("cudaGetLastError", ctypes.c_int) == 0


def test_a_device_whose_blocks_cannot_run_together(cuda_machine):
    case = random_case(5, 64, 300, 8, 2, BF16, BF16)
    y = cuda_machine.settle().steer(*case.edit)
    before = cuda_machine.settle(together=False).launches()
    assert same_bits(cuda_machine.steer(*case.edit), y)
    assert cuda_machine.launches() == before + 3


def test_hoppers_instructions_are_hoppers_alone(cuda_machine):
    """They are no part of 10.0, where their kernel would trap."""
    case = random_case(400, 64, 300, 8, 2, BF16, BF16)
    y, maps = [], []
    for device in ({}, {"hopper": True}, {"blackwell": True}):
        machine = cuda_machine.settle(**device)
        calls = machine.calls(lambda: y.append(machine.steer(*case.edit)))  # noqa: B023
        maps.append("cuTensorMapEncodeTiled" in calls)
    assert maps == [False, True, False] and same_bits(y[0], y[2])


def test_a_context_that_nothing_was_asked_of(cuda_machine):
    """What a kernel may have of shared memory, it may have in the context where that was asked.
    Nor is another context made the current one."""
    for T, hopper, kernels in ((5, False, 1), (300, True, 4)):
        case = random_case(T, 64, 300, 8, 2, BF16, BF16)
        y = cuda_machine.settle(multiprocessors=7, hopper=hopper).steer(*case.edit)
        for usable in (5, 6):
            before = cuda_machine.settle(7, usable, hopper).launches()
            for _ in range(2):
                assert same_bits(cuda_machine.steer(*case.edit), y)
            assert cuda_machine.launches() == before + 2 * kernels
            assert cuda_machine.usable() == usable
            assert cuda_machine.pure("cudaGetLastError", ctypes.c_int) == 0


def test_a_thread_without_a_context_gets_one(cuda_machine):
    case = integer_case(70, 64, 300, 8, 2, BF16, BF16)
    cuda_machine.settle(hopper=True)
    found, calls = [], []

    def encode():
        calls.append(
            cuda_machine.calls(lambda: found.append(cuda_machine.encode(*case.encoder, 8)[1]))
        )

    for _ in range(2):
        encode()
    thread = threading.Thread(target=encode)
    thread.start()
    thread.join()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert [c.get("cudaSetDevice", 0) for c in calls[1:]] == [0, 1]


# By the tokens, of a call on Hopper: the kernels, and what else is said to the runtime
CALLS = {
    1: (1, {"cudaGetDevice": 2}),
    100: (4, {"cudaGetDevice": 6, "cudaMemsetAsync": 1, "cuTensorMapEncodeTiled": 2}),
    600: (3, {"cudaGetDevice": 4, "cudaMemsetAsync": 1, "cuTensorMapEncodeTiled": 2}),
}


@pytest.mark.parametrize("T", CALLS)
def test_what_is_known_of_a_device_is_asked_once(cuda_machine, T):
    """On the host a call of one token takes as long as on the device."""
    case = random_case(T, 64, 300, 8, 1, BF16, BF16)
    kernels, others = CALLS[T]

    def steer():
        cuda_machine.steer(*case.edit)

    for multiprocessors in (20 + T, 21 + T):  # which no other test has
        cuda_machine.settle(multiprocessors, hopper=True)
        first, *later = (cuda_machine.calls(steer) for _ in range(3))
        assert later == [{"cudaLaunchKernelExC": kernels, **others}] * 2
        assert first["cudaDeviceGetAttribute"] == 5 and first["cudaFuncSetAttribute"] > 0


@pytest.mark.parametrize(("T", "every"), [(300, 40), (600, 40), (600, 2)])
def test_few_open_tokens_among_many(cuda_machine, T, every):
    """How many are open is known on the device only: two scans are launched, or one takes any."""
    case = random_case(T, 64, 300, 8, 2, BF16, BF16)
    few = case.but(mask=torch.arange(T) % every == 0)
    for hopper in (True, False):
        before = cuda_machine.settle(hopper=hopper).launches()
        y = cuda_machine.steer(*few.edit, few.mask)
        assert cuda_machine.launches() == before + (3 if hopper and T > 384 else 4)
        assert same_bits(y[~few.mask], case.x[~few.mask])
        assert_right(cuda_machine, few)


def growing(T: int, dtype: torch.dtype) -> Case:
    """Every p_f is below zero, and above once a token is steered."""
    case = random_case(T, 40, 129, 8, 2, dtype, dtype)
    b_enc = case.b_enc.index_fill(0, case.features, -1e4)
    return case.but(b_enc=b_enc, W_dec=case.W_enc, values=torch.full((2,), 1e4))


def test_in_place_no_block_measures_what_another_wrote(cuda_machine):
    for T, dtype, seed in product((1, 2, 5, 50), (F32, BF16), range(3)):
        machine, case = cuda_machine.settle(multiprocessors=5, seed=seed), growing(T, dtype)
        y = steered(machine, case)
        again = machine.project(y, case.W_enc[case.features], case.b_enc[case.features])
        assert (acts(machine, case) == 0).all() and (again > 0).all()
        assert same_bits(machine.steer_(*case.edit), y)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("offset", [0, -1e3, 1e3], ids=["", "all dead", "all live"])
def test_in_place_is_bit_for_bit_the_same(machine, path, offset):
    T, d, N, k, F, dtype, weights = PATHS[path]
    case = random_case(T, d, N, k, F, dtype, weights, per_token=True)
    case.b_enc[case.features] += offset
    case.x[T // 2] = NAN
    assert same_bits(machine.steer_(*case.edit), machine.steer(*case.edit))
    if offset == 0:
        other = case.stored(permutation(N)).but(mask=torch.arange(T) % 3 > 0)
        arguments = *other.edit, other.mask, other.order
        assert same_bits(machine.steer_(*arguments), machine.steer(*arguments))


@pytest.mark.parametrize(
    ("machine", "scan"),
    # For Ampere mma is the best there is; simt is the same for both.
    [("ampere", ""), ("hopper", ""), ("hopper", "simt")]
    + [pytest.param("gpu", scan, marks=pytest.mark.gpu) for scan in ("", "mma", "simt")],
    indirect=["machine"],
)
@pytest.mark.parametrize("F", [0, 1, 4, 17])
def test_in_place_by_every_scan(machine, scan, F, monkeypatch):
    monkeypatch.setenv("SAESTEER_SCAN", scan)
    for T in (9, 50, 150):
        case = random_case(T, 72, 300, 24, F, BF16, BF16)
        assert same_bits(machine.steer_(*case.edit), machine.steer(*case.edit))
        held = case.but(values=acts(machine, case))
        assert same_bits(machine.steer_(*held.edit), case.x)


@pytest.mark.parametrize("T", [3, 66])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_more_features_than_a_block_has_threads(machine, T, dtype):
    case = random_case(T, 8, 150, 50, 140, dtype, dtype, per_token=True)
    case = case.but(mask=torch.arange(T) % 11 < 3)
    for push in (0.0, -1e3):
        b_enc = case.b_enc.index_add(0, case.features, torch.full((140,), push))
        assert_right(machine, case.but(b_enc=b_enc))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_wider_than_a_block_takes_at_once(machine, dtype):
    for T in (3, 20):
        assert_right(machine, random_case(T, 3080, 40, 4, 2, dtype, dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("n", [16, 17, 64, 65])
def test_as_many_open_tokens_as_a_kernel_takes_at_most(machine, n, dtype):
    """One more is another kernel's: each is counted by one and one alone."""
    T, N, k = 300, 129, 8
    case = random_case(T, 40, N, k, 2, dtype, dtype).but(features=torch.tensor([k - 1, k]))
    case = case.but(W_enc=0 * case.W_enc, b_enc=torch.arange(N, 0, -1.0), mask=torch.arange(T) < n)
    assert assert_right(machine, case).equal(torch.tensor([True, False]).expand(T, -1))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_more_blocks_of_tokens_than_lie_side_by_side(machine, dtype):
    T, N, k = 2100, 300, 8
    case = random_case(T, 8, N, k, 2, dtype, dtype).but(features=torch.tensor([N - k, N - k - 1]))
    case = case.but(W_enc=0 * case.W_enc, b_enc=torch.arange(1.0, N + 1))
    assert (acts(machine, case) > 0).equal(torch.tensor([True, False]).expand(T, -1))


@pytest.mark.parametrize(("T", "dtype"), [(400, BF16), (60, F32)])
def test_a_latent_does_not_beat_itself(machine, T, dtype):
    """Though the scan may sum its p to more than L0 did."""
    case = random_case(T, 200, 129, 8, 9, dtype, dtype)
    for each in (case, case.stored(permutation(129))):
        assert_right(machine, each)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_directions_anywhere_in_memory(machine, dtype):
    """More of them than shared memory of L0's has room for."""
    for T in (3, 70):
        case = random_case(T, 304, 140, 8, 17, dtype, dtype)
        edit = [*case.edit]
        edit[3] = off_by_one(edit[3])
        assert same_bits(machine.steer(*edit), steered(machine, case))


@pytest.mark.fault(31)
def test_the_same_however_the_work_is_cut(cuda_machine):
    """More or fewer blocks, other orders of threads, tokens alone: no bit changes."""
    for dtype in (F32, BF16):
        case = random_case(150, 72, 700, 8, 3, dtype, dtype, per_token=True, masked=True)
        for hopper in (False, True):
            ys = [
                cuda_machine.settle(hopper=hopper, multiprocessors=m, seed=s).steer(
                    *case.edit, case.mask
                )
                for m, s in ((1, 1), (5, 2), (100, 3))
            ]
            assert same_bits(ys[0], ys[1]) and same_bits(ys[0], ys[2])
        whole = cuda_machine.steer(*case.edit, case.mask)
        parts = [case.rows(slice(a, b)) for a, b in pairwise([0, 1, 17, 80, 150])]
        pieces = torch.cat([cuda_machine.steer(*part.edit, part.mask) for part in parts])
        settled = ~case.undecided().any(-1)
        assert same_bits(whole[settled], pieces[settled])


def test_more_tokens_than_the_workspace_holds(machine):
    F = 65
    case = random_case(2100, 8, 129, 16, F, F32, F32, per_token=True)
    case = case.but(mask=torch.arange(2100) % 40 == 0)
    assert 2100 * (4 + 8 * F) > 1 << 20
    y = machine.steer(*case.edit, case.mask)
    assert same_bits(y[~case.mask], case.x[~case.mask])
    assert same_bits(y[case.mask], machine.steer(*case.rows(case.mask).edit))


# On a CPU it would take a minute.
@pytest.mark.parametrize("machine", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_acts_of_more_tokens_than_the_workspace_holds(machine):
    for k in (129, 16):
        assert_right(machine, random_case(2100, 8, 129, k, 65, F32, F32))


def test_the_workspace_is_at_most_a_megabyte(cuda_machine):
    for tokens, F in product((1, 64, 10**3, 10**6, 10**9), (0, 1, 4, 16, 1000)):
        assert (
            cuda_machine._workspace("ladder_workspace", min(tokens, 10**6), F).numel() <= 2**20 + 16
        )


# ---- project, add_directions, encode, decode ----


@pytest.mark.parametrize("pair", list(product(DTYPES, DTYPES)), ids=str)
def test_project_and_add_directions_are_the_truth(machine, pair):
    for T, d, F in ((1, 1, 1), (7, 33, 65), (5, 1100, 3)):
        case = random_case(T, d, 129, 129, F, *pair, per_token=F == 65)
        W, bias = case.W_enc[case.features], case.b_enc[case.features]
        p = machine.project(case.x, W, bias)
        error = (p.double() - reference.preacts(case.x, W, bias)).abs()
        assert (error <= preact_bound(case.x, W, bias)).all()
        assert same_bits(p.clamp(min=0) + 0.0, acts(machine, case) + 0.0)
        dead = case.but(W_enc=0 * case.W_enc, b_enc=torch.full((129,), -1.0))
        y = machine.add_directions(case.x, case.directions, case.values)
        assert_steered(dead, y, torch.zeros(T, F, dtype=torch.bool))
        nothing = machine.add_directions(case.x, case.directions, -0.0 * case.values)
        assert same_bits(nothing, case.x)


def test_what_nothing_is_added_to_keeps_a_nans_bits(machine):
    x = torch.full((5, 40), 0x7FA1, dtype=torch.int16).view(BF16)
    assert same_bits(machine.add_directions(x, torch.ones(2, 40, dtype=BF16), torch.zeros(2)), x)


@pytest.mark.parametrize(
    ("T", "N", "k"),
    [(3, 1, 1), (5, 129, 129), (3, 700, 300), (2, 8192, 256), (2, 4099, 600), (130, 300, 8)],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_encode_is_the_truth(machine, T, N, k, dtype):
    """k = 600: more than there are threads, and more candidates than are kept."""
    case = random_case(T, 16, N, k, 0, dtype, dtype)
    values, indices = machine.encode(*case.encoder, k)
    p, e = reference.preacts(*case.encoder), preact_bound(*case.encoder)
    chosen, slack = p.gather(-1, indices), e.gather(-1, indices)
    assert ((values.double() - chosen.relu()).abs() <= slack).all()
    assert (values[:, 1:] <= values[:, :-1]).all()
    left_out = torch.ones_like(p, dtype=torch.bool).scatter_(-1, indices, False)
    assert (left_out.sum(-1) == N - k).all()
    largest = torch.where(left_out, p - e, -torch.inf).amax(-1)
    assert (largest <= (chosen + slack).amin(-1)).all()


@pytest.mark.parametrize("T", [5, 40, 130])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_encode_where_rows_lie_without_gaps(machine, T, dtype):
    """Though N is no whole number of tiles: the next token's begins at once."""
    case = integer_case(T, 16, 136, 4, 0, dtype, dtype)
    values, indices = reference.encode(*case.encoder, 4, dtype=torch.float64)
    ours = machine.encode(*case.encoder, 4)
    assert torch.equal(ours[0].double(), values) and torch.equal(ours[1], indices)


def test_encode_takes_tokens_in_pieces(cuda_machine):
    T, N, k = 258, 24577, 4
    case = integer_case(T, 8, N, k, 0, BF16, BF16)
    before = cuda_machine.settle(hopper=True, multiprocessors=9).launches()
    values, indices = cuda_machine.encode(*case.encoder, k)
    assert cuda_machine.launches() == before + 4
    expected, places = reference.encode(*case.encoder, k, dtype=torch.float64)
    assert torch.equal(values.double(), expected) and torch.equal(indices, places)


@pytest.mark.parametrize("N", [131, 2051])
def test_encode_ranks_what_is_alike_or_not_finite(machine, N):
    """NaN, infinity, numbers, -infinity; the lower latent first, of however many."""
    case = integer_case(3, 8, N, 8, 0, BF16, BF16)
    some = case.b_enc.clone()
    some[[5, N - 1]], some[[3, N - 2]], some[::2] = NAN, INF, -INF
    for b_enc in (some, *(torch.full((N,), b) for b in (0.0, NAN, INF, -INF))):
        alike = case.but(b_enc=b_enc, x=case.x if b_enc is some else 0 * case.x)
        for k in (1, 3, 64):
            values, indices = reference.encode(*alike.encoder, k, dtype=torch.float64)
            ours = machine.encode(*alike.encoder, k)
            assert torch.equal(ours[1], indices)
            torch.testing.assert_close(ours[0].double(), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 1), (63, 130, 32), (7, 33, 0)], ids=str)
def test_decode_is_the_truth(machine, dtype, shape):
    T, d, k = shape
    case = random_case(T, d, 1000, 1, 0, weights=dtype)
    random = torch.Generator().manual_seed(5)
    indices = torch.randint(1000, (T, k), generator=random)
    values = torch.randn(T, k, generator=random)
    for b_dec in (case.b_dec, case.b_dec.float()):
        y = machine.decode(values, indices, case.W_dec, b_dec)
        rows, bias = case.W_dec[indices].double(), b_dec.double()
        truth = (values.double()[..., None] * rows).sum(-2) + bias
        size = (values.double().abs()[..., None] * rows.abs()).sum(-2) + bias.abs()
        bound = rounded(truth, gamma(k + 1) * size, y.dtype)
        assert y.dtype == b_dec.dtype and ((y.double() - truth).abs() <= bound).all()
