"""The op suite: ours against every baseline, and the targets."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from . import growth, workloads
from .common import (
    Case,
    Target,
    circumstances,
    duration,
    judged,
    of_tokens,
    percent,
    ratios,
    shapes,
    spread,
    table,
)
from .contestants import BASELINES, HEADINGS, LIBRARIES, PEERS, best, compiled

SHAPE = {"d": 3072, "N": 24576, "k": 32}
"""What the targets are set for."""


def least(case: Case, *names: str) -> list[float]:
    """Round by round, how many times as long as ours the fastest of those measured took."""
    found = [ratios(case, each) for name in names if (each := best(case, name))]
    return [min(each) for each in zip(*found, strict=True)]


def _over_bound(case: Case) -> list[float]:
    s = case["seconds"]
    return [o / (a + b) for o, a, b in zip(s["ours"], s["L0"], s["read"], strict=True)]


def _beyond_nothing(case: Case) -> list[float]:
    s = case["seconds"]
    return [1e6 * (a - b) for a, b in zip(s["L0"], s["nothing"], strict=True)]


def _is(workload: str, T: int | None = None) -> Callable[[Case], bool]:
    wanted = {"workload": workload, "dtype": "bf16", "F": 1, **SHAPE}
    return lambda case: wanted.items() <= case.items() and T in (None, case["T"])


TARGETS = (
    Target("T=1 planted: naive / ours", _is("planted", 1), lambda c: least(c, "naive"), 300, 150),
    Target(
        "T=1 planted: faster of lean and sparsify / ours",
        _is("planted", 1),
        lambda c: least(c, "lean", "sparsify"),
        80,
    ),
    Target(
        "T=1, ends at L0: ours − an op that does nothing",
        _is("planted", 1),
        _beyond_nothing,
        10,
        at_least=False,
        unit=" µs",
    ),
    Target(
        "T=512, ends at L0: ours / copy of x",
        _is("planted", 512),
        lambda c: ratios(c, "L0", "copy"),
        2,
        at_least=False,
    ),
    Target("T=512 planted: naive / ours", _is("planted", 512), lambda c: least(c, "naive"), 40, 20),
    Target(
        "T=512 planted: faster of lean and sparsify / ours",
        _is("planted", 512),
        lambda c: least(c, "lean", "sparsify"),
        12,
    ),
    Target(
        "T=512 planted: ours / (L0 + one read of W_enc)",
        _is("planted", 512),
        _over_bound,
        1.3,
        at_least=False,
    ),
    Target(
        "T=1 worst: one read of W_enc / ours", _is("worst", 1), lambda c: ratios(c, "read"), 0.85
    ),
    Target("any T, worst: naive / ours", _is("worst"), lambda c: least(c, "naive"), 3, 2),
    Target("any T, worst: fastest peer / ours", _is("worst"), lambda c: least(c, *PEERS), 1),
    Target(
        "any T, worst: ours / F.linear",
        _is("worst"),
        lambda c: [1 / ratio for ratio in ratios(c, "linear")],
        1.05,
        at_least=False,
    ),
)


def render(result: dict, everything: bool = False) -> str:
    """Markdown of one recorded result: the short set, the faster of each baseline and its compiled
    self. `everything` adds the other cases, every contestant, each ratio's spread and the slopes.
    """
    cases = [c for c in result["cases"] if everything or c.get("short", True)]
    shown = (*PEERS, "linear", "copy")
    if everything:
        baselines = *BASELINES, *map(compiled, BASELINES)
        shown = ("hot-first", "reference", *baselines, *LIBRARIES, "linear", "copy")
    shown = [name for name in shown if any(name in case["seconds"] for case in cases)]
    shares = ("undecided", "read")
    if everything:
        shares = ("undecided", "live", "work", "work, hot-first", "read", "read, hot-first")
    shape = ("d", "N", "k") if everything else ()
    headings = [f"{HEADINGS.get(name, name)} / ours" for name in shown]
    header = ["workload", "dtype", "T", "F", *shape, "ours", *headings, *shares]
    rows = [
        [str(case[name]) for name in ("workload", "dtype", "T", "F", *shape)]
        + [duration(median(case["seconds"]["ours"]))]
        + [_compared(case, name, everything) for name in shown]
        + [percent(case[name]) if name in case else "" for name in shares]
        for case in cases
    ]
    parts = [table(header, rows), _legend(cases, everything)]
    if any(target.applies(case) for target in TARGETS for case in result["cases"]):
        parts.append(judged(TARGETS, result["cases"]))  # of those that are not shown too
    if everything and growth.series(cases):
        parts.append(growth.slopes(cases))
    if everything:
        parts.append(workloads.render(result))
    return "\n\n".join([*filter(None, parts), circumstances(result["machine"])])


def _compared(case: Case, name: str, everything: bool) -> str:
    chosen = name if everything else best(case, name)
    if chosen not in case["seconds"]:
        return "not run" if name in case.get("not_run", {}) else "—"
    mark = " c" if chosen != name else ""
    return spread(ratios(case, chosen), everything) + mark


def _legend(cases: list[Case], everything: bool) -> str:
    agree = min(share for case in cases for share in case["agreement"].values())
    close = max(case["close"] for case in cases)
    but = f", but for {close} inside the error of fp32 sums" if close else ""
    says = ["T tokens a call, F edited latents."]
    if not everything:
        says = [shapes(cases), *says]
    more = " and the interquartile range" if everything else ""
    says.append(
        f"Times and ratios are medians of shuffled rounds, in parentheses the worst round{more}."
    )
    if not everything and any(compiled(n) in c["seconds"] for c in cases for n in BASELINES):
        says.append("c: under torch.compile it was faster, and that is shown.")
    says.append("undecided: share of the (token, latent) pairs above zero;")
    if everything:
        says.append("live: of those among the k largest; work: needed of an encoder pass;")
        says.append("hot-first: ours, with the latents stored that are live most often first;")
    says.append(
        "read: how much of W_enc a call reads. Verified first: on all that is timed ours decides "
        f"every pair as fp64 does{but}; on 128 tokens of it each baseline agrees within 2 % of "
        f"|x'| {of_tokens(agree)}."
    )
    if absent := [name for name in LIBRARIES[:2] if not any(name in c["seconds"] for c in cases)]:
        names = " and ".join(HEADINGS.get(name, name) for name in absent)
        says.append(f"Not installed, and so in no target: {names}.")
    if reasons := {each for case in cases for each in case.get("not_run", {}).values()}:
        says.append(f"Not run: {'; '.join(sorted(reasons))}.")
    return " ".join(says)
