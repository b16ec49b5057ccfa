"""What to do to the latents of one SAE: measure, edit and condition, checked, as tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .choice import IMPLS, Impl
from .conditions import Condition, When, split
from .edits import Configurations, Table, require_finite
from .errors import one_of
from .measures import Measured, reconstruct, require_stream
from .reference import may_read
from .sae import SAE
from .scopes import both
from .weights import Measure

ErrorTerm = Literal["keep", "drop"]
"""What becomes of the part of x that the SAE cannot express."""
ERRORS: tuple[ErrorTerm, ...] = get_args(ErrorTerm)

Reading = Measure | Literal["projection"]
"""How activations are read: as the SAE does, or along the latent's direction."""

Rows = Sequence[str | int] | Tensor
"""Of a table of configurations one for each row, by names, or by numbers [B]."""


class Plan:
    """One steering of one SAE, on one device: all that is needed of the SAE.

    Call it with x [..., d], and a mask and the rows' configurations if any, for x' [..., d]; see
    `steer`. The latents, and what is done to them, stay what they are; strengths change in place.
    """

    def __init__(
        self,
        sae: SAE,
        edits: Configurations,
        device: torch.device,
        *,
        when: When | None = None,
        error: ErrorTerm = "keep",
        measure: Reading | None = None,
        impl: Impl = "auto",
    ):
        sae.require_unwritten()
        _check_choices(sae, error, measure, impl)
        self.d, self.impl, self.device = sae.d, impl, device
        # What inference mode makes, nobody could use outside of it.
        with torch.inference_mode(False):
            self.table = Table(edits, sae.num_latents, device)
            self.active, self.gate = split(when)
            self._build(sae, error, measure)
        self.chosen: Tensor | None = None

    def _build(self, sae: SAE, error: ErrorTerm, measure: Reading | None) -> None:
        if not self.table.latents or (not self.table.measures and measure != "projection"):
            measure = "none"
        if error == "drop":
            sae = sae.to(self.device)
        self.measured = Measured(sae, self.table.latents, self.device, measure)
        self.on_active = self._conditional(sae, self.active)
        if self.active is not None:
            limits = tuple(self.active.above.values())
            self.limits = torch.tensor(limits, dtype=torch.float32, device=self.device)
        self.on_gate = self._conditional(sae, self.gate)
        if self.on_active is not None or self.on_gate is not None:
            self._share_encoder()
        self.dropping = sae if error == "drop" else None
        self.fused = self.measured.fused and error == "keep" and self.table.sets_whole_rows

    def __call__(
        self, x: Tensor, mask: Tensor | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        """x [..., d]; mask bool [...]; chosen [x.shape[0]] int64, rows of the table."""
        self.check(x, mask)
        values, kinds = self.table.values, self.table.kinds
        if self.table.rowwise:
            self._check_rows(x, chosen)
            values, kinds = self.table.rows(chosen, x.ndim)
        if self.fused:
            return self._set(x, mask, values, kinds)
        acts = self.measured.acts(x, self.impl)
        amounts = self.table.amounts(acts, values, kinds)
        if mask is not None:
            amounts = torch.where(mask[..., None], amounts, 0)
        if self.dropping is None:
            return self.measured.apply(x, amounts, self.impl)
        return self._reconstructed(x, mask, amounts, kinds)

    def holds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations [..., G] fp32 of the per-token condition's latents, and where every one is
        above its threshold, bool [...]."""
        acts = self.on_active.acts(x.detach(), self.impl)
        return acts, (acts > self.limits).all(-1)

    def choose(self, rows: Rows | None) -> None:
        """Take these rows of the table; in place where as many were taken before."""
        chosen = self._rows(rows)
        if self.chosen is not None and chosen is not None and chosen.shape == self.chosen.shape:
            self.chosen.copy_(chosen)
        else:
            self.chosen = chosen

    def require_effect(self) -> None:
        """ValueError for a strength that is not finite, and for an edited latent whose direction is
        0; waits for the device."""
        if self.table.given_tensors and may_read(self.table.values):
            require_finite(self.table.values)
        moves = self.measured.directions.any(-1)
        if not moves.all():
            latent = self.table.latents[int(moves.int().argmin())]
            raise ValueError(
                f"edits: latent {latent} has the direction 0, nothing would be steered"
            )

    def require_ready(self) -> None:
        """Raises what the first call would, and ValueError for a strength that is learned
        elsewhere. What a first call makes is there then, so that all can be traced."""
        if self.table.values.requires_grad:
            raise ValueError("edits: a strength requires a gradient; learn `strengths` instead")
        self.require_effect()
        if not self.table.latents:
            warnings.warn("edits: name no latent, so nothing is steered", stacklevel=3)
        nothing = self.measured.directions.new_empty(0, 0, self.d)
        self(nothing, chosen=self.measured.features.new_empty(0) if self.table.rowwise else None)

    @property
    def chosen_by(self) -> str:
        """The argument that tells how many rows there are."""
        table = self.table
        return "rows" if table.names or len(self.chosen) != len(table.values) else "edits"

    @property
    def nbytes(self) -> int:
        """Of all that is kept on the device."""
        holders = [self.table, self.measured, self.on_active, self.on_gate, self.dropping]
        sizes: dict[int, int] = {}  # they share an encoder
        for held in (t for one in holders if one is not None for t in _tensors(one)):
            sizes[held.data_ptr()] = max(held.nbytes, sizes.get(held.data_ptr(), 0))
        return sum(sizes.values())

    def _set(self, x: Tensor, mask: Tensor | None, values: Tensor, kinds: Tensor) -> Tensor:
        if self.table.rowwise:
            values = values.expand(*x.shape[:-1], -1)
            mask = both(mask, self.table.edited(kinds).expand(x.shape[:-1]))
        return self.measured.set(x, values, mask, self.impl)

    def _reconstructed(self, x: Tensor, mask: Tensor | None, amounts: Tensor, kinds: Tensor):
        recon = reconstruct(self.dropping, x, self.measured.features, amounts, self.impl)
        edited = both(mask, self.table.edited(kinds).expand(x.shape[:-1]))
        return torch.where(edited[..., None], recon, x)

    def _conditional(self, sae: SAE, condition: Condition | None) -> Measured | None:
        if condition is None:
            return None
        for latent in condition.latents:
            if not 0 <= latent < sae.num_latents:
                raise ValueError(f"when: latent {latent} is not among 0 to {sae.num_latents - 1}")
        return Measured(sae, condition.latents, self.device)

    def _share_encoder(self) -> None:
        """Keep one copy of it for all that rank latents."""
        readers = [self.measured, self.on_active, self.on_gate]
        ranking = [one for one in readers if one and one.measure in ("topk", "groupmax")]
        for other in ranking[1:]:
            other.W_enc, other.b_enc = ranking[0].W_enc, ranking[0].b_enc
            other.order = ranking[0].order

    def _rows(self, rows: Rows | None) -> Tensor | None:
        table = self.table
        if not table.rowwise:
            if rows is not None:
                raise ValueError("rows: edits is one configuration, there is nothing to choose")
            return None
        if rows is None:
            if table.names:
                raise ValueError(f"rows: needed to choose among {list(table.names)}")
            rows = range(len(table.values))
        if isinstance(rows, str) or not isinstance(rows, Iterable):
            raise TypeError(f"rows: got {rows!r}, one configuration a row is needed")
        if isinstance(rows, Tensor):
            if rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
                raise TypeError(
                    f"rows: got {rows.dtype} {tuple(rows.shape)}, integers [B] are needed"
                )
            rows = rows.tolist()
        with torch.inference_mode(False):
            indices = [table.index(row) for row in rows]
            return torch.tensor(indices, dtype=torch.int64, device=self.device)

    def check(self, x: Tensor, mask: Tensor | None) -> None:
        require_stream(x, self.d)
        if x.device != self.table.values.device:
            raise ValueError(
                f"x: is on {x.device}, the SAE's weights on {self.table.values.device}"
            )
        if not (mask is None or isinstance(mask, Tensor)):
            raise TypeError(f"mask: got {type(mask).__name__}, a bool tensor is needed")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            raise ValueError(
                f"mask: got {mask.dtype} {tuple(mask.shape)}, bool {tuple(x.shape[:-1])} is needed"
            )

    def _check_rows(self, x: Tensor, chosen: Tensor) -> None:
        if x.ndim < 2 or len(chosen) != len(x):
            given = f"{self.chosen_by}: {len(chosen)} rows are given"
            raise ValueError(f"{given} for x {tuple(x.shape)}")


class Held:
    """One plan in somebody's hands: what of it can be read and changed while it steers."""

    def __init__(self, plan: Plan):
        self._plan = plan

    @property
    def latents(self) -> list[int]:
        """What is edited, in the order of `strengths`."""
        return list(self._plan.table.latents)

    @property
    def strengths(self) -> Tensor:
        """[F] fp32, or [C, F], a row a configuration: read at every call, so that it may change in
        place.

        `strengths.requires_grad_()` makes it a leaf to be learned.
        """
        return self._plan.table.values

    def set(self, edits: Configurations) -> None:
        """Change strengths of edits that are there already, from the next call on.

        Given as `edits` was, less what stays as it is. Raises TypeError for another form, and
        ValueError for a latent that is not edited or is so in another way, and for NaN or infinity;
        RuntimeError once a steering of a model is removed.
        """
        self._plan.table.set(edits)

    def choose(self, rows: Rows) -> None:
        """Take other configurations of the table for the rows: their names, or numbers [B].

        In place where as many rows were there before. Raises ValueError for one that is not there,
        and where `edits` is no table; TypeError for what is neither a list nor a tensor.
        """
        self._plan.choose(rows)


def require_sae(sae: SAE) -> None:
    if not isinstance(sae, SAE):
        raise TypeError(
            f"sae: got {type(sae).__name__}, an SAE is needed; SAE.load reads one, "
            "and SAE(...) takes the tensors of another library's"
        )


def _tensors(holder: object) -> Iterator[Tensor]:
    for held in vars(holder).values():
        several = held if isinstance(held, tuple) else (held,)
        yield from (one for one in several if isinstance(one, Tensor))


def _check_choices(sae: SAE, error: ErrorTerm, measure: Reading | None, impl: Impl) -> None:
    one_of("error", error, ERRORS)
    one_of("impl", impl, IMPLS)
    if measure is not None:
        one_of("measure", measure, (sae.measure, "projection"))
    if error == "drop" and measure == "projection":
        raise ValueError("error: 'drop' decodes the SAE's activations; a projection has none")
