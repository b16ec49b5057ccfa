"""csrc/cuda as nvcc compiles it, on a CPU: its host code over cudart.cpp, its PTX by ptx.h.

The libraries are for emulator.Machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulator
from emulator import CSRC

HERE = Path(__file__).parent
OPS = [p for p in sorted((CSRC / "cuda").glob("*.cu")) if p.stem != "probe"]
OPS += [emulator.HERE / "library.cpp"]


def _nvcc() -> str | None:
    """Where setup.py looks for it."""
    home = os.environ.get("CUDA_HOME")
    usual = "/usr/local/cuda/bin/nvcc"
    candidates = (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", usual)
    return next((path for c in candidates if c and (path := shutil.which(c))), None)


NVCC = _nvcc()
MISSING = (
    "running PTX needs g++ and an x86-64 processor"
    if emulator.COMPILER is None
    else "running PTX needs nvcc"
    if NVCC is None
    else None
)

# Two such libraries in one process share nothing.
_HOST = "-fPIC,-fno-gnu-unique"
_RUNTIME = "-O2", "-Xcompiler", f"{_HOST},-ffp-contract=off,-mfma,-Wall,-Wextra,-Werror"
# As CMakeLists.txt has them for a release, and PTX as it is, for cudart.cpp to read.
_KERNELS = "-O3", "-DNDEBUG", "-DSAESTEER_SM90A", "--no-compress", "-Xcompiler", _HOST


def _compile(sources: Sequence[Path], folder: Path, *flags: str) -> list[Path]:
    folder.mkdir(exist_ok=True)

    def compiled(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        command = [NVCC, "-std=c++17", *flags, "-I", CSRC, "-c", source, "-o", target]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, sources))


def compile_runtime(folder: Path) -> list[Path]:
    """Objects of what runs PTX and of the CUDA runtime, the same for every architecture."""
    return _compile(sorted(HERE.glob("*.cpp")), folder / "runtime", *_RUNTIME)


def compile_kernels(folder: Path, arch: str, sources: Sequence[Path] = OPS) -> list[Path]:
    """Objects with the PTX of sm_80 or sm_90a, and no machine code."""
    virtual = arch.replace("sm", "compute")
    return _compile(sources, folder / arch, f"-gencode=arch={virtual},code={virtual}", *_KERNELS)


def link(objects: Sequence[Path], folder: Path, arch: str) -> Path:
    library = folder / f"lib{arch}.so"
    # A CUDA runtime that PyTorch brought must not take the calls.
    command = [emulator.COMPILER, "-shared", "-Wl,-Bsymbolic", *objects, "-o", library]
    subprocess.run(command, check=True)
    return library
