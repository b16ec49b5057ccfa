"""Every format, written here from its description: what is loaded, and every fault of its files."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import saesteer_fast as sf
from saesteer_fast.formats import FORMATS, WRITABLE, files, name_of
from saesteer_fast.formats.protocol import Format, Writable

N, D, K = 24, 10, 4


def random(N=N, d=D, dtype=torch.float32, seed=0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "W_enc": normal(N, d),
        "b_enc": normal(N),
        "W_dec": normal(N, d),
        "b_dec": normal(d),
        "threshold": normal(N).abs(),
        "r_mag": normal(N),
        "b_mag": normal(N),
    }


def dump(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def saelens(folder: Path, w: dict, architecture: str, **config) -> Path:
    N, d = w["W_enc"].shape
    dump(
        folder / "cfg.json",
        {
            "architecture": architecture,
            "d_in": d,
            "d_sae": N,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {"hook_name": "blocks.6.hook_resid_post", "sae_lens_version": "6.54.12"},
        }
        | config,
    )
    tensors = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    if architecture == "gated":
        tensors |= {"b_gate": w["b_enc"], "r_mag": w["r_mag"], "b_mag": w["b_mag"]}
    else:
        tensors["b_enc"] = w["b_enc"]
    if architecture == "jumprelu":
        tensors["threshold"] = w["threshold"]
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def flat(folder: Path, w: dict, **config) -> Path:
    """SAELens before 6.0."""
    saelens(folder, w, "standard")
    N, d = w["W_enc"].shape
    base = {
        "d_in": d,
        "d_sae": N,
        "dtype": "torch.float32",
        "hook_point": "blocks.3.hook_resid_pre",
    }
    dump(folder / "cfg.json", base | config)
    return folder


def trained(folder: Path, w: dict, name: str, state: dict, **trainer) -> Path:
    """dictionary_learning's two files."""
    N, d = w["W_enc"].shape
    sizes = {"dict_class": name, "activation_dim": d, "dict_size": N, "layer": 6}
    settings = sizes | {"submodule_name": "resid_post_layer_6"} | trainer
    there = {key: value for key, value in settings.items() if value is not ...}
    dump(folder / "config.json", {"trainer": there})
    torch.save(state, folder / "ae.pt")
    return folder


def linear(w: dict) -> dict:
    return {
        "encoder.weight": w["W_enc"],
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
    }


def matrices(w: dict) -> dict:
    return {
        "W_enc": w["W_enc"].T.contiguous(),
        "b_enc": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
    }


def batch(threshold=0.75, k=K, **more) -> dict:
    return {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(threshold), **more}


def numpy(folder: Path, w: dict, save=np.savez) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = matrices(w) | {"threshold": w["threshold"]}
    save(folder / "params.npz", **{key: tensor.numpy() for key, tensor in arrays.items()})
    return folder


def gemma_2(folder: Path, w: dict, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = matrices(w) | {"threshold": w["threshold"]}
    save_file(
        {key.lower(): tensor for key, tensor in arrays.items()}, folder / "params.safetensors"
    )
    site = {"hf_hook_point_in": "model.layers.12.output", "model_name": "google/gemma-3-1b-pt"}
    dump(folder / "config.json", {"architecture": "jump_relu"} | site | config)
    return folder


def llama(folder: Path, w: dict, **config) -> Path:
    N, d = w["W_enc"].shape
    dump(
        folder / "hyperparams.json",
        {
            "d_model": d,
            "d_sae": N,
            "act_fn": "jumprelu",
            "jump_relu_threshold": 0.5,
            "norm_activation": "dataset-wise",
            "dataset_average_activation_norm": {"in": 17.125, "out": 17.125},
            "use_decoder_bias": True,
            "apply_decoder_bias_to_pre_encoder": False,
            "sparsity_include_decoder_norm": True,
            "top_k": 50,
            "hook_point_in": "blocks.19.hook_resid_post",
            "hook_point_out": "blocks.19.hook_resid_post",
        }
        | config,
    )
    (folder / "checkpoints").mkdir()
    save_file(linear(w) | {"decoder.bias": w["b_dec"]}, folder / "checkpoints/final.safetensors")
    return folder


def qwen(folder: Path, w: dict) -> Path:
    path = folder / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_4" / "layer6.sae.pt"
    path.parent.mkdir(parents=True)
    state = {"W_enc": w["W_enc"], "W_dec": w["W_dec"].T.contiguous()}
    torch.save(state | {"b_enc": w["b_enc"], "b_dec": w["b_dec"]}, path)
    return path


def openai(folder: Path, w: dict, activation="TopK", postact="ReLU", **changed) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    topk = {"k": K, "postact_fn": postact} if activation == "TopK" else {}
    state = {
        "pre_bias": w["b_dec"],
        "latent_bias": w["b_enc"],
        "stats_last_nonzero": torch.zeros(len(w["b_enc"]), dtype=torch.int64),
        "encoder.weight": w["W_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "activation": activation,
        "activation_state_dict": topk,
    }
    torch.save(state | changed, folder / "6.pt")
    return folder / "6.pt"


Case = tuple[Callable[[Path, dict], Path], dict]
PLAIN: dict[str, Case] = {
    "saelens-standard": (
        lambda f, w: saelens(f, w, "standard"),
        {"measure": "relu", "hookpoint": "layers.6"},
    ),
    "saelens-topk": (lambda f, w: saelens(f, w, "topk", k=K), {"measure": "topk", "k": K}),
    "saelens-topk-all": (
        lambda f, w: saelens(
            f,
            w,
            "topk",
            k=K,
            rescale_acts_by_decoder_norm=True,
            apply_b_dec_to_input=False,
            normalize_activations="constant_norm_rescale",
        ),
        {
            "measure": "topk",
            "decoder_norm": True,
            "subtract_b_dec": False,
            "normalize": "constant_norm",
        },
    ),
    "saelens-jumprelu": (
        lambda f, w: saelens(f, w, "jumprelu"),
        {"measure": "threshold", "threshold": ...},
    ),
    "saelens-gated": (
        lambda f, w: saelens(f, w, "gated"),
        {"measure": "gated", "r_mag": ..., "b_mag": ...},
    ),
    "saelens-old": (flat, {"measure": "relu", "hookpoint": "layers.2", "subtract_b_dec": True}),
    "saelens-old-topk": (
        lambda f, w: flat(
            f,
            w,
            activation_fn_str="topk",
            activation_fn_kwargs={"k": K},
            normalize_activations=False,
        ),
        {"measure": "topk", "k": K, "normalize": "none"},
    ),
    "dictionary_learning-AutoEncoder": (
        lambda f, w: trained(f, w, "AutoEncoder", linear(w) | {"bias": w["b_dec"]}),
        {"measure": "relu", "decoder_norm": True, "hookpoint": "layers.6"},
    ),
    "dictionary_learning-AutoEncoderNew": (
        lambda f, w: trained(f, w, "AutoEncoderNew", linear(w) | {"decoder.bias": w["b_dec"]}),
        {"measure": "relu", "subtract_b_dec": False, "decoder_norm": False},
    ),
    "dictionary_learning-GatedAutoEncoder": (
        lambda f, w: trained(
            f,
            w,
            "GatedAutoEncoder",
            {
                "encoder.weight": w["W_enc"],
                "decoder.weight": w["W_dec"].T.contiguous(),
                "decoder_bias": w["b_dec"],
                "r_mag": w["r_mag"],
                "gate_bias": w["b_enc"],
                "mag_bias": w["b_mag"],
            },
        ),
        {"measure": "gated", "r_mag": ..., "b_mag": ...},
    ),
    "dictionary_learning-JumpReluAutoEncoder": (
        lambda f, w: trained(
            f, w, "JumpReluAutoEncoder", matrices(w) | {"threshold": w["threshold"]}
        ),
        {"measure": "threshold", "threshold": ..., "subtract_b_dec": False},
    ),
    "dictionary_learning-AutoEncoderTopK": (
        lambda f, w: trained(
            f, w, "AutoEncoderTopK", linear(w) | {"b_dec": w["b_dec"]} | batch(-1.0), k=K
        ),
        {"measure": "topk", "k": K, "subtract_b_dec": True},
    ),
    "dictionary_learning-BatchTopKSAE": (
        lambda f, w: trained(
            f, w, "BatchTopKSAE", linear(w) | {"b_dec": w["b_dec"]} | batch(), k=K
        ),
        {"measure": "threshold", "threshold": 0.75, "subtract_b_dec": True},
    ),
    "dictionary_learning-MatryoshkaBatchTopKSAE": (
        lambda f, w: trained(
            f,
            w,
            "MatryoshkaBatchTopKSAE",
            matrices(w) | batch(group_sizes=torch.tensor([8, 16])),
            k=K,
        ),
        {"measure": "threshold", "threshold": 0.75, "subtract_b_dec": True},
    ),
    "gemma_scope": (
        lambda f, w: numpy(f / "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", w),
        {
            "measure": "threshold",
            "threshold": ...,
            "subtract_b_dec": False,
            "hookpoint": "layers.20",
        },
    ),
    "gemma_scope-compressed": (
        lambda f, w: numpy(f / "gemma-scope-2b-pt-mlp/layer_20", w, np.savez_compressed),
        {"measure": "threshold", "threshold": ..., "hookpoint": None},
    ),
    "gemma_scope_2": (
        gemma_2,
        {
            "measure": "threshold",
            "threshold": ...,
            "subtract_b_dec": False,
            "hookpoint": "layers.12",
        },
    ),
    "qwen_scope": (qwen, {"measure": "topk", "k": 4, "subtract_b_dec": False}),
    "openai-topk": (openai, {"measure": "topk", "k": K, "normalize": "layer_norm"}),
    "openai-relu": (
        lambda f, w: openai(f, w, "ReLU"),
        {"measure": "relu", "normalize": "none", "subtract_b_dec": True},
    ),
}


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.__name__)
def test_a_format_has_what_the_protocol_says(format):
    assert isinstance(format, Format) and format.__doc__
    assert isinstance(format, Writable) == (format in WRITABLE.values())


@pytest.mark.parametrize("name", PLAIN)
def test_a_format_names_every_file_of_a_folder(tmp_path, name):
    """Others are not fetched of a folder on the Hub."""
    place = PLAIN[name][0](tmp_path, random())
    (format,) = (format for format in FORMATS if format.__name__.endswith(f".{name_of(place)}"))
    written = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert place.is_file() or written <= set(format.FILES)


@pytest.mark.fault(35, 40)
@pytest.mark.parametrize("square", [False, True], ids=["", "N=d"])
@pytest.mark.parametrize("name", PLAIN)
def test_weights_and_settings(tmp_path, name, square):
    """Also where N = d: the format, not the shape, says what lies transposed."""
    write, expected = PLAIN[name]
    w = random(D if square else N)
    sae = sf.SAE.load(write(tmp_path / "sae", w))
    for key in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(sae, key), w[key]), key
        assert getattr(sae, key).is_contiguous()
    for key, value in expected.items():
        got = getattr(sae, key)
        if value is ...:
            assert torch.equal(got, w[key]), key
        elif isinstance(got, Tensor):
            assert torch.equal(got, torch.full((len(w["b_enc"]),), value)), key
        else:
            assert got == value, key
    assert sf.steer(torch.ones(3, D), sae, {1: 2.0}).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", [n for n in PLAIN if not n.startswith("gemma_scope") or n == "gemma_scope_2"]
)
def test_half_precision_stays(tmp_path, name, dtype):
    w = random(dtype=dtype)
    sae = sf.SAE.load(PLAIN[name][0](tmp_path / "sae", w))
    for key in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(sae, key), w[key]), key


def test_a_threshold_beside_half_precision_weights_is_not_rounded(tmp_path):
    w = random(dtype=torch.bfloat16)
    state = linear(w) | {"b_dec": w["b_dec"]} | batch(0.7)
    places = (
        trained(tmp_path / "batch", w, "BatchTopKSAE", state, k=K),
        llama(tmp_path / "llama", w, jump_relu_threshold=0.7),
    )
    for place in places:
        assert torch.equal(sf.SAE.load(place).threshold, torch.full((N,), 0.7))


def test_llama_scope_scales_biases_in_fp32(tmp_path):
    w = random(dtype=torch.bfloat16)
    sae = sf.SAE.load(llama(tmp_path / "sae", w))
    for key in ("b_enc", "b_dec"):
        scaled = w[key].double() * 17.125 / D**0.5
        torch.testing.assert_close(getattr(sae, key).double(), scaled, rtol=2**-23, atol=0)


def test_a_threshold_of_0_is_set(tmp_path):
    w = random()
    state = linear(w) | {"b_dec": w["b_dec"]} | batch(0.0)
    sae = sf.SAE.load(trained(tmp_path, w, "BatchTopKSAE", state))
    assert torch.equal(sae.threshold, torch.zeros(N))


NAMED = {
    "saelens": lambda f, w, name: saelens(f, w, "standard", metadata={"hook_name": name}),
    "dictionary_learning": lambda f, w, name: trained(
        f, w, "AutoEncoder", linear(w) | {"bias": w["b_dec"]}, submodule_name=name
    ),
    "gemma_scope_2": lambda f, w, name: gemma_2(f, w, hf_hook_point_in=name),
}


@pytest.mark.parametrize(
    ("format", "name", "hookpoint"),
    [
        ("saelens", "blocks.7.hook_resid_pre", "layers.6"),
        ("saelens", "blocks.0.hook_resid_pre", None),
        ("saelens", "blocks.3.hook_resid_post_mlp", None),
        ("saelens", "x.blocks.3.hook_resid_post", None),
        ("saelens", 3, None),
        ("dictionary_learning", "resid_pre_layer_6", None),
        ("dictionary_learning", "mlp_out_layer_6", None),
        ("dictionary_learning", None, None),
        ("gemma_scope_2", "model.language_model.layers.9.output", "layers.9"),
        ("gemma_scope_2", "layers.9.output", "layers.9"),
        ("gemma_scope_2", "model.layers.9.mlp.output", None),
        ("gemma_scope_2", "model.layers.9.input", None),
        ("gemma_scope_2", "model.sublayers.9.output", None),
    ],
)
def test_only_the_output_of_a_layer_is_a_hookpoint(tmp_path, format, name, hookpoint):
    assert sf.SAE.load(NAMED[format](tmp_path / "sae", random(), name)).hookpoint == hookpoint


def test_the_configurations_hookpoint_goes_before_the_folders_name(tmp_path):
    place = saelens(tmp_path / "layers.3", random(), "topk", k=K)
    assert sf.SAE.load(place).hookpoint == "layers.6"


def test_parameters_stored_by_columns(tmp_path):
    """A weight made as the transpose of another is saved as it lies, strides and all."""
    w = random()
    state = linear(w) | {"b_dec": w["b_dec"]} | batch()
    state["encoder.weight"] = w["W_enc"].T.contiguous().T
    state["decoder.weight"] = torch.nn.Parameter(w["W_dec"].T)
    sae = sf.SAE.load(trained(tmp_path, w, "AutoEncoderTopK", state, k=K))
    assert torch.equal(sae.W_enc, w["W_enc"]) and torch.equal(sae.W_dec, w["W_dec"])
    columns = {key: np.asfortranarray(t.numpy()) for key, t in matrices(w).items()}
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz/params.npz", **columns, threshold=w["threshold"].numpy())
    sae = sf.SAE.load(tmp_path / "npz")
    assert torch.equal(sae.W_enc, w["W_enc"]) and torch.equal(sae.W_dec, w["W_dec"])


def test_parameters_that_share_a_storage(tmp_path):
    w = random()
    storage = torch.cat([w["b_enc"], w["W_enc"].flatten()])
    state = linear(w) | {"b_dec": w["b_dec"]} | batch()
    state |= {"encoder.bias": storage[:N], "encoder.weight": storage[N:].view(N, D)}
    sae = sf.SAE.load(trained(tmp_path, w, "AutoEncoderTopK", state, k=K))
    assert torch.equal(sae.W_enc, w["W_enc"]) and torch.equal(sae.b_enc, w["b_enc"])
    state["encoder.weight"] = torch.cat([w["W_enc"], w["W_enc"]], 1)[:, :D]
    trained(tmp_path, w, "AutoEncoderTopK", state, k=K)
    with pytest.raises(ValueError, match=r"encoder.weight is a view with gaps"):
        sf.SAE.load(tmp_path)


def test_fake_tensors_say_where_numbers_lie_too(tmp_path, monkeypatch):
    w = random()
    path = openai(tmp_path, w)
    monkeypatch.setattr("saesteer_fast.formats.zips._placed", lambda value: False)
    assert torch.equal(sf.SAE.load(path).W_dec, w["W_dec"])


@pytest.mark.parametrize("block", [96, 16], ids=["rows", "less than a row"])
def test_many_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "BLOCK", block)
    for name in ("saelens-topk", "dictionary_learning-AutoEncoderTopK", "gemma_scope"):
        w = random()
        sae = sf.SAE.load(PLAIN[name][0](tmp_path / name, w))
        assert torch.equal(sae.W_enc, w["W_enc"]) and torch.equal(sae.W_dec, w["W_dec"])
    sae.save(tmp_path / "sae", "saelens")  # with checksums
    back = sf.SAE.load(tmp_path / "sae")
    assert torch.equal(back.W_enc, w["W_enc"]) and torch.equal(back.W_dec, w["W_dec"])


@pytest.mark.fault(41)
def test_scale_of_a_saelens_checkpoint(tmp_path):
    w = random()
    saelens(tmp_path, w, "standard", normalize_activations="expected_average_only_in")
    with pytest.raises(
        ValueError, match=r"'expected_average_only_in', and there is no activation_sc"
    ):
        sf.SAE.load(tmp_path)
    dump(tmp_path / "activation_scaler.json", {"scaling_factor": 0.25})
    sae = sf.SAE.load(tmp_path)
    assert sae.scale == 0.25
    # SAELens folds it in when training ends: W_enc * s, W_dec / s, b_dec / s.
    folded = sf.SAE(
        w["W_enc"] * 0.25, w["b_enc"], w["W_dec"] / 0.25, w["b_dec"] / 0.25, measure="relu"
    )
    x = torch.randn(5, D)
    torch.testing.assert_close(sae.encode(x), folded.encode(x))
    torch.testing.assert_close(sae.decode(sae.encode(x)), folded.decode(sae.encode(x)))
    torch.testing.assert_close(sf.steer(x, sae, {3: 4.0}), sf.steer(x, folded, {3: 4.0}))
    with pytest.raises(ValueError, match=r"SAELens cannot say scale=0.25; fold\(\)"):
        sae.save(tmp_path / "again", "saelens")
    sae.fold().save(tmp_path / "again", "saelens")
    assert torch.equal(sf.SAE.load(tmp_path / "again").W_enc, folded.W_enc)
    dump(tmp_path / "activation_scaler.json", {"scaling_factor": None})
    with pytest.raises(ValueError, match=r"activation_scaler.json: scaling_factor is None"):
        sf.SAE.load(tmp_path)


def test_a_scale_that_is_folded_in_is_not_used_again(tmp_path):
    place = saelens(tmp_path, random(), "standard")
    dump(tmp_path / "activation_scaler.json", {"scaling_factor": 0.25})
    assert sf.SAE.load(place).scale == 1


def test_settings_that_saelens_leaves_out_are_its_librarys(tmp_path):
    w = random()
    source = saelens(tmp_path / "new", w, "standard") / "cfg.json"
    config = json.loads(source.read_text())
    del config["normalize_activations"]
    dump(source, config)
    assert sf.SAE.load(source.parent).normalize == "none"
    assert sf.SAE.load(flat(tmp_path / "old", w, activation_fn_str=None)).measure == "relu"
    topk = {"architecture": "topk", "activation_fn_str": "topk", "k": K}
    assert sf.SAE.load(flat(tmp_path / "topk", w, **topk)).k == K


def test_an_autoencoder_is_normalised_as_its_library_does(tmp_path):
    w = random()
    state = linear(w) | {"bias": w["b_dec"]}
    sae = sf.SAE.load(trained(tmp_path / "a", w, "AutoEncoder", state))
    norms = w["W_dec"].norm(dim=1)
    x = torch.randn(7, D)
    acts = ((x - w["b_dec"]) @ (w["W_enc"] * norms[:, None]).T + w["b_enc"] * norms).relu()
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae.decode(acts), acts @ (w["W_dec"] / norms[:, None]) + w["b_dec"])
    with pytest.raises(ValueError, match=r"SAELens cannot say decoder_norm for 'relu'; fold"):
        sae.save(tmp_path / "b", "saelens")
    w["W_dec"] /= norms[:, None]
    state = linear(w) | {"bias": w["b_dec"]}
    assert not sf.SAE.load(trained(tmp_path / "c", w, "AutoEncoder", state)).decoder_norm


@pytest.mark.fault(41)
def test_llama_scope_is_used_in_units_of_the_stream(tmp_path):
    w = random()
    sae = sf.SAE.load(llama(tmp_path / "L19R", w))
    assert sae.hookpoint == "layers.19" and sae.measure == "threshold"
    # As trained: tokens times c; then everything over c, and decoder rows made unit.
    c, norms = D**0.5 / 17.125, w["W_dec"].norm(dim=1)
    x = 5 * torch.randn(9, D, generator=torch.Generator().manual_seed(2))
    p = ((x * c) @ w["W_enc"].T + w["b_enc"]) / c * norms
    acts = p * (p > 0.5)
    assert (acts > 0).any()
    torch.testing.assert_close(sae.encode(x), acts)
    recon = acts @ (w["W_dec"] / norms[:, None]) + w["b_dec"] / c
    torch.testing.assert_close(sae.decode(acts), recon)
    plain = llama(
        tmp_path / "plain", w, norm_activation="inference", sparsity_include_decoder_norm=False
    )
    p = x @ w["W_enc"].T + w["b_enc"]
    torch.testing.assert_close(sf.SAE.load(plain).encode(x), p * (p > 0.5))


def test_settings_that_llama_scope_leaves_out_are_its_librarys(tmp_path):
    source = llama(tmp_path / "L19R", random()) / "hyperparams.json"
    config = json.loads(source.read_text())
    for key in ("apply_decoder_bias_to_pre_encoder", "sparsity_include_decoder_norm"):
        del config[key]
    dump(source, config)
    sae = sf.SAE.load(source.parent)
    assert sae.subtract_b_dec and sae.decoder_norm
    for key, meant in {"act_fn": "relu", "norm_activation": "token-wise"}.items():
        dump(source, {name: value for name, value in config.items() if name != key})
        with pytest.raises(ValueError, match=f"{key} is '{meant}', accepted are"):
            sf.SAE.load(source.parent)


def test_gemma_scope_of_the_embedding(tmp_path):
    w = random()
    sae = sf.SAE.load(numpy(tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k", w))
    torch.testing.assert_close(sae.W_enc, w["W_enc"] / D**0.5)
    torch.testing.assert_close(sae.W_dec, w["W_dec"] * D**0.5)
    assert sae.hookpoint is None


@pytest.mark.fault(46)
@pytest.mark.parametrize("above", ["embedding_study", "embedding", "layer_9"])
def test_gemma_scope_below_a_folder_of_that_name(tmp_path, above):
    w = random()
    path = tmp_path / above / "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_71"
    sae = sf.SAE.load(numpy(path, w))
    assert torch.equal(sae.W_enc, w["W_enc"]) and torch.equal(sae.W_dec, w["W_dec"])
    assert sae.hookpoint == "layers.3"


def test_gemma_scope_2_without_its_configuration(tmp_path):
    w = random()
    place = gemma_2(tmp_path / "sae", w)
    (place / "config.json").unlink()
    sae = sf.SAE.load(place)
    assert torch.equal(sae.W_enc, w["W_enc"]) and sae.hookpoint is None


@pytest.mark.fault(78)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "dictionary_learning-BatchTopKSAE", "saelens-topk"])
def test_defaults_of_dtype_and_device_change_nothing(tmp_path, name, dtype, device):
    write = llama if name == "llama" else PLAIN[name][0]
    plain = sf.SAE.load(write(tmp_path / "sae", random()))
    standing = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            sae = sf.SAE.load(tmp_path / "sae")
    finally:
        torch.set_default_dtype(standing)
    for key, held in vars(plain).items():
        if isinstance(held, Tensor):
            assert getattr(sae, key).dtype == held.dtype and torch.equal(getattr(sae, key), held)


def test_loaded_in_inference_mode_for_use_with_gradients(tmp_path):
    place = saelens(tmp_path, random(), "topk", k=K)
    with torch.inference_mode():
        sae = sf.SAE.load(place)
    x = torch.randn(3, D, requires_grad=True)
    sae.decode(sae.encode(x)).sum().backward()
    assert x.grad is not None


def test_a_hookpoint_of_before_is_not_kept(tmp_path):
    """cfg.json of SAELens names one too, which what is saved anew may have left."""
    sae = sf.SAE.load(saelens(tmp_path / "sae", random(), "topk", k=K))
    assert sae.hookpoint == "layers.6"
    for place, hookpoint in enumerate(("layers.7", "layers.6.mlp", None)):
        replace(sae, hookpoint=hookpoint).save(tmp_path / str(place), "saelens")
        held = sf.SAE.load(tmp_path / str(place)).hookpoint
        assert held == (hookpoint if hookpoint == "layers.7" else None)
    assert sae.config["metadata"]["hook_name"] == "blocks.6.hook_resid_post"


def test_a_hookpoint_keeps_the_name_that_saelens_gave_it(tmp_path):
    named = {"hook_name": "blocks.7.hook_resid_pre"}
    sae = sf.SAE.load(saelens(tmp_path / "sae", random(), "topk", k=K, metadata=named))
    sae.save(tmp_path / "again", "saelens")
    told = json.loads((tmp_path / "again/cfg.json").read_text())["metadata"]
    assert named.items() <= told.items()


def test_saelens_is_told_that_a_file_is_not_from_before_6(tmp_path):
    sf.SAE(*list(random().values())[:4], k=K).save(tmp_path, "saelens")
    told = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert told["sae_lens_version"] == "6.0.0"


@pytest.mark.parametrize("wide", ["b_enc", "W_dec", "threshold"])
def test_saelens_is_told_a_dtype_that_holds_every_weight(tmp_path, wide):
    w = random(dtype=torch.bfloat16)
    w[wide] = w[wide].float()
    held = {key: w[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    sf.SAE(**held, measure="threshold").save(tmp_path, "saelens")
    assert json.loads((tmp_path / "cfg.json").read_text())["dtype"] == "float32"


def test_settings_of_another_format_are_not_saved(tmp_path):
    sf.SAE.load(saelens(tmp_path / "sae", random(), "topk", k=K)).save(tmp_path / "again")
    assert "metadata" not in json.loads((tmp_path / "again/cfg.json").read_text())


def test_negated_views(tmp_path):
    """Only a flag tells them from what is stored."""
    w = random()
    state = linear(w) | {"b_dec": w["b_dec"]} | batch()
    state["encoder.weight"] = torch._neg_view(w["W_enc"])
    with pytest.raises(ValueError, match=r"encoder\.weight is a negated view"):
        sf.SAE.load(trained(tmp_path, w, "AutoEncoderTopK", state, k=K))


@pytest.mark.parametrize("shape", [(), (5,), (0, N), (D, 0)], ids=str)
@pytest.mark.parametrize("write", [gemma_2, numpy])
def test_sizes_that_a_matrix_does_not_tell(tmp_path, write, shape):
    path = binary(write(tmp_path / "sae", random()))
    if write is numpy:
        np.savez(path, **dict(np.load(path)) | {"W_enc": np.ones(shape, np.float32)})
    else:
        save_file(load_file(path) | {"w_enc": torch.ones(shape)}, path)
    with pytest.raises(ValueError, match=r"[wW]_enc has shape .*, \[d, N\] is needed, none of"):
        sf.SAE.load(path.parent)


def test_unused_finetuning_factors(tmp_path):
    w = random()
    saelens(tmp_path, w, "standard")
    weights = tmp_path / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"scaling_factor": torch.ones(N)}, weights)
    assert torch.equal(sf.SAE.load(tmp_path).W_dec, w["W_dec"])


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (torch.full((N,), 2.0), "is not 1"),
        (torch.ones(N).index_fill(0, torch.tensor(3), 2.0), "is not 1"),
        (torch.ones(N).double(), "is F64, accepted are F32, BF16, F16"),
        (torch.ones(5, 0), r"has shape \(5, 0\), \(24,\) is needed"),
        (torch.ones(0), r"has shape \(0,\), \(24,\) is needed"),
    ],
    ids=["all", "one", "fp64", "[5, 0]", "[0]"],
)
def test_other_finetuning_factors(tmp_path, factors, message):
    saelens(tmp_path, random(), "standard")
    weights = tmp_path / "sae_weights.safetensors"
    save_file(load_file(weights) | {"scaling_factor": factors}, weights)
    with pytest.raises(ValueError, match=f"^{re.escape(str(weights))}: scaling_factor {message}"):
        sf.SAE.load(tmp_path)


BROKEN = [
    "saelens-topk",
    "dictionary_learning-BatchTopKSAE",
    "gemma_scope",
    "gemma_scope_2",
    "qwen_scope",
    "openai-topk",
]

TRANSCODER = "output is not its input's stream"
SETTINGS = {
    "saelens-transcoder": (
        lambda f, w: saelens(f, w, "skip_transcoder"),
        f"architecture is 'skip_transcoder', accepted are standard, .*{TRANSCODER}",
    ),
    "saelens-architecture": (
        lambda f, w: saelens(f, w, "jumprellu"),
        "architecture is 'jumprellu', accepted are .*did you mean 'jumprelu'",
    ),
    "saelens-no-text": (
        lambda f, w: saelens(f, w, ["topk"]),
        r"architecture is \['topk'\], accepted are",
    ),
    "saelens-whitening": (
        lambda f, w: saelens(f, w, "standard", normalize_activations="covariance_whitening"),
        "normalize_activations is 'covariance_whitening', accepted are none, layer_norm",
    ),
    "saelens-k": (lambda f, w: saelens(f, w, "topk"), "cfg.json: lacks k$"),
    "saelens-k-text": (lambda f, w: saelens(f, w, "topk", k="4"), "k is '4', an integer"),
    "saelens-k-large": (
        lambda f, w: saelens(f, w, "topk", k=25),
        "k: got 25, accepted are 1 to 24",
    ),
    "saelens-width": (
        lambda f, w: saelens(f, w, "standard", d_in=12),
        r"W_enc has shape \(10, 24\), \(12, 24\) is needed",
    ),
    "saelens-transposed": (
        lambda f, w: saelens(f, w, "standard", d_in=24, d_sae=10),
        r"W_enc has shape \(10, 24\), \(24, 10\) is needed; it is transposed",
    ),
    "saelens-flag": (
        lambda f, w: saelens(f, w, "standard", apply_b_dec_to_input="yes"),
        "apply_b_dec_to_input is 'yes', true or false",
    ),
    "saelens-decoder-norm": (
        lambda f, w: saelens(f, w, "gated", rescale_acts_by_decoder_norm=True),
        "decoder_norm: measure 'gated' does not use it",
    ),
    "saelens-old-activation": (
        lambda f, w: flat(f, w, activation_fn_str="tanh-relu"),
        "activation_fn is 'tanh-relu', accepted are relu, topk",
    ),
    "saelens-old-scale": (
        lambda f, w: flat(f, w, normalize_activations=True),
        "'expected_average_only_in', and there is no",
    ),
    "saelens-old-kwargs": (
        lambda f, w: flat(f, w, activation_fn_str="topk", activation_fn_kwargs=[3]),
        r"cfg\.json: activation_fn_kwargs is \[3\], an object is needed",
    ),
    "dictionary-class": (
        lambda f, w: trained(f, w, "AutoEncoderTopk", linear(w)),
        "dict_class is 'AutoEncoderTopk', accepted are .*did you mean 'AutoEncoderTopK'",
    ),
    "dictionary-keys": (
        lambda f, w: trained(f, w, "AutoEncoder", linear(w) | {"bais": w["b_dec"]}),
        "lacks bias; is it called 'bais'",
    ),
    "dictionary-extra": (
        lambda f, w: trained(
            f, w, "AutoEncoder", linear(w) | {"bias": w["b_dec"], "x": w["b_enc"]}
        ),
        "holds x besides",
    ),
    "dictionary-unset": (
        lambda f, w: trained(
            f, w, "BatchTopKSAE", linear(w) | {"b_dec": w["b_dec"]} | batch(-1.0), k=K
        ),
        "threshold is not set",
    ),
    "dictionary-without": (
        lambda f, w: trained(
            f,
            w,
            "BatchTopKSAE",
            linear(w) | {"b_dec": w["b_dec"], "k": torch.tensor(K, dtype=torch.int)},
            k=K,
        ),
        "threshold is not set",
    ),
    "dictionary-k": (
        lambda f, w: trained(
            f, w, "AutoEncoderTopK", linear(w) | {"b_dec": w["b_dec"]} | batch(), k=5
        ),
        "k is 5, but 4 in ae.pt",
    ),
    "dictionary-k-text": (
        lambda f, w: trained(f, w, "AutoEncoderTopK", linear(w) | {"b_dec": w["b_dec"]}, k="3"),
        r"config\.json: k is '3', an integer",
    ),
    "dictionary-k-flag": (
        lambda f, w: trained(f, w, "AutoEncoderTopK", linear(w) | {"b_dec": w["b_dec"]}, k=True),
        r"config\.json: k is True, an integer",
    ),
    "dictionary-k-float": (
        lambda f, w: trained(
            f, w, "AutoEncoderTopK", linear(w) | {"b_dec": w["b_dec"], "k": torch.tensor(4.0)}
        ),
        r"ae\.pt: k is 4\.0, an integer",
    ),
    "dictionary-thresholds": (
        lambda f, w: trained(
            f, w, "BatchTopKSAE", linear(w) | {"b_dec": w["b_dec"], "threshold": w["threshold"]}
        ),
        r"ae\.pt: threshold is no number",
    ),
    "dictionary-threshold-double": (
        lambda f, w: trained(
            f,
            w,
            "BatchTopKSAE",
            linear(w) | {"b_dec": w["b_dec"], "threshold": torch.tensor(0.5).double()},
        ),
        r"ae\.pt: threshold is no number",
    ),
    "dictionary-no-size": (
        lambda f, w: trained(f, w, "AutoEncoder", linear(w), dict_size=...),
        "lacks dict_size$",
    ),
    "dictionary-size": (
        lambda f, w: trained(f, w, "AutoEncoder", linear(w), dict_size="24"),
        "dict_size is '24', an integer",
    ),
    "dictionary-dtype": (
        lambda f, w: trained(
            f, w, "AutoEncoder", linear(w) | {"bias": torch.ones(D, dtype=torch.int8)}
        ),
        "bias is torch.int8, accepted are F32, BF16, F16",
    ),
    "gemma-2-transcoder": (
        lambda f, w: gemma_2(f, w, hf_hook_point_out="model.layers.12.mlp.output"),
        TRANSCODER,
    ),
    "gemma-2-affine": (lambda f, w: gemma_2(f, w, affine_connection=True), TRANSCODER),
    "gemma-2-architecture": (
        lambda f, w: gemma_2(f, w, architecture="topk"),
        "architecture is 'topk', accepted is jump_relu",
    ),
    "llama-transcoder": (
        lambda f, w: llama(f, w, hook_point_out="blocks.19.hook_mlp_out"),
        TRANSCODER,
    ),
    "llama-activation": (lambda f, w: llama(f, w, act_fn="relu"), "act_fn is 'relu', accepted are"),
    "llama-topk": (lambda f, w: llama(f, w, act_fn="topk"), "act_fn is 'topk', accepted are"),
    "llama-norm": (
        lambda f, w: llama(f, w, norm_activation="token-wise"),
        "norm_activation is 'token-wise', accepted are 'dataset-wise', 'inference'",
    ),
    "llama-no-norm": (
        lambda f, w: llama(f, w, dataset_average_activation_norm=None),
        "dataset_average_activation_norm is None",
    ),
    "llama-two-norms": (
        lambda f, w: llama(f, w, dataset_average_activation_norm={"in": 17.125, "out": 16.0}),
        '"out": the same} is needed',
    ),
    "llama-negative-norm": (
        lambda f, w: llama(f, w, dataset_average_activation_norm={"in": -1.0, "out": -1.0}),
        "dataset_average_activation_norm is .* a positive number",
    ),
    "llama-threshold": (
        lambda f, w: llama(f, w, jump_relu_threshold=0.0),
        "jump_relu_threshold is 0.0, a positive number is needed",
    ),
    "llama-threshold-flag": (
        lambda f, w: llama(f, w, jump_relu_threshold=True),
        "jump_relu_threshold is True, a positive number is needed",
    ),
    "llama-size": (lambda f, w: llama(f, w, d_sae=0), "d_sae is 0, an integer of at least 1"),
    "llama-glu": (lambda f, w: llama(f, w, use_glu_encoder=True), "use_glu_encoder is True"),
    "llama-flag": (
        lambda f, w: llama(f, w, sparsity_include_decoder_norm="false"),
        "sparsity_include_decoder_norm is 'false', accepted are True, False",
    ),
    "llama-other-flag": (
        lambda f, w: llama(f, w, apply_decoder_bias_to_pre_encoder="false"),
        "apply_decoder_bias_to_pre_encoder is 'false', accepted are True, False",
    ),
    "openai-identity": (
        lambda f, w: openai(f, w, postact="Identity"),
        "postact_fn is 'Identity', accepted is ReLU; another lets negative",
    ),
    "openai-activation": (lambda f, w: openai(f, w, "GELU"), "activation is 'GELU', accepted are"),
    "openai-no-activation": (
        lambda f, w: openai(f, w, "Identity"),
        "activation is 'Identity', accepted are TopK, ReLU",
    ),
    "openai-state": (
        lambda f, w: openai(f, w, activation_state_dict=[3]),
        r"6\.pt: activation_state_dict is \[3\], an object is needed",
    ),
    "openai-k-text": (
        lambda f, w: openai(f, w, activation_state_dict={"k": "3", "postact_fn": "ReLU"}),
        r"6\.pt: k is '3', an integer",
    ),
    "openai-no-k": (
        lambda f, w: openai(f, w, activation_state_dict={"postact_fn": "ReLU"}),
        r"6\.pt: lacks k$",
    ),
}


@pytest.mark.fault(34, 35, 39, 40, 41)
@pytest.mark.parametrize("name", SETTINGS)
def test_what_cannot_be_said_is_refused_by_name(tmp_path, name):
    write, message = SETTINGS[name]
    with pytest.raises(ValueError, match=message) as caught:
        sf.SAE.load(write(tmp_path / "sae", random()))
    assert str(caught.value).startswith(str(tmp_path))


def test_a_trainer_that_is_no_object(tmp_path):
    w = random()
    trained(tmp_path, w, "AutoEncoder", linear(w))
    dump(tmp_path / "config.json", {"trainer": [1]})
    with pytest.raises(ValueError, match=r"config\.json: trainer is \[1\], an object is needed"):
        sf.SAE.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("saelens-topk", "cfg.json"),
        ("dictionary_learning-AutoEncoder", "config.json"),
        ("llama", "hyperparams.json"),
    ],
)
def test_a_configuration_that_is_missing(tmp_path, name, missing):
    write = llama if name == "llama" else PLAIN[name][0]
    place = write(tmp_path / "sae", random())
    (place / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(place))}: lacks {missing}$"):
        sf.SAE.load(place)


def test_qwen_scope_needs_k_in_a_name(tmp_path):
    path = qwen(tmp_path, random()).rename(tmp_path / "layer6.sae.pt")
    with pytest.raises(ValueError, match=r"k is told by the folder's name, \.\.\.-L0_<k>"):
        sf.SAE.load(path)


def test_the_nearest_name_tells_k(tmp_path):
    path = qwen(tmp_path / "all-L0_9", random())
    assert sf.SAE.load(path).k == 4
    folder = path.parent.rename(tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_12")
    assert sf.SAE.load(folder / path.name).k == 12


def test_a_folder_of_layers_names_them(tmp_path):
    path = qwen(tmp_path, random())
    with pytest.raises(FileNotFoundError, match=r"SAEs are inside: layer6\.sae\.pt$"):
        sf.SAE.load(path.parent)
    path.with_name("layer7.sae.pt").write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"SAEs are inside: layer6\.sae\.pt, layer7"):
        sf.SAE.load(path.parent)


def test_a_folder_of_several_pt_files_names_them(tmp_path):
    path = openai(tmp_path, random())
    assert sf.SAE.load(tmp_path).k == K
    path.with_name("7.pt").write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"holds no SAE.*SAEs are inside: 6\.pt, 7\.pt$"):
        sf.SAE.load(tmp_path)


def test_a_file_of_no_known_format(tmp_path):
    (tmp_path / "sae.bin").touch()
    with pytest.raises(ValueError, match=r"sae\.bin is a file of no known format; give a folder"):
        sf.SAE.load(tmp_path / "sae.bin")


def test_two_formats_in_one_folder(tmp_path):
    sae = sf.SAE(*list(random().values())[:4], k=K)
    sae.save(tmp_path / "both", "sparsify")
    saelens(tmp_path / "both", random(), "standard")
    with pytest.raises(ValueError, match="holds SAEs in two formats, sparsify and saelens"):
        sf.SAE.load(tmp_path / "both")


@pytest.mark.parametrize("to", ["sparsify", "saelens"])
@pytest.mark.parametrize("name", ["sparsify", *BROKEN])
def test_saving_over_another_format_is_refused(tmp_path, name, to):
    sae = sf.SAE(*list(random(seed=1).values())[:4], k=K)
    place = tmp_path / "sae"
    if name == "sparsify":
        sae.save(place)
    else:
        place = PLAIN[name][0](place, random())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if name.startswith(to):
        sae.save(place, to)
        assert torch.equal(sf.SAE.load(place).W_enc, sae.W_enc)
        return
    held = name_of(place)
    with pytest.raises(ValueError, match=f"holds files of {held}, {to} needs another folder"):
        sae.save(place, to)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_unknown_settings_are_reported(tmp_path):
    with pytest.warns(UserWarning, match="noise is not known and ignored"):
        sf.SAE.load(saelens(tmp_path, random(), "standard", noise=0.1))


@pytest.mark.parametrize("path", [None, 3, b"sae"])
def test_what_is_no_path_is_named(path):
    with pytest.raises(TypeError, match=f"path: got {path!r}, a path or a repository's name"):
        sf.SAE.load(path)
    with pytest.raises(TypeError, match=f"path: got {path!r}, a path is needed"):
        sf.SAE(*list(random().values())[:4], k=K).save(path)


def test_unknown_format_to_save(tmp_path):
    sae = sf.SAE(*list(random().values())[:4], k=K)
    with pytest.raises(ValueError, match=r"format: got 'sparsfy', accepted are .*mean 'sparsify'"):
        sae.save(tmp_path, "sparsfy")


def binary(path: Path) -> Path:
    if path.is_file():
        return path
    patterns = ("*.safetensors", "*.pt", "*.npz")
    return next(found for pattern in patterns for found in path.rglob(pattern))


@pytest.mark.fault(32)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("name", BROKEN)
def test_cut_short(tmp_path, name, keep):
    place = PLAIN[name][0](tmp_path / "sae", random())
    path = binary(place)
    os.truncate(path, int(keep * path.stat().st_size))
    with pytest.raises(ValueError, match=r"not a whole (safetensors file|zip archive)"):
        sf.SAE.load(place)


@pytest.mark.fault(32)
@pytest.mark.parametrize("name", ["dictionary_learning-BatchTopKSAE", "gemma_scope", "qwen_scope"])
def test_what_follows_an_archive_does_no_harm(tmp_path, name):
    w = random()
    place = PLAIN[name][0](tmp_path / "sae", w)
    with binary(place).open("ab") as file:
        file.write(b"?")
    assert torch.equal(sf.SAE.load(place).W_dec, w["W_dec"])


@pytest.mark.fault(37)
@pytest.mark.parametrize("name", ["dictionary_learning-BatchTopKSAE", "gemma_scope", "qwen_scope"])
def test_flipped_bit_in_an_archive(tmp_path, name):
    w = random()
    place = PLAIN[name][0](tmp_path / "sae", w)
    path = binary(place)
    content = bytearray(path.read_bytes())
    content[content.index(w["b_enc"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged \(Bad CRC-32"):
        sf.SAE.load(place)


def test_flipped_bit_in_a_view_of_a_longer_storage(tmp_path):
    """The checksum is compared at the storage's end, which no weight needs."""
    w = random()
    longer = torch.cat([w["b_dec"], torch.zeros(10_000)])
    state = linear(w) | {"b_dec": longer[:D]} | batch()
    path = trained(tmp_path, w, "AutoEncoderTopK", state, k=K) / "ae.pt"
    content = bytearray(path.read_bytes())
    content[content.index(w["b_dec"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"b_dec is damaged \(Bad CRC-32"):
        sf.SAE.load(tmp_path)


@pytest.mark.fault(37)
@pytest.mark.parametrize("format", ["sparsify", "saelens"])
@pytest.mark.parametrize("key", ["W_enc", "W_dec", "b_dec"])
def test_flipped_bit_in_what_was_saved_here(tmp_path, format, key):
    w = random()
    sf.SAE(*list(w.values())[:4], k=K).save(tmp_path, format)
    path = binary(tmp_path)
    content = bytearray(path.read_bytes())
    lies = w[key].T.contiguous() if (format, key) == ("saelens", "W_enc") else w[key]
    content[content.index(lies.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its checksum differs"):
        sf.SAE.load(tmp_path)


@pytest.mark.fault(36)
@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_no_numbers(tmp_path, name, value):
    w = random()
    w["W_dec"][5, 3] = value
    with pytest.raises(ValueError, match="W_dec: NaN or infinity in row 5"):
        sf.SAE.load(PLAIN[name][0](tmp_path / "sae", w))


@pytest.mark.fault(38)
@pytest.mark.parametrize("name", BROKEN)
def test_integer_weights(tmp_path, name):
    w = random()
    w["W_dec"] = w["W_dec"].char()
    with pytest.raises(ValueError, match=r"is (I8|int8|torch.int8), accepted are F32, BF16, F16"):
        sf.SAE.load(PLAIN[name][0](tmp_path / "sae", w))


class Bomb:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.mark.fault(42)
@pytest.mark.parametrize(
    "name", ["ae.pt", "layer6.sae.pt", "autoencoder.pt", "sae_weights.safetensors"]
)
def test_pickles_are_not_executed(tmp_path, name):
    witness = tmp_path / "executed"
    saelens(tmp_path, random(), "standard")
    (tmp_path / "sae_weights.safetensors").unlink()
    dump(tmp_path / "config.json", {"trainer": {"dict_class": "AutoEncoder"}})
    torch.save({"encoder.weight": torch.ones(2, 2), "bomb": Bomb(witness)}, tmp_path / name)
    for place in (tmp_path, tmp_path / name):
        with pytest.raises((ValueError, FileNotFoundError)):
            sf.SAE.load(place)
    assert not witness.exists()


def with_pickle(path: Path, pickled: bytes) -> Path:
    """A copy of a .pt file with another pickle."""
    copy = path.with_name("copy.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("/data.pkl") else old.read(name))
    return copy


@pytest.mark.parametrize("made", [Bomb(Path("executed")), Fraction(1), np.ones(3)])
def test_a_refused_pickle_names_what_it_would_execute(tmp_path, made):
    torch.save({"W_enc": torch.ones(2, 2), "made": made}, tmp_path / "6.pt")
    names = r"posix\.mkdir|fractions\.Fraction|numpy\._?core\.multiarray\._reconstruct"
    with pytest.raises(ValueError, match=rf"6\.pt: holds objects .* \(({names})\)") as refused:
        sf.SAE.load(tmp_path / "6.pt")
    assert not re.search("torch.load|weights_only|trust|\x1b", str(refused.value))


@pytest.mark.parametrize("pickled", [b"", b"\x80\x02\xff.", b"\x80\x02", b"\x80\x02."])
def test_a_damaged_pickle_is_refused_without_torchs_advice(tmp_path, pickled):
    path = with_pickle(openai(tmp_path, random()), pickled)
    with pytest.raises(ValueError, match=r"copy\.pt: is damaged, or holds more") as refused:
        sf.SAE.load(path)
    assert not re.search("torch.load|weights_only|trust|\x1b", str(refused.value))


@pytest.mark.fault(42)
def test_pickled_arrays_are_not_executed(tmp_path):
    witness = tmp_path / "executed"
    arrays = {key: tensor.numpy() for key, tensor in matrices(random()).items()}
    bomb = np.array([Bomb(witness)], dtype=object)
    np.savez(tmp_path / "params.npz", **arrays, threshold=bomb)
    with pytest.raises(ValueError, match="threshold is object, accepted are F32"):
        sf.SAE.load(tmp_path)
    assert not witness.exists()


def test_a_pt_file_from_a_big_endian_machine(tmp_path):
    path = openai(tmp_path, random())
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "big.pt", "w") as new:
        for name in old.namelist():
            big = name.endswith("/byteorder")
            new.writestr(name.replace("6/", "big/", 1), b"big" if big else old.read(name))
    with pytest.raises(ValueError, match=r"big\.pt: its numbers are big-endian"):
        sf.SAE.load(tmp_path / "big.pt")


def test_a_pt_file_where_meta_tensors_do_not_say_where_their_numbers_lie(tmp_path, monkeypatch):
    """As in PyTorch 2.10: their storages have the attribute, but it is None."""
    load = torch.load

    def older(*args, map_location=None, **kwargs):
        content = load(*args, map_location=map_location, **kwargs)
        if map_location == "meta":
            for tensor in (value for value in content.values() if isinstance(value, Tensor)):
                tensor.untyped_storage()._checkpoint_offset = None
        return content

    w = random()
    path = openai(tmp_path, w)
    monkeypatch.setattr(torch, "load", older)
    assert torch.equal(sf.SAE.load(path).W_enc, w["W_enc"])


def test_a_pt_file_older_than_zip(tmp_path):
    w = random()
    path = openai(tmp_path, w)
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="not a whole zip archive"):
        sf.SAE.load(path)


@pytest.mark.fault(46)
def test_an_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("../../evil.npy", b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"is no array"):
        sf.SAE.load(tmp_path)
    torch.save([torch.ones(2)], tmp_path / "autoencoder.pt")
    with pytest.raises(ValueError, match="holds a list, a state dict is needed"):
        sf.SAE.load(tmp_path / "autoencoder.pt")


Write = Callable[[BinaryIO, np.ndarray], None]


def savez(write: Write) -> Callable[..., None]:
    """numpy.savez, were `write` numpy.save."""

    def save(path: Path, **arrays: np.ndarray):
        with zipfile.ZipFile(path, "w") as archive:
            for key, array in arrays.items():
                with archive.open(f"{key}.npy", "w") as stream:
                    write(stream, array)

    return save


def npy(major: int) -> Write:
    return lambda stream, array: np.lib.format.write_array(stream, array, (major, 0))


def before_1_14(stream: BinaryIO, array: np.ndarray):
    """As NumPy was then: a header's end was a multiple of 16 bytes, not of 64."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {array.shape}, }}"
    header += " " * (-(len(header) + 11) % 16) + "\n"
    stream.write(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode())
    stream.write(array.tobytes())


@pytest.mark.parametrize("write", [npy(2), before_1_14], ids=["2.0", "before 1.14"])
def test_arrays_with_other_headers(tmp_path, write):
    w = random()
    sae = sf.SAE.load(numpy(tmp_path / "sae", w, savez(write)))
    for key in ("W_enc", "W_dec", "b_dec", "threshold"):
        assert torch.equal(getattr(sae, key), w[key]), key


def big_endian(stream: BinaryIO, array: np.ndarray):
    np.save(stream, array.astype(">f4"))


def cut_short(stream: BinaryIO, array: np.ndarray):
    whole = io.BytesIO()
    np.save(whole, array)
    stream.write(whole.getvalue()[:-4])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (npy(3), "is no array"),
        (big_endian, "is >f4, accepted are F32, BF16, F16"),
        (cut_short, "is cut short"),
    ],
    ids=["3.0", "big-endian", "cut short"],
)
def test_arrays_that_cannot_be_read_are_named(tmp_path, write, message):
    place = numpy(tmp_path / "sae", random(), savez(write))
    with pytest.raises(ValueError, match=rf"params\.npz: W_enc {message}"):
        sf.SAE.load(place)


@pytest.mark.fault(45)
@pytest.mark.parametrize("name", BROKEN)
def test_files_may_be_cut_short_once_loaded(tmp_path, name):
    w = random()
    place = PLAIN[name][0](tmp_path / "sae", w)
    sae = sf.SAE.load(place)
    os.truncate(binary(place), 0)
    assert torch.equal(sae.W_enc, w["W_enc"]) and torch.equal(sae.W_dec, w["W_dec"])


@pytest.mark.fault(46)
def test_links_are_followed(tmp_path):
    place = saelens(tmp_path / "sae", random(), "standard", metadata={})
    (tmp_path / "layers.9").symlink_to(place)
    assert sf.SAE.load(tmp_path / "layers.9").hookpoint == "layers.9"
    (tmp_path / "layers.8").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no folder .*layers\.8; the link leads to"):
        sf.SAE.load(tmp_path / "layers.8")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "`git lfs pull` brings it",
        ),
        (b"<!doctype html><title>Not found</title>", "it is a web page"),
    ],
)
def test_what_was_downloaded_in_place_of_weights_is_named(tmp_path, content, told):
    place = saelens(tmp_path / "sae", random(), "standard", metadata={})
    binary(place).write_bytes(content)
    with pytest.raises(ValueError, match=f"not a whole safetensors file .*; .*{told}"):
        sf.SAE.load(place)


def test_paths_as_people_write_them(tmp_path, monkeypatch):
    saelens(tmp_path / "saes" / "layers.9", random(), "standard", metadata={})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sf.SAE.load("~/saes/layers.9").hookpoint == "layers.9"
    with pytest.raises(FileNotFoundError, match="a repository on the Hub is named org/name"):
        sf.SAE.load("https://huggingface.co/EleutherAI/sae-llama-3-8b-32x")
    with pytest.raises(ValueError, match="path: is empty, a path or a repository's name"):
        sf.SAE.load("")


@pytest.mark.fault(46)
@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", BROKEN)
def test_unreadable(tmp_path, name):
    place = PLAIN[name][0](tmp_path / "sae", random())
    binary(place).chmod(0)
    with pytest.raises(OSError):
        sf.SAE.load(place)


def status(key: str, loaded: str, place: str) -> str:
    return f"""
        import sys
        import saesteer_fast as sf
        def status(key):
            with open("/proc/self/status") as file:
                lines = dict(line.split(":", 1) for line in file)
            return 1024 * int(lines[key].split()[0])
        sf.SAE.load({loaded!r}).b_enc_folded
        before = status("VmRSS")
        sae = sf.SAE.load({place!r})
        sae.b_enc_folded
        print((status({key!r}) - before) / (sae.W_enc.nbytes + sae.W_dec.nbytes))
    """


@pytest.mark.fault(47)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("sparsify", torch.float32),
        ("saelens-topk", torch.float32),
        ("dictionary_learning-AutoEncoderTopK", torch.float32),
        ("gemma_scope", torch.float32),
    ],
)
def test_loading_takes_the_memory_of_the_weights(tmp_path, name, dtype):
    def write(folder: Path, w: dict) -> Path:
        if name == "sparsify":
            sf.SAE(*list(w.values())[:4], k=K).save(folder)
            return folder
        return PLAIN[name][0](folder, w)

    small = write(tmp_path / "small", random(dtype=dtype))
    large = write(tmp_path / "large", random(8192, 1024, dtype))
    script = textwrap.dedent(status("VmHWM", str(small), str(large)))
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )
    # A second copy of either matrix is half as much again; the rest is what pages and malloc keep.
    assert 0.9 < float(result.stdout) <= 1.3
