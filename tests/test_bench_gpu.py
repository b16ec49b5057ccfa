"""`make gpu` without a GPU: no part of it takes another with it, and what it makes of results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # bench is not installed

import saesteer_fast as sf  # noqa: E402
from bench import gpu, on_gpu, smoke, steps, verify, workloads  # noqa: E402
from saesteer_fast import ops  # noqa: E402

# ---- steps ----

BROKEN = """
import os, signal, sys, time
from pathlib import Path
from bench import steps

broken = []

def healthy():
    assert not broken

def breaks():
    broken.append(1)
    raise RuntimeError("an illegal memory access")

steps.work(
    {
        "right": lambda: {"a": 1},
        "raises": lambda: 1 / 0,
        "dies": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "breaks": breaks,
        "hangs": lambda: time.sleep(60),
        "after all": lambda: [2.0],
    },
    Path(sys.argv[1]),
    healthy,
)
"""


def supervised(tmp_path, script: str, patience=2.0, seconds=30.0) -> dict[str, dict]:
    store = tmp_path / "store.jsonl"
    with (tmp_path / "log").open("w") as log:
        steps.supervise(
            [sys.executable, "-c", script, str(store)],
            store,
            patience=patience,
            deadline=time.monotonic() + seconds,
            log=log,
            cwd=ROOT,
        )
    return steps.results(store)


def test_every_step_has_its_line_whatever_another_does(tmp_path):
    found = supervised(tmp_path, BROKEN)
    assert list(found) == ["right", "raises", "dies", "breaks", "hangs", "after all"]
    assert found["right"]["found"] == {"a": 1} and found["after all"]["found"] == [2.0]
    assert found["raises"]["failed"] == "ZeroDivisionError: division by zero"
    assert found["dies"]["failed"] == "the process ended with -11"
    assert found["breaks"]["failed"] == "RuntimeError: an illegal memory access"
    assert found["hangs"]["failed"] == "no end after 2 s"


def test_a_process_that_cannot_start_is_not_started_for_ever(tmp_path):
    found = supervised(tmp_path, "import nothing_of_this_name")
    assert list(found) == [steps.BEFORE] and "ended with 1" in found[steps.BEFORE]["failed"]


def test_nothing_outlasts_the_deadline(tmp_path):
    start = time.monotonic()
    found = supervised(tmp_path, BROKEN, patience=60, seconds=1.5)
    assert time.monotonic() - start < 5 and found["hangs"]["failed"] == "no time was left"
    assert "after all" not in found


# ---- smoke ----


def test_right_kernels_raise_no_smoke():
    for name, step in smoke.steps("cpu", "cpu").items():
        assert step()["compared"] > 0, name


WRONG = {
    # one column of the product of 64 tokens or more
    "encode": ("scan, many, bfloat16, half a panel more: products", r"first \(0, 7\)"),
    "feature_acts": ("scan, few, float32: counts", r"tokens \(0\), 1 of 17 columns \(2\)"),
    "steer": ("scan, few, float16: steer", r"first \(0, 3\): nan instead of"),
    "decode": ("decode float32", r"in 1 of 70 tokens \(69\)"),
    "project": ("project bfloat16", r"by up to inf"),
    "add_directions": ("add float32", r"1 of 14000 are wrong, by up to 0.5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_smoke_tells_the_place(monkeypatch, name):
    right = getattr(ops, name)

    def wrong(*arguments, **options):
        y = right(*arguments, **options)
        if name == "encode":
            y[0][y[1] == 7] += 1
        elif name == "feature_acts":
            y[0, 2] = 1000
        elif name == "steer":
            y[0, 3] = torch.nan
        elif name == "decode":
            y[69] += 1
        elif name == "project":
            y[3] = torch.inf
        else:
            y[5, 5] += 0.5
        return y

    monkeypatch.setattr(ops, name, wrong)
    step, message = WRONG[name]
    with pytest.raises(AssertionError, match=message):
        smoke.steps("cpu", "cpu")[step]()


def test_the_next_scan_serves_where_one_is_wrong():
    right, wrong = {"scan, few": {"found": {}}}, {"scan, few": {"failed": "all"}}
    dead = {steps.BEFORE: {"failed": "the process ended with 1"}}
    odd = right | {"decode float32": {"failed": "no scan"}}
    for found, chosen in (
        ((right, right, right), ""),
        ((odd, right, right), ""),
        ((wrong, right, right), "mma"),
        ((wrong, wrong, right), "simt"),
        ((wrong, wrong, wrong), "simt"),
        ((dead, dead, dead), "simt"),
    ):
        assert gpu.choose_scan(dict(zip(gpu.SCANS, found, strict=True))) == chosen


# ---- a decode step ----


class NoWaiting(TorchDispatchMode):
    """Raises where a GPU would have to be waited for, or given a tensor of Python numbers: a CUDA
    graph cannot hold that."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        waits = any(
            each in name
            for each in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")
        )
        if name.startswith("aten::index"):
            indices = [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)]
            waits |= any(t.dtype == torch.bool for t in indices)
        if waits:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **kwargs or {})


@pytest.mark.usefixtures("one_thread")
def test_a_decode_step_can_be_captured_and_repeated(make_phi3, make_sae):
    model = make_phi3(max_position_embeddings=512).bfloat16()
    with torch.no_grad():
        plain = on_gpu.decode_step(model)
        with NoWaiting():
            first = plain()
            assert torch.equal(plain(), first)
        with sf.steering(model, make_sae(dtype=torch.bfloat16), {3: 5.0}):
            steered = on_gpu.decode_step(model)
            with NoWaiting():
                moved = steered()
            for _ in range(160):  # more often than the cache has places
                again = steered()
            assert torch.equal(again, moved) and not torch.equal(moved, first)


# ---- measures ----


@pytest.mark.usefixtures("one_thread")
def test_every_contestant_runs(monkeypatch):
    """On the CPU, in small, without a clock: all but `compiled`."""
    shape = workloads.Shape(d=256, N=2048, k=16, stream=512, worst=512)
    built = {w.name: w for w in workloads.build("bf16", on_gpu.SEVERAL, shape, device="cpu")}
    calls = []

    def seconds(call, inputs):
        calls.append([tuple(call(x).shape) for x in inputs[:2]])
        return [1e-6]

    monkeypatch.setattr(on_gpu, "whole", lambda: built)
    monkeypatch.setattr(on_gpu, "workload", lambda name, F: built[name].first(F))
    monkeypatch.setattr(on_gpu, "seconds", seconds)
    monkeypatch.setattr(on_gpu, "KERNELS", {"ours": "cpu", "triton": "cpu"})
    monkeypatch.setattr(on_gpu, "TOKENS", (1, 512))
    monkeypatch.setattr(on_gpu, "SEVERAL_TOKENS", (1,))
    monkeypatch.setattr(on_gpu, "COMPILED_TOKENS", ())
    found = {}
    for name, step in on_gpu.measures().items():
        if (match := gpu.CASE.fullmatch(name)) and match["by"] != "compiled":
            found[name] = {"found": step()}
    assert len(calls) == 2 * (2 * 7 + 2) and {len(x) for each in calls for x in each} <= {2}
    cases = gpu.cases(
        found | {"floors": {"found": {"copy": 3e12, "product": 8e14, "launch": 2e-6}}}
    )
    assert len(cases) == 6 and all(case["floor"] >= 2e-6 and not case["failed"] for case in cases)
    assert all(0 < case["undecided"] <= 1 for case in cases)

    monkeypatch.setattr(ops, "steer", lambda x, *_, **__: x)
    with pytest.raises(verify.Disagreement):
        on_gpu.measures()["worst T=1 F=1 ours"]()


# ---- results ----


def seconds(value: float) -> dict:
    return {"found": [value, value, 9 * value]}


def measured(**times: tuple[float, float]) -> dict[str, dict]:
    """What `measure` finds, by (T=1, T=8192) in us."""
    found: dict[str, dict] = {
        "floors": {"found": {"copy": 3e12, "product": 8e14, "launch": 2e-6}},
        "host": {"found": {"ours": 1e-5}},
    }
    about = {"d": 3072, "N": 24576, "read": 1.0, "work": 1.0, "undecided": 1.0}
    for i, T in enumerate((1, 8192)):
        for w in ("planted", "worst"):
            found[f"{w} T={T} F=1 case"] = {"found": about}
            for name, each in times.items():
                found[f"{w} T={T} F=1 {name}"] = seconds(each[i] * 1e-6)
    return found


def result(found: dict) -> dict:
    return {"smoke all": {}, "checks": {"cuda": {"exit": 0}}, "cases": gpu.cases(found)}


def test_the_floor_is_the_larger_of_bytes_and_products():
    case, *_, last = gpu.cases(measured(ours=(100.0, 2000.0)))
    assert case["T"] == 1 and case["floor"] == pytest.approx(50.3e-6, rel=1e-2)
    assert case["share_of_floor"] == pytest.approx(0.503, rel=1e-2)
    assert last["T"] == 8192 and last["floor"] == pytest.approx(1546e-6, rel=1e-2)


@pytest.mark.parametrize(
    ("times", "row"),
    [
        ({"ours": (5, 9), "triton": (6, 10)}, "((0, ('cuda', 'triton', 'reference')),)"),
        ({"ours": (9, 9), "triton": (6, 8)}, "((0, ('triton', 'cuda', 'reference')),)"),
        (
            {"ours": (5, 11), "triton": (6, 10)},
            "((0, ('cuda', 'triton', 'reference')), (8192, ('triton', 'cuda', 'reference')))",
        ),
        ({"triton": (6, 10)}, "((0, ('triton', 'reference')),)"),
    ],
)
def test_the_fastest_kernels_are_proposed(times, row):
    assert gpu.propose(result(measured(**times))) == f"_ON_GPU = {row}"


def test_nothing_is_proposed_unless_all_was_right():
    found = measured(ours=(5, 9), triton=(6, 10))
    found["worst T=1 F=1 ours"] = {"failed": "Disagreement: worst"}
    good = result(measured(ours=(5, 9)))
    for bad, why in (
        (result(found), "worst T=1 F=1 ours"),
        (good | {"checks": {"cuda": {"exit": 0}, "racecheck": {"exit": 1}}}, "racecheck"),
        (good | {"smoke mma": {"scan, few": {"failed": "all"}}}, "smoke mma: scan, few"),
        (good | {"checks": {}}, "checks"),
    ):
        assert gpu.propose(bad) == f"_ON_GPU stays as it is: not right: {why}"


def test_the_table_shows_what_failed():
    found = measured(ours=(5, 9), linear=(50, 1500))
    found["worst T=1 F=1 ours"] = {"failed": "the process ended with -11"}
    text = gpu.table(gpu.cases(found))
    assert "    ours: the process ended with -11" in text and text.count("wrong") == 1
    assert " 1500.0 " in text and "100.00%" in text


def test_pytests_end_is_understood():
    said = "....\nFAILED tests/test_gpu.py::test_a - assert 1\n=== 1 failed, 3 passed in 2.1s ===\n"
    found = gpu.summary(1, said)
    assert found["failed"] == ["tests/test_gpu.py::test_a"] and found["said"] == said
    assert found["summary"] == "1 failed, 3 passed in 2.1s"
    assert gpu.summary(-1, "...")["summary"] == "no end"
    assert gpu.summary(0, "3 passed, 2 warnings in 1.0s")["summary"].startswith("3 passed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_what_breaks_is_recorded(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--parts", "measure", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (recorded,) = tmp_path.glob("gpu-*.json")
    assert "failed" in json.loads(recorded.read_text())["measure"][steps.BEFORE]
    assert "cuda" in recorded.with_suffix(".log").read_text().lower()
    assert "_ON_GPU stays as it is: not right: checks, cases" in done.stdout
