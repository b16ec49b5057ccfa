"""One sparse autoencoder in memory: its weights, its k, and the hookpoint it reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What hidden states and weights may be stored in; sums are always fp32."""


@dataclass(frozen=True, eq=False, repr=False)
class SAE:
    """A top-k sparse autoencoder with N latents on a stream of width d.

        p_j   = W_enc[j]·(x - b_dec) + bias_j
        a_j   = p_j where p_j > 0 and j is among the k largest p, else 0
        recon = b_dec + sum_j a_j W_dec[j]

    Weights are fp32, bf16 or fp16, in any mix, and on one device. They are shared with the caller,
    made contiguous where they are not. Raises TypeError or ValueError, naming the argument, for a
    wrong type, dtype, shape, device or k, and for NaN or infinity.
    """

    W_enc: Tensor
    """[N, d], a row a latent."""
    bias: Tensor
    """[N], the encoder's own bias; the ops take `b_enc`."""
    W_dec: Tensor
    """[N, d], a row a latent."""
    b_dec: Tensor
    """[d], taken off x before encoding, added back by decoding."""
    k: int
    """Largest number of live latents a token."""
    hookpoint: str | None = None
    """Where in a model x comes from, e.g. "layers.6": the output of decoder layer 6."""
    config: Mapping[str, object] = field(default_factory=dict)
    """Settings of the file that change no activation; saving writes them back."""

    def __post_init__(self):
        shapes = self._shapes()
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            _check(name, tensor, shape, self.W_enc.device)
            object.__setattr__(self, name, tensor.detach().contiguous())
        if isinstance(self.k, bool) or not isinstance(self.k, Integral):
            raise TypeError(f"k: got {self.k!r}, an integer is needed")
        if not 1 <= self.k <= self.num_latents:
            raise ValueError(f"k: got {self.k}, accepted are 1 to {self.num_latents} (the latents)")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        if not isinstance(self.W_enc, Tensor):
            raise TypeError(f"W_enc: got {type(self.W_enc).__name__}, a tensor is needed")
        if self.W_enc.ndim != 2 or self.W_enc.numel() == 0:
            raise ValueError(f"W_enc: got shape {tuple(self.W_enc.shape)}, [N, d] is needed")
        N, d = self.W_enc.shape
        return {"W_enc": (N, d), "bias": (N,), "W_dec": (N, d), "b_dec": (d,)}

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
    def b_enc(self) -> Tensor:
        """[N] fp32: bias - W_enc b_dec, so that p = W_enc x + b_enc."""
        with torch.inference_mode(False), torch.no_grad():
            b_enc, b_dec = self.bias.float().clone(), self.b_dec.float()
            # A few rows at a time: half-precision weights are widened to fp32 on the way.
            for part, rows in zip(b_enc.split(256), self.W_enc.split(256), strict=True):
                part -= rows.float() @ b_dec
            return b_enc

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SAE:
        """This SAE on another device, or rounded to another dtype (which is another SAE)."""
        moved = {name: getattr(self, name).to(device, dtype) for name in self._shapes()}
        return replace(self, **moved)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SAE:
        """Read the SAE in folder `path`; the files tell the format (sparsify's, for now).

        hookpoint is the folder's name if it reads like one (`layers.6`). Weights stay in the
        file's dtype, on the CPU, and share nothing with the file. Raises FileNotFoundError for
        what is missing, and ValueError for a file that is broken, that a top-k SAE cannot be made
        of, or that could run code.
        """
        from . import formats

        return formats.load(Path(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write folder `path` in sparsify's format, which `load` reads back bit for bit.

        Both files are complete on disk before either takes its place, so that a save that fails
        leaves what was there.
        """
        from . import formats

        formats.save(self, Path(path))

    def __repr__(self) -> str:
        return (
            f"SAE({self.num_latents} latents, d={self.d}, k={self.k}, "
            f"hookpoint={self.hookpoint!r}, {self.W_enc.dtype}, {self.device})"
        )


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, a tensor is needed")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: got {tensor.dtype}, accepted are {', '.join(map(str, DTYPES))}")
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
