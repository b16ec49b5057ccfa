"""`make gpu` without a GPU: no part of it takes another with it, and what it makes of results."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import saesteer_fast as sf
from bench import ROOT, exactness, gpu, workloads
from bench.suites import gpu as on_gpu
from bench.tables import gpu as tables
from saesteer_fast import ops
from saesteer_fast.verify import steps

# ---- smoke ----


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


def test_a_scan_that_was_not_tried_is_not_right(tmp_path, monkeypatch):
    def tried(run, name, *_, **__):
        left_out = {"smoke all": ["scan, many"], "smoke at once": ["scan, few"]}
        run.result["missing"][name] = left_out.get(name, [])
        return {"scan, few": {"found": {}}}

    monkeypatch.setattr(gpu.Run, "steps", tried)
    run = gpu.Run(tmp_path, minutes=1)
    gpu.smoke(run)
    assert run.result["scan"] == run.env["SAESTEER_SCAN"] == "mma"
    assert run.env["SAESTEER_LADDER"] == "steps"


def test_one_launch_is_right_if_it_ran_and_nothing_failed():
    good, bad = {"scan, few, a: steer": {"found": {}}}, {"failed": "all"}
    assert gpu.right(good, "scan, few") and not gpu.right({}, "scan, few")
    assert gpu.right(good | {"scan, many, a: steer": bad}, "scan, few")
    assert not gpu.right(good | {"scan, few, a: counts": bad}, "scan, few")


def test_checks_that_end_at_once_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.Run, "call", lambda *_, **__: (0, "1 passed in 0.1s"))
    monkeypatch.setattr(gpu.Run, "steps", lambda *_, **__: {})
    for tool in (None, "compute-sanitizer"):
        monkeypatch.setattr(gpu.shutil, "which", lambda name, tool=tool: tool)
        for _ in range(20):
            run = gpu.Run(tmp_path, minutes=1)
            gpu.checks(run)
            found = json.loads(run.path.read_text())["checks"]
            ended = [name for name, each in found.items() if each["exit"] == 0]
            assert len(found) == 10 and len(ended) == (10 if tool else 4)


def test_why_cuda_was_not_built_is_kept(tmp_path, monkeypatch):
    said = iter([(1, "error: no such instruction"), (0, "building without CUDA: as was asked")])
    monkeypatch.setattr(gpu.Run, "call", lambda *_, **__: next(said))
    run = gpu.Run(tmp_path, minutes=1)
    gpu.build(run)
    found = json.loads(run.path.read_text())["build"]
    assert (found["exit"], found["cuda"]) == (0, False) and "no such instruction" in found["said"]


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
        ids = torch.tensor([[7], [8]])
        plain = on_gpu.decode_step(model, ids)
        with NoWaiting():
            first, second = plain(), plain()
            assert torch.equal(plain(), first) and not torch.equal(second, first)
        with sf.steering(model, make_sae(dtype=torch.bfloat16), {3: 5.0}):
            steered = on_gpu.decode_step(model, ids[:1])
            with NoWaiting():
                moved = steered()
            for _ in range(160):  # more often than the cache has places
                again = steered()
            assert torch.equal(again, moved) and not torch.equal(moved, first)


# ---- measures ----


@pytest.mark.usefixtures("one_thread")
def test_what_is_wrong_is_not_timed(monkeypatch):
    shape = workloads.Shape(d=256, N=2048, k=16, stream=512, worst=512)
    built = {w.name: w for w in workloads.build("bf16", on_gpu.SEVERAL, shape, device="cpu")}
    monkeypatch.setattr(on_gpu, "workload", lambda name, F: built[name].first(F))
    monkeypatch.setattr(on_gpu, "KERNELS", {"ours": "cpu", "triton": "cpu"})
    monkeypatch.setattr(ops, "steer", lambda x, *_, **__: x)
    with pytest.raises(exactness.Disagreement):
        on_gpu.measures()["worst T=1 F=1 ours"]()


@pytest.mark.parametrize(("tokens", "calls"), [(1, 512), (8, 512), (64, 64), (512, 8), (8192, 2)])
def test_a_graph_holds_hundreds_of_tokens(tokens, calls):
    shape = workloads.Shape(d=64, N=512, k=8, stream=8192, worst=1)
    w = workloads.build("bf16", 1, shape)[0]
    batches = on_gpu.batches(w, tokens)
    assert len(batches) == calls and all(len(x) == tokens for x in batches)
    timed = torch.cat(batches)
    assert torch.equal(timed[:8192], w.x[: len(timed)])
    p = timed.double() @ w.W_enc[w.features].double().T + w.b_enc[w.features]
    undecided = w.shares(tokens, on_gpu.calls(tokens))["undecided"]
    assert undecided == pytest.approx((p > 0).double().mean().item(), abs=1e-12)


# ---- results ----


def seconds(value: float) -> dict:
    return {"found": [value, value, 9 * value]}


def measured(**times: tuple[float, float]) -> dict[str, dict]:
    """What `measure` finds, by (T=1, T=8192) in us."""
    found: dict[str, dict] = {
        "floors": {"found": {"copy": 3e12, "product": 8e14, "launch": 2e-6}},
    }
    about = {"d": 3072, "N": 24576, "read": 1.0, "work": 1.0, "undecided": 1.0}
    for i, T in enumerate((1, 8192)):
        for w in ("planted", "worst"):
            found[f"{w} T={T} F=1 case"] = {"found": about}
            for name, each in times.items():
                found[f"{w} T={T} F=1 {name}"] = seconds(each[i] * 1e-6)
    return found


def result(found: dict) -> dict:
    smoked = {"smoke all": {}, "smoke triton": {}, "missing": {}}
    return smoked | {"checks": {"cuda": {"exit": 0}}, "measure": found}


def test_the_floor_is_the_larger_of_bytes_and_products():
    found = measured(ours=(100.0, 2000.0))
    case, *_, last = tables.cases(result(found))
    rates = found["floors"]["found"]
    assert case["T"] == 1 and last["T"] == 8192
    assert tables.floors(case, rates)["bytes"] == pytest.approx(50.3e-6, rel=1e-2)
    assert tables.floors(last, rates)["products"] == pytest.approx(1546e-6, rel=1e-2)
    assert max(tables.floors(last, rates), key=tables.floors(last, rates).get) == "products"


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
    assert gpu.propose(result(measured(**times))) == f"ON_GPU = {row}"


def test_nothing_is_proposed_unless_all_was_right():
    found = measured(ours=(5, 9), triton=(6, 10))
    found["worst T=1 F=1 ours"] = {"failed": "Disagreement: worst"}
    good = result(measured(ours=(5, 9)))
    untried = {name: found for name, found in good.items() if name != "smoke triton"}
    for bad, why in (
        (untried, "smoke of triton"),
        (result(found), "worst T=1 F=1 ours"),
        (good | {"checks": {"cuda": {"exit": 0}, "racecheck": {"exit": 1}}}, "racecheck"),
        (good | {"smoke mma": {"scan, few": {"failed": "all"}}}, "smoke mma: scan, few"),
        (good | {"smoke mma": {}, "missing": {"smoke mma": ["scan"]}}, "smoke mma: scan"),
        (good | {"checks broke": "RuntimeError"}, "checks broke"),
        (good | {"checks": {}}, "checks"),
    ):
        assert gpu.propose(bad) == f"ON_GPU stays as it is: not right: {why}"


def test_pytests_end_is_understood():
    said = "....\nFAILED tests/test_gpu.py::test_a - assert 1\n=== 1 failed, 3 passed in 2.1s ===\n"
    said = "SKIPPED [1] tests/test_gpu.py:9: needs two CUDA devices\n" + said
    found = gpu.summary(1, said)
    assert found["skipped"] == ["tests/test_gpu.py:9: needs two CUDA devices"]
    assert found["failed"] == ["tests/test_gpu.py::test_a"] and found["said"] == said
    assert found["summary"] == "1 failed, 3 passed in 2.1s"
    assert gpu.summary(-1, "...")["summary"] == "no end"
    assert gpu.summary(0, "3 passed, 2 warnings in 1.0s")["summary"].startswith("3 passed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_what_breaks_is_recorded(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "bench.gpu", "--parts", "measure", "--out", tmp_path]
    env = os.environ | {"TMPDIR": str(scratch)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert not [*scratch.iterdir()]
    (recorded,) = tmp_path.glob("gpu-*.json")
    assert "failed" in json.loads(recorded.read_text())["measure"][steps.BEFORE]
    assert "cuda" in recorded.with_suffix(".log").read_text().lower()
    assert "ON_GPU stays as it is: not right: checks, measure" in done.stdout


def test_nothing_is_imported_that_is_not_built_yet():
    code = "import sys; sys.modules['saesteer_fast'] = None; from bench import gpu; gpu.steps.work"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
