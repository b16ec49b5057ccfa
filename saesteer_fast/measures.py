"""How activations are read off a stream, and how changes of them are written back.

For a few latents at a time `Measured` does both, and never decodes; `encode`, `decode` and
`reconstruct` take the whole SAE. Every formula is that of `SAE`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from . import ops
from .errors import one_of
from .numbers import TINY, require_float
from .weights import Weights, constants, row_norms

TOKENS = 1024
"""Tokens encoded at once to count what is live."""
BLOCK = 4096
"""Latents whose pre-activations are held at once where all are needed and no op selects them."""

_EXTRA = ("projection", "none")


class Measured:
    """Some latents of one SAE on one device: all that steering needs of the SAE.

        a  = acts(x)            [..., F] fp32, in the order of `latents`
        x' = apply(x, coef)     x + unit * sum over f of coef_f directions_f

    unit undoes the SAE's normalisation: (std, or norm / sqrt(d), or 1) / scale. `measure` is the
    SAE's own, or

        projection    a = direction·(z - b_dec), direction = W_dec / |W_dec|; no encoder
        none          a = 0: for edits that depend on no activation

    x is [..., d] fp32, bf16 or fp16. Both methods are differentiable in x, apply in coef too; they
    accumulate in fp32, and x' is rounded once to x's dtype; a token whose coefficients are all 0
    comes out bit-identical. Elementwise measures keep F rows of W_enc, topk and groupmax all; topk
    in the SAE's `order`, where `rows` are the latents'. Its b_enc is the folded one, for the ops.
    """

    def __init__(
        self,
        sae: Weights,
        latents: Sequence[int],
        device: torch.device | str | None = None,
        measure: str | None = None,
    ):
        self.measure = sae.measure if measure is None else measure
        one_of("measure", self.measure, (sae.measure, *_EXTRA))
        self.latents, self.d, self.k = list(latents), sae.d, sae.k
        self.normalize, self.scale = sae.normalize, sae.scale
        device = sae.device if device is None else torch.device(device)
        with constants():
            features = torch.tensor(self.latents, dtype=torch.int64, device=sae.device)
            unit_rows = sae.decoder_norm or self.measure == "projection"
            # W_dec[features] would wake all threads.
            directions = sae.W_dec.index_select(0, features)
            directions = _unit(directions) if unit_rows else directions
            parameters, order, rows = (), None, features
            if self.measure == "topk":
                W_enc, b_enc, order = sae.ranking
                rows = features if order is None else sae.places[features]
            elif self.measure == "groupmax":
                W_enc, b_enc = sae.encoder
            elif self.measure == "projection":
                W_enc, b_enc = directions, -(directions * sae.b_dec.double()).sum(-1).float()
            elif self.measure == "none":
                W_enc, b_enc = sae.W_enc[:0], sae.b_enc[:0].float()
            else:
                W_enc, b_enc = sae.encoder_rows(features)
                parameters = tuple(parameter[features] for parameter in _parameters(sae))
            self.features, self.directions, self.rows = features, directions, rows
            self.W_enc, self.b_enc, self.order = W_enc, _over(b_enc, self.scale), order
            self.parameters = parameters
            if device != sae.device:
                self._move(device)
            self.groups = self._grouped() if self.measure == "groupmax" else []

    def _move(self, device: torch.device) -> None:
        for name, held in vars(self).items():
            if isinstance(held, Tensor):
                setattr(self, name, held.to(device))
        self.parameters = tuple(parameter.to(device) for parameter in self.parameters)

    def _grouped(self) -> list[tuple[slice, Tensor, Tensor]]:
        """Of each group its rows, its latents counted from its first, and their places."""
        size = len(self.W_enc) // self.k
        places = {}
        for place, latent in enumerate(self.latents):
            places.setdefault(latent // size, []).append(place)
        found = []
        for group, inside in places.items():
            rows = slice(group * size, (group + 1) * size)
            inside = torch.tensor(inside, device=self.features.device)
            found.append((rows, self.features[inside] - rows.start, inside))
        return found

    @property
    def fused(self) -> bool:
        """Whether one op can set these latents."""
        return self.measure == "topk" and self.normalize == "none" and self.scale == 1

    def set(self, x: Tensor, values: Tensor, mask: Tensor | None, impl: str = "auto") -> Tensor:
        """x with the latents set to values, [F] or [..., F] fp32; only where `fused`."""
        W_enc, b_enc, directions = self.W_enc, self.b_enc, self.directions
        options = dict(mask=mask, order=self.order, impl=impl)
        return ops.steer(x, W_enc, b_enc, directions, self.rows, values, self.k, **options)

    def acts(self, x: Tensor, impl: str = "auto") -> Tensor:
        """The latents' activations: [..., F] fp32."""
        if self.measure == "none" or not self.latents:
            return x.new_zeros((*x.shape[:-1], len(self.latents)), dtype=torch.float32)
        z, _, _ = _normalised(x, self.normalize)
        if self.measure == "topk":
            rows, order = self.rows, self.order
            acts = ops.feature_acts(z, self.W_enc, self.b_enc, rows, self.k, order=order, impl=impl)
            return acts if self.scale == 1 else acts * self.scale
        if self.measure == "groupmax":
            return self._groupmax(z, impl) * self.scale
        p = ops.project(z, self.W_enc, self.b_enc, impl=impl) * self.scale
        return p if self.measure == "projection" else _activate(self.measure, p, *self.parameters)

    def apply(self, x: Tensor, coef: Tensor, impl: str = "auto") -> Tensor:
        """x with coef, [F] or [..., F] fp32 in units of the activations, added to the latents."""
        _, _, unit = _normalised(x, self.normalize)
        if unit is not None:
            # Where nothing changes, a unit of NaN or infinity makes no 0 NaN.
            still = ~unit.isfinite() & (coef == 0).all(-1, keepdim=True)
            coef = coef * unit.masked_fill(still, 1)
        coef = _over(coef, self.scale)
        return ops.add_directions(x, self.directions, coef, impl=impl)

    def _groupmax(self, z: Tensor, impl: str) -> Tensor:
        acts = z.new_zeros((*z.shape[:-1], len(self.latents)), dtype=torch.float32)
        for rows, local, inside in self.groups:
            found = ops.feature_acts(z, self.W_enc[rows], self.b_enc[rows], local, 1, impl=impl)
            acts = acts.index_copy(-1, inside, found)
        return acts


@torch.no_grad()
def hot_first(sae: Weights, x: Tensor | Iterable[Tensor]) -> Tensor:
    """The latents of a topk SAE by how many tokens of x they are live in, most first: [N] int64.

    Latents alike keep their order. x and errors as for SAE.calibrate.
    """
    if sae.measure != "topk":
        raise ValueError(f"calibrate: only topk ranks latents, this SAE has {sae.measure}")
    live = torch.zeros(sae.num_latents, dtype=torch.int64, device=sae.device)
    tokens = 0
    if not isinstance(x, Iterable):
        raise TypeError(f"x: got {type(x).__name__}, a tensor is needed, or several")
    for batch in (x,) if isinstance(x, Tensor) else x:
        require_stream(batch, sae.d)
        for rows in batch.reshape(-1, sae.d).split(TOKENS):
            z, _, _ = _normalised(rows.to(sae.device), sae.normalize)
            values, indices = _largest(sae, z, "auto")
            live += torch.bincount(indices[values > 0], minlength=sae.num_latents)
            tokens += len(rows)
    if tokens == 0:
        raise ValueError("x: holds no token")
    with constants():
        return live.argsort(descending=True, stable=True)


def encode(sae: Weights, x: Tensor, impl: str = "auto") -> Tensor:
    """All activations of `sae`, dense: [..., N] fp32. Differentiable in x."""
    require_stream(x, sae.d)
    z, _, _ = _normalised(x, sae.normalize)
    if sae.k is None:
        return torch.cat([acts for _, acts in _blocks(sae, z, impl)], -1)
    values, indices = _largest(sae, z, impl)
    return values.new_zeros((*x.shape[:-1], sae.num_latents)).scatter(-1, indices, values)


def decode(sae: Weights, acts: Tensor, x: Tensor | None = None) -> Tensor:
    """What dense activations [..., N] stand for: [..., d] fp32.

    x [..., d] is what they were encoded from; it is needed where `sae` normalises tokens.
    """
    if not isinstance(acts, Tensor):
        raise TypeError(f"acts: got {type(acts).__name__}, a tensor is needed")
    if acts.shape[-1:] != (sae.num_latents,):
        raise ValueError(f"acts: got shape {tuple(acts.shape)}, [..., {sae.num_latents}] is needed")
    if sae.normalize != "none":
        if x is None:
            raise ValueError(f"x: needed to undo normalize={sae.normalize!r}")
        require_stream(x, sae.d)
        if x.shape[:-1] != acts.shape[:-1]:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, what acts {tuple(acts.shape)} were encoded from "
                "is needed"
            )
    recon = sae.b_dec.float().expand(*acts.shape[:-1], -1)
    for rows in _slices(sae):
        recon = _add(sae, recon, rows, acts[..., rows].float())
    return _restored(sae, recon, x)


def reconstruct(
    sae: Weights, x: Tensor, features: Tensor, coef: Tensor, impl: str = "auto"
) -> Tensor:
    """decode(a + coef on `features`): [..., d], rounded once, to x's dtype.

    features [F] int64; coef [F] or [..., F] fp32, in units of the activations. Differentiable in x
    and coef.
    """
    z, _, _ = _normalised(x, sae.normalize)
    coef = coef.expand(*x.shape[:-1], -1)
    if sae.k is None:
        recon = sae.b_dec.float().expand(*x.shape[:-1], -1)
        recon = _add(sae, recon, features, coef, impl)
        for rows, acts in _blocks(sae, z, impl):
            recon = _add(sae, recon, rows, acts, impl)
    else:
        values, indices = _largest(sae, z, impl)
        values = torch.cat([values, coef], -1)
        indices = torch.cat([indices, features.expand(*x.shape[:-1], -1)], -1)
        if sae.decoder_norm:
            values = values / sae.decoder_norms.clamp_min(TINY)[indices]
        recon = ops.decode(values, indices, sae.W_dec, sae.b_dec.float(), impl=impl)
    return _restored(sae, recon, x).to(x.dtype)


def require_stream(x: Tensor, d: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, a tensor is needed")
    require_float("x", x.dtype)
    if x.shape[-1:] != (d,):
        raise ValueError(f"x: got shape {tuple(x.shape)}, the SAE is for [..., {d}]")


def _normalised(x: Tensor, normalize: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """n(x), and what undoes it: mean and unit, [..., 1] fp32, None where there is nothing to undo.

    Sources: SAELens 6, SAE.run_time_activation_norm_fn_in; openai/sparse_autoencoder, LN.
    """
    if normalize == "none":
        return x, None, None
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if normalize == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).norm(dim=-1, keepdim=True) / (x.shape[-1] - 1) ** 0.5
        return (x - mean) / (std + 1e-5), mean, std
    unit = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return x / unit, None, unit


def _restored(sae: Weights, recon: Tensor, x: Tensor | None) -> Tensor:
    if sae.scale != 1:
        recon = recon.float() / sae.scale
    if sae.normalize == "none":
        return recon
    _, mean, unit = _normalised(x, sae.normalize)
    return recon * unit if mean is None else recon * unit + mean


def _over(t: Tensor, scale: float) -> Tensor:
    """t / scale, without a copy where that is t."""
    return t if scale == 1 else t / scale


def _activate(measure: str, p: Tensor, *parameters: Tensor) -> Tensor:
    """Elementwise measures; NaN stays NaN."""
    if measure == "relu":
        return p.relu()
    if measure == "threshold":
        (threshold,) = parameters
        return p.relu() * (p > threshold)
    gain, offset = parameters
    return (gain * p + offset).relu() * (p > 0)


def _parameters(sae: Weights) -> tuple[Tensor, ...]:
    """[N] fp32 each: what `_activate` takes."""
    if sae.measure == "threshold":
        return (sae.threshold.float().clamp_min(0),)
    if sae.measure == "gated":
        gain = sae.r_mag.double().exp()
        return gain.float(), (sae.b_mag.double() - gain * sae.b_enc.double()).float()
    return ()


def _largest(sae: Weights, z: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Values fp32 and indices int64, [..., k], of the latents that topk and groupmax let live."""
    W_enc, b_enc = sae.encoder
    b_enc = _over(b_enc, sae.scale)
    if sae.measure == "topk":
        values, indices = ops.encode(z, W_enc, b_enc, sae.k, impl=impl)
    else:
        size = sae.num_latents // sae.k
        groups = [
            ops.encode(z, W_enc[begin : begin + size], b_enc[begin : begin + size], 1, impl=impl)
            for begin in range(0, sae.num_latents, size)
        ]
        values = torch.cat([value for value, _ in groups], -1)
        indices = torch.cat([index + i * size for i, (_, index) in enumerate(groups)], -1)
    return values * sae.scale, indices


def _blocks(sae: Weights, z: Tensor, impl: str) -> Iterator[tuple[slice, Tensor]]:
    """Activations of an elementwise SAE, some latents at a time."""
    parameters = _parameters(sae)
    for rows in _slices(sae):
        W_enc, b_enc = sae.encoder_rows(rows)
        p = ops.project(z, W_enc, _over(b_enc, sae.scale), impl=impl) * sae.scale
        yield rows, _activate(sae.measure, p, *(parameter[rows] for parameter in parameters))


def _slices(sae: Weights) -> list[slice]:
    return [slice(begin, begin + BLOCK) for begin in range(0, sae.num_latents, BLOCK)]


def _add(
    sae: Weights, recon: Tensor, rows: slice | Tensor, acts: Tensor, impl: str = "auto"
) -> Tensor:
    """recon with what some latents stand for; silent ones cost nothing."""
    if sae.decoder_norm:
        acts = acts / sae.decoder_norms.clamp_min(TINY)[rows]
    return ops.add_directions(recon, sae.W_dec[rows], acts, impl=impl)


def _unit(rows: Tensor) -> Tensor:
    """Rows divided by their norms, fp32; a row of zeros stays one."""
    return rows.float() / row_norms(rows).clamp_min(TINY)[:, None]
