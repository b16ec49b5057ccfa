"""Any steering of any stream, as a tensor and inside a model, against the truth in fp64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import DTYPES
from support import (
    EDITED,
    MEASURES,
    REFUSED,
    D,
    N,
    assert_rounded,
    build,
    given_edits,
    stream,
    true_acts,
    truth,
)
from torch import Tensor, nn

import saesteer_fast as sf
from saesteer_fast.plan import ERRORS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.fault(7, 10)]
ABOVE = 0.3
ALLOWED = [both for both in product(MEASURES, ERRORS) if both not in REFUSED]


@st.composite
def steerings(draw, rows: int | None):
    """What to do: one configuration, or one for each of `rows`, to an SAE of any kind."""
    values = st.floats(-8, 8, width=32)
    latents = st.integers(0, N - 1)
    if draw(st.booleans()):  # what the fused op takes: the same latents, set or left alone
        measure, error = "topk", "keep"
        chosen = draw(st.sets(latents, min_size=3, max_size=6))
        sets = st.fixed_dictionaries({f: st.tuples(st.just("set"), values) for f in chosen})
        one = st.just({}) | sets
    else:
        measure, error = draw(st.sampled_from(ALLOWED))
        one = st.dictionaries(latents, st.tuples(st.sampled_from(list(EDITED)), values), max_size=4)
    rowwise = rows and draw(st.booleans())
    return {
        "edits": draw(st.lists(one, min_size=rows, max_size=rows) if rowwise else one),
        "sae": build(measure, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 3))),
        "error": error,
        "projection": measure == "projection",
        "when": draw(st.none() | latents),
    }


def options(steering: dict) -> dict:
    """The keywords of sf.steer and sf.steering."""
    when = steering["when"]
    return {
        "error": steering["error"],
        "measure": "projection" if steering["projection"] else None,
        "when": None if when is None else sf.active({when: ABOVE}),
    }


def given_rows(edits):
    return [given_edits(row) for row in edits] if isinstance(edits, list) else given_edits(edits)


def assert_true(y: Tensor, x: Tensor, steering: dict, mask: Tensor | None) -> None:
    sae, edits, when = steering["sae"], steering["edits"], steering["when"]
    assert y.shape == x.shape and y.dtype == x.dtype
    inside = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    if when is not None:
        level = true_acts(x.double(), sae)[..., when]
        assert ((level - ABOVE).abs() > 1e-5).all()
        inside = inside & (level > ABOVE)
    rows = edits if isinstance(edits, list) else [edits] * (len(x) if x.ndim > 1 else 1)
    rows = zip(x, y, inside, rows, strict=True) if x.ndim > 1 else [(x, y, inside, edits)]
    for before, after, chosen, named in rows:
        chosen = chosen & bool(named)
        assert torch.equal(after[~chosen], before[~chosen])
        if named and before.numel():
            options = steering["error"], steering["projection"]
            expected = truth(before, sae, named, None, *options)
            assert_rounded(after[chosen], expected[chosen], roundings=2)


def view(x: Tensor, strides: str) -> Tensor:
    """x again, laid out in another way."""
    if strides == "columns":
        wide = x.new_zeros(*x.shape[:-1], 2 * D)
        wide[..., ::2] = x
        return wide[..., ::2]
    if strides == "transposed" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if strides == "flipped":
        return x.flip(-1).contiguous().flip(-1)
    return x


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    x = stream(*shape, seed=draw(st.integers(9, 12)), dtype=draw(st.sampled_from(DTYPES)))
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.5
    strides = draw(st.sampled_from(["plain", "columns", "transposed", "flipped"]))
    return x, mask, strides, draw(steerings(shape[0] if shape else None))


@given(tensors())
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_any_tensor(case):
    x, mask, strides, steering = case
    edits = given_rows(steering["edits"])
    y = sf.steer(view(x, strides), steering["sae"], edits, mask=mask, **options(steering))
    assert_true(y, x, steering, mask)


class Hands(nn.Module):
    """A decoder of one layer, which hands on what it is given."""

    def __init__(self, as_tuple: bool):
        super().__init__()
        self.layers, self.as_tuple = nn.ModuleList([nn.Identity()]), as_tuple
        self.scale = nn.Parameter(torch.ones(()))
        if as_tuple:
            self.layers[0].forward = lambda hidden: (hidden, "cache")

    def forward(self, hidden, attention_mask=None):
        out = self.layers[0](hidden)
        return out[0] if self.as_tuple else out


@st.composite
def batches(draw):
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    x = stream(rows, width, seed=draw(st.integers(9, 12)), dtype=draw(st.sampled_from(DTYPES)))
    flags = st.lists(st.booleans(), min_size=rows * width, max_size=rows * width)
    flags = flags.map(lambda found: torch.tensor(found).view(rows, width))
    pads = draw(st.lists(st.integers(0, width - 1), min_size=rows, max_size=rows))
    real = torch.arange(width) >= torch.tensor(pads)[:, None]
    if draw(st.booleans()):
        real = real.flip(1)
    scope = draw(st.just("all") | flags)
    return x, real, scope, draw(st.booleans()), draw(steerings(rows))


@given(batches())
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_any_batch_in_a_model(case):
    x, real, scope, as_tuple, steering = case
    model = Hands(as_tuple)
    edits = given_rows(steering["edits"])
    with sf.steering(model, steering["sae"], edits, layer=0, scope=scope, **options(steering)):
        y = model(x, attention_mask=real.long())
        assert torch.equal(model(x, attention_mask=real.long()), y)
    assert torch.equal(model(x), x)
    assert_true(y, x, steering, real if isinstance(scope, str) else real & scope)
