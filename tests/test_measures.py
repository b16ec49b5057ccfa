"""Measures of a few latents and of all, against the definition in fp64."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import product

import pytest
import torch
from ops_cases import same_bits
from torch import Tensor

import saesteer_fast as sf
from saesteer_fast import measures, ops
from saesteer_fast.measures import Measured

N, D, K, T = 36, 10, 6, 50
LATENTS = [7, 0, 35, 8, 20]
ELEMENTWISE = ["relu", "threshold", "gated"]
ALL = ["topk", "groupmax", *ELEMENTWISE]
SETTINGS = {
    "plain": {},
    "b_dec kept": {"subtract_b_dec": False},
    "layer_norm": {"normalize": "layer_norm"},
    "constant_norm": {"normalize": "constant_norm"},
    "scale": {"scale": 0.7},
    "scale and norm": {"scale": 3.0, "normalize": "layer_norm", "subtract_b_dec": False},
}


def make(measure: str, seed=0, N=N, d=D, dtype=torch.float32, **settings) -> sf.SAE:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    own = {
        "topk": lambda: {"k": K},
        "groupmax": lambda: {"k": K},
        "threshold": lambda: {"threshold": normal(N)},
        "relu": dict,
        "gated": lambda: {"r_mag": 0.3 * normal(N), "b_mag": normal(N)},
    }[measure]()
    weights = {
        "W_enc": normal(N, d),
        "b_enc": 0.3 * normal(N),
        "W_dec": normal(N, d),
        "b_dec": normal(d),
    }
    return sf.SAE(**weights, measure=measure, **own, **settings)


def stream(T=T, d=D, dtype=torch.float32) -> Tensor:
    return (2 * torch.randn(T, d, generator=torch.Generator().manual_seed(9)) + 0.5).to(dtype)


def normalised(sae: sf.SAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, and mean and unit such that x-like = mean + unit * z-like, in fp64."""
    mean, unit = torch.zeros(()).double(), torch.ones(()).double()
    x = x.double()
    if sae.normalize == "layer_norm":
        mean, unit = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        x = (x - mean) / (unit + 1e-5)
    if sae.normalize == "constant_norm":
        unit = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        x = x / unit
    return sae.scale * x, mean, unit / sae.scale


def dense(sae: sf.SAE, x: Tensor) -> Tensor:
    """The activations by the definition, in fp64."""
    z, _, _ = normalised(sae, x)
    z = z - sae.b_dec.double() if sae.subtract_b_dec else z
    p = z @ sae.W_enc.double().T + sae.b_enc.double()
    if sae.decoder_norm:
        p = p * sae.W_dec.double().norm(dim=1)
    if sae.measure == "topk":
        top = p.topk(sae.k)
        return torch.zeros_like(p).scatter(-1, top.indices, top.values).relu()
    if sae.measure == "groupmax":
        groups = p.unflatten(-1, (sae.k, -1))
        return (groups * (groups == groups.amax(-1, keepdim=True))).flatten(-2).relu()
    if sae.measure == "threshold":
        return p.relu() * (p > sae.threshold.double())
    if sae.measure == "gated":
        magnitude = sae.r_mag.double().exp() * (p - sae.b_enc.double()) + sae.b_mag.double()
        return magnitude.relu() * (p > 0)
    return p.relu()


def decoded(sae: sf.SAE, acts: Tensor, x: Tensor) -> Tensor:
    """What activations stand for, in fp64."""
    _, mean, unit = normalised(sae, x)
    rows = sae.W_dec.double()
    rows = rows / rows.norm(dim=1, keepdim=True) if sae.decoder_norm else rows
    # scale divides b_dec too: it is part of `unit`
    return mean + unit * (acts @ rows + sae.b_dec.double())


CASES = [
    *(
        pytest.param(measure, SETTINGS[name], id=f"{measure}-{name}")
        for measure, name in product(ALL, SETTINGS)
    ),
    *(
        pytest.param(measure, {"decoder_norm": True}, id=f"{measure}-decoder_norm")
        for measure in ("topk", "groupmax", "threshold", "relu")
    ),
    pytest.param(
        "topk", {"decoder_norm": True, "scale": 2.0, "normalize": "layer_norm"}, id="topk-all"
    ),
]


def close(got: Tensor, truth: Tensor, ulps=64):
    dtype = got.dtype
    size = truth.abs().max().item()
    bound = ulps * 2.0**-24 * size + torch.finfo(dtype).eps / 2 * size
    torch.testing.assert_close(got.double(), truth, atol=bound, rtol=0)


@pytest.mark.fault(41)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("measure", "settings"), CASES)
def test_acts_and_apply(measure, settings, impl):
    sae, x = make(measure, **settings), stream()
    truth = dense(sae, x)
    assert (truth[:, LATENTS] > 0).any(0).sum() > 1
    measured = Measured(sae, LATENTS)
    acts = measured.acts(x, impl)
    assert acts.dtype == torch.float32
    close(acts, truth[:, LATENTS])
    assert torch.equal(acts > 0, truth[:, LATENTS] > 0)
    coef = torch.randn(T, len(LATENTS), generator=torch.Generator().manual_seed(1))
    changed = torch.zeros_like(truth)
    changed[:, LATENTS] = coef.double()
    shift = decoded(sae, changed, x) - decoded(sae, torch.zeros_like(changed), x)
    close(measured.apply(x, coef, impl), x.double() + shift)
    close(measured.apply(x, coef[0], impl)[:1], (x.double() + shift)[:1])


@pytest.mark.fault(41)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("measure", "settings"), CASES)
def test_whole(measure, settings, impl):
    sae, x = make(measure, **settings), stream()
    truth = dense(sae, x)
    acts = measures.encode(sae, x, impl)
    assert acts.shape == (T, N) and acts.dtype == torch.float32
    close(acts, truth)
    close(sae.decode(truth.float(), x), decoded(sae, truth, x), 256)
    features = torch.tensor(LATENTS)
    for coef in (torch.randn(len(LATENTS)), torch.randn(T, len(LATENTS))):
        edited = truth.clone()
        edited[:, LATENTS] += coef.double()
        close(measures.reconstruct(sae, x, features, coef, impl), decoded(sae, edited, x), 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("measure", "settings"), CASES)
def test_half_precision(measure, settings, dtype):
    """Sums stay fp32: against fp64 over the rounded inputs, x' is off by one rounding."""
    sae, x = make(measure, dtype=dtype, **settings), stream(dtype=dtype)
    truth = dense(sae, x)
    measured = Measured(sae, LATENTS)
    close(measured.acts(x), truth[:, LATENTS])
    coef = 3 - measured.acts(x)
    changed = torch.zeros_like(truth)
    changed[:, LATENTS] = coef.double()
    shift = decoded(sae, changed, x) - decoded(sae, torch.zeros_like(changed), x)
    out = measured.apply(x, coef)
    assert out.dtype == dtype
    close(out, x.double() + shift)
    recon = measures.reconstruct(sae, x, torch.tensor(LATENTS), coef)
    edited = truth.clone()
    edited[:, LATENTS] += coef.double()
    assert recon.dtype == dtype
    torch.testing.assert_close(
        recon.double(), decoded(sae, edited, x), atol=4 * torch.finfo(dtype).eps, rtol=2e-2
    )


@pytest.mark.fault(11)
@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm"])
def test_norms_beyond_fp16(normalize):
    sae = make("topk", dtype=torch.float16, normalize=normalize)
    sae.W_dec.mul_(8000)
    x = 4000 * stream(dtype=torch.float16)
    assert x.isfinite().all() and x.float().norm(dim=-1).square().max() > 65520
    truth = dense(sae, x)
    close(Measured(sae, LATENTS).acts(x), truth[:, LATENTS])
    unit = (sae.W_dec.double() / sae.W_dec.double().norm(dim=1, keepdim=True))[LATENTS]
    z, _, _ = normalised(sae, x)
    projected = Measured(sae, LATENTS, measure="projection").acts(x)
    close(projected, (z - sae.b_dec.double()) @ unit.T, 256)


@pytest.mark.parametrize("settings", [{}, {"normalize": "layer_norm"}, {"scale": 3.0}])
def test_projection(settings):
    sae, x = make("topk", **settings), stream()
    measured = Measured(sae, LATENTS, measure="projection")
    z, _, unit = normalised(sae, x)
    rows = sae.W_dec.double()[LATENTS]
    rows = rows / rows.norm(dim=1, keepdim=True)
    close(measured.acts(x), (z - sae.b_dec.double()) @ rows.T)
    assert len(measured.W_enc) == len(LATENTS)
    # Holding one projection at a constant holds it there.
    one = Measured(sae, LATENTS[:1], measure="projection")
    held = one.apply(x, 2.5 - one.acts(x))
    if sae.normalize == "none":
        close(one.acts(held), torch.full((T, 1), 2.5).double())
    close(held, x.double() + unit * ((2.5 - one.acts(x)).double() @ rows[:1]))


def test_none_measures_nothing():
    sae, x = make("topk", scale=2.0), stream()
    measured = Measured(sae, LATENTS, measure="none")
    assert not measured.acts(x).any() and measured.acts(x).shape == (T, len(LATENTS))
    assert len(measured.W_enc) == 0
    shift = torch.ones(len(LATENTS)) @ sae.W_dec[LATENTS] / 2
    close(measured.apply(x, torch.ones(len(LATENTS))), (x + shift).double())


@pytest.mark.parametrize("measure", ELEMENTWISE)
def test_elementwise_measures_keep_few_rows(measure):
    assert Measured(make(measure), LATENTS).W_enc.shape == (len(LATENTS), D)


def test_plain_topk_shares_the_weights_and_is_fused():
    sae, x = make("topk"), stream()
    measured = Measured(sae, LATENTS)
    assert measured.fused and measured.W_enc.data_ptr() == sae.W_enc.data_ptr()
    assert measured.b_enc.data_ptr() == sae.b_enc_folded.data_ptr()
    values = torch.tensor([5.0, 1.0, 0.0, -2.0, 3.0])
    fused = ops.steer(
        x,
        measured.W_enc,
        measured.b_enc,
        measured.directions,
        measured.features,
        values,
        measured.k,
    )
    close(fused, measured.apply(x, values - measured.acts(x)).double())
    assert Measured(make("topk", decoder_norm=True), LATENTS).fused
    assert not Measured(make("topk", scale=2.0), LATENTS).fused
    assert not Measured(make("topk", normalize="layer_norm"), LATENTS).fused
    assert not Measured(make("relu"), LATENTS).fused
    assert not Measured(sae, LATENTS, measure="projection").fused


@pytest.mark.parametrize(("measure", "settings"), CASES)
def test_gradients_are_those_of_the_definition(measure, settings):
    sae = make(measure, **settings)
    x = stream(T=8).requires_grad_()
    twin = x.detach().double().requires_grad_()
    measured = Measured(sae, LATENTS)
    coef = 4 - measured.acts(x)
    measured.apply(x, coef).square().sum().backward()
    acts = dense(sae, twin)[:, LATENTS]
    change = torch.zeros(8, N).double().index_add(1, torch.tensor(LATENTS), 4 - acts)
    shift = decoded(sae, change, twin) - decoded(sae, torch.zeros(8, N).double(), twin)
    (twin + shift).square().sum().backward()
    close(x.grad, twin.grad, 512)


@pytest.mark.parametrize(("measure", "settings"), CASES)
def test_no_change_is_bit_identical(measure, settings):
    sae, x = make(measure, **settings), stream(dtype=torch.bfloat16)
    measured = Measured(sae, LATENTS)
    out = measured.apply(x, torch.zeros(T, len(LATENTS)))
    assert torch.equal(out.view(torch.int16), x.view(torch.int16))


@pytest.mark.fault(1, 2)
@pytest.mark.parametrize(("measure", "settings"), CASES)
def test_bad_tokens_spoil_only_themselves(measure, settings):
    sae, x = make(measure, **settings), stream()
    clean = Measured(sae, LATENTS).acts(x)
    x[3, 4], x[5, 1] = torch.nan, torch.inf
    measured = Measured(sae, LATENTS)
    acts = measured.acts(x)
    good = [row for row in range(T) if row not in (3, 5)]
    assert torch.equal(acts[good], clean[good]) and acts[3].isnan().all()
    assert not measured.apply(x, 2 - acts)[3].isfinite().any()
    assert not measured.apply(x, 2 - acts)[5].isfinite().all()
    assert measured.apply(x, 2 - acts)[good].isfinite().all()


@pytest.mark.fault(5, 6)
@pytest.mark.parametrize("measure", ALL)
@pytest.mark.parametrize("shape", [(D,), (0, D), (2, 3, D), (1, 1, 1, D)])
def test_shapes(measure, shape):
    sae = make(measure, normalize="layer_norm")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    measured = Measured(sae, LATENTS)
    acts = measured.acts(x)
    assert acts.shape == (*shape[:-1], len(LATENTS))
    assert measured.apply(x, 1 - acts).shape == shape
    assert sae.encode(x).shape == (*shape[:-1], N)
    assert measures.reconstruct(sae, x, torch.tensor(LATENTS), 1 - acts).shape == shape
    if acts.numel():
        close(acts, dense(sae, x)[..., LATENTS])


@pytest.mark.parametrize("measure", [*ALL, "projection", "none"])
def test_no_latents(measure):
    sae = make("topk" if measure in ("projection", "none") else measure)
    measured, x = Measured(sae, [], measure=measure), stream()
    assert measured.acts(x).shape == (T, 0)
    assert torch.equal(measured.apply(x, measured.acts(x)), x)


def test_more_latents_than_a_block(monkeypatch):
    monkeypatch.setattr(measures, "BLOCK", 7)
    for measure in ELEMENTWISE:
        sae, x = make(measure), stream()
        close(sae.encode(x), dense(sae, x))
        close(sae.decode(sae.encode(x)), decoded(sae, dense(sae, x), x), 256)


@pytest.mark.fault(25)
def test_ties_go_to_the_lower_index():
    rows = torch.ones(N, D)
    own = {"topk": [0, 1, 2, 3, 4, 5], "groupmax": [0, 6, 12, 18, 24, 30]}
    for measure, live in own.items():
        sae = sf.SAE(rows, torch.zeros(N), rows, torch.zeros(D), k=K, measure=measure)
        acts = Measured(sae, list(range(N))).acts(torch.ones(1, D))
        assert acts[0].nonzero().flatten().tolist() == live
        assert torch.equal(acts, sae.encode(torch.ones(1, D)))


def test_a_dead_decoder_row_is_no_division_by_zero():
    sae = make("topk", decoder_norm=True)
    sae.W_dec[7] = 0
    x = stream()
    measured = Measured(sae, LATENTS)
    assert not measured.acts(x)[:, 0].any() and not measured.directions[0].any()
    assert measures.reconstruct(sae, x, torch.tensor(LATENTS), measured.acts(x)).isfinite().all()
    assert sae.decode(sae.encode(x)).isfinite().all()


@pytest.mark.parametrize("measure", [*ALL, "projection"])
def test_copies_measure_the_same(measure):
    sae = make("topk" if measure == "projection" else measure, normalize="layer_norm")
    measured, x = Measured(sae, LATENTS, measure=measure), stream()
    for twin in (copy.deepcopy(measured), pickle.loads(pickle.dumps(measured))):
        assert torch.equal(twin.acts(x), measured.acts(x))


@pytest.mark.parametrize("measure", [*ALL, "projection"])
def test_compiles_without_a_break(measure):
    sae = make("topk" if measure == "projection" else measure, normalize="layer_norm")
    measured, x = Measured(sae, LATENTS, measure=measure), stream()

    def held(x, values):
        return measured.apply(x, values - measured.acts(x))

    compiled = torch.compile(held, fullgraph=True, backend="eager")
    values = torch.arange(5.0)
    torch.testing.assert_close(compiled(x, values), held(x, values), atol=0, rtol=0)


@pytest.mark.fault(72)
@pytest.mark.parametrize(("measure", "settings"), CASES)
def test_autocast_changes_nothing(measure, settings):
    def results() -> list[Tensor]:
        sae, x = make(measure, **settings), stream()
        projected = Measured(sae, LATENTS, measure="projection")
        measured = Measured(sae, LATENTS)
        acts, coef = measured.acts(x), torch.ones(len(LATENTS))
        features = torch.tensor(LATENTS)
        return [
            acts,
            measured.apply(x, coef),
            projected.acts(x),
            sae.encode(x),
            sae.decode(sae.encode(x), x),
            measures.reconstruct(sae, x, features, coef),
            sae.fold().W_enc,
        ]

    plain = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = results()
    for one, other in zip(plain, cast, strict=True):
        assert torch.equal(one, other)


@pytest.mark.fault(72)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_autocast_changes_no_op(impl):
    """The reference's products are PyTorch's own, which autocast would round."""
    sae, x = make("topk"), stream()
    W_enc, b_enc = sae.encoder
    features, values = torch.tensor(LATENTS), torch.ones(len(LATENTS))
    directions = sae.W_dec[features]

    def results() -> list[Tensor]:
        steered = ops.steer(x, W_enc, b_enc, directions, features, values, sae.k, impl=impl)
        values_, indices = ops.encode(x, W_enc, b_enc, sae.k, impl=impl)
        return [
            steered,
            values_,
            ops.decode(values_, indices, sae.W_dec, sae.b_dec, impl=impl),
            ops.feature_acts(x, W_enc, b_enc, features, sae.k, impl=impl),
            ops.project(x, directions, values, impl=impl),
            ops.add_directions(x, directions, values, impl=impl),
        ]

    plain = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = results()
    for one, other in zip(plain, cast, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_unknown_measure_is_named():
    with pytest.raises(
        ValueError, match=r"measure: got 'projecton', accepted are topk.*projection"
    ):
        Measured(make("topk"), [1], measure="projecton")
    with pytest.raises(ValueError, match="measure: got 'relu', accepted are topk, projection"):
        Measured(make("topk"), [1], measure="relu")


@pytest.mark.parametrize(("measure", "settings"), CASES)
def test_folding_changes_no_activation(measure, settings):
    sae, x = make(measure, **settings), stream()
    folded = sae.fold()
    assert folded.scale == 1 and not folded.decoder_norm and folded.normalize == sae.normalize
    truth = dense(sae, x)
    close(folded.encode(x), truth, 128)
    close(folded.decode(truth.float(), x), decoded(sae, truth, x), 256)


def test_undoing_a_normalisation_needs_x():
    sae = make("relu", normalize="layer_norm")
    with pytest.raises(ValueError, match="x: needed to undo normalize='layer_norm'"):
        sae.decode(torch.zeros(3, N))


@pytest.mark.parametrize("more", [-1, 1, N])
def test_activations_of_another_number_of_latents(monkeypatch, more):
    monkeypatch.setattr(measures, "BLOCK", N)
    with pytest.raises(ValueError, match=rf"acts: got shape \(3, {N + more}\), \[..., {N}\] is"):
        make("relu").decode(torch.ones(3, N + more))


@pytest.mark.parametrize("shape", [(3, D + 1), (2, D), (1, D), (D,)], ids=str)
def test_a_normalisation_is_undone_by_the_same_tokens(shape):
    with pytest.raises(ValueError, match="x: got shape"):
        make("relu", normalize="layer_norm").decode(torch.ones(3, N), torch.ones(shape))


def test_encoding_needs_a_stream():
    with pytest.raises(TypeError, match="x: got list, a tensor is needed"):
        make("relu").encode([1.0])
    with pytest.raises(ValueError, match=rf"x: got shape \(3, {D - 1}\), the SAE is for \[..."):
        make("relu").encode(torch.ones(3, D - 1))
    for dtype in (torch.float64, torch.int64):
        with pytest.raises(
            TypeError, match=rf"x: got {dtype}, accepted are torch.float32, torch.b"
        ):
            make("topk").encode(torch.ones(3, D, dtype=dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("edit", [2.0, sf.add(1.0)], ids=str)
def test_a_bad_token_outside_keeps_its_bits(normalize, bad, edit):
    random = torch.Generator().manual_seed(0)
    W, x = (torch.randn(n, 33, generator=random) for n in (96, 6))
    sae = sf.SAE(W, torch.ones(96), W, torch.ones(33), k=8, normalize=normalize)
    x[1] *= bad
    x[4, 2] = bad
    steered = torch.tensor([True, False, True, False, False, True])
    for y in (
        sf.steer(x, sae, {3: edit}, mask=steered),
        sf.steer(x, sae, [{3: edit} if on else {} for on in steered]),
    ):
        assert same_bits(y[~steered], x[~steered])
        assert not (y[steered] == x[steered]).all()
