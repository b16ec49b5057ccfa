"""What of a recipe an engine can serve, and what has to be known of each token for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..conditions import split
from ..errors import named
from ..recipe import Recipe, Steering
from ..scopes import Scoped


class Prefixes(NamedTuple):
    """By what requests that begin with the same tokens may be steered differently there."""

    configuration: bool
    """By the one that each asks for, from the first token on."""
    turn: int | None
    """By that and by where their prompts end, from this place on, counted from there."""

    @property
    def shared(self) -> bool:
        """Whether by nothing."""
        return not self.configuration and self.turn is None

    def keys(self, configuration: int, prompt: int) -> Iterator[tuple[int, object]]:
        """What tells a request of `prompt` tokens from others, each from one of its tokens on."""
        if self.configuration:
            yield 0, configuration
        if self.turn is not None:
            yield max(0, prompt + self.turn), (configuration, prompt)


def names(recipe: Recipe) -> tuple[str, ...]:
    """Of the configurations that requests choose among; () where there is one for all.

    Raises ValueError, naming the place, for what needs to know the rows of a batch, or a whole
    prompt before its first token is steered.
    """
    tables: dict[tuple[str, ...], int] = {}
    for place, step in enumerate(recipe.steerings):
        with named(f"steerings[{place}]."):
            for reason in _refused(step):
                raise ValueError(reason)
        if step.is_table:
            tables.setdefault(tuple(sorted(step.edits)), place)
    if len(tables) > 1:
        (one, first), (other, second) = [*tables.items()][:2]
        raise ValueError(
            f"steerings[{second}].edits: its configurations are {list(other)}, those of "
            f"steerings[{first}] {list(one)}; a request names one in all of them"
        )
    return next(iter(tables), ())


def tells_tokens_apart(recipe: Recipe) -> bool:
    """Whether a token's place or its request matters, not its stream alone."""
    return any(step.is_table or not Scoped(step.scope).everything for step in recipe.steerings)


def prefixes(recipe: Recipe) -> Prefixes:
    """A condition on latents reads the stream alone, which those tokens have in common."""
    scopes = [(step, Scoped(step.scope)) for step in recipe.steerings]
    early = any(step.is_table and not scope.starts_at_turn for step, scope in scopes)
    turns = [scope.turn for _, scope in scopes if scope.turn is not None]
    return Prefixes(early, min(turns, default=None))


def begins_late(recipe: Recipe, name: str) -> bool:
    """Whether it steers, under this configuration, what only a second token can show: tokens that
    were generated before."""
    return any(
        Scoped(step.scope).begins_late and (step.edits[name] if step.is_table else step.edits)
        for step in recipe.steerings
    )


def reads_ids(recipe: Recipe) -> bool:
    """Whether the ids of tokens matter, which a model that is given embeddings has not."""
    return any(Scoped(step.scope).reads_ids for step in recipe.steerings)


def _refused(step: Steering) -> Iterator[str]:
    for name in step.of_a_batch():
        yield (
            f"{name}: an engine makes its own batches; accepted are configurations by name, "
            '{"one": {...}, "other": {...}}, of which each request chooses one, and the scopes '
            "all, prompt, generated, positions, not_tokens"
        )
    if split(step.when)[1] is not None:
        yield "when: a gate reads whole prompts, which an engine cuts; accepted is active"
