"""PTX, run on a CPU; and csrc/cuda by it, as nvcc compiles it: its host code over cudart.cpp.

The libraries of csrc/cuda are for emulator.Machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emulator import COMPILER, CSRC
from emulator import HERE as EMULATOR

HERE = Path(__file__).parent
RUNTIME = HERE / "cudart.cpp"
EXECUTOR = [p for p in sorted(HERE.glob("*.cpp")) if p != RUNTIME]
OPS = [p for p in sorted((CSRC / "cuda").glob("*.cu")) if p.stem != "probe"]
OPS += [EMULATOR / "library.cpp"]


def _nvcc() -> str | None:
    """Where setup.py looks for it."""
    home = os.environ.get("CUDA_HOME")
    usual = "/usr/local/cuda/bin/nvcc"
    candidates = (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", usual)
    return next((path for c in candidates if c and (path := shutil.which(c))), None)


NVCC = _nvcc()

_EXACT = "-ffp-contract=off", "-mfma", "-Wall", "-Wextra", "-Werror"
# Two such libraries in one process share nothing.
_HOST = "-fPIC", "-fno-gnu-unique"
# As CMakeLists.txt has them for a release, and PTX as it is, for cudart.cpp to read.
_KERNELS = "-O3", "-DNDEBUG", "-DSAESTEER_SM90A", "--no-compress"


def _compile(command: Sequence[str], sources: Sequence[Path], folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)

    def compiled(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        subprocess.run([*command, "-std=c++17", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, sources))


def compile_executor(folder: Path) -> Path:
    """The library of ptx.h."""
    library = folder / "libptx.so"
    objects = _compile((COMPILER, "-O3", "-mavx2", "-fPIC", *_EXACT), EXECUTOR, folder)
    subprocess.run([COMPILER, "-shared", *objects, "-o", library], check=True)
    return library


def compile_runtime(folder: Path) -> list[Path]:
    """Objects of the CUDA runtime, the same for every architecture."""
    return _compile((NVCC, "-O2", "-Xcompiler", ",".join(_HOST + _EXACT)), [RUNTIME], folder)


def compile_kernels(folder: Path, arch: str, sources: Sequence[Path] = OPS) -> list[Path]:
    """Objects with the PTX of sm_80 or sm_90a, and no machine code."""
    virtual = arch.replace("sm", "compute")
    target = f"-gencode=arch={virtual},code={virtual}"
    command = (NVCC, target, *_KERNELS, "-I", CSRC, "-Xcompiler", ",".join(_HOST))
    return _compile(command, sources, folder / arch)


def link(objects: Sequence[Path], executor: Path, folder: Path, arch: str) -> Path:
    library = folder / f"lib{arch}.so"
    # A CUDA runtime that PyTorch brought must not take the calls.
    command = [COMPILER, "-shared", "-Wl,-Bsymbolic", *objects, executor, "-o", library]
    subprocess.run([*command, f"-Wl,-rpath,{executor.parent}"], check=True)
    return library
