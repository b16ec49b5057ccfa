"""The workloads that every suite runs on: activations as a trained top-k SAE meets them, the worst
case, and the miniature's own.

planted   A token is a sum of 64 decoder rows, drawn by a Zipf law, plus noise; encoder rows lie
          near decoder rows, and one bias leaves 4.2 k latents above zero a token. The edited
          latents are those whose shares over the stream come nearest to what a top-k SAE trained on
          a transformer's residual stream showed: 2.2 % of its (token, latent) pairs were above
          zero, 0.49 % live. In a dictionary of 24,576 with k = 32 the mean latent is live for at
          most 0.13 % of the tokens, so these are among the busier ones.
worst     The same tokens with every edited latent pushed among the k largest: each one needs the
          whole scan.
real      The residual stream of the shipped miniature over its held-out prompts, with its own SAE
          and its refusal latent: small, but nothing in it is made up.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer_fast import SAE, mini, reference
from saesteer_fast.eval import chat_text
from saesteer_fast.find import TRIED, capture
from saesteer_fast.mini import corpus

UNDECIDED, LIVE = 0.022, 0.0049
ABOVE_ZERO = 4.2
"""Latents above zero a token, in units of k: the SAE of the two shares had UNDECIDED N / k."""
ACTIVE, ZIPF, NOISE = 64, 0.8, 0.33
VALUE = 12.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SAMPLE = 4
"""Tokens to calibrate on, in units of the stream."""
ROWS = 4096
"""Latents taken at once, so that a dictionary of a million fits."""


@dataclass(frozen=True)
class Shape:
    """Model width, latents, live latents; tokens of the planted stream and of the worst one.

    By default Phi-3 Mini's width and a dictionary of eight times that.
    """

    d: int = 3072
    N: int = 24576
    k: int = 32
    stream: int = 2048
    worst: int = 512


FULL = Shape()
MINIATURE = Shape(d=128, N=1024, k=32)


class Ranks(NamedTuple):
    """What fp64 says of each (token, feature) pair: [tokens, F] each."""

    live: Tensor  # bool: above zero and among the k largest
    close: Tensor  # bool: fp32 sums may decide either way
    scanned: Tensor  # fp64: the share of W_enc that a scan takes before the pair is decided


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
    sample: Tensor | None = None  # [other tokens, d] of the same stream, to calibrate on
    value: float = VALUE
    order: Tensor | None = None  # [N] int64: the latent of each row of W_enc, unless by number

    @classmethod
    def of(cls, name: str, x: Tensor, sae: SAE, features: Tensor, **more) -> Workload:
        """Of these latents of an SAE, whose bias is taken folded."""
        weights = sae.W_enc, sae.b_enc_folded, sae.W_dec, sae.b_dec
        return cls(name, x, *weights, features, sae.k, **more)

    @cached_property
    def values(self) -> Tensor:
        """What each latent is set to: [F] fp32."""
        return torch.full(self.features.shape, self.value, device=self.x.device)

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
        W, b = self.W_enc[self.features], self.b_enc[self.features]
        return self._error(reference.preacts(self.x.abs(), W.abs(), b.abs()))

    def _error(self, size: Tensor) -> Tensor:
        n, u = self.x.shape[-1] + 2, 2.0**-24
        return n * u / (1 - n * u) * size

    @cached_property
    def ranks(self) -> Ranks:
        p_f, tau_f = self.preacts, self.slack
        pairs = (p_f > -tau_f).nonzero(as_tuple=True)
        beaten, sure, possible, counted = self._counts(*pairs)
        positive = p_f[pairs] > 0
        live = torch.zeros_like(p_f, dtype=torch.bool)
        live[pairs] = positive & (beaten < self.k)
        close = p_f.abs() <= tau_f
        close[pairs] |= (sure < self.k) & (possible >= self.k)
        scanned = torch.zeros_like(p_f)
        scanned[pairs] = (counted + 1).clamp(max=len(self.W_enc)).where(positive, 0).double()
        return Ranks(live, close, scanned / len(self.W_enc))

    def _counts(self, tokens: Tensor, which: Tensor) -> Tensor:
        """For pairs of a token and a feature: how many latents beat the feature, how many surely
        and possibly do in fp32, and how many are counted before k beat it: [4, pairs] int64."""
        p_f, tau_f = (t[tokens, which, None] for t in (self.preacts, self.slack))
        features = self.features[which, None]
        latent = torch.arange(len(self.W_enc)) if self.order is None else self.order
        latent = latent.to(tokens.device)
        counts = torch.zeros(4, len(tokens), dtype=torch.int64, device=tokens.device)
        for start in range(0, len(self.W_enc), ROWS):
            W, b = self.W_enc[start : start + ROWS].double(), self.b_enc[start : start + ROWS]
            sizes, j = W.abs().float(), torch.arange(start, start + len(W), device=tokens.device)
            for at in torch.arange(len(tokens), device=tokens.device).split(512):
                rows, back = tokens[at].unique(return_inverse=True)
                gap = reference.preacts(self.x[rows], W, b)[back] - p_f[at]
                size = F.linear(self.x[rows].abs().float(), sizes, b.abs().float())
                # fp32 errs by less than this in so many terms of one sign.
                tau = self._error(size.double() * (1 + 2 * self.x.shape[1] * 2.0**-24))[back]
                slack, f = tau_f[at] + tau, features[at]
                beats = ((gap > 0) | ((gap == 0) & (latent[j] < latent[f]))) & (j != f)
                before = counts[0, at, None] + beats.cumsum(-1)
                found = beats, (gap > slack) & (j != f), (gap >= -slack) & (j != f), before < self.k
                counts[:, at] += torch.stack([each.sum(-1) for each in found])
        return counts

    @cached_property
    def truth(self) -> Tensor:
        """The features' activations in fp64: [tokens, F]."""
        return self.preacts.where(self.ranks.live, 0)

    @property
    def close(self) -> Tensor:
        """Where fp32 sums may decide either way: [tokens, F] bool."""
        return self.ranks.close

    def first(self, features: int) -> Workload:
        """The same workload with only its first few edited latents."""
        part = replace(self, features=self.features[:features])
        for name in ("preacts", "slack"):
            part.__dict__[name] = getattr(self, name)[:, :features]
        part.__dict__["ranks"] = Ranks(*(each[:, :features] for each in self.ranks))
        return part

    @cached_property
    def hot_first(self) -> Workload:
        """The same workload, with the latents that are live most often in `sample` stored first."""
        sae = SAE(self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.k, subtract_b_dec=False)
        order = sae.calibrate(self.sample).order
        rows = {name: getattr(self, name)[order] for name in ("W_enc", "b_enc", "W_dec")}
        stored = replace(self, **rows, features=order.argsort()[self.features], order=order)
        for name in ("preacts", "slack", "directions"):
            stored.__dict__[name] = getattr(self, name)
        return stored

    def worst(self, tokens: int) -> Workload:
        """The first tokens with every edited latent pushed among the k largest."""
        x = self.x[:tokens]
        # Twice, because latents near a pushed one rise with it.
        push = 2 * _largest(x, self.W_enc, 1).float() * self.directions.float().sum(0)
        return replace(self, name="worst", x=(x.float() + push).to(x.dtype))

    def batches(self, tokens: int) -> list[Tensor]:
        """The stream in calls of so many tokens."""
        return _calls(self.x, tokens)

    def settled(self, tokens: int) -> list[Tensor]:
        """Calls of so many tokens that all end at L0."""
        return _calls(self.x[(self.preacts <= 0).all(-1)], tokens)

    def shares(self, tokens: int, calls: int | None = None) -> dict:
        """Of all (token, latent) pairs, those `undecided` at L0 and those `live`; of an encoder
        pass, the multiplications that are needed (`work`) and the rows of W_enc that one call of
        so many tokens reads (`read`). `spread`: the rows that each token needs, over `all` tokens
        and over those `undecided`. Of the first `calls` alone, where that is given."""
        scanned = torch.stack(_calls(self.ranks.scanned.amax(-1), tokens)[:calls])
        seen = slice(calls and calls * tokens)
        return {
            "undecided": (self.preacts[seen] > 0).double().mean().item(),
            "live": self.ranks.live[seen].double().mean().item(),
            "work": scanned.mean().item(),
            "read": scanned.amax(-1).mean().item(),
            "spread": {"all": _spread(scanned), "undecided": _spread(scanned[scanned > 0])},
        }


def _spread(shares: Tensor) -> dict[str, float]:
    """How many tokens these are, and the least that half, 99 % and all of them stay within."""
    if not shares.numel():
        return {"tokens": 0}
    ranks = shares.new_tensor([0.5, 0.99, 1])
    values = shares.quantile(ranks, interpolation="higher").tolist()
    return {"tokens": shares.numel(), **dict(zip(("median", "p99", "max"), values, strict=True))}


def _calls(rows: Tensor, tokens: int) -> list[Tensor]:
    """Rows by so many, without the rest; over and over if they are fewer than one call takes."""
    again = math.ceil(tokens / len(rows))
    rows = rows.repeat(again, *[1] * (rows.dim() - 1))
    return list(rows[: len(rows) // tokens * tokens].split(tokens))


def build(
    dtype: str,
    features: int,
    shape: Shape | None = None,
    device: torch.device | str = "cpu",
) -> list[Workload]:
    """The planted and the worst workload, with so many edited latents."""
    shape = shape or FULL
    d, N, k = shape.d, shape.N, shape.k
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = dictionary(N, d, DTYPES[dtype], generator)
    popularity = torch.arange(1, N + 1).double() ** -ZIPF
    popularity = popularity[torch.randperm(N, generator=generator)]
    x = _tokens(W_dec, popularity, shape.stream, generator)
    b_dec = 0.1 * torch.randn(d, generator=generator)
    sample = _tokens(W_dec, popularity, SAMPLE * shape.stream, generator)
    held = x, W_enc, W_dec, b_dec, sample
    x, W_enc, W_dec, b_dec, sample = (t.to(device, DTYPES[dtype]) for t in held)

    above = threshold(x[: shape.stream // 8], W_enc, k)
    b_enc = above.neg().float().repeat(N)
    chosen = nearest(x, W_enc, above, k)[:features]

    planted = Workload("planted", x, W_enc, b_enc, W_dec, b_dec, chosen, k, sample)
    return [planted, planted.worst(shape.worst)]


def on_stream(
    stream: Tensor, W_enc: Tensor, W_dec: Tensor, k: int, met_from: int = 0
) -> tuple[Workload, SAE, SAE]:
    """The planted workload on a model's own stream [tokens, d], its SAE, and one in which the
    edited latent is always live. That latent is above zero somewhere from token `met_from` on."""
    b_dec = stream.float().mean(0).to(stream.dtype)
    z = stream - b_dec
    above = threshold(z, W_enc, k)
    ranked = nearest(z, W_enc, above, k)
    met = (F.linear(z[met_from:], W_enc[ranked]) > above).any(0)
    features = ranked[met][:1]
    bias = above.neg().float().repeat(len(W_enc))
    sae = SAE(W_enc, bias, W_dec, b_dec, k)
    most = F.linear(z, W_enc).abs().amax().float()
    always = bias.index_add(0, features, 4 * most[None])
    return Workload.of("model", stream, sae, features), sae, replace(sae, b_enc=always)


def miniature(dtype: str, tokens: int = 2048) -> Workload:
    """The real workload, on so many tokens of the miniature's test prompts, MINIATURE in shape."""
    model, tokenizer, sae, layer, metrics = mini.load()
    prompts = corpus.prompts("test")
    random.Random(0).shuffle(prompts)
    streams, count = [], 0
    with torch.inference_mode(), mini.running_on(threads=1):
        while prompts and count < (1 + SAMPLE) * tokens:
            ids = tokenizer(chat_text(tokenizer, prompts.pop()), return_tensors="pt").input_ids
            streams.append(capture(model, ids, [layer])[0][0])
            count += len(streams[-1])
    stream, W_enc, W_dec, b_dec = (
        t.to(DTYPES[dtype]) for t in (torch.cat(streams), sae.W_enc, sae.W_dec, sae.b_dec)
    )
    x, sample = stream[:tokens], stream[tokens:]
    latent = torch.tensor([metrics["latent"]])
    w = Workload("real", x, W_enc, sae.b_enc_folded, W_dec, b_dec, latent, sae.k, sample)
    return replace(w, value=TRIED * w.truth.max().item())


def dictionary(
    N: int, d: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """W_enc [N, d] in dtype and W_dec [N, d] fp32: decoder rows of length 1, encoder rows near."""
    W_dec = torch.randn(N, d, generator=generator)
    W_enc = torch.empty(N, d, dtype=dtype)
    for rows, encoder in zip(W_dec.split(ROWS), W_enc.split(ROWS), strict=True):
        rows /= rows.norm(dim=1, keepdim=True)
        encoder.copy_(torch.randn(rows.shape, generator=generator).mul_(0.5 * d**-0.5).add_(rows))
    return W_enc, W_dec


def threshold(x: Tensor, W_enc: Tensor, k: int) -> Tensor:
    """What ABOVE_ZERO k products of a token with W_enc are above: [], of x [T, d]."""
    return _largest(x, W_enc, int(ABOVE_ZERO * k * len(x))).min()


def _tokens(W_dec: Tensor, popularity: Tensor, count: int, random: torch.Generator) -> Tensor:
    d = W_dec.shape[1]
    latents = popularity.multinomial(count * ACTIVE, replacement=True, generator=random)
    coefficients = torch.empty(count * ACTIVE).exponential_(generator=random) + 1
    x = F.embedding_bag(
        latents.view(count, ACTIVE),
        W_dec,
        per_sample_weights=coefficients.view(count, ACTIVE),
        mode="sum",
    )
    size = x.norm(dim=-1).mean() * d**-0.5
    return x + NOISE * size * torch.randn(count, d, generator=random)


def _largest(x: Tensor, W_enc: Tensor, count: int) -> Tensor:
    """The largest of all products of x [T, d] with W_enc [N, d]: [count]."""
    found = x.new_empty(0)
    for W in W_enc.split(ROWS):
        p = F.linear(x, W).flatten()
        found = torch.cat([found, p.topk(min(count, len(p))).values])
        found = found.topk(min(count, len(found))).values
    return found


def nearest(x: Tensor, W_enc: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Latents by how near their shares are to UNDECIDED and LIVE, where products with x [T, d] that
    are above the threshold are above zero."""
    above, live = torch.zeros(2, len(W_enc), device=x.device)
    for rows in x.split(max(1, (1 << 27) // len(W_enc))):
        p = F.linear(rows, W_enc)
        above += (p > threshold).sum(0)
        live += ((p > threshold) & (p >= p.topk(k).values[:, -1:])).sum(0)
    miss = [
        (count / len(x) / share).log().abs() for count, share in ((above, UNDECIDED), (live, LIVE))
    ]
    return sum(miss).argsort(stable=True)
