"""Runs the op suite, suites/op.py."""


def test_op(replay, measured, case, name):
    replay(case, measured(case), name)
