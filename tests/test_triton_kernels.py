"""What the Triton kernels compute, against the fp64 truth: on a GPU, in Triton's interpreter, where
test_triton.py runs this file, or compiled for a GPU and run by tests/ptx, where test_triton_ptx.py
does."""

from __future__ import annotations

import mmap
import os
from itertools import pairwise

import pytest
import torch
from ops_cases import (
    DTYPES,
    Case,
    assert_steered,
    bits,
    calls_of_numbers_apart,
    integer_case,
    off_by_one,
    permutation,
    random_case,
    same_bits,
)
from ptx.memory import unwritable
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saesteer_fast import cache, ops, reference

triton = pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = triton.knobs.runtime.interpret
ARCHITECTURE = os.environ.get("PTX_ARCHITECTURE")
if ARCHITECTURE:
    from ptx import triton_driver

    triton_driver.activate(os.environ["PTX_LIBRARY"], int(ARCHITECTURE))
elif INTERPRETED:
    from interpreter import replace_once

    replace_once()
elif not torch.cuda.is_available():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from saesteer_fast.triton_kernels import (  # noqa: E402  (they import Triton)
    configs,
    dispatch,
    launch,
    tune,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
DEVICE = torch.device("cpu" if INTERPRETED or ARCHITECTURE else "cuda")

SAME = [(t, t) for t in DTYPES]
MIXED = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), DTYPES[1:]]
NAMES = [f"{x}-{w}".replace("torch.", "") for x, w in SAME + MIXED]
EVERY_PAIR = pytest.mark.parametrize(("dtype", "weights"), SAME + MIXED, ids=NAMES)

# T, d, N, k, F: for each size of tiles, with and without whole blocks of d
SHAPES = [
    (1, 33, 65, 4, 2),
    (2, 1, 1, 1, 1),
    (3, 64, 129, 8, 1),
    (5, 3, 63, 1, 2),
    (5, 67, 9, 1, 0),
    (7, 31, 64, 64, 5),
    (16, 48, 130, 16, 3),
    (18, 96, 200, 8, 2),
    (17, 33, 65, 65, 3),
]


@pytest.fixture(autouse=not dispatch.SEARCHES)
def triton_would_launch_the_same(monkeypatch):
    """Asked at each launch of every test, Triton's own search finds what `dispatch` has found."""
    launched = dispatch.Kernel.launch

    def and_searched(self, grid, made, *arguments):
        launched(self, grid, made, *arguments)
        compiled, _ = self.found[made, self.kind(arguments)]
        assert compiled is self.kernel.warmup(*arguments, grid=grid, **self.options(*made))

    monkeypatch.setattr(dispatch.Kernel, "launch", and_searched)


def here(case: Case) -> Case:
    return case.on(DEVICE)


def exact_acts(case: Case) -> Tensor:
    return reference.feature_acts(*case.encoder, case.features, case.k, dtype=torch.float64)


def assert_right(case: Case) -> Tensor:
    """Decisions and x' are right; which features were found live."""
    live = case.acts("triton") > 0
    undecided = case.undecided()
    assert torch.equal(live[~undecided], (exact_acts(case) > 0)[~undecided])
    y = case.steer("triton")
    if INTERPRETED and case.x.dtype == torch.bfloat16:
        # The interpreter cuts the end off where a GPU rounds.
        case = case.but(x=case.x.float())
        whole = case.steer("triton")
        assert torch.equal(bits(y), (bits(whole) >> 16).short())
        y = whole
    assert_steered(case, y, live)
    return live


def assert_steered_exactly(case: Case) -> None:
    assert same_bits(case.steer("triton") + 0.0, case.truth().to(case.x.dtype) + 0.0)


def assert_encoded_exactly(case: Case) -> None:
    values, indices = reference.encode(*case.encoder, case.k, dtype=torch.float64)
    ours = case.encode("triton")
    assert torch.equal(ours[0].double(), values) and torch.equal(ours[1], indices)
    recon = reference.decode(values, indices, case.W_dec, case.b_dec)
    assert torch.equal(ops.decode(*ours, case.W_dec, case.b_dec, impl="triton"), recon)


def assert_exact(case: Case) -> None:
    assert torch.equal(case.acts("triton").double(), exact_acts(case))
    assert_steered_exactly(case)
    assert_encoded_exactly(case)
    few = case.x, case.W_enc[:3], case.b_enc[:3]
    assert torch.equal(ops.project(*few, impl="triton").double(), reference.preacts(*few))


# ---- values and decisions ----


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-d{}-N{}-k{}-F{}".format(*s))
def test_any_shape(shape):
    case = here(random_case(*shape))
    assert_right(case)
    assert_right(case.but(x=case.x.half(), W_enc=case.W_enc.half(), W_dec=case.W_dec.half()))


@EVERY_PAIR
def test_any_dtypes(dtype, weights):
    case = here(random_case(18, 48, 97, 24, 4, dtype, weights, per_token=True, masked=True))
    live = assert_right(case)
    positive = reference.preacts(case.x, case.W_enc, case.b_enc)[:, case.features] > 0
    assert live.any() and (positive & ~live).any() and (~positive).any()


@EVERY_PAIR
def test_integers_are_exact(dtype, weights):
    for case in (
        integer_case(18, 31, 97, 8, 3, dtype, weights),
        integer_case(6, 64, 100, 5, 5, dtype, weights, seed=1, per_token=True),
        integer_case(3, 7, 33, 33, 2, dtype, weights, seed=2),
    ):
        assert_exact(here(case))


@pytest.mark.parametrize("ragged", [0, 16, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
def test_every_tile(dtype, ragged):
    """Rows fill each pipeline, and end with a whole block, inside of one, or off its alignment."""
    tiles = configs.tiles(DEVICE, torch.float32 if INTERPRETED else dtype)
    depth = max(tile.BLOCK_K * (tile.num_stages + 1) for tile in tiles.count + tiles.topk)
    sizes = [tile.most for tile in tiles.count[:-1]]
    T = sizes[-1] + 20
    case = here(integer_case(T, depth + ragged, 300, 24, 8, dtype, dtype))
    assert_exact(case)
    assert_encoded_exactly(case.rows(slice(0, 5)))
    for size in sizes:
        mask = torch.arange(T, device=DEVICE) < size
        assert_steered_exactly(case.but(mask=mask))


@pytest.mark.fault(25)
@pytest.mark.parametrize("T", [1, 20])
def test_ties_go_to_the_lower_latent(T):
    """All latents alike: exactly the k first are live, wherever in its tile a feature lies."""
    N, k = 130, 70
    case = integer_case(T, 32, N, k, 0)
    W_enc, b_enc = case.W_enc[:1].expand(N, -1).contiguous(), torch.full((N,), 40.0)
    features = torch.tensor([0, 31, 32, 63, 64, k - 1, k, 96, N - 1])
    alike = here(case.but(W_enc=W_enc, b_enc=b_enc, features=features))
    assert torch.equal(alike.acts("triton") > 0, (alike.features < k).expand(T, -1))
    indices = alike.encode("triton")[1]
    assert torch.equal(indices, torch.arange(k, device=DEVICE).expand(T, k))


@pytest.mark.parametrize(("T", "F"), [(1, 9), (18, 3)])
def test_rows_in_another_order_change_no_bit(T, F):
    """Ties go to the lower latent, wherever its row is; without `order` they would not."""
    natural = here(integer_case(T, 31, 130, 40, F, per_token=True))
    flipped = torch.arange(130).flip(0)
    for order in (permutation(130), flipped):
        stored = natural.stored(order.to(DEVICE))
        assert torch.equal(stored.acts("triton").double(), exact_acts(natural))
        assert same_bits(stored.steer("triton") + 0.0, natural.truth().float() + 0.0)
    unsaid = stored.but(order=None)
    assert not torch.equal(unsaid.acts("triton").double(), exact_acts(natural))
    absent = stored.but(features=torch.tensor([-1, 130, 0], device=DEVICE))
    assert absent.acts("triton").isnan().any(0).tolist() == [True, True, False]


def test_counting_stops_at_k():
    T, N, k = 2, 1000, 3
    case = here(random_case(T, 16, N, k, 1)).but(features=torch.tensor([5], device=DEVICE))
    p = reference.preacts(case.x, case.W_enc, case.b_enc)
    case.b_enc[5] += (0.01 - p[:, 5]).max()
    args = case.x, case.W_enc, case.b_enc, case.features
    measured = launch._measure(*args, k, None, launch._Edit())
    counted = measured.beaten[measured.acts > 0]
    assert len(counted) and (counted >= k).all()
    if INTERPRETED:  # one program after the other, so all but the first find everything decided
        assert (counted < 100).all()
    whole = launch._measure(*args, N, None, launch._Edit())
    rank = reference.rank(reference.preacts(*args[:3]), case.features)
    assert torch.equal(whole.beaten[whole.acts > 0], rank[whole.acts > 0].int())


def test_project_is_what_is_ranked():
    case = here(random_case(33, 70, 130, 130, 5))
    W_enc, b_enc = case.W_enc[case.features], case.b_enc[case.features]
    p = ops.project(case.x, W_enc, b_enc, impl="triton")
    acts = case.acts("triton")
    assert (p > 0).any() and torch.equal(acts, p.clamp(min=0))


@pytest.mark.fault(31)
def test_a_batch_is_its_tokens():
    case = here(random_case(22, 48, 129, 24, 2, per_token=True))
    assert not case.undecided().any()
    acts, y = case.acts("triton"), case.steer("triton")
    for some in (slice(0, 1), slice(1, 5), slice(5, 22)):
        assert same_bits(case.rows(some).acts("triton"), acts[some])
        assert same_bits(case.rows(some).steer("triton"), y[some])


def test_parts_are_the_whole(monkeypatch):
    case = here(random_case(20, 48, 129, 24, 2, per_token=True, masked=True))
    acts, y = case.acts("triton"), case.steer("triton")
    starts = range(0, 20, 17)
    monkeypatch.setattr(launch, "_parts", lambda T, F: [slice(s, min(T, s + 17)) for s in starts])
    assert same_bits(case.acts("triton"), acts)
    assert same_bits(case.steer("triton"), y)


@pytest.mark.parametrize(("T", "F"), [(1, 1), (20, 0), (5000, 40), (5000, 3000), (1 << 20, 1)])
def test_parts_take_the_memory_that_is_promised(T, F):
    parts = [(part.start, part.stop) for part in launch._parts(T, F)]
    ends = [0, *(stop for _, stop in parts)]
    assert parts == [*pairwise(ends)] and ends[-1] == T
    most = max(stop - start for start, stop in parts)
    assert most == 1 or most * (8 * F + 6) <= (1 << 20) + 64 * T


@pytest.mark.parametrize(("dtype", "weights"), [*SAME, MIXED[0]], ids=NAMES[:4])
@pytest.mark.parametrize(("T", "F"), [(3, 17), (16, 1), (20, 0), (20, 4)])
def test_in_place_is_bit_for_bit_the_same(dtype, weights, T, F, monkeypatch):
    """Few tokens and many, in two parts; the rows before and behind x stay."""
    monkeypatch.setattr(launch, "_parts", lambda T, F: [slice(0, T - 2), slice(T - 2, T)])
    case = here(random_case(T, 33, 65, 8, F, dtype, weights, per_token=True, masked=True))
    case.x[1] = float("nan")
    held = case.but(mask=None, values=case.acts("triton"))
    for each in (case.stored(permutation(65).to(DEVICE)), held):
        around = each.x.new_full((T + 2, 33), -7.0)
        around[1:-1] = each.x
        expected = torch.cat([around[:1], each.steer("triton"), around[-1:]])
        each.but(x=around[1:-1]).steer_("triton")
        assert same_bits(around, expected)


def test_in_place_writes_only_what_changes():
    if DEVICE.type != "cpu":
        pytest.skip("a GPU's memory cannot be protected")
    case = random_case(18, 33, 65, 8, 2, per_token=True)
    with unwritable(case.x) as x:
        case.but(x=x, mask=torch.zeros(18, dtype=torch.bool)).steer_("triton")
        case.but(x=x, values=case.acts("triton")).steer_("triton")


def test_in_place_refuses_what_it_would_get_wrong():
    case = here(random_case(5, 6, 9, 3, 2))
    for changed, message in (
        ({"x": case.x.T.contiguous().T}, "x is not contiguous"),
        ({"values": case.x[:, :2]}, "values lies in the memory of x"),
    ):
        with pytest.raises(RuntimeError, match=f"^saesteer::steer_: {message}"):
            case.but(**changed).steer_("triton")
    with pytest.raises(NotImplementedError, match="steer_: no gradient for x, "):
        case.but(x=case.x.clone().requires_grad_()).steer_("triton")
    torch.library.opcheck(torch.ops.saesteer_triton.steer_, case.edit)


@pytest.mark.parametrize("shape", [(), (2, 3), (0,), (2, 0, 3)])
def test_any_leading_sizes(shape):
    case = here(random_case(shape or 1, 33, 65, 8, 2))
    if not shape:
        case = case.but(x=case.x[0])
    assert case.encode("triton")[0].shape == (*shape, 8)
    if case.x.numel():
        assert_right(case)
    else:
        assert case.steer("triton").shape == case.x.shape
        assert case.acts("triton").shape == (*shape, 2)


@pytest.mark.fault(7)
def test_any_strides():
    case = here(random_case(18, 33, 65, 8, 1))
    y = case.steer("triton")
    x = torch.zeros(18, 66, device=DEVICE)
    x[:, ::2] = case.x
    for strided in (x[:, ::2], case.x.T.contiguous().T):
        assert same_bits(case.but(x=strided).steer("triton"), y)
    before = case.x.clone()
    repeated = case.but(x=case.x[:1].expand(18, -1)).steer("triton")
    assert same_bits(repeated, y[:1].expand(18, -1).contiguous())
    assert torch.equal(case.x, before)


@pytest.mark.fault(7)
def test_numbers_that_lie_apart():
    case = here(random_case(3, 17, 9, 9, 3, per_token=True, masked=True))
    for name, found, expected in calls_of_numbers_apart(case, "triton"):
        assert same_bits(found, expected), name


# ---- bad numbers, and tokens that nothing changes ----


@pytest.mark.fault(1, 2)
@pytest.mark.parametrize("T", [4, 18])
def test_a_bad_token_is_its_own(T):
    case = here(random_case(T, 48, 129, 8, 2))
    good_acts, good = case.acts("triton"), case.steer("triton")
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = case.x.clone()
        x[1, 5], x[3] = bad, bad
        spoilt = case.but(x=x)
        acts, y = spoilt.acts("triton"), spoilt.steer("triton")
        assert acts[[1, 3]].isnan().all() and y[[1, 3]].isnan().all()
        others = [t for t in range(T) if t not in (1, 3)]
        assert same_bits(acts[others], good_acts[others])
        assert same_bits(y[others], good[others])


def test_a_latent_that_is_nan_beats_every_number():
    case = here(random_case(20, 32, 129, 3, 4))
    case.b_enc[7] = float("nan")
    case.b_enc.view(torch.int32)[100] = -1  # NaN with its sign bit set
    case = case.but(features=torch.tensor([3, 50, 120], device=DEVICE), values=case.values[:3])
    assert torch.equal(case.acts("triton") > 0, exact_acts(case) > 0)
    values, indices = case.encode("triton")
    assert values[:, :2].isnan().all() and not values[:, 2:].isnan().any()
    assert torch.equal(indices[:, :2], torch.tensor([[7, 100]], device=DEVICE).expand(20, 2))


def test_a_row_of_nan_counts_in_any_order():
    case = here(random_case(20, 32, 129, 3, 4))
    case = case.but(features=torch.tensor([3, 50, 120], device=DEVICE), values=case.values[:3])
    without = exact_acts(case) > 0
    case.b_enc[7] = float("nan")
    live = exact_acts(case) > 0
    assert without.sum() > live.sum()
    stored = case.stored(permutation(129).to(DEVICE))
    assert torch.equal(stored.acts("triton") > 0, live)


def test_a_row_of_nan_spoils_no_other_latent():
    """Where a row ends inside of a block, the next one begins."""
    case = here(random_case(20, 33, 129, 12, 4))
    W_enc = case.W_enc.clone()
    W_enc[case.features + 1] = float("nan")
    case = case.but(W_enc=W_enc)
    acts = case.acts("triton") > 0
    assert acts.any() and torch.equal(acts, exact_acts(case) > 0)
    bad = W_enc.isnan().any(-1).sum()
    assert (case.encode("triton")[0].isnan().sum(-1) == bad).all()


def test_a_latent_does_not_beat_itself():
    case = here(random_case(16, 129, 64, 1, 1))
    largest = reference.preacts(case.x, case.W_enc, case.b_enc).argmax(-1)
    for token, feature in enumerate(largest):
        one = case.rows(slice(token, token + 1)).but(features=feature[None])
        for each in (one, one.stored(permutation(64).to(DEVICE))):
            assert (each.acts("triton") > 0).all()


def test_the_last_of_few_tokens_alone_is_open():
    """More pairs than are looked at together, in a call of few tokens."""
    case = here(integer_case(16, 32, 65, 30, 40))
    case = case.but(mask=torch.arange(16, device=DEVICE) == 15)
    assert not torch.equal(case.truth(), case.but(k=65).truth())
    assert_steered_exactly(case)


@pytest.mark.fault(22, 28)
def test_what_nothing_changes_is_bit_identical():
    case = here(random_case(20, 33, 65, 8, 1, masked=True))
    case.x[:, :8], case.x[2] = -0.0, float("nan")
    untouched = ~case.mask
    untouched[2] = True
    case = case.but(mask=~untouched)
    assert same_bits(case.steer("triton")[untouched], case.x[untouched])
    none = case.but(features=case.features[:0], values=case.values[:0])
    assert same_bits(none.steer("triton"), case.x)
    held = case.but(x=case.x.nan_to_num(), mask=None)
    assert same_bits(held.but(values=held.acts("triton")).steer("triton"), held.x)


@pytest.mark.fault(20)
def test_a_feature_that_is_no_latent_shows():
    case = here(random_case(20, 33, 65, 8, 3))
    for wrong in (-1, 65, 1 << 40):
        features = torch.tensor([0, wrong, 1], device=DEVICE)
        acts = case.but(features=features).acts("triton")
        assert acts[:, 1].isnan().all() and not acts[:, [0, 2]].isnan().any()
        args = *case.encoder, case.directions, features, case.values, case.k
        assert ops.steer(*args, impl="triton").isnan().all()


def test_a_feature_far_from_every_latent_reads_nothing():
    case = here(random_case(5, 33, 65, 8, 2)).stored(permutation(65).to(DEVICE))
    for wrong in (-(1 << 40), 1 << 40):
        features = torch.tensor([0, wrong], device=DEVICE)
        assert case.but(features=features).acts("triton").isnan().any(0).tolist() == [False, True]
        values, indices = torch.ones(2, 2, device=DEVICE), features.expand(2, 2)
        assert ops.decode(values, indices, case.W_dec, case.b_dec, impl="triton").isnan().all()


# ---- the other ops ----


@pytest.mark.parametrize(("T", "k"), [(1, 1), (3, 5), (20, 16), (2, 129)])
@pytest.mark.parametrize("most", [256, 16])
def test_encode(T, k, most, monkeypatch):
    """`most` latents a pass: k above it takes several."""
    monkeypatch.setattr(launch, "MOST_K", most)
    case = here(random_case(T, 48, 129, k, 1))
    values, indices = case.encode("triton")
    p = reference.preacts(case.x, case.W_enc, case.b_enc)
    best = p.sort(descending=True).values[:, :k]
    torch.testing.assert_close(values.double(), best.clamp(min=0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(p.gather(-1, indices), best, atol=1e-5, rtol=1e-5)
    assert (indices.sort().values.diff() > 0).all()


def test_encode_in_passes_keeps_the_order_of_ties(monkeypatch):
    monkeypatch.setattr(launch, "MOST_K", 16)
    case = here(integer_case(17, 7, 100, 40, 1))
    values, indices = reference.encode(*case.encoder, case.k, dtype=torch.float64)
    ours = case.encode("triton")
    assert torch.equal(ours[0].double(), values) and torch.equal(ours[1], indices)


def test_encode_puts_nan_first():
    case = here(random_case(20, 48, 129, 5, 1))
    case.x[3] = float("nan")
    values, indices = case.encode("triton")
    assert values[3].isnan().all() and indices[3].tolist() == [0, 1, 2, 3, 4]
    assert not values[:3].isnan().any() and not values[4:].isnan().any()


def test_decode_reads_what_is_live():
    case = here(random_case(3, 48, 129, 5, 1))
    values, indices = case.encode("triton")
    values[0, 4], indices[0, 4] = 0.0, 7
    W_dec = case.W_dec.clone()
    W_dec[7] = float("nan")
    values = values.masked_fill(indices == 7, 0.0)
    recon = ops.decode(values, indices, W_dec, case.b_dec, impl="triton")
    truth = reference.decode(values.double(), indices, case.W_dec.double(), case.b_dec.double())
    torch.testing.assert_close(recon.double(), truth, atol=1e-4, rtol=1e-5)
    for wrong in (-1, 129):
        indices[1, 0] = wrong
        recon = ops.decode(values, indices, case.W_dec, case.b_dec, impl="triton")
        assert recon[1].isnan().all() and not recon[[0, 2]].isnan().any()


@pytest.mark.fault(17)
def test_rows_beyond_32_bit_addresses():
    """Of more memory than is ever touched: what nobody wrote is 0."""
    d = 4096
    N = (1 << 31) // d + 100
    lazy = mmap.mmap(-1, 2 * N * d, flags=mmap.MAP_PRIVATE)
    W = torch.frombuffer(lazy, dtype=torch.bfloat16).view(N, d)
    row = torch.arange(d) % 251
    W[-1], W[-2] = row, float("nan")
    W, row = W.to(DEVICE), row.to(DEVICE)
    values, features = torch.ones(1, 2, device=DEVICE), torch.tensor([N - 1, 3], device=DEVICE)
    recon = ops.decode(values, features[None], W, W[0], impl="triton")
    assert torch.equal(recon, row[None].bfloat16())
    # Tokens that need no counting, since no latent is positive; many, so that none of it is done.
    x, b_enc = -torch.ones(70, d, dtype=W.dtype, device=DEVICE), torch.zeros(N, device=DEVICE)
    features = torch.tensor([N - 1, N - 2, 3], device=DEVICE)
    acts = ops.feature_acts(x, W, b_enc, features, 1, impl="triton")
    assert torch.equal(
        acts.isnan(), torch.tensor([[False, True, False]], device=DEVICE).expand(70, 3)
    )


@pytest.mark.parametrize("shared", [True, False])
def test_add_directions(shared):
    case = here(random_case(20, 33, 65, 8, 3))
    coef = torch.randn(3, device=DEVICE) if shared else torch.randn(20, 3, device=DEVICE)
    y = ops.add_directions(case.x, case.directions, coef, impl="triton")
    truth = case.x.double() + coef.double().expand(20, 3) @ case.directions.double()
    torch.testing.assert_close(y.double(), truth, atol=1e-5, rtol=1e-5)
    unchanged = ops.add_directions(case.x, case.directions, 0 * coef, impl="triton")
    assert same_bits(unchanged, case.x)


# ---- as a torch op ----


def test_gradients_are_the_references():
    case = here(random_case(6, 33, 65, 8, 3))
    grads = {}
    for impl in ("triton", "reference"):
        x, values = case.x.clone().requires_grad_(), case.values.clone().requires_grad_()
        y = ops.steer(x, *case.edit[1:5], values, case.k, impl=impl)
        grads[impl] = torch.autograd.grad(y.square().sum(), (x, values))
    torch.testing.assert_close(grads["triton"], grads["reference"], atol=1e-4, rtol=1e-4)
    assert (grads["triton"][0] != 0).any()


def test_backward_too_is_tritons():
    class Called(TorchDispatchMode):
        ops = ()

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.ops += (op.namespace,)
            return op(*args, **(kwargs or {}))

    case = here(random_case(6, 33, 65, 8, 3))
    y = ops.steer(case.x.requires_grad_(), *case.edit[1:], impl="triton")
    with Called() as called:
        y.sum().backward()
    assert "saesteer_triton" in called.ops and "saesteer" not in called.ops


def test_opcheck():
    case = here(random_case(5, 33, 65, 8, 3, masked=True))
    torch.library.opcheck(torch.ops.saesteer_triton.steer, (*case.edit, case.mask))
    torch.library.opcheck(torch.ops.saesteer_triton.encode, (*case.encoder, case.k))


BAD = {
    "x is float64": {"x": torch.zeros(5, 6).double()},
    r"W_enc has shape \[9, 7\]; accepted: \[N, 6\]": {"W_enc": torch.zeros(9, 7)},
    "W_enc is not contiguous": {"W_enc": torch.zeros(6, 9).T},
    "b_enc is bfloat16; accepted: float32": {"b_enc": torch.zeros(9).bfloat16()},
    r"features is int32; accepted: int64": {"features": torch.zeros(2, dtype=torch.int32)},
    r"directions has shape \[3, 6\]": {"directions": torch.zeros(3, 6), "values": torch.zeros(3)},
    r"values has shape \[3\]; accepted: \[F\]": {"values": torch.zeros(3)},
    "k is 10; accepted: 1 to 9": {"k": 10},
    "k is 0; accepted: 1 to 9": {"k": 0},
    r"mask has shape \[4\]": {"mask": torch.zeros(4, dtype=torch.bool)},
    "mask is float32; accepted: bool": {"mask": torch.zeros(5)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    case = here(random_case(5, 6, 9, 3, 2, masked=True))
    names = ("x", "W_enc", "b_enc", "directions", "features", "values", "k")
    good = dict(zip(names, case.edit, strict=True), mask=case.mask)
    bad = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in BAD[message].items()}
    with pytest.raises(RuntimeError, match=f"^saesteer::steer: {message}"):
        ops.steer(**good | bad, impl="triton")


# ---- launches ----


def test_tensors_anywhere_in_memory():
    """Between launches for others, each is given to kernels compiled for where it starts."""
    case = integer_case(20, 32, 64, 16, 16, per_token=True)
    case = here(case.but(mask=torch.arange(20) % 3 > 0))
    kinds = [case]
    for name in ("x", "W_enc", "b_enc", "features", "values", "mask"):
        kinds.append(case.but(**{name: off_by_one(getattr(case, name))}))
    for each in kinds + kinds:
        assert same_bits(each.steer("triton") + 0.0, case.truth().float() + 0.0)


def test_numbers_of_tokens_share_a_compilation():
    case = here(random_case(9, 33, 65, 8, 3))
    case.steer("triton")
    kernels = launch.PROJECT, launch.COUNT, launch.ADD
    before = [dict(kernel.found) for kernel in kernels]
    for T in (1, 2, 8):
        case.rows(slice(0, T)).but(k=T).steer("triton")
    assert [kernel.found for kernel in kernels] == before


# ---- tiles ----


def test_tuned_tiles_are_stored_and_used(monkeypatch, tmp_path):
    monkeypatch.setenv("SAESTEER_TILES", str(tmp_path / "deep" / "tiles.json"))
    monkeypatch.setattr(tune, "SHAPES", ((16, 16), (16, 64)))
    monkeypatch.setattr(tune, "MANY", 20)
    monkeypatch.setattr(
        tune.itertools, "product", lambda shapes, *_: [(s, 32, 4, 2, 1) for s in shapes]
    )
    tried = []

    def later_is_faster(run) -> float:
        run()
        tried.append(run)
        return -len(tried)

    monkeypatch.setattr(tune, "milliseconds", later_is_faster)
    meets = torch.float32
    table = configs.tiles(DEVICE, meets)
    configs.tiles.cache_clear()
    try:
        found = tune.tune(48, 65, torch.float32, DEVICE)
        assert found != table and configs.tiles(DEVICE, meets) == found
        assert {(t.BLOCK_M, t.BLOCK_N) for t in found.count + found.topk} == {(16, 64)}
        assert [t.most for t in found.count] == [t.most for t in table.count]
        assert_right(here(random_case(18, 48, 129, 24, 2)))
        cache.tiles().write_text("{")
        with pytest.raises(ValueError, match=r"tiles.json holds no tiles"):
            configs.stored()
    finally:
        configs.tiles.cache_clear()
