"""Whom the op suite compares, and what its tables and plots call them."""

from __future__ import annotations

from statistics import median

from .common import Case

BASELINES = ("naive", "lean", "smart")
LIBRARIES = ("sparsify", "sae_lens", "sae_lens, no error term")
PEERS = (*BASELINES, *LIBRARIES)
HEADINGS = {
    "sae_lens": "SAELens",
    "sae_lens, no error term": "SAELens without error term",
    "linear": "F.linear",
    "copy": "copy of x",
}


def compiled(name: str) -> str:
    return f"{name}, compiled"


def best(case: Case, name: str) -> str | None:
    """The contestant, or its compiled self where that was measured and took less time."""
    found = [each for each in (name, compiled(name)) if each in case["seconds"]]
    return min(found, key=lambda each: median(case["seconds"][each])) if found else None
