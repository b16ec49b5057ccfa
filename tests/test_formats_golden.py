"""SAE files that the libraries themselves saved or read (golden/record.py): same activations,
reconstructions, steering; and what is saved again is the same bit for bit."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import saesteer_fast as sf
from saesteer_fast.cli import main

CASES = {
    "dictionary_learning-batchtopk": ("threshold", "layers.6"),
    "dictionary_learning-gated": ("gated", "layers.6"),
    "dictionary_learning-jumprelu": ("threshold", "layers.6"),
    "dictionary_learning-matryoshka": ("threshold", "layers.6"),
    "dictionary_learning-relu": ("relu", "layers.6"),
    "dictionary_learning-relu-decoder-norm": ("relu", "layers.6"),
    "dictionary_learning-relu-new": ("relu", "layers.6"),
    "dictionary_learning-topk": ("topk", "layers.6"),
    "gemma_scope-embedding": ("threshold", None),
    "gemma_scope-jumprelu": ("threshold", None),
    "gemma_scope_2-jumprelu": ("threshold", "layers.6"),
    "llama_scope-jumprelu": ("threshold", "layers.6"),
    "openai-relu": ("relu", None),
    "openai-topk": ("topk", None),
    "qwen_scope-topk": ("topk", "layers.6"),
    "saelens-gated": ("gated", None),
    "saelens-jumprelu": ("threshold", None),
    "saelens-standard": ("relu", None),
    "saelens-standard-scaled": ("relu", None),
    "saelens-topk": ("topk", None),
    "saelens-topk-constant-norm": ("topk", None),
    "saelens-topk-decoder-norm": ("topk", None),
    "saelens-topk-layer-norm": ("topk", None),
    "saelens-topk-no-b_dec": ("topk", None),
    "saelens_5-standard": ("relu", "layers.6"),
    "saelens_5-topk": ("topk", "layers.6"),
    "sparsify-groupmax": ("groupmax", None),
    "sparsify-topk": ("topk", None),
    "sparsify-topk-default-width": ("topk", None),
}
REFUSED = {
    "sparsify": {
        "dictionary_learning-batchtopk": "has no measure 'threshold'",
        "dictionary_learning-gated": "has no measure 'gated'",
        "dictionary_learning-jumprelu": "has no measure 'threshold'",
        "dictionary_learning-matryoshka": "has no measure 'threshold'",
        "dictionary_learning-relu": "has no measure 'relu'",
        "dictionary_learning-relu-decoder-norm": "has no measure 'relu'",
        "dictionary_learning-relu-new": "has no measure 'relu'",
        "gemma_scope-embedding": "has no measure 'threshold'",
        "gemma_scope-jumprelu": "has no measure 'threshold'",
        "gemma_scope_2-jumprelu": "has no measure 'threshold'",
        "llama_scope-jumprelu": "has no measure 'threshold'",
        "openai-relu": "has no measure 'relu'",
        "openai-topk": "cannot say normalize='layer_norm'",
        "qwen_scope-topk": "cannot say subtract_b_dec=False",
        "saelens-gated": "has no measure 'gated'",
        "saelens-jumprelu": "has no measure 'threshold'",
        "saelens-standard": "has no measure 'relu'",
        "saelens-standard-scaled": "has no measure 'relu'",
        "saelens-topk-constant-norm": "cannot say normalize='constant_norm'",
        "saelens-topk-decoder-norm": r"cannot say decoder_norm=True; fold\(\) the SAE first",
        "saelens-topk-layer-norm": "cannot say normalize='layer_norm'",
        "saelens-topk-no-b_dec": "cannot say subtract_b_dec=False",
        "saelens_5-standard": "has no measure 'relu'",
    },
    "saelens": {
        "dictionary_learning-relu-decoder-norm": r"decoder_norm for 'relu'; fold\(\) the SAE first",
        "llama_scope-jumprelu": r"decoder_norm for 'threshold'; fold\(\) the SAE first",
        "saelens-standard-scaled": r"cannot say scale=0.8; fold\(\) the SAE first",
        "sparsify-groupmax": "has no measure 'groupmax'",
    },
}


# The libraries compute in fp32 in another order: sums of 12 terms of size about 1, and for recon
# and steered sums over the live latents, agree to a unit in the last place a term.
@pytest.mark.fault(40, 41)
@pytest.mark.parametrize("name", CASES)
def test_same_as_the_library(golden, name):
    case = golden(name)
    sae = sf.SAE.load(case.folder)
    assert (sae.measure, sae.hookpoint) == CASES[name]
    assert (sae.d, sae.num_latents, sae.k) == (case.x.shape[-1], case.acts.shape[-1], case.k)
    live = (case.acts > 0).sum(-1).max().item()
    close = {"atol": (8 + live) * 2.0**-24 * case.steered.abs().max().item(), "rtol": 0}

    acts = sae.encode(case.x)
    assert torch.equal(acts > 0, case.acts > 0)
    torch.testing.assert_close(acts, case.acts, **close)
    torch.testing.assert_close(sae.decode(acts, case.x), case.recon, **close)
    torch.testing.assert_close(sf.steer(case.x, sae, case.edits), case.steered, **close)
    assert (case.steered - case.x).abs().max() > 1
    dropped = sf.steer(case.x, sae, case.edits, error="drop")
    torch.testing.assert_close(dropped, case.recon + (case.steered - case.x), **close)


def test_every_recorded_case_is_tried():
    recorded = Path(__file__).with_name("golden").glob("*/case.json")
    assert CASES.keys() == {case.parent.name for case in recorded}


def same(one: sf.SAE, other: sf.SAE) -> None:
    for field in fields(sf.SAE):
        mine, its = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == its.dtype and torch.equal(mine, its), field.name
        elif field.name not in ("config", "hookpoint"):
            assert mine == its, field.name


@pytest.mark.parametrize("to", ["sparsify", "saelens"])
@pytest.mark.parametrize("name", CASES)
def test_converting_loses_no_bit(golden, tmp_path, name, to, capsys):
    source = golden(name).folder
    target = tmp_path / "layers.6"
    if why := REFUSED[to].get(name):
        with pytest.raises(SystemExit, match=why):
            main(["convert", str(source), str(target), "--to", to])
        assert not target.exists()
        return
    main(["convert", str(source), str(target), "--to", to])
    assert "Written: " in capsys.readouterr().out
    back = sf.SAE.load(target)
    same(sf.SAE.load(source), back)
    assert back.hookpoint == "layers.6"


@pytest.mark.parametrize(
    "name",
    [n for to in REFUSED for n in CASES if n.startswith(f"{to}-") and n not in REFUSED[to]],
)
def test_saved_again_as_the_library_saved_it(golden, tmp_path, name):
    source = golden(name).folder
    sf.SAE.load(source).save(tmp_path / "again", name.partition("-")[0])
    (weights,) = source.glob("*.safetensors")
    ours, theirs = load_file(tmp_path / "again" / weights.name), load_file(weights)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    read = [
        json.loads((folder / "cfg.json").read_text()) for folder in (tmp_path / "again", source)
    ]
    assert read[0] == read[1]


@pytest.mark.parametrize("to", ["sparsify", "saelens"])
def test_folding_makes_decoder_norms_expressible(golden, tmp_path, to):
    case = golden("saelens-topk-decoder-norm")
    main(["convert", str(case.folder), str(tmp_path / "folded"), "--to", to, "--fold"])
    sae = sf.SAE.load(tmp_path / "folded")
    assert not sae.decoder_norm
    close = {"atol": 16 * 2.0**-23 * case.steered.abs().max().item(), "rtol": 0}
    torch.testing.assert_close(sf.steer(case.x, sae, case.edits), case.steered, **close)
    torch.testing.assert_close(sae.encode(case.x), case.acts, **close)
