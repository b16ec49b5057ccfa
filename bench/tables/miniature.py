"""Tables of the miniature: what the demo printed when it was recorded, for README, and how the
shipped model and SAE came out of their build, for docs/miniature.md."""

from __future__ import annotations

import json
from pathlib import Path

from .common import table

METRICS = Path(__file__).parents[2] / "saesteer_fast/mini/assets/metrics.json"


def whole(share: float) -> str:
    """In per cent, of which a few hundred prompts tell no fractions."""
    return f"{100 * share:.0f}"


def demo(results: Path) -> str:
    """results/demo.json, which is the demo's own results.json."""
    ran = json.loads((results / "demo.json").read_text())
    counts = ran["rows"][0]["counts"]
    header = ["clamp", *(f"{c.replace('_', ' ')} (n={counts[c][1]})" for c in counts)]
    rows = [[f"{row['strength']:g}" if row["strength"] else "none"] for row in ran["rows"]]
    for cells, row in zip(rows, ran["rows"], strict=True):
        for column in counts:
            low, high = row["intervals"][column]
            cells.append(f"{whole(row[column])} ({whole(low)} to {whole(high)})")
    return (
        f"{table(header, rows)}\n\nPer cent of held-out prompts, with 95 % Wilson intervals; "
        f"latent {ran['latent']} at the output of layer {ran['layer']}, clamped in units of its "
        f"own maximum, {ran['unit']:.2f}; saesteer_fast {ran['versions']['saesteer_fast']}, "
        f"PyTorch {ran['versions']['torch']}."
    )


def mini() -> str:
    """The build's metrics.json: the model unsteered, and each layer's SAE with its best latent."""
    built = json.loads(METRICS.read_text())
    sae = built["config"]["sae"]
    width = built["config"]["model"]["width"]
    columns = built["base"]["test"]
    base = ", ".join(
        f"{column.replace('_', ' ')} {whole(hits / n)} %" for column, (hits, n) in columns.items()
    )
    header = ["layer", "unexplained variance", "dead latents", "candidates", "best latent"]
    header += [column.replace("_", " ") for column in columns] + ["score"]
    rows = []
    for layer in built["layers"]:
        best = layer["candidates"][0]
        name = f"**{layer['layer']}**" if layer["layer"] == built["layer"] else str(layer["layer"])
        shares = [whole(best["shares"][column]) for column in columns]
        rows.append(
            [
                name,
                f"{layer['unexplained_variance']:.3f}",
                f"{100 * layer['dead_latents']:.1f} %",
                str(len(layer["candidates"])),
                str(best["latent"]),
                *shares,
                f"{best['score']:.2f}",
            ]
        )
    return (
        f"`transformers.Phi3ForCausalLM`, {built['parameters'] / 1e6:.1f} M parameters; unsteered "
        f"on held-out prompts: {base}. A top-k SAE of {sae['expansion'] * width:,} latents, "
        f"k = {sae['k']}, was trained on every layer; per cent on validation prompts with each "
        "layer's best latent clamped, and the score, gain less price, that chose the layer in "
        f"bold:\n\n{table(header, rows)}"
    )
