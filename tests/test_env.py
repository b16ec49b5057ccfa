"""saesteer_fast.env: the report, and the instruction set that it names."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saesteer_fast
from saesteer_fast import _build, env

CPUINFO = Path("/proc/cpuinfo")
FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512bf16": {"avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16"},
}


def run_env(isa: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "saesteer_fast.env"]
    environment = os.environ | {"SAESTEER_CPU_ISA": isa}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPUINFO.exists(), reason="reads Linux's x86 CPU flags"
)
def test_detected_instruction_set_is_what_the_system_lists():
    flags = set(re.search(r"^flags\s*:(.*)", CPUINFO.read_text(), re.M).group(1).split())
    best = "plain"
    for isa, needed in FLAGS.items():
        if not needed <= flags:
            break
        best = isa
    assert f"  instructions  {best}: " in run_env("").stdout


def test_report_states_versions_and_build():
    report = env.report()
    assert report["versions"]["saesteer_fast"] == saesteer_fast.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["threads"] == str(torch.get_num_threads())
    facts = _build.facts()
    assert facts["torch_target"] == "2.10"
    assert facts["instruction_sets"][0] == "plain"
    assert bool(facts["cuda_architectures"]) != bool(facts["no_cuda_reason"])
    library = Path(env.__file__).with_name("libsaesteer_cuda.so")
    assert library.exists() == bool(facts["cuda_architectures"])


def test_report_names_an_implementation_for_every_device():
    implementations = env.report()["implementation"]
    assert {"cpu", "cuda"} <= set(implementations)
    isa, _ = _build.instruction_set()
    assert isa in implementations["cpu"]


def test_named_instruction_set_is_used_and_explained():
    done = run_env("plain")
    assert done.returncode == 0, done.stderr
    assert "  instructions  plain: " in done.stdout
    assert re.search(r"  cpu +plain kernels", done.stdout)


def test_unknown_instruction_set_is_refused():
    done = run_env("avx9000")
    assert done.returncode != 0
    assert 'SAESTEER_CPU_ISA is "avx9000"' in done.stderr
    assert "plain" in done.stderr
