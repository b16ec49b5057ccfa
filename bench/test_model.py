"""Runs the model suite, suites/model.py."""


def test_model(replay, measured, case, name):
    replay(case, measured(case), name)
