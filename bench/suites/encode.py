"""Encode and decode against what is written without them, and against sparsify's own.

encode      ours      saesteer_fast.ops.encode
            sparsify  its encode, where it is installed
            eager     F.linear, relu, topk, which is how sparsify encodes
            linear    F.linear alone
            topk      torch.topk alone, of stored pre-activations
decode      ours      saesteer_fast.ops.decode
            sparsify  its decode, where it is installed
            bag       F.embedding_bag, which is how sparsify decodes without Triton
            dense     scatter into N activations, then a product with all of W_dec
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer_fast import ops

from .. import exactness, peers, workloads
from ..timing import Contestant, interleaved
from ..workloads import Workload

ROUNDS = 5
VERIFIED = 64
CALLS = 64
SPARSIFY = ("sparsify",) * (peers.sparsify in peers.INSTALLED)
NAMES = {
    "encode": ("ours", *SPARSIFY, "eager", "linear", "topk"),
    "decode": ("ours", *SPARSIFY, "bag", "dense"),
}


@dataclass(frozen=True)
class Case:
    op: str
    T: int
    k: int

    def __str__(self) -> str:
        return f"{self.op}-T{self.T}-k{self.k}"


def cases(full: bool) -> list[Case]:
    tokens = (1, 8, 64, 512, 2048) if full else (1, 64, 512)
    return [Case(op, T, k) for op in NAMES for k in (32, 64, 192)[: 1 + 2 * full] for T in tokens]


def names(case: Case) -> tuple[str, ...]:
    return NAMES[case.op]


def encoders(w: Workload, k: int) -> dict[str, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Each gives values and indices first."""
    b_enc = w.b_enc.to(w.W_enc.dtype)
    found = {
        "ours": lambda x: ops.encode(x, w.W_enc, w.b_enc, k, impl="cpu"),
        "eager": lambda x: F.relu(F.linear(x, w.W_enc, b_enc)).topk(k, dim=-1, sorted=False),
    }
    if SPARSIFY:
        found["sparsify"] = peers.sparse_coder(replace(w, k=k)).encode
    return found


def decoders(w: Workload) -> dict[str, Callable[[tuple[Tensor, Tensor]], Tensor]]:
    """Each takes (values, indices), of which ours alone wants values of fp32."""
    dtype = w.W_dec.dtype

    def bag(top: tuple[Tensor, Tensor]) -> Tensor:
        weights = top[0].to(dtype)
        return F.embedding_bag(top[1], w.W_dec, per_sample_weights=weights, mode="sum") + w.b_dec

    def dense(top: tuple[Tensor, Tensor]) -> Tensor:
        acts = torch.zeros(len(top[1]), len(w.W_dec), dtype=dtype)
        return F.linear(acts.scatter_(-1, top[1], top[0].to(dtype)), w.W_dec.mT, w.b_dec)

    found = {"ours": lambda top: ops.decode(*top, w.W_dec, w.b_dec), "bag": bag, "dense": dense}
    if SPARSIFY:
        coder = peers.sparse_coder(w)
        found["sparsify"] = lambda top: coder.decode(*top)
    return found


@torch.inference_mode()
def verify_all(w: Workload, k: int) -> dict[str, float]:
    """The share of the tokens on which each way agrees, for this k."""
    x, encode, decode = w.x[:VERIFIED], encoders(w, k), decoders(w)
    top = encode.pop("ours")(x)
    exactness.check_encode(w, x, *top)
    recon = decode.pop("ours")(top)
    exactness.check_decode(w, *top, recon)
    found = {}
    for name, call in encode.items():
        values = call(x)[0].sort(descending=True).values
        found[name] = exactness.check_near(f"{name} encode", values, top[0])
    for name, call in decode.items():
        share = exactness.check_near(f"{name} decode", call(top), recon)
        found[name] = min(share, found.get(name, 1))
    return found


def contestants(w: Workload, case: Case) -> dict[str, Contestant]:
    batches, encode = w.batches(case.T)[:CALLS], encoders(w, case.k)
    if case.op == "decode":
        tops = [encode["ours"](x) for x in batches]
        return {name: Contestant(call, tops) for name, call in decoders(w).items()}
    b_enc = w.b_enc.to(w.W_enc.dtype)
    linear = partial(F.linear, weight=w.W_enc, bias=b_enc)
    return {
        **{name: Contestant(call, batches) for name, call in encode.items()},
        "linear": Contestant(linear, batches),
        "topk": Contestant(lambda p: p.topk(case.k, dim=-1), [linear(x) for x in batches]),
    }


@contextmanager
def measuring(every: list[Case]) -> Iterator[Callable[[Case], dict]]:
    """A case's record: `seconds` a call by contestant and round."""
    w, _ = workloads.build("bf16", 1)
    verified = cache(partial(verify_all, w))

    @torch.inference_mode()
    def measure(case: Case) -> dict:
        agreement = verified(case.k)
        N, d = w.W_enc.shape
        found = {"dtype": "bf16", "d": d, "N": N}
        found |= {"agreement": agreement, "seconds": interleaved(contestants(w, case), ROUNDS)}
        return asdict(case) | found

    yield measure
