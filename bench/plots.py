"""Draws how cost grows: one SVG an axis, each with the hash of the numbers that it shows."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from .tables.common import circumstances
from .tables.contestants import HEADINGS
from .tables.growth import AXES, CONTESTANTS, Series, series


def shown(result: dict) -> dict[str, list[Series]]:
    """What is drawn, by axis."""
    found = series(result["cases"])
    by_axis = {axis: [each for each in found if each.axis == axis] for axis in AXES}
    return {axis: each for axis, each in by_axis.items() if each}


def digest(result: dict, axis: str) -> str:
    """The hash of everything in an axis' plot."""
    drawn = [[each.title, each.points] for each in shown(result)[axis]]
    text = json.dumps([drawn, circumstances(result["machine"])], sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def path(folder: Path, axis: str) -> Path:
    return folder / f"op-{axis}.svg"


def check(result: dict, folder: Path) -> list[str]:
    """The names of the plots that are missing or show other numbers."""
    files = [(path(folder, axis), digest(result, axis)) for axis in shown(result)]
    return [file.name for file, wanted in files if not file.exists() or _held(file) != wanted]


def _held(file: Path) -> str | None:
    found = re.search(r"sha256:[0-9a-f]{64}", file.read_text())
    return found and found[0]


def write(result: dict, folder: Path) -> None:
    """Draws anew what differs; the same numbers give the same bytes with the same matplotlib."""
    stale = check(result, folder)
    for axis, found in shown(result).items():
        if path(folder, axis).name in stale:
            _draw(axis, found, digest(result, axis), result, path(folder, axis))


def _draw(axis: str, found: list[Series], held: str, result: dict, file: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": held, "svg.fonttype": "none", "font.size": 8}):
        columns = min(2, len(found))
        rows = -(-len(found) // columns)
        figure = Figure(figsize=(4.5 * columns, 3.2 * rows + 0.6), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, each in zip(panels, found, strict=False):
            for i, name in enumerate(CONTESTANTS):
                if points := each.points.get(name):
                    style = {"color": f"C{i}", "lw": 2 if name == "ours" else 1}
                    label = HEADINGS.get(name, name)
                    panel.loglog([*points], [*points.values()], "o-", ms=3, label=label, **style)
            panel.set(title=each.title, xlabel=axis, ylabel="seconds a call")
            panel.set_xticks([*each.points["ours"]], [str(v) for v in each.points["ours"]])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        for panel in panels[len(found) :]:
            panel.remove()
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4)
        figure.suptitle(circumstances(result["machine"]), fontsize=6)
        metadata = {"Date": None, "Creator": None, "Identifier": held}
        figure.savefig(file, format="svg", metadata=metadata)
