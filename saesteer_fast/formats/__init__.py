"""Finds out in which format a folder or file holds an SAE, and reads or writes it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from .. import hookpoints
from ..errors import in_file, nearest, one_of
from ..weights import Made, Weights
from . import (
    dictionary_learning,
    files,
    gemma_scope,
    hub,
    llama_scope,
    openai,
    order,
    qwen_scope,
    saelens,
    sparsify,
)
from .protocol import Format, Writable

FORMATS: tuple[Format, ...] = (
    sparsify,
    saelens,
    dictionary_learning,
    gemma_scope,
    llama_scope,
    qwen_scope,
    openai,
)
WRITABLE: dict[str, Writable] = {"sparsify": sparsify, "saelens": saelens}

_FILES = sorted({order.FILE}.union(*(format.FILES for format in FORMATS)))

_PARTS = {Path(file).name for file in _FILES} - {*openai.FILES}
"""Names of files that are no SAE by themselves."""


@torch.inference_mode(False)
def load(path: str | os.PathLike[str], make: Callable[..., Made]) -> Made:
    """What `make` makes of the fields of the SAE at `path`; see SAE.load."""
    place = _place(path)
    format = _format(place)
    with in_file(place), torch.device("cpu"):  # whatever the default is
        return order.with_order(make(**format.load(place)), place)


def name_of(path: str | os.PathLike[str]) -> str:
    """The format in which `path` holds an SAE."""
    return _name(_format(_place(path)))


def save(sae: Weights, path: str | os.PathLike[str], format: str) -> None:
    """Write folder `path`; see SAE.save."""
    one_of("format", format, WRITABLE)
    folder, writer = _absolute(path, "a path"), WRITABLE[format]
    others = [_name(other) for other in _found(folder) if other is not writer]
    if others:
        raise ValueError(
            f"path: {folder} holds files of {' and '.join(others)}, {format} needs another folder"
        )
    named = hookpoints.of_folder(folder)
    if named and sae.hookpoint and not hookpoints.same(named, sae.hookpoint):
        raise ValueError(
            f"path: {folder} names hookpoint {named}, the SAE's is {sae.hookpoint}; accepted are a "
            f"folder named {sae.hookpoint}, and an SAE with hookpoint={named!r}"
        )
    writer.save(sae, folder)


def _place(path: str | os.PathLike[str]) -> Path:
    """The folder or file on disk."""
    place = _absolute(path, "a path or a repository's name (org/name)")
    if place.exists():
        return place
    if not (isinstance(path, str) and hub.is_id(path)):
        hint = nearest(place.name, _names(place.parent))
        if place.is_symlink():
            hint = f"; the link leads to {os.readlink(place)}, which is not there"
        if "://" in os.fspath(path):
            hint = "; a repository on the Hub is named org/name"
        raise FileNotFoundError(f"path: no folder {place}{hint}")
    return hub.fetch(path, _FILES)


def _absolute(path: str | os.PathLike[str], accepted: str) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: got {path!r}, {accepted} is needed")
    if not os.fspath(path):
        raise ValueError(f"path: is empty, {accepted} is needed")
    return files.absolute(path)


def _name(format: Format) -> str:
    return format.__name__.rpartition(".")[2]


def _format(place: Path) -> Format:
    """That of what is at `place`, by the names of the files."""
    if place.is_file() and place.name in _PARTS:
        raise ValueError(f"path: {place} is one file of an SAE's folder; give {place.parent}")
    found = _found(place)
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(map(_name, found))
        raise ValueError(f"path: {place} holds SAEs in two formats, {names}; keep one in a folder")
    wanted = "; or ".join(format.NEEDED for format in FORMATS)
    if not place.is_dir():
        raise ValueError(f"path: {place} is a file of no known format; give a folder with {wanted}")
    inside = [name for name in _names(place) if _found(place / name)]
    hint = f"; SAEs are inside: {', '.join(inside)}" if inside else ""
    raise FileNotFoundError(f"path: {place} holds no SAE; needed are {wanted}{hint}")


def _found(place: Path) -> list[Format]:
    """Those whose files are at `place`."""
    found = [format for format in FORMATS if format.recognises(place)]
    if openai in found and len(found) > 1:
        found.remove(openai)  # any .pt file could be one
    return found


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
