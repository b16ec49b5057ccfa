"""The table, the JSON rows and the plot of a sweep over strengths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from .scores import Share
from .suite import COLUMNS

Row = tuple[float, Mapping[str, Share]]
"""(strength, shares by column), strength 0 being the unsteered model."""


def table(rows: Iterable[Row]) -> str:
    """Per cent with 95 % Wilson intervals, a line a strength; below the heads, how many prompts.

    Raises ValueError without rows.
    """
    rows = _some(rows)
    counts = [share.n for share in rows[0][1].values()]
    lines = [
        ["strength", *(column.replace("_", " ") for column in COLUMNS)],
        ["", *(f"n = {n}" for n in counts)],
    ]
    for strength, shares in rows:
        name = f"{strength:g}" if strength else "0 (none)"
        lines.append([name, *(_percent(shares[column]) for column in COLUMNS.values())])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    return "\n".join([*text[:2], "-" * len(text[0]), *text[2:]])


def _some(rows: Iterable[Row]) -> list[Row]:
    """All that `sweep` yields."""
    rows = list(rows)
    if not rows:
        raise ValueError("rows: none is given; accepted is what sweep yields")
    return rows


def _percent(share: Share) -> str:
    low, high = share.interval
    return f"{100 * share.value:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def json_rows(rows: Iterable[Row]) -> list[dict]:
    """As JSON: "strength", each column's share from 0 to 1 (null without prompts), "counts" [hits,
    n], "intervals"."""
    return [
        {
            # NumPy's are no numbers to json.
            "strength": strength if isinstance(strength, int) else float(strength),
            **{column: share.value if share.n else None for column, share in shares.items()},
            "counts": {column: list(share) for column, share in shares.items()},
            "intervals": {column: list(share.interval) for column, share in shares.items()},
        }
        for strength, shares in rows
    ]


def plot(rows: Iterable[Row], path: str | Path, title: str) -> None:
    """Draws each column's share over the strength, with its Wilson interval, as a PNG.

    Raises ValueError without rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _some(rows)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    strengths = [strength for strength, _ in rows]
    for column, style in zip(COLUMNS.values(), ("o-", "s-", "^-", "v--", "d--"), strict=True):
        shares = [shares[column] for _, shares in rows]
        (line,) = axes.plot(
            strengths, [100 * s.value for s in shares], style, label=column.replace("_", " ")
        )
        low, high = zip(*(s.interval for s in shares), strict=True)
        axes.fill_between(
            strengths,
            [100 * x for x in low],
            [100 * x for x in high],
            color=line.get_color(),
            alpha=0.15,
            linewidth=0,
        )
    axes.set(
        xlabel="clamp, in units of the latent's own maximum (0 = unsteered)",
        ylabel="refused, or answered right (%)",
        ylim=(-3, 103),
        title=title,
    )
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=144)
