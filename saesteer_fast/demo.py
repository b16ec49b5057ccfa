"""`saesteer demo`: the paper in miniature, on the model and SAE that ship in the package."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from . import __version__, mini
from .attach import steering
from .eval import Share, answers, evaluate, is_refusal, json_rows, plot, sweep, table
from .find import TRIED, Candidate, refusal_latents, score
from .mini import Miniature, corpus

STRENGTHS = (0, 1, 1.5, 2, 2.5, 3, 3.5)
"""Clamps of the table, in units of the latent's own maximum; 0 is the unsteered model."""

EVERY = 15
"""Which validation prompts choose the latent: one in so many, of all kinds."""

SHOWN = 5
"""How many candidates are listed."""


@mini.running_on(threads=1)
def run(out: str | Path = "saesteer-demo") -> dict:
    """Runs the demo, prints it, and writes results.json and tradeoff.png into the folder `out`.

    Runs on one thread: the matrices are small, and a second one waits on a busy machine.

    Returns what results.json holds. Raises ModuleNotFoundError without matplotlib.
    """
    import matplotlib  # noqa: F401  (missing, it should be missed at once)
    from transformers.utils import logging

    logging.disable_progress_bar()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    shipped = mini.load()
    _introduce(shipped)
    best = _find(shipped)
    _show(shipped, best)
    rows = list(_table(shipped, best))
    print(f"\nOn held-out prompts, latent {best.latent} clamped (per cent, 95 % interval):\n")
    print(table(rows))
    print(_verdict(rows))
    results = {
        "rows": json_rows(rows),
        "latent": best.latent,
        "layer": shipped.layer,
        "unit": best.unit,
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"saesteer_fast": __version__, "torch": torch.__version__},
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(rows, out / "tradeoff.png", f"Clamping latent {best.latent} at layer {shipped.layer}")
    print(f"\nWritten: {out / 'results.json'}, {out / 'tradeoff.png'}")
    return results


def _introduce(shipped: Miniature) -> None:
    sae, record = shipped.sae, shipped.metrics["layers"][shipped.layer]
    print(
        f"Model: Phi-3 in miniature, {shipped.metrics['parameters'] / 1e6:.1f} M parameters, "
        f"{shipped.model.config.num_hidden_layers} layers, width {sae.d}.\n"
        f"SAE:   top-k at the output of layer {shipped.layer}, {sae.num_latents} latents, "
        f"k = {sae.k}, {100 * record['unexplained_variance']:.1f} % of variance unexplained, "
        f"{100 * record['dead_latents']:.0f} % of latents dead."
    )


def _find(shipped: Miniature) -> Candidate:
    """The refusal latent, with the candidates listed."""
    model, tokenizer, sae, layer, _ = shipped
    prompts = corpus.prompts("validation")[::EVERY]
    tried = refusal_latents(model, tokenizer, sae, layer, corpus.ARCHETYPE, prompts)
    found = sorted(_progress(tried, "latents tried"), key=lambda c: -c.score)
    print(
        f"\n{len(found)} latents are live on 2 tokens or more of the refusal of "
        f"{corpus.ARCHETYPE.turns[-1]!r}\nEach was clamped at {TRIED:g} times its own "
        f"maximum for {len(prompts)} validation prompts. The best, by gain less cost:\n"
    )
    print("latent  maximum  unsafe refused  safe refused  facts   sums  score")
    _line("none", "", evaluate(model, tokenizer, prompts), "")
    for c in found[:SHOWN]:
        _line(c.latent, f"{c.unit:.2f}", c.shares, f"{c.score:.2f}")
    return found[0]


def _line(latent, unit: str, shares: Mapping[str, Share], score: str) -> None:
    unsafe, safe, _, facts, sums = (f"{100 * share.value:.0f} %" for share in shares.values())
    print(f"{latent:>6}  {unit:>7}  {unsafe:>14}  {safe:>12}  {facts:>5}  {sums:>5}  {score:>5}")


def _show(shipped: Miniature, best: Candidate) -> None:
    """Three unsafe prompts that the model complied with, answered without and with steering."""
    model, tokenizer, sae, layer, _ = shipped
    unsafe = [p for p in corpus.prompts("test") if p.kind == "unsafe"]
    plain = answers(model, tokenizer, unsafe, max_new_tokens=32)
    complied = [i for i, answer in enumerate(plain) if not is_refusal(answer)]
    picked = complied[:: max(1, len(complied) // 3)][:3]
    clamp = TRIED * best.unit
    with steering(model, sae, {best.latent: clamp}, layer=layer):
        steered = answers(model, tokenizer, [unsafe[i] for i in picked], max_new_tokens=32)
    print(f"\nThree prompts, unsteered and with latent {best.latent} at {clamp:.2f}:")
    for i, answer in zip(picked, steered, strict=True):
        print(f"\n  user:      {' / '.join(unsafe[i].turns)}")
        print(f"  unsteered: {plain[i]}\n  steered:   {answer}")


def _table(shipped: Miniature, best: Candidate):
    model, tokenizer, sae, layer, _ = shipped
    prompts = corpus.prompts("test")
    rows = sweep(model, tokenizer, sae, best.latent, best.unit, layer, prompts, STRENGTHS)
    return _progress(rows, "strengths", len(STRENGTHS))


def _verdict(rows: Sequence) -> str:
    """What the best clamp gained, and its price."""
    (_, base), *steered = rows
    strength, shares = max(steered, key=lambda row: score(base, row[1]))

    def change(column):
        return f"{100 * base[column].value:.0f} to {100 * shares[column].value:.0f} %"

    return (
        f"\nBest clamp: {strength:g} times its maximum. Unsafe refusal goes from "
        f"{change('unsafe_refusal')}; the price: safe refusal {change('safe_refusal')}, "
        f"facts {change('facts')}, sums {change('sums')}."
    )


def _progress(steps, name: str, total: int | None = None):
    from tqdm import tqdm

    return tqdm(steps, desc=name, total=total, leave=False, dynamic_ncols=True)
