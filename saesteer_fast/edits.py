"""The edits: what may be done to one activation, and tables of them, a row a configuration.

An edit changes an activation a by some amount, and steering adds that amount times the latent's
direction, so amounts are what is written here. Where the amount is 0 no bit of a token changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import nearest, one_of
from .numbers import finite, is_integer, latent_of

# Each gives a' - a for activations a and strengths v; NaN in a must come out as NaN.
_AMOUNTS = {
    "set": lambda a, v: v - a,
    "set_if_active": lambda a, v: torch.where(a <= 0, 0, v - a),
    "add": lambda a, v: v.expand_as(a),
    "scale": lambda a, v: (v - 1) * a,
    "at_least": lambda a, v: (v - a).clamp(min=0),
    "at_most": lambda a, v: (v - a).clamp(max=0),
}
KINDS = tuple(_AMOUNTS)
_SET, _ADD = KINDS.index("set"), KINDS.index("add")
_NONE = len(KINDS)
"""The kind of a latent that a configuration leaves alone."""


@dataclass(frozen=True)
class Edit:
    """What becomes of one activation: `kind` is one of `KINDS`, `value` its strength.

    The value is a finite number, or a tensor of one, through which gradients flow. Raises
    ValueError for another kind and for what is not finite in fp32, TypeError for no number; so do
    `add`, `scale`, `set_if_active`, `at_least` and `at_most`.
    """

    kind: str
    value: float | Tensor

    def __post_init__(self):
        one_of("kind", self.kind, KINDS)
        object.__setattr__(self, "value", _number(f"{self.kind}: got", self.value))

    def __repr__(self) -> str:
        return f"{self.kind}({_plain(self.value):g})"


def add(value: float | Tensor) -> Edit:
    """a' = a + value. Nothing is measured: every token moves by value * W_dec[f]."""
    return Edit("add", value)


def scale(value: float | Tensor) -> Edit:
    """a' = value * a. 1 changes nothing, 0 ablates."""
    return Edit("scale", value)


def set_if_active(value: float | Tensor) -> Edit:
    """a' = value where a > 0, else a. The value may be negative (Farrell et al., 2410.19278)."""
    return Edit("set_if_active", value)


def at_least(value: float | Tensor) -> Edit:
    """a' = max(a, value), as AxBench's minimum clamp (2501.17148)."""
    return Edit("at_least", value)


def at_most(value: float | Tensor) -> Edit:
    """a' = min(a, value)."""
    return Edit("at_most", value)


Edits = Mapping[int, float | Tensor | Edit]
"""{latent: number} sets a latent to a constant, {latent: sf.add(3.0)} and the like do the rest."""

Configurations = Edits | Sequence[Edits] | Mapping[str, Edits]
"""One for all rows, one a row, or a table by name out of which rows choose."""


class Table:
    """Configurations of edits as tensors: C of them, over the F latents that any of them edits.

    `values` [C, F] fp32 holds strengths, `kinds` [C, F] int8 what is done with them; both are [F]
    where one configuration is for all rows. Strengths may change in place.
    """

    def __init__(
        self,
        edits: Configurations,
        num_latents: int,
        device: torch.device,
    ):
        self.names, configurations = _configurations(edits)
        self.rowwise = self.names is not None
        checked = [_checked(edits, num_latents) for edits in configurations]
        # In order of latent: sums, and so results, do not depend on the order of a mapping.
        self.latents = sorted(set().union(*checked))
        self.columns = {latent: column for column, latent in enumerate(self.latents)}
        self._kinds = [[_kind(edits.get(f)) for f in self.latents] for edits in checked]
        values = [edits[f].value if f in edits else 0.0 for edits in checked for f in self.latents]
        self.present = tuple(sorted(set().union(*self._kinds)))
        kinds = self._kinds if self.rowwise else self._kinds[0]
        self.kinds = torch.tensor(kinds, dtype=torch.int8, device=device)
        # Numbers were found finite; of tensors nobody has asked.
        self.given_tensors = any(isinstance(value, Tensor) for value in values)
        self.values = _stacked(values, device)
        if self.rowwise:
            self.values = self.values.view(self.kinds.shape)

    @property
    def measures(self) -> bool:
        """Whether any edit reads the activation."""
        return any(kind not in (_ADD, _NONE) for kind in self.present)

    @property
    def sets_whole_rows(self) -> bool:
        """Whether every configuration sets all of the latents, or edits none."""
        return all(set(kinds) in ({_SET}, {_NONE}, set()) for kinds in self._kinds)

    def rows(self, chosen: Tensor, dims: int) -> tuple[Tensor, Tensor]:
        """Strengths and kinds [B, 1, ..., F] of the configurations chosen [B] int64, for x of
        `dims` dimensions."""
        shape = (len(chosen), *[1] * (dims - 2), len(self.latents))
        return self.values[chosen].view(shape), self.kinds[chosen].view(shape)

    def edited(self, kinds: Tensor) -> Tensor:
        """Which configurations edit anything: bool, [...] of kinds [..., F]."""
        return (kinds != _NONE).any(-1)

    def amounts(self, acts: Tensor, values: Tensor, kinds: Tensor) -> Tensor:
        """a' - a for acts [..., F] fp32; values and kinds broadcast to them."""
        if len(self.present) == 1 and self.present[0] != _NONE:
            return _AMOUNTS[KINDS[self.present[0]]](acts, values)
        amounts = torch.zeros_like(acts)
        for kind in self.present:
            if kind != _NONE:
                amount = _AMOUNTS[KINDS[kind]](acts, values)
                amounts = torch.where(kinds == kind, amount, amounts)
        return amounts

    def set(self, edits: Configurations) -> None:
        """Change strengths of edits that are there already; nothing changes if any is refused."""
        places, values = [], []
        for row, changed in self._changed(edits):
            for latent, edit in _checked(changed).items():
                places.append(self._place(row, latent, edit))
                values.append(_plain(edit.value))
        device = self.values.device
        with torch.no_grad():
            index = torch.tensor(places, dtype=torch.int64, device=device)
            new = torch.tensor(values, dtype=torch.float32, device=device)
            require_finite(new)
            self.values.view(-1).index_copy_(0, index, new)

    def described(self) -> object:
        """The configurations as they are now, in the form in which they were given."""
        strengths = self.values.tolist() if self.rowwise else [self.values.tolist()]
        rows = [
            {
                latent: value if KINDS[kind] == "set" else Edit(KINDS[kind], value)
                for latent, kind, value in zip(self.latents, kinds, values, strict=True)
                if kind != _NONE
            }
            for kinds, values in zip(self._kinds, strengths, strict=True)
        ]
        if not self.rowwise:
            return rows[0]
        return dict(zip(self.names, rows, strict=True)) if self.names else rows

    def index(self, name: str | int, argument: str = "rows") -> int:
        """The row of a configuration that an argument names or counts."""
        if is_integer(name) and 0 <= name < len(self.values):
            return int(name)
        if is_integer(name) or not self.names:
            raise ValueError(f"{argument}: got {name!r}, accepted are 0 to {len(self.values) - 1}")
        if name in self.names:
            return self.names.index(name)
        raise ValueError(
            f"{argument}: no configuration {name!r}, there are {list(self.names)}"
            f"{nearest(str(name), self.names)}"
        )

    def _changed(self, edits) -> list[tuple[int, Edits]]:
        names, changed = _configurations(edits)
        if (names is None) == self.rowwise:
            raise TypeError(
                f"edits: got {type(edits).__name__}; they are changed in the form in which they "
                f"were given, {self.described()}"
            )
        if names:
            rows = [self.index(name, "edits") for name in names]
            return list(zip(rows, changed, strict=True))
        if self.rowwise and len(changed) != len(self.values):
            raise ValueError(f"edits: got {len(changed)} rows, there are {len(self.values)}")
        return list(enumerate(changed))

    def _place(self, row: int, latent: int, edit: Edit) -> int:
        column, kinds = self.columns.get(latent), self._kinds[row]
        kind = _NONE if column is None else kinds[column]
        if kind == _NONE:
            edited = [f for f, kind in zip(self.latents, kinds, strict=True) if kind != _NONE]
            raise ValueError(
                f"{self._called(row)}: latent {latent} is not edited; edited are {edited}"
            )
        if KINDS[kind] != edit.kind:
            raise ValueError(
                f"{self._called(row)}: latent {latent} is edited by {KINDS[kind]}, which set() "
                f"cannot change to {edit.kind}; make another steering"
            )
        return row * len(self.latents) + column

    def _called(self, row: int) -> str:
        if not self.rowwise:
            return "edits"
        return f"edits[{(self.names[row] if self.names else row)!r}]"


def require_finite(strengths: Tensor) -> None:
    """Those given as tensors too, which waits for their device."""
    if not strengths.isfinite().all():
        wrong = strengths[~strengths.isfinite()][0].item()
        raise ValueError(f"edits: a strength is {wrong}, which is not finite in fp32")


def _configurations(edits) -> tuple[tuple[str, ...] | None, list[Edits]]:
    """Names (() where rows have none, None for one configuration of all rows), configurations."""
    if isinstance(edits, Mapping):
        if edits and all(isinstance(rows, Mapping) for rows in edits.values()):
            for name in edits:
                if not isinstance(name, str):
                    raise TypeError(f"edits: configuration {name!r} has no name; name it by a str")
            return tuple(edits), list(edits.values())
        return None, [edits]
    if isinstance(edits, Sequence) and edits and all(isinstance(row, Mapping) for row in edits):
        return (), list(edits)
    if isinstance(edits, Sequence) and any(isinstance(row, Mapping) for row in edits):
        place = next(place for place, row in enumerate(edits) if not isinstance(row, Mapping))
        raise TypeError(
            f"edits[{place}]: got {edits[place]!r}, a mapping {{latent: value}} is needed; {{}} "
            "leaves a row alone"
        )
    empty = "an empty " if isinstance(edits, Sequence) and not edits else ""
    raise TypeError(
        f"edits: got {empty}{type(edits).__name__}, a mapping {{latent: value}} is needed, or a "
        "list with a mapping a row, or a mapping {name: mapping}"
    )


def _checked(edits: Edits, num_latents: int | None = None) -> dict[int, Edit]:
    checked = {}
    for latent, edit in edits.items():
        latent = latent_of("edits", latent)
        if num_latents is not None and not 0 <= latent < num_latents:
            raise ValueError(f"edits: latent {latent} is not among 0 to {num_latents - 1}")
        if not isinstance(edit, Edit):
            edit = Edit("set", _number(f"edits: latent {latent} is given", edit))
        checked[latent] = edit
    return checked


def _kind(edit: Edit | None) -> int:
    return _NONE if edit is None else KINDS.index(edit.kind)


def _number(what: str, value: float | Tensor) -> float | Tensor:
    """A finite number as a float; a tensor of one, of any shape, as one of none."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        return value.reshape(())
    if isinstance(value, Tensor):
        raise TypeError(f"{what} {value!r}, a number or a floating-point tensor of one is needed")
    return finite(what, value)


def _plain(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _stacked(values: list[float | Tensor], device: torch.device) -> Tensor:
    """[n] fp32; gradients flow to those values that are tensors."""
    if not any(isinstance(value, Tensor) for value in values):
        return torch.tensor(values, dtype=torch.float32, device=device)
    return torch.stack(
        [torch.as_tensor(value, dtype=torch.float32, device=device) for value in values]
    )
