"""The encode suite: a table of encode, and one of decode."""

from __future__ import annotations

from statistics import median

from .common import Case, circumstances, duration, percent, ratios, spread, table

HEADINGS = {
    "encode": {"eager": "linear + topk", "linear": "F.linear", "topk": "topk alone"},
    "decode": {"bag": "embedding_bag", "dense": "dense product"},
}


def render(result: dict, everything: bool = False) -> str:
    """Markdown of one recorded result; `everything` adds what only the whole grid has, and each
    ratio's spread."""
    cases = [case for case in result["cases"] if everything or case["short"]]
    agree = min(share for case in cases for share in case["agreement"].values())
    legend = (
        f"{cases[0]['dtype']}, d={cases[0]['d']}, N={cases[0]['N']}; T tokens a call, k live "
        "latents, planted activations. Medians of shuffled rounds, in parentheses the worst round. "
        "linear + topk and embedding_bag are what sparsify runs on a CPU. Verified first: encode "
        "gives the k largest of fp64 but for the error of fp32 sums, decode is rounded once; the "
        f"others agree within 2 % on at least {percent(agree)} of the tokens."
    )
    tables = [
        _table(op, [case for case in cases if case["op"] == op], everything) for op in HEADINGS
    ]
    return "\n\n".join([*filter(None, tables), legend, circumstances(result["machine"])])


def _table(op: str, cases: list[Case], everything: bool) -> str:
    if not cases:
        return ""
    header = [f"{op}, T", "k", "ours", *(f"{heading} / ours" for heading in HEADINGS[op].values())]
    rows = [
        [
            str(case["T"]),
            str(case["k"]),
            duration(median(case["seconds"]["ours"])),
            *(spread(ratios(case, name), everything) for name in HEADINGS[op]),
        ]
        for case in cases
    ]
    return table(header, rows)
