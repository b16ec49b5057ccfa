"""Trains a top-k SAE on a model's residual stream.

    latents = topk_k(relu((x - b_dec) @ W_enc.T + b_enc))
    reconstruction = latents @ W_dec + b_dec

Rows of W_dec keep norm 1. Dead latents are revived by an auxiliary loss (AuxK, Gao et al. 2024,
arXiv 2406.04093): those that come closest to being live learn what the live ones left over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class SaeConfig(NamedTuple):
    """Sizes and training of the SAE."""

    expansion: int = 8
    k: int = 32
    steps: int = 1_500
    batch: int = 1_024
    learning_rate: float = 1e-3
    aux_weight: float = 1 / 32
    aux_k: int = 64
    dead_after: int = 100
    """Steps without being live after which a latent counts as dead."""


class TopK(torch.nn.Module):
    """The SAE in training. W_enc, W_dec [N, d], b_enc [N], b_dec [d], all fp32."""

    def __init__(self, x: Tensor, config: SaeConfig):
        """Decoder rows in random directions, encoder rows alike, b_dec at the mean of x [T, d]."""
        super().__init__()
        d = x.shape[1]
        rows = torch.nn.functional.normalize(torch.randn(config.expansion * d, d))
        self.k = config.k
        self.W_enc = torch.nn.Parameter(rows.clone())
        self.W_dec = torch.nn.Parameter(rows.clone())
        self.b_enc = torch.nn.Parameter(torch.zeros(len(rows)))
        self.b_dec = torch.nn.Parameter(x.mean(0))

    def preactivations(self, x: Tensor) -> Tensor:
        """[T, N]"""
        return torch.relu((x - self.b_dec) @ self.W_enc.T + self.b_enc)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(latents [T, N] with at most k live in a row, reconstruction [T, d])"""
        latents = keep_largest(self.preactivations(x), self.k)
        return latents, latents @ self.W_dec + self.b_dec


def keep_largest(values: Tensor, k: int) -> Tensor:
    """values [T, N] with all but each row's k largest set to 0."""
    top, indices = values.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(values).scatter(-1, indices, top)


def train_sae(sae: TopK, x: Tensor, config: SaeConfig) -> Iterator[float]:
    """Trains on residuals x [T, d] fp32, drawn by torch's global seed.

    Yields each step's unexplained variance.
    """
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 3 * (1 - step / config.steps))
    )
    silent = torch.zeros(sae.W_enc.shape[0], dtype=torch.int64)
    for _ in range(config.steps):
        batch = x[torch.randint(len(x), (config.batch,))]
        variance = (batch - batch.mean(0)).square().sum()
        pre = sae.preactivations(batch)
        latents = keep_largest(pre, sae.k)
        error = batch - (latents @ sae.W_dec + sae.b_dec)
        unexplained = error.square().sum() / variance
        silent = torch.where((latents > 0).any(0), 0, silent + 1)
        dead = silent > config.dead_after
        aux = _aux_loss(sae.W_dec[dead], pre[:, dead], error.detach(), config.aux_k)
        (unexplained + config.aux_weight * aux / variance).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        yield unexplained.item()


def _aux_loss(rows: Tensor, pre: Tensor, error: Tensor, k: int) -> Tensor:
    """The squared error of explaining `error` by the dead latents that are nearest to live.

    rows [D, d] of W_dec and pre-activations pre [T, D] of the dead latents, error [T, d].
    """
    latents = keep_largest(pre, min(k, len(rows)))
    return (error - latents @ rows).square().sum()


@torch.no_grad()
def quality(sae: TopK, x: Tensor) -> dict[str, float]:
    """Over x [T, d]: the share of variance left unexplained, and of latents that are never live."""
    latents, reconstruction = sae(x)
    unexplained = (x - reconstruction).square().sum() / (x - x.mean(0)).square().sum()
    dead = 1 - (latents > 0).any(0).float().mean()
    return {"unexplained_variance": unexplained.item(), "dead_latents": dead.item()}
