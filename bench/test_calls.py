"""Runs the calls suite, suites/calls.py."""


def test_calls(replay, measured, case, name):
    replay(case, measured(case), name)
