"""Hookpoints by the names that other libraries give them.

Ours is a module of the decoder, whose output is read: "layers.6" is decoder layer 6. A name that
means no module's output, or different ones in different models, gives None.
"""

from __future__ import annotations

import re
from pathlib import Path

_FOLDER = re.compile(r"(\w+\.)*(layers|h)\.\d+(\.\w+)*")
_LAYER = re.compile(r"(?:model\.)?(?:layers|h)\.(\d+)")
_TRANSFORMER_LENS = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


def of_folder(folder: Path) -> str | None:
    """The folder's name, if it reads like a hookpoint."""
    return folder.name if _FOLDER.fullmatch(folder.name) else None


def of_transformer_lens(name: object) -> str | None:
    """blocks.6.hook_resid_post is layers.6, and so is blocks.7.hook_resid_pre."""
    match = _TRANSFORMER_LENS.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        return None
    layer = int(match[1]) - (match[2] == "pre")
    return f"layers.{layer}" if layer >= 0 else None


def layer_of(name: str | None) -> int | None:
    """The number of the decoder layer whose output it names."""
    match = _LAYER.fullmatch(of_transformer_lens(name) or name or "")
    return int(match[1]) if match else None


def same(one: str, other: str) -> bool:
    """Whether both name one module, as h.6 and model.layers.6 do."""
    return _canonical(one) == _canonical(other)


def _canonical(name: str) -> str:
    name = of_transformer_lens(name) or name
    return to_transformer_lens(name) or name


def to_transformer_lens(hookpoint: str | None) -> str | None:
    match = _LAYER.fullmatch(hookpoint or "")
    return f"blocks.{match[1]}.hook_resid_post" if match else None


def of_path(path: Path, pattern: str) -> str | None:
    """layers.N, N being the group of `pattern` in the nearest part of `path` that holds it."""
    for part in reversed(path.parts):
        if match := re.search(pattern, part):
            return f"layers.{match[1]}"
    return None
