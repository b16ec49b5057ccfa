"""What README and docs/ say of the tests: `python -m tests.tables [--write | --check]` puts it
there, or fails unless it is there already.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import report
from bench.tables import gpu
from saesteer_fast import ops
from tests.families import FAMILIES
from tests.faults import faults_page
from tests.support import support_table

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def families_line() -> str:
    """docs/usage.md's list of the model families that are tried."""
    names = "; ".join(family.name for family in FAMILIES)
    return f"Tried in tiny against a plain hook ([families.md](families.md)): {names}."


def families_page() -> str:
    """docs/families.md."""
    lines = [
        "# Model families",
        "",
        "Each is built in tiny, with random weights, by transformers, and steered at decoder layer "
        "1: in one call, in `generate`, and in padded batches it gives what a plain hook gives "
        "(`tests/test_families.py`).",
        "",
        "| family | class | layer 1 | |",
        "| --- | --- | --- | --- |",
        *(f"| {f.name} | `{f.model}` | `{f.layer}` | {f.notes} |" for f in FAMILIES),
    ]
    return "\n".join(lines) + "\n"


def support() -> str:
    return support_table(gpu.standing(report.latest(report.RESULTS, "gpu")))


def devices_table() -> str:
    """README's table of what impl="auto" runs, by device."""
    shown = {"reference": "plain PyTorch, `saesteer_fast/reference.py`"}
    rows = []
    for least, impls in ops._ON_GPU:
        named = ", else ".join(shown.get(impl, f"`{impl}`") for impl in impls)
        rows.append(f"from {least} tokens on {named}" if least else named)
    return "\n".join(
        [
            "| device | what runs |",
            "|---|---|",
            "| CPU | compiled kernels: AMX, AVX-512 BF16, AVX-512, AVX2 or plain C++ (all there is on "
            "Arm), chosen at run time; any mix of fp32, bf16, fp16 |",
            "| GPU | the CUDA or Triton kernels that `saesteer verify` has found right and fastest "
            f"on it; until then {'; '.join(rows)} |",
        ]
    )


BLOCKS = {
    "README.md": {"devices": devices_table},
    "docs/usage.md": {"families": families_line, "support": support},
}
"""What each page holds between `<!-- name -->` and `<!-- /name -->`."""
PAGES = {"docs/faults.md": lambda: faults_page(TESTS), "docs/families.md": families_page}
"""Pages that are nothing else."""


def wanted() -> dict[Path, str]:
    """Each file that holds a table, as it ought to be."""
    filled = {
        ROOT / page: report.filled(ROOT / page, {name: block() for name, block in blocks.items()})
        for page, blocks in BLOCKS.items()
    }
    return {**filled, **{ROOT / page: made() for page, made in PAGES.items()}}


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
