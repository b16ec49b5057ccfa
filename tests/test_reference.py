"""The reference itself, against formulas and counts written out here."""

from __future__ import annotations

import pytest
import torch
from ops_cases import (
    DTYPES,
    integer_case,
    permutation,
    random_case,
    same_bits,
    textbook,
)

import saesteer_fast as sf
from saesteer_fast import reference

SHAPES = [(1, 1, 1, 1, 1), (7, 33, 65, 4, 2), (63, 31, 200, 64, 17), (20, 67, 129, 129, 5)]


def counted(p: list[float], features: list[int], k: int) -> list[float]:
    """The features' activations, by sorting one token's preactivations."""
    best = sorted(range(len(p)), key=lambda j: (-p[j], j))[:k]
    return [p[f] if f in best and p[f] > 0 else 0.0 for f in features]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_truth_is_the_textbook_form(shape, dtype, per_token):
    case = random_case(*shape, dtype, dtype, per_token=per_token)
    truth = case.truth()
    assert truth.dtype == torch.float64
    torch.testing.assert_close(truth, textbook(case), rtol=1e-13, atol=1e-12)
    assert not torch.equal(truth, case.x.double())


def test_truth_of_masked_tokens_is_x():
    case = random_case((3, 7), masked=True)
    expected = torch.where(case.mask[..., None], textbook(case), case.x.double())
    torch.testing.assert_close(case.truth(), expected, rtol=1e-13, atol=1e-12)
    assert torch.equal(case.truth()[~case.mask], case.x.double()[~case.mask])


@pytest.mark.parametrize("k", [1, 5, 64, 130])
def test_ties_are_counted_by_index(k):
    """Integers make many ties, also at the k-th place."""
    case = integer_case(k=k, F=130)
    p = case.x.double() @ case.W_enc.double().T + case.b_enc.double()
    expected = torch.tensor([counted(row, case.features.tolist(), k) for row in p.tolist()])
    assert torch.equal(case.acts("reference"), expected)
    ranks = reference.rank(p, case.features)
    assert torch.equal(ranks.sort().values, torch.arange(130).expand(40, 130))
    ordered = p.sort(descending=True).values
    assert k == 130 or (ordered[:, k - 1] == ordered[:, k]).any()


def test_nan_ranks_first_and_makes_nan():
    p = torch.tensor([[1.0, torch.nan, 2.0, torch.nan]])
    assert reference.rank(p, torch.tensor([0, 2])).tolist() == [[3, 2]]
    case = random_case(3)
    x = case.x.clone()
    x[1, 4] = torch.inf
    bad = case.but(x=x)
    assert bad.acts("reference").isnan().all(-1).tolist() == [False, True, False]
    assert bad.steer("reference").isnan().all(-1).tolist() == [False, True, False]
    assert not bad.truth()[[0, 2]].isnan().any()


def test_unchanged_tokens_keep_their_bits():
    case = random_case(63, dtype=torch.bfloat16)
    x = case.x.clone()
    x[:, 3] = -0.0
    case = case.but(x=x)
    assert same_bits(case.but(values=case.acts("reference")).steer("reference"), x)
    none = case.but(features=case.features[:0], values=case.values[:0])
    assert same_bits(none.steer("reference"), x)


@pytest.mark.parametrize("ordered", [False, True])
def test_pieces_are_the_whole(ordered, monkeypatch):
    """A few tokens and latents at a time; and where no number may be read, all tokens ranked."""
    case = integer_case(63, per_token=True)
    case = case.stored(permutation(130)) if ordered else case
    acts, y, best = case.acts("reference"), case.steer("reference"), case.encode("reference")
    assert (acts > 0).any() and not (acts > 0).all()
    with monkeypatch.context() as here:
        here.setattr(reference, "HELD", 5 * case.x.shape[-1] + 7)
        assert same_bits(case.acts("reference"), acts)
        assert same_bits(case.steer("reference"), y)
        assert all(map(torch.equal, case.encode("reference"), best))
    monkeypatch.setattr(reference, "may_read", lambda t: False)
    assert same_bits(case.acts("reference"), acts)


def test_closed_tokens_are_not_ranked(monkeypatch):
    case = random_case(50, F=1)
    p = reference.preacts(case.x, case.W_enc, case.b_enc)[:, case.features]
    seen, ranked = [], reference._ranked
    monkeypatch.setattr(
        reference, "_ranked", lambda rows, *rest: seen.append(rows) or ranked(rows, *rest)
    )
    case.acts("reference")
    assert torch.equal(seen[0], case.x[p[:, 0] > 0]) and 0 < len(seen[0]) < 50
    closed = case.rows(p[:, 0] <= 0)
    assert not closed.acts("reference").any() and len(seen) == 1


def test_rows_that_are_not_there_are_nan():
    case = random_case(5)
    acts = reference.feature_acts(*case.encoder, torch.tensor([-1, 3, 129]), case.k)
    assert acts.isnan().all(0).tolist() == [True, False, True]
    values, indices = torch.ones(1, 2), torch.tensor([[3, -1]])
    assert reference.decode(values, indices, case.W_dec, case.b_dec).isnan().all()


@pytest.mark.fault(79)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_fp32_stays_fp32(precision):
    """Whatever products of fp32 PyTorch is told to round."""
    case = random_case(64, 256, 300)

    def computed():
        sae = sf.SAE(case.W_enc, case.b_enc, case.W_dec, case.b_dec, k=case.k)
        projected = sf.steer(case.x, sae, {3: 1.0}, measure="projection")
        return case.acts("reference"), case.steer("reference"), sae.b_enc_folded, projected

    before = torch.get_float32_matmul_precision()
    expected = computed()
    try:
        torch.set_float32_matmul_precision(precision)
        assert all(map(same_bits, computed(), expected))
    finally:
        torch.set_float32_matmul_precision(before)


def test_undecided_is_where_fp32_sums_disagree():
    """Sums in other orders decide alike outside it, and not everywhere inside it."""
    case = random_case(1000, 200, 200, 8, 8)
    inside = case.undecided()
    decisions = []
    for seed in range(4):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        turned = case.but(x=case.x[:, order], W_enc=case.W_enc[:, order])
        decisions.append(turned.acts("reference") > 0)
        p = turned.b_enc.expand(1000, -1).clone()
        for i in range(200):
            p += turned.x[:, i, None] * turned.W_enc[:, i]
        p_f = p[:, case.features]
        decisions.append((p_f > 0) & (reference.rank(p, case.features) < case.k))
    disagree = torch.stack(decisions).any(0) & ~torch.stack(decisions).all(0)
    assert not (disagree & ~inside).any()
    assert 0 < inside.double().mean() < 0.02


def test_undecided_bounds_the_gap():
    """Two latents that differ by more or less than sums of their size can tell."""
    x = torch.ones(1, 100)
    W_enc = torch.stack([torch.ones(100), torch.ones(100)])
    b_enc = torch.zeros(2)
    features = torch.tensor([0, 1])
    for gap, expected in ((2.0**-11, True), (2.0**-6, False)):
        W_enc[1, 0] = 1 + gap
        assert reference.undecided(x, W_enc, b_enc, features, 1).tolist() == [[expected] * 2]
    W_enc[1] = 1
    assert reference.undecided(x, W_enc, b_enc, features, 1).all()
    assert not reference.undecided(x, W_enc, b_enc, features, 2).any()
    assert reference.undecided(x, 0 * W_enc, b_enc, features, 2).all()
    assert not reference.undecided(x, 0 * W_enc, b_enc - 1, features, 2).any()
    assert reference.undecided(x, W_enc, b_enc, features[:0], 1).shape == (1, 0)


def test_encode_is_topk():
    case = random_case((3, 7), 33, 200, 16).to(torch.float64)
    values, indices = reference.encode(*case.encoder, case.k, dtype=torch.float64)
    top = (case.x @ case.W_enc.T + case.b_enc).topk(case.k)
    assert torch.equal(indices, top.indices)
    torch.testing.assert_close(values, top.values.relu())


def test_encode_orders_ties_by_index():
    case = integer_case()
    values, indices = case.encode("reference")
    p = case.x @ case.W_enc.T + case.b_enc
    for row, v, i in zip(p.tolist(), values.tolist(), indices.tolist(), strict=True):
        assert i == sorted(range(130), key=lambda j: (-row[j], j))[: case.k]
        assert v == [max(row[j], 0.0) for j in i]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_is_the_dense_product(dtype):
    case = random_case((3, 7), weights=dtype)
    values, indices = case.encode("reference")
    y = reference.decode(values.double(), indices, case.W_dec, case.b_dec)
    acts = torch.zeros(3, 7, 129, dtype=torch.float64).scatter_(-1, indices, values.double())
    dense = acts @ case.W_dec.double() + case.b_dec.double()
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), dense, rtol=torch.finfo(dtype).eps, atol=1e-6)
    empty = torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64)
    assert torch.equal(reference.decode(*empty, case.W_dec, case.b_dec), case.b_dec.expand(2, -1))
