"""How a message about an unknown name ends: with the nearest name that is valid."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, choices: Iterable[str], ask: str = "did you mean") -> str:
    close = get_close_matches(name, list(choices), n=1)
    return f"; {ask} {close[0]!r}?" if close else ""
