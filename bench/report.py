"""Recorded results: how they are stored, which of them is shown, and what a page shows of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from . import ROOT, plots
from .tables import growth
from .tables.common import circumstances

RESULTS = Path(__file__).with_name("results")


def render(result: dict, everything: bool = False) -> str:
    """Markdown of one result, by its suite's file in bench/tables."""
    return import_module(f".tables.{result['suite']}", __package__).render(result, everything)


def recorded(results: Path, suite: str, rendered: Callable[[dict], str] = render) -> str:
    """What a page shows of a suite."""
    if result := latest(results, suite):
        return rendered(result)
    nothing = ": nothing here has run on a GPU" if suite == "gpu" else ""
    return f"No run of `{recorder(suite)}` is recorded{nothing}."


def recorder(suite: str) -> str:
    """The command that stores a result of this suite."""
    return "make gpu" if suite == "gpu" else f"python -m pytest bench/test_{suite}.py --record"


def grown(result: dict | None) -> str:
    """Slopes and plots of a run of the op suite's whole grid."""
    if result is None:
        return "No run of `make bench-full` is recorded."
    images = [
        f"![time along {axis}](../{plots.path(RESULTS, axis).relative_to(ROOT)})"
        for axis in plots.shown(result)
    ]
    return "\n\n".join([*images, growth.slopes(result["cases"]), circumstances(result["machine"])])


def save(result: dict, folder: Path) -> Path:
    """Stores a result, a case a line, under its suite and date."""
    lines = ",\n".join(json.dumps(case) for case in result["cases"])
    head = json.dumps({key: value for key, value in result.items() if key != "cases"}, indent=1)
    date = result["machine"]["date"][:19].replace(":", "-")
    path = folder / f"{result['suite']}-{date}.json"
    folder.mkdir(exist_ok=True)
    path.write_text(f'{head[:-2]},\n "cases": [\n{lines}\n]}}\n')
    return path


def stored(folder: Path, suite: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in folder.glob(f"{suite}-*.json")]


def newest(folder: Path, suite: str, full: bool = False) -> dict | None:
    """The suite's result with the latest date; FileNotFoundError if there is none. With `full` the
    latest of the whole grid, or None."""
    results = stored(folder, suite)
    if not results:
        raise FileNotFoundError(
            f"bench/results holds no result of the suite {suite}: `{recorder(suite)}` stores one"
        )
    chosen = [result for result in results if result.get("full") or not full]
    return max(chosen, key=lambda result: result["machine"]["date"], default=None)


def elsewhere(folder: Path, suite: str) -> list[dict]:
    """The newest results of processors and instruction sets other than the newest result's."""

    def where(result: dict) -> tuple[str, str]:
        return result["machine"]["device"], result["machine"]["instructions"]

    by_date = sorted(stored(folder, suite), key=lambda result: result["machine"]["date"])
    last = {where(result): result for result in by_date}
    return [last[each] for each in last if each != where(by_date[-1])] if last else []


def latest(folder: Path, suite: str) -> dict | None:
    """The suite's newest whole grid, or else its newest short set."""
    try:
        return newest(folder, suite, full=True) or newest(folder, suite)
    except FileNotFoundError:
        return None
