"""Measures tile sizes on the device at hand and stores the fastest, for every later process.

    python -m saesteer_fast.triton_kernels.tune 3072 24576 bfloat16      width, latents, type

Nothing else ever tunes: no import and no call of an op.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from .. import cache
from . import configs, launch
from .configs import ANY, Tile, Tiles

SHAPES = ((16, 32), (16, 64), (64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
"""BLOCK_M and BLOCK_N."""
K = 32
MANY = 2048
"""Tokens that stand for any number of them."""
HELD = 227 << 10
"""Bytes of stages that a multiprocessor has room for, at most."""


def tune(d: int, N: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """The fastest tiles for x [T, d] and W_enc [N, d] of `dtype`, every token undecided.

    Stores them under the device's name and returns them. The sizes of T that the table tells apart
    stay what they are. Hundreds of tiles are compiled for each, which takes the better part of an
    hour.
    """
    W_enc = torch.randn(N, d, device=device).to(dtype)
    b_enc, features = torch.zeros(N, device=device), torch.zeros(1, dtype=torch.int64).to(device)
    meets = configs.meets_in(W_enc, W_enc)
    table = configs.tiles(device, meets)

    def tokens(tile: Tile) -> Tensor:
        T = MANY if tile.most == ANY else tile.most
        return torch.randn(T, d, device=device).to(dtype)

    def counting(x: Tensor, tile: Tile) -> Callable[[], None]:
        # Nothing beats the largest number: no token is ever decided.
        acts = torch.full((len(x), 1), torch.finfo(torch.float32).max, device=device)
        beaten = torch.zeros((len(x), 1), dtype=torch.int32, device=device)
        measured = launch.Measured(acts, beaten, torch.zeros_like(beaten))
        return lambda: launch.count_beaten(x, W_enc, b_enc, features, K, None, measured, 0, tile)

    def selecting(x: Tensor, tile: Tile) -> Callable[[], Tensor]:
        return lambda: launch.best_of_shares(x, W_enc, b_enc, K, None, tile)

    found = Tiles(
        count=tuple(_fastest(tile, tokens(tile), counting) for tile in table.count),
        topk=tuple(_fastest(tile, tokens(tile), selecting) for tile in table.topk),
    )
    _store(configs.key(device, meets), found)
    configs.tiles.cache_clear()
    return found


def milliseconds(run: Callable[[], object]) -> float:
    """How long `run` takes on the device."""
    return triton.testing.do_bench(run)


def _fastest(tile: Tile, x: Tensor, launching: Callable) -> Tile:
    times = {}
    for candidate in (tile, *_candidates(tile, len(x), x.itemsize)):
        try:
            times[candidate] = milliseconds(launching(x, candidate))
        except (OutOfResources, PTXASError, RuntimeError):  # what does not compile is left out
            torch.cuda.synchronize()  # raises if the device is what went wrong
    return min(times, key=times.get)


def _candidates(tile: Tile, T: int, itemsize: int) -> Iterator[Tile]:
    shapes = [shape for shape in SHAPES if shape[0] <= max(16, triton.next_power_of_2(T))]
    depths, warps, stages, shared = (32, 64, 128, 256), (4, 8), (2, 3, 4), (1, 2)
    for (m, n), depth, w, s, p in itertools.product(shapes, depths, warps, stages, shared):
        if p * s * depth * (m + n) * itemsize > HELD:
            continue
        for described in (False, True) if tile.described else (False,):
            yield Tile(tile.most, m, n, depth, tile.GROUP, w, s, p, described)


def _store(name: str, found: Tiles) -> None:
    table = configs.stored()
    table[name] = {
        field: [tile._asdict() for tile in getattr(found, field)] for field in found._fields
    }
    cache.store(cache.tiles(), table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("d", type=int, help="width of the residual stream")
    parser.add_argument("N", type=int, help="number of latents")
    parser.add_argument("dtype", choices=[str(t).removeprefix("torch.") for t in launch.DOT])
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this PyTorch sees no GPU")
    found = tune(asked.d, asked.N, getattr(torch, asked.dtype), torch.device("cuda"))
    for name, tiles in found._asdict().items():
        for tile in tiles:
            print(name, *tile)
    print("stored in", cache.tiles())


if __name__ == "__main__":
    main()
