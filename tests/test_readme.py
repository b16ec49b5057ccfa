"""README's example, as whoever copies it runs it."""

from __future__ import annotations

import re
from pathlib import Path

import saesteer_fast as sf
from saesteer_fast.eval import is_refusal

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_refuses_once_steered(capsys, one_thread):
    example = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    given = {}
    exec(example, given)
    unsteered, steered = capsys.readouterr().out.splitlines()
    assert not is_refusal(unsteered) and is_refusal(steered)
    assert given["held"].strengths.tolist() == [15.0] and not sf.steerings(given["model"])
