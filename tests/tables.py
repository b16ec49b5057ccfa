"""README's tables that stand in the tests, and docs/faults.md: `python -m tests.tables [--write |
--check]` puts them there, or fails unless they are there already.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.report import placed
from tests.faults import faults_page
from tests.support import support_table

ROOT = Path(__file__).parents[1]


def wanted(root: Path = ROOT) -> dict[Path, str]:
    """Each file that holds a table, as it ought to be."""
    readme = (root / "README.md").read_text()
    for name, block in blocks().items():
        readme = placed(readme, name, block)
    return {root / "README.md": readme, root / "docs" / "faults.md": faults_page(root)}


def blocks() -> dict[str, str]:
    """What README holds between `<!-- name -->` and `<!-- /name -->`."""
    found = {"support": support_table()}
    return found


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.tables", description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="put the tables where they belong")
    mode.add_argument("--check", action="store_true", help="fail if other tables are there")
    options = parser.parse_args(arguments)
    for path, text in wanted(root).items():
        if options.write:
            path.write_text(text)
        elif not options.check:
            print(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"{path.relative_to(root)} differs: `python -m tests.tables --write`")


if __name__ == "__main__":
    main()
