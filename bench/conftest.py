"""What all suites share: threads, their cases, and what becomes of the results: a table a suite on
the terminal and, with --record, a file a suite.

A suite is bench/test_<suite>.py, with bench/tables/<suite>.py to render it. Its `cases(full)` lists
what a test's argument `case` goes through: a short set or, with --full, everything. A test with an
argument `name` as well runs once for each of `names(case)`, the contestants of that case.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from . import exactness, machine, report
from .timing import Replay

RESULTS = pytest.StashKey[dict[str, list[dict]]]()
REPLAY = Replay()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every case, not only the short set")
    parser.addoption("--record", action="store_true", help="store the results in bench/results")


def pytest_configure(config):
    config.stash[RESULTS] = {}
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def pytest_generate_tests(metafunc):
    suite, wanted = metafunc.module, metafunc.fixturenames
    if "case" not in wanted:
        return
    cases = suite.cases(metafunc.config.getoption("full"))
    if "name" not in wanted:
        metafunc.parametrize("case", cases, ids=str)
        return
    named = [(case, name) for case in cases for name in suite.names(case)]
    metafunc.parametrize("case, name", named, ids=[f"{case}-{name}" for case, name in named])


def pytest_itemcollected(item):
    if "replay" in item.fixturenames:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))


@pytest.fixture(scope="session")
def record(request) -> Callable[[str, dict], None]:
    """record(suite, case): the case is a line of the suite's result."""
    return lambda suite, case: request.config.stash[RESULTS].setdefault(suite, []).append(case)


@pytest.fixture
def replay(benchmark) -> Callable[[str, list[float]], None]:
    """replay(group, seconds): pytest-benchmark reports rounds that were timed before."""

    def report(group: str, seconds: list[float]) -> None:
        benchmark.group = group
        REPLAY.load(seconds)
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return report


def pytest_exception_interact(call):
    """Nothing is timed any more once two implementations disagree."""
    if isinstance(call.excinfo.value, exactness.Disagreement):
        pytest.exit(str(call.excinfo.value), returncode=1)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, exitstatus, config):
    suites = config.stash[RESULTS]
    if exitstatus or not suites:
        terminalreporter.line("no speeds: not everything was measured and right")
        return
    facts, full = machine.facts(), config.getoption("full")
    for suite, cases in suites.items():
        result = {"suite": suite, "full": full, "machine": facts, "cases": cases}
        terminalreporter.line(f"\n{report.render(result, everything=True)}")
        if config.getoption("record"):
            path = report.save(result, report.RESULTS)
            terminalreporter.line(f"recorded in bench/results/{path.name}")
