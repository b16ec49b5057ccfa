"""The memory suite: bytes beyond inputs and output, and the target."""

from __future__ import annotations

from .common import Case, Target, circumstances, judged, number, percent, table
from .contestants import BASELINES


def size(bytes_: float) -> str:
    unit, name = (2**20, "MiB") if bytes_ >= 2**20 else (2**10, "KiB")
    return f"{number(bytes_ / unit)} {name}"


def allowed(case: Case) -> int:
    return 2**20 + 64 * case["T"]


TARGETS = (
    Target(
        "any T: ours / (1 MiB + 64 bytes a token)",
        lambda case: True,
        lambda case: [case["bytes"]["ours"] / allowed(case)],
        1,
        at_least=False,
    ),
)


def render(result: dict, everything: bool = False) -> str:
    """Markdown of one recorded result; `everything` adds what only the whole grid has."""
    cases = [case for case in result["cases"] if everything or case["short"]]
    header = ["workload", "dtype", "T", "ours", "allowed", *BASELINES, "undecided"]
    shape = ", ".join(f"{name}={cases[0][name]}" for name in ("d", "N", "k", "F"))
    legend = (
        f"{shape}; T tokens a call. The most that one call holds at once beyond its inputs and its "
        "output: every malloc, operator new and PyTorch allocation of the process is counted, and "
        "what earlier calls of fewer tokens kept. Same tokens as in the tables of times, verified "
        "like there."
    )
    return "\n\n".join(
        [
            table(header, [_row(case) for case in cases]),
            legend,
            judged(TARGETS, result["cases"]),
            circumstances(result["machine"]),
        ]
    )


def _row(case: Case) -> list[str]:
    bytes_ = case["bytes"]
    name = [case["workload"], case["dtype"], str(case["T"])]
    ours = [size(bytes_["ours"]), size(allowed(case))]
    return [*name, *ours, *(size(bytes_[each]) for each in BASELINES), percent(case["undecided"])]
