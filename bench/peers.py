"""Ours and whom it is compared with: how each steers the tokens of a workload.

steer, feature_acts   ours
naive, lean, smart    baselines.py

The SAE libraries, where they are installed (the extra `peers`):

sparsify     encode, clamp among the live latents, its sparse decode twice
sae_lens     its forward pass with a hook that clamps, and its error term
sae_lens, no error term     the same without; what it then leaves out, its own forward pass gives

Each library is driven as its users drive it: weights in its own layout, b_dec subtracted by itself.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import Parameter

from saesteer_fast import ops

from .baselines import lean, naive, smart
from .workloads import ROWS, Workload


def steer(w: Workload, x: Tensor, impl: str = "cpu") -> Tensor:
    fixed = w.W_enc, w.b_enc, w.directions, w.features, w.values, w.k
    return ops.steer(x, *fixed, order=w.order, impl=impl)


def feature_acts(w: Workload, x: Tensor, impl: str = "cpu") -> Tensor:
    fixed = w.W_enc, w.b_enc, w.features, w.k
    return ops.feature_acts(x, *fixed, order=w.order, impl=impl)


def baselines(w: Workload, wrap=lambda run: run) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each takes x; all other inputs are prepared in W_enc's dtype."""
    b_enc = w.b_enc.to(w.W_enc.dtype)
    dense = w.W_enc, b_enc, w.W_dec, w.b_dec, w.features, w.values, w.k
    rows = w.W_enc, b_enc, w.directions, w.features, w.values, w.k
    by_naive, by_lean, by_smart = wrap(naive), wrap(lean), wrap(smart)
    return {
        "naive": lambda x: by_naive(x, *dense),
        "lean": lambda x: by_lean(x, *dense),
        "smart": lambda x: by_smart(x, *rows),
    }


@dataclass(frozen=True)
class Peer:
    call: Callable[[Tensor], Tensor]
    whole: Callable[[Tensor, Tensor], Tensor] = lambda x, y: y
    """x' of x and of what `call` gave for it."""


def raw_bias(w: Workload) -> Tensor:
    """The bias before b_dec was folded into it: [N], in W_enc's dtype."""
    products = [rows.float() @ w.b_dec.float() for rows in w.W_enc.split(ROWS)]
    return (w.b_enc + torch.cat(products)).to(w.W_enc.dtype)


def sparse_coder(w: Workload):
    """sparsify's SAE, with its encode and decode."""
    if not torch.cuda.is_available():
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder, SparseCoderConfig

    N, d = w.W_enc.shape
    with torch.device("meta"):
        coder = SparseCoder(d, SparseCoderConfig(num_latents=N, k=w.k), device="meta")
    coder.encoder.weight, coder.encoder.bias = _parameters(w.W_enc, raw_bias(w))
    coder.W_dec, coder.b_dec = _parameters(w.W_dec, w.b_dec)
    return coder


def sparsify(w: Workload) -> dict[str, Peer]:
    coder = sparse_coder(w)
    features, values = w.features, w.values.to(w.W_dec.dtype)

    def call(x: Tensor) -> Tensor:
        acts, latents, _ = coder.encode(x)
        error = x - coder.decode(acts, latents)
        kept = (latents[..., None] != features).all(-1)
        clamped = torch.cat([acts * kept, values.expand(len(x), -1)], -1)
        edited = torch.cat([latents, features.expand(len(x), -1)], -1)
        return coder.decode(clamped, edited) + error

    return {"sparsify": Peer(call)}


def sae_lens(w: Workload) -> dict[str, Peer]:
    from sae_lens import TopKSAE, TopKSAEConfig

    N, d = w.W_enc.shape
    dtype = str(w.W_enc.dtype).removeprefix("torch.")
    small = TopKSAEConfig(d_in=1, d_sae=w.k, k=w.k, dtype=dtype)
    weights = {"W_enc": w.W_enc.mT.contiguous(), "b_enc": raw_bias(w)}
    weights |= {"W_dec": w.W_dec, "b_dec": w.b_dec}

    def clamp(acts: Tensor, hook) -> Tensor:
        acts[..., w.features] = w.values.to(acts.dtype)
        return acts

    def sae(hooked: bool, error: bool):
        made = TopKSAE(small)
        for name, weight in weights.items():
            setattr(made, name, Parameter(weight, requires_grad=False))
        made.cfg.d_in, made.cfg.d_sae = d, N
        if hooked:
            made.hook_sae_acts_post.add_hook(clamp)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            made.use_error_term = error
        return made

    plain = sae(hooked=False, error=False)
    return {
        "sae_lens": Peer(sae(hooked=True, error=True)),
        "sae_lens, no error term": Peer(
            sae(hooked=True, error=False), lambda x, y: y + (x - plain(x))
        ),
    }


def _parameters(*tensors: Tensor) -> list[Parameter]:
    return [Parameter(tensor, requires_grad=False) for tensor in tensors]


LIBRARIES = {sparsify: ("sparsify",), sae_lens: ("sae_lens", "sae_lens, no error term")}
INSTALLED = [library for library in LIBRARIES if find_spec(library.__name__)]
NAMES = tuple(name for library in INSTALLED for name in LIBRARIES[library])
"""What `libraries` gives here."""


def libraries(w: Workload) -> dict[str, Peer]:
    return {name: peer for library in INSTALLED for name, peer in library(w).items()}
