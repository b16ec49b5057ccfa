"""The encode suite: a table of encode, and one of decode."""

from __future__ import annotations

from statistics import median

from .common import Case, circumstances, duration, of_tokens, ratios, spread, table

HEADINGS = {
    "encode": {
        "sparsify": "sparsify",
        "eager": "linear + topk",
        "linear": "F.linear",
        "topk": "topk alone",
    },
    "decode": {"sparsify": "sparsify", "bag": "embedding_bag", "dense": "dense product"},
}


def render(result: dict, everything: bool = False) -> str:
    """Markdown of one recorded result; `everything` adds what only the whole grid has, and each
    ratio's spread."""
    cases = [case for case in result["cases"] if everything or case["short"]]
    agree = min(share for case in cases for share in case["agreement"].values())
    ran = any("sparsify" in case["seconds"] for case in cases)
    absent = "" if ran else "; sparsify itself was not installed"
    legend = (
        f"{cases[0]['dtype']}, d={cases[0]['d']}, N={cases[0]['N']}; T tokens a call, k live "
        "latents, planted activations. Medians of shuffled rounds, in parentheses the worst round. "
        f"linear + topk and embedding_bag are what sparsify runs on a CPU{absent}. Verified "
        "first: encode gives the k largest of fp64 but for the error of fp32 sums, decode is "
        f"rounded once; the others agree within 2 % {of_tokens(agree)}."
    )
    tables = [
        _table(op, [case for case in cases if case["op"] == op], everything) for op in HEADINGS
    ]
    return "\n\n".join([*filter(None, tables), legend, circumstances(result["machine"])])


def _table(op: str, cases: list[Case], everything: bool) -> str:
    if not cases:
        return ""
    shown = [name for name in HEADINGS[op] if any(name in case["seconds"] for case in cases)]
    header = [f"{op}, T", "k", "ours", *(f"{HEADINGS[op][name]} / ours" for name in shown)]
    rows = [
        [
            str(case["T"]),
            str(case["k"]),
            duration(median(case["seconds"]["ours"])),
            *(spread(ratios(case, name), everything) for name in shown),
        ]
        for case in cases
    ]
    return table(header, rows)
