"""Runs the memory suite, suites/memory.py."""

import sys

import pytest


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="counts allocations by preloading a library over glibc's",
)
def test_memory(measured, case):
    measured(case)
