"""Where findings on this machine are kept: the verdicts on its GPUs, and Triton's tiles."""

from __future__ import annotations

import os
from pathlib import Path


def gpus() -> Path:
    """The file of verdicts, in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(cache) / "saesteer_fast" / "gpus.json"


def tiles() -> Path:
    """The file of Triton's tile sizes: SAESTEER_TILES, or one beside the verdicts."""
    return Path(os.environ.get("SAESTEER_TILES") or gpus().with_name("tiles.json"))
