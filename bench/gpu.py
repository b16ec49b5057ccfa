"""The GPU's results in one go: `python -m bench.gpu [--out FOLDER] [--minutes 9]`, or `make gpu`.

    build     for the GPU that is here
    smoke     every kernel alone, on small integers; a scan that is wrong is left out from here on
    checks    the tests that need a GPU, and compute-sanitizer
    measure   floors, the host's share, the op, a decode step (bench.on_gpu)

Each part is a process of its own with a limit, so that none takes another with it. What is known so
far is always in a JSON file, and all that was printed in the log beside it. Nothing is installed.
The exit status is 0 if all was right.
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
from importlib.util import find_spec
from pathlib import Path

from saesteer_fast import verdicts
from saesteer_fast.verify import steps

ROOT = Path(__file__).parents[1]
PARTS = ("build", "smoke", "checks", "measure")
LIMITS = {"build": 180, "smoke": 90, "checks": 200}
"""Seconds; what is left is for `measure`."""
PATIENCE = 60
"""Seconds that a step may take, the start of its process included."""
SCANS = ("", "mma", "simt")
"""SAESTEER_SCAN: all scans, without the first, and without the first two."""
SANITIZERS = {
    **{tool: "" for tool in ("memcheck", "racecheck", "synccheck", "initcheck")},
    **{f"{tool} without warpgroups": "mma" for tool in ("memcheck", "racecheck")},
}
"""compute-sanitizer's tools, and SAESTEER_SCAN: a tool may need registers that scan_wgmma leaves
none of."""
NAMES = ("ours", "triton", "naive", "lean", "smart", "compiled", "linear", "copy")


class Run:
    """What one call of this program has found, and where it writes it."""

    def __init__(self, out: Path, minutes: float):
        self.end = time.monotonic() + 60 * minutes
        stamp = time.strftime("%Y-%m-%dT%H-%M-%S", time.gmtime())
        self.path = out / f"gpu-{stamp}.json"
        self.result: dict = {"suite": "gpu"}
        self.log = self.path.with_suffix(".log").open("a")
        self.folder = Path(tempfile.mkdtemp(prefix="saesteer-"))
        self.env = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
        self.env["SAESTEER_IMPL"] = "cuda"
        self._writing = threading.Lock()

    def deadline(self, part: str) -> float:
        return min(self.end, time.monotonic() + LIMITS.get(part, self.end))

    def save(self, **found) -> None:
        with self._writing:
            self.result.update(found)
            self.path.write_text(json.dumps(self.result, indent=1) + "\n")

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

    def steps(self, name: str, deadline: float, *arguments: str, **env: str) -> dict[str, dict]:
        """What the steps of a part of bench.on_gpu found."""
        store = self.folder / f"{name}.jsonl"
        part, *options = arguments
        command = [sys.executable, "-m", "bench.on_gpu", part, str(store), *options]
        supervised = threading.Thread(
            target=steps.supervise,
            args=(command, store),
            kwargs=dict(
                patience=PATIENCE, deadline=deadline, log=self.log, env=self.env | env, cwd=ROOT
            ),
        )
        supervised.start()
        while supervised.is_alive():
            supervised.join(5)
            self.save(**{name: steps.results(store)})
        return steps.results(store)


# ---- build ----


def build(run: Run) -> None:
    """In place, for this GPU; without CUDA, for Triton's sake, if the compiler says no."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    found = {}
    for env in ({"TORCH_CUDA_ARCH_LIST": architecture()}, {"SAESTEER_NO_CUDA": "1"}):
        start = time.monotonic()
        code, said = run.call(command, run.deadline("build"), **env)
        without = re.search(r"building without CUDA: .*", said)
        found = {"exit": code, "took": round(time.monotonic() - start, 1), **env}
        run.save(build=found | {"said": "" if code == 0 and not without else said[-3000:]})
        if code == 0:
            break
    if code or without:
        run.env["SAESTEER_IMPL"] = "triton"
    print(f"build: {found}\n{without[0] if without else ''}", flush=True)


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
    """The CUDA kernels, with all scans and with fewer, side by side."""
    deadline = run.deadline("smoke")

    def alone(scan: str) -> dict[str, dict]:
        env = {"SAESTEER_SCAN": scan} if scan else {}
        return run.steps(f"smoke {scan or 'all'}", deadline, "smoke", "--impl=cuda", **env)

    with ThreadPoolExecutor(len(SCANS)) as pool:
        found = dict(zip(SCANS, pool.map(alone, SCANS), strict=True))
    for scan, each in found.items():
        print(steps.tell(f"smoke: SAESTEER_SCAN={scan}", each), flush=True)
    if chosen := choose_scan(found):
        run.env["SAESTEER_SCAN"] = chosen
        print(f"going on with SAESTEER_SCAN={chosen}", flush=True)
    run.save(scan=chosen or "all")


def choose_scan(found: Mapping[str, Mapping[str, dict]]) -> str:
    """The first of SCANS with which no scan is wrong; the last if there is none."""

    def right(scan: str) -> bool:
        scans = [each for name, each in found[scan].items() if name.startswith("scan")]
        return bool(scans) and not any("failed" in each for each in scans)

    return next((scan for scan in SCANS if right(scan)), SCANS[-1])


# ---- checks ----


def checks(run: Run) -> None:
    """All at once: they wait for the processor more than for the GPU."""
    deadline = run.deadline("checks")
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "gpu"]
    several = ["-n", "4"] if find_spec("xdist") else []
    commands = {
        "cuda": ["tests/test_cuda_host.py"],
        "cuda, on a GPU only": ["tests/test_gpu.py", "tests/test_attach.py", "-k", "not sanitizer"],
        "triton": ["tests/test_triton_kernels.py", *several],
        "triton, on a GPU only": ["tests/test_triton_gpu.py"],
    }
    if shutil.which("compute-sanitizer"):
        for name in SANITIZERS:
            commands[name] = ["tests/test_gpu.py", "-k", f"sanitizer and {name.split()[0]}"]
    quiet = {"SAESTEER_IMPL": "auto", "OMP_NUM_THREADS": "2"}
    found: dict[str, dict] = {}

    def check(name: str) -> None:
        scan = {"SAESTEER_SCAN": SANITIZERS[name]} if SANITIZERS.get(name) else {}
        code, said = run.call([*pytest, *commands[name]], deadline, **quiet, **scan)
        found[name] = summary(code, said)
        run.save(checks=dict(found))
        print(f"checks: {name}: {found[name]['summary']}", *found[name]["failed"], flush=True)

    with ThreadPoolExecutor(len(commands) + 1) as pool:
        triton = pool.submit(run.steps, "smoke triton", deadline, "smoke", "--impl=triton")
        list(pool.map(check, commands))
    print(steps.tell("smoke: triton", triton.result()), flush=True)


def summary(code: int, said: str) -> dict:
    """Of pytest's output: its last line, who failed and, if anybody did, the end of it."""
    lines = re.findall(
        r"^.*\b(?:passed|failed|errors?|skipped|no tests ran)\b.* in .*$", said, re.M
    )
    found = {
        "exit": code,
        "summary": lines[-1].strip("= ") if lines else "no end" if code == -1 else "no summary",
        "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.M),
    }
    return found if code == 0 else found | {"said": said[-6000:]}


# ---- measure ----

CASE = re.compile(r"(?P<workload>\w+) T=(?P<T>\d+) F=(?P<F>\d+) (?P<by>\w+)")


def measure(run: Run) -> None:
    found = run.steps("measure", run.end, "measure")
    table_of = cases(found)
    run.save(cases=table_of, machine=found.get("machine", {}).get("found"))
    print(table(table_of))
    for name, each in found.items():
        if not CASE.fullmatch(name):
            print(f"{name}: {each.get('failed') or short(each['found'])}")
    print(propose(run.result))


def short(found: object) -> object:
    return found if isinstance(found, dict) else f"{1e6 * statistics.median(found):.1f} us"


def cases(found: Mapping[str, dict]) -> list[dict]:
    """The steps of `measure`, by case."""
    floors = found.get("floors", {}).get("found")
    by_case: dict[tuple, dict] = {}
    for name, each in found.items():
        if not (match := CASE.fullmatch(name)):
            continue
        key = match["workload"], int(match["T"]), int(match["F"])
        case = by_case.setdefault(key, dict(zip(("workload", "T", "F"), key, strict=True)))
        case.setdefault("seconds", {}), case.setdefault("failed", {})
        if "failed" in each:
            case["failed"][match["by"]] = each["failed"]
        elif match["by"] == "case":
            case.update(each["found"])
        else:
            case["seconds"][match["by"]] = each["found"]
    for case in by_case.values():
        if floors and "read" in case:
            case["floor"] = floor(case, floors)
            if ours := case["seconds"].get("ours"):
                case["share_of_floor"] = case["floor"] / statistics.median(ours)
    return list(by_case.values())


def floor(case: Mapping, floors: Mapping[str, float]) -> float:
    """Seconds that the least takes which the op must move and multiply for these tokens."""
    T, d, N = case["T"], case["d"], case["N"]
    moved = 2 * T * d * 2 + case["read"] * N * d * 2
    multiplied = 2 * T * case["work"] * N * d
    return max(moved / floors["copy"], multiplied / floors["product"], floors["launch"])


def table(found: Sequence[dict]) -> str:
    def cell(case: dict, name: str) -> str:
        if each := case["seconds"].get(name):
            return f"{1e6 * statistics.median(each):10.1f}"
        return "     wrong" if name in case["failed"] else "         -"

    rows = [f"{'us a call':20}" + "".join(f"{n:>10}" for n in NAMES) + "  of floor  undecided"]
    for case in sorted(found, key=lambda c: (c["F"], c["workload"], c["T"])):
        label = f"{case['workload']} T={case['T']} F={case['F']}"
        share = case.get("share_of_floor")
        shares = f"  {share:8.0%}" if share else "         -"
        shares += f"  {case['undecided']:9.2%}" if "undecided" in case else "          -"
        rows.append(f"{label:20}" + "".join(cell(case, n) for n in NAMES) + shares)
        rows += [f"    {name}: {why}" for name, why in case["failed"].items()]
    return "\n".join(rows)


def propose(result: Mapping) -> str:
    """saesteer_fast.ops._ON_GPU as these times have it: the faster kernels first, by tokens.

    Both workloads count alike.
    """
    if wrong := mistakes(result):
        return f"_ON_GPU stays as it is: not right: {', '.join(wrong)}"
    times: dict[int, dict[str, list[float]]] = {}
    for T in {case["T"] for case in result["cases"]}:
        here = [case["seconds"] for case in result["cases"] if (case["T"], case["F"]) == (T, 1)]
        times[T] = {
            impl: [statistics.median(each[name]) for each in here]
            for name, impl in (("ours", "cuda"), ("triton", "triton"))
            if here and all(name in each for each in here)
        }
    return f"_ON_GPU = {verdicts.rows(times)}"


def mistakes(result: Mapping) -> list[str]:
    """What was found wrong; what did not run at all is wrong too."""
    wrong = [part for part in ("checks", "cases") if not result.get(part)]
    wrong += [name for name, each in result.get("checks", {}).items() if each["exit"]]
    for name, found in result.items():
        if name.startswith("smoke "):
            wrong += [f"{name}: {step}" for step, each in found.items() if "failed" in each]
    for case in result.get("cases", ()):
        key = f"{case['workload']} T={case['T']} F={case['F']}"
        wrong += [f"{key} {name}" for name in ("ours", "triton") if name in case["failed"]]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    folder = Path(__file__).with_name("results")
    parser.add_argument("--out", type=Path, default=folder, help="the folder of the two files")
    parser.add_argument("--minutes", type=float, default=9.0, help="end after so many")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options.out, options.minutes)
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
    print(f"recorded in {run.path}")
    return bool(mistakes(run.result))


if __name__ == "__main__":
    sys.exit(main())
