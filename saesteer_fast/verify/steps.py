"""Steps of which any may crash or hang: they run in a process of their own, which is started again
after the step that ended it. What each found, or why it failed, is a line of JSON in a file.

Imports nothing of the package: bench/gpu.py runs this file before that is built.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

GROUP: dict = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
BEFORE = "start"
"""The step under which a process is reported that ends before it begins any."""


def work(
    steps: Mapping[str, Callable[[], object]], store: Path, healthy: Callable[[], object]
) -> None:
    """The process's part: runs what has no line in `store` yet.

    Before the first step and after a failed one `healthy` is called: if it fails too, as every call
    does once a kernel has read outside of its memory, the process ends, and the next one goes on.
    """
    healthy()
    _append(store, {"planned": [*steps]})
    done = results(store)
    for name, step in steps.items():
        if name in done:
            continue
        _append(store, {"began": name})
        start = time.monotonic()
        try:
            line = {"found": step()}
        except Exception as error:
            line = {"failed": f"{type(error).__name__}: {error}"[:600]}
        _append(store, {"step": name, "took": round(time.monotonic() - start, 1), **line})
        if "failed" in line:
            try:
                healthy()
            except Exception:
                sys.stdout.flush()
                os._exit(1)


def supervise(
    command: Sequence[str],
    store: Path,
    *,
    patience: float,
    deadline: float,
    log: IO[str],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """The parent's part: runs `command`, which calls `work`, until every step has its line.

    A step that gets no line within `patience` seconds is ended with its process and reported as
    failed. Nothing is started after `deadline`, on the clock of time.monotonic.
    """
    store.touch()
    while time.monotonic() < deadline:
        before = _steps(store)
        child = start(command, env=env, cwd=cwd, stdout=log)
        try:
            end = _end(child, store, patience, deadline)
        finally:
            stop(child)
        if end is None:
            return
        after = _steps(store)
        if len(after) == len(before):
            return _append(store, {"step": BEFORE, "failed": end})
        if "began" in after[-1]:
            _append(store, {"step": after[-1]["began"], "failed": end})


def results(store: Path) -> dict[str, dict]:
    """By step: {"found": ...} or {"failed": why}."""
    return {line.pop("step"): line for line in _lines(store) if "step" in line}


def tell(title: str, found: Mapping[str, dict]) -> str:
    """How many steps were right, and a line for each that was not."""
    failed = [f"  {name}: {each['failed']}" for name, each in found.items() if "failed" in each]
    return "\n".join([f"{title}: {len(found) - len(failed)} of {len(found)} right", *failed])


def missing(store: Path) -> list[str]:
    """The steps that have no line, as far as any process told what it would do."""
    planned = [name for line in _lines(store) for name in line.get("planned", ())]
    found = results(store)
    return [name for name in dict.fromkeys(planned) if name not in found]


def left_out(names: Iterable[str]) -> dict[str, dict]:
    """The results of steps that did not run."""
    return {name: {"failed": "did not run"} for name in names}


def start(command: Sequence[str], **options) -> subprocess.Popen:
    return subprocess.Popen(command, stderr=subprocess.STDOUT, **GROUP, **options)


def stop(process: subprocess.Popen) -> None:
    """Ends it, if it has not ended, and all that it started and left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end(child: subprocess.Popen, store: Path, patience: float, deadline: float) -> str | None:
    """Why the process ended too soon; None if it did all."""
    size, changed = -1, time.monotonic()
    while (code := child.poll()) is None:
        now = time.monotonic()
        if store.stat().st_size != size:
            size, changed = store.stat().st_size, now
        if now > min(changed + patience, deadline):
            return "no time was left" if now > deadline else f"no end after {patience:g} s"
        time.sleep(0.05)
    return None if code == 0 else f"the process ended with {code}"


def _steps(store: Path) -> list[dict]:
    """The lines of steps that began or ended."""
    return [line for line in _lines(store) if "began" in line or "step" in line]


def _lines(store: Path) -> list[dict]:
    """All that are whole: the last one may be about to be written."""
    text = store.read_text() if store.exists() else ""
    return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]


def _append(store: Path, line: dict) -> None:
    with store.open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")
