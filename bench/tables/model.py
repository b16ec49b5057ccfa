"""The model suite: what each way to steer adds to a run, in percent."""

from __future__ import annotations

from statistics import median

from .common import Case, circumstances, duration, least_to_most, of_tokens, percent, ratios, table

COLUMNS = {
    "again": "unsteered again",
    "ours": "ours",
    "worst": "ours, worst",
    "vector": "adding a vector",
    "naive": "naive",
}


def render(result: dict, everything: bool = False) -> str:
    """Markdown of one recorded result; `everything` changes nothing."""
    cases = result["cases"]
    header = ["run", "T", "unsteered", *COLUMNS.values(), "undecided"]
    first = cases[0]
    shape = ", ".join(f"{name}={first[name]}" for name in ("d", "N", "k", "F"))
    legend = (
        f"Phi-3 Mini with random bf16 weights, {first['layers']} of 32 layers, steered at the "
        f"output of layer {first['layer']}; {shape}; decode: one token after a prompt of 512, the "
        "mean of several. Per cent more time than unsteered, medians of shuffled rounds, in "
        "parentheses the least and the most; unsteered again tells how much of that is noise. "
        "undecided: of the steered tokens; worst: a latent that is live for every token. Verified "
        "first: the layer's output is steered, and naive agrees "
        f"{of_tokens(min(case['agreement'] for case in cases))}."
    )
    rows = [_row(case) for case in cases]
    return "\n\n".join([table(header, rows), legend, circumstances(result["machine"])])


def _row(case: Case) -> list[str]:
    base = duration(median(case["seconds"]["unsteered"]))
    more = [added(case, name) for name in COLUMNS]
    return [case["run"], str(case["T"]), base, *more, percent(case["undecided"])]


def added(case: Case, name: str) -> str:
    """Per cent more time than unsteered."""
    values = [100 * (ratio - 1) for ratio in ratios(case, name, "unsteered")]
    return least_to_most(values, " %")
