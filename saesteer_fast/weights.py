"""What one SAE is: its weights and settings, checked, and what is made of the weights once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from .errors import one_of
from .numbers import is_integer, is_number, require_float

Measure = Literal["topk", "groupmax", "threshold", "relu", "gated"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
"""Ways in which an SAE makes activations of pre-activations."""

_LITERATURE = {"jumprelu": "threshold", "batchtopk": "threshold", "standard": "relu"}
"""Other names of MEASURES: not accepted, but hinted from."""

Normalize = Literal["none", "layer_norm", "constant_norm"]
NORMALIZE: tuple[Normalize, ...] = get_args(Normalize)
"""What is done to a token before it is encoded, and undone after decoding."""


@dataclass(frozen=True, eq=False, repr=False)
class Weights:
    """The fields of an SAE, as formats/ reads and writes them and measures.py computes with them.

    What they mean, and which errors they raise, is said by `SAE`.
    """

    W_enc: Tensor
    """[N, d], a row a latent."""
    b_enc: Tensor
    """[N], the encoder's own bias, the gate's where there is one; the ops take `b_enc_folded`."""
    W_dec: Tensor
    """[N, d], a row a latent."""
    b_dec: Tensor
    """[d], taken off z before encoding if subtract_b_dec, added back by decoding."""
    k: int | None = None
    """Largest number of live latents a token, for topk and groupmax."""
    measure: Measure = "topk"
    """One of MEASURES."""
    threshold: Tensor | None = None
    """[N], for threshold."""
    r_mag: Tensor | None = None
    """[N], for gated: logarithm of the magnitude's gain."""
    b_mag: Tensor | None = None
    """[N], for gated: bias of the magnitude."""
    subtract_b_dec: bool = True
    """Whether b_dec is taken off z before encoding."""
    decoder_norm: bool = False
    """Whether pre-activations are multiplied by the norms of W_dec's rows, and these have none."""
    normalize: Normalize = "none"
    """One of NORMALIZE."""
    scale: float = 1.0
    """What every token is multiplied by before it is encoded, positive."""
    hookpoint: str | None = None
    """Where in a model x comes from, e.g. "layers.6": the output of decoder layer 6."""
    order: Tensor | None = None
    """[N] int64, for topk: the latents in the order in which they are counted, those that are live
    most often first, as `calibrate` finds it. Saves time, changes no activation; costs a second
    W_enc, in this order, once the SAE is steered with."""
    config: Mapping[str, object] = field(default_factory=dict)
    """Settings of the file that change no activation; saving in its format writes them back."""

    def __post_init__(self):
        _one_of("measure", self.measure, MEASURES)
        shapes = self._shapes()
        self._check_settings()
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            _check(name, tensor, shape, self.W_enc.device)
            object.__setattr__(self, name, tensor.detach().contiguous())
        if self.k is not None:
            self._check_k()
        if self.order is not None:
            self._check_order()

    def require_unwritten(self) -> None:
        """Raises RuntimeError if a weight was written to since this SAE was first used."""
        current = self._current_versions()
        known = vars(self).setdefault("_versions", current)
        if current != known:
            written = [name for name in current if current[name] != known[name]]
            raise RuntimeError(
                f"sae: {', '.join(written)} was written to since the SAE was first used, and what "
                "was made of it is kept; make another of the new weights: dataclasses.replace(sae)"
            )

    def _current_versions(self) -> dict[str, int]:
        """PyTorch's counts of what was written to the weights; it keeps none in inference mode."""
        held = {name: vars(self)[name] for name in (*_SHARED, *_OWN[self.measure], "order")}
        tensors = {name: held[name] for name in held if isinstance(held[name], Tensor)}
        return {name: t._version for name, t in tensors.items() if not t.is_inference()}

    def __getstate__(self) -> dict:
        """Without what is made of the weights: a copy's tensors count from 0 again."""
        return {name: vars(self)[name] for name in self.__dataclass_fields__}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        if not isinstance(self.W_enc, Tensor):
            raise TypeError(f"W_enc: got {type(self.W_enc).__name__}, a tensor is needed")
        if self.W_enc.ndim != 2 or self.W_enc.numel() == 0:
            raise ValueError(f"W_enc: got shape {tuple(self.W_enc.shape)}, [N, d] is needed")
        N, d = self.W_enc.shape
        if N != d and self._fits_transposed():
            raise ValueError(
                f"W_enc: got shape {(N, d)}, [N, d] is needed, a latent a row; it seems transposed"
            )
        own = {name: (N,) for name in _OWN[self.measure] if name != "k"}
        return {"W_enc": (N, d), "b_enc": (N,), "W_dec": (N, d), "b_dec": (d,)} | own

    def _fits_transposed(self) -> bool:
        """Whether most of the other weights would go with a transposed W_enc."""
        N, d = self.W_enc.shape
        turned = {"b_enc": (d,), "W_dec": (d, N), "b_dec": (N,)}
        fits = [getattr(getattr(self, name), "shape", None) == turned[name] for name in turned]
        return sum(fits) > 1

    def _check_settings(self) -> None:
        _one_of("normalize", self.normalize, NORMALIZE)
        if self.hookpoint is not None and not isinstance(self.hookpoint, str):
            raise TypeError(
                f"hookpoint: got {self.hookpoint!r}, a name is needed: 'layers.6' is the output of "
                "decoder layer 6"
            )
        for name in ("k", "threshold", "r_mag", "b_mag"):
            given, needed = getattr(self, name) is not None, name in _OWN[self.measure]
            if given != needed:
                what = "needs it" if needed else "does not use it"
                raise ValueError(f"{name}: measure {self.measure!r} {what}")
        for name in ("subtract_b_dec", "decoder_norm"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, True or False is needed")
        if self.normalize == "layer_norm" and self.W_enc.shape[-1] == 1:
            raise ValueError("normalize: 'layer_norm' needs a stream of width 2 at least")
        if self.decoder_norm and self.measure == "gated":
            raise ValueError("decoder_norm: measure 'gated' does not use it")
        if not is_number(self.scale):
            raise TypeError(f"scale: got {self.scale!r}, a number is needed")
        if not (isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale: got {self.scale}, a positive number is needed")
        object.__setattr__(self, "scale", float(self.scale))

    def _check_k(self) -> None:
        if not is_integer(self.k):
            raise TypeError(f"k: got {self.k!r}, an integer is needed")
        if not 1 <= self.k <= self.num_latents:
            raise ValueError(f"k: got {self.k}, accepted are 1 to {self.num_latents} (the latents)")
        if self.measure == "groupmax" and self.num_latents % self.k:
            raise ValueError(
                f"k: got {self.k} groups, which do not divide {self.num_latents} latents"
            )
        object.__setattr__(self, "k", int(self.k))

    def _check_order(self) -> None:
        if self.measure != "topk":
            raise ValueError(f"order: measure {self.measure!r} does not use it, only 'topk' does")
        if not isinstance(self.order, Tensor):
            raise TypeError(f"order: got {type(self.order).__name__}, a tensor is needed")
        if self.order.dtype != torch.int64:
            raise TypeError(f"order: got {self.order.dtype}, accepted is torch.int64")
        N = self.num_latents
        if self.order.shape != (N,):
            raise ValueError(f"order: got shape {tuple(self.order.shape)}, {(N,)} is needed")
        if self.order.device != self.device:
            raise ValueError(f"order: is on {self.order.device}, W_enc on {self.device}")
        wrong = (self.order.sort().values != torch.arange(N, device=self.device)).nonzero()
        if len(wrong):
            raise ValueError(f"order: does not name each of the latents 0 to {N - 1} once")
        object.__setattr__(self, "order", self.order.contiguous())

    @property
    def num_latents(self) -> int:
        """N."""
        return self.W_enc.shape[0]

    @property
    def d(self) -> int:
        """Width of the stream."""
        return self.W_enc.shape[1]

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    @cached_property
    def b_enc_folded(self) -> Tensor:
        """[N] fp32: b_enc, less W_enc b_dec if subtract_b_dec; what the ops take as b_enc.

        p_j = s_j (W_enc[j]·z + b_enc_folded_j), with the z that nothing is taken off.
        """
        self.require_unwritten()
        with constants():
            if not self.subtract_b_dec:
                return self.b_enc.float()
            folded, b_dec = self.b_enc.double(), self.b_dec.double()
            # fp64: products of fp32 may become tf32. A few rows at a time, for they are copied.
            for part, rows in zip(folded.split(256), self.W_enc.split(256), strict=True):
                part -= (rows * b_dec).sum(-1)
            return folded.float()

    @cached_property
    def decoder_norms(self) -> Tensor:
        """[N] fp32: the norms of the rows of W_dec."""
        self.require_unwritten()
        with constants():
            return row_norms(self.W_dec)

    @cached_property
    def encoder(self) -> tuple[Tensor, Tensor]:
        """W [N, d] and b [N] fp32 such that p = W z + b; W is fp32 where s_j is part of it."""
        return self.encoder_rows(slice(None))

    def encoder_rows(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """These rows of `encoder`."""
        W_enc, b_enc = self.W_enc[rows], self.b_enc_folded[rows]
        if not self.decoder_norm:
            return W_enc, b_enc
        with constants():
            norms = self.decoder_norms[rows]
            return W_enc * norms[:, None], b_enc * norms

    @cached_property
    def ranking(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """`encoder` with its rows in `order`, and the order: what ops.steer counts latents in."""
        if self.order is None:
            return *self.encoder, None
        with constants():
            return *self.encoder_rows(self.order), self.order

    @cached_property
    def places(self) -> Tensor:
        """[N] int64: the row that each latent has in `ranking`, where there is an `order`."""
        with constants():
            return self.order.argsort()


Made = TypeVar("Made", bound=Weights)
"""What is made of an SAE's fields."""


def constants() -> AbstractContextManager:
    """What is made of weights inside is fit for autograd, whatever goes on outside."""
    # To leave what is not on costs as much as an op.
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def row_norms(rows: Tensor) -> Tensor:
    """[N] fp32."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)


_SHARED = ("W_enc", "b_enc", "W_dec", "b_dec")
"""What every measure needs."""

_OWN = {
    "topk": ("k",),
    "groupmax": ("k",),
    "threshold": ("threshold",),
    "relu": (),
    "gated": ("r_mag", "b_mag"),
}
"""What a measure needs of its own."""


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    plain = re.sub(r"[\W_]", "", str(value)).lower()
    one_of(name, value, choices, like=_LITERATURE.get(plain, plain))


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, a tensor is needed")
    require_float(name, tensor.dtype)
    if tensor.shape != shape:
        turned = len(shape) == 2 and tensor.shape == shape[::-1]
        hint = "; it looks transposed" if turned else ""
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, {shape} is needed{hint}")
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device}, W_enc on {device}")
    if tensor.is_meta:
        raise ValueError(f"{name}: is on meta, where there are no numbers; load the weights first")
    # The extremes are NaN or infinite if anything is, and need no copy of the weights.
    if not all(extreme.isfinite() for extreme in torch.aminmax(tensor.detach())):
        row = (~tensor.isfinite()).nonzero()[0, 0].item()
        raise ValueError(f"{name}: NaN or infinity in row {row}; every weight must be finite")
