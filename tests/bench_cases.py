"""What the benchmarks' tests share: small sizes, suites run on them, a machine that is not real."""

from __future__ import annotations

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
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from bench import report, workloads\nfrom saesteer_fast import ops\n"
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
