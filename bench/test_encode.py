"""Runs the encode suite, suites/encode.py."""


def test_encode(replay, measured, case, name):
    replay(case, measured(case), name)
