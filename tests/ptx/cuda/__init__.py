"""csrc/cuda on a CPU, as nvcc compiles it: its host code over cudart.cpp, its PTX by ptx.h.

Every tensor that a kernel gets ends at a page that nobody may touch; outputs start out as NaN.
"""

from __future__ import annotations

import ctypes
import runpy
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import COMPILER, EXACT, compile_all
from ..memory import fenced

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
OPS = [p for p in sorted((CSRC / "cuda").glob("*.cu")) if p.stem != "probe"] + [HERE / "ops.cpp"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def find_nvcc() -> str | None:
    """Where the build finds it."""
    return runpy.run_path(str(CSRC.parent / "setup.py"))["find_nvcc"]()


# Two such libraries in one process share nothing.
_HOST = "-fPIC", "-fno-gnu-unique"
_RUNTIME = "-O2", "-Xcompiler", ",".join(_HOST + EXACT)
# As CMakeLists.txt has them for a release; PTX and no machine code, as text.
_KERNELS = (
    *("-gencode=arch=compute_90a,code=compute_90a", "--no-compress"),
    *("-O3", "-DNDEBUG", "-DSAESTEER_SM90A", "-I", CSRC, "-I", HERE.parent),
    *("-Xcompiler", ",".join(_HOST)),
)


def compile_library(folder: Path, executor: Path, sources: Sequence[Path] = OPS) -> Path:
    """The sources as a library; its kernels are run by the executor, and know of sm_90a."""
    nvcc = find_nvcc()
    objects = compile_all((nvcc, *_RUNTIME), [HERE / "cudart.cpp"], folder)
    objects += compile_all((nvcc, *_KERNELS), sources, folder)
    # A CUDA runtime that PyTorch brought must not take the calls.
    command = [COMPILER, "-shared", "-Wl,-Bsymbolic", f"-Wl,-rpath,{executor.parent}"]
    library = folder / "libcuda_on_cpu.so"
    subprocess.run([*command, *objects, executor, "-o", library], check=True)
    return library


class _Matrix(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("width", ctypes.c_int64))


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return fenced(torch.full((size,), 0xFF, dtype=torch.uint8).view(dtype).view(shape))


def _matrix(t: Tensor) -> _Matrix:
    return _Matrix(t.data_ptr(), DTYPES.index(t.dtype), t.shape[-1])


class Machine:
    """The ops, of a library that has ops.cpp."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        for name in ("ladder_workspace", "encode_workspace", "index_of"):
            getattr(self._library, name).restype = ctypes.c_int64

    def pure(self, name: str, result, *arguments):
        function = getattr(self._library, name)
        function.restype = result
        return function(*arguments)

    def settle(
        self,
        multiprocessors: int = 3,
        usable: int | None = None,
        hopper: bool = False,
        seed: int = 0,
        *,
        blackwell: bool = False,
        together: bool = True,
    ) -> Machine:
        """Which device it is: its `multiprocessors`, its compute capability, 9.0 for `hopper`, 10.0
        for `blackwell`, else 8.0, and whether blocks can be launched `together`; which context of
        it: `usable`, multiprocessors that it has, all unless set; `seed`: the order in which warps
        run."""
        usable = multiprocessors if usable is None else usable
        major = 10 if blackwell else 9 if hopper else 8
        device = multiprocessors, usable, major, ctypes.c_bool(together)
        self._library.settle_machine(*device, seed)
        return self

    def launches(self) -> int:
        """How many kernels have been started so far."""
        return self.pure("launches", ctypes.c_int)

    def usable(self) -> int:
        """How many multiprocessors the current context has."""
        return self.pure("usable", ctypes.c_int)

    def calls(self, work: Callable[[], object]) -> dict[str, int]:
        """How often `work` calls which functions of the runtime and the driver."""
        self.pure("calls", ctypes.c_char_p)
        work()
        told = self.pure("calls", ctypes.c_char_p).decode()
        return {name: int(count) for name, count in map(str.split, told.splitlines())}

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
