"""PTX on a CPU: builds the library of ptx.h."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")


def build(folder: Path) -> Path:
    library = folder / "libptx.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([COMPILER, *flags, *sorted(HERE.glob("*.cpp")), "-o", library], check=True)
    return library
