"""Builds csrc/ with CMake and ninja; everything that is not the build is in pyproject.toml.

Environment: TORCH_CUDA_ARCH_LIST ("8.0 9.0a 10.0+PTX"), SAESTEER_NO_CUDA=1, CUDACXX or CUDA_HOME,
MAX_JOBS, DEBUG=1, VERBOSE=1.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).parent.resolve()
PACKAGE = "saesteer_fast"
DEFAULT_ARCHITECTURES = ("8.0", "9.0a", "10.0+PTX")
"""The last one's PTX serves the GPUs that are newer or have no code of their own."""


def torch_options() -> list[str]:
    """Where PyTorch's headers and library are, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SetupError(
            f"PyTorch is not importable by {sys.executable}. Install torch>=2.10 first, then build "
            "with `pip install --no-build-isolation .`: without that option pip builds in an "
            "empty environment, which has no torch."
        )
    return [
        f"-DTORCH_ROOT={Path(spec.origin).parent}",
        f"-DTORCH_VERSION={importlib.metadata.version('torch')}",
    ]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    usual = "/usr/local/cuda/bin/nvcc"
    candidates = (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", usual)
    return next((path for c in candidates if c and (path := shutil.which(c))), None)


def cmake_architecture(arch: str) -> str:
    """One entry of TORCH_CUDA_ARCH_LIST in CMake's words: 9.0a -> 90a-real, 10.0+PTX -> 100."""
    match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
    if match is None:
        raise SetupError(
            f"TORCH_CUDA_ARCH_LIST: got {arch!r}; accepted are numbers such as 8.0, 9.0a or "
            "10.0+PTX, separated by spaces or semicolons."
        )
    major, minor, ptx = match.groups()
    return f"{major}{minor}" if ptx else f"{major}{minor}-real"


def cmake_architectures(listed: list[str]) -> list[str]:
    names = [cmake_architecture(arch) for arch in listed]
    if {"90a-real", "90a"} & set(names):
        # Which of both a Hopper GPU would load is said nowhere, and 9.0's has no wgmma.
        names = ["90-virtual" if name == "90" else name for name in names if name != "90-real"]
    return names


def cuda_options() -> list[str]:
    """The CUDA part is built wherever nvcc is, GPU or not."""

    def without(reason: str) -> list[str]:
        print(f"saesteer_fast: building without CUDA: {reason}")
        return ["-DSAESTEER_CUDA=", f"-DSAESTEER_NO_CUDA_REASON={reason}"]

    if os.environ.get("SAESTEER_NO_CUDA") == "1":
        return without("SAESTEER_NO_CUDA=1 was set")
    nvcc = find_nvcc()
    if nvcc is None:
        return without("nvcc was not found")
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not architectures:
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
        known = set(listed.split())
        architectures = [
            a
            for a in DEFAULT_ARCHITECTURES
            if f"sm_{a.removesuffix('+PTX').replace('.', '').rstrip('a')}" in known
        ]
    if not architectures:
        return without(f"{nvcc} knows none of {', '.join(DEFAULT_ARCHITECTURES)}")
    return [
        f"-DSAESTEER_CUDA={' '.join(architectures)}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(cmake_architectures(architectures))}",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        "-DSAESTEER_NO_CUDA_REASON=",
    ]


def tool(name: str) -> str:
    """cmake or ninja: this interpreter's own wheel of it, else the one on PATH."""
    beside = Path(sysconfig.get_path("scripts")) / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        raise SetupError(f"{name} was not found: `pip install {name}`.")
    return path


class CleanBuild(build):
    """Starts from an empty folder: a module deleted since must not ride along in the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configures, builds and installs the libraries into the package's folder."""

    def run(self) -> None:
        target = (ROOT if self.inplace else Path(self.build_lib).resolve()) / PACKAGE
        tree = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        cmake = tool("cmake")
        debug = self.debug or os.environ.get("DEBUG") == "1"
        configure = [
            *("-S", ROOT, "-B", tree, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *torch_options(),
            *cuda_options(),
        ]
        build = ["--build", tree]
        if jobs := os.environ.get("MAX_JOBS"):
            build += ["-j", jobs]
        if os.environ.get("VERBOSE") == "1":
            build += ["--verbose"]
        # An earlier build with CUDA must not outlive one without.
        (target / "libsaesteer_cuda.so").unlink(missing_ok=True)
        for arguments in (configure, build, ["--install", tree, "--prefix", target]):
            if subprocess.run([cmake, *map(str, arguments)]).returncode:
                raise SetupError("CMake says above what is wrong.")
        if self.inplace:
            self.link_triton_kernels()

    def link_triton_kernels(self) -> None:
        """An in-place package has no installer to put triton_kernels/ inside it."""
        link = ROOT / PACKAGE / "triton_kernels"
        if not link.is_symlink():
            link.symlink_to(Path("..") / "triton_kernels")


if __name__ == "__main__":
    setup(
        # As a top-level name triton_kernels would shadow the Triton project's own package.
        packages=[
            *find_packages(
                include=[PACKAGE, f"{PACKAGE}.*"], exclude=[f"{PACKAGE}.triton_kernels*"]
            ),
            f"{PACKAGE}.triton_kernels",
        ],
        package_dir={f"{PACKAGE}.triton_kernels": "triton_kernels"},
        ext_modules=[Extension(f"{PACKAGE}._build", sources=["csrc/python/module.cpp"])],
        cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
    )
