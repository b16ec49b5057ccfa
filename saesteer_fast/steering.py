"""What to do to the latents of one SAE, checked, as the tensors that the op takes."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real

import torch
from torch import Tensor

from . import ops
from .sae import DTYPES, SAE


def steer(
    x: Tensor,
    sae: SAE,
    edits: Mapping[int, float],
    *,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Set latents of `sae` to constants in x, keeping what the SAE cannot express.

        x' = x + sum over {f: c} in edits of (c - a_f(x)) W_dec[f]

    x [..., d] fp32, bf16 or fp16, on the SAE's device; mask, if any, bool [...] = x.shape[:-1]:
    tokens where it is False come out bit-identical, as all do where `edits` is empty. Constants are
    in units of the activation; 0 ablates, negative ones are allowed. Sums are fp32, and x' is
    rounded once to x's dtype. Raises TypeError or ValueError, naming the argument.

    Equivalent to `decode(a') + (x - decode(a))`, a' being a with a'_f = c (O'Brien et al. 2024,
    arXiv 2411.11296).
    """
    require_sae(sae)
    return Clamp(sae, edits, sae.device)(x, mask, impl)


class Clamp:
    """Latents of one SAE held at constants: all that is needed of the SAE, on one device.

    Call it with x [..., d], and a mask if any, for x' [..., d]; see `steer`. The latents stay what
    they are; `set` changes their constants in place.
    """

    def __init__(self, sae: SAE, edits: Mapping[int, float], device: torch.device):
        # In order of latent: sums, and so results, do not depend on the order of the mapping.
        edits = dict(sorted(_checked(edits, sae.num_latents).items()))
        self.latents = list(edits)
        self.d, self.k = sae.d, sae.k
        with torch.inference_mode(False):
            features = torch.tensor(self.latents, dtype=torch.int64, device=sae.device)
            self.directions = sae.W_dec[features].to(device)
            self.features = features.to(device)
            self.W_enc, self.b_enc = sae.W_enc.to(device), sae.b_enc.to(device)
            self.values = torch.tensor(list(edits.values()), dtype=torch.float32, device=device)

    def __call__(self, x: Tensor, mask: Tensor | None = None, impl: str = "auto") -> Tensor:
        self._check(x, mask)
        return ops.steer(
            x,
            self.W_enc,
            self.b_enc,
            self.directions,
            self.features,
            self.values,
            self.k,
            mask=mask,
            impl=impl,
        )

    @property
    def edits(self) -> dict[int, float]:
        """What is held at what, now."""
        return dict(zip(self.latents, self.values.tolist(), strict=True))

    def set(self, edits: Mapping[int, float]) -> None:
        """Change constants of latents that are held already; the others stay as they are."""
        edits = _checked(edits)
        for latent in edits.keys() - set(self.latents):
            raise ValueError(f"edits: latent {latent} is not held; held are {self.latents}")
        places = [self.latents.index(latent) for latent in edits]
        device = self.values.device
        values = torch.tensor(list(edits.values()), dtype=torch.float32, device=device)
        self.values.index_copy_(0, torch.tensor(places, dtype=torch.int64, device=device), values)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: got {type(x).__name__}, a tensor is needed")
        if x.dtype not in DTYPES:
            raise TypeError(f"x: got {x.dtype}, accepted are {', '.join(map(str, DTYPES))}")
        if x.ndim == 0 or x.shape[-1] != self.d:
            raise ValueError(f"x: got shape {tuple(x.shape)}, the SAE is for [..., {self.d}]")
        if x.device != self.values.device:
            raise ValueError(f"x: is on {x.device}, the SAE's weights on {self.values.device}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            raise ValueError(
                f"mask: got {mask.dtype} {tuple(mask.shape)}, bool {tuple(x.shape[:-1])} is needed"
            )


def require_sae(sae: SAE) -> None:
    if not isinstance(sae, SAE):
        raise TypeError(f"sae: got {type(sae).__name__}, an SAE is needed; SAE.load reads one")


def _checked(edits: Mapping[int, float], num_latents: int | None = None) -> dict[int, float]:
    if not isinstance(edits, Mapping):
        raise TypeError(
            f"edits: got {type(edits).__name__}, a mapping {{latent: value}} is needed; it cannot "
            "name a latent twice"
        )
    checked = {}
    for latent, value in edits.items():
        if isinstance(latent, bool) or not isinstance(latent, Integral):
            raise TypeError(f"edits: latent {latent!r} is no integer")
        if num_latents is not None and not 0 <= latent < num_latents:
            raise ValueError(f"edits: latent {latent} is not among 0 to {num_latents - 1}")
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"edits: latent {latent} is given {value!r}, a number is needed")
        # The op keeps constants in fp32.
        if not abs(value) <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"edits: latent {latent} is given {value}, which is not finite in fp32"
            )
        checked[int(latent)] = float(value)
    return checked
