"""Where findings on this machine are kept: the verdicts on its GPUs, and Triton's tiles."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .writing import write_whole


def gpus() -> Path:
    """The file of verdicts, in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(cache) / "saesteer_fast" / "gpus.json"


def tiles() -> Path:
    """The file of Triton's tile sizes: SAESTEER_TILES, or one beside the verdicts."""
    return Path(os.environ.get("SAESTEER_TILES") or gpus().with_name("tiles.json"))


def store(path: Path, table: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(table, indent=1).encode() + b"\n")
