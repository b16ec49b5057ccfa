"""README and docs/ as recorded results and tests have them: `python -m tests.pages --write`.

That puts every block between its markers, writes the pages that are nothing else, and draws the
plots; --check fails unless all of it is there already.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import ROOT, plots, report
from bench.tables import gpu, miniature, summary, workloads
from tests import tables
from tests.faults import faults_page

TESTS = Path(__file__).parent


def blocks(results: Path) -> dict[str, dict[str, str]]:
    """What each page holds between `<!-- name -->` and `<!-- /name -->`."""
    op = report.newest(results, "op")
    return {
        "README.md": {
            "demo": miniature.demo(results),
            "bench": summary.render(
                op, *(report.latest(results, suite) for suite in ("model", "memory"))
            ),
            "bench:gpu": report.recorded(results, "gpu", gpu.short),
            "devices": tables.devices_table(),
        },
        "docs/usage.md": {
            "families": tables.families_line(),
            "support": tables.support(results),
        },
        "docs/miniature.md": {"mini": miniature.mini()},
        "docs/benchmarks.md": {
            "bench:workloads": workloads.render(op),
            "bench:op": report.render(op),
            "bench:elsewhere": summary.elsewhere(report.elsewhere(results, "op")),
            "bench:growth": report.grown(report.newest(results, "op", full=True)),
            "bench:model": report.recorded(results, "model"),
            "bench:memory": report.recorded(results, "memory"),
            "bench:encode": report.recorded(results, "encode"),
            "bench:calls": report.recorded(results, "calls"),
            "bench:gpu": report.recorded(results, "gpu"),
        },
        "docs/serving.md": {"bench:serving": report.recorded(results, "serving")},
    }


def whole() -> dict[str, str]:
    """The pages that are nothing else."""
    return {"docs/faults.md": faults_page(TESTS), "docs/families.md": tables.families_page()}


def placed(page: str, name: str, block: str) -> str:
    """The page with block between its markers; ValueError if it has not one of each, in order."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, begin, rest = page.partition(opening)
    _, end, after = rest.partition(closing)
    if not (begin and end):
        raise ValueError(f"the markers {opening} and {closing} are missing")
    return f"{before}{opening}\n{block}\n{closing}{after}"


def wanted(results: Path, root: Path) -> dict[str, str]:
    """Every page, as it ought to be."""
    found = {}
    for page, of_page in blocks(results).items():
        found[page] = (root / page).read_text()
        for name, block in of_page.items():
            try:
                found[page] = placed(found[page], name, block)
            except ValueError as error:
                raise ValueError(f"{page}: {error}") from None
    return found | whole()


def differing(texts: dict[str, str], root: Path) -> list[str]:
    """The pages that are missing or hold something else."""
    held = {page: (root / page).read_text() for page in texts if (root / page).exists()}
    return [page for page, text in texts.items() if held.get(page) != text]


def main(arguments: list[str] | None = None, results: Path = report.RESULTS, root: Path = ROOT):
    parser = argparse.ArgumentParser(prog="python -m tests.pages", description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="put everything where it belongs")
    mode.add_argument("--check", action="store_true", help="fail if something else is there")
    options = parser.parse_args(arguments)
    try:
        texts = wanted(results, root)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    drawn = report.newest(results, "op", full=True)
    if options.write:
        for page, text in texts.items():
            (root / page).write_text(text)
        if drawn:
            plots.write(drawn, results)
    elif stale := differing(texts, root) + (plots.check(drawn, results) if drawn else []):
        sys.exit(f"not as recorded and tested: {', '.join(stale)}: `python -m tests.pages --write`")


if __name__ == "__main__":
    main()
