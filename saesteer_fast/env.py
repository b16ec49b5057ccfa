"""`saesteer env`: what is installed, how it was built, which implementation runs here, and why."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform

import torch

from . import __version__, choice, compiled


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    if torch.version.cuda is None:
        return "none: this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return f"none: PyTorch (CUDA {torch.version.cuda}) sees no device"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _cuda_build(facts: dict) -> str:
    if not facts["cuda_architectures"]:
        return f"not built: {facts['no_cuda_reason']}"
    built = f"{facts['cuda_compiler']}, for {' '.join(facts['cuda_architectures'])}"
    if not torch.cuda.is_available():
        return built
    library = ctypes.CDLL(str(compiled.CUDA_LIBRARY))
    library.saesteer_cuda_runs_here.restype = ctypes.c_bool
    covered = "has" if library.saesteer_cuda_runs_here() else "does NOT have"
    return f"{built}; {covered} code for this device"


def report() -> dict[str, dict[str, str]]:
    """Facts by section and name, all as text: versions, build, processor, implementations."""
    facts = compiled.facts()
    isa, why = compiled.instruction_set()
    packages = ("transformers", "safetensors", "numpy", "triton")
    return {
        "versions": {
            "saesteer_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: _version(package) for package in packages},
        },
        "build": {
            "compiler": f"{facts['compiler']} {facts['flags']}",
            "torch": f"{facts['torch']}; runs on {facts['torch_target']} and newer",
            "CPU": " ".join(facts["instruction_sets"]),
            "CUDA": _cuda_build(facts),
        },
        "machine": {
            "instructions": f"{isa}: {why}",
            "threads": str(torch.get_num_threads()),
            "CUDA devices": _devices(),
        },
        "implementation": choice.implementations(),
    }


def main() -> None:
    for section, facts in report().items():
        print(section)
        for name, value in facts.items():
            print(f"  {name:<14}{value}")


if __name__ == "__main__":
    main()
