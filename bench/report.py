"""Stores results, and puts them into the pages: `python -m bench.report [--write | --check]`.

Without an option the newest result of every suite is printed as Markdown; --write puts it into
README.md and docs/ between their markers and draws the plots, --check fails unless all of it is
there already.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from . import plots
from .tables import gpu, growth, miniature, summary
from .tables.common import circumstances

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
PAGES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {
        "bench": lambda results: summary.render(
            newest(results, "op"), *(latest(results, suite) for suite in ("model", "memory"))
        ),
        "bench:gpu": lambda results: recorded(results, "gpu", gpu.short),
        "demo": miniature.demo,
    },
    "docs/miniature.md": {"mini": lambda _: miniature.mini()},
    "docs/benchmarks.md": {
        "bench:op": lambda results: render(newest(results, "op")),
        "bench:growth": lambda results: grown(newest(results, "op", full=True)),
        "bench:model": lambda results: recorded(results, "model"),
        "bench:memory": lambda results: recorded(results, "memory"),
        "bench:encode": lambda results: recorded(results, "encode"),
        "bench:calls": lambda results: recorded(results, "calls"),
        "bench:gpu": lambda results: recorded(results, "gpu"),
    },
    "docs/serving.md": {
        "bench:serving": lambda results: recorded(results, "serving"),
    },
}
"""What each page holds between `<!-- name -->` and `<!-- /name -->`, from the stored results."""


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


def newest(folder: Path, suite: str, full: bool = False) -> dict | None:
    """The suite's result with the latest date; FileNotFoundError if there is none. With `full` the
    latest of the whole grid, or None."""
    results = [json.loads(path.read_text()) for path in folder.glob(f"{suite}-*.json")]
    if not results:
        raise FileNotFoundError(
            f"bench/results holds no result of the suite {suite}: `{recorder(suite)}` stores one"
        )
    chosen = [result for result in results if result.get("full") or not full]
    return max(chosen, key=lambda result: result["machine"]["date"], default=None)


def latest(folder: Path, suite: str) -> dict | None:
    """The suite's newest whole grid, or else its newest short set."""
    try:
        return newest(folder, suite, full=True) or newest(folder, suite)
    except FileNotFoundError:
        return None


def placed(page: str, name: str, block: str) -> str:
    """The page with block between its markers; ValueError if it has not one of each, in order."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, begin, rest = page.partition(opening)
    _, end, after = rest.partition(closing)
    if not (begin and end):
        raise ValueError(f"the markers {opening} and {closing} are missing")
    return f"{before}{opening}\n{block}\n{closing}{after}"


def filled(page: Path, blocks: dict[str, str]) -> str:
    """The page with all of them between their markers."""
    text = page.read_text()
    try:
        for name, block in blocks.items():
            text = placed(text, name, block)
    except ValueError as error:
        raise ValueError(f"{page.name}: {error}") from None
    return text


def main(arguments: list[str] | None = None, results: Path = RESULTS, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="put the tables into the pages")
    mode.add_argument("--check", action="store_true", help="fail if the pages hold other tables")
    options = parser.parse_args(arguments)
    try:
        pages = {
            root / page: {name: rendered(results) for name, rendered in blocks.items()}
            for page, blocks in PAGES.items()
        }
        if not (options.write or options.check):
            print("\n\n".join(block for blocks in pages.values() for block in blocks.values()))
            return
        wanted = {page: filled(page, blocks) for page, blocks in pages.items()}
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    drawn = newest(results, "op", full=True)
    if options.write:
        for page, text in wanted.items():
            page.write_text(text)
        if drawn:
            plots.write(drawn, results)
        return
    differing = plots.check(drawn, results) if drawn else []
    differing += [page.name for page, text in wanted.items() if page.read_text() != text]
    if differing:
        sys.exit(
            f"{' and '.join(differing)}: differs from the stored results: "
            "`python -m bench.report --write`"
        )


if __name__ == "__main__":
    main()
