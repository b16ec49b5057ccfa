"""How errors are worded: where they are, and what the nearest valid choice is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


def nearest(name: str, choices: Iterable[str], ask: str = "did you mean") -> str:
    close = get_close_matches(name, list(choices), n=1)
    return f"; {ask} {close[0]!r}?" if close else ""


def nearest_file(path: Path, suffixes: Iterable[str]) -> str:
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    valid = [entry.name for entry in beside if entry.suffix in suffixes and entry.is_file()]
    return nearest(path.name, valid)


@contextmanager
def named(place: object) -> Iterator[None]:
    """Errors inside begin with a place in the file."""
    try:
        yield
    except (FileNotFoundError, TypeError, ValueError) as error:
        kinds = (FileNotFoundError, TypeError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{place}{error}") from None
