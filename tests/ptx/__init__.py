"""A GPU's code on a CPU: PTX, run instruction by instruction, and followed by a race detector.

executor.py is its Python; cuda/ runs csrc/cuda by it, triton_driver.py triton_kernels. What it
has no meaning for is an error, mostly when it is loaded: clusters, sm_100's tensor memory, most
roundings. It knows nothing of time, of registers, nor of what an assembler makes of PTX.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") if platform.machine() == "x86_64" else None
EXACT = "-ffp-contract=off", "-mfma", "-mf16c", "-Wall", "-Wextra", "-Werror"


def made_of(*folders: Path, compilers: Sequence[str | None] = (COMPILER,)) -> bytes:
    """What a library depends on: all files of these folders, and the compilers' versions."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    parts = [(str(path).encode(), path.read_bytes()) for path in files if path.suffix != ".pyc"]
    versions = [subprocess.run([c, "--version"], capture_output=True).stdout for c in compilers]
    return repr((parts, versions)).encode()


def compile_all(command: Sequence[str], sources: Sequence[Path], folder: Path) -> list[Path]:
    """Object files, in the order of the sources."""

    def compiled(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        subprocess.run([*command, "-std=c++17", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, sources))


def compile_executor(folder: Path) -> Path:
    """The library of ptx.h."""
    library = folder / "libptx.so"
    command = COMPILER, "-O3", "-mavx2", "-fPIC", "-fno-semantic-interposition", *EXACT
    objects = compile_all(command, sorted(HERE.glob("*.cpp")), folder)
    subprocess.run([COMPILER, "-shared", *objects, "-o", library], check=True)
    return library
