"""`saesteer verify`: finds out which kernels are right on the GPUs at hand, and which are fastest.

    smoke.py    what is tried: every kernel alone, on small integers
    times.py    how long steer takes at the size of Phi-3 Mini's SAE
    steps.py    how: in a process that may crash or hang

What it finds is a verdict (verdicts.py), and impl="auto" follows it from then on.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from .. import cache, verdicts
from ..choice import MISSING
from . import steps, times

PATIENCE = 120
"""Seconds that a step may take, the start of its process and Triton's compiler included."""
MINUTES = 10
"""For one implementation on one GPU."""


def verify(device: torch.device) -> tuple[str, bool]:
    """Tries the kernels on the device and stores the verdict.

    Returns a report, and whether all kernels that are there were found right.
    """
    lines, measured, wrong = [torch.cuda.get_device_name(device)], {}, []
    for impl, reason in MISSING.items():
        if reason:
            lines.append(f"{impl}: {reason}")
            continue
        found = tried(impl, device)
        failed = [each["failed"] for each in found.values() if "failed" in each]
        lines.append(steps.tell(impl, found))
        if any("OutOfMemory" in why for why in failed):
            return "\n".join([*lines, "no verdict: too little of its memory is free"]), False
        if failed or not found:
            wrong.append(impl)
            continue
        for tokens, seconds in times.by_tokens(found).items():
            measured.setdefault(tokens, {})[impl] = seconds
    rows = verdicts.rows(measured)
    verdicts.write(device, rows)
    chosen = (f"  from {least} tokens on: {', then '.join(impls)}" for least, impls in rows)
    return "\n".join([*lines, *_table(measured), 'impl="auto":', *chosen]), not wrong


def tried(impl: str, device: torch.device) -> dict[str, dict]:
    """What each step found, or why it failed; one that time left out has failed too."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "steps.jsonl"
        with (Path(folder) / "log").open("w") as log:
            steps.supervise(
                [sys.executable, "-m", __name__, impl, str(device), str(store)],
                store,
                patience=PATIENCE,
                deadline=time.monotonic() + 60 * MINUTES,
                log=log,
            )
        return steps.results(store) | steps.left_out(steps.missing(store))


def _table(measured: Mapping[int, Mapping[str, list[float]]]) -> list[str]:
    return [
        f"  {tokens:>5} tokens  {impl:>7}  "
        + "  ".join(f"{1e6 * each:9.1f} us" for each in seconds)
        for tokens, by in sorted(measured.items())
        for impl, seconds in by.items()
    ]


def main() -> None:
    """One GPU of each model."""
    every = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    models = {torch.cuda.get_device_name(each): each for each in reversed(every)}
    if not models:
        raise SystemExit("saesteer verify: this PyTorch sees no GPU")
    reports = [verify(device) for device in models.values()]
    print("\n\n".join(report for report, _ in reports))
    print(f"\nstored in {cache.gpus()}")
    if not all(right for _, right in reports):
        raise SystemExit("saesteer verify: kernels that are not right are left out")
