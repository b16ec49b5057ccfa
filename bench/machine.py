"""What a result was measured on and with; stored beside every one."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import saesteer_fast
from saesteer_fast import _build

from . import ROOT

PACKAGES = ("transformers", "eai-sparsify", "sae-lens")
"""Others that a suite may run."""


def facts() -> dict:
    """Device, threads, versions, commit (`dirty`: with changes not committed), date in UTC."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "device": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instructions": _build.instruction_set()[0],
        "torch": torch.__version__,
        "saesteer_fast": saesteer_fast.__version__,
        "python": platform.python_version(),
        "packages": _installed(),
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": now.isoformat(timespec="seconds"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def _installed() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
