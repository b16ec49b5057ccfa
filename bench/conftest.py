"""What all suites share: threads, their cases, and what becomes of the results: a table a suite on
the terminal and, with --record, a file a suite.

bench/test_<suite>.py runs suites/<suite>.py, and tables/<suite>.py renders it. A test with an
argument `case` runs once for each of the suite's cases, with --full for every one; with an argument
`name` as well, for each contestant of a case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

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
    wanted = metafunc.fixturenames
    if "case" not in wanted:
        return
    _, suite = _suite(metafunc.module)
    cases = suite.cases(metafunc.config.getoption("full"))
    if "name" not in wanted:
        metafunc.parametrize("case", cases, ids=str)
        return
    named = [(case, name) for case in cases for name in suite.names(case)]
    metafunc.parametrize("case, name", named, ids=[f"{case}-{name}" for case, name in named])


def _suite(module: ModuleType) -> tuple[str, ModuleType]:
    """The name of the suite that this file runs, and its module."""
    name = module.__name__.rpartition("test_")[2]
    return name, import_module(f".suites.{name}", __package__)


def pytest_itemcollected(item):
    if "replay" in item.fixturenames:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))


@pytest.fixture(scope="module")
def measured(request) -> Iterator[Callable[[Any], dict]]:
    """A case's record, measured once; `short` says whether it is of the short set."""
    name, suite = _suite(request.module)
    records = request.config.stash[RESULTS].setdefault(name, [])
    short = suite.cases(False)
    with suite.measuring(suite.cases(request.config.getoption("full"))) as measure:

        @cache
        def of(case: Any) -> dict:
            records.append({"short": case in short} | measure(case))
            return records[-1]

        yield of


@pytest.fixture
def replay(benchmark) -> Callable[[Any, dict, str], None]:
    """replay(case, record, name): pytest-benchmark reports rounds that were timed before."""

    def report(case: Any, record: dict, name: str) -> None:
        if reason := record.get("not_run", {}).get(name):
            pytest.skip(reason)
        benchmark.group = str(case)
        seconds = record["seconds"][name]
        REPLAY.load(seconds)
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return report


def pytest_exception_interact(call):
    """Nothing is timed any more once two implementations disagree."""
    if isinstance(call.excinfo.value, exactness.Disagreement):
        pytest.exit(str(call.excinfo.value), returncode=1)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, exitstatus, config):
    suites = {name: cases for name, cases in config.stash[RESULTS].items() if cases}
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
