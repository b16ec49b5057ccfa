"""A value of a JSON document, which says by its place what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import NoReturn

from .errors import nearest
from .numbers import is_finite, is_integer, is_number

_LATENT = re.compile("0|[1-9][0-9]{0,17}")

Readers = Mapping[str, Callable[["Node"], object]]


class Node:
    """A value of the document, and its place in it: `steerings[0].edits["511"].kind`."""

    def __init__(self, value: object, place: str = ""):
        self.value, self.place = value, place

    @classmethod
    def of(cls, text: bytes) -> Node:
        """The root of a document in UTF-8, which some editors begin with a byte order mark."""
        try:
            return cls(json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON ({error})") from None

    def refuse(self, accepted: str) -> NoReturn:
        place = f"{self.place}: " if self.place else ""
        raise ValueError(f"{place}got {_shown(self.value)}, {accepted}")

    def read(self, of: str, readers: Readers, needed: Collection[str] = ()) -> dict[str, object]:
        """What the readers make of an object's members, all known, and the needed ones there."""
        members = self.mapping(f"an object of {of} is needed")
        for name, node in members.items():
            if name not in readers:
                hint = nearest(name, readers)
                node.refuse(f"no such key; accepted are {', '.join(readers)}{hint}")
        for name in needed:
            if name not in members:
                raise ValueError(f"{self._inner(name)}: is missing; {of} needs it")
        return {name: readers[name](node) for name, node in members.items()}

    def mapping(self, accepted: str) -> dict[str, Node]:
        if not isinstance(self.value, _Object):
            self.refuse(accepted)
        if self.value.twice is not None:
            raise ValueError(f"{self._inner(self.value.twice)}: is there twice")
        return {name: Node(value, self._inner(name)) for name, value in self.value.items()}

    def items(self, accepted: str) -> list[Node]:
        """Of a list that is not empty."""
        if not isinstance(self.value, list) or not self.value:
            self.refuse(f"{accepted} is needed")
        return [Node(value, f"{self.place}[{place}]") for place, value in enumerate(self.value)]

    def number(self) -> float:
        if not is_number(self.value):
            self.refuse("a number is needed")
        if not is_finite(self.value):
            self.refuse("a number that is finite in fp32 is needed")
        return float(self.value)

    def integer(self, least: int = -(2**63)) -> int:
        integral = isinstance(self.value, float) and self.value.is_integer()
        if not (integral or is_integer(self.value)):
            self.refuse("an integer is needed")
        if not least <= self.value < 2**63:
            self.refuse(f"an integer from {least} to {2**63 - 1} is needed")
        return int(self.value)

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value:
            self.refuse("text is needed")
        return self.value

    def one_of(self, choices: Collection[str]) -> str:
        if self.value not in choices:
            hint = nearest(self.value, choices) if isinstance(self.value, str) else ""
            self.refuse(f"accepted are {', '.join(choices)}{hint}")
        return self.value

    def equals(self, wanted: str | int) -> None:
        if _shown(self.value) != _shown(wanted):
            self.refuse(f"{_shown(wanted)} is needed")

    def latents(self, what: str, read: Callable[[Node], object]) -> dict[int, object]:
        """{latent: what `read` makes of its value}."""
        found = {}
        for name, node in self.mapping(f"an object {{latent: {what}}} is needed").items():
            if not _LATENT.fullmatch(name):
                raise ValueError(f'{node.place}: no latent; latents are "0", "1", "2", ...')
            found[int(name)] = read(node)
        return found

    def numbers(self, what: str) -> dict[int, float]:
        """{latent: number}, one at least."""
        return self.latents(what, Node.number) or self.refuse("one latent or more is needed")

    def _inner(self, name: str) -> str:
        if not re.fullmatch("[A-Za-z_]+", name):
            return f"{self.place}[{_shown(name)}]"
        return f"{self.place}.{name}" if self.place else name


class _Object(dict):
    """A JSON object, and a name in it that is there twice."""

    twice: str | None = None


def _object(pairs: list[tuple[str, object]]) -> _Object:
    made = _Object()
    for name, value in pairs:
        if name in made:
            made.twice = name
        made[name] = value
    return made


def _shown(value: object) -> str:
    """As JSON, cut short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
