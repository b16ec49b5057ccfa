"""Tile sizes, by architecture and shape: data, chosen by hand from the sizes of each machine's
memories until `tune` has measured better ones there and stored them."""

from __future__ import annotations

import functools
import json
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

from .. import cache

INTERPRETED = knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported."""

RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
FENCED = (3, 8)
"""The first release that orders copies before Blackwell's tensor cores (triton issue 9610); on
Hopper none of the earlier ones is known to have gone wrong."""

ANY = (1 << 31) - 1


class Tile(NamedTuple):
    """One launch of `count` or `topk`."""

    most: int
    """Tokens it is for, at most."""
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP: int
    """Tiles of tokens that pass over W_enc together."""
    num_warps: int
    num_stages: int
    per_sm: int
    """Programs that share one multiprocessor."""
    described: bool = False
    """W_enc by tensor descriptor (TMA) instead of by pointers."""


class Tiles(NamedTuple):
    """The launches of one kind of machine, for products of 16-bit or of fp32 numbers."""

    count: tuple[Tile, ...]
    """By the tokens to count for, ascending; the last takes any number."""
    topk: tuple[Tile, ...]


HALF = {
    "sm80": Tiles(
        count=(
            Tile(16, 16, 32, 256, 1, 4, 3, 2),
            Tile(64, 64, 64, 128, 1, 4, 4, 1),
            Tile(ANY, 128, 128, 64, 8, 8, 3, 1),
        ),
        topk=(
            Tile(16, 16, 64, 128, 1, 8, 3, 1),
            Tile(ANY, 128, 64, 64, 1, 8, 4, 1),
        ),
    ),
    "sm90": Tiles(
        count=(
            Tile(16, 16, 32, 256, 1, 4, 3, 3),
            Tile(64, 64, 64, 128, 1, 4, 3, 2, described=True),
            Tile(ANY, 128, 256, 64, 16, 8, 4, 1, described=True),
        ),
        topk=(
            Tile(16, 16, 64, 128, 1, 8, 3, 1),
            Tile(ANY, 128, 64, 64, 1, 8, 4, 1, described=True),
        ),
    ),
    "sm100": Tiles(
        count=(
            Tile(16, 16, 32, 256, 1, 4, 3, 2),
            Tile(64, 64, 64, 128, 1, 4, 4, 1, described=True),
            Tile(ANY, 128, 128, 64, 16, 4, 4, 1, described=True),
        ),
        topk=(
            Tile(16, 16, 64, 128, 1, 8, 3, 1),
            Tile(ANY, 128, 64, 64, 1, 8, 4, 1, described=True),
        ),
    ),
    "gfx942": Tiles(
        count=(
            Tile(16, 16, 32, 256, 1, 4, 2, 2),
            Tile(64, 64, 64, 128, 1, 4, 2, 1),
            Tile(ANY, 128, 128, 64, 8, 4, 2, 1),
        ),
        topk=(
            Tile(16, 16, 64, 128, 1, 4, 2, 1),
            Tile(ANY, 64, 64, 64, 1, 4, 2, 1),
        ),
    ),
    # What any other machine has room for: 64 KB of shared memory.
    "other": Tiles(
        count=(
            Tile(16, 16, 32, 128, 1, 4, 3, 2),
            Tile(ANY, 128, 128, 32, 8, 8, 3, 1),
        ),
        topk=(
            Tile(16, 16, 32, 128, 1, 4, 3, 1),
            Tile(ANY, 64, 64, 32, 1, 4, 3, 1),
        ),
    ),
}
"""For 16-bit numbers, by compute capability or AMD's name of the architecture."""

FP32 = Tiles(
    count=(
        Tile(16, 16, 32, 64, 1, 4, 3, 2),
        Tile(ANY, 64, 64, 32, 8, 8, 3, 1),
    ),
    topk=(
        Tile(16, 16, 32, 32, 1, 4, 3, 2),
        Tile(ANY, 64, 32, 32, 1, 4, 3, 2),
    ),
)
"""For fp32, and for two types that meet in it: no tensor cores, so one table for all."""

INTERPRETER = Tiles(
    count=(
        Tile(4, 16, 32, 32, 1, 4, 1, 1),
        Tile(16, 16, 32, 16, 1, 4, 1, 1, described=True),
        Tile(ANY, 16, 64, 32, 2, 4, 1, 1),
    ),
    topk=(
        Tile(16, 16, 32, 32, 1, 4, 1, 1),
        Tile(ANY, 32, 64, 32, 1, 4, 1, 1, described=True),
    ),
)
"""Small, so that small tensors take every path: as fast as any other where nothing is."""

ROWS = 2
"""Tokens a program of `project`: one number for every T, so that a token's p_f is the same in any
batch."""


def meets_in(x: Tensor, W_enc: Tensor) -> torch.dtype:
    """The type in which x and W_enc are multiplied: their own if they share it, else fp32.

    The interpreter computes bf16 wrong, so there it is fp32 always.
    """
    return x.dtype if x.dtype == W_enc.dtype and not INTERPRETED else torch.float32


@functools.cache
def tiles(device: torch.device, meets: torch.dtype) -> Tiles:
    """The launches on `device` for products of numbers of type `meets`."""
    if not INTERPRETED and meets != torch.float32:
        _require_fence(device)
    if found := stored().get(key(device, meets)):
        return Tiles(*(tuple(Tile(**tile) for tile in found[name]) for name in Tiles._fields))
    if INTERPRETED:
        return INTERPRETER
    return FP32 if meets == torch.float32 else HALF.get(architecture(device), HALF["other"])


def _require_fence(device: torch.device) -> None:
    if RELEASE < FENCED and architecture(device) == "sm100":
        raise RuntimeError(
            f"impl: products on {torch.cuda.get_device_name(device)} need a fence that Triton "
            f"{triton.__version__} leaves out; {'.'.join(map(str, FENCED))} or newer is needed"
        )


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of `device`; the interpreter has three."""
    if INTERPRETED:
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return {"gfx950": "gfx942"}.get(name, name)
    minor = 0 if properties.major in (9, 10) else properties.minor  # B300 is as B200
    return f"sm{properties.major}{minor}"


def key(device: torch.device, meets: torch.dtype) -> str:
    """What tiles are stored under."""
    name = "interpreter" if INTERPRETED else torch.cuda.get_device_name(device)
    return f"{name}, {8 * meets.itemsize}-bit"


def stored() -> dict[str, dict[str, list[dict]]]:
    """What `tune` found so far: by `key`, then by the fields of Tiles and of Tile."""
    try:
        return json.loads(cache.tiles().read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{cache.tiles()} holds no tiles; delete it, or tune again") from error
