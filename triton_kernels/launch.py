"""The ops by the Triton kernels: memory and launches. Nothing here waits for the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import checks
from . import configs
from .add import add
from .configs import Tile
from .count import count
from .decode import decode as decode_kernel
from .dispatch import Kernel
from .merge import merge
from .project import project as project_kernel
from .topk import topk

MOST_K = 256
"""Latents that a pass of `encode` finds: so many for each of 16 tokens are held in registers."""

FUSED = {"enable_fp_fusion": True}
"""A product and a sum are rounded once, whatever this Triton does if nobody asks."""

DOT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Edit(NamedTuple):
    """What is written, beside what is measured; without y, x is overwritten."""

    directions: Tensor | None = None
    values: Tensor | None = None
    value_stride: int = 0
    mask: Tensor | None = None
    y: Tensor | None = None


class Measured(NamedTuple):
    """What `project` leaves for `count`, and `count` for `add`."""

    acts: Tensor | None = None
    beaten: Tensor | None = None
    decided: Tensor | None = None
    waiting: Tensor | None = None
    length: Tensor | None = None


def steer(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    directions: Tensor,
    features: Tensor,
    values: Tensor,
    k: int,
    mask: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """x' = x + sum_f (value_f - a_f) directions_f; see `ops.steer`.

    What only the device knows is not raised: a feature that is no latent makes x' NaN, and of one
    named twice both edits are added.
    """
    checks.steer(x, W_enc, b_enc, directions, features, values, k, mask, order)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty_like(rows)
    _steer(rows, W_enc, b_enc, directions, features, values, k, mask, order, y)
    return y.reshape(x.shape)


def steer_(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    directions: Tensor,
    features: Tensor,
    values: Tensor,
    k: int,
    mask: Tensor | None = None,
    order: Tensor | None = None,
) -> None:
    """`steer`, written over x; see `ops.steer_`."""
    checks.steer_(x, W_enc, b_enc, directions, features, values, k, mask, order)
    rows = x.view(-1, x.shape[-1])
    _steer(rows, W_enc, b_enc, directions, features, values, k, mask, order, None)


def _steer(
    rows: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    directions: Tensor,
    features: Tensor,
    values: Tensor,
    k: int,
    mask: Tensor | None,
    order: Tensor | None,
    y: Tensor | None,
) -> None:
    F, shared = features.shape[0], values.shape == features.shape
    directions, features = directions.contiguous(), features.contiguous()
    values = values.contiguous() if shared else values.reshape(rows.shape[0], F).contiguous()
    mask = mask if mask is None else mask.reshape(-1).contiguous()
    with torch.cuda.device_of(rows):
        for part in _parts(rows.shape[0], F):
            x = _rows(rows, part)
            edit = _Edit(
                directions,
                values if shared else _rows(values, part),
                0 if shared else F,
                _rows(mask, part),
                _rows(y, part),
            )
            _add(x, F, k, edit, _measure(x, W_enc, b_enc, features, k, order, edit))


def feature_acts(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    features: Tensor,
    k: int,
    order: Tensor | None = None,
) -> Tensor:
    """a_f = p_f if p_f > 0 and fewer than k latents beat f, else 0; see `ops.feature_acts`.

    NaN for a feature that is no latent.
    """
    checks.feature_acts(x, W_enc, b_enc, features, k, order)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    features = features.contiguous()
    acts = x.new_empty((rows.shape[0], features.shape[0]), dtype=torch.float32)
    with torch.cuda.device_of(x):
        for part in _parts(rows.shape[0], features.shape[0]):
            measured = _measure(_rows(rows, part), W_enc, b_enc, features, k, order, _Edit())
            # NaN * 0 is NaN, as it should be.
            torch.mul(measured.acts, measured.beaten < k, out=acts[part])
    return acts.reshape(*x.shape[:-1], features.shape[0])


def project(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """p = W_enc x + b_enc for a few rows; see `ops.project`."""
    checks.project(x, W_enc, b_enc)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    p = x.new_empty((rows.shape[0], W_enc.shape[0]), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _project(rows, W_enc, b_enc, None, _Edit(), Measured(p))
    return p.reshape(*x.shape[:-1], W_enc.shape[0])


def add_directions(x: Tensor, directions: Tensor, coef: Tensor) -> Tensor:
    """x' = x + sum_f coef_f directions_f; see `ops.add_directions`."""
    checks.add_directions(x, directions, coef)
    (F, d), shared = directions.shape, coef.dim() == 1
    rows = x.reshape(-1, d).contiguous()
    y = torch.empty_like(rows)
    edit = _Edit(directions.contiguous(), coef.contiguous(), 0 if shared else F, None, y)
    with torch.cuda.device_of(x):
        _add(rows, F, 0, edit, Measured())
    return y.reshape(x.shape)


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest p, descending, ties to the lower index; see `ops.encode`."""
    checks.encode(x, W_enc, b_enc, k)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    T, shape = rows.shape[0], (*x.shape[:-1], k)
    values = x.new_empty((T, k), dtype=torch.float32)
    indices = x.new_empty((T, k), dtype=torch.int64)
    last = None
    tile = _topk_tile(rows, W_enc, min(k, MOST_K))
    with torch.cuda.device_of(x):
        # Each pass looks below what the one before has found, with the same tiles for the same p.
        for found in range(0, k if T else 0, MOST_K):
            size = min(MOST_K, k - found)
            keys = best_of_shares(rows, W_enc, b_enc, size, last, tile)
            last = x.new_empty(T, dtype=torch.int64)
            candidates = keys[0].numel()
            MERGE.launch(
                (T, 1, 1),
                (_power_of_2(candidates),),
                keys,
                values[:, found:],
                indices[:, found:],
                last,
                k,
                size,
                candidates,
            )
    return values.reshape(shape), indices.reshape(shape)


def decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """recon = b_dec + sum_i values_i W_dec[indices_i]; see `ops.decode`.

    NaN where an index is no latent's.
    """
    checks.decode(values, indices, W_dec, b_dec)
    *leading, k = values.shape
    N, d = W_dec.shape
    y = W_dec.new_empty((*leading, d), dtype=torch.promote_types(W_dec.dtype, b_dec.dtype))
    T, block = math.prod(leading), min(1024, _power_of_2(d))
    with torch.cuda.device_of(values):
        DECODE.launch(
            (T, _cdiv(d, block), 1),
            (block,),
            values.contiguous(),
            indices.contiguous(),
            W_dec,
            b_dec.contiguous(),
            y,
            N,
            d,
            k,
        )
    return y


def _measure(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    features: Tensor,
    k: int,
    order: Tensor | None,
    edit: _Edit,
) -> Measured:
    """Counts all that has to be counted; writes the tokens for which nothing has."""
    T, F = x.shape[0], features.shape[0]
    acts = x.new_empty((T, F), dtype=torch.float32)
    beaten = x.new_empty((T, F), dtype=torch.int32)
    launches = _launches(T, configs.tiles(x.device, configs.meets_in(x, W_enc)).count)
    waiting = length = None
    if len(launches) > 1:
        waiting = x.new_empty(T, dtype=torch.int32)
        length = x.new_zeros(1, dtype=torch.int32)
    decided = x.new_empty(_cdiv(T, configs.ROWS), dtype=torch.int32)
    measured = Measured(acts, beaten, decided, waiting, length)
    _project(x, W_enc, b_enc, features, edit, measured)
    for low, tile in launches:
        count_beaten(x, W_enc, b_enc, features, k, order, measured, low, tile)
    return measured


def _project(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    features: Tensor | None,
    edit: _Edit,
    measured: Measured,
) -> None:
    (T, d), N, F = x.shape, W_enc.shape[0], measured.acts.shape[1]
    PROJECT.launch(
        (_cdiv(T, configs.ROWS), 1, 1),
        (_power_of_2(d),),
        x,
        W_enc,
        b_enc,
        features,
        *edit,
        *measured,
        N,
        d,
        T,
        F,
    )


def count_beaten(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    features: Tensor,
    k: int,
    order: Tensor | None,
    measured: Measured,
    low: int,
    tile: Tile,
) -> None:
    """One launch of `count`, for more than `low` tokens."""
    (T, d), N, F = x.shape, W_enc.shape[0], features.shape[0]
    tiles = _cdiv(min(T, tile.most), tile.BLOCK_M) * _cdiv(N, tile.BLOCK_N)
    programs = min(tiles, configs.processors(x.device) * tile.per_sm)
    W, product = _product(x, W_enc, tile)
    COUNT.launch(
        (programs, 1, 1),
        product,
        x,
        W,
        b_enc,
        features,
        order,
        *measured,
        N,
        d,
        T,
        F,
        k,
        low,
        tile.most,
    )


def _topk_tile(x: Tensor, W_enc: Tensor, k: int) -> Tile:
    tiles = configs.tiles(x.device, configs.meets_in(x, W_enc)).topk
    tile = next(tile for tile in tiles if x.shape[0] <= tile.most)
    return tile if tile.BLOCK_M * k <= tiles[0].BLOCK_M * MOST_K else tiles[0]


def best_of_shares(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, last: Tensor | None, tile: Tile
) -> Tensor:
    """One launch of `topk`, for k <= MOST_K: keys [T, shares, k] int64.

    As many shares of the latents as occupy the device, but no more than one program can merge.
    """
    (T, d), N = x.shape, W_enc.shape[0]
    best, down = _power_of_2(k), _cdiv(T, tile.BLOCK_M)
    programs = configs.processors(x.device) * tile.per_sm
    shares = max(1, min(programs // down, _cdiv(N, tile.BLOCK_N), 8192 // best))
    keys = x.new_empty((T, shares, k), dtype=torch.int64)
    W, product = _product(x, W_enc, tile)
    made = best, *product
    TOPK.launch((down, shares, 1), made, x, W, b_enc, keys, last, N, d, T, k, shares)
    return keys


def _add(x: Tensor, F: int, k: int, edit: _Edit, measured: Measured) -> None:
    T, d = x.shape
    directions, values, value_stride, _, y = edit
    ADD.launch(
        (min(T, 4 * configs.processors(x.device)), 1, 1),
        (_power_of_2(d),),
        x,
        directions,
        values,
        value_stride,
        y,
        measured.acts,
        measured.beaten,
        measured.waiting,
        measured.length,
        d,
        T,
        F,
        k,
    )


def _launches(T: int, tiles: tuple[Tile, ...]) -> list[tuple[int, Tile]]:
    """`count`'s launches, each with the number of tokens that is just too small for it.

    Few tokens need one, for all of them. For many, how many are undecided is known only to the
    device: each size of tiles is launched, and those that it is not for return at once.
    """
    for tile in tiles[:-1]:
        if T <= tile.most:
            return [(0, tile)]
    return list(zip((0, *(tile.most for tile in tiles)), tiles, strict=False))


def _product(x: Tensor, W_enc: Tensor, tile: Tile) -> tuple[Tensor | TensorDescriptor, tuple]:
    """W_enc as `preacts` takes it, and what a kernel that calls it is made of."""
    d = W_enc.shape[1]
    # Descriptors need rows of whole 16 bytes, and Triton 3.4's interpreter of 16 elements.
    described = tile.described and d % 16 == 0 and W_enc.data_ptr() % 16 == 0
    W = TensorDescriptor.from_tensor(W_enc, [tile.BLOCK_N, tile.BLOCK_K]) if described else W_enc
    return W, (tile, configs.meets_in(x, W_enc), described, d % tile.BLOCK_K == 0)


def _parts(T: int, F: int) -> Iterator[slice]:
    """Tokens taken at once: what is kept of them stays below a megabyte and 64 bytes a token."""
    step = max(1, ((1 << 20) + 64 * T) // (8 * F + 6))
    step -= step % 16 if step > 16 else 0  # so that parts begin at whole 16 bytes, if all does
    return (slice(start, min(T, start + step)) for start in range(0, T, step))


def _rows(t: Tensor | None, part: slice) -> Tensor | None:
    """t[part], but at no cost where that is all of it."""
    return t if t is None or len(t) == part.stop - part.start else t[part]


# Triton's own two cost 5 us a call on the host.
def _cdiv(count: int, size: int) -> int:
    return -(-count // size)


def _power_of_2(width: int) -> int:
    return 1 << (width - 1).bit_length()


def product_options(tile: Tile, meets: torch.dtype, described: bool, whole: bool) -> dict:
    """Of a kernel on `preacts`."""
    return dict(
        DOT=DOT[meets],
        DESCRIBED=described,
        WHOLE=whole,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **FUSED,
    )


def block_options(width: int) -> dict:
    """Of a kernel whose blocks hold so many elements."""
    return {"num_warps": min(16, max(1, width // 256)), **FUSED}


def project_options(width: int) -> dict:
    """Two programs fit a multiprocessor, so that one's sums hide the other's loads; wider rows need
    all its registers."""
    options = block_options(width)
    options["num_warps"] = min(8 if width <= 4096 else 16, options["num_warps"])
    if not (configs.INTERPRETED or torch.version.hip):
        options["maxnreg"] = 128
    return dict(ROWS=configs.ROWS, BLOCK_D=width, **options)


PROJECT = Kernel(project_kernel, project_options)
COUNT = Kernel(count, lambda tile, *of: dict(GROUP=tile.GROUP, **product_options(tile, *of)))
ADD = Kernel(add, lambda d: dict(BLOCK_D=d, **block_options(d)))
TOPK = Kernel(topk, lambda best, *of: dict(BLOCK_BEST=best, **product_options(*of)))
MERGE = Kernel(merge, lambda size: dict(BLOCK=size, **block_options(size)))
DECODE = Kernel(decode_kernel, lambda d: dict(BLOCK_D=d, **block_options(d)))
