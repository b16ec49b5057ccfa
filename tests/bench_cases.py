"""What the benchmarks' tests share: small sizes, suites run on them, and results that nobody
measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from bench import ROOT, workloads

SMALL = workloads.Shape(d=256, N=2048, k=16)
TINY_PHI3 = dict(
    hidden_size=SMALL.d,
    intermediate_size=128,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=256,
    pad_token_id=0,
)
MACHINE = {
    **dict(device="a processor", cores=4, threads=4, instructions="avx2", torch="2.13.0"),
    **dict(commit="0123456789ab", dirty=False, date="2026-01-02T03:04:05+00:00"),
}


def run_small(tmp_path, *arguments, plugin="", suites=("op",)):
    """`python -m pytest bench` on SMALL and on one core, with its results in tmp_path."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler for the op that does nothing")
    (tmp_path / "small.py").write_text(
        "import os\nfrom pathlib import Path\n"
        "cores = sorted(os.sched_getaffinity(0))\n"
        "os.sched_setaffinity(0, [cores[os.getpid() % len(cores)]])\n"
        "from bench import report, timing, workloads\nfrom saesteer_fast import ops\n"
        "timing.ROUND_SECONDS = 1e-4\n"
        f"workloads.FULL = workloads.{SMALL}\nreport.RESULTS = Path(__file__).parent\n{plugin}"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    files = [f"bench/test_{suite}.py" for suite in suites]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "small", *arguments, *files],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def op_case(workload, T, **seconds):
    """Nine times the same seconds a call, in units of ours."""
    rounds = dict(naive=100, lean=20, smart=20, linear=20, copy=0.3, L0=0.5, read=0.5) | seconds
    return {
        **{"workload": workload, "dtype": "bf16", "T": T, "F": 1, "d": 3072, "N": 24576, "k": 32},
        **{"undecided": 0.022, "live": 0.0049, "work": 0.012, "read": 0.5, "close": 0},
        "agreement": {"naive": 0.99},
        "seconds": {name: [value * 1e-3] * 9 for name, value in ({"ours": 1} | rounds).items()},
    }


def op_result():
    planted = [op_case("planted", 1, nothing=0.48), op_case("planted", 512)]
    machine = MACHINE | {"packages": {"eai-sparsify": "1.3.3"}}
    cases = [*planted, op_case("worst", 1, naive=2.5)]
    return {"suite": "op", "machine": machine, "cases": cases}


def record_demo(folder):
    row = {"strength": 0, "counts": {}, "intervals": {}}
    for column in ("unsafe_refusal", "facts"):
        row |= {column: 0.5}
        row["counts"][column], row["intervals"][column] = [5, 10], [0.25, 0.75]
    ran = {"rows": [row, row | {"strength": 2.5}], "latent": 7, "layer": 4, "unit": 1.25}
    versions = {"saesteer_fast": "1", "torch": "2"}
    (folder / "demo.json").write_text(json.dumps(ran | {"versions": versions}))
