"""ptx.h for Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Kernel(NamedTuple):
    module: ctypes.c_void_p
    name: bytes
    sizes: list[int]
    """Of its parameters, in bytes."""


SECTOR = 32


class Traffic(NamedTuple):
    """Of one instruction, a warp at a time."""

    kernel: str
    line: int
    kind: str
    """read or written: global memory, in sectors; shared, in passes over its banks."""
    runs: int
    bytes: int
    parts: int
    """Sectors or passes; at least `fewest`."""
    fewest: int


def assert_rows_move_whole(traffic: list[Traffic]) -> None:
    """Of what a warp moves 8 bytes a lane or more at a time, no part of a sector is left over, and
    no lane waits for another's bank."""
    wide = [t for t in traffic if t.bytes >= 256 * t.runs]
    assert wide
    for t in wide:
        assert t.parts == t.fewest, t


class Executor:
    """Kernels of PTX, whose memory is the CPU's. A parameter is a tensor of what it holds."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._library.ptx_load.restype = ctypes.c_void_p
        for name in ("ptx_launch", "ptx_error", "ptx_tensor_map", "ptx_traffic"):
            getattr(self._library, name).restype = ctypes.c_char_p
        self._seeds = count()

    def load(self, ptx: bytes, name: str) -> Kernel:
        module = ctypes.c_void_p(self._library.ptx_load(ptx))
        if not module:
            raise RuntimeError(self._library.ptx_error().decode())
        size = partial(self._library.ptx_parameter_bytes, module, name.encode())
        return Kernel(module, name.encode(), list(takewhile(bool, map(size, count()))))

    def unload(self, kernel: Kernel) -> None:
        self._library.ptx_unload(kernel.module)

    def most_threads(self, kernel: Kernel) -> int:
        return self._library.ptx_most_threads(kernel.module, kernel.name)

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        together: bool,
        parameters: Sequence[Tensor],
        seed: int | None = None,
    ) -> None:
        """`seed` chooses the order in which warps take turns; without one, each launch's is new.

        Raises RuntimeError for what a GPU would not forgive, TypeError for other parameters than
        the kernel's.
        """
        sizes = [parameter.nbytes for parameter in parameters]
        if sizes != kernel.sizes:
            name = kernel.name.decode()
            raise TypeError(f"{name} takes parameters of {kernel.sizes} bytes, got {sizes}")
        self._library.ptx_settle(next(self._seeds) if seed is None else seed)
        three = ctypes.c_uint32 * 3
        addresses = (ctypes.c_void_p * len(sizes))(*(p.data_ptr() for p in parameters))
        _require(
            self._library.ptx_launch(
                *(kernel.module, kernel.name, three(*grid), three(threads, 1, 1)),
                *(shared, ctypes.c_bool(together), addresses),
            )
        )

    def take_as_tritons(self) -> None:
        """Kernels are Triton's from here on, whose compiler may do more: see ptx.h."""
        self._library.ptx_take_as_tritons(ctypes.c_bool(True))

    def leave_out(self, kernel: str | None, words: str = "", which: int = 0) -> None:
        """Of kernels with this in their name, the which-th instruction that begins so is not run
        from here on; without a kernel, all are."""
        name = None if kernel is None else kernel.encode()
        self._library.ptx_leave_out(name, words.encode(), which)

    def left_out(self) -> int:
        """How often it was passed over, in launches that came to their end; -1 if no kernel that
        was launched had it."""
        return self._library.ptx_left_out()

    def traffic(self, work: Callable[[], object]) -> list[Traffic]:
        """What the kernels that `work` launches move."""
        self._library.ptx_count_traffic(ctypes.c_bool(True))
        try:
            work()
            told = self._library.ptx_traffic().decode()
        finally:
            self._library.ptx_count_traffic(ctypes.c_bool(False))
        kinds = "read", "written", "shared", "ahead"
        rows = [line.split() for line in told.splitlines()]
        return [
            Traffic(kernel, int(line), kinds[int(kind)], *map(int, numbers))
            for kernel, line, kind, *numbers in rows
        ]

    def tensor_map(
        self,
        address: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        width: int,
        swizzle: int,
    ) -> Tensor:
        """128 bytes, of a tensor whose sizes, strides and box count elements, the outermost
        dimension first; an element has `width` bytes, the swizzle 0, 32, 64 or 128."""
        rank, filled = len(sizes), torch.empty(128, dtype=torch.uint8)
        _require(
            self._library.ptx_tensor_map(
                *(ctypes.c_void_p(filled.data_ptr()), width, rank, ctypes.c_void_p(address)),
                (ctypes.c_uint64 * rank)(*reversed(sizes)),
                (ctypes.c_uint64 * (rank - 1))(*(width * s for s in reversed(strides[:-1]))),
                (ctypes.c_uint32 * rank)(*reversed(box)),
                swizzle,
            )
        )
        return filled


def _require(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())
