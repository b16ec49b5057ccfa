"""What README and docs/ say of the tests, as Markdown."""

from __future__ import annotations

from pathlib import Path

from bench import report
from bench.tables import gpu
from saesteer_fast import choice
from tests.families import FAMILIES
from tests.support import support_table


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


def support(results: Path) -> str:
    """docs/usage.md's table of what is supported."""
    return support_table(gpu.standing(report.latest(results, "gpu")))


def devices_table() -> str:
    """README's table of what impl="auto" runs, by device."""
    shown = {"reference": "plain PyTorch, `saesteer_fast/reference.py`"}
    rows = []
    for least, impls in choice.ON_GPU:
        named = ", else ".join(shown.get(impl, f"`{impl}`") for impl in impls)
        rows.append(f"from {least} tokens on {named}" if least else named)
    return "\n".join(
        [
            "| device | what runs |",
            "|---|---|",
            "| CPU | compiled kernels: AMX, AVX-512 BF16, AVX-512, AVX2 or plain C++ (all there is "
            "on Arm), chosen at run time; any mix of fp32, bf16, fp16 |",
            "| GPU | the CUDA or Triton kernels that `saesteer verify` has found right and fastest "
            f"on it; until then {'; '.join(rows)} |",
        ]
    )
