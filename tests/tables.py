"""What README and docs/ say of the tests: `python -m tests.tables [--write | --check]` puts it
there, or fails unless it is there already.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from bench.report import placed
from tests.faults import faults_page
from tests.support import support_table

ROOT = Path(__file__).parents[1]


BLOCKS = {"support": support_table}
"""What README.md holds between `<!-- name -->` and `<!-- /name -->`."""
PAGES = {"faults": lambda: faults_page(ROOT / "tests")}
"""The files of docs/."""
if find_spec("tests.families"):
    from tests.families import families_line, families_page

    BLOCKS["families"] = families_line
    PAGES["families"] = families_page


def wanted() -> dict[Path, str]:
    """Each file that holds a table, as it ought to be."""
    readme = (ROOT / "README.md").read_text()
    for name, block in BLOCKS.items():
        readme = placed(readme, name, block())
    pages = {ROOT / "docs" / f"{name}.md": page() for name, page in PAGES.items()}
    return {ROOT / "README.md": readme, **pages}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.tables", description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="put the tables where they belong")
    mode.add_argument("--check", action="store_true", help="fail if other tables are there")
    options = parser.parse_args(arguments)
    for path, text in wanted().items():
        if options.write:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        elif not options.check:
            print(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"{path.relative_to(ROOT)} differs: `python -m tests.tables --write`")


if __name__ == "__main__":
    main()
