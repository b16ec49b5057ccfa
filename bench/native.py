"""Compiles native.cpp at first use, into build/bench, and loads its ops.

nothing(x, W_enc, b_enc, directions, features, values, k) -> Tensor     computes nothing
read(W) -> int                                                          only reads W
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("native.cpp")
LIBRARY = SOURCE.parents[1] / "build/bench" / f"native-{torch.__version__}.so"
TARGET = "0x020a000000000000"  # the oldest PyTorch of the stable ABI used, as for the ops


def load():
    """The ops, as attributes; CalledProcessError if they do not compile."""
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < SOURCE.stat().st_mtime:
        LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        options = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-shared"]
        include = [f"-isystem{path}" for path in include_paths()]
        link = [f"-L{path}" for path in library_paths()] + ["-Wl,--no-as-needed", "-ltorch"]
        define = [f"-DTORCH_TARGET_VERSION={TARGET}"]
        command = [os.environ.get("CXX", "c++"), *options, *define, *include, SOURCE, *link]
        subprocess.run([*command, "-o", LIBRARY], check=True)
    torch.ops.load_library(LIBRARY)
    return torch.ops.saesteer_bench
