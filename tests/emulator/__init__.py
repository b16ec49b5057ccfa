"""csrc/cuda on a CPU: the kernels, compiled against emulator.h, with the signatures of the ops.

Every tensor that a kernel gets ends at a page that nobody may touch, so that reading or writing
past its end kills the process; outputs start out as NaN.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++") if platform.machine() == "x86_64" else None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class _Matrix(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("width", ctypes.c_int64))


def compile_kernels(
    folder: Path, compiler: str, changed: dict[str, str] | None = None
) -> dict[str, Path]:
    """Object files by source; with `changed`, texts by file, only of what these are part of."""
    sources = folder / "cuda"
    shutil.copytree(CSRC / "cuda", sources)
    for header in ("keys.h", "views.h"):
        shutil.copy(CSRC / header, folder)
    for name, text in (changed or {}).items():
        (sources / name).write_text(text)
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-mfma", "-fPIC", "-DSAESTEER_SM90A"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-I", HERE, "-I", folder]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        subprocess.run([compiler, "-x", "c++", *flags, "-c", source, "-o", target], check=True)
        return target

    wanted = [p for p in sorted(sources.glob("*.cu")) if p.stem != "probe"]
    if changed:
        parts = [*changed, *(f'#include "{name}"' for name in changed)]
        wanted = [p for p in wanted if any(part in p.name + p.read_text() for part in parts)]
    else:
        wanted += [HERE / "library.cpp", HERE / "machine.cpp"]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((p.name for p in wanted), pool.map(compiled, wanted), strict=True))


def link(objects: dict[str, Path], folder: Path, compiler: str) -> Path:
    library = folder / "libemulated.so"
    subprocess.run([compiler, "-shared", *objects.values(), "-o", library], check=True)
    return library


def fenced(t: Tensor) -> Tensor:
    """A copy of t, packed, as far from 16-byte alignment as t, right before a forbidden page."""
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    pages = -(-(size + 32) // page) * page
    memory = mmap.mmap(-1, pages + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert _libc.mprotect(address + pages, page, 0) == 0
    off = t.data_ptr() % 16
    start = (pages - size - off) // 16 * 16 + off
    whole = torch.frombuffer(memory, dtype=torch.uint8, count=pages)
    return whole[start : start + size].view(t.dtype).view(t.shape).copy_(t)


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return fenced(torch.full((size,), 0xFF, dtype=torch.uint8).view(dtype).view(shape))


def _matrix(t: Tensor) -> _Matrix:
    return _Matrix(t.data_ptr(), DTYPES.index(t.dtype), t.shape[-1])


class Machine:
    """The ops of a library that has library.cpp, and a GPU for its kernels that is no real one."""

    def __init__(self, library: Path, *, hopper: bool = False):
        self._library = ctypes.CDLL(str(library))
        self._hopper = hopper
        for name in ("ladder_workspace", "encode_workspace", "index_of"):
            getattr(self._library, name).restype = ctypes.c_int64

    def pure(self, name: str, result, *arguments):
        function = getattr(self._library, name)
        function.restype = result
        return function(*arguments)

    def settle(self, *, multiprocessors: int = 3, seed: int = 0) -> Machine:
        """`seed` chooses the order in which threads take turns."""
        self._library.settle_machine(multiprocessors, ctypes.c_bool(self._hopper), seed)
        return self

    def launches(self) -> int:
        """How many kernels have been started so far."""
        return self.pure("launches", ctypes.c_int)

    def _run(self, name: str, *arguments) -> None:
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        error = function(
            *(
                ctypes.c_void_p(a.data_ptr())
                if isinstance(a, Tensor)
                else ctypes.c_int64(a)
                if isinstance(a, int)
                else a
                for a in arguments
            )
        )
        if error is not None:
            raise RuntimeError(error.decode())

    def _workspace(self, name: str, *sizes: int) -> Tensor:
        size = getattr(self._library, name)(*(ctypes.c_int64(s) for s in sizes))
        return _poisoned((size,), torch.uint8)

    def steer(self, x, *others):
        x = fenced(x.contiguous())
        return self._steer_to(_poisoned(x.shape, x.dtype), x, *others)

    def steer_(self, x, *others):
        """A copy of x, overwritten."""
        x = fenced(x.contiguous())
        return self._steer_to(x, x, *others)

    def _steer_to(self, y, x, W_enc, b_enc, directions, features, values, k, mask=None, order=None):
        F, lead = features.numel(), x.shape[:-1]
        given = [fenced(t.contiguous()) for t in (W_enc, b_enc, directions, features, values)]
        W, b, D, f, v = given
        m, o = (t if t is None else fenced(t.contiguous()) for t in (mask, order))
        tokens = lead.numel()
        self._run(
            "steer",
            *(_matrix(x), tokens, _matrix(W), b, W.shape[0], k, _matrix(D), f, F),
            *(v, F if values.dim() > 1 else 0, m, o, _matrix(y)),
            self._workspace("ladder_workspace", tokens, F),
        )
        return y

    def feature_acts(self, x, W_enc, b_enc, features, k, order=None):
        W, b, f, x = (fenced(t.contiguous()) for t in (W_enc, b_enc, features, x))
        F, tokens = features.numel(), x.shape[:-1].numel()
        acts = _poisoned((*x.shape[:-1], F), torch.float32)
        workspace = self._workspace("ladder_workspace", tokens, F)
        encoder = _matrix(W), b, W.shape[0], k
        o = None if order is None else fenced(order)
        self._run("feature_acts", _matrix(x), tokens, *encoder, f, F, o, acts, workspace)
        return acts

    def project(self, x, W_enc, b_enc):
        W, b, x = (fenced(t.contiguous()) for t in (W_enc, b_enc, x))
        p = _poisoned((*x.shape[:-1], W.shape[0]), torch.float32)
        tokens = x.shape[:-1].numel()
        self._run("project", _matrix(x), tokens, _matrix(W), W.shape[0], b, p)
        return p

    def add_directions(self, x, directions, coef):
        D, c, x = (fenced(t.contiguous()) for t in (directions, coef, x))
        y, F, tokens = _poisoned(x.shape, x.dtype), len(D), x.shape[:-1].numel()
        stride = 0 if coef.dim() == 1 else F
        self._run("add_directions", _matrix(x), tokens, _matrix(D), F, c, stride, _matrix(y))
        return y

    def encode(self, x, W_enc, b_enc, k):
        W, b, x = (fenced(t.contiguous()) for t in (W_enc, b_enc, x))
        lead, N = x.shape[:-1], W.shape[0]
        values, indices = (_poisoned((*lead, k), t) for t in (torch.float32, torch.int64))
        workspace = self._workspace("encode_workspace", lead.numel(), N, k)
        self._run(
            "encode", _matrix(x), lead.numel(), _matrix(W), b, N, k, values, indices, workspace
        )
        return values, indices

    def decode(self, values, indices, W_dec, b_dec):
        lead, k = values.shape[:-1], values.shape[-1]
        W, b, v, i = (fenced(t.contiguous()) for t in (W_dec, b_dec.float(), values, indices))
        dtype = torch.promote_types(W.dtype, b_dec.dtype)
        y = _poisoned((*lead, W.shape[1]), dtype)
        self._run("decode", v, i, lead.numel(), k, _matrix(W), len(W), b, _matrix(y))
        return y
