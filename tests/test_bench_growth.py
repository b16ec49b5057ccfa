"""How cost grows: which cases make a series, the slope of each, and plots that follow from them."""

import math
from dataclasses import asdict

import numpy as np
import pytest
from bench_cases import MACHINE

from bench import plots, report
from bench.suites import op as suite
from bench.tables import growth


def cost(name, case):
    """Ours takes T^0.5 and N, naive T and N; compiled naive half of that beyond T = 100."""
    power = 0.5 if name == "ours" else 1
    return 1e-6 * case.T**power * case.N * (0.5 if "compiled" in name and case.T > 100 else 2)


@pytest.fixture
def result():
    """A whole grid, measured by `cost`."""
    cases = []
    for case in suite.cases(full=True):
        names = ("ours", "naive", *["naive, compiled"] * ("naive, compiled" in suite.names(case)))
        seconds = {name: [cost(name, case)] * 3 for name in names}
        cases.append(asdict(case) | {"seconds": seconds, "short": case in suite.cases(full=False)})
    return {"suite": "op", "full": True, "machine": MACHINE, "cases": cases}


def test_every_axis_has_its_series(result):
    found = growth.series(result["cases"])
    of = {(each.axis, each.fixed["workload"]) for each in found}
    assert of == {(a, w) for a in "TFkNd" for w in ("planted", "worst")} | {("T", "real")}
    for each in found:
        assert each.fixed.keys() | {each.axis} == set(growth.FIXED)
    (along_N,) = [e for e in found if (e.axis, e.title) == ("N", "planted, T=1, F=1, k=32, d=768")]
    assert [*along_N.points["ours"]] == [6144, 24576, 98304, 1048576]


def test_the_faster_of_eager_and_compiled_is_followed(result):
    (along_T,) = [
        each
        for each in growth.series(result["cases"])
        if (each.axis, each.fixed["workload"]) == ("T", "planted")
    ]
    naive = along_T.points["naive"]
    assert naive[512] == pytest.approx(1e-6 * 512 * 24576 * 0.5)
    assert naive[2048] == pytest.approx(1e-6 * 2048 * 24576 * 2)


def test_slope():
    b, error = growth.slope({v: 3 * v**0.7 for v in (1, 10, 50, 1000)})
    assert b == pytest.approx(0.7) and error == pytest.approx(0, abs=1e-9)
    rough = {1: 1.0, 2: 2.4, 4: 3.1, 8: 9.0, 16: 14.0}
    x, y = np.log([*rough]), np.log([*rough.values()])
    fitted, covariance = np.polyfit(x, y, 1, cov=True)
    assert growth.slope(rough) == pytest.approx((fitted[0], math.sqrt(covariance[0, 0])))
    assert growth.slope({1: 1.0, 2: 2.0}) is None


def test_slopes_are_tabulated(result):
    text = growth.slopes(result["cases"])
    assert "| N, 6144 to 1048576 | planted, T=1, F=1, k=32, d=768 | 1.00 ± 0.00 | 1.00" in text
    assert "| F, 1 to 16 |" in text


def test_plots_are_drawn_alike_and_only_where_the_numbers_changed(tmp_path, result):
    assert plots.check(result, tmp_path) == [f"op-{axis}.svg" for axis in "TFkNd"]
    plots.write(result, tmp_path)
    assert plots.check(result, tmp_path) == []
    drawn = (tmp_path / "op-N.svg").read_bytes()
    (tmp_path / "op-N.svg").unlink()
    plots.write(result, tmp_path)
    assert (tmp_path / "op-N.svg").read_bytes() == drawn
    million = next(case for case in result["cases"] if case["N"] == 1048576)
    million["seconds"]["ours"] = [7.0] * 3
    assert plots.check(result, tmp_path) == ["op-N.svg"]


def test_the_page_shows_the_newest_whole_grid(tmp_path, result):
    report.save(result, tmp_path)
    short = result | {"full": False, "machine": result["machine"] | {"date": "2026-02-02T00:00"}}
    report.save(short, tmp_path)
    assert report.newest(tmp_path, "op") == short
    assert report.newest(tmp_path, "op", full=True) == result
    text = report.grown(result)
    assert all(f"![time along {axis}](../bench/results/op-{axis}.svg)" in text for axis in "TFkNd")
    assert report.grown(None) == "No run of `make bench-full` is recorded."
