"""Compiles the C++ of the benchmarks at first use, into build/bench; and loads native.cpp's ops.

nothing(x, W_enc, b_enc, directions, features, values, k) -> Tensor     computes nothing
read(W) -> int                                                          only reads W
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("native.cpp")
BUILD = SOURCE.parents[1] / "build/bench"
TARGET = "0x020a000000000000"  # the oldest PyTorch of the stable ABI used, as for the ops


def load():
    """The ops, as attributes; CalledProcessError if they do not compile."""
    include = [f"-isystem{path}" for path in include_paths()]
    link = [f"-L{path}" for path in library_paths()] + ["-Wl,--no-as-needed", "-ltorch"]
    define = [f"-DTORCH_TARGET_VERSION={TARGET}"]
    torch.ops.load_library(compiled(SOURCE, [*define, *include], link))
    return torch.ops.saesteer_bench


def compiled(source: Path, options: Sequence[str] = (), link: Sequence[str] = ()) -> Path:
    """The shared library of this source; CalledProcessError if it does not compile."""
    library = BUILD / f"{source.stem}-{torch.__version__}.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O3", "-march=native", "-fPIC"]
        subprocess.run([*command, "-shared", *options, source, *link, "-o", library], check=True)
    return library
