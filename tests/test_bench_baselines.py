"""The baselines, against the textbook form written out in fp64."""

from __future__ import annotations

import pytest
import torch
from ops_cases import Case, gamma, preact_bound, random_case, textbook

from bench import baselines
from saesteer_fast import reference


def baseline(path, case: Case) -> torch.Tensor:
    decoder = (case.directions,) if path is baselines.smart else (case.W_dec, case.b_dec)
    return path(*case.encoder, *decoder, case.features, case.values, case.k)


@pytest.mark.parametrize("path", [baselines.naive, baselines.lean, baselines.smart])
@pytest.mark.parametrize("lead", [63, (3, 7)], ids=str)
def test_baselines_are_the_textbook_form(path, lead):
    case = random_case(lead, 67, 300, 16, 3)
    exact = case.to(torch.float64)
    truth = textbook(case)
    torch.testing.assert_close(baseline(path, exact), truth, rtol=1e-13, atol=1e-12)

    sure = ~case.undecided().any(-1)
    assert sure.double().mean() > 0.99
    # Each of two decodes sums k activations, each wrong by e at most, with unit rows.
    e = preact_bound(*case.encoder).amax()
    terms = case.k * reference.preacts(*case.encoder).amax() + case.values.abs().sum()
    summed = 2 * (
        case.k * e + gamma(300 + 2) * (terms + case.x.abs().amax() + case.b_dec.abs().amax())
    )
    assert (baseline(path, case) - truth)[sure].abs().max() <= summed < 0.05


@pytest.mark.parametrize("path", [baselines.naive, baselines.lean, baselines.smart])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_baselines_keep_the_dtype(path, dtype):
    case = random_case(dtype=dtype, weights=dtype).to(dtype)
    y = baseline(path, case)
    assert y.dtype == dtype and y.shape == case.x.shape
    assert (y.double() - case.truth()).abs().mean() < 0.05
