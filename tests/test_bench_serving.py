"""The serving suite: its table, what it refuses, and, where there is vLLM, that it runs."""

import os
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from bench_cases import MACHINE, SMALL, TINY_PHI3, run_small

from bench import ROOT, engine, exactness, phi3, report, timing, workloads
from bench.suites import serving
from bench.tables import serving as serving_tables


def case(run, requests, **more):
    """Three rounds, of which the second takes twice as long."""
    times = {"unsteered": 1, "again": 1, "ours": 1.01, "table": 1.02, "naive": 1.5}
    second = 0.064 if run == "prompt" else 0.04
    return {
        **{"model": "phi3", "mode": "eager", "requests": requests, "run": run},
        **{"T": requests * (32 if run == "prompt" else 1), "others": 0.01, "d": 3072, "N": 24576},
        **{"k": 32, "layers": 4, "layer": 1, "undecided": 0.022, "live": 0.005},
        "engine": {"vllm": "0.32.0", "torch": "2.13.0+cpu", "transformers": "5.19.0"},
        "scores": {"unsteered": [0.01, 0.0], "ours": [0.02, 4.0], "naive": [0.03, 3.0]},
        "seconds": {name: [second * t * r for r in (1, 2, 1)] for name, t in times.items()},
    }


@pytest.fixture
def result():
    cases = [case("prompt", 8), case("decode", 8)]
    miniature = {"model": "miniature", "mode": "compiled", "d": 128, "N": 1024, "layers": 6}
    cases.append(case("decode", 1) | miniature | {"layer": 5, "others": 0.034})
    return {"suite": "serving", "machine": MACHINE, "cases": cases}


def test_table(result):
    text = report.render(result)
    added = "0 % (0 to 0) | 1.00 % (1.00 to 1.00) | 2.00 % (2.00 to 2.00) | 50.0 % (50.0 to 50.0) |"
    assert f"| Phi-3 Mini | eager | 8 | prompts | 64.0 ms | 4000 | {added}" in text
    assert f"| Phi-3 Mini | eager | 8 | a token each | 40.0 ms | 200 | {added}" in text
    assert f"| miniature | compiled | 1 | a token each | 40.0 ms | 25.0 | {added}" in text
    assert "Phi-3 Mini: 4 layers, steered after layer 1, d=3072, N=24576, k=32, bf16, 2.2 %" in text
    assert "miniature: 6 layers, steered after layer 5, d=128, N=1024" in text
    assert "prompts of 32 tokens" in text and "took at most 3.4 % of the cores" in text
    assert "0.030 off those of transformers at most" in text and "by 3.00 at least" in text
    one_core = result | {"machine": result["machine"] | {"cores": 1}}
    assert "Times are CPU time." in report.render(one_core) and "CPU time" not in text
    assert "vLLM 0.32.0 with PyTorch 2.13.0+cpu; a processor, 4 cores" in text


def test_a_page_has_it(tmp_path, result):
    assert "serving.py --record" in report.recorded(tmp_path, "serving")
    report.save(result, tmp_path)
    assert report.recorded(tmp_path, "serving") == serving_tables.render(result)


def test_cases():
    short, full = serving.cases(full=False), serving.cases(full=True)
    assert set(short) < set(full) and {case.mode for case in short} == {"eager"}
    started = [(case.model, case.mode) for case in full]
    changes = sum(one != other for one, other in pairwise(started))
    assert changes == len(set(started)) - 1, "engines would start more than once"


def test_without_vllm_it_says_so(monkeypatch, tmp_path):
    for python in (sys.executable, str(tmp_path / "python")):
        monkeypatch.setattr(engine, "PYTHON", python)
        monkeypatch.setattr(engine, "THERE", "import sys; sys.exit(1)")
        assert engine.missing() == f"{python} has no vLLM; name one that has with SAESTEER_VLLM="


def test_an_engine_that_ends_says_why(monkeypatch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho no such model >&2\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(engine, "PYTHON", str(tmp_path / "python"))
    with pytest.raises(RuntimeError, match="vLLM ended: no such model"):
        engine.Engine(tmp_path, model="model")


class Answers:
    """An engine that tells what it was asked, and that others took these shares of its cores."""

    def __init__(self, shares=(), scores=0.0):
        self.shares, self.scores, self.asked = iter(shares), scores, []

    def ask(self, prompts, asked, new, scored=False):
        self.asked.append((prompts, asked))
        made = [[3] * new for _ in prompts]
        scores = [[self.scores] * new for _ in prompts]
        found = {"prompt": float(len(self.asked)), "decode": 0.5, "others": next(self.shares, 0.0)}
        return found | ({"ids": made, "scores": scores} if scored else {})


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(phi3, "OPTIONS", TINY_PHI3)
        patch.setattr(phi3, "BLOCK", 1 << 12)
        patch.setattr(workloads, "FULL", SMALL)
        yield serving.first_layers(tmp_path_factory.mktemp("phi3"))


def test_disturbed_rounds_are_taken_again(subject):
    engines = {name: Answers() for name in serving.NAMES}
    engines["naive"] = Answers([0, 0.01, 0.3, 0.02, 0.2])
    seconds, others = serving.rounds(subject, engines, requests=4, count=7)
    assert others == 0.02
    # The first round warms up, the third and the fifth were disturbed.
    assert sorted(seconds["prompt"]["ours"]) == [2, 4, 6, 7, 8, 9, 10]
    assert engines["ours"].asked == [(p, [None] * 4) for p, _ in engines["naive"].asked]
    assert engines["table"].asked[0][1] == ["strong", "weak", None, "strong"]
    engines["naive"] = Answers([0] + [0.3] * 20 + [0.1])
    seconds, others = serving.rounds(subject, engines, requests=1, count=7)
    assert others == 0.3 and {len(of) for of in seconds["decode"].values()} == {7}


def test_an_engine_that_steers_otherwise_disagrees(subject, monkeypatch):
    class Right(Answers):
        def ask(self, prompts, asked, new, scored=False):
            made = [prompt[:new] for prompt in prompts]
            each = zip(asked, prompts, made, strict=True)
            scores = [subject.score(self.name, *one).tolist() for one in each]
            return super().ask(prompts, asked, new) | {"ids": made, "scores": scores}

    engines = {name: Right() for name in serving.NAMES}
    for name, one in engines.items():
        one.name = name
    found = serving.verify_all(subject, engines)
    assert all(error < 1e-3 < moved for n, (error, moved) in found.items() if n in EDITED)
    for name in EDITED:
        for wrong in ("unsteered", "table" if name == "ours" else "ours"):
            engines[name].name = wrong
            if not (name == "naive" and wrong == "ours"):
                with pytest.raises(exactness.Disagreement, match=f"{name}: log-probabilities"):
                    serving.verify_all(subject, engines)
        engines[name].name = name


EDITED = ("ours", "table", "naive")


def test_others_are_told_from_us():
    if not timing.Others.STAT.exists():
        pytest.skip("the system does not tell")
    core = min(os.sched_getaffinity(0))
    loop = (
        f"import os, time; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile True: pass"
    )
    process = subprocess.Popen([sys.executable, "-c", loop], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        others = timing.Others()
        time.sleep(0.5)
        cores = len(os.sched_getaffinity(0))
        assert others.share() > 0.3 / cores
    finally:
        process.kill()
        process.wait()


def test_it_runs_in_vllm(tmp_path):
    """Eager, on a model of two tiny layers, and on the miniature."""
    if reason := engine.missing():
        pytest.skip(reason)
    plugin = (
        "from bench import phi3\nfrom bench.suites import serving\n"
        f"phi3.OPTIONS = {TINY_PHI3}\nphi3.BLOCK = 1 << 12\n"
        "serving.ROUNDS, serving.TRIES = dict.fromkeys(serving.ROUNDS, 2), 1\n"
    )
    done = run_small(tmp_path, "--record", "-k", "eager-8", plugin=plugin, suites=("serving",))
    assert done.returncode == 0, done.stdout
    result = report.newest(tmp_path, "serving")
    assert report.render(result, everything=True) in done.stdout
    assert len(result["cases"]) == 4
    assert str(ROOT) not in (tmp_path / next(tmp_path.glob("serving-*.json"))).read_text()
