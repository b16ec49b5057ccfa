"""Qwen Scope's format: one file a layer, layer6.sae.pt, in a folder whose name tells k.

    W_enc [N, d], b_enc [N], W_dec [d, N], b_dec [d]

Repositories are called SAE-Res-<model>-W32K-L0_50, where 50 is k; b_dec is not taken off the input.
The model cards' own code has no ReLU, which changes only tokens with fewer than k positive
pre-activations. Source: SAELens 6.54, qwen_scope_sae_huggingface_loader.
"""

from __future__ import annotations

import re
from pathlib import Path

from .files import read_weights
from .protocol import Fields
from .zips import Torch

FILES = ()  # a folder holds every layer, and each file is an SAE
NEEDED = "a file layerN.sae.pt, named itself"

_NAME = re.compile(r"layer(\d+)\.sae\.pt")
_LAYOUT = {
    "W_enc": ("W_enc", "Nd"),
    "b_enc": ("b_enc", "N"),
    "W_dec": ("W_dec", "dN"),
    "b_dec": ("b_dec", "d"),
}


def recognises(path: Path) -> bool:
    return path.is_file() and _NAME.fullmatch(path.name) is not None


def load(path: Path) -> Fields:
    told = next((match for part in reversed(path.parts) if (match := _K.search(part))), None)
    if told is None:
        raise ValueError(f"{path}: k is told by the folder's name, ...-L0_<k>, and it is not there")
    return dict(
        **read_weights(Torch(path), _LAYOUT),
        k=int(told[1]),
        subtract_b_dec=False,
        hookpoint=f"layers.{_NAME.fullmatch(path.name)[1]}",
    )


_K = re.compile(r"L0_(\d+)$")
