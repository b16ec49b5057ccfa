"""Memory whose end shows."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor, frombuffer, uint8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def fenced(t: Tensor) -> Tensor:
    """A copy of t, packed, as far from 16-byte alignment as t, right before a forbidden page."""
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    pages = -(-(size + 32) // page) * page
    memory = mmap.mmap(-1, pages + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert _libc.mprotect(address + pages, page, 0) == 0
    off = t.data_ptr() % 16
    start = (pages - size - off) // 16 * 16 + off
    whole = frombuffer(memory, dtype=uint8, count=pages)
    return whole[start : start + size].view(t.dtype).view(t.shape).copy_(t)
