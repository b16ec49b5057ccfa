"""The op suite's workloads: how much of W_enc their tokens need, and how that is spread."""

from __future__ import annotations

from .common import Case, percent, shapes, table

ORDERS = ("", ", hot-first")
"""Of the latents, as a workload and its shares are named."""
SPREAD = {
    "99 % need at most": ("all", "p99"),
    "most": ("all", "max"),
    "half of the undecided need at most": ("undecided", "median"),
    "99 % of them": ("undecided", "p99"),
}


def render(result: dict) -> str:
    """Markdown of the short set, empty if that did not run; without `spread`, as it was recorded
    before there was one, it has means alone."""
    cases = _one_each([case for case in result["cases"] if case.get("short", True)])
    if not cases:
        return ""
    spread = any("spread" in case for case in cases)
    header = ["workload", "dtype", "F", "undecided", "live", "W_enc needed, mean"]
    header += ["undecided tokens", *SPREAD] if spread else []
    rows = [
        _row(case, order, spread) for case in cases for order in ORDERS if f"work{order}" in case
    ]
    legend = (
        f"{shapes(cases)} F edited latents. undecided, live: of the (token, latent) pairs, those "
        "above zero and those among the k largest. W_enc needed: the share of its rows that are "
        "counted until a token is decided, by fp64: none where no edited latent is above zero, "
        "all where one is live. hot-first: with the latents stored first that are live most often."
    )
    return f"{table(header, rows)}\n\n{legend}"


def _one_each(cases: list[Case]) -> list[Case]:
    """Of each workload the case with the fewest tokens a call, which leaves out no token."""
    found: dict[tuple, Case] = {}
    for case in cases:
        key = case["workload"], case["dtype"], case["F"]
        found[key] = min(found.get(key, case), case, key=lambda each: each["T"])
    return [*found.values()]


def _row(case: Case, order: str, spread: bool) -> list[str]:
    name = [f"{case['workload']}{order}", case["dtype"], str(case["F"])]
    means = [percent(case[each]) for each in ("undecided", "live", f"work{order}")]
    if not spread:
        return [*name, *means]
    of = case.get(f"spread{order}", {"all": {}, "undecided": {}})
    tokens = [str(of[each].get("tokens", "—")) for each in ("undecided", "all")]
    needed = (of[which].get(at) for which, at in SPREAD.values())
    cells = ["—" if share is None else percent(share) for share in needed]
    return [*name, *means, " of ".join(tokens), *cells]
