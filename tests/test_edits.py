"""The edits and error modes, against definitions written here, on every measure."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support import (
    EDITED,
    LATENTS,
    MEASURES,
    N,
    assert_rounded,
    build,
    given_edits,
    stream,
    true_acts,
    truth,
)

import saesteer_fast as sf


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


@pytest.mark.parametrize("measure", ["topk", "groupmax"])
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropping_the_error_rounds_once(measure, held, dtype):
    """Beyond fp16's range too, where the stream's dtype has room."""
    sae, x = build(measure, dtype=held), stream(9, dtype=dtype)
    for value in (1.0, 1e6):
        y = sf.steer(x, sae, {3: value}, error="drop")
        assert_rounded(y, truth(x, sae, {3: ("set", value)}, error="drop"))


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


UNCHANGING = {
    "scale by one": sf.scale(1.0),
    "add nothing": sf.add(0.0),
    "at least 0": sf.at_least(0.0),
    "at least less": sf.at_least(-3.0),
    "at most much": sf.at_most(1e6),
    "at most the largest": sf.at_most(torch.finfo(torch.float32).max),
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


@pytest.mark.fault(1, 2)
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


def test_a_direction_of_hardly_any_length():
    sae, x = build(), stream(30)
    sae.W_dec[3] *= 1e-12
    y = sf.steer(x, sae, {3: 2.0}, measure="projection")
    assert_rounded(y, truth(x, sae, {3: ("set", 2.0)}, projection=True))


@pytest.mark.fault(29)
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
    assert repr(sf.add(torch.tensor(0.5, requires_grad=True))) == "add(0.5)"
    assert pickle.loads(pickle.dumps(sf.at_most(1.0))) == copy.deepcopy(sf.at_most(1.0))


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        (lambda: sf.add(float("nan")), ValueError, "add: got nan, a number that is finite in fp32"),
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


def test_what_is_no_latent_is_named():
    with pytest.raises(TypeError, match=r"edits: latent 'x3' is no integer$"):
        sf.steer(stream(3), build(), {"x3": 1.0})


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
