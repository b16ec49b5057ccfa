"""The two workloads that every suite runs on: activations as a trained top-k SAE meets them, and
the worst case.

planted   A token is a sum of 64 decoder rows, drawn by a Zipf law, plus noise; encoder rows lie
          near decoder rows, and one bias leaves 4.2 k latents above zero a token. The edited
          latents are those whose shares over the stream come nearest to what a top-k SAE trained on
          a transformer's residual stream showed: 2.2 % of its (token, latent) pairs were above
          zero, 0.49 % live. In a dictionary of 24,576 with k = 32 the mean latent is live for at
          most 0.13 % of the tokens, so these are among the busier ones.
worst     The same tokens with every edited latent pushed among the k largest: each one needs the
          whole scan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer_fast import reference

UNDECIDED, LIVE = 0.022, 0.0049
ABOVE_ZERO = 4.2
"""Latents above zero a token, in units of k: the SAE of the two shares had UNDECIDED N / k."""
ACTIVE, ZIPF, NOISE = 64, 0.8, 0.33
VALUE = 12.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Model width, latents, live latents; tokens of the planted stream and of the worst one."""

    d: int
    N: int
    k: int
    stream: int = 2048
    worst: int = 512


FULL = Shape(d=3072, N=24576, k=32)
"""Phi-3 Mini's width and the dictionary of eight times that."""


@dataclass(frozen=True)
class Workload:
    """Tokens and the SAE that they meet; every tensor but b_enc, features, values in one dtype."""

    name: str
    x: Tensor  # [tokens, d]
    W_enc: Tensor  # [N, d]
    b_enc: Tensor  # [N] fp32
    W_dec: Tensor  # [N, d]
    b_dec: Tensor  # [d]
    features: Tensor  # [F] int64
    k: int

    @cached_property
    def values(self) -> Tensor:
        """What each latent is set to: [F] fp32."""
        return torch.full(self.features.shape, VALUE, device=self.x.device)

    @cached_property
    def directions(self) -> Tensor:
        """The features' rows of W_dec: [F, d]."""
        return self.W_dec[self.features]

    @cached_property
    def preacts(self) -> Tensor:
        """The features' pre-activations in fp64: [tokens, F]."""
        return reference.preacts(self.x, self.W_enc[self.features], self.b_enc[self.features])

    @cached_property
    def slack(self) -> Tensor:
        """How far fp32 sums of d + 1 terms, in any order, may end from `preacts`: [tokens, F]."""
        n, u = self.x.shape[-1] + 2, 2.0**-24
        W, b = self.W_enc[self.features], self.b_enc[self.features]
        return n * u / (1 - n * u) * reference.preacts(self.x.abs(), W.abs(), b.abs())

    @cached_property
    def truth(self) -> Tensor:
        """The features' activations in fp64: [tokens, F]."""
        return self._where_open(reference.feature_acts, dtype=torch.float64)

    @cached_property
    def close(self) -> Tensor:
        """Where fp32 sums may decide either way: [tokens, F] bool."""
        return self._where_open(reference.undecided) > 0

    def _where_open(self, measure: Callable[..., Tensor], **options) -> Tensor:
        """`measure` for the tokens with a feature above zero, or near it; 0 for the others."""
        rows = (self.preacts > -self.slack).any(-1).nonzero().squeeze(-1)
        measured = torch.zeros_like(self.preacts)
        for at in rows.split(512):
            found = measure(self.x[at], self.W_enc, self.b_enc, self.features, self.k, **options)
            measured[at] = found.double()
        return measured

    @cached_property
    def scanned(self) -> Tensor:
        """The share of W_enc that each token's scan takes before every feature is decided."""
        scanned = torch.zeros(len(self.x), device=self.x.device)
        rows = (self.preacts > 0).any(-1).nonzero().squeeze(-1)
        for at in rows.split(512):
            p = reference.preacts(self.x[at], self.W_enc, self.b_enc, torch.float32)
            for f in self.features:
                p_f = p[:, f, None]
                beaten = (p > p_f).cumsum(-1)
                share = (beaten < self.k).sum(-1).add(1).clamp(max=p.shape[-1]) / p.shape[-1]
                share[p_f[:, 0] <= 0] = 0
                scanned[at] = torch.maximum(scanned[at], share)
        return scanned

    def first(self, features: int) -> Workload:
        """The same workload with only its first few edited latents."""
        part = replace(self, features=self.features[:features])
        for name in ("preacts", "slack", "truth", "close"):
            part.__dict__[name] = getattr(self, name)[:, :features]
        return part

    def batches(self, tokens: int) -> list[Tensor]:
        """The stream in calls of so many tokens."""
        return list(self.x[: len(self.x) // tokens * tokens].split(tokens))

    def settled(self, tokens: int) -> list[Tensor]:
        """Calls of so many tokens that all end at L0."""
        rows = self.x[(self.preacts <= 0).all(-1)]
        return list(rows[: len(rows) // tokens * tokens].split(tokens))

    def shares(self, tokens: int) -> dict[str, float]:
        """Of all (token, latent) pairs, those `undecided` at L0 and those `live`; of an encoder
        pass, the multiplications that are needed (`work`) and the rows of W_enc that one call of
        so many tokens reads (`read`)."""
        calls = self.scanned[: len(self.x) // tokens * tokens].view(-1, tokens)
        return {
            "undecided": (self.preacts > 0).double().mean().item(),
            "live": (self.truth > 0).double().mean().item(),
            "work": calls.double().mean().item(),
            "read": calls.amax(-1).double().mean().item(),
        }


def build(
    dtype: str,
    features: int,
    shape: Shape | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Workload]:
    """The planted and the worst workload, with so many edited latents."""
    shape = shape or FULL
    d, N, k = shape.d, shape.N, shape.k
    random = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(N, d, generator=random)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    W_enc = torch.randn(N, d, generator=random).mul_(0.5 * d**-0.5).add_(W_dec)
    x = _tokens(W_dec, shape.stream, random)
    b_dec = 0.1 * torch.randn(d, generator=random)
    x, W_enc, W_dec, b_dec = (t.to(device, DTYPES[dtype]) for t in (x, W_enc, W_dec, b_dec))

    p = F.linear(x, W_enc)
    sample = p[: shape.stream // 8].flatten()
    above = int(ABOVE_ZERO * k * shape.stream // 8)
    b_enc = sample.topk(above).values[-1].neg().float().repeat(N)
    chosen = _nearest(p, -b_enc[0], k)[:features]

    planted = Workload("planted", x, W_enc, b_enc, W_dec, b_dec, chosen, k)
    push = p.max().float() * planted.directions.float().sum(0)
    pushed = x[: shape.worst].float() + push
    return [planted, replace(planted, name="worst", x=pushed.to(x.dtype))]


def _tokens(W_dec: Tensor, count: int, random: torch.Generator) -> Tensor:
    N, d = W_dec.shape
    popularity = torch.arange(1, N + 1).double() ** -ZIPF
    latents = popularity[torch.randperm(N, generator=random)].multinomial(
        count * ACTIVE, replacement=True, generator=random
    )
    coefficients = torch.empty(count * ACTIVE).exponential_(generator=random) + 1
    x = F.embedding_bag(
        latents.view(count, ACTIVE),
        W_dec,
        per_sample_weights=coefficients.view(count, ACTIVE),
        mode="sum",
    )
    size = x.norm(dim=-1).mean() * d**-0.5
    return x + NOISE * size * torch.randn(count, d, generator=random)


def _nearest(p: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Latents by how near their shares are to UNDECIDED and LIVE."""
    above = p > threshold
    live = above & (p >= p.topk(k).values[:, -1:])
    miss = [
        (mask.float().mean(0) / share).log().abs()
        for mask, share in ((above, UNDECIDED), (live, LIVE))
    ]
    return sum(miss).argsort(stable=True)
