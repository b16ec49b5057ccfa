"""The benchmark: its workloads, its refusals, and tables that follow from the stored results."""

import json
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from bench_cases import MACHINE, SMALL, op_case, op_result, record_demo, run_small

from bench import baselines, exactness, peers, report, workloads
from bench.suites import op as suite
from bench.tables import common, miniature, summary
from bench.tables import op as op_tables
from bench.tables import workloads as workload_tables
from bench.timing import Contestant, interleaved
from saesteer_fast import ops, reference


@pytest.fixture(scope="module", params=workloads.DTYPES)
def pair(request):
    """The planted and the worst workload; not to be written to."""
    return workloads.build(request.param, 4, SMALL)


def steer(w):
    fixed = w.W_enc, w.b_enc, w.directions, w.features, w.values, w.k
    return lambda x: ops.steer(x, *fixed, order=w.order)


def feature_acts(w):
    return lambda x: ops.feature_acts(x, w.W_enc, w.b_enc, w.features, w.k, order=w.order)


@pytest.mark.parametrize("features", [1, 4])
def test_shares(pair, features):
    planted, worst = (w.first(features) for w in pair)
    shares = planted.shares(1)
    assert 0.018 < shares["undecided"] < 0.026
    assert 0.0035 < shares["live"] < 0.0065
    assert shares["live"] < shares["work"] == shares["read"] < features * shares["undecided"]
    assert planted.shares(512)["read"] > planted.shares(16)["read"] > shares["read"]
    assert all((batch.shape[0] == 16) for batch in planted.settled(16))
    all_of_it = {"tokens": len(worst.x), "median": 1, "p99": 1, "max": 1}
    assert worst.shares(1) == {
        **{"undecided": 1, "live": 1, "work": 1, "read": 1},
        "spread": {"all": all_of_it, "undecided": all_of_it},
    }


@pytest.mark.parametrize("features", [1, 4])
def test_spread_is_that_of_the_tokens(pair, features):
    w = pair[0].first(features)
    needed = sorted(w.ranks.scanned.amax(-1).tolist())
    undecided = [share for share in needed if share > 0]
    assert len(undecided) == (w.preacts > 0).any(-1).sum()
    found = w.shares(1)["spread"]
    for shares, said in ((needed, found["all"]), (undecided, found["undecided"])):
        assert said["tokens"] == len(shares) and said["max"] == shares[-1]
        for within, at in ((0.5, "median"), (0.99, "p99")):
            assert said[at] in shares
            assert sum(share <= said[at] for share in shares) >= within * len(shares)
            assert sum(share < said[at] for share in shares) <= within * len(shares)
    assert w.shares(1, calls=10)["spread"]["all"]["tokens"] == 10
    settled = replace(w, x=w.x[(w.preacts <= 0).all(-1)])
    assert settled.shares(1)["spread"]["undecided"] == {"tokens": 0}


def test_scanned_is_what_a_plain_count_says(pair):
    w = pair[0].first(1)
    f = w.features[0]
    for t in (w.preacts[:, 0] > 0).nonzero()[:, 0][:20].tolist():
        p = reference.preacts(w.x[t], w.W_enc, w.b_enc)
        beaten = needed = 0
        while needed < SMALL.N and beaten < w.k:
            beaten += bool(p[needed] > p[f])
            needed += 1
        assert w.ranks.scanned[t] == pytest.approx(needed / SMALL.N)


def test_hot_first_is_the_same_workload_and_less_work(pair):
    w = pair[0].first(4)
    hot = w.hot_first
    assert not (w.sample[:, None, :8] == w.x[:, :8]).all(-1).any(), "calibrated on what is timed"
    assert torch.equal(hot.W_enc, w.W_enc[hot.order]) and torch.equal(hot.directions, w.directions)
    assert torch.equal(hot.truth, w.truth) and torch.equal(hot.close, w.close)
    assert torch.equal(steer(hot)(w.x), steer(w)(w.x))
    exactness.check_ours(hot, hot.batches(16), steer(hot), feature_acts(hot))
    plain, less = w.shares(16), hot.shares(16)
    assert (less["undecided"], less["live"]) == (plain["undecided"], plain["live"])
    assert plain["live"] < less["work"] < 0.9 * plain["work"]
    assert less["read"] < plain["read"]


@pytest.mark.parametrize("rows", [workloads.ROWS, 777])
def test_ranks_are_the_references_everywhere(pair, rows, monkeypatch):
    monkeypatch.setattr(workloads, "ROWS", rows)
    whole = pair[0].first(4)
    w = replace(whole)
    arguments = w.x, w.W_enc, w.b_enc, w.features, w.k
    truth = reference.feature_acts(*arguments, dtype=torch.float64)
    torch.testing.assert_close(w.truth, truth, rtol=1e-12, atol=0)
    assert torch.equal(w.close, reference.undecided(*arguments))
    assert torch.equal(w.ranks.scanned, whole.ranks.scanned)


def test_equal_latents_rank_by_index(monkeypatch):
    monkeypatch.setattr(workloads, "ROWS", 3)
    x, W = torch.randint(-3, 4, (5, 8)).float(), torch.ones(7, 8)
    x[:, 0] = 50
    everyone = torch.arange(7)
    w = workloads.Workload("equal", x, W, torch.zeros(7), W, torch.zeros(8), everyone, k=2)
    assert w.ranks.live.tolist() == [[True] * 2 + [False] * 5] * 5


def test_workloads_repeat(pair):
    dtype = {value: name for name, value in workloads.DTYPES.items()}[pair[0].x.dtype]
    for w, again in zip(pair, workloads.build(dtype, 4, SMALL), strict=True):
        assert all(
            torch.equal(getattr(w, name), getattr(again, name))
            for name in ("x", "W_enc", "b_enc", "W_dec", "b_dec", "features")
        )


@pytest.mark.parametrize("tokens", [16, 512, 3000])
def test_ours_passes(pair, tokens):
    for w in pair:
        w = w.first(1)
        exactness.check_ours(w, w.batches(tokens), steer(w), feature_acts(w))


def test_a_call_may_take_more_tokens_than_the_stream_has(pair):
    w = pair[0].first(1)
    (call,) = w.batches(3000)
    assert torch.equal(call, torch.cat([w.x, w.x])[:3000])
    assert all(len(each) == 3000 for each in w.settled(3000))
    assert w.shares(3000)["read"] == w.ranks.scanned.max()


def test_miniature_is_what_its_sae_says():
    w = workloads.miniature("fp32", tokens=300)
    shape = workloads.MINIATURE
    assert (w.x.shape, w.W_enc.shape, w.k) == ((300, shape.d), (shape.N, shape.d), shape.k)
    p = w.x.double() @ w.W_enc.double().T + w.b_enc.double()
    top = torch.zeros_like(p).scatter(-1, *p.relu().topk(w.k)[::-1])
    torch.testing.assert_close(w.truth, top[:, w.features], rtol=1e-9, atol=1e-12)
    assert 0 < w.shares(1)["live"] < w.shares(1)["undecided"] < 1
    assert w.values.item() > w.truth.max()
    exactness.check_ours(w, w.batches(16), steer(w), feature_acts(w))


def one_element_off(y):
    y = y.clone()
    y[0, 0] += 0.1
    return y


@pytest.mark.parametrize(
    "wrong",
    [lambda x, y: x, lambda x, y: one_element_off(y), lambda x, y: y * torch.nan],
    ids=["unsteered", "one element", "NaN"],
)
def test_a_wrong_result_disagrees(pair, wrong):
    for w in pair:
        right = steer(w)
        with pytest.raises(exactness.Disagreement, match=f"{w.name}, T=16: x' is"):
            exactness.check_ours(w, w.batches(16), lambda x: wrong(x, right(x)), feature_acts(w))  # noqa: B023


def test_a_wrong_decision_disagrees(pair):
    for w in pair:
        acts = feature_acts(w)
        with pytest.raises(exactness.Disagreement, match="decisions differ from fp64's"):
            exactness.check_ours(w, w.batches(16), steer(w), lambda x: 0 * acts(x))  # noqa: B023


def test_baselines(pair):
    for w in pair:
        x = w.x[:128]
        b_enc = w.b_enc.to(x.dtype)
        dense = x, w.W_enc, b_enc, w.W_dec, w.b_dec, w.features, w.values, w.k
        assert exactness.check_baseline(w, "naive", baselines.naive(*dense)) >= 0.9
        assert exactness.check_baseline(w, "lean", baselines.lean(*dense)) >= 0.9
        with pytest.raises(exactness.Disagreement, match="nothing agrees on 0%"):
            exactness.check_baseline(w, "nothing", x)


def test_peers(pair):
    if not peers.INSTALLED:
        pytest.skip("neither sparsify nor sae_lens is installed")
    with torch.inference_mode():
        for w in (w.first(2) for w in pair):
            found = peers.libraries(w)
            assert tuple(found) == peers.NAMES
            for name, peer in found.items():
                x = w.x[:128]
                assert exactness.check_baseline(w, name, peer.whole(x, peer.call(x))) >= 0.9


def test_peers_get_the_bias_before_b_dec_was_folded(pair):
    w = pair[0]
    x, W = w.x[:8].float(), w.W_enc.float()
    folded, raw = x @ W.T + w.b_enc, (x - w.b_dec.float()) @ W.T + peers.raw_bias(w).float()
    torch.testing.assert_close(raw, folded, rtol=0, atol=0.02 if w.x.dtype.itemsize == 2 else 1e-4)


@pytest.fixture
def small(monkeypatch):
    """The op suite's centre in SMALL, without the machine's own ops."""
    monkeypatch.setattr(workloads, "FULL", SMALL)
    load = SimpleNamespace(read=torch.sum, nothing=lambda x, *_: x)
    monkeypatch.setattr(suite.native, "load", lambda: load)
    return suite.Case("planted", "bf16", 1, 1, SMALL.d, SMALL.N, SMALL.k)


def test_cases():
    short, full = suite.cases(full=False), suite.cases(full=True)
    assert set(short) < set(full) and len({str(case) for case in full}) == len(full)
    for cases in (short, full):
        built = [key for key, _ in groupby(cases, key=lambda case: case.built)]
        assert len(built) == len(set(built))


def test_what_does_not_compile_is_not_run(pair, small, monkeypatch):
    def fails(run, **_):
        def call(*_):
            raise torch._dynamo.exc.TorchDynamoException(f"{run.__name__} has\ntwo lines")

        return call if run is baselines.naive else run

    monkeypatch.setattr(torch, "compile", fails)
    w = pair[0].first(1)
    chosen, not_run = suite.contestants(w, small, w.settled(1), peers.libraries(w))
    assert not_run == {"naive, compiled": "TorchDynamoException: naive has"}
    assert sorted([*chosen, *not_run]) == sorted(suite.names(small))


def test_compiled_code_that_is_wrong_ends_the_run(pair, small, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda run, **_: lambda x, *_: x)
    planted, worst = (w.first(1) for w in pair)
    with pytest.raises(exactness.Disagreement, match="naive, compiled agrees on 0%"):
        suite.contestants(worst, replace(small, workload="worst"), planted.settled(1), {})


def test_rounds_are_complete():
    seen = {"a": [], "b": []}
    contestants = {
        "a": Contestant(seen["a"].append, [0, 1, 2], whole=True),
        "b": Contestant(seen["b"].append, [7]),
    }
    contestants["b"].calls = 2
    for calls in seen.values():
        calls.clear()
    seconds = interleaved(contestants, rounds=3)
    assert sorted(seen["a"]) == sorted([0, 1, 2] * 4) and seen["b"] == [7] * 8
    assert [len(each) for each in seconds.values()] == [3, 3]
    assert all(second > 0 for each in seconds.values() for second in each)


def test_run_records_what_it_prints(tmp_path):
    done = run_small(tmp_path, "--record", "-k", "bf16-T16-F1 and not real")
    assert done.returncode == 0, done.stdout
    result = report.newest(tmp_path, "op")
    assert report.render(result, everything=True) in done.stdout
    assert [case["workload"] for case in result["cases"]] == ["planted", "worst"]
    assert {"device", "threads", "instructions", "torch", "commit", "dirty", "date"} <= set(
        result["machine"]
    )


def test_disagreement_prints_no_speed(tmp_path):
    done = run_small(tmp_path, "--record", plugin="ops.steer = lambda x, *_, **__: x\n")
    assert done.returncode == 1
    assert "planted, T=1: x' is" in done.stdout
    assert "no speeds" in done.stdout and "/ ours" not in done.stdout and "µs" not in done.stdout
    assert not list(tmp_path.glob("*.json"))


@pytest.fixture
def result():
    return op_result()


def verdicts(result):
    return {
        target.text: cells[-1]
        for target in op_tables.TARGETS
        if (cells := target.judge(result["cases"]))
    }


def test_targets(result):
    got = verdicts(result)
    assert got["T=1 planted: naive / ours"] == "**missed**"
    assert got["T=512 planted: naive / ours"] == "met"
    assert got["any T, worst: naive / ours"] == "**missed**, floor of 2× met"
    assert got["any T, worst: fastest peer / ours"] == "met"
    assert got["T=1, ends at L0: ours − an op that does nothing"] == "**missed**"
    assert got["T=512 planted: ours / (L0 + one read of W_enc)"] == "met"
    assert got["T=512, ends at L0: ours / copy of x"] == "met"
    assert got["T=1 worst: one read of W_enc / ours"] == "**missed**"
    result["cases"][1:] = op_case("planted", 512, L0=0.7), op_case("worst", 1, read=0.9)
    got = verdicts(result)
    assert got["T=512, ends at L0: ours / copy of x"] == "**missed**"
    assert got["T=1 worst: one read of W_enc / ours"] == "met"
    result["cases"].append(op_case("worst", 16, smart=0.9, linear=0.9))
    got = verdicts(result)
    assert got["any T, worst: fastest peer / ours"] == "**missed**"
    assert got["any T, worst: ours / F.linear"] == "**missed**"


def test_the_fastest_is_judged_and_shown(result):
    planted, large, _ = result["cases"]
    large["seconds"] |= {"naive, compiled": [0.03] * 9, "sparsify": [0.01] * 9}
    got = verdicts(result)
    assert got["T=512 planted: naive / ours"] == "**missed**, floor of 20× met"
    assert got["T=512 planted: faster of lean and sparsify / ours"] == "**missed**"
    text = report.render(result)
    assert "| planted | bf16 | 512 | 1 | 1.00 ms | 30.0× (30.0) c | 20.0× (20.0) |" in text
    assert "| 10.0× (10.0) |" in text and "| — |" in text and "not run" not in text
    assert "eai-sparsify 1.3.3; commit 0123456789ab" in text
    planted["not_run"] = {"naive, compiled": "CppCompileError: no compiler"}
    assert "Not run: CppCompileError: no compiler." in report.render(result)
    assert "| not run |" in report.render(result, everything=True)
    planted["short"] = False
    assert "| planted | bf16 | 1 |" not in report.render(result)
    assert "| planted | bf16 | 1 |" in report.render(result, everything=True)


def test_the_spread_is_shown_where_it_was_recorded(result):
    old = workload_tables.render(result)
    assert "| planted | bf16 | 1 | 2.2 % | 0.49 % | 1.2 % |\n" in old and "need at most" not in old
    planted, *_, worst = result["cases"]
    planted["spread"] = {
        "all": {"tokens": 2000, "median": 0.0, "p99": 0.54, "max": 1.0},
        "undecided": {"tokens": 44, "median": 0.51, "p99": 0.9, "max": 1.0},
    }
    planted |= {"work, hot-first": 0.008, "spread, hot-first": planted["spread"]}
    worst["spread"] = {"all": planted["spread"]["all"], "undecided": {"tokens": 0}}
    new = workload_tables.render(result)
    cells = "44 of 2000 | 54 % | 100 % | 51 % | 90 % |\n"
    assert f"| planted | bf16 | 1 | 2.2 % | 0.49 % | 1.2 % | {cells}" in new
    assert f"| planted, hot-first | bf16 | 1 | 2.2 % | 0.49 % | 0.8 % | {cells}" in new
    assert "| 1.2 % | 0 of 2000 | 54 % | 100 % | — | — |\n" in new
    assert new.count("\n| planted |") == 1 and new in report.render(result, everything=True)
    del worst["spread"]
    assert "| 1.2 % | — of — | — | — | — | — |\n" in workload_tables.render(result)
    assert workload_tables.render({"cases": [op_case("worst", 1) | {"short": False}]}) == ""


def test_stored_result_renders_the_same(tmp_path, result):
    stored = report.save(result, tmp_path)
    older = json.loads(stored.read_text())
    older["machine"]["date"] = "2025-12-31T00:00:00+00:00"
    report.save(older, tmp_path)
    assert report.newest(tmp_path, "op") == result
    text = report.render(report.newest(tmp_path, "op"))
    assert text == report.render(result)
    assert "| planted | bf16 | 512 | 1 | 1.00 ms | 100× (100) |" in text


def test_other_processors_are_shown_by_their_newest_run(tmp_path, result):
    assert report.elsewhere(tmp_path, "op") == []
    runs = [("Zen", "avx512bf16", 1), ("Zen", "avx512bf16", 2), ("Xeon", "amx", 3)]
    runs += [("Xeon", "avx512bf16", 4), ("Xeon", "amx", 5)]
    for device, instructions, day in runs:
        on = dict(device=device, instructions=instructions, date=f"2026-01-0{day}T00:00:00+00:00")
        report.save(result | {"machine": result["machine"] | on}, tmp_path)
    found = report.elsewhere(tmp_path, "op")
    days = {(run["machine"]["device"], run["machine"]["date"][9]) for run in found}
    assert days == {("Zen", "2"), ("Xeon", "4")}
    text = summary.elsewhere(found)
    assert text.count("targets of the op in docs/benchmarks.md") == 2 and "2026-01-02" in text


def test_demo_table(tmp_path):
    record_demo(tmp_path)
    text = miniature.demo(tmp_path)
    assert "| 2.5 | 50 (25 to 75) |" in text
    assert "| none | 50 (25 to 75) |" in text
    assert "latent 7 at the output of layer 4" in text


def test_mini_table_is_the_shipped_builds():
    built = json.loads(miniature.METRICS.read_text())
    text = miniature.mini()
    assert f"| **{built['layer']}** |" in text
    assert text.count("\n|") == len(built["layers"]) + 2


def test_summary_says_what_was_missed_and_measured(result):
    short = summary.render(result, None, None)
    assert "| planted | 512 | 1.00 ms | 100× | 20.0× | 20.0× | — | — | 20.0× | 2.2 % |" in short
    assert "- Missed of 11 targets" in short and "T=1 planted: naive / ours ≥ 300×;" in short
    assert "T=512 planted: naive" not in short and "commit 0123456789ab" in short
    met = [op_case("planted", 512), op_case("worst", 1, naive=3.5, sparsify=1.2, read=0.9)]
    seconds = {"unsteered": [1.0] * 3, "again": [1.01] * 3, "ours": [1.02] * 3, "naive": [1.5] * 3}
    model = {"cases": [{"run": "decode", "layers": 2, "seconds": seconds}], "machine": MACHINE}
    memory = {"cases": [{"bytes": {"ours": n * 2**10, "naive": n * 2**20}} for n in (5, 7)]}
    text = summary.render(result | {"cases": met}, model, memory)
    assert "- Met: all 8 targets" in text and "| worst | 1 | 1.00 ms | 3.50× |" in text
    assert "2 of 32 layers, random weights, a processor, 4 cores" in text
    assert "decode 2.00 % (2.00 to 2.00), naive 50.0 %" in text
    assert "at most 7.00 KiB; naive up to 7.00 MiB" in text


@pytest.mark.parametrize(
    "value, text",
    [
        (312.4, "312"),
        (31.24, "31.2"),
        (3.124, "3.12"),
        (0.0312, "0.031"),
        (1234.5, "1230"),
        (0, "0"),
    ],
)
def test_number(value, text):
    assert common.number(value) == text
