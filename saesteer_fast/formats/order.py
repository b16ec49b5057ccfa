"""The order in which latents are counted, beside the files of any format whose SAE is a folder.

    saesteer_order.safetensors    order [N] int64

Other libraries ask for their own files by name, and never see it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..errors import in_file
from ..weights import Made, Weights
from .files import Safetensors, require_keys, write_tensors

FILE = "saesteer_order.safetensors"


def writers(sae: Weights) -> dict[str, Callable[[Path], None] | None]:
    """For files.write_folder: what writes the file, or that there is to be none."""
    if sae.order is None:
        return {FILE: None}
    return {FILE: lambda path: write_tensors(path, {"order": sae.order})}


def with_order(sae: Made, place: Path) -> Made:
    """`sae`, loaded from `place`, with the order that lies there, if one does."""
    path = place / FILE
    if not path.is_file():
        return sae
    tensors = Safetensors(path)
    require_keys(path, set(tensors.shapes), {"order"})
    if tensors.dtypes["order"] != "I64":
        raise ValueError(f"{path}: order is {tensors.dtypes['order']}, accepted is I64")
    with in_file(path):
        return replace(sae, order=tensors.read("order"))
