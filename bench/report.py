"""Stores results, and puts them into README.md: `python -m bench.report [--write | --check]`.

Without an option the newest result of every suite is printed as Markdown; --write puts it into
README.md between its markers, --check fails unless it is there already.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from . import miniature

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
BLOCKS: dict[str, Callable[[Path], str]] = {
    "bench:op": lambda results: render(newest(results, "op")),
    "demo": miniature.demo,
    "mini": lambda _: miniature.mini(),
}
"""What README.md holds between `<!-- name -->` and `<!-- /name -->`, from the stored results."""


def render(result: dict, everything: bool = False) -> str:
    """Markdown of one result, by its suite's file in bench/tables."""
    return import_module(f".tables.{result['suite']}", __package__).render(result, everything)


def save(result: dict, folder: Path) -> Path:
    """Stores a result, a case a line, under its suite and date."""
    lines = ",\n".join(json.dumps(case) for case in result["cases"])
    head = json.dumps({key: value for key, value in result.items() if key != "cases"}, indent=1)
    date = result["machine"]["date"][:19].replace(":", "-")
    path = folder / f"{result['suite']}-{date}.json"
    folder.mkdir(exist_ok=True)
    path.write_text(f'{head[:-2]},\n "cases": [\n{lines}\n]}}\n')
    return path


def newest(folder: Path, suite: str) -> dict:
    """The suite's result with the latest date; FileNotFoundError if there is none."""
    results = [json.loads(path.read_text()) for path in folder.glob(f"{suite}-*.json")]
    if not results:
        raise FileNotFoundError(
            f"bench/results holds no result of the suite {suite}: "
            f"`python -m pytest bench/test_{suite}.py --record` stores one"
        )
    return max(results, key=lambda result: result["machine"]["date"])


def placed(readme: str, name: str, block: str) -> str:
    """readme with block between its markers; ValueError if it has not one of each, in order."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, begin, rest = readme.partition(opening)
    _, end, after = rest.partition(closing)
    if not (begin and end):
        raise ValueError(f"README.md: the markers {opening} and {closing} are missing")
    return f"{before}{opening}\n{block}\n{closing}{after}"


def main(
    arguments: list[str] | None = None,
    results: Path = RESULTS,
    readme: Path = ROOT / "README.md",
) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="put the tables into README.md")
    mode.add_argument("--check", action="store_true", help="fail if README.md holds other tables")
    options = parser.parse_args(arguments)
    try:
        blocks = {name: rendered(results) for name, rendered in BLOCKS.items()}
        if not (options.write or options.check):
            print("\n\n".join(blocks.values()))
            return
        text = wanted = readme.read_text()
        for name, block in blocks.items():
            wanted = placed(wanted, name, block)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    if options.write:
        readme.write_text(wanted)
    elif text != wanted:
        sys.exit("README.md differs from the stored results: `python -m bench.report --write`")


if __name__ == "__main__":
    main()
