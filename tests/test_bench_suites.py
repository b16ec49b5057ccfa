"""The suites memory, model, encode and calls: that they run, refuse what is wrong, and tell the
truth of what they measure."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from bench_cases import SMALL, TINY_PHI3, run_small

from bench import ROOT, exactness, heap, phi3, report, workloads
from bench.suites import calls, encode, model
from bench.tables import encode as encode_tables
from bench.tables import memory as memory_tables
from bench.tables import model as model_tables
from bench.timing import Contestant
from saesteer_fast import ops

SUITES = ("memory", "model", "encode", "calls")


def test_all_run_and_record_what_they_print(tmp_path):
    plugin = (
        "from bench import phi3\nfrom bench.suites import model\nmodel.PROMPT = 64\n"
        f"phi3.OPTIONS = {TINY_PHI3}\nphi3.BLOCK = 1 << 12\n"
    )
    done = run_small(tmp_path, "--record", plugin=plugin, suites=SUITES)
    assert done.returncode == 0, done.stdout
    for suite in SUITES:
        result = report.newest(tmp_path, suite)
        assert report.render(result, everything=True) in done.stdout
    by_T = {case["T"]: case["bytes"] for case in report.newest(tmp_path, "memory")["cases"]}
    assert by_T[512]["naive"] > 512 * SMALL.N * 2 > 10 * by_T[512]["ours"]
    decode = report.newest(tmp_path, "model")["cases"][1]
    assert 0 < decode["undecided"] < 0.5


COUNT = """
import torch
from bench import heap
torch.set_num_threads(1)
base = heap.live()
y, peak = heap.peak(lambda: (torch.ones(1000, 500) + 1).sum(0) + 1)
print(peak - base - y.nbytes)
"""


def test_heap_counts_what_is_held_at_once():
    done = subprocess.run(
        [sys.executable, "-c", COUNT], cwd=ROOT, env=heap.environment(), capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert 0 <= int(done.stdout) - 2 * 4 * 1000 * 500 < 1e5


def test_heap_does_not_count_here():
    with pytest.raises(AttributeError, match="heap_live"):
        heap.live()


@pytest.fixture(scope="module")
def planted():
    return workloads.build("bf16", 1, SMALL)[0]


def test_encode_agrees(planted):
    found = encode.verify_all(planted, 32)
    assert set(found) == {"eager", "bag", "dense", *encode.SPARSIFY}
    assert min(found.values()) >= 0.9


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        (lambda v, i: (v * 1.001, i), "values"),
        (lambda v, i: (v, i.flip(-1)), "indices"),
        (lambda v, i: (v, i.roll(1, 0)), "indices"),
        (lambda v, i: (v[:, :1].expand_as(v), i[:, :1].expand_as(i)), "values"),
        (lambda v, i: (v * torch.nan, i), "values"),
    ],
)
def test_a_wrong_encode_disagrees(planted, monkeypatch, wrong, complaint):
    right = ops.encode
    monkeypatch.setattr(ops, "encode", lambda *a, **o: wrong(*right(*a, **o)))
    with pytest.raises(exactness.Disagreement, match=f"encode's {complaint} are not"):
        encode.verify_all(planted, 32)


@pytest.mark.parametrize("wrong", [lambda y: y * 1.01, lambda y: y.roll(1, 0), torch.zeros_like])
def test_a_wrong_decode_disagrees(planted, monkeypatch, wrong):
    right = ops.decode
    monkeypatch.setattr(ops, "decode", lambda *a, **o: wrong(right(*a, **o)))
    with pytest.raises(exactness.Disagreement, match="decode's reconstruction"):
        encode.verify_all(planted, 32)


def test_a_call_that_does_not_steer_disagrees(planted):
    settled = [x[None] for x in planted.settled(1)[:3]]
    ways = calls.contestants(planted, settled)
    calls.verify_all(planted, ways, settled)
    ways["steering_mask"] = Contestant(lambda x: x, settled)
    with pytest.raises(exactness.Disagreement, match="steering_mask differs"):
        calls.verify_all(planted, ways, settled)
    ways["op"] = Contestant(lambda x: x, settled)
    with pytest.raises(exactness.Disagreement, match="x' is"):
        calls.verify_all(planted, ways, settled)


@pytest.fixture(scope="module")
def subject():
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(phi3, "OPTIONS", TINY_PHI3)
        patch.setattr(phi3, "BLOCK", 1 << 12)
        patch.setattr(workloads, "FULL", SMALL)
        patch.setattr(model, "PROMPT", 64)
        yield model.Subject(layers=3, layer=1)


@pytest.mark.parametrize("run", ["prefill", "decode"])
def test_model_is_steered(subject, run, monkeypatch):
    assert model.verify_all(subject, run) >= 0.9
    right = subject.ways()
    for name, complaint in (("ours", f"{run}, T="), ("worst", f"{run}, worst"), ("naive", "naive")):
        monkeypatch.setattr(subject, "ways", lambda n=name: right | {n: nullcontext})
        with pytest.raises(exactness.Disagreement, match=complaint):
            model.verify_all(subject, run)


def test_decode_step_forgets_its_token(subject):
    before = subject.cache.get_seq_length()
    first, again = (subject.streams("decode")[0] for _ in range(2))
    assert torch.equal(first, again) and subject.cache.get_seq_length() == before == 64


def test_phi3_is_random_and_whole(subject):
    built = subject.model
    for name, weight in built.named_parameters():
        weight = weight.float()
        assert weight.isfinite().all(), name
        if weight.ndim > 1:
            assert weight.std().item() == pytest.approx(phi3.DEVIATION, rel=0.1), name
    rows = built.model.layers[0].mlp.down_proj.weight
    assert not torch.equal(rows, built.model.layers[1].mlp.down_proj.weight)
    first, *_ = built.model.rotary_emb.inv_freq
    assert first == 1


def test_tables():
    seconds = {"unsteered": [1.0, 2.0, 1.0], "again": [1.0, 2.0, 1.1]}
    seconds["ours"] = [1.01, 2.02, 1.03]
    assert model_tables.added({"seconds": seconds}, "ours") == "1.00 % (1.00 to 3.00)"
    assert model_tables.added({"seconds": seconds}, "again") == "0 % (0 to 10.0)"
    assert memory_tables.size(1536) == "1.50 KiB" and memory_tables.size(3 << 20) == "3.00 MiB"
    (target,) = memory_tables.TARGETS
    for bytes_, verdict in ((2**20 + 64 * 8, "met"), (2**20 + 64 * 9, "**missed**")):
        assert target.judge([{"T": 8, "bytes": {"ours": bytes_}}])[-1] == verdict


def test_encode_shows_sparsify_where_it_ran():
    result = report.newest(report.RESULTS, "encode")
    for case in result["cases"]:
        case["seconds"].pop("sparsify", None)
    text = encode_tables.render(result)
    assert "| sparsify / ours |" not in text and "sparsify itself was not installed" in text
    for case in result["cases"]:
        case["seconds"]["sparsify"] = [3 * each for each in case["seconds"]["ours"]]
    text = encode_tables.render(result)
    assert text.count("| sparsify / ours |") == 2 and "not installed" not in text
    assert text.count("| 3.00× (3.00) |") == len([c for c in result["cases"] if c["short"]])
