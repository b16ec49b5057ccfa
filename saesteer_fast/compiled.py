"""The compiled libraries: loads them, or says why not, and knows the facts of their build.

The one with the ops and the CPU's kernels must be there; CUDA's need not.
"""

from __future__ import annotations

from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("libsaesteer_ops.so")
CUDA_LIBRARY = _LIBRARY.with_name("libsaesteer_cuda.so")

try:
    torch.ops.load_library(_LIBRARY)
except OSError as error:
    _here = " (this is the source tree: leave it, or install with -e)"
    _is_source = _LIBRARY.parents[1].joinpath("setup.py").exists()
    raise ImportError(
        f"saesteer_fast's compiled ops do not load from {_LIBRARY}; build them with "
        f"`pip install --no-build-isolation .` under this PyTorch{_here * _is_source}"
    ) from error

from ._build import facts, instruction_set  # noqa: E402, F401  (they need the library)


def _load_cuda() -> str | None:
    """Loads the CUDA library; why not, if it cannot be."""
    if reason := facts()["no_cuda_reason"]:
        return f"the CUDA library is not built: {reason}"
    if not torch.backends.cuda.is_built():
        return "this PyTorch is built without CUDA"
    try:
        torch.ops.load_library(CUDA_LIBRARY)
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    return None


NO_CUDA = _load_cuda()
"""Why the CUDA library is not there; None if it is."""
