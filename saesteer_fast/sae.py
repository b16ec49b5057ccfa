"""One sparse autoencoder in memory: its weights, its measure, and the hookpoint it reads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite
from typing import Literal, get_args

import torch
from torch import Tensor

from .dtypes import FLOATS, TINY
from .errors import is_integer, is_number, one_of

Measure = Literal["topk", "groupmax", "threshold", "relu", "gated"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
"""Ways in which an SAE makes activations of pre-activations."""

_LITERATURE = {"jumprelu": "threshold", "batchtopk": "threshold", "standard": "relu"}
"""Other names of MEASURES: not accepted, but hinted from."""

Normalize = Literal["none", "layer_norm", "constant_norm"]
NORMALIZE: tuple[Normalize, ...] = get_args(Normalize)
"""What is done to a token before it is encoded, and undone after decoding."""


@dataclass(frozen=True, eq=False, repr=False)
class SAE:
    """A sparse autoencoder with N latents on a stream of width d.

        z     = scale n(x)                              n as `normalize` says
        p_j   = s_j (W_enc[j]·(z - b_dec) + b_enc_j)    b_dec only if subtract_b_dec
        a_j   = f_j(p)                                  f as `measure` says
        recon = n⁻¹((b_dec + sum_j a_j W_dec[j] / s_j) / scale)

    s_j is the norm of W_dec[j] if decoder_norm, else 1. Normalisations, mean, std and norm over
    the d numbers of one token, std unbiased:

        none            n(x) = x
        layer_norm      n(x) = (x - mean) / (std + 1e-5)    n⁻¹(y) = y std + mean
        constant_norm   n(x) = x sqrt(d) / norm             n⁻¹(y) = y norm / sqrt(d)

    Measures:

        topk        p_j where p_j > 0 and j is among the k largest p, else 0
        groupmax    p_j where p_j > 0 and j is the largest of its group, else 0;
                    group g holds latents g N/k to (g + 1) N/k - 1
        threshold   p_j where p_j > max(threshold_j, 0), else 0 (JumpReLU, BatchTopK)
        relu        max(p_j, 0)
        gated       max(exp(r_mag_j) (p_j - b_enc_j) + b_mag_j, 0) where p_j > 0, else 0

    Of equal p the lower index is the larger. Weights are fp32, bf16 or fp16, in any mix, and on one
    device. They are shared with the caller, made contiguous where they are not, and must not be
    written to once the SAE is used: what is made of them is kept. Steering or encoding then raises
    RuntimeError; what steered before does not notice. Raises TypeError or ValueError, naming the
    argument, for a wrong type, dtype, shape, device or k, for an argument that the measure lacks or
    does not use, and for NaN or infinity.
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
        self._check_kind()
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

    def _check_kind(self) -> None:
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
        with constants(self.device):
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
        with constants(self.device):
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
        with constants(self.device):
            norms = self.decoder_norms[rows]
            return W_enc * norms[:, None], b_enc * norms

    @cached_property
    def ranking(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """`encoder` with its rows in `order`, and the order: what ops.steer counts latents in."""
        if self.order is None:
            return *self.encoder, None
        with constants(self.device):
            return *self.encoder_rows(self.order), self.order

    @cached_property
    def places(self) -> Tensor:
        """[N] int64: the row that each latent has in `ranking`, where there is an `order`."""
        with constants(self.device):
            return self.order.argsort()

    def calibrate(self, x: Tensor | Iterable[Tensor]) -> SAE:
        """This SAE with the `order` in which latents are live most often on x.

        x [..., d] fp32, bf16 or fp16 is a sample of the stream that will be steered, on any device,
        or several such; some ten thousand tokens are plenty. Steering with the SAE returned reads
        less of W_enc before it knows that a latent is not among the k largest, and gives the same
        result; ties still go to the lower latent. For topk. Raises ValueError for another measure,
        and where x holds no token or has another width.
        """
        from . import measures

        return replace(self, order=measures.hot_first(self, x))

    def encode(self, x: Tensor) -> Tensor:
        """All activations of x [..., d], dense: [..., N] fp32. Differentiable."""
        from . import measures

        self.require_unwritten()
        return measures.encode(self, x)

    def decode(self, acts: Tensor, x: Tensor | None = None) -> Tensor:
        """recon of dense activations [..., N]: [..., d] fp32. Differentiable.

        x [..., d], from which they were encoded, is needed to undo a normalisation.
        """
        from . import measures

        self.require_unwritten()
        return measures.decode(self, acts, x)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SAE:
        """This SAE on another device, or rounded to another dtype (which is another SAE)."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"device: got {device}, a device is needed; dtype={device} rounds")
        moved = {name: getattr(self, name).to(device, dtype) for name in self._shapes()}
        order = None if self.order is None else self.order.to(device)
        return replace(self, **moved, order=order)

    def fold(self) -> SAE:
        """The same SAE with scale and decoder norms multiplied into the weights, rounded once.

        Activations keep their units. For formats that have no place for either.
        """
        with constants(self.device):
            inner = self.decoder_norms if self.decoder_norm else self.b_enc.new_ones(1).float()
            outer = (inner.clamp_min(TINY) * self.scale)[:, None]
            b_enc = self.b_enc * inner
            return replace(
                self,
                W_enc=(self.W_enc * (inner * self.scale)[:, None]).to(self.W_enc.dtype),
                b_enc=b_enc.to(self.b_enc.dtype),
                W_dec=(self.W_dec / outer).to(self.W_dec.dtype),
                b_dec=(self.b_dec / self.scale).to(self.b_dec.dtype),
                decoder_norm=False,
                scale=1.0,
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SAE:
        """Read an SAE; its files tell the format, and the format tells what lies transposed.

        `path` is a folder, or a file where a format keeps all in one, or a repository on the
        Hugging Face Hub: "org/name", or "org/name/folder/in/it". Formats: sparsify, SAELens,
        dictionary_learning, Gemma Scope 1 and 2, Llama Scope, Qwen Scope, OpenAI's.

        hookpoint is set where the files, or the folder's name (`layers.6`), tell it. Weights stay
        in the file's dtype, on the CPU, and share nothing with the file. Nothing in a file is
        executed. Raises FileNotFoundError for what is missing, and ValueError for a file that is
        broken, or that holds what cannot be measured exactly (transcoders, for one).
        """
        from . import formats

        return formats.load(path)

    def save(self, path: str | os.PathLike[str], format: str = "sparsify") -> None:
        """Write folder `path` in `format`, "sparsify" or "saelens", for `load` and for these.

        Every weight is read back bit for bit; `order` gets a file of its own beside the format's,
        saesteer_order.safetensors, which other libraries leave alone. All files are complete on
        disk before any takes its place, so that a save that fails leaves what was there. Raises
        ValueError, naming the argument, for an SAE that the format cannot express, and for a folder
        that holds an SAE of another format, or is named for another hookpoint.
        """
        from . import formats

        formats.save(self, path, format)

    @property
    def kind(self) -> str:
        """Its measure in words: "topk, k=32"."""
        return self.measure if self.k is None else f"{self.measure}, k={self.k}"

    def __repr__(self) -> str:
        return (
            f"SAE({self.num_latents} latents, d={self.d}, {self.kind}, "
            f"hookpoint={self.hookpoint!r}, {self.W_enc.dtype}, {self.device})"
        )


def constants(device: torch.device) -> AbstractContextManager:
    """What is made of weights inside is fp32 and fit for autograd, whatever goes on outside."""
    # To leave what is not on costs as much as an op.
    on = torch.is_inference_mode_enabled() or torch.is_autocast_enabled(device.type)
    return _outside(device) if on else nullcontext()


@contextmanager
def _outside(device: torch.device) -> Iterator[None]:
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


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
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: got {tensor.dtype}, accepted are {', '.join(map(str, FLOATS))}")
    if tensor.shape != shape:
        turned = len(shape) == 2 and tensor.shape == shape[::-1]
        hint = "; it looks transposed" if turned else ""
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, {shape} is needed{hint}")
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device}, W_enc on {device}")
    # The extremes are NaN or infinite if anything is, and need no copy of the weights.
    if not all(extreme.isfinite() for extreme in torch.aminmax(tensor.detach())):
        row = (~tensor.isfinite()).nonzero()[0, 0].item()
        raise ValueError(f"{name}: NaN or infinity in row {row}; every weight must be finite")
