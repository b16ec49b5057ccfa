"""The SAE in memory: its checks, its folded bias, its moves."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

import saesteer_fast as sf


def weights(N=12, d=5, **changed):
    torch.manual_seed(0)
    made = {
        "W_enc": torch.randn(N, d),
        "b_enc": torch.randn(N),
        "W_dec": torch.randn(N, d),
        "b_dec": torch.randn(d),
        "k": 3,
    }
    return made | changed


NAN = torch.randn(12, 5)
NAN[7, 2] = torch.nan
INFINITE = torch.randn(12)
INFINITE[4] = -torch.inf
GATED = {"measure": "gated", "k": None, "r_mag": torch.ones(12), "b_mag": torch.ones(12)}
TURNED = r"\[N, d\] is needed, a latent a row; it seems transposed"
TURNED_BOTH = {"W_enc": torch.randn(5, 12), "W_dec": torch.randn(5, 12)}
NARROW = {"W_enc": torch.ones(12, 1), "W_dec": torch.ones(12, 1), "b_dec": torch.ones(1)}


def test_sizes_and_repr():
    sae = sf.SAE(**weights(), hookpoint="layers.6")
    assert (sae.num_latents, sae.d, sae.k, sae.device.type) == (12, 5, 3, "cpu")
    assert "12 latents, d=5, topk, k=3, hookpoint='layers.6', torch.float32" in repr(sae)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folded_bias(dtype):
    N, d = 3001, 67  # more latents than are folded at once, and not a multiple
    sae = sf.SAE(**weights(N, d)).to(dtype=dtype)
    truth = sae.b_enc.double() - sae.W_enc.double() @ sae.b_dec.double()
    bound = d * 2.0**-24 * (sae.W_enc.double().abs() @ sae.b_dec.double().abs() + truth.abs())
    assert sae.b_enc_folded.dtype == torch.float32
    assert ((sae.b_enc_folded - truth).abs() <= bound).all()


def test_folded_bias_made_in_inference_mode_takes_part_in_autograd():
    sae = sf.SAE(**weights())
    with torch.inference_mode():
        folded = sae.b_enc_folded
    assert not folded.is_inference()


def test_weights_are_shared_and_made_contiguous():
    W_enc, decoder = torch.randn(12, 5), torch.nn.Parameter(torch.randn(5, 12))
    sae = sf.SAE(**weights(W_enc=W_enc, W_dec=decoder.T))
    assert sae.W_enc.data_ptr() == W_enc.data_ptr()
    assert sae.W_dec.is_contiguous() and not sae.W_dec.requires_grad
    assert torch.equal(sae.W_dec, decoder.T)


def test_to_rounds_and_keeps_the_rest():
    sae = sf.SAE(**weights(), hookpoint="layers.6", config={"multi_topk": True})
    half = sae.to(dtype=torch.bfloat16)
    assert torch.equal(half.W_enc, sae.W_enc.bfloat16()) and half.W_dec.dtype == torch.bfloat16
    assert (half.k, half.hookpoint, half.config) == (3, "layers.6", {"multi_topk": True})
    assert sae.W_enc.dtype == torch.float32
    with pytest.raises(ValueError, match="W_enc: NaN or infinity in row 0"):
        sf.SAE(**weights(W_enc=torch.full((12, 5), 1e6))).to(dtype=torch.float16)


def test_to_takes_a_dtype_by_its_name_alone():
    with pytest.raises(TypeError, match=r"device: got torch\.bfloat16, .*; dtype=torch\.bfloat16"):
        sf.SAE(**weights()).to(torch.bfloat16)


def test_numbers_of_other_libraries(tmp_path):
    sae = sf.SAE(**weights(k=np.int64(3)), scale=Fraction(1, 2))
    assert (type(sae.k), type(sae.scale)) == (int, float)
    same, x = sf.SAE(**weights(), scale=0.5), torch.randn(4, 5)
    assert torch.equal(sf.steer(x, sae, {3: 1.0}), sf.steer(x, same, {3: 1.0}))
    sae.fold().save(tmp_path / "sae", "saelens")
    assert sf.SAE.load(tmp_path / "sae").k == 3


def test_to_moves_what_the_measure_needs():
    sae = sf.SAE(**weights(**GATED), hookpoint="layers.6")
    half = sae.to(dtype=torch.bfloat16)
    assert half.r_mag.dtype == half.b_mag.dtype == torch.bfloat16 and half.threshold is None
    assert (half.measure, half.hookpoint) == ("gated", "layers.6")


def test_b_dec_is_folded_only_where_it_is_subtracted():
    sae = sf.SAE(**weights(subtract_b_dec=False))
    assert torch.equal(sae.b_enc_folded, sae.b_enc)


def test_copies():
    sae = sf.SAE(**weights())
    for twin in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert torch.equal(twin.b_enc_folded, sae.b_enc_folded) and torch.equal(
            twin.W_dec, sae.W_dec
        )


@pytest.mark.fault(24, 35, 36, 38)
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"W_enc": [[1.0]]}, TypeError, "W_enc: got list"),
        ({"W_enc": torch.randn(5)}, ValueError, r"W_enc: got shape \(5,\), \[N, d\]"),
        ({"W_enc": torch.randn(0, 5)}, ValueError, r"W_enc: got shape \(0, 5\)"),
        ({"W_enc": torch.randn(12, 5).double()}, TypeError, "W_enc: got torch.float64, accepted"),
        ({"W_dec": torch.ones(12, 5).char()}, TypeError, "W_dec: got torch.int8, accepted are"),
        ({"W_enc": torch.randn(5, 12)}, ValueError, rf"W_enc: got shape \(5, 12\), {TURNED}"),
        (TURNED_BOTH, ValueError, rf"W_enc: got shape \(5, 12\), {TURNED}"),
        ({"W_dec": torch.randn(5, 12)}, ValueError, r"W_dec: got shape \(5, 12\).*transposed"),
        ({"W_dec": None}, TypeError, "W_dec: got NoneType"),
        ({"b_enc": torch.randn(5)}, ValueError, r"b_enc: got shape \(5,\), \(12,\) is needed"),
        ({"b_enc": torch.randn(11)}, ValueError, r"b_enc: got shape \(11,\), \(12,\) is needed"),
        ({"b_dec": torch.randn(12)}, ValueError, r"b_dec: got shape \(12,\), \(5,\) is needed"),
        ({"b_dec": torch.empty(5, device="meta")}, ValueError, "b_dec: is on meta, W_enc on cpu"),
        (
            {"W_dec": torch.empty(12, 5, device="meta")},
            ValueError,
            "W_dec: is on meta, W_enc on cpu",
        ),
        ({"W_dec": NAN}, ValueError, "W_dec: NaN or infinity in row 7"),
        ({"b_enc": INFINITE}, ValueError, "b_enc: NaN or infinity in row 4"),
        ({"k": 0}, ValueError, "k: got 0, accepted are 1 to 12"),
        ({"k": 13}, ValueError, "k: got 13, accepted are 1 to 12"),
        ({"k": -1}, ValueError, "k: got -1"),
        ({"k": 3.0}, TypeError, "k: got 3.0, an integer"),
        ({"k": "3"}, TypeError, "k: got '3', an integer"),
        ({"k": True}, TypeError, "k: got True, an integer"),
        ({"k": None}, ValueError, "k: measure 'topk' needs it"),
        ({"measure": "tokp"}, ValueError, "measure: got 'tokp', accepted are topk.*'topk'"),
        ({"measure": "top_k"}, ValueError, "measure: got 'top_k', .*mean 'topk'"),
        ({"measure": "TopK"}, ValueError, "measure: got 'TopK', .*mean 'topk'"),
        ({"measure": "jumprelu"}, ValueError, "measure: got 'jumprelu', .*mean 'threshold'"),
        ({"measure": "JumpReLU"}, ValueError, "measure: got 'JumpReLU', .*mean 'threshold'"),
        ({"measure": "batch_topk"}, ValueError, "measure: got 'batch_topk', .*mean 'threshold'"),
        ({"measure": "standard"}, ValueError, "measure: got 'standard', .*mean 'relu'"),
        ({"measure": None}, ValueError, "measure: got None, accepted are [a-z, ]*$"),
        ({"measure": "relu"}, ValueError, "k: measure 'relu' does not use it"),
        ({"measure": "groupmax", "k": 5}, ValueError, "5 groups, which do not divide 12 latents"),
        ({"threshold": torch.ones(12)}, ValueError, "threshold: measure 'topk' does not use it"),
        (GATED | {"r_mag": None}, ValueError, "r_mag: measure 'gated' needs it"),
        (GATED | {"r_mag": torch.ones(3)}, ValueError, r"r_mag: got shape \(3,\)"),
        (GATED | {"b_mag": INFINITE}, ValueError, "b_mag: NaN or infinity in row 4"),
        (GATED | {"decoder_norm": True}, ValueError, "decoder_norm: measure 'gated' does not"),
        ({"decoder_norm": 1}, TypeError, "decoder_norm: got 1, True or False"),
        ({"subtract_b_dec": None}, TypeError, "subtract_b_dec: got None, True or False"),
        ({"normalize": "layernorm"}, ValueError, "got 'layernorm', .*mean 'layer_norm'"),
        (NARROW | {"normalize": "layer_norm"}, ValueError, "normalize: .* width 2 at least"),
        ({"scale": "1"}, TypeError, "scale: got '1', a number"),
        ({"scale": 0.0}, ValueError, "scale: got 0.0, a positive number"),
        ({"scale": float("nan")}, ValueError, "scale: got nan"),
        ({"hookpoint": 6}, TypeError, r"hookpoint: got 6, a name is needed: 'layers\.6'"),
    ],
)
def test_bad_weights_are_named(changed, error, message):
    with pytest.raises(error, match=message):
        sf.SAE(**weights(**changed))


def test_weights_without_numbers_are_named():
    with torch.device("meta"):
        empty = {name: torch.empty_like(t) for name, t in weights(k=None).items() if t is not None}
    with pytest.raises(ValueError, match="W_enc: is on meta, where there are no numbers"):
        sf.SAE(**empty, k=3)


@pytest.mark.fault(38)
def test_dtypes_may_be_mixed(textbook):
    sae = sf.SAE(**weights(W_dec=torch.randn(12, 5).half(), b_enc=torch.randn(12).bfloat16()))
    x = torch.randn(9, 5)
    torch.testing.assert_close(
        sf.steer(x, sae, {4: 2.0}).double(), textbook(x, sae, {4: 2.0}), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_weights_that_were_written_to_are_noticed(name):
    """What was made of them, as the folded bias, would be of the old ones."""
    given = {key: torch.nn.Parameter(t) for key, t in weights(k=None).items() if t is not None}
    sae, x = sf.SAE(**given, k=3), torch.randn(4, 5)
    sf.steer(x, sae, {3: 1.0})
    with torch.no_grad():
        given[name].add_(1.0)
    for use in (lambda: sf.steer(x, sae, {3: 1.0}), lambda: sae.encode(x)):
        with pytest.raises(
            RuntimeError, match=f"sae: {name} was written to since the SAE was first"
        ):
            use()
    renewed = dataclasses.replace(sae)
    fresh = sf.SAE(**{key: t.detach().clone() for key, t in given.items()}, k=3)
    assert torch.equal(sf.steer(x, renewed, {3: 1.0}), sf.steer(x, fresh, {3: 1.0}))
    for twin in (copy.deepcopy(renewed), pickle.loads(pickle.dumps(renewed))):
        assert torch.equal(twin.encode(x), fresh.encode(x))


def test_weights_made_in_inference_mode_are_taken():
    with torch.inference_mode():
        sae = sf.SAE(**weights())
        assert sf.steer(torch.randn(4, 5), sae, {3: 1.0}).shape == (4, 5)
    assert sf.steer(torch.randn(4, 5), sae, {3: 1.0}).shape == (4, 5)
