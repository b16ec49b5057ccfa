"""Gemma Scope's formats: JumpReLU SAEs that take no b_dec off their input.

    params.npz (1)           W_enc [d, N], W_dec [N, d], b_enc [N], b_dec [d], threshold [N]
    params.safetensors (2)   the same as w_enc and w_dec; beside it, mostly, config.json

Folders of 1 are named layer_20/width_16k/average_l0_71, in a repository whose name tells the site;
SAEs of the embedding see it divided by sqrt(d). Source: SAELens 6.54, the loaders for gemma_2 and
gemma_3 SAEs.
"""

from __future__ import annotations

import re
from pathlib import Path

from .. import hookpoints
from . import settings
from .files import Safetensors, Tensors, read_json, read_weights
from .protocol import Fields
from .zips import Numpy

FILES = ("params.npz", "params.safetensors", "config.json")
NEEDED = "params.npz or params.safetensors"

_LAYOUT = {
    "W_enc": ("W_enc", "dN"),
    "b_enc": ("b_enc", "N"),
    "threshold": ("threshold", "N"),
    "W_dec": ("W_dec", "Nd"),
    "b_dec": ("b_dec", "d"),
}


def recognises(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES[:2])


def load(folder: Path) -> Fields:
    if (folder / "params.npz").is_file():
        return _load_1(folder)
    return _load_2(folder)


def _load_1(folder: Path) -> Fields:
    weights = _weights(Numpy(folder / "params.npz"))
    if _site(folder) == "embedding":
        root = weights["W_enc"].shape[1] ** 0.5
        weights["W_enc"] /= root
        weights["W_dec"] *= root
    repo = next((part for part in folder.parts if re.search(r"gemma-scope-\w+-\w+-\w+", part)), "")
    layer = hookpoints.of_path(folder, r"^layer_(\d+)")
    return dict(
        **weights,
        measure="threshold",
        subtract_b_dec=False,
        hookpoint=layer if repo.endswith("-res") else None,
    )


def _site(folder: Path) -> str:
    """The nearest part of the path that names one, "embedding" or "layer_20"; "" if none does."""
    sites = (part for part in reversed(folder.parts) if re.fullmatch(r"embedding|layer_\d+", part))
    return next(sites, "")


def _load_2(folder: Path) -> Fields:
    source = folder / "config.json"
    config = read_json(source) if source.is_file() else {}
    said = {"architecture": "jump_relu"} | config
    settings.one_of(source, said, "architecture", ("jump_relu",))
    out, into = config.get("hf_hook_point_out"), config.get("hf_hook_point_in")
    if config.get("affine_connection") or out not in (None, into):
        raise ValueError(f"{source}: is a transcoder: its output is not its input's stream")
    tensors = Safetensors(folder / "params.safetensors")
    if "affine_skip_connection" in tensors.shapes:
        raise ValueError(f"{tensors.path}: holds affine_skip_connection: it is a transcoder")
    site = re.search(r"(?:^|\.)layers\.(\d+)\.output$", str(into))
    return dict(
        **_weights(tensors),
        measure="threshold",
        subtract_b_dec=False,
        hookpoint=f"layers.{site[1]}" if site else None,
        config=config,
    )


def _weights(tensors: Tensors) -> dict[str, object]:
    lower = {key: key.lower() for key in ("W_enc", "W_dec")}
    layout = {
        lower[key] if lower.get(key) in tensors.shapes else key: value
        for key, value in _LAYOUT.items()
    }
    return read_weights(tensors, layout)
