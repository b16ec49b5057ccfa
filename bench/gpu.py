"""The GPU's results in one go: `python -m bench.gpu [--out FOLDER] [--minutes 8.5]`, or `make gpu`.

    build     for the GPU that is here
    smoke     every kernel alone, on small integers; a scan that is wrong is left out from here on,
              and so is the one launch for few tokens
    checks    the tests that need a GPU, and compute-sanitizer
    measure   floors, the op, the host's share, memory, decode steps (suites/gpu.py)

Each part is a process of its own with a limit, so that none takes another with it. What is known so
far is always in a JSON file, which bench/tables/gpu.py renders, and all that was printed in the log
beside it. Nothing is installed. The exit status is 0 if all was right.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from . import ROOT
from .tables.gpu import KERNELS, cases, mistakes, render


def _alone(file: Path) -> ModuleType:
    """A module of the package, which as a whole cannot be imported until it is built."""
    spec = spec_from_file_location(file.stem, file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


steps = _alone(ROOT / "saesteer_fast" / "verify" / "steps.py")
PARTS = ("build", "smoke", "checks", "measure")
LIMITS = {"build": 180, "smoke": 90, "checks": 200}
"""Seconds; what is left is for `measure`."""
PATIENCE, COMPILING = 60, 120
"""Seconds that a step may take, the start of its process included; that many where Triton compiles
while the tests run."""
SCANS = ("", "mma", "simt")
"""SAESTEER_SCAN: all scans, without the first, and without the first two."""
IN_STEPS = {"SAESTEER_LADDER": "steps"}
"""Without the kernel that does all for few tokens in one launch."""
SANITIZERS = {
    **{tool: "" for tool in ("memcheck", "racecheck", "synccheck", "initcheck")},
    **{f"{tool} without warpgroups": "mma" for tool in ("memcheck", "racecheck")},
}
"""compute-sanitizer's tools, and SAESTEER_SCAN: a tool may need registers that scan_wgmma leaves
none of."""


class Run:
    """What one call of this program has found, and where it writes it."""

    def __init__(self, out: Path, minutes: float):
        self.end = time.monotonic() + 60 * minutes
        date = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        self.path = out / f"gpu-{date[:19].replace(':', '-')}.json"
        self.result: dict = {"suite": "gpu", "machine": {"date": date}, "missing": {}}
        self.log = self.path.with_suffix(".log").open("a")
        self.env = dict(os.environ) | {"PYTHONUNBUFFERED": "1", "SAESTEER_IMPL": "auto"}
        for name in ("SAESTEER_SCAN", "SAESTEER_LADDER"):
            self.env.pop(name, None)
        self._writing = threading.Lock()

    def deadline(self, part: str) -> float:
        return min(self.end, time.monotonic() + LIMITS.get(part, self.end))

    def save(self, **found) -> None:
        with self._writing:
            self.result.update(found)
            # Whoever ends this program while it writes must find the file as it was.
            whole = self.path.with_suffix(".tmp")
            whole.write_text(json.dumps(self.result, indent=1) + "\n")
            whole.replace(self.path)

    def add(self, part: str, name: str, found: object) -> None:
        """For parts whose steps end side by side."""
        with self._writing:
            self.result[part][name] = found
        self.save()

    def call(self, command: Sequence[str], deadline: float, **env: str) -> tuple[int, str]:
        """Exit status, -1 if the time ended first, and what was printed."""
        with tempfile.TemporaryFile("w+", errors="replace") as printed:
            process = steps.start(command, cwd=ROOT, env=self.env | env, stdout=printed)
            try:
                code = process.wait(max(1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = -1
            finally:
                steps.stop(process)
            printed.seek(0)
            said = printed.read()
        with self._writing:
            print(f"\n$ {' '.join(map(str, command))}\n{said}", file=self.log, flush=True)
        return code, said

    def steps(
        self, name: str, deadline: float, *arguments: str, patience: float = PATIENCE, **env: str
    ) -> dict[str, dict]:
        """What the steps of a part of suites/gpu.py found."""
        with tempfile.TemporaryDirectory(prefix="saesteer-") as folder:
            store = Path(folder) / "steps.jsonl"
            part, *options = arguments
            command = [sys.executable, "-m", "bench.suites.gpu", part, str(store), *options]
            supervised = threading.Thread(
                target=steps.supervise,
                args=(command, store),
                kwargs=dict(
                    patience=patience, deadline=deadline, log=self.log, env=self.env | env, cwd=ROOT
                ),
            )
            supervised.start()
            going = True
            while going:
                supervised.join(5)
                going = supervised.is_alive()
                self.add("missing", name, steps.missing(store))
                self.save(**{name: steps.results(store)})
        return self.result[name]


# ---- build ----


def build(run: Run) -> None:
    """In place, for this GPU; without CUDA, for Triton's sake, if the compiler says no."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    found, failed = {}, ""
    for env in ({"TORCH_CUDA_ARCH_LIST": architecture()}, {"SAESTEER_NO_CUDA": "1"}):
        start = time.monotonic()
        code, said = run.call(command, run.deadline("build"), **env)
        with_cuda = code == 0 and "building without CUDA" not in said
        failed += "" if with_cuda else said[-3000:]
        took = round(time.monotonic() - start, 1)
        found = {"exit": code, "cuda": with_cuda, "took": took, **env}
        run.save(build=found | {"said": failed})
        if code == 0:
            break
    print(f"build: {found}", flush=True)


def architecture() -> str:
    """Of this GPU, as TORCH_CUDA_ARCH_LIST names it; empty if nobody knows."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        return ""
    return {"9.0": "9.0a"}.get(said[0], said[0]) if said else ""


# ---- smoke ----


def smoke(run: Run) -> None:
    """The CUDA kernels in steps, with all scans and with fewer, and few tokens at once, side by
    side."""
    deadline = run.deadline("smoke")

    def alone(name: str, env: Mapping[str, str]) -> dict[str, dict]:
        found = run.steps(name, deadline, "smoke", "--impl=cuda", **env)
        return found | steps.left_out(run.result["missing"][name])

    ways = {f"smoke {scan or 'all'}": IN_STEPS | {"SAESTEER_SCAN": scan} for scan in SCANS}
    ways["smoke at once"] = {}
    with ThreadPoolExecutor(len(ways)) as pool:
        found = dict(zip(ways, pool.map(alone, ways, ways.values()), strict=True))
    for name, each in found.items():
        print(steps.tell(name, each), flush=True)
    at_once = found.pop("smoke at once")
    if chosen := choose_scan(dict(zip(SCANS, found.values(), strict=True))):
        run.env["SAESTEER_SCAN"] = chosen
        print(f"going on with SAESTEER_SCAN={chosen}", flush=True)
    run.save(scan=chosen or "all")
    in_steps = not right(at_once, "scan, few")
    if in_steps:
        run.env |= IN_STEPS
        print("going on with SAESTEER_LADDER=steps", flush=True)
    run.save(ladder="steps" if in_steps else "once")


def choose_scan(found: Mapping[str, Mapping[str, dict]]) -> str:
    """The first of SCANS with which no scan is wrong; the last if there is none."""
    return next((scan for scan in SCANS if right(found[scan], "scan")), SCANS[-1])


def right(found: Mapping[str, dict], kind: str) -> bool:
    tried = [each for name, each in found.items() if name.startswith(kind)]
    return bool(tried) and not any("failed" in each for each in tried)


# ---- checks ----


def checks(run: Run) -> None:
    """All at once: they wait for the processor more than for the GPU."""
    deadline = run.deadline("checks")
    # Older releases of PyTorch need the second where memory is poisoned.
    env = {"OMP_NUM_THREADS": "2", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rfEs", "-m", "gpu"]
    several = ["-n", "5"] if find_spec("xdist") else []
    cuda = ["tests/test_gpu.py", "tests/test_attach.py", "-k", "not sanitizer and not triton"]
    commands = {
        "cuda": ["tests/test_cuda_host.py"],
        "cuda, on a GPU only": cuda,
        "triton": ["tests/test_triton_kernels.py", *several],
        "triton, on a GPU only": ["tests/test_gpu.py", "-k", "triton", *several],
    }
    lacking = {name: "no compute-sanitizer" for name in SANITIZERS}
    if shutil.which("compute-sanitizer"):
        lacking = {}
        for name in SANITIZERS:
            commands[name] = ["tests/test_gpu.py", "-k", f"sanitizer and {name.split()[0]}"]
    ends = {name: "no end" for name in commands} | lacking
    run.save(checks={name: {"exit": None, "summary": said} for name, said in ends.items()})

    def check(name: str) -> None:
        scan = {"SAESTEER_SCAN": SANITIZERS[name]} if SANITIZERS.get(name) else {}
        code, said = run.call([*pytest, *commands[name]], deadline, **env | scan)
        found = summary(code, said)
        run.add("checks", name, found)
        print(f"checks: {name}: {found['summary']}", *found["failed"], flush=True)

    with ThreadPoolExecutor(len(commands) + 1) as pool:
        alone = "smoke triton", deadline, "smoke", "--impl=triton"
        triton = pool.submit(run.steps, *alone, patience=COMPILING)
        list(pool.map(check, commands))
    print(steps.tell("smoke: triton", triton.result()), flush=True)


def summary(code: int, said: str) -> dict:
    """Of pytest's output: its last line, who failed or was skipped and, if anybody failed, the end
    of it."""
    lines = re.findall(
        r"^.*\b(?:passed|failed|errors?|skipped|no tests ran)\b.* in .*$", said, re.M
    )
    found = {
        "exit": code,
        "summary": lines[-1].strip("= ") if lines else "no end" if code == -1 else "no summary",
        "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.M),
        "skipped": re.findall(r"^SKIPPED \[\d+\] (.+)", said, re.M),
    }
    return found if code == 0 else found | {"said": said[-6000:]}


# ---- measure ----


def measure(run: Run) -> None:
    for name, each in run.steps("measure", run.end, "measure").items():
        if name.endswith("in steps") and "found" in each:
            print(f"{name}: {1e6 * statistics.median(each['found']):.2f} us a call", flush=True)


def propose(result: Mapping) -> str:
    """saesteer_fast.choice.ON_GPU as these times have it: the faster kernels first, by tokens.

    Both workloads count alike.
    """
    if wrong := mistakes(result):
        return f"ON_GPU stays as it is: not right: {', '.join(wrong)}"
    from saesteer_fast import verdicts

    times: dict[int, dict[str, list[float]]] = {}
    one = [case for case in cases(result) if case["F"] == 1]
    for T in {case["T"] for case in one}:
        here = [case["seconds"] for case in one if case["T"] == T]
        by = {
            impl: [statistics.median(each[name]) for each in here]
            for name, impl in KERNELS.items()
            if all(name in each for each in here)
        }
        times |= {T: by} if by else {}
    return f"ON_GPU = {verdicts.rows(times)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        help="the folder of the two files: bench/results, or build for some parts",
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="end after so many")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args(arguments)
    whole = set(options.parts) == set(PARTS)
    out = options.out or (Path(__file__).with_name("results") if whole else ROOT / "build")
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, options.minutes)
    parts: dict[str, Callable[[Run], None]] = dict(
        zip(PARTS, (build, smoke, checks, measure), strict=True)
    )
    for name in options.parts:
        start = time.monotonic()
        try:
            parts[name](run)
        except Exception as error:
            run.save(**{f"{name} broke": f"{type(error).__name__}: {error}"})
            print(f"{name} broke: {error!r}", flush=True)
        print(f"---- {name}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"{render(run.result)}\n\n{propose(run.result)}\n\nrecorded in {run.path}")
    return bool(mistakes(run.result))


if __name__ == "__main__":
    sys.exit(main())
