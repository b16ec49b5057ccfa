"""How errors are worded: where they are, and what the nearest valid choice is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


def one_of(argument: str, got: object, accepted: Collection[str], like: str | None = None) -> None:
    """ValueError if what an argument got is none of the accepted; the nearest is that to `like`."""
    if got not in tuple(accepted):  # of a mapping, what has no hash raises
        raise ValueError(f"{argument}: got {among(got, accepted, like)}")


def among(got: object, accepted: Collection[str], like: str | None = None) -> str:
    """What is there in place of one of the accepted, as an error goes on after "got" or "is"."""
    hint = nearest(str(got) if like is None else like, accepted)
    return f"{got!r}, accepted {'is' if len(accepted) == 1 else 'are'} {', '.join(accepted)}{hint}"


def nearest(
    name: str, choices: Iterable[str], ask: str = "did you mean", alike: float = 0.6
) -> str:
    """A hint at the choice that is most alike, of 0 to 1 at least so much; "" if none is."""
    close = get_close_matches(name, list(choices), n=1, cutoff=alike)
    return f"; {ask} {close[0]!r}?" if close else ""


def nearest_file(path: Path, suffixes: Iterable[str]) -> str:
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    valid = [entry.name for entry in beside if entry.suffix in suffixes and entry.is_file()]
    return nearest(path.name, valid)


@contextmanager
def in_file(path: Path) -> Iterator[None]:
    """A ValueError inside begins with the path, once."""
    try:
        yield
    except ValueError as error:
        told = str(error).startswith(str(path))
        raise error if told else ValueError(f"{path}: {error}") from None


@contextmanager
def named(place: object) -> Iterator[None]:
    """Errors inside begin with a place in the file."""
    kinds = (FileNotFoundError, TypeError, ValueError)
    try:
        yield
    except kinds as error:
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{place}{error}") from None
