"""Triton: when it is chosen, and its kernels in the interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from saesteer_fast import choice, ops

KERNELS = [
    str(Path(__file__).with_name(f"test_{name}.py")) for name in ("triton_kernels", "support")
]
LEFT_OUT = (
    "test_cell and -float16",  # as bfloat16
    "every_tile",  # all have the same loop, so that which of them runs is nothing new
    "anywhere_in_memory",  # nothing is compiled for a tensor's start; test_triton_ptx.py has it
    "integers_are_exact and not (float32-float32 or bfloat16-bfloat16)",  # test_any_dtypes has all
    "in_place_is_bit_for_bit and not (20-0-float32 or 16-1-bfloat16 or 20-4-float32)",
)
"""Of KERNELS, in the interpreter, which computes alike what a GPU has several ways for."""
ON_CPU = """
import sys, torch, saesteer_fast as sf
from saesteer_fast import choice, ops
print("triton" in sys.modules)
x, W, b = torch.ones(3, 16), torch.ones(5, 16), torch.zeros(5)
print(ops.feature_acts(x, W, b, torch.tensor([1]), 2)[0].item())
print(any("triton_kernels.launch" in name for name in sys.modules))
print(choice.implementations().get("SAESTEER_IMPL"))
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("SAESTEER_IMPL", "TRITON_INTERPRET")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True)


@pytest.fixture
def interpreter() -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    versions = (triton.__version__, numpy.__version__)
    of_triton, of_numpy = (tuple(map(int, version.split(".")[:2])) for version in versions)
    if of_triton < (3, 7) and of_numpy >= (2, 4):
        pytest.skip("the interpreter of Triton < 3.7 needs NumPy < 2.4")


@pytest.mark.usefixtures("interpreter")
def test_kernels_in_the_interpreter(tmp_path):
    here = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    here["SAESTEER_TILES"] = str(tmp_path / "none.json")
    chosen = "-k", " and ".join(f"not ({left_out})" for left_out in LEFT_OUT)
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *KERNELS, **here)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


# ---- choice ----


def test_the_package_does_not_import_triton():
    assert python("-c", ON_CPU).stdout.split() == ["False", "16.0", "False", "None"]


@pytest.mark.usefixtures("interpreter")
def test_the_environment_chooses():
    done = python("-c", ON_CPU, SAESTEER_IMPL="triton", TRITON_INTERPRET="1")
    assert done.stdout.splitlines() == ["False", "16.0", "True", "triton, everywhere"], done.stderr
    refused = python("-c", ON_CPU, SAESTEER_IMPL="triton")
    assert "SAESTEER_IMPL: 'triton' cannot run for a tensor on cpu" in refused.stderr
    assert "TRITON_INTERPRET=1" in refused.stderr
    unknown = python("-c", ON_CPU, SAESTEER_IMPL="tritn")
    assert "SAESTEER_IMPL: got 'tritn', accepted are auto, cpu, cuda, triton" in unknown.stderr


def on_gpu(tokens: int) -> str:
    """Who computes there with impl="auto", found out from the shape alone."""
    return choice.on_gpu(torch.empty(tokens, 4, device="meta"))


def test_the_table_is_followed_at_its_edges(monkeypatch):
    monkeypatch.setitem(choice.MISSING, "triton", None)
    table = (0, ("reference",)), (17, ("cuda", "triton")), (64, ("triton",))
    monkeypatch.setattr(choice, "ON_GPU", table)
    for missing, middle in ((None, "cuda"), ("not built", "triton")):
        monkeypatch.setitem(choice.MISSING, "cuda", missing)
        for tokens, expected in (
            (0, "reference"),
            (16, "reference"),
            (17, middle),
            (63, middle),
            (64, "triton"),
            (1 << 20, "triton"),
        ):
            assert on_gpu(tokens) == expected
    assert choice.implementations()["cuda"].startswith(
        "reference from 0 tokens on, triton from 17 tokens on, triton from 64 tokens on; "
    )


def test_a_gpu_always_has_an_implementation(monkeypatch):
    monkeypatch.setitem(choice.MISSING, "cuda", "not built")
    for missing in (None, "not installed"):
        monkeypatch.setitem(choice.MISSING, "triton", missing)
        for tokens in (0, 1, 8192):
            assert on_gpu(tokens) == "reference"


def test_without_triton_the_report_says_so(monkeypatch):
    monkeypatch.setitem(choice.MISSING, "triton", "Triton is not installed")
    report = choice.implementations()["cuda"]
    assert (
        report.startswith("reference for any number of tokens; ")
        and "Triton is not installed" in report
    )
    with pytest.raises(ValueError, match=r"'triton' cannot run .* accepted: auto, cpu, reference"):
        ops.project(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1), impl="triton")
