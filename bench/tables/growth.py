"""How cost grows along each axis of the op suite's whole grid: the slopes of log time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import linear_regression, median

from .common import Case, table
from .contestants import HEADINGS, PEERS, best

AXES = ("T", "F", "k", "N", "d")
FIXED = ("workload", "dtype", *AXES)
CONTESTANTS = ("ours", *PEERS, "linear")


@dataclass(frozen=True)
class Series:
    """The cases that differ along one axis alone."""

    axis: str
    fixed: dict
    """Every other name in FIXED, with its value."""
    points: dict[str, dict[int, float]]
    """Median seconds by contestant and value; of a baseline eager or compiled, whichever is
    faster."""

    @property
    def title(self) -> str:
        shape = ", ".join(f"{name}={self.fixed[name]}" for name in AXES if name != self.axis)
        return f"{self.fixed['workload']}, {shape}"


def series(cases: list[Case]) -> list[Series]:
    """Every series of at least three values."""
    found = []
    for axis in AXES:
        groups: dict[tuple, list[Case]] = {}
        for case in cases:
            key = tuple((name, case[name]) for name in FIXED if name != axis)
            groups.setdefault(key, []).append(case)
        for key, group in groups.items():
            if len({case[axis] for case in group}) >= 3:
                group.sort(key=lambda case: case[axis])
                found.append(Series(axis, dict(key), _points(axis, group)))
    return found


def _points(axis: str, group: list[Case]) -> dict[str, dict[int, float]]:
    points: dict[str, dict[int, float]] = {}
    for name in CONTESTANTS:
        for case in group:
            if chosen := best(case, name):
                points.setdefault(name, {})[case[axis]] = median(case["seconds"][chosen])
    return points


def slope(points: dict[int, float]) -> tuple[float, float] | None:
    """b in seconds ~ value^b by least squares of the logarithms, and its standard error; None of
    fewer than three points."""
    if len(points) < 3:
        return None
    x, y = ([math.log(v) for v in each] for each in (points.keys(), points.values()))
    b, a = linear_regression(x, y)
    mean = sum(x) / len(x)
    residual = sum((v - a - b * u) ** 2 for u, v in zip(x, y, strict=True))
    return b, math.sqrt(residual / (len(x) - 2) / sum((u - mean) ** 2 for u in x))


def slopes(cases: list[Case]) -> str:
    """Markdown, a row a series."""
    found = series(cases)
    shown = [name for name in CONTESTANTS if any(name in each.points for each in found)]
    rows = [
        [f"{each.axis}, {min(each.points['ours'])} to {max(each.points['ours'])}", each.title]
        + [_cell(each.points.get(name, {})) for name in shown]
        for each in found
    ]
    header = ["axis", "at", *(HEADINGS.get(name, name) for name in shown)]
    return (
        f"{table(header, rows)}\n\nb in time ~ axis^b, fitted to the logarithms of the medians, ± "
        "its standard error: 0 is for nothing, 1 is proportional. Of each baseline the faster of "
        "eager and compiled."
    )


def _cell(points: dict[int, float]) -> str:
    found = slope(points)
    return "{:.2f} ± {:.2f}".format(*found) if found else "—"
