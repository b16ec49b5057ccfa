"""The scopes: which tokens of a sequence are steered. Padding never is.

"all"                     every token
"prompt"                  tokens of the prompt
"generated"               tokens that the model has made itself
sf.positions(0, 1, -1)    tokens at these places of their row
sf.not_tokens([1, 32000]) tokens of any other id
a bool tensor [B, S]      tokens where it is True; later columns than S are outside
[scope, scope, ...]       tokens in all of these
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .errors import nearest
from .numbers import is_integer
from .tokens import Tokens


@dataclass(frozen=True)
class Positions:
    """`positions` makes it."""

    places: tuple[int, ...]
    """From 0 at the row's first real token on, or down from -1 at the last of its prompt."""


@dataclass(frozen=True)
class NotTokens:
    """`not_tokens` makes it."""

    ids: tuple[int, ...]
    """Of the tokens that are left alone."""


def positions(*places: int) -> Positions:
    """Tokens at these places of their row, padding not counted.

    A place p >= 0 is the token with p real ones before it in its row, of the prompt or generated;
    p < 0 is counted back from the end of the row's prompt of n real tokens, and is place n + p: -1
    is the prompt's last token. A place that a row does not have is no error. Raises ValueError for
    no place, TypeError for what is no integer, and for a list, since places are given one by one.
    """
    if not places:
        raise ValueError("positions: no place is given; sf.positions(0) is the first token")
    if isinstance(places[0], Iterable):
        raise TypeError(
            f"positions: got {places[0]!r}, places are given one by one: sf.positions(0, -1)"
        )
    return Positions(_integers("positions", places))


def not_tokens(ids: Iterable[int]) -> NotTokens:
    """Tokens whose id is none of these: `sf.not_tokens(tokenizer.all_special_ids)`.

    Raises TypeError for what is no list of integers and ValueError for an id below 0; calls of a
    decoder that is given embeddings in place of ids raise ValueError.
    """
    if not isinstance(ids, Iterable) or isinstance(ids, str) or getattr(ids, "ndim", 1) != 1:
        raise TypeError(f"not_tokens: got {ids!r}, a list of ids is needed: sf.not_tokens([3])")
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    ids = _integers("not_tokens", tuple(ids))
    if min(ids, default=0) < 0:
        raise ValueError(f"not_tokens: got {min(ids)}, ids start at 0")
    return NotTokens(ids)


Named = Literal["all", "prompt", "generated"]

Scope = Named | Positions | NotTokens | Tensor | Sequence["Scope"]
"""Which tokens: the first lines of this file say what each means."""


CPU = torch.device("cpu")


class Placed(Protocol):
    """What scopes ask of tokens, [B or 1, T]: a batch's are `tokens.Tokens`, those of many requests
    in one row `serve.requests.Packed`."""

    positions: Tensor
    """int64: how many real tokens stand before each in its row."""
    prompt_lengths: Tensor
    """int64, or [B or 1, 1]: how many real tokens the row's prompt has."""
    ids: Tensor | None

    def generated(self) -> bool | Tensor: ...


class Scoped:
    """A scope, checked, on one device: call it with tokens for what is steered."""

    def __init__(self, scope: Scope, device: torch.device = CPU):
        given = _parts(scope)
        if not given:
            raise ValueError(
                f"scope: got {scope!r}, one scope or more is needed; 'all' is any token"
            )
        self.parts = [_part(each, device) for each in given]
        self.everything = all(isinstance(part, _All) for part in self.parts)
        shut_out = [each for each, part in zip(given, self.parts, strict=True) if part.in_prompt]
        if self.begins_late and shut_out:
            raise ValueError(
                f"scope: got 'generated' and {shut_out[0]!r}, and no token is in both; give one of "
                "the two, or 'all'"
            )

    @property
    def begins_late(self) -> bool:
        """Whether it has what only a second token can show: tokens that were generated before."""
        return any(isinstance(part, _Generated) for part in self.parts)

    @property
    def reads_ids(self) -> bool:
        return any(isinstance(part, _Except) for part in self.parts)

    @property
    def masks(self) -> list[Tensor]:
        """The tensors [B, S] in it."""
        return [part.steered for part in self.parts if isinstance(part, _Mask)]

    @property
    def mask(self) -> Tensor:
        """The only one, which may change in place."""
        if len(self.masks) != 1:
            raise ValueError(f"scope: it holds {len(self.masks)} masks, where one is needed")
        return self.masks[0]

    @property
    def turn(self) -> int | None:
        """The first place, counted from the end of the prompt, that depends on where that is: 0 for
        "prompt" and "generated", -3 for positions(-3, -1); None if none does."""
        return min((part.turn for part in self.parts if part.turn is not None), default=None)

    @property
    def starts_at_turn(self) -> bool:
        """Whether no token before that is in it."""
        return any(part.starts_at_turn for part in self.parts)

    def __call__(self, tokens: Placed) -> bool | Tensor:
        """[B or 1, T] bool; True where all tokens are in, False where none is."""
        inside: bool | Tensor = True
        for part in self.parts:
            if inside is False:
                return False
            inside = both(inside, part(tokens))
        return inside


def both(one: bool | Tensor | None, other: bool | Tensor) -> bool | Tensor:
    """one & other, for masks or truth values; no mask leaves nothing out."""
    if one is None or isinstance(one, bool):
        return False if one is False else other
    if isinstance(other, bool):
        return one if other else False
    return one & other


class _Part:
    """A scope that is no list."""

    turn: int | None = None
    starts_at_turn = False
    in_prompt = False
    """Whether none of its tokens can be a generated one."""

    def __call__(self, tokens: Placed) -> bool | Tensor:
        raise NotImplementedError


class _All(_Part):
    def __call__(self, tokens: Placed) -> bool:
        return True


class _Generated(_Part):
    turn, starts_at_turn = 0, True

    def __call__(self, tokens: Placed) -> bool | Tensor:
        return tokens.generated()


class _Prompt(_Part):
    turn, in_prompt = 0, True

    def __call__(self, tokens: Placed) -> bool | Tensor:
        generated = tokens.generated()
        return not generated if isinstance(generated, bool) else ~generated


NAMED = {"all": _All(), "prompt": _Prompt(), "generated": _Generated()}


class _At(_Part):
    def __init__(self, places: tuple[int, ...], device: torch.device):
        self.first = [place for place in places if place >= 0]
        self.last = [place for place in places if place < 0]
        self.turn = min(self.last, default=None)
        self.starts_at_turn = self.in_prompt = not self.first
        with torch.inference_mode(False):
            self.from_start = torch.tensor(self.first, dtype=torch.int64, device=device)
            self.from_end = torch.tensor(self.last, dtype=torch.int64, device=device)

    def __call__(self, tokens: Placed) -> bool | Tensor:
        last = self.last and tokens.generated() is not True
        if not self.first and not last:
            return False
        places = tokens.positions
        inside = (places[..., None] == self.from_start).any(-1)
        if last:
            back = places - tokens.prompt_lengths
            inside = inside | (back[..., None] == self.from_end).any(-1)
        return inside


class _Except(_Part):
    def __init__(self, ids: tuple[int, ...], device: torch.device):
        with torch.inference_mode(False):
            self.ids = torch.tensor(ids, dtype=torch.int64, device=device)

    def __call__(self, tokens: Placed) -> Tensor:
        if tokens.ids is None:
            raise ValueError(
                "scope: not_tokens needs input_ids, and the decoder was given embeddings; "
                "give a mask or positions"
            )
        return (tokens.ids.to(self.ids.device)[..., None] != self.ids).all(-1)


class _Mask(_Part):
    """For the tokens of a batch alone: those of requests have no rows of their own."""

    def __init__(self, steered: Tensor, device: torch.device):
        with torch.inference_mode(False):
            self.steered = steered.to(device, copy=True)

    def __call__(self, tokens: Tokens) -> Tensor:
        width = self.steered.shape[1]
        columns = tokens.columns
        inside = self.steered[:, columns.clamp(max=width - 1)] & (columns < width)
        return spread(inside, tokens, "scope")


def spread(rows: Tensor, tokens: Tokens, name: str) -> Tensor:
    """What is given a row, [B, ...], or a prompt that generate repeated, for a batch of rows."""
    given = rows.shape[0]
    if given == tokens.batch:
        return rows
    if given == tokens.prompts:
        return rows.repeat_interleave(tokens.batch // given, 0)
    raise ValueError(
        f"{name}: {given} rows are given for a batch of {tokens.batch}; a table of configurations "
        "and handle.choose serve any batch"
    )


def _parts(scope: Scope) -> list:
    """The scopes in it that are no lists."""
    if isinstance(scope, Sequence) and not isinstance(scope, str):
        return [part for inner in scope for part in _parts(inner)]
    return [scope]


def _part(part, device: torch.device) -> _Part:
    if isinstance(part, str) and part in NAMED:
        return NAMED[part]
    if isinstance(part, Positions):
        return _At(part.places, device)
    if isinstance(part, NotTokens):
        return _Except(part.ids, device)
    if isinstance(part, Tensor):
        if part.dtype != torch.bool or part.ndim != 2 or not part.numel():
            raise ValueError(
                f"scope: got a tensor {part.dtype} {tuple(part.shape)}, bool [B, S] is needed"
            )
        return _Mask(part, device)
    accepted = "'all', 'prompt', 'generated', sf.positions, sf.not_tokens, a bool tensor [B, S]"
    hint = nearest(part, NAMED) if isinstance(part, str) else ""
    raise ValueError(f"scope: got {part!r}, accepted are {accepted}, and lists of these{hint}")


def _integers(name: str, values: tuple) -> tuple[int, ...]:
    for value in values:
        if not is_integer(value):
            raise TypeError(f"{name}: got {value!r}, integers are needed")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}: got {value}, integers of 64 bits are needed")
    return tuple(int(value) for value in values)
