"""What of a recipe an engine can serve, and what has to be known of each token for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from ..conditions import split
from ..recipe import Recipe, Steering, named
from ..scopes import NotTokens, follows_prompts, parts


def names(recipe: Recipe) -> tuple[str, ...]:
    """Of the configurations that requests choose among; () where there is one for all.

    Raises ValueError, naming the place, for what needs to know the rows of a batch, or a whole
    prompt before its first token is steered.
    """
    if not recipe.steerings:
        raise ValueError("steerings: there are none, so nothing would be steered")
    tables: dict[tuple[str, ...], int] = {}
    for place, step in enumerate(recipe.steerings):
        with named(f"steerings[{place}]."):
            for reason in _refused(step):
                raise ValueError(reason)
        if _is_table(step):
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
    return any(_is_table(step) or set(parts(step.scope)) != {"all"} for step in recipe.steerings)


def shares_prefixes(recipe: Recipe) -> bool:
    """Whether requests that begin with the same tokens are steered there in the same way."""
    return not any(_is_table(step) or follows_prompts(step.scope) for step in recipe.steerings)


def reads_ids(recipe: Recipe) -> bool:
    """Whether the ids of tokens matter, which a model that is given embeddings has not."""
    return any(isinstance(p, NotTokens) for step in recipe.steerings for p in parts(step.scope))


def _is_table(step: Steering) -> bool:
    return any(isinstance(key, str) for key in step.edits)


def _refused(step: Steering) -> Iterator[str]:
    if step.rows is not None or not isinstance(step.edits, Mapping):
        what = "edits" if step.rows is None else "rows"
        yield (
            f"{what}: an engine makes its own batches; name configurations, "
            '{"one": {...}, "other": {...}}, and each request chooses one'
        )
    if any(isinstance(part, Tensor) for part in parts(step.scope)):
        yield (
            "scope: a mask is for the rows of one batch; accepted are all, prompt, generated, "
            "positions, not_tokens"
        )
    if split(step.when)[1] is not None:
        yield "when: a gate reads whole prompts, which an engine cuts; accepted is active"
