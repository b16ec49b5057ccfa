"""Tensors in memory that kills the process where it is written, or read beyond its end."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, frombuffer

_protect = ctypes.CDLL(None).mprotect
_protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


@contextmanager
def unwritable(t: Tensor) -> Iterator[Tensor]:
    """A copy of t that must not be written."""
    memory = mmap.mmap(-1, _pages(t))
    held = frombuffer(memory, dtype=t.dtype, count=t.numel()).view(t.shape).copy_(t)
    assert _protect(held.data_ptr(), len(memory), mmap.PROT_READ) == 0
    yield held
    assert _protect(held.data_ptr(), len(memory), mmap.PROT_READ | mmap.PROT_WRITE) == 0


def at_the_end(t: Tensor) -> Tensor:
    """A copy of t behind which nothing can be read."""
    size = _pages(t)
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    held = frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=size - t.nbytes)
    assert _protect(held.data_ptr() + t.nbytes, mmap.PAGESIZE, 0) == 0
    return held.view(t.shape).copy_(t)


def _pages(t: Tensor) -> int:
    """Bytes of those that hold it."""
    return -(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
