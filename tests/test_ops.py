"""What the ops compute, against the fp64 truth: values, decisions, ties, bad numbers, layouts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import (
    DTYPES,
    Case,
    assert_steered,
    bits,
    calls_of_numbers_apart,
    encode_slack,
    gamma,
    integer_case,
    permutation,
    preact_bound,
    random_case,
    rounded,
    same_bits,
    threads,
)
from ptx.memory import at_the_end

from bench import baselines
from saesteer_fast import _build, ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PAIRS = [pytest.param(x, w, id=f"{x}-{w}".replace("torch.", "")) for x in DTYPES for w in DTYPES]
EVERY_PAIR = pytest.mark.parametrize(("dtype", "weights"), PAIRS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))


def shape_id(shape: tuple) -> str:
    return "T{}-d{}-N{}-k{}-F{}".format(*shape)


# T, d, N, k, F
FEW_SHAPES = [(7, 31, 64, 64, 5), (5, 130, 65, 8, 2), (40, 67, 129, 16, 9)]
SHAPES = [
    (0, 33, 65, 4, 2),
    (1, 1, 1, 1, 1),
    (1, 3072, 129, 8, 1),
    (5, 3, 63, 1, 2),
    (7, 3072, 200, 32, 2),
    (63, 33, 65, 65, 17),
    (63, 67, 129, 16, 65),
    (300, 67, 1000, 16, 2),
    (1000, 1, 129, 3, 1),
    (5, 67, 1, 1, 0),
]
CORE = "core"
"""In the names of the tests that every instruction set runs."""


def assert_decided(case: Case, live: torch.Tensor) -> float:
    """live is what fp64 says wherever fp32 sums can tell; the share of pairs where they cannot."""
    undecided = case.undecided()
    exact = reference.feature_acts(*case.encoder, case.features, case.k, dtype=torch.float64) > 0
    assert torch.equal(live[~undecided], exact[~undecided])
    return undecided.double().mean().item() if undecided.numel() else 0.0


def assert_right(case: Case) -> float:
    """Both ops on one case; the undecided share."""
    acts, y = case.acts(), case.steer()
    live = acts > 0
    p = reference.preacts(case.x, case.W_enc[case.features], case.b_enc[case.features])
    bound = preact_bound(case.x, case.W_enc[case.features], case.b_enc[case.features])
    assert acts.dtype == torch.float32 and acts.shape == p.shape
    assert ((acts.double() - p).abs() <= bound)[live].all() and (acts[~live] == 0).all()
    assert_steered(case, y, live)
    return assert_decided(case, live)


@pytest.mark.fault(10, 18)
@EVERY_PAIR
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_core_steer_and_feature_acts_are_the_truth(shape, dtype, weights, record_property):
    share = assert_right(random_case(*shape, dtype, weights))
    record_property("undecided", share)


@EVERY_PAIR
@pytest.mark.parametrize("F", [1, 4, 17])
def test_core_in_place_is_bit_for_bit_the_same(dtype, weights, F):
    case = random_case(63, 67, 129, 16, F, dtype, weights, masked=True)
    x = case.x.clone()
    case.but(x=x).steer_()
    assert same_bits(x, case.steer())


@pytest.mark.fault(18, 24)
@EVERY_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_odd_shapes(shape, dtype, record_property):
    case = random_case(*shape, dtype, torch.bfloat16, per_token=True)
    record_property("undecided", assert_right(case))
    assert_encoded(case)


@pytest.mark.fault(18)
@pytest.mark.parametrize("T", [1, 16, 17, 49, 300])
@pytest.mark.parametrize(("d", "N"), [(31, 97), (512, 161), (1100, 200), (1088, 128)])
def test_bf16_by_tiles_of_any_size(T, d, N):
    """Of tokens, latents and columns; several passes, and more features than a block."""
    case = random_case(T, d, N, 16, 70, torch.bfloat16, torch.bfloat16)
    assert_right(case)
    assert_encoded(case)
    order = permutation(N)
    assert same_bits(case.stored(order).acts(), case.acts())


@EVERY_DTYPE
def test_undecided_share_of_random_data_is_small(dtype, record_property):
    case = random_case(1000, 1024, 512, 32, 16, dtype, dtype)
    share = assert_right(case)
    record_property("undecided", share)
    print(f"undecided {share:.4%}")
    live = (case.acts() > 0).double().mean().item()
    assert share < 0.005 < live


@pytest.mark.fault(5, 6)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (2, 0), (0,)], ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_any_leading_sizes(lead, per_token):
    case = random_case(lead, per_token=per_token, masked=True)
    y, (values, indices) = case.steer(), case.encode()
    assert y.shape == case.x.shape and y.is_contiguous()
    assert case.acts().shape == (*lead, 2)
    assert values.shape == indices.shape == (*lead, case.k)
    flat = case.but(
        x=case.x.reshape(-1, 33),
        mask=case.mask.reshape(-1),
        values=case.values.reshape(-1, 2) if per_token else case.values,
    )
    assert same_bits(y.reshape(-1, 33), flat.steer())
    assert_right(case)


def test_values_shared_are_values_a_token():
    shared = random_case()
    assert same_bits(shared.steer(), shared.but(values=shared.values.expand(63, 2)).steer())


def integer_cases(dtype, weights):
    yield integer_case(dtype=dtype, weights=weights)
    large = integer_case(63, 3, 200, 5, 17, dtype, weights, per_token=True)
    yield large.but(values=777 * large.values)
    yield integer_case(7, 67, 65, 65, 2, dtype, weights, seed=1)
    yield integer_case(5, 33, 129, 1, 65, dtype, weights, seed=2)


@pytest.mark.fault(25, 26)
@EVERY_PAIR
def test_core_integers_are_exact(dtype, weights):
    for case in integer_cases(dtype, weights):
        exact = reference.feature_acts(*case.encoder, case.features, case.k, dtype=torch.float64)
        for impl in ("cpu", "reference"):
            assert torch.equal(case.acts(impl).double(), exact)
            assert same_bits(case.steer(impl) + 0.0, case.truth().to(dtype) + 0.0)
            values, indices = reference.encode(*case.encoder, case.k, dtype=torch.float64)
            ours = case.encode(impl)
            assert torch.equal(ours[0].double(), values) and torch.equal(ours[1], indices)
            recon = reference.decode(values, indices, case.W_dec, case.b_dec)
            assert torch.equal(ops.decode(*ours, case.W_dec, case.b_dec, impl=impl), recon)


@pytest.mark.parametrize("path", [baselines.naive, baselines.lean, baselines.smart])
def test_integers_are_exact_on_the_textbook_paths(path):
    """Where torch.topk meets no tie: its order of ties is nobody's promise."""
    case = integer_case(400, 13, 200, 5, 3)
    p = reference.preacts(case.x, case.W_enc, case.b_enc).sort(descending=True).values
    case = case.rows(p[:, case.k - 1] > p[:, case.k])
    assert len(case.x) > 50
    decoder = (case.directions,) if path is baselines.smart else (case.W_dec, case.b_dec)
    y = path(*case.encoder, *decoder, case.features, case.values, case.k)
    assert torch.equal(case.steer(), y)
    assert torch.equal(case.truth(), y.double())


@pytest.mark.fault(25)
@EVERY_PAIR
def test_core_ties_go_to_the_lower_latent(dtype, weights):
    """All latents alike: exactly the k first are live, wherever the features lie."""
    N, k = 200, 70
    case = random_case(9, 67, N, k, 0, dtype, weights)
    one = case.but(W_enc=case.W_enc[:1].expand(N, -1).contiguous(), b_enc=case.b_enc[:1].expand(N))
    one = one.but(b_enc=one.b_enc.contiguous(), features=torch.arange(N).flip(0))
    acts = one.acts().flip(-1)
    positive = reference.preacts(one.x, one.W_enc[:1], one.b_enc[:1])[:, 0] > 0
    assert 0 < positive.sum() < len(positive)
    assert (acts[positive, :k] > 0).all() and (acts[positive, k:] == 0).all()
    assert (acts[~positive] == 0).all()
    assert (acts[:, :k] == acts[:, :1]).all()
    values, indices = one.encode()
    assert torch.equal(indices, torch.arange(k).expand(9, k))
    assert ((values - acts[:, :k]).abs() <= encode_slack(one)[:, :k]).all()


@pytest.mark.fault(25)
@EVERY_PAIR
def test_core_duplicate_rows_tie_wherever_they_lie(dtype, weights):
    """A latent repeated far away is beaten by its earlier copies alone, whatever its sum is."""
    case = random_case(200, 130, 333, 1, 0, dtype, weights)
    largest = reference.preacts(*case.encoder).argmax(-1).mode().values.item()
    copies = torch.tensor([0, 65, 130, 199, 332])
    W_enc, b_enc = case.W_enc.clone(), case.b_enc.clone()
    W_enc[copies], b_enc[copies] = case.W_enc[largest], case.b_enc[largest]
    W_enc[largest] = 0
    case = case.but(W_enc=W_enc, b_enc=b_enc, features=copies.flip(0))
    on_top = case.acts()[:, -1] > 0
    assert on_top.any()
    for k in range(1, 7):
        acts = case.but(k=k).acts().flip(-1)
        live = acts > 0
        assert torch.equal(live[on_top], (torch.arange(5) < k).expand(int(on_top.sum()), 5))
        assert (live[:, 1:] <= live[:, :-1]).all()
        assert same_bits(acts, torch.where(live, acts[:, :1], 0))


def in_other_orders(case: Case) -> list[Case]:
    N = len(case.W_enc)
    orders = [permutation(N), permutation(N, seed=1), torch.arange(N).flip(0), torch.arange(N)]
    return [case.stored(order) for order in orders]


@EVERY_PAIR
def test_core_rows_in_another_order_change_no_bit(dtype, weights):
    """Ties go to the lower latent, wherever its row is; without `order` they would not."""
    broken = integer_case(dtype=dtype, weights=weights, seed=3)
    broken.W_enc[::50] = torch.nan
    unsaid = 0
    for case in (*integer_cases(dtype, weights), broken):
        acts, y = case.acts(), case.steer()
        for stored in in_other_orders(case):
            for impl in ("cpu", "reference"):
                assert torch.equal(stored.acts(impl), acts)
                assert same_bits(stored.steer(impl) + 0.0, y + 0.0)
            unsaid += not torch.equal(stored.but(order=None).acts(), acts)
    assert unsaid > 5
    case = random_case(200, 67, 333, 8, 17, dtype, weights, per_token=True, masked=True)
    for stored in in_other_orders(case):
        assert same_bits(stored.acts(), case.acts()) and same_bits(stored.steer(), case.steer())


@EVERY_PAIR
def test_core_equal_latents_are_live_by_number_not_by_row(dtype, weights):
    N, k = 200, 70
    case = random_case(9, 67, N, k, 0, dtype, weights)
    one = case.W_enc[:1].expand(N, -1).contiguous()
    case = case.but(W_enc=one, b_enc=torch.ones(N), features=torch.arange(N))
    for stored in in_other_orders(case):
        acts = stored.acts()
        positive = (acts > 0).any(-1)
        assert positive.any()
        assert ((acts > 0) == ((torch.arange(N) < k) & positive[:, None])).all()


@pytest.mark.fault(26)
def test_a_preactivation_of_zero_is_not_live():
    case = integer_case()
    case = case.but(W_enc=torch.zeros_like(case.W_enc), b_enc=torch.zeros_like(case.b_enc), k=130)
    assert same_bits(case.acts(), torch.zeros(40, 5))
    assert torch.equal(case.steer().double(), case.truth())


@pytest.mark.fault(27)
@EVERY_DTYPE
def test_three_reasons_to_be_dead_or_live(dtype):
    """In the top k, positive but outside, and not positive."""
    x = torch.tensor([[1.0, 0.0]]).to(dtype)
    W_enc = torch.tensor([[3.0, 0], [2, 0], [1, 0], [0, 5], [-1, 0]]).to(dtype)
    case = Case(
        x=x,
        W_enc=W_enc,
        b_enc=torch.zeros(5),
        W_dec=torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8], [9, 10]]).to(dtype),
        b_dec=torch.zeros(2),
        features=torch.tensor([1, 2, 3, 4]),
        values=torch.tensor([5.0, 1.0, 1.0, 1.0]),
        k=2,
    )
    assert case.acts().tolist() == [[2, 0, 0, 0]]
    # 3 of latent 1 and one each of the dead ones
    assert case.steer().tolist() == [[1 + 9 + 21, 0 + 12 + 24]]


@EVERY_DTYPE
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("alike", [False, True], ids=["fp32 weights", "weights alike"])
def test_core_rounds_to_nearest_even(dtype, tokens, alike):
    """Any fp32 sum at all, and those half way between two numbers, in one row and its remainder."""
    random = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (4096,), generator=random).int()
    half = (anything & ~0x1FFF) | 0x1000, (anything & ~0xFFFF) | 0x8000
    subnormal_half = (torch.arange(-200, 201) + 0.5) * 2.0**-24
    nan = torch.tensor([-1, 0x7FFFFFFF, 0x7F800001], dtype=torch.int32)
    terms = torch.cat([t.view(torch.float32) for t in (anything, nan, *half)] + [subnormal_half])
    terms = torch.cat([terms, torch.tensor([65519.996, 65520.0, 3.3895314e38, 3.4e38, torch.inf])])
    d = len(terms)
    dead = torch.zeros(1, d, dtype=dtype if alike else torch.float32), torch.full((1,), -1.0)
    x = torch.zeros(tokens, d, dtype=dtype)
    one = torch.ones(1)
    y = ops.steer(x, *dead, terms[None], torch.zeros(1).long(), one, 1)
    expected = (x + terms).to(dtype)
    number = ~expected.isnan()
    assert torch.equal(y.isnan(), ~number)
    assert same_bits(y[number], expected[number])
    assert torch.equal(bits(ops.add_directions(x, terms[None], one)), bits(y))


@EVERY_DTYPE
@pytest.mark.parametrize("least", [2.0**-126, 2.0**-101, 2.0**-20])
def test_core_adds_to_any_number(dtype, least):
    """Terms from `least` on, to x of any finite bits, to their own opposite and next to it."""
    random = torch.Generator().manual_seed(0)
    d, tokens = 2000, 12
    size = least * 2 ** (60 * torch.rand(d, generator=random))
    terms = size * (torch.randint(2, (d,), generator=random) * 2 - 1)
    terms[::3] = terms[::3].to(dtype).float()
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(integers)
    x = torch.randint(info.min, info.max + 1, (tokens, d), generator=random).to(integers)
    x[:2] = x[:2] & ~bits(torch.tensor(-torch.inf, dtype=dtype))  # subnormal
    x[2] = bits(-terms.to(dtype))
    x[3:5] = x[2] + torch.tensor([[-1], [1]], dtype=integers)
    x = x.view(dtype).where(x.view(dtype).isfinite(), 1)
    dead = torch.zeros(1, d, dtype=dtype), torch.full((1,), -1.0)
    y = ops.steer(x, *dead, terms[None], torch.zeros(1).long(), torch.ones(1), 1)
    assert same_bits(y, (x + terms).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_errs_no_more_than_the_naive_path(dtype):
    case = random_case(500, 96, 768, 16, 3, dtype, dtype)
    truth = case.truth()
    ours = (case.steer().double() - truth).abs()
    low = case.to(dtype)
    y = baselines.naive(*low.encoder, low.W_dec, low.b_dec, low.features, low.values, low.k)
    naive = (y.double() - truth).abs()
    quantiles = torch.tensor([0.5, 0.9, 0.99], dtype=torch.double)
    assert (ours.flatten().quantile(quantiles) <= naive.flatten().quantile(quantiles)).all()
    assert ours.max() <= naive.max() and ours.mean() < 0.75 * naive.mean()


@pytest.mark.fault(12)
@EVERY_PAIR
def test_core_massive_activations(dtype, weights):
    case = random_case(63, 130, 300, 8, 3, dtype, weights)
    x = case.x.clone()
    x[:, 7], x[:, 99] = 1e4, -3e3
    assert_right(case.but(x=x))


@EVERY_PAIR
def test_core_tiny_preactivations(dtype, weights):
    """What is barely above 0 is ranked like the rest."""
    case = random_case(63, 130, 300, 8, 3, dtype, weights)
    small = {"x": case.x * 2.0**-6, "W_enc": case.W_enc * 2.0**-12, "b_enc": case.b_enc * 2.0**-18}
    assert_right(case.but(**small))


@pytest.mark.fault(13)
@EVERY_PAIR
def test_core_subnormals(dtype, weights):
    """Neither flushed where nothing changes, nor lost where something does."""
    case = random_case(20, 33, 129, 8, 2, dtype, weights)
    tiny = torch.finfo(dtype).smallest_normal
    x = (case.x.double() * tiny / 4).to(dtype)
    x[:, ::5] = -0.0
    W_dec = (case.W_dec.double() * torch.finfo(weights).smallest_normal / 4).to(weights)
    case = case.but(x=x, W_dec=W_dec)
    assert_right(case)
    assert same_bits(case.but(features=case.features[:0], values=case.values[:0]).steer(), x)
    dead = case.but(b_enc=torch.full_like(case.b_enc, -1.0), values=torch.zeros(2))
    assert same_bits(dead.steer(), x)


@pytest.mark.fault(13)
def test_subnormal_products_may_flush_but_no_further():
    case = random_case(20, 33, 129, 8, 2, torch.bfloat16, torch.bfloat16)
    small = {"x": case.x * 2.0**-70, "W_enc": case.W_enc * 2.0**-62, "b_enc": 0 * case.b_enc}
    assert_right(case.but(**small))


@pytest.mark.fault(11)
def test_a_result_beyond_fp16_is_infinite():
    case = random_case(63, 33, 129, 8, 1, torch.float16, torch.float16)
    case = case.but(values=torch.tensor([3e5]))
    y, truth = case.steer(), case.truth()
    beyond = truth.abs() > 65520 * (1 + 2**-12)
    within = truth.abs() < 65520 * (1 - 2**-12)
    assert beyond.any() and within.any()
    assert torch.equal(y[beyond].float(), torch.inf * truth[beyond].sign().float())
    assert y[within].isfinite().all()


@pytest.mark.fault(11)
def test_preactivations_beyond_fp16_are_measured():
    case = random_case(63, 130, 129, 8, 2, torch.float16, torch.float16)
    case = case.but(x=case.x * 1000, W_enc=case.W_enc * 100, W_dec=case.W_dec / 1024)
    assert case.acts().max() > 1e5
    assert_right(case)


@pytest.mark.fault(22)
@EVERY_PAIR
def test_core_no_features_is_a_copy(dtype, weights):
    case = random_case(7, 67, dtype=dtype, weights=weights, F=0)
    x = case.x.clone()
    x[0, 0] = -0.0
    x[1, 1], x[2, 2], x[3, 3] = torch.nan, torch.inf, torch.finfo(dtype).smallest_normal / 4
    case = case.but(x=x)
    y = case.steer()
    assert same_bits(y, x) and y.data_ptr() != x.data_ptr()
    assert case.acts().shape == (7, 0)


@pytest.mark.fault(28)
@EVERY_PAIR
def test_core_clamping_to_its_own_value_changes_no_bit(dtype, weights):
    case = random_case(200, 67, 129, 16, 17, dtype, weights)
    x = case.x.clone()
    x[:, 3] = -0.0
    case = case.but(x=x)
    acts = case.acts()
    assert (acts > 0).any()
    assert same_bits(case.but(values=acts).steer(), x)


@pytest.mark.fault(13)
def test_zero_at_a_dead_latent_keeps_minus_zero():
    case = random_case(9, F=1)
    case = case.but(x=torch.full_like(case.x, -0.0), b_enc=-torch.ones(129), values=torch.zeros(1))
    assert same_bits(case.steer(), case.x)


def test_rows_of_no_width_are_ranked_by_their_biases():
    x, W, b = torch.zeros(3, 0), torch.zeros(8, 0), torch.arange(1.0, 9.0)
    features = torch.tensor([1, 7])
    acts = ops.feature_acts(x, W, b, features, 2)
    assert torch.equal(acts, torch.tensor([0.0, 8.0]).expand(3, 2))
    assert ops.steer(x, W, b, torch.zeros(2, 0), features, torch.ones(2), 2).shape == (3, 0)


@pytest.mark.parametrize("T", [1, 2, 7])
def test_core_an_edit_that_underflows_keeps_minus_zero_in_any_batch(T):
    x, W, b = torch.full((T, 4), -0.0), torch.ones(1, 4), torch.tensor([-1.0])
    y = ops.steer(x, W, b, torch.full((1, 4), -1e-3), torch.tensor([0]), torch.tensor([1e-43]), 1)
    assert y.signbit().all()


@EVERY_DTYPE
@pytest.mark.parametrize("T", [1, 2, 7])
def test_core_adding_minus_zero_keeps_minus_zero(T, dtype):
    x, W, b = torch.full((T, 133), -0.0, dtype=dtype), torch.ones(1, 133), torch.tensor([-1.0])
    y = ops.steer(x, W, b, torch.zeros(1, 133), torch.tensor([0]), torch.tensor([-1.0]), 1)
    assert same_bits(y, x)


def test_more_open_tokens_than_pass_over_W_together():
    """Of such wide ones 64 do; nearly all of these tokens have a latent above zero."""
    case = integer_case(T=300, d=20_001, N=130, k=40, F=5)
    live = case.acts() > 0
    assert (reference.preacts(*case.encoder)[:, case.features] > 0).any(-1).sum() > 3 * 64
    assert torch.equal(
        case.acts().double(),
        reference.feature_acts(*case.encoder, case.features, case.k, dtype=torch.float64),
    )
    assert 0.1 < live.double().mean() < 0.9
    assert torch.equal(case.steer().double(), case.truth())


@EVERY_DTYPE
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_core_mask(dtype, share):
    case = random_case(200, dtype=dtype, F=3, per_token=True)
    on = torch.rand(200, generator=torch.Generator().manual_seed(1)) < share
    x = case.x.clone()
    x[~on, 0] = torch.nan
    x[~on, 1] = -0.0
    case = case.but(x=x)
    y = case.but(mask=on).steer()
    assert same_bits(y[~on], x[~on])
    assert same_bits(y[on], case.rows(on).steer())
    assert not on.any() or not same_bits(y[on], x[on])


BAD = {
    "nan": torch.nan,
    "inf": torch.inf,
    "-inf": -torch.inf,
    "-nan": torch.tensor(-1, dtype=torch.int32).view(torch.float32).item(),
    "payload": torch.tensor(0x7F900001, dtype=torch.int32).view(torch.float32),
}


@pytest.mark.fault(1, 2, 4)
@EVERY_PAIR
@pytest.mark.parametrize("kind", BAD)
def test_core_a_bad_row_spoils_no_other(dtype, weights, kind):
    good = random_case(20, 67, 129, 8, 3, dtype, weights)
    x = good.x.clone()
    x[5, 66], x[19, 0] = BAD[kind], BAD[kind]
    bad = good.but(x=x)
    rows = torch.zeros(20, dtype=torch.bool)
    rows[[5, 19]] = True
    y, acts, (values, indices) = bad.steer(), bad.acts(), bad.encode()
    assert y[rows].isnan().all() and acts[rows].isnan().all()
    assert same_bits(y[~rows], good.steer()[~rows])
    assert same_bits(acts[~rows], good.acts()[~rows])
    for ours, clean in zip((values, indices), good.encode(), strict=True):
        assert torch.equal(ours[~rows], clean[~rows])
    expected, places = bad.encode("reference")
    assert torch.equal(values[rows].isnan(), expected[rows].isnan())
    assert torch.equal(indices[rows], places[rows])

    low = bad.to(dtype)
    naive = baselines.naive(*low.encoder, low.W_dec, low.b_dec, low.features, low.values, low.k)
    assert torch.equal(naive.isnan(), y.isnan())


@pytest.mark.fault(3)
@EVERY_DTYPE
def test_core_every_row_bad(dtype):
    case = random_case(63, 33, 200, 8, 2, dtype, dtype)
    case = case.but(x=torch.full_like(case.x, torch.nan))
    values, indices = case.encode()
    assert case.steer().isnan().all() and case.acts().isnan().all() and values.isnan().all()
    assert torch.equal(indices, torch.arange(8).expand(63, 8))


def test_nan_latents_count_as_the_largest():
    """As in torch.topk: a latent whose preactivation is NaN takes a place."""
    case = integer_case(k=4)
    order = reference.preacts(case.x, case.W_enc, case.b_enc).sort(descending=True, stable=True)
    fourth = order.indices[:, 3]
    broken = case.W_enc.clone()
    broken[129] = torch.nan
    token = (fourth != 129) & (order.values[:, 3] > 0) & (order.indices[:, :3] != 129).all(-1)
    assert token.any()
    for t in token.nonzero()[:, 0].tolist():
        row = case.rows(slice(t, t + 1)).but(features=fourth[t : t + 1])
        assert row.acts() > 0 and row.but(W_enc=broken).acts() == 0
    assert (case.but(W_enc=broken).encode()[1][:, 0] == 129).all()


@EVERY_PAIR
def test_core_a_latent_that_is_nan_beside_one_that_is_live(dtype, weights):
    case = random_case(20, 67, 129, 8, 2, dtype, weights)
    case.b_enc[case.features] = torch.tensor([torch.nan, 99.0])
    acts, y = case.acts(), case.steer()
    assert acts[:, 0].isnan().all() and (acts[:, 1] > 0).all() and y.isnan().all()


@pytest.mark.fault(23)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_value_spoils_its_token_alone(value):
    case = random_case(9, per_token=True)
    values = case.values.clone()
    values[4, 1] = value
    y = case.but(values=values).steer()
    others = torch.arange(9) != 4
    assert same_bits(y[others], case.steer()[others])
    assert not y[4].isfinite().any()


def layouts(x: torch.Tensor):
    """Views that hold the same numbers as the matrix x."""
    T, d = x.shape
    wide = x.new_full((2 * T, 3 * d), torch.nan)
    wide[1::2, d : 2 * d] = x
    yield "narrowed", wide[1::2, d : 2 * d]
    columns = x.new_full((T, 2 * d), torch.nan)
    columns[:, 1::2] = x
    yield "every other column", columns[:, 1::2]
    yield "transposed", x.T.contiguous().T
    storage = torch.cat([x.new_full((5,), torch.nan), x.flatten()])
    yield "offset", storage[5:].view(T, d)
    yield "unaligned", torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(T, d)


@pytest.mark.fault(7)
@EVERY_DTYPE
def test_core_any_strides(dtype):
    case = random_case(7, 67, 130, 8, 3, dtype, dtype, per_token=True)
    y, acts, (values, indices) = case.steer(), case.acts(), case.encode()
    for name, x in layouts(case.x):
        view = case.but(x=x)
        assert torch.equal(x, case.x), name
        assert same_bits(view.steer(), y), name
        assert same_bits(view.acts(), acts), name
        assert same_bits(view.encode()[0], values) and torch.equal(view.encode()[1], indices), name
    for strided in ("values", "W_dec"):
        for name, t in layouts(getattr(case, strided)):
            assert same_bits(case.but(**{strided: t}).steer(), y), name
    for name, W_enc in layouts(case.W_enc):
        if W_enc.is_contiguous():
            assert same_bits(case.but(W_enc=W_enc).steer(), y), name


@pytest.mark.fault(7)
def test_stride_zero_and_every_other_entry():
    case = random_case(1, per_token=True)
    row = case.x.expand(63, -1)
    many = case.but(x=row, values=case.values.expand(63, -1), mask=torch.ones(1).bool().expand(63))
    assert same_bits(many.steer(), case.steer().expand(63, -1).contiguous())
    mask = torch.tensor([True, False])[::2]
    assert same_bits(case.but(mask=mask).steer(), case.steer())
    one = random_case(5, 1)
    assert same_bits(one.but(x=one.x.expand(5, 1).contiguous()).steer(), one.steer())


@pytest.mark.fault(7)
def test_numbers_that_lie_apart():
    case = random_case(7, 67, 130, 130, 3, per_token=True, masked=True)
    for name, found, expected in calls_of_numbers_apart(case):
        assert same_bits(found, expected), name


@EVERY_PAIR
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_core_nothing_behind_an_argument_is_read(shape, dtype, weights):
    T, d, N, k, F = shape
    case = random_case(T, d, N, k, F, dtype, weights, per_token=True, masked=True)
    for each in (case, case.stored(permutation(N))):
        given = {field.name: getattr(each, field.name) for field in fields(each)}
        tensors = {name: t for name, t in given.items() if isinstance(t, torch.Tensor)}
        held = each.but(**{name: at_the_end(t) for name, t in tensors.items()})
        assert same_bits(held.acts(), each.acts())
        assert same_bits(held.steer(), each.steer())
        assert same_bits(held.encode()[0], each.encode()[0])
    values, indices = map(at_the_end, held.encode())
    directions = at_the_end(held.directions)
    ops.decode(values, indices, held.W_dec, held.b_dec)
    ops.add_directions(held.x, directions, held.values)
    ops.project(held.x, at_the_end(held.W_enc[:3]), at_the_end(held.b_enc[:3]))


@pytest.mark.fault(7)
def test_a_negated_view():
    case = random_case(7)
    x = torch.complex(torch.zeros_like(case.x), -case.x).conj().imag
    assert x.is_neg() and torch.equal(x, case.x)
    assert same_bits(case.but(x=x).steer(), case.steer())


@pytest.mark.fault(16)
def test_inputs_may_share_memory_and_are_not_written():
    case = random_case(33, 33, 33, 4, 3, per_token=True, masked=True)
    case = case.but(x=case.W_enc, W_dec=case.W_enc)
    inputs = [case.x, case.b_enc, case.b_dec, case.features, case.values, case.mask]
    before = [t.clone() for t in inputs]
    y, acts, (values, indices) = case.steer(), case.acts(), case.encode()
    recon = ops.decode(values, indices, case.W_dec, case.b_dec)
    kept = (values.clone(), indices.clone())
    assert all(torch.equal(t, copy) for t, copy in zip(inputs, before, strict=True))
    assert all(t._version == 0 for t in inputs)
    outputs = [y, acts, values, indices, recon]
    storages = {t.untyped_storage().data_ptr() for t in (*outputs, *inputs)}
    assert len(storages) == len(outputs) + len(inputs)
    assert torch.equal(kept[0], values) and torch.equal(kept[1], indices)
    assert_right(case)


@pytest.mark.fault(31)
@EVERY_DTYPE
@pytest.mark.parametrize("weights", DTYPES[:2], ids=["w32", "wbf16"])
def test_core_batch_and_threads_change_no_bit(dtype, weights):
    case = random_case(70, 67, 1000, 16, 5, dtype, weights, per_token=True, masked=True)

    def everything(case):
        values, indices = case.encode()
        recon = ops.decode(values, indices, case.W_dec, case.b_dec)
        p = ops.project(case.x, case.W_enc, case.b_enc)
        moved = ops.add_directions(case.x, case.directions, case.values)
        return case.steer(), case.acts(), values, indices, recon, p, moved

    whole = everything(case)
    for cuts in ([0, 1, 2, 5, 13, 70], [0, 35, 69, 70]):
        parts = [everything(case.rows(slice(a, b))) for a, b in pairwise(cuts)]
        for all_at_once, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert same_bits(all_at_once, torch.cat(pieces))
    for count in (1, 2, 3, 4):
        with threads(count):
            for alone, together in zip(whole, everything(case), strict=True):
                assert same_bits(alone, together)
    order = permutation(70)
    for straight, shuffled in zip(whole, everything(case.rows(order)), strict=True):
        assert same_bits(straight[order], shuffled)


def test_latents_elsewhere_change_no_bit():
    """Features asked for alone, together, in any order, and at other places."""
    case = random_case(70, 67, 300, 16, 65)
    acts = case.acts()
    alone = torch.cat([case.but(features=f[None]).acts() for f in case.features], -1)
    assert same_bits(acts, alone)
    order = permutation(300)
    moved = case.but(W_enc=case.W_enc[order], b_enc=case.b_enc[order])
    assert same_bits(moved.but(features=order.argsort()[case.features]).acts(), acts)


def test_more_features_than_are_taken_at_once():
    case = random_case(200, 5, 1500, 40, 1025, per_token=True, masked=True)
    acts, y = case.acts(), case.steer()
    few = torch.cat([case.but(features=f).acts() for f in case.features.split(64)], -1)
    assert same_bits(acts, few)
    assert_steered(case, y, acts > 0)
    assert same_bits(y, torch.cat([case.rows(slice(t, t + 50)).steer() for t in range(0, 200, 50)]))


def test_features_in_a_row_but_for_one():
    """Whose rows of W_enc lie one after the other, as a tile may take them."""
    case = random_case(40, 64, 130, 16, 0, torch.bfloat16, torch.bfloat16)
    for place in (0, 15, 31):
        features = torch.arange(40).index_fill(0, torch.tensor([place]), 100)
        alone = [case.but(features=f[None]).acts() for f in features]
        assert same_bits(case.but(features=features).acts(), torch.cat(alone, -1))


def test_more_tokens_than_are_taken_at_once():
    case = random_case(20000, 3, 65, 4, 1, per_token=True, masked=True)
    assert_right(case)
    tail = slice(19900, None)
    assert same_bits(case.steer()[tail], case.rows(tail).steer())


@pytest.mark.fault(17)
def test_more_than_32_bits_count():
    """In x, in W_enc, and in tokens times latents."""
    d, many = 1 << 16, (1 << 15) + 2

    def zeros():
        """As NumPy makes them: what nobody writes takes no memory."""
        return torch.from_numpy(np.zeros((many, d), np.int16)).view(torch.bfloat16)

    few = integer_case(5, d, 3, 1, 3, torch.bfloat16, torch.bfloat16)
    acts = few.acts()
    assert (acts > 0).any() and (acts == 0).any()
    x = zeros()
    x[-5:] = few.x
    assert same_bits(few.but(x=x).acts()[-5:], acts)
    W_enc = zeros()
    W_enc[-3:] = few.W_enc
    b_enc = torch.zeros(many)
    b_enc[-3:] = few.b_enc
    wide = few.but(W_enc=W_enc, b_enc=b_enc, features=few.features + many - 3)
    assert same_bits(wide.acts(), acts)
    narrow = random_case(1 << 16, 1, many, 2, 2)
    assert same_bits(narrow.acts()[-9:], narrow.rows(slice(-9, None)).acts())


def test_more_than_16_bits_count():
    N, k = 70_000, 40_000
    W, b = torch.zeros(N, 1), torch.arange(1.0, N + 1)
    features = torch.tensor([0, N - k - 1, N - k, N - 1])
    acts = ops.feature_acts(torch.ones(2, 1), W, b, features, k)
    assert torch.equal(acts > 0, torch.tensor([False, False, True, True]).expand(2, 4))


@EVERY_PAIR
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 65), (40, 67, 2)], ids=str)
def test_core_project_is_the_truth(shape, dtype, weights):
    T, d, F = shape
    case = random_case(T, d, 129, 129, F, dtype, weights)
    W, bias = case.W_enc[case.features], case.b_enc[case.features]
    p = ops.project(case.x, W, bias)
    assert p.dtype == torch.float32 and p.shape == (T, F)
    error = (p.double() - reference.preacts(case.x, W, bias)).abs()
    assert (error <= preact_bound(case.x, W, bias)).all()
    assert same_bits(p.clamp(min=0) + 0.0, case.acts())


@EVERY_PAIR
@pytest.mark.parametrize("per_token", [False, True])
def test_core_add_directions_is_the_truth(dtype, weights, per_token):
    """It is steering by features that are dead."""
    for lead, d, F in [(7, 33, 5), ((2, 3), 130, 17), ((), 67, 2), (0, 3, 1), (9, 31, 0)]:
        case = random_case(lead, d, 129, 1, F, dtype, weights, per_token=per_token)
        dead = case.but(W_enc=0 * case.W_enc, b_enc=torch.full((129,), -1.0))
        y = ops.add_directions(case.x, case.directions, case.values)
        assert_steered(dead, y, torch.zeros(*case.x.shape[:-1], F, dtype=torch.bool))
        assert same_bits(y, dead.steer())
        assert y.numel() == 0 or y.data_ptr() != case.x.data_ptr()
        nothing = ops.add_directions(case.x, case.directions, -0.0 * case.values)
        assert same_bits(nothing, case.x)


def assert_encoded(case: Case) -> None:
    """The values are those latents' preactivations, in order, and no larger latent is left out."""
    values, indices = case.encode()
    assert values.dtype == torch.float32 and indices.dtype == torch.int64
    assert values.shape == indices.shape == (*case.x.shape[:-1], case.k)
    p = reference.preacts(*case.encoder)
    e = preact_bound(*case.encoder)
    chosen, slack = p.gather(-1, indices), e.gather(-1, indices)
    assert ((values.double() - chosen.relu()).abs() <= slack).all()
    assert (values[..., 1:] <= values[..., :-1]).all()
    tied = (values[..., 1:] == values[..., :-1]) & (values[..., 1:] > 0)
    assert (indices[..., 1:] > indices[..., :-1])[tied].all()
    left_out = torch.ones_like(p, dtype=torch.bool).scatter_(-1, indices, False)
    assert (left_out.sum(-1) == p.shape[-1] - case.k).all()
    if left_out.any():
        largest = torch.where(left_out, p - e, -torch.inf).amax(-1)
        assert (largest <= (chosen + slack).amin(-1)).all()


@pytest.mark.fault(26)
@EVERY_PAIR
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_core_encode_is_the_truth(shape, dtype, weights):
    case = random_case(*shape, dtype, weights)
    assert_encoded(case)
    values, indices = case.encode()
    dense = torch.zeros(*values.shape[:-1], shape[2]).scatter_(-1, indices, values)
    assert ((dense[..., case.features] - case.acts()).abs() <= encode_slack(case)).all()


def test_encode_values_are_those_of_topk():
    case = random_case(63, 130, 1000, 32)
    values, indices = case.encode()
    p = torch.nn.functional.linear(*case.encoder)
    top = p.relu().topk(32)
    bound = preact_bound(*case.encoder).amax(-1, keepdim=True)
    assert ((values - top.values).abs() <= 2 * bound).all()
    assert (indices == top.indices).double().mean() > 0.99


@pytest.mark.parametrize("k", [1000, 3000])
def test_encode_takes_tokens_in_groups(k):
    """More keys than are kept at once."""
    case = random_case(150, 8, 3000, k)
    assert_encoded(case)
    values, indices = case.encode()
    with threads(1):
        alone = case.encode()
    assert same_bits(values, alone[0]) and torch.equal(indices, alone[1])


def stretches(N: int) -> dict[str, torch.Tensor]:
    """Preactivations in orders that are hard on whoever keeps the largest of those seen."""
    up = torch.arange(1.0, N + 1)
    unlike = torch.randn(N, generator=torch.Generator().manual_seed(3))
    bad = unlike.clone()
    bad[100:200], bad[N - 90 :], bad[N // 2] = torch.inf, -torch.inf, torch.nan
    return {
        "up": up,
        "down": up.flip(0),
        "equal": torch.ones(N),
        "negative": -up,
        "few values": up % 3,
        "all in one stretch": torch.where(abs(up - 0.6 * N) < 0.1 * N, up, unlike),
        "any": unlike,
        "not finite": bad,
    }


@pytest.mark.parametrize(
    ("k", "dtype"), zip([1, 63, 192, 2000, 4999, 5000], DTYPES[:2] * 3, strict=True)
)
def test_core_encode_selects_from_any_order(k, dtype):
    """One column and powers of two: every p is exact, so the choice is too."""
    x = 2.0 ** (torch.arange(40)[:, None] % 5 - 2)
    for name, p in stretches(5000).items():
        given = x.to(dtype), p[:, None].to(dtype), torch.zeros(len(p))
        values, indices = reference.encode(*given, k)
        for count in (1, 3):
            with threads(count):
                ours = ops.encode(*given, k)
            assert torch.equal(ours[1], indices), (name, count)
            assert torch.equal(ours[0].nan_to_num(-1), values.nan_to_num(-1)), (name, count)


@pytest.mark.parametrize(("N", "k", "count"), [(256, 3, 2), (640, 100, 2), (1280, 7, 3)])
def test_encode_by_threads_at_once(N, k, count):
    """A block takes so long that every thread has its part of the latents; no p is rounded."""
    x, W_enc = torch.zeros(64, 8192), torch.zeros(N, 8192)
    x[:, :64] = torch.eye(64)
    W_enc[:, :64] = torch.randn(N, 64, generator=torch.Generator().manual_seed(N))
    best = (W_enc[:, :64].T + 9).topk(k)
    for _ in range(10):
        with threads(count):
            values, indices = ops.encode(x, W_enc, torch.full((N,), 9.0), k)
        assert torch.equal(indices, best.indices) and torch.equal(values, best.values)


@EVERY_DTYPE
def test_core_no_columns_leave_the_bias(dtype):
    x, W_enc = torch.zeros(64, 0, dtype=dtype), torch.zeros(130, 0, dtype=dtype)
    b_enc = torch.arange(130.0) - 2
    values, indices = ops.encode(x, W_enc, b_enc, 3)
    assert (values == torch.tensor([127.0, 126.0, 125.0])).all()
    assert (indices == torch.tensor([129, 128, 127])).all()
    acts = ops.feature_acts(x, W_enc, b_enc, torch.tensor([129, 5]), 3)
    assert (acts == torch.tensor([127.0, 0.0])).all()


@EVERY_DTYPE
@pytest.mark.parametrize(
    "shape", [(5, 3, 1), (63, 130, 32), (2, 4133, 45), (7, 33, 0), (0, 33, 4)], ids=str
)
def test_core_decode_is_the_truth(dtype, shape):
    T, d, k = shape
    case = random_case(T, d, 1000, 1, 0, weights=dtype)
    random = torch.Generator().manual_seed(5)
    indices = torch.randint(1000, (T, k), generator=random)
    values = torch.randn(T, k, generator=random)
    for b_dec in (case.b_dec, case.b_dec.float()):
        y = ops.decode(values, indices, case.W_dec, b_dec)
        rows, bias = case.W_dec[indices].double(), b_dec.double()
        truth = (values.double()[..., None] * rows).sum(-2) + bias
        size = (values.double().abs()[..., None] * rows.abs()).sum(-2) + bias.abs()
        given = torch.promote_types(dtype, b_dec.dtype)
        bound = rounded(truth, gamma(k + 1) * size, given)
        assert y.dtype == given and y.shape == (T, d)
        assert ((y.double() - truth).abs() <= bound).all()


def test_decode_strides_sizes_and_bad_values():
    case = random_case((2, 3), k=5)
    values, indices = case.encode()
    y = ops.decode(values, indices, case.W_dec, case.b_dec)
    assert y.shape == case.x.shape
    turned = [t.permute(2, 1, 0).contiguous().permute(2, 1, 0) for t in (values, indices)]
    spread = torch.stack([case.b_dec, case.b_dec], 1)[:, 0]
    assert same_bits(ops.decode(*turned, case.W_dec, spread), y)
    values[1, 1, 1] = torch.nan
    spoilt = ops.decode(values, indices, case.W_dec, case.b_dec)
    assert spoilt[1, 1].isnan().all()
    spoilt[1, 1] = y[1, 1]
    assert same_bits(spoilt, y)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_decode_reads_what_is_live(impl):
    case = random_case(3, 48, 129, 5, 1)
    values, indices = case.encode()
    values[0, 3:], indices[0, 3:] = 0.0, torch.tensor([7, 8])
    values = values.masked_fill((indices == 7) | (indices == 8), 0.0)
    W_dec = case.W_dec.clone()
    W_dec[7], W_dec[8] = torch.nan, torch.inf
    recon, expected = (
        ops.decode(values, indices, weights, case.b_dec, impl=impl)
        for weights in (W_dec, case.W_dec)
    )
    assert same_bits(recon, expected)


@st.composite
def cases(draw) -> Case:
    N = draw(st.integers(1, 150))
    lead = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    case = random_case(
        lead,
        d=draw(st.integers(1, 80)),
        N=N,
        k=draw(st.integers(1, N)),
        F=draw(st.integers(0, min(N, 12))),
        dtype=draw(st.sampled_from(DTYPES)),
        weights=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**16)),
        per_token=draw(st.booleans()),
        masked=draw(st.booleans()),
    )
    if draw(st.booleans()):
        padded = torch.nn.functional.pad(case.x, (draw(st.integers(0, 3)), 1), value=torch.nan)
        case = case.but(x=padded[..., -1 - case.x.shape[-1] : -1])
    if draw(st.booleans()):
        case = case.but(x=case.x.mT.contiguous().mT if case.x.dim() > 1 else case.x)
    return case


@settings(max_examples=200, deadline=None, database=None, derandomize="CI" in os.environ)
@given(cases())
def test_any_case(case):
    assert_right(case)
    assert_encoded(case)
    if case.mask is not None:
        assert same_bits(case.steer()[~case.mask], case.x[~case.mask])
    unchanged = case.but(values=case.acts()).steer()
    assert same_bits(unchanged, case.x)


def lesser_instruction_sets() -> list[str]:
    sets = _build.facts()["instruction_sets"]
    used, _ = _build.instruction_set()
    return sets[: sets.index(used)]


@pytest.mark.skipif(
    "SAESTEER_CPU_ISA" in os.environ, reason="SAESTEER_CPU_ISA says which instruction set to test"
)
def test_every_instruction_set():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", CORE, __file__]
    runs = {
        isa: subprocess.Popen(
            command,
            env=os.environ | {"SAESTEER_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for isa in lesser_instruction_sets()
    }
    outputs = {isa: run.communicate()[0] for isa, run in runs.items()}
    for isa, run in runs.items():
        assert run.returncode == 0, f"{isa}: {outputs[isa][-4000:]}"
        assert " passed" in outputs[isa] and "skipped" not in outputs[isa]


def test_poison_shows():
    """The premise of this file: an element that no kernel wrote would be NaN."""
    assert torch.empty(4).isnan().all()
    assert bits(torch.empty(4)).unique().numel() == 1
