"""Runs the serving suite, suites/serving.py."""

import pytest

from . import engine


@pytest.fixture(scope="module", autouse=True)
def vllm():
    if reason := engine.missing():
        pytest.skip(reason)


def test_serving(replay, measured, case, name):
    replay(case, measured(case), name)
