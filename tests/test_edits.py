"""The edits and error modes, against definitions written here, on every measure."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saesteer_fast as sf

D, N, K = 24, 96, 6
LATENTS = [3, 40, 41, 95]

EDITED = {
    "set": (lambda v: v, lambda a, v: 0 * a + v),
    "set_if_active": (sf.set_if_active, lambda a, v: torch.where(a > 0, v, a)),
    "add": (sf.add, lambda a, v: a + v),
    "scale": (sf.scale, lambda a, v: a * v),
    "at_least": (sf.at_least, lambda a, v: a.clamp(min=v)),
    "at_most": (sf.at_most, lambda a, v: a.clamp(max=v)),
}
MEASURES = ["topk", "groupmax", "threshold", "relu", "gated", "projection"]


def build(measure="topk", dtype=torch.float32, seed=0, **options) -> sf.SAE:
    random = torch.Generator().manual_seed(seed)
    noise, W_dec = torch.randn(2, N, D, generator=random)
    W_dec *= torch.rand(N, 1, generator=random) + 0.5
    bias, r_mag, b_mag = 0.1 * torch.randn(3, N, generator=random)
    weights = {
        "W_enc": W_dec + 0.1 * noise,
        "bias": bias,
        "W_dec": W_dec,
        "b_dec": 0.3 * torch.randn(D, generator=random),
    }
    if measure == "threshold":
        weights["threshold"] = torch.rand(N, generator=random)
    if measure == "gated":
        weights |= {"r_mag": r_mag, "b_mag": b_mag}
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    k = K if measure in ("topk", "groupmax") else None
    own = "relu" if measure == "projection" else measure
    return sf.SAE(**weights, k=k, measure=own, **options)


def true_acts(x, sae):
    """Dense activations in fp64."""
    W_enc, bias, b_dec = (t.double() for t in (sae.W_enc, sae.bias, sae.b_dec))
    p = (x - b_dec) @ W_enc.T + bias
    if sae.measure == "topk":
        top = p.relu().topk(sae.k, dim=-1)
        return torch.zeros_like(p).scatter(-1, top.indices, top.values)
    if sae.measure == "groupmax":
        groups = p.relu().unflatten(-1, (sae.k, -1))
        return torch.where(groups == groups.amax(-1, keepdim=True), groups, 0).flatten(-2)
    if sae.measure == "threshold":
        return torch.where(p > sae.threshold.double(), p, 0).relu()
    if sae.measure == "gated":
        return torch.where(p > 0, (sae.r_mag.double().exp() * (p - bias) + sae.b_mag).relu(), 0)
    return p.relu()


def truth(x, sae, edits, mask=None, error="keep", projection=False):
    """x' in fp64, by way of all activations and dense decodes; edits {latent: (kind, value)}."""
    stream, W_dec, b_dec = x.double(), sae.W_dec.double(), sae.b_dec.double()
    if projection:
        steered = stream.clone()
        for latent, (kind, value) in edits.items():
            unit = W_dec[latent] / W_dec[latent].norm()
            a = (stream - b_dec) @ unit
            steered += (EDITED[kind][1](a, value) - a)[..., None] * unit
    else:
        acts = true_acts(stream, sae)
        edited = acts.clone()
        for latent, (kind, value) in edits.items():
            edited[..., latent] = EDITED[kind][1](acts[..., latent], value)
        kept = 0 if error == "drop" else stream - (acts @ W_dec + b_dec)
        steered = edited @ W_dec + b_dec + kept
    return steered if mask is None else torch.where(mask[..., None], steered, stream)


def given_edits(edits):
    return {latent: EDITED[kind][0](value) for latent, (kind, value) in edits.items()}


def assert_rounded(y, expected, roundings=1):
    """y is the truth, rounded to its dtype after fp32 sums of D terms about as large."""
    ulp = torch.finfo(y.dtype).eps / 2
    size = expected.abs().amax() + 20
    bound = roundings * ulp * expected.abs() + 4 * D * 2.0**-24 * size
    assert ((y.double() - expected).abs() <= bound).all()


def stream(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("kind", EDITED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_edit_of_every_measure(measure, kind, dtype, poisoned_memory):
    sae, x = build(measure), stream(40, dtype=dtype)
    value = {"scale": 0.5, "at_most": 0.7}.get(kind, 1.5)
    edits = {latent: (kind, value) for latent in LATENTS}
    projection = measure == "projection"
    named = {"measure": "projection"} if projection else {}
    y = sf.steer(x, sae, given_edits(edits), **named)
    assert y.dtype == dtype
    assert_rounded(y, truth(x, sae, edits, projection=projection))
    assert not torch.equal(y, x)
    reference = sf.steer(x, sae, given_edits(edits), **named, impl="reference")
    assert_rounded(reference, y.double(), roundings=2)


@pytest.mark.parametrize("measure", MEASURES[:-1])
@pytest.mark.parametrize("kind", EDITED)
def test_every_edit_without_the_error(measure, kind):
    sae, x = build(measure), stream(40)
    edits = {latent: (kind, 1.5) for latent in LATENTS}
    y = sf.steer(x, sae, given_edits(edits), error="drop")
    assert_rounded(y, truth(x, sae, edits, error="drop"))
    assert (y - sf.steer(x, sae, given_edits(edits))).abs().max() > 0.1


def test_dropping_the_error_spares_what_is_not_edited():
    sae, x = build(), stream(3, 8)
    mask = torch.rand(3, 8, generator=torch.Generator().manual_seed(3)) > 0.5
    y = sf.steer(x, sae, {3: 1.0}, error="drop", mask=mask)
    assert torch.equal(y[~mask], x[~mask])
    assert_rounded(y, truth(x, sae, {3: ("set", 1.0)}, mask, error="drop"))
    assert torch.equal(sf.steer(x, sae, {}, error="drop"), x)
    rows = sf.steer(x, sae, [{}, {3: 1.0}, {}], error="drop")
    assert torch.equal(rows[[0, 2]], x[[0, 2]])
    assert_rounded(rows[1], truth(x[1], sae, {3: ("set", 1.0)}, error="drop"))


@pytest.mark.parametrize("options", [{"normalize": "layer_norm"}, {"scale": 3.0}])
def test_edits_are_in_units_of_the_activation_of_an_sae_that_normalises(options):
    sae, x = build(**options), 4 * stream(30) + 1
    edits = {3: ("set", 2.0), 40: ("scale", 0.5), 41: ("add", -1.0)}
    z, back = x.double() * sae.scale, 1 / sae.scale
    if sae.normalize == "layer_norm":
        back = x.double().std(-1, keepdim=True)
        z = (x.double() - x.double().mean(-1, keepdim=True)) / (back + 1e-5)
    plain = build()
    expected = x.double() + (truth(z, plain, edits) - z) * back
    assert_rounded(sf.steer(x, sae, given_edits(edits)), expected)


@st.composite
def cases(draw):
    shape = draw(st.lists(st.integers(0, 5), min_size=0, max_size=3))
    kinds = st.sampled_from(list(EDITED))
    values = st.floats(-8, 8, width=32)
    edits = draw(
        st.dictionaries(st.integers(0, N - 1), st.tuples(kinds, values), min_size=0, max_size=4)
    )
    measure = draw(st.sampled_from(MEASURES))
    errors = ["keep"] if measure == "projection" else ["keep", "drop"]
    return {
        "shape": shape,
        "edits": edits,
        "measure": measure,
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "weights": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "strides": draw(st.sampled_from(["plain", "columns", "transposed", "flipped"])),
        "masked": draw(st.booleans()),
        "error": draw(st.sampled_from(errors)),
        "seed": draw(st.integers(0, 3)),
    }


def view(x, strides):
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


@given(cases())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_case_is_the_truth(case):
    sae = build(case["measure"], case["weights"], case["seed"])
    x = stream(*case["shape"], seed=case["seed"] + 9, dtype=case["dtype"])
    mask = None
    if case["masked"] and x.ndim > 1:
        mask = torch.rand(x.shape[:-1], generator=torch.Generator().manual_seed(5)) > 0.5
    named = {"measure": "projection"} if case["measure"] == "projection" else {}
    y = sf.steer(
        view(x, case["strides"]),
        sae,
        given_edits(case["edits"]),
        mask=mask,
        error=case["error"],
        **named,
    )
    assert y.shape == x.shape and y.dtype == x.dtype
    if not case["edits"]:
        assert torch.equal(y, x)
    elif y.numel():
        expected = truth(x, sae, case["edits"], mask, case["error"], bool(named))
        # Without the error the sum is rounded to W_dec's dtype, then to x's.
        if case["error"] == "drop" and case["weights"] == torch.bfloat16:
            slack = torch.finfo(torch.bfloat16).eps / 2 * expected.abs()
            y = y.double() - (y.double() - expected).clamp(-slack, slack)
            y = y.to(case["dtype"])
        assert_rounded(y, expected, roundings=2)
        if mask is not None:
            assert torch.equal(y[~mask], x[~mask].to(y.dtype))


UNCHANGING = {
    "scale by one": sf.scale(1.0),
    "add nothing": sf.add(0.0),
    "at least 0": sf.at_least(0.0),
    "at least less": sf.at_least(-3.0),
    "at most much": sf.at_most(1e6),
}


@pytest.mark.parametrize("name", UNCHANGING)
@pytest.mark.parametrize("measure", MEASURES[:-1])
def test_a_token_whose_activations_stay_changes_no_bit(name, measure):
    x = stream(50, dtype=torch.bfloat16)
    x[0, 0] = -0.0
    y = sf.steer(x, build(measure), {latent: UNCHANGING[name] for latent in LATENTS})
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("edit", [sf.set_if_active(9.0), sf.at_most(0.0), sf.scale(3.0)])
def test_silent_latents_leave_their_tokens_alone(edit):
    sae, x = build(), stream(200)
    silent = true_acts(x.double(), sae)[:, 3] == 0
    y = sf.steer(x, sae, {3: edit})
    assert silent.any() and not silent.all()
    assert torch.equal(y[silent], x[silent])
    assert not (y[~silent] == x[~silent]).all(-1).any()


@pytest.mark.parametrize("kind", [kind for kind in EDITED if kind != "add"])
def test_a_broken_token_breaks_no_other(kind):
    sae, x = build(), stream(30)
    edits = {3: EDITED[kind][0](2.0), 40: sf.add(1.0)}
    clean = sf.steer(x, sae, edits)
    broken = x.clone()
    broken[4, 2], broken[9, 0] = torch.nan, torch.inf
    y = sf.steer(broken, sae, edits)
    others = [row for row in range(30) if row not in (4, 9)]
    torch.testing.assert_close(y[others], clean[others], atol=1e-5, rtol=0)
    assert y[[4, 9]].isnan().all()


def test_add_reads_no_activation(monkeypatch):
    sae, x = build(), stream(10)
    monkeypatch.setattr(sf.ops, "feature_acts", None)
    monkeypatch.setattr(sf.ops, "project", None)
    y = sf.steer(x, sae, {3: sf.add(2.0), 40: sf.add(-1.0)})
    assert_rounded(y, x.double() + 2 * sae.W_dec[3].double() - sae.W_dec[40].double())


def test_two_latents_of_one_direction():
    sae = build()
    sae.W_dec[40] = sae.W_dec[3]
    x, edits = stream(30), {3: ("set", 2.0), 40: ("add", -1.0)}
    assert_rounded(sf.steer(x, sae, given_edits(edits)), truth(x, sae, edits))


@pytest.mark.parametrize("edits", [{3: 2.0}, {3: sf.at_least(2.0), 40: 1.0}, {3: sf.add(2.0)}])
def test_the_functional_form_may_be_compiled_around(edits):
    sae, x = build(), stream(30)
    assert torch.equal(sf.steer(x, sae, edits), sf.steer(x.clone(), sae, copy.copy(edits)))


def test_edits_are_values():
    assert sf.add(2) == sf.add(2.0) != sf.scale(2.0)
    assert repr(sf.set_if_active(-4)) == "set_if_active(-4)"
    assert pickle.loads(pickle.dumps(sf.at_most(1.0))) == copy.deepcopy(sf.at_most(1.0))


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        (lambda: sf.add(float("nan")), ValueError, "add: got nan, which is not finite in fp32"),
        (lambda: sf.scale("2"), TypeError, "scale: got '2', a number is needed"),
        (lambda: sf.at_least(True), TypeError, "at_least: got True"),
        (lambda: sf.at_most(1e39), ValueError, r"at_most: got 1e\+39"),
        (lambda: sf.edits.Edit("clamp", 1.0), ValueError, "kind: got 'clamp', accepted are set,"),
        (lambda: sf.edits.Edit("at_lest", 1.0), ValueError, "did you mean 'at_least'"),
    ],
)
def test_bad_strengths_are_named(edits, error, message):
    with pytest.raises(error, match=message):
        edits()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error": "dropp"}, "error: got 'dropp', accepted are keep, drop; did you mean 'drop'"),
        ({"measure": "projecton"}, "measure: got 'projecton', .*did you mean 'projection'"),
        ({"measure": "relu"}, "measure: got 'relu', accepted are topk, projection"),
        ({"measure": "none"}, "measure: got 'none'"),
        ({"measure": "projection", "error": "drop"}, "error: 'drop' decodes the SAE's"),
        ({"rows": [0]}, "rows: edits is one configuration"),
        ({"when": sf.gate({3: 1.0})}, "when: sf.gate is decided by a prompt"),
        ({"when": sf.active(N)}, "when: latent 96 is not among 0 to 95"),
    ],
)
def test_bad_choices_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sf.steer(stream(3), build(), {3: 1.0}, **options)
