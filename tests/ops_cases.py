"""Inputs on which the ops are tested, and how far from the fp64 truth fp32 sums may end on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from saesteer_fast import _build, ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT = 2.0**-24
"""Unit roundoff of fp32."""
SMALLEST = 2.0**-149
"""The smallest fp32 above 0."""


@dataclass(frozen=True)
class Case:
    """What one call of `steer` gets, and the decoder that the textbook form needs besides."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    features: Tensor
    values: Tensor
    k: int
    mask: Tensor | None = None
    order: Tensor | None = None

    @property
    def directions(self) -> Tensor:
        return self.W_dec[self.features]

    @property
    def edit(self) -> tuple:
        """The arguments of `steer` up to k."""
        return *self.encoder, self.directions, self.features, self.values, self.k

    @property
    def encoder(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.W_enc, self.b_enc

    def but(self, **changed) -> Case:
        return replace(self, **changed)

    def rows(self, chosen) -> Case:
        """The case of some of its tokens."""
        per_token = {"x": self.x[chosen]}
        if self.values.dim() == self.x.dim() > 1:
            per_token["values"] = self.values[chosen]
        if self.mask is not None:
            per_token["mask"] = self.mask[chosen]
        return self.but(**per_token)

    def stored(self, order: Tensor) -> Case:
        """The case with the rows of latents order[0], order[1], ... in this order."""
        rows = {name: getattr(self, name)[order] for name in ("W_enc", "b_enc", "W_dec")}
        return self.but(**rows, features=order.argsort()[self.features], order=order)

    def steer(self, impl: str = "auto") -> Tensor:
        return ops.steer(*self.edit, mask=self.mask, order=self.order, impl=impl)

    def steer_(self, impl: str = "auto") -> None:
        ops.steer_(*self.edit, mask=self.mask, order=self.order, impl=impl)

    def acts(self, impl: str = "auto") -> Tensor:
        return ops.feature_acts(*self.encoder, self.features, self.k, order=self.order, impl=impl)

    def encode(self, impl: str = "auto") -> tuple[Tensor, Tensor]:
        return ops.encode(*self.encoder, self.k, impl=impl)

    def truth(self) -> Tensor:
        return reference.truth(*self.edit, self.mask, self.order)

    def undecided(self) -> Tensor:
        return reference.undecided(*self.encoder, self.features, self.k)

    def on(self, device: torch.device | str) -> Case:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return self.but(**{k: t.to(device) for k, t in given.items() if isinstance(t, Tensor)})

    def to(self, dtype: torch.dtype) -> Case:
        """Every floating tensor in `dtype`, as the textbook forms take them."""
        floating = {
            f.name: value.to(dtype)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and value.is_floating_point()
        }
        return self.but(**floating)


def random_case(
    T: int | tuple[int, ...] = 63,
    d: int = 33,
    N: int = 129,
    k: int = 8,
    F: int = 2,
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    per_token: bool = False,
    masked: bool = False,
) -> Case:
    """Normal x and encoder, unit decoder rows; T may be several leading sizes."""
    random = torch.Generator().manual_seed(seed)
    lead = (T,) if isinstance(T, int) else T

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random)

    W_dec = normal(N, d)
    return Case(
        x=normal(*lead, d).to(dtype),
        W_enc=normal(N, d).to(weights),
        b_enc=normal(N),
        W_dec=(W_dec / W_dec.norm(dim=1, keepdim=True)).to(weights),
        b_dec=normal(d).to(weights),
        features=torch.randperm(N, generator=random)[:F],
        values=4 * normal(*lead, F) if per_token else 4 * normal(F),
        k=k,
        mask=torch.rand(lead, generator=random) < 0.5 if masked else None,
    )


def integer_case(
    T: int = 40,
    d: int = 31,
    N: int = 130,
    k: int = 8,
    F: int = 5,
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    per_token: bool = False,
) -> Case:
    """Small integers, many of them 0: every sum is exact, and ties are everywhere."""
    random = torch.Generator().manual_seed(seed)

    def integers(*sizes: int, size: int = 1) -> Tensor:
        return torch.randint(-size, size + 1, sizes, generator=random).float()

    return Case(
        x=integers(T, d).to(dtype),
        W_enc=integers(N, d).to(weights),
        b_enc=integers(N, size=2),
        W_dec=integers(N, d).to(weights),
        b_dec=integers(d).to(weights),
        features=torch.randperm(N, generator=random)[:F],
        values=integers(T, F, size=3) if per_token else integers(F, size=3),
        k=k,
    )


def off_by_one(t: Tensor) -> Tensor:
    """The same numbers, not at whole 16 bytes."""
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def apart(t: Tensor) -> Tensor:
    """The same numbers, every other one of a wider tensor."""
    return torch.stack([t, t.flip(0)], -1)[..., 0]


def calls_of_numbers_apart(case: Case, impl: str = "auto") -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of each argument that may have gaps: what the op gives with them, and without."""
    few = case.W_enc[:3].contiguous(), case.b_enc[:3]
    for op, given, places in (
        (ops.steer, case.edit, (0, 3, 4, 5)),
        (ops.feature_acts, (*case.encoder, case.features, case.k), (0, 3)),
        (ops.project, (case.x, *few), (0,)),
        (ops.add_directions, (case.x, case.directions, case.values), (0, 1, 2)),
        (ops.decode, (*case.encode(impl), case.W_dec, case.b_dec), (0, 1, 3)),
    ):
        expected = op(*given, impl=impl)
        for place in places:
            changed = [*given]
            changed[place] = apart(changed[place])
            yield f"{op.__name__}, argument {place}", op(*changed, impl=impl), expected
    masked = case.but(mask=apart(case.mask))
    yield "steer, mask", masked.steer(impl), case.steer(impl)
    shared = case.but(values=case.values[0])
    yield "values", shared.but(values=apart(shared.values)).steer(impl), shared.steer(impl)


def bits(t: Tensor) -> Tensor:
    """t as integers, so that equal means the same bits: -0 is not 0, and NaN is itself."""
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def gamma(n: int) -> float:
    """n roundings of fp32 change a sum by at most this share of its terms' sizes."""
    return n * UNIT / (1 - n * UNIT)


def preact_bound(x: Tensor, W: Tensor, bias: Tensor) -> Tensor:
    """By how much fp32 sums of p = W x + bias may be wrong, in any order: [..., rows of W] fp64.

    d products and d additions, of which the first adds to 0; and products of bf16 pairs may flush
    subnormal factors and results to 0, AMX's after at most 2 d additions.
    """
    d = x.shape[-1]
    x, W, bias = x.double().abs(), W.double().abs(), bias.double().abs()
    flushed = 2.0**-126 * (2 * d + x.sum(-1, keepdim=True) + W.sum(-1))
    return gamma(d + 1) * (x @ W.mT + bias) + flushed


def encode_slack(case: Case) -> Tensor:
    """How far the activations that encode gives may be from those of feature_acts: [..., F] fp64.

    They are the same, but that AMX sums the products of many tokens in another order.
    """
    W, bias = case.W_enc[case.features], case.b_enc[case.features]
    tiled = _build.instruction_set()[0] == "amx"
    tiled &= case.x.dtype == case.W_enc.dtype == torch.bfloat16
    return 2 * preact_bound(case.x, W, bias) * tiled


def rounded(truth: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
    """The bound on a number that is `sums` at most away from truth, once it is rounded to dtype."""
    info = torch.finfo(dtype)
    return sums + info.eps / 2 * (truth.abs() + sums + info.smallest_normal)


def assert_steered(case: Case, y: Tensor, live: Tensor) -> None:
    """y is, given which features are live, the truth after fp32 sums and one rounding to x's dtype.

    With e the bound on p_f, delta = value - a_f, D the directions and u the dtype's roundoff:
    |y - truth| <= E + u (|truth| + E),  E = e |D| + gamma_(F+2) (|x| + (|delta| + e) |D|),
    and half the smallest number more for each rounding.
    """
    x, D = case.x.double(), case.directions.double()
    W, bias = case.W_enc[case.features], case.b_enc[case.features]
    p = reference.preacts(case.x, W, bias)
    e = preact_bound(case.x, W, bias) * live
    delta = case.values.double() - p * live
    if case.mask is not None:
        delta, e = (t * case.mask[..., None] for t in (delta, e))
    truth = x + delta @ D
    roundings = len(D) + 2
    sums = e @ D.abs() + gamma(roundings) * (x.abs() + (delta.abs() + e) @ D.abs())
    bound = rounded(truth, sums + roundings * SMALLEST / 2, y.dtype)
    assert y.dtype == case.x.dtype and y.shape == case.x.shape
    error = (y.double() - truth).abs()
    assert (error <= bound).all(), f"{(error / bound).nan_to_num(torch.inf).max()} x the bound"


def permutation(count: int, seed: int = 0) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def textbook(case: Case) -> torch.Tensor:
    """decode(a') + (x - decode(a)), dense, in fp64."""
    x, W_enc, b_enc, W_dec, b_dec = (
        t.double() for t in (case.x, case.W_enc, case.b_enc, case.W_dec, case.b_dec)
    )
    top = torch.topk(x @ W_enc.T + b_enc, case.k, dim=-1)
    acts = torch.zeros(*x.shape[:-1], len(W_enc), dtype=torch.float64)
    acts.scatter_(-1, top.indices, top.values.clamp(min=0))
    edited = acts.clone()
    edited[..., case.features] = case.values.double()
    return (edited @ W_dec + b_dec) + (x - (acts @ W_dec + b_dec))
