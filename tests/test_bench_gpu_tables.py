"""What README says of a run of `make gpu`, from a run of all its parts on small shapes, on the CPU,
with a clock and a device that are not real: no figure of it leaves this file."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from bench_cases import TINY_PHI3

from bench import gpu, phi3, report, workloads
from bench.suites import gpu as on_gpu
from bench.tables import gpu as tables
from saesteer_fast.verify import smoke, steps

SMALL = dict(d=64, N=512, k=8)
CACHED = ("whole", "workload", "phi3_mini", "planted_on_phi3", "torch_compiled")
SAID = "SKIPPED [1] tests/test_gpu.py:1: needs two CUDA devices\n3 passed, 1 skipped in 2.0s\n"


def graphed(call, inputs):
    """Runs what a graph would hold; the first two calls stand for all."""
    return SimpleNamespace(replay=lambda: [call(x) for x in inputs[:2]])


def replayed(run) -> list[float]:
    run()
    return [1e-3] * 7


@pytest.fixture(scope="module")
def emulated(one_thread):
    """bench.gpu on the CPU: every step of every part runs, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        small, few = workloads.Shape, smoke.steps
        for name, value in {
            "DEVICE": "cpu",
            "KERNELS": {"ours": "cpu", "triton": "cpu"},
            "COPIED": 1 << 10,
            "SIDE": 8,
            "LAYER": 1,
            "STEPS": {"graph": 16, "eager": 2},
            "graphed": graphed,
            "replayed": replayed,
        }.items():
            patch.setattr(on_gpu, name, value)
        patch.setattr(workloads, "Shape", lambda **tokens: small(**SMALL, **tokens))
        patch.setattr(
            phi3, "OPTIONS", TINY_PHI3 | {"hidden_size": SMALL["d"], "num_hidden_layers": 3}
        )
        patch.setattr(phi3, "BLOCK", 1 << 12)
        patch.setattr(torch, "compile", lambda run, **_: run)
        patch.setattr(
            smoke, "steps", lambda impl, device: dict(islice(few("cpu", "cpu").items(), 0, None, 9))
        )
        properties = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
        for name, value in {
            "synchronize": None,
            "reset_peak_memory_stats": None,
            "memory_allocated": 0,
            "max_memory_allocated": 1 << 20,
            "get_device_properties": properties,
            "get_device_name": "an emulated GPU",
        }.items():
            patch.setattr(torch.cuda, name, lambda *_, value=value: value)
        patch.setattr(
            gpu.steps,
            "supervise",
            lambda command, store, **_: on_gpu.main([*map(str, command[3:])]),
        )
        patch.setattr(gpu.Run, "call", lambda *_, **__: (0, SAID))
        patch.setattr(gpu.shutil, "which", lambda name: name)
        for name in CACHED:
            getattr(on_gpu, name).cache_clear()
        yield
    for name in CACHED:
        getattr(on_gpu, name).cache_clear()


@pytest.fixture(scope="module")
def results(emulated, tmp_path_factory):
    """The folder of a whole run's record."""
    folder = tmp_path_factory.mktemp("results")
    assert gpu.main(["--out", str(folder)]) == 0
    return folder


@pytest.fixture
def result(results):
    return report.newest(results, "gpu")


def test_every_step_runs_and_is_shown(result, results):
    assert [*result["measure"]] == [*on_gpu.measures()] and not any(result["missing"].values())
    assert all("failed" not in each for each in result["measure"].values())
    assert tables.mistakes(result) == [] and len(result["checks"]) == 4 + len(gpu.SANITIZERS)
    text = report.recorded(results, "gpu")
    assert text.startswith(report.recorded(results, "gpu", tables.short).rpartition("\n\n")[0])
    for case in tables.cases(result):
        assert f"| {case['workload']} | {case['F']} | {case['T']} | " in text
        assert "—" not in tables._share(case | {"rates": tables.found(result, "floors")})
    for by in tables.CALLERS.values():
        assert f"| {by} | " in text
    for how in on_gpu.STEPS:
        assert f'| `impl="cuda"`, {how} | {on_gpu.STEPS[how]} | ' in text
    smoked = (f"smoke {each}" for each in ("all", "mma", "simt", "at once", "triton"))
    for name in (*result["checks"], *smoked):
        assert f"| {name} | " in text
    assert text.count("| right |") == len(result["checks"]) + 5
    assert "- cuda, on a GPU only: skipped: tests/test_gpu.py:1: needs two CUDA devices" in text
    assert "did not run" not in text and "not measured" not in text
    assert "an emulated GPU, 132 multiprocessors, compute capability 9.0, driver" in text
    assert f"commit {result['measure']['machine']['found']['commit']}" in text
    assert f", {result['measure']['machine']['found']['processor']}, " in text
    assert "IQR" in report.render(result, everything=True)


def test_its_file_is_the_suites_newest(result, results):
    (path,) = results.glob("*.json")
    date = result["machine"]["date"]
    assert path.name == f"gpu-{date[:19].replace(':', '-')}.json"
    assert result["suite"] == "gpu" and path.with_suffix(".log").exists()


def verdicts(text: str) -> str:
    """The table of targets."""
    return text[text.index("| target |") :].partition("\n\n")[0]


def verdict(result: dict, target: str) -> list[str]:
    (row,) = [r for r in verdicts(report.render(result)).split("\n") if r.startswith(f"| {target}")]
    return row.strip("| ").split(" | ")[1:]


RATES = {"copy": 3e12, "product": 8e14, "launch": 2e-6}
TIMES = {"triton": 1.1, "naive": 50, "lean": 20, "smart": 2}


@pytest.fixture
def full_size(result):
    """The same, as if at full size, all targets met: W_enc is read in 50 us."""
    measured = result["measure"]
    measured["floors"]["found"] = RATES
    for name, each in measured.items():
        if not (match := tables.CASE.fullmatch(name)):
            continue
        if match["by"] == "case":
            each["found"] |= {"d": 3072, "N": 24576, "k": 32}
            continue
        few, planted = int(match["T"]) <= 64, match["workload"] == "planted"
        us = (3.5 if planted else 52.0) if few else (80.0 if planted else 1700.0)
        by, _, compiled = match["by"].partition(", ")
        us = {"linear": 1600.0, "copy": 30.0}.get(by, us * TIMES.get(by, 1))
        if compiled:
            us *= 0.75 if by == "smart" else 1.5
        each["found"] = [us * 1e-6] * 6 + [us * 2e-6]
    for how in ("graph", "eager"):
        seconds = measured[f"decode step: ours, {how}"]["found"]["seconds"]
        for name, ms in (("unsteered", 2.6), ("again", 2.6), ("ours", 2.61), ("worst", 2.66)):
            seconds[name] = [ms * 1e-3] * 5
    return result


def test_targets_are_met(full_size):
    assert len(tables.TARGETS) == 11
    rows = verdicts(report.render(full_size)).split("\n")[2:]
    assert len(rows) == 11 and all(row.endswith("| met |") for row in rows)
    assert verdict(full_size, "T=1 to 64 worst: ours ≤ 55 µs")[0].startswith("52.0 µs (worst round")
    speed = verdict(full_size, "T=1 to 64 worst: W_enc, read by ours ≥ 2.75 TB/s")[0]
    assert speed.startswith("2.90 TB/s")  # 151 MB in 52 µs
    share = verdict(full_size, "T=1 to 64 worst: W_enc, read by Triton, of the copy's rate ≥ 85 %")
    assert share[0].startswith("88.0 %")  # 151 MB in 57.2 µs, of 3 TB/s
    assert verdict(full_size, "decode step of Phi-3 Mini")[0].startswith("0.38 %")


@pytest.mark.parametrize(
    ("step", "us", "target"),
    [
        ("worst T=8 F=1 ours", 56, "T=1 to 64 worst: ours ≤ 55 µs"),
        ("worst T=64 F=1 ours", 55.5, "T=1 to 64 worst: W_enc, read by ours ≥ 2.75 TB/s"),
        ("worst T=8192 F=1 ours", 1900, "T=8192 worst: ours / F.linear ≤ 1.15×"),
        ("planted T=8192 F=1 copy", 26, "T=8192 planted: ours / copy of x ≤ 3×"),
        ("planted T=1 F=1 ours", 4.1, "T=1 planted, in a CUDA graph: ours ≤ 4 µs"),
        ("worst T=8192 F=1 triton", 2010, "T=8192 worst: Triton / F.linear ≤ 1.25×"),
        ("worst T=1 F=1 triton", 60, "T=1 to 64 worst: W_enc, read by Triton"),
        ("planted T=2048 F=1 triton", 97, "any T, planted: Triton / ours ≤ 1.2×"),
    ],
)
def test_a_target_that_is_missed_or_not_measured(full_size, step, us, target):
    assert verdict(full_size, target)[1] == "met"
    full_size["measure"][step]["found"] = [us * 1e-6] * 7
    assert verdict(full_size, target)[1] == "**missed**"
    del full_size["measure"][step]
    full_size["missing"]["measure"] = [step]
    _, verdict_ = verdict(full_size, target)
    assert verdict_.startswith("open"), verdict_
    assert f"- measure: 1 steps did not run, from `{step}` on" in report.render(full_size)


def test_a_decode_step_and_memory_may_miss(full_size):
    measured = full_size["measure"]
    measured["decode step: ours, graph"]["found"]["seconds"]["ours"] = [2.63e-3] * 5
    assert verdict(full_size, "decode step of Phi-3 Mini")[1] == "**missed**"
    measured["memory: ours"]["found"]["8192"] = (1 << 20) + 64 * 8192 + 1
    assert verdict(full_size, "any T, worst: memory of ours")[1] == "**missed**"
    assert verdict(full_size, "any T, worst: memory of Triton")[1] == "met"


def test_shares_and_ratios(full_size):
    text = report.render(full_size)
    ratios = "1.10× (1.10) | 50.0× (50.0) | 20.0× (20.0)"
    assert f"| worst | 1 | 8 | 52.0 µs | {ratios} | 2.00× (2.00) | " in text
    assert f"| worst | 1 | 512 | 1.70 ms | {ratios} | 1.50× (1.50) c | 0.94×" in text
    assert "| 96.8 % (bytes) | 100 % |" in text
    assert "| 91 % (products) | 100 % |" in text  # 8192 tokens times 151 MFLOP at 800 TFLOP/s
    full_size["measure"]["floors"]["found"] = RATES | {"launch": 3e-6}
    assert "| 85.7 % (launch) |" in report.render(full_size)
    del full_size["measure"]["floors"]
    assert "by the rates of this run: not measured" in report.render(full_size)


def test_what_failed_is_named(full_size):
    full_size["measure"]["worst T=1 F=1 ours"] = {"failed": "the process ended with -11"}
    full_size["smoke mma"]["scan, few"] = {"failed": "all"}
    full_size["missing"]["smoke simt"] = ["scan, many"]
    full_size["checks"]["racecheck"] |= {"exit": 1, "failed": ["tests/test_gpu.py::a"]}
    full_size["checks"]["synccheck"] = {"exit": None, "summary": "no compute-sanitizer"}
    full_size["scan"] = "simt"
    text = report.render(full_size)
    assert "| worst | 1 | 1 | **failed** | 57.2 µs | 2.60 ms |" in text
    assert "- worst T=1 F=1 ours: the process ended with -11" in text
    steps_ = len(full_size["smoke mma"])
    assert f"| smoke mma | {steps_ - 1} of {steps_} right | **wrong** |" in text
    assert f"| smoke simt | {steps_ - 1} of {steps_} right | **wrong** |" in text
    assert "| synccheck | no compute-sanitizer | **not run** |" in text
    assert "- smoke mma: scan, few: all" in text
    assert "- smoke simt: 1 steps did not run, from `scan, many` on" in text
    assert "- racecheck: failed: tests/test_gpu.py::a" in text and "`SAESTEER_SCAN=simt`" in text
    assert verdict(full_size, "T=1 to 64 worst: ours")[1] == "open: not measured at T=1"
    wrong = tables.mistakes(full_size, "cuda")
    assert wrong == tables.mistakes(full_size) and tables.mistakes(full_size, "triton") == []
    assert "worst T=1 F=1 ours" in wrong and "racecheck" in wrong
    assert {"smoke mma: scan, few", "smoke simt: scan, many"} <= {*wrong}
    assert tables.standing(full_size) == (
        "on an emulated GPU `make gpu` found `cuda` **not all right** and `triton` right"
    )


def test_the_faster_kernels_are_proposed_from_such_a_run(full_size):
    assert gpu.propose(full_size) == "ON_GPU = ((0, ('cuda', 'triton', 'reference')),)"
    full_size["missing"]["measure"] = []
    for name in [n for n in full_size["measure"] if n.startswith("worst T=8192 F=1")]:
        del full_size["measure"][name]
        full_size["missing"]["measure"].append(name)
    assert gpu.propose(full_size) == "ON_GPU = ((0, ('cuda', 'triton', 'reference')),)"


@pytest.mark.parametrize("kept", [(), ("build", "smoke all"), ("measure",)])
def test_a_run_that_ended_early_is_shown_too(full_size, kept):
    head = {name: full_size[name] for name in ("suite", "machine")}
    part = head | {"missing": {}} | {name: full_size[name] for name in kept}
    text = report.render(part)
    for name in {"build", "checks", "measure"} - {*kept}:
        assert f"- {name}: did not run" in text
    assert tables.mistakes(part)[0] == "checks"
    if "measure" in kept:
        assert "| met |" in text and "an emulated GPU" in text and "Nothing was checked." in text
    else:
        assert "The op was not measured." in text and "| met |" not in text
        assert "The device and the versions are not recorded; 20" in text
    started = part | {"measure": {steps.BEFORE: {"failed": "the process ended with 1"}}}
    assert "- start: the process ended with 1" in report.render(started) or "measure" in kept


def test_nothing_is_recorded(tmp_path):
    nothing = "No run of `make gpu` is recorded: nothing here has run on a GPU."
    assert report.recorded(tmp_path, "gpu") == nothing
    assert tables.standing(None) == "**neither has run on a GPU**"
