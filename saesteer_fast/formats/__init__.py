"""Finds out in which format a folder holds an SAE, and reads or writes it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..errors import nearest
from ..sae import SAE
from . import sparsify

FORMATS = (sparsify,)


@torch.inference_mode(False)
def load(path: Path) -> SAE:
    """The SAE in folder `path`; see SAE.load."""
    # Not resolve(): the name may be a link's, and names the hookpoint.
    path = Path(os.path.abspath(path))
    if not path.exists():
        raise FileNotFoundError(f"path: no folder {path}{nearest(path.name, _names(path.parent))}")
    if not path.is_dir():
        raise ValueError(
            f"path: {path} is a file; give a folder with {_wanted()}. Pickles (.pt, .bin) are "
            "never opened: loading one can run code"
        )
    for format in FORMATS:
        if format.recognises(path):
            return format.load(path)
    inside = [name for name in _names(path) if any(f.recognises(path / name) for f in FORMATS)]
    hint = f"; there are SAEs in its folders {', '.join(inside)}" if inside else ""
    raise FileNotFoundError(f"path: {path} holds no SAE; needed are {_wanted()}{hint}")


def save(sae: SAE, path: Path) -> None:
    """Write folder `path`; see SAE.save."""
    sparsify.save(sae, Path(os.path.abspath(path)))


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _wanted() -> str:
    return ", or ".join(" and ".join(format.FILES) for format in FORMATS)
