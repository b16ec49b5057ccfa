"""`saesteer verify`, without a GPU: what it tries, what it makes of it, and that auto follows."""

from __future__ import annotations

import importlib.metadata
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from saesteer_fast import cache, choice, ops, verdicts, verify
from saesteer_fast.verify import smoke, steps, times

# ---- steps ----

BROKEN = """
import os, signal, sys, time
from pathlib import Path

sys.path.insert(0, sys.argv[2])  # alone, it starts in no time
import steps

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
        "hangs": lambda: time.sleep(600),
        "after all": lambda: [2.0],
    },
    Path(sys.argv[1]),
    healthy,
)
"""


ALL_RIGHT_BUT_THE_END = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])
import steps

steps.work({"right": lambda: 1}, Path(sys.argv[1]), lambda: None)
sys.exit(3)
"""


class Clock:
    """Stands still but for a step that hangs: a machine may be as slow as it likes."""

    def __init__(self, store: Path):
        self.store, self.seconds = store, 0.0

    def monotonic(self) -> float:
        latest = steps._steps(self.store)[-1:]  # whole lines: one may be about to be written
        self.seconds += any(line.get("began") == "hangs" for line in latest)
        return self.seconds

    sleep = staticmethod(time.sleep)


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """What the steps of a script find."""

    def run(script: str, patience=2.0, deadline=30.0) -> dict[str, dict]:
        store = tmp_path / "store.jsonl"
        store.touch()
        monkeypatch.setattr(steps, "time", Clock(store))
        command = [sys.executable, "-c", script, str(store), str(Path(steps.__file__).parent)]
        with (tmp_path / "log").open("w") as log:
            steps.supervise(command, store, patience=patience, deadline=deadline, log=log)
        return steps.results(store)

    return run


def test_every_step_has_its_line_whatever_another_does(supervised):
    found = supervised(BROKEN)
    assert list(found) == ["right", "raises", "dies", "breaks", "hangs", "after all"]
    assert found["right"]["found"] == {"a": 1} and found["after all"]["found"] == [2.0]
    assert found["raises"]["failed"] == "ZeroDivisionError: division by zero"
    assert found["dies"]["failed"] == "the process ended with -11"
    assert found["breaks"]["failed"] == "RuntimeError: an illegal memory access"
    assert found["hangs"]["failed"] == "no end after 2 s"


def test_a_process_that_cannot_start_is_not_started_for_ever(supervised):
    found = supervised("import nothing_of_this_name")
    assert list(found) == [steps.BEFORE] and "ended with 1" in found[steps.BEFORE]["failed"]


def test_half_a_line_is_not_read(tmp_path):
    store = tmp_path / "store.jsonl"
    store.write_text('{"planned": ["a", "b"]}\n{"step": "a", "found": 1}\n{"step": "b", "fou')
    assert steps.results(store) == {"a": {"found": 1}} and steps.missing(store) == ["b"]


def test_nothing_outlasts_the_deadline(tmp_path, supervised):
    found = supervised(BROKEN, patience=60, deadline=1.5)
    assert found["hangs"]["failed"] == "no time was left" and "after all" not in found
    assert steps.missing(tmp_path / "store.jsonl") == ["after all"]


# ---- smoke ----


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(smoke, "FULL", smoke.Size(d=520, N=1500))
    monkeypatch.setattr(times, "FULL", smoke.FULL)


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


def test_times_are_of_right_calls_alone(monkeypatch):
    monkeypatch.setattr(times, "TOKENS", (1, 70))
    found = {name: {"found": step()} for name, step in times.steps("cpu", "cpu").items()}
    assert times.by_tokens(found).keys() == {1, 70}
    assert all(each > 0 for seconds in times.by_tokens(found).values() for each in seconds)
    del found["T=70"]
    assert times.by_tokens(found).keys() == {1}
    right = ops.steer
    monkeypatch.setattr(ops, "steer", lambda *a, **options: right(*a, **options) + 1)
    with pytest.raises(AssertionError, match="are wrong"):
        times.steps("cpu", "cpu")["T=70"]()


def test_a_process_that_ends_badly_is_not_started_for_ever(supervised):
    found = supervised(ALL_RIGHT_BUT_THE_END)
    assert found.pop("right")["found"] == 1
    assert found == {steps.BEFORE: {"failed": "the process ended with 3"}}


# ---- verdicts ----

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU of which only the name is known, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for impl in choice.MISSING:
        monkeypatch.setitem(choice.MISSING, impl, None)
    forget()
    yield
    forget()


def forget() -> None:
    for cached in (verdicts.read, verdicts.kernels, choice._tell_of_idle_kernels):
        cached.cache_clear()


class OnGpu:
    """What `choice.on_gpu` asks of a tensor."""

    def __init__(self, *leading: int):
        self.shape, self.device = torch.Size((*leading, 4)), GPU


def chosen(*leading: int) -> str:
    return choice.on_gpu(OnGpu(*leading))


@pytest.mark.parametrize(
    ("times", "rows"),
    [
        ({}, [(0, "reference")]),
        ({1: {"cuda": [1, 4]}}, [(0, "cuda reference")]),
        ({8: {"cuda": [1, 4], "triton": [3, 3]}}, [(0, "cuda triton reference")]),
        ({1: {"cuda": [1, 100], "triton": [20, 20]}}, [(0, "cuda triton reference")]),
        (
            {
                512: {"cuda": [9, 9], "triton": [1, 1]},
                1: {"cuda": [1, 1], "triton": [9, 9]},
                64: {"cuda": [2, 2], "triton": [9, 9]},
                8192: {"cuda": [9, 9], "triton": [1, 1]},
            },
            [(0, "cuda triton reference"), (512, "triton cuda reference")],
        ),
    ],
)
def test_the_faster_comes_first(times, rows):
    assert verdicts.rows(times) == tuple((least, tuple(impls.split())) for least, impls in rows)


def test_auto_follows_the_verdict(gpu):
    rows = (0, ("cuda", "reference")), (512, ("triton", "cuda", "reference"))
    verdicts.write(GPU, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(1) == chosen(511) == "cuda"
        assert chosen(512) == chosen(2, 256) == "triton"
    said = choice.implementations()["cuda:0"]
    assert said == "A GPU: cuda from 0 tokens on, triton from 512 tokens on"


def test_without_a_verdict_the_reference_runs_and_says_so(gpu):
    with pytest.warns(UserWarning, match=r"on A GPU, .* \(cuda, triton\): `saesteer verify`"):
        assert chosen(1) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(1) == "reference"
    assert "has not tried" in choice.implementations()["cuda:0"]


def test_without_kernels_there_is_nothing_to_say(gpu, monkeypatch):
    for impl in choice.MISSING:
        monkeypatch.setitem(choice.MISSING, impl, "not there")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(1) == "reference"


def test_every_model_of_gpu_has_its_own_verdict(gpu, monkeypatch):
    names = {0: "A GPU", GPU: "A GPU"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names.get(device, "Another"))
    verdicts.write(GPU, ((0, ("cuda", "reference")),))
    verdicts.write(torch.device("cuda", 1), ((0, ("triton", "reference")),))
    said = choice.implementations()
    assert said["cuda:0"] == "A GPU: cuda for any number of tokens"
    assert said["cuda:1"] == "Another: triton for any number of tokens"


def test_a_cache_that_cannot_be_read_holds_no_verdict(gpu, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert verdicts.read(GPU) is None


def test_a_verdict_is_on_these_kernels_alone(gpu, monkeypatch):
    verdicts.write(GPU, ((0, ("cuda", "reference")),))
    tiles = cache.tiles()
    tiles.write_text("{}")
    forget()
    assert verdicts.read(GPU) is None
    tiles.unlink()
    settings = {"SAESTEER_SCAN": "simt", "SAESTEER_LADDER": "steps", "TRITON_INTERPRET": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
        forget()
        assert verdicts.read(GPU) is None
        monkeypatch.delenv(name)
    forget()
    assert verdicts.read(GPU) == ((0, ("cuda", "reference")),)


@pytest.mark.parametrize("changed", ["library.so", "triton_kernels/count.py", "Triton"])
def test_another_build_has_no_verdict(gpu, monkeypatch, tmp_path, changed):
    (tmp_path / "triton_kernels").mkdir()
    for file in ("library.so", "triton_kernels/count.py"):
        (tmp_path / file).write_text("as it was tried")
    monkeypatch.setattr(verdicts, "HERE", tmp_path)
    monkeypatch.setattr(verdicts, "CUDA_LIBRARY", tmp_path / "library.so")
    verdicts.write(GPU, ((0, ("cuda", "reference")),))
    forget()
    assert verdicts.read(GPU)
    if changed == "Triton":
        monkeypatch.setattr(importlib.metadata, "version", lambda package: "0")
    else:
        (tmp_path / changed).write_text("built anew")
    forget()
    assert verdicts.read(GPU) is None


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"A GPU": {}}', '{"A GPU": {"kernels": "", "rows": []}}']
)
def test_a_broken_file_is_named(gpu, text):
    cache.gpus().parent.mkdir()
    cache.gpus().write_text(text)
    with pytest.raises(ValueError, match=r"gpus\.json holds no verdicts; delete it"):
        verdicts.read(GPU)


def test_what_time_left_out_is_not_right(gpu, monkeypatch):
    monkeypatch.setattr(verify, "MINUTES", 0)
    assert not verify.verify(GPU)[1] and verdicts.read(GPU) == ((0, ("reference",)),)


def test_without_memory_there_is_no_verdict(gpu, monkeypatch):
    full = {"T=8192": {"failed": "OutOfMemoryError: CUDA out of memory"}}
    monkeypatch.setattr(verify, "tried", lambda impl, device: found() | full)
    report, right = verify.verify(GPU)
    assert not right and "no verdict" in report and verdicts.read(GPU) is None


def found(*failed: str) -> dict[str, dict]:
    lines = {"decode": {"found": {}}, "T=1": {"found": [1e-5, 5e-5]}, "T=64": {"found": [1, 1]}}
    return lines | {name: {"failed": "wrong"} for name in failed}


def test_only_what_is_right_enters_the_verdict(gpu, monkeypatch):
    results = {"cuda": found("decode"), "triton": found()}
    monkeypatch.setattr(verify, "tried", lambda impl, device: results[impl])
    report, right = verify.verify(GPU)
    assert not right and verdicts.read(GPU) == ((0, ("triton", "reference")),)
    assert "cuda: 2 of 3 right\n  decode: wrong" in report and "triton: 3 of 3 right" in report
    results["cuda"] = found()
    results["triton"] = found("start")
    assert not verify.verify(GPU)[1]
    assert verdicts.read(GPU) == ((0, ("cuda", "reference")),)
    monkeypatch.setitem(choice.MISSING, "cuda", "no compiler")
    report, right = verify.verify(GPU)
    assert not right and "cuda: no compiler" in report
    assert verdicts.read(GPU) == ((0, ("reference",)),)


def test_the_process_tries_every_step(monkeypatch):
    """Triton's kernels outside of its interpreter: every step of them is refused."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = verify.tried("triton", torch.device("cpu"))
    assert done.keys() == smoke.steps("triton", "cpu").keys() | times.steps("triton", "cpu").keys()
    assert all("cannot run for a tensor on cpu" in each["failed"] for each in done.values())


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="saesteer verify: this PyTorch sees no GPU"):
        verify.main()
