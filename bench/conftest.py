"""Threads, and what becomes of the results: tables on the terminal and, with --record, a file."""

from __future__ import annotations

import os

import pytest
import torch

from . import machine, report

RESULTS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="store the results in bench/results")


def pytest_configure(config):
    config.stash[RESULTS] = []
    torch.set_num_threads(len(os.sched_getaffinity(0)))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, exitstatus, config):
    cases = config.stash[RESULTS]
    if exitstatus or not cases:
        terminalreporter.line("no speeds: not everything was measured and right")
        return
    result = {"suite": "op", "machine": machine.facts(), "cases": cases}
    terminalreporter.line(f"\n{report.render(result, everything=True)}")
    if config.getoption("record"):
        path = report.save(result, report.RESULTS)
        terminalreporter.line(f"recorded in bench/results/{path.name}")
