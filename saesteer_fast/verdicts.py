"""Which kernels were found right on the GPUs at hand, and from how many tokens on which is fastest:
what `saesteer verify` stores and impl="auto" follows.

A verdict holds for one model of GPU and for the very kernels that were tried: others, of another
build or another Triton, have none.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from . import cache
from .compiled import CUDA_LIBRARY

Rows = tuple[tuple[int, tuple[str, ...]], ...]
"""From so many tokens on, the implementations in the order in which they are wanted."""
HERE = Path(__file__).parent


@functools.cache
def read(device: torch.device) -> Rows | None:
    """The verdict on these kernels on this device; None if they were not tried there."""
    if device.type != "cuda":
        return None
    found = _stored().get(torch.cuda.get_device_name(device))
    if found is None or found.get("kernels") != kernels():
        return None
    return tuple((least, tuple(impls)) for least, impls in found["rows"])


def write(device: torch.device, rows: Rows) -> None:
    """Stores the verdict on these kernels; `read` gives it from now on, in this process too."""
    table = _stored()
    table[torch.cuda.get_device_name(device)] = {"kernels": kernels(), "rows": rows}
    cache.store(cache.gpus(), table)
    read.cache_clear()


def rows(times: Mapping[int, Mapping[str, Iterable[float]]]) -> Rows:
    """From the times of each implementation, by tokens: the faster first, the reference last.

    What decides is the geometric mean. Rows that say the same are one, and the first is for any
    number of tokens.
    """
    found: list[tuple[int, tuple[str, ...]]] = []
    for tokens, by in sorted(times.items()):
        means = {impl: statistics.geometric_mean(each) for impl, each in by.items()}
        impls = (*sorted(means, key=means.get), "reference")
        if not found or found[-1][1] != impls:
            found.append((tokens if found else 0, impls))
    return tuple(found) or ((0, ("reference",)),)


@functools.cache
def kernels() -> str:
    """A digest of all that decides which instructions a GPU is given."""
    digest = hashlib.sha256()
    files = [CUDA_LIBRARY, *sorted((HERE / "triton_kernels").glob("*.py"))]
    for file in (*files, cache.tiles()):
        if file.is_file():
            digest.update(file.read_bytes())
    try:
        digest.update(importlib.metadata.version("triton").encode())
    except importlib.metadata.PackageNotFoundError:
        pass
    for name in ("SAESTEER_SCAN", "SAESTEER_LADDER", "TRITON_INTERPRET"):
        digest.update(f"{name}={os.environ.get(name, '')};".encode())
    return digest.hexdigest()


def _stored() -> dict[str, dict]:
    """All verdicts; none where there is no cache to read."""
    try:
        found = json.loads(cache.gpus().read_text())
        if not all(each["rows"] for each in found.values()):
            raise ValueError("a verdict without rows")
        return found
    except (OSError, RuntimeError):
        return {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{cache.gpus()} holds no verdicts; delete it and run `saesteer verify`"
        ) from error
