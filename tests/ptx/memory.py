"""Memory whose end shows, or that nobody may write."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, frombuffer, uint8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def fenced(t: Tensor) -> Tensor:
    """A copy of t, packed, as far from 16-byte alignment as t, right before a forbidden page."""
    return _fenced(t, -(t.nbytes + t.data_ptr()) % 16)


def at_the_end(t: Tensor) -> Tensor:
    """The same, but wherever that begins: no byte is left between."""
    return _fenced(t, 0)


@contextmanager
def unwritable(t: Tensor) -> Iterator[Tensor]:
    """A copy of t that kills the process if it is written."""
    memory = mmap.mmap(-1, _pages(t.nbytes))
    held = frombuffer(memory, dtype=t.dtype, count=t.numel()).view(t.shape).copy_(t)
    _protect(memory, 0, mmap.PROT_READ)
    yield held
    _protect(memory, 0, mmap.PROT_READ | mmap.PROT_WRITE)


def _fenced(t: Tensor, between: int) -> Tensor:
    pages = _pages(t.nbytes + between)
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    _protect(memory, pages, 0)
    end = pages - between
    held = frombuffer(memory, dtype=uint8)[end - t.nbytes : end]
    return held.view(t.dtype).view(t.shape).copy_(t)


def _pages(size: int) -> int:
    """Bytes of those that hold so many."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _protect(memory: mmap.mmap, start: int, allowed: int) -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert _libc.mprotect(address + start, len(memory) - start, allowed) == 0
