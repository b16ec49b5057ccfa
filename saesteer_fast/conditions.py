"""The conditions: what must be true of the SAE's own activations for steering to happen.

    sf.active({511: 3.0})                 per token: latent 511 is above 3.0 there
    sf.gate({511: 0.8, 7: -1.1}, -2.0)    per prompt: a sparse logistic gate says so, once
    sf.gate("gate.json")                  the same, its weights from a file
    sf.gate(callable, latents=[511])      the same, decided by a callable

A gate is decided when the prompt has been read, and held, row by row, until the next prompt. What
was decided, and what caused it, can be read back as `Decision`s.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .errors import named, nearest, nearest_file, one_of
from .node import Node
from .numbers import finite, latent_of
from .tokens import Tokens

Pool = Literal["max", "mean", "last"]
POOLS: tuple[Pool, ...] = get_args(Pool)


class Cause(NamedTuple):
    """One latent, where it was most active; for a gate with pool "last", on the last token."""

    latent: int
    act: float
    token: int
    """Position in its row, padding not counted."""

    def __str__(self) -> str:
        return f"latent {self.latent} at {self.act:.2g} on token {self.token}"


class Decision(NamedTuple):
    """What a condition said of one row."""

    by: str
    """"active", of the model's latest call, or "gate", of its latest prompt."""
    row: int
    on: bool
    causes: tuple[Cause, ...]
    """Latents of the condition that were active, the most active first. Of a logistic gate those
    whose pooled activation is not 0, by |weight * pooled activation|."""
    score: float | None = None
    """A logistic gate's log-odds."""

    def __str__(self) -> str:
        because = ", ".join(map(str, self.causes)) or "no latent active"
        if self.score is not None:
            because += f"; log-odds {self.score:.2g}"
        return f"row {self.row} {'steered' if self.on else 'not steered'}: {because}"


class GateInput(NamedTuple):
    """What a gate sees: the prompts of a batch of B rows and P columns."""

    acts: Tensor
    """[B, P, G] fp32, of the gate's latents."""
    real: Tensor
    """[B, P] bool, False for padding."""
    ids: Tensor | None
    """[B, P]; None where the decoder was given embeddings."""


@dataclass(frozen=True)
class Active:
    """`active` makes it."""

    above: Mapping[int, float]

    @property
    def latents(self) -> tuple[int, ...]:
        """Those that decide."""
        return tuple(self.above)


@dataclass(frozen=True)
class Gate:
    """`gate` makes it."""

    latents: tuple[int, ...]
    decide: Callable[[GateInput], Tensor]


@dataclass(frozen=True)
class Logistic:
    """on = sigmoid(bias + sum_g weights_g pool(a_g)) > threshold, pooled over a row's prompt."""

    weights: tuple[float, ...]
    bias: float
    threshold: float
    pool: str
    margin: float = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "margin", math.log(self.threshold / (1 - self.threshold)))

    def scores(self, prompt: GateInput) -> Tensor:
        """Log-odds [B] fp32."""
        pooled = _pooled(prompt, self.pool)
        return (pooled * pooled.new_tensor(self.weights)).sum(-1) + self.bias

    def __call__(self, prompt: GateInput) -> Tensor:
        return self.scores(prompt) > self.margin


def active(latents: int | Mapping[int, float], above: float = 0.0) -> Active:
    """Steer the tokens on which latents are active: where a_f > threshold_f for every f given.

    latents is one latent, of which `above` is the threshold, or {latent: threshold}. a_f is the
    SAE's own activation on that token, before this steering and after those of the module that were
    attached earlier, and thresholds are in its units; 0 asks whether the latent is live. Raises
    TypeError for a latent that is no integer or a threshold that is no number, ValueError for NaN
    or infinity, for no latent, and for `above` beside a mapping; a latent that the SAE does not
    have is refused by what is given the condition.
    """
    if isinstance(latents, Mapping):
        _require_unused(active, "the thresholds say it", {"above": above}, "above")
        return Active(_by_latent("latents", latents))
    return Active({latent_of("latents", latents): finite("above: got", above)})


def gate(
    by: Mapping[int, float] | str | os.PathLike[str] | Callable[[GateInput], Tensor],
    bias: float = 0.0,
    *,
    threshold: float = 0.5,
    pool: Pool = "max",
    latents: Sequence[int] = (),
) -> Gate:
    """Steer the rows whose prompt a gate lets through, decided once and held for what follows. The
    model has to be called with the whole prompt: of what a cache holds a gate has seen nothing.

    by a mapping {latent: weight}: on where sigmoid(bias + sum weight pool(a)) > threshold; `pool`
    is over the row's prompt, "max", "mean", or "last" for its last token.
    by a path: the same from a JSON file {"weights": {latent: weight}, "bias", "threshold", "pool"},
    or from a safetensors file with `latents` [G], `weights` [G], and the rest as its metadata.
    by a callable: it is given a `GateInput` with the activations of `latents` and returns bool [B].
    Raises TypeError or ValueError, naming the argument or the file, also for an argument that the
    form does not use.
    A gate on the prompt needs no host synchronisation unless its callable makes one.
    """
    if not isinstance(latents, Iterable):
        raise TypeError(f"latents: got {latents!r}, a list is needed: latents=[511]")
    given = dict(bias=bias, threshold=threshold, pool=pool, latents=tuple(latents))
    if callable(by):
        _require_unused(gate, "a callable decides by itself", given, "bias", "threshold", "pool")
        return Gate(tuple(latent_of("latents", f) for f in latents), by)
    if isinstance(by, (str, os.PathLike)):
        _require_unused(gate, "the file says it", given, *given)
        return _from_file(Path(os.path.expanduser(by)))
    if not isinstance(by, Mapping):
        raise TypeError(f"by: got {type(by).__name__}, a mapping, a path or a callable is needed")
    weights = _by_latent("by", by)
    _require_unused(gate, "the weights name them", given, "latents")
    one_of("pool", pool, POOLS)
    if not 0 < finite("threshold: got", threshold) < 1:
        raise ValueError(f"threshold: got {threshold}, a probability between 0 and 1 is needed")
    bias = finite("bias: got", bias)
    return Gate(tuple(weights), Logistic(tuple(weights.values()), bias, float(threshold), pool))


def _by_latent(argument: str, given: Mapping[int, float]) -> dict[int, float]:
    if not given:
        raise ValueError(f"{argument}: got no latent, one or more are needed")
    return {
        latent_of(argument, latent): finite(f"{argument}: latent {latent} is given", value)
        for latent, value in given.items()
    }


Condition = Active | Gate

When = Condition | Sequence[Condition]
"""Of one kind or of both; all must hold."""


def split(when: When | None) -> tuple[Active | None, Gate | None]:
    """Conditions, all of which must hold, as at most one of each kind."""
    if when is None:
        return None, None
    alone = not isinstance(when, Sequence) or isinstance(when, str)
    given = [when] if alone else list(when)
    for condition in given:
        if not isinstance(condition, Condition):
            raise TypeError(
                f"when: got {type(condition).__name__}, accepted are sf.active and sf.gate"
            )
    actives = [condition for condition in given if isinstance(condition, Active)]
    gates = [condition for condition in given if isinstance(condition, Gate)]
    if len(gates) > 1 or len(actives) > 1:
        raise ValueError("when: one sf.active (of several latents) and one sf.gate are accepted")
    return (actives or [None])[0], (gates or [None])[0]


class Seen(NamedTuple):
    """What was measured of the tokens of one call."""

    acts: Tensor
    """[B, T, G] fp32."""
    tokens: Tokens
    generated: bool
    """Whether tokens that are no prompt count for the condition."""

    def counted(self) -> Tensor:
        """[B, T] bool: the tokens that count."""
        return self.tokens.counted(self.generated).expand(*self.acts.shape[:2])


def decided(gate: Gate, seen: Sequence[Seen]) -> Tensor:
    """Which rows the gate lets through: bool [B]."""
    prompt = _prompt(seen)
    on = gate.decide(prompt)
    if not isinstance(on, Tensor) or on.dtype != torch.bool or on.shape != prompt.real.shape[:1]:
        what = f"{on.dtype} {tuple(on.shape)}" if isinstance(on, Tensor) else type(on).__name__
        raise TypeError(f"gate: its callable gave {what}, bool {(len(prompt.real),)} is needed")
    return on


def decisions(condition: Condition, seen: Sequence[Seen], on: Tensor) -> list[Decision]:
    """What was decided, and why; reads tensors, so the host waits for the device."""
    prompt, found = _prompt(seen), []
    by = "gate" if isinstance(condition, Gate) else "active"
    places = [chunk.tokens.positions.expand(*chunk.acts.shape[:2]) for chunk in seen]
    logistic = isinstance(condition, Gate) and isinstance(condition.decide, Logistic)
    scores = condition.decide.scores(prompt).tolist() if logistic else [None] * len(on)
    weights = condition.decide.weights if logistic else [1.0] * len(condition.latents)
    pool = condition.decide.pool if logistic else "max"
    pooled, (peaks, columns) = _pooled(prompt, pool).tolist(), _peaks(prompt, pool)
    tokens = torch.cat(places, 1).gather(1, columns).tolist()
    for row, acts in enumerate(peaks.tolist()):
        named = zip(condition.latents, acts, tokens[row], weights, pooled[row], strict=True)
        active = [(Cause(f, a, token), abs(w * p)) for f, a, token, w, p in named if p]
        active.sort(key=lambda pair: -pair[1])
        causes = tuple(cause for cause, _ in active)
        found.append(Decision(by, row, bool(on[row]), causes, scores[row]))
    return found


def _prompt(seen: Sequence[Seen]) -> GateInput:
    acts = torch.cat([chunk.acts for chunk in seen], 1)
    real = torch.cat([chunk.counted() for chunk in seen], 1)
    known = all(chunk.tokens.ids is not None for chunk in seen)
    return GateInput(acts, real, torch.cat([c.tokens.ids for c in seen], 1) if known else None)


def _pooled(prompt: GateInput, pool: str) -> Tensor:
    """[B, G]; a row without a real token counts as silent."""
    if pool == "mean":
        real = prompt.real[..., None]
        return torch.where(real, prompt.acts, 0).sum(1) / real.sum(1).clamp(min=1)
    return _peaks(prompt, pool)[0]


def _peaks(prompt: GateInput, pool: str) -> tuple[Tensor, Tensor]:
    """[B, G]: the latents' largest activations, for pool "last" those of the row's last token; and
    their columns."""
    acts = torch.where(prompt.real[..., None], prompt.acts, 0)
    if pool != "last":
        return acts.max(1)
    column = torch.arange(acts.shape[1], device=acts.device)
    columns = torch.where(prompt.real, column, 0).amax(1, keepdim=True).expand(-1, acts.shape[2])
    return acts.gather(1, columns[:, None])[:, 0], columns


def _from_file(path: Path) -> Gate:
    if not path.is_file():
        hint = nearest_file(path, (".json", ".safetensors"))
        raise FileNotFoundError(f"gate: no file {path}{hint}")
    with named(f"gate: {path.name}: "):
        if path.suffix == ".json":
            return gate_of(Node.of(path.read_bytes()))
        if path.suffix == ".safetensors":
            return gate(**_tensors(path))
        raise ValueError("is neither .json nor .safetensors")


def gate_of(node: Node) -> Gate:
    """The gate of a JSON object."""
    readers = {
        "weights": lambda node: node.numbers("weight"),
        "bias": Node.number,
        "threshold": Node.number,
        "pool": lambda node: node.one_of(POOLS),
    }
    given = node.read("a gate", readers, needed=("weights",))
    with named(f"{node.place}." if node.place else ""):
        return gate(given.pop("weights"), **given)


def _tensors(path: Path) -> dict:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            given = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if set(tensors) != {"latents", "weights"}:
        raise ValueError(
            f"has the tensors {', '.join(sorted(tensors))}; latents and weights are needed, bias, "
            "threshold and pool are metadata"
        )
    latents, weights = tensors["latents"], tensors["weights"]
    if latents.shape != weights.shape or latents.ndim != 1:
        raise ValueError(
            f"has latents {tuple(latents.shape)} and weights {tuple(weights.shape)}, both [G] are "
            "needed"
        )
    if latents.dtype != torch.int64 or not weights.is_floating_point():
        raise ValueError(
            f"has latents of {latents.dtype} and weights of {weights.dtype}, int64 and floating "
            "point are needed"
        )
    if not len(latents) or len(set(latents.tolist())) < len(latents):
        raise ValueError("names a latent twice" if len(latents) else "names no latent")
    if not weights.isfinite().all():
        raise ValueError("has weights that are not finite")
    for name, value in given.items():
        if name not in ("bias", "threshold", "pool"):
            hint = nearest(name, ("bias", "threshold", "pool"))
            raise ValueError(f"metadata {name!r}; accepted are bias, threshold, pool{hint}")
        if name != "pool":
            given[name] = _float(name, value)
    return given | {"by": dict(zip(latents.tolist(), weights.tolist(), strict=True))}


def _float(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, a number is needed") from None


def _require_unused(of: Callable, why: str, given: Mapping[str, object], *names: str) -> None:
    parameters = inspect.signature(of).parameters
    for name in names:
        if given[name] != parameters[name].default:
            raise ValueError(f"{name}: got {given[name]!r}, but {why}")
