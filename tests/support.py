"""What steering supports, measure by edit by error mode by implementation: the truth of each point
in fp64, and docs/usage.md's table of them. test_support.py runs every cell of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import saesteer_fast as sf
from saesteer_fast.plan import ERRORS

D, N, K = 24, 96, 6
LATENTS = [3, 40, 41, 95]

MEASURES = ["topk", "groupmax", "threshold", "relu", "gated", "projection"]
EDITED = {
    "set": (lambda v: v, lambda a, v: 0 * a + v),
    "set_if_active": (sf.set_if_active, lambda a, v: torch.where(a > 0, v, a)),
    "add": (sf.add, lambda a, v: a + v),
    "scale": (sf.scale, lambda a, v: a * v),
    "at_least": (sf.at_least, lambda a, v: a.clamp(min=v)),
    "at_most": (sf.at_most, lambda a, v: a.clamp(max=v)),
}
"""How an edit is given, and what it means."""
IMPLEMENTATIONS = ("cpu", "reference", "triton", "cuda")
REFUSED = {("projection", "drop"): "error: 'drop' decodes the SAE's activations; a projection has"}
"""Measures and error modes that do not go together, and how the error says so."""


def build(measure="topk", dtype=torch.float32, seed=0, N=N, K=K, **options) -> sf.SAE:
    random = torch.Generator().manual_seed(seed)
    noise, W_dec = torch.randn(2, N, D, generator=random)
    W_dec *= torch.rand(N, 1, generator=random) + 0.5
    bias, r_mag, b_mag = 0.1 * torch.randn(3, N, generator=random)
    weights = {
        "W_enc": W_dec + 0.1 * noise,
        "b_enc": bias,
        "W_dec": W_dec,
        "b_dec": 0.3 * torch.randn(D, generator=random),
    }
    if measure == "threshold":
        weights["threshold"] = torch.rand(N, generator=random)
    if measure == "gated":
        weights |= {"r_mag": r_mag, "b_mag": b_mag}
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    k = K if measure in ("topk", "groupmax") else None
    own = "relu" if measure == "projection" else measure
    return sf.SAE(**weights, k=k, measure=own, **options)


def stream(*shape: int, seed=1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def given_edits(edits: Mapping[int, tuple[str, float]]) -> dict:
    """{latent: (kind, value)} as `sf.steer` takes it."""
    return {latent: EDITED[kind][0](value) for latent, (kind, value) in edits.items()}


def true_acts(x: Tensor, sae: sf.SAE) -> Tensor:
    """Dense activations in fp64."""
    W_enc, bias, b_dec = (t.double() for t in (sae.W_enc, sae.b_enc, sae.b_dec))
    p = (x - b_dec) @ W_enc.T + bias
    if sae.measure == "topk":
        top = p.relu().topk(sae.k, dim=-1)
        return torch.zeros_like(p).scatter(-1, top.indices, top.values)
    if sae.measure == "groupmax":
        groups = p.relu().unflatten(-1, (sae.k, -1))
        return torch.where(groups == groups.amax(-1, keepdim=True), groups, 0).flatten(-2)
    if sae.measure == "threshold":
        return torch.where(p > sae.threshold.double(), p, 0).relu()
    if sae.measure == "gated":
        magnitude = sae.r_mag.double().exp() * (p - bias) + sae.b_mag.double()
        return torch.where(p > 0, magnitude.relu(), 0)
    return p.relu()


def truth(x, sae, edits, mask=None, error="keep", projection=False) -> Tensor:
    """x' in fp64, by way of all activations and dense decodes; edits {latent: (kind, value)}."""
    stream, W_dec, b_dec = x.double(), sae.W_dec.double(), sae.b_dec.double()
    if projection:
        steered = stream.clone()
        for latent, (kind, value) in edits.items():
            unit = W_dec[latent] / W_dec[latent].norm()
            a = (stream - b_dec) @ unit
            steered += (EDITED[kind][1](a, value) - a)[..., None] * unit
    else:
        acts = true_acts(stream, sae)
        edited = acts.clone()
        for latent, (kind, value) in edits.items():
            edited[..., latent] = EDITED[kind][1](acts[..., latent], value)
        kept = 0 if error == "drop" else stream - (acts @ W_dec + b_dec)
        steered = edited @ W_dec + b_dec + kept
    return steered if mask is None else torch.where(mask[..., None], steered, stream)


def assert_rounded(y: Tensor, expected: Tensor, roundings=1) -> None:
    """y is the truth, rounded to its dtype after fp32 sums of D terms about as large."""
    ulp = roundings * torch.finfo(y.dtype).eps / 2
    size = expected.abs().amax() + 20 if expected.numel() else 0
    bound = ulp * expected.abs() + 4 * D * 2.0**-24 * size
    assert ((y.double() - expected).abs() <= bound).all()


def support_table(on_gpu: str) -> str:
    """The table of docs/usage.md: for each measure, who computes it, the error kept or dropped;
    `on_gpu` says how those fared that run on a GPU."""
    every = ", ".join(IMPLEMENTATIONS)

    def cell(measure: str, error: str) -> str:
        return "–" if (measure, error) in REFUSED else every

    rows = [["measure", *(f'`error="{error}"`' for error in ERRORS)], ["---"] * (1 + len(ERRORS))]
    rows += [[measure, *(cell(measure, error) for error in ERRORS)] for measure in MEASURES]
    return "\n".join(
        [
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"Which implementations compute it: each of the edits {', '.join(EDITED)}, in fp32, "
            "bf16 and fp16. – is refused by name. Every cell is run against an fp64 truth by "
            "`tests/test_support.py`; triton in Triton's interpreter, cuda as PTX that a CPU "
            f"runs: {on_gpu}.",
        ]
    )
