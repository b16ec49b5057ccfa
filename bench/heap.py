"""How many bytes a call takes at its most: a child process under heap.cpp, compiled at first use,
counts every malloc, operator new and PyTorch's own allocations, touched or not.

In the parent:  subprocess.run(command, env=heap.environment())
In the child:   base = heap.live(); y, peak = heap.peak(call); peak - base - y.nbytes
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from . import native

SOURCE = Path(__file__).with_name("heap.cpp")
T = TypeVar("T")


def environment() -> dict[str, str]:
    """The environment of a child that counts; CalledProcessError if heap.cpp does not compile."""
    library = native.compiled(SOURCE)
    # Python's own allocator maps a megabyte at a time, whoever asks for a few bytes.
    return os.environ | {"LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc"}


def live() -> int:
    """Bytes allocated now; AttributeError in a process that does not count."""
    return _counter("heap_live")()


def peak(call: Callable[[], T]) -> tuple[T, int]:
    """What the call gives, and the most bytes that were allocated at once until it gave it."""
    taken = _counter("heap_peak")
    taken()
    return call(), taken()


def _counter(name: str) -> Callable[[], int]:
    counter = getattr(ctypes.CDLL(None), name)
    counter.restype = ctypes.c_int64
    return counter
