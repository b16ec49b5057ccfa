"""The requests that an engine runs together, and what their tokens are in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..errors import nearest

DEFAULT = "default"
"""The configuration of requests that ask for none."""


class Request(NamedTuple):
    configuration: int
    prompt: int
    """How many tokens it has."""


class Span(NamedTuple):
    """Tokens of one request that stand together in a call."""

    request: str
    start: int
    """How many tokens of the request came before."""
    count: int


@dataclass
class Packed:
    """T tokens of many requests in one row, as scopes ask of them: a `scopes.Placed`."""

    positions: Tensor
    """[1, T] int64: how many tokens of its request stand before each."""
    prompt_lengths: Tensor
    """[1, T] int64: of its request."""
    ids: Tensor | None
    """[1, T]; None where the model is given embeddings."""

    def generated(self) -> Tensor:
        return self.positions >= self.prompt_lengths


class Requests:
    """Those that run, by the engine's names for them."""

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.running: dict[str, Request] = {}

    def begin(self, request: str, asked: str | None, prompt: int) -> None:
        """A request of `prompt` tokens that asks for a configuration."""
        chosen = configuration(self.names, asked) if self.names else 0
        self.running[request] = Request(chosen, prompt)

    def end(self, request: str) -> None:
        self.running.pop(request, None)

    def tokens(self, spans: Iterable[Span]) -> np.ndarray:
        """[3, T] int64: each token's position, its prompt's length, its configuration.

        Raises ValueError for tokens of a request that has not begun, or has ended.
        """
        try:
            spans = [(start, count, *self.running[request]) for request, start, count in spans]
        except KeyError as error:
            named = repr(error.args[0])
            raise ValueError(f"spans: request {named} is none of those that run") from None
        start, count, chosen, prompt = np.array(spans, dtype=np.int64).reshape(-1, 4).T
        before = count.cumsum() - count
        tokens = np.stack([start - before, prompt, chosen]).repeat(count, axis=1)
        tokens[0] += np.arange(tokens.shape[1])
        return tokens


def configuration(names: Sequence[str], asked: str | None) -> int:
    """The number of the one that a request asks for by name; `names` is () where there is one
    configuration for all. Raises ValueError for a name that is not there."""
    if not names and asked is None:
        return 0
    name = DEFAULT if asked is None else asked
    if name in names:
        return names.index(name)
    what = "no configuration is named" if asked is None else f"no configuration {asked!r}"
    accepted = f"accepted are {list(names)}" if names else "all requests are steered in one way"
    raise ValueError(f"saesteer: {what}; {accepted}{nearest(str(name), names)}")
