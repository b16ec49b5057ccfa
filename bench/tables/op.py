"""The op suite: ours against every baseline, and the targets."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from .common import (
    Case,
    Target,
    circumstances,
    duration,
    judged,
    percent,
    ratios,
    spread,
    table,
)

PEERS = ("naive", "lean", "smart")
BASELINES = (*PEERS, "linear", "copy")
HEADINGS = {"linear": "F.linear", "copy": "copy of x"}


def _over_bound(case: Case) -> list[float]:
    s = case["seconds"]
    return [o / (a + b) for o, a, b in zip(s["ours"], s["L0"], s["read"], strict=True)]


def _beyond_nothing(case: Case) -> list[float]:
    s = case["seconds"]
    return [1e6 * (a - b) for a, b in zip(s["L0"], s["nothing"], strict=True)]


def _fastest_peer(case: Case) -> list[float]:
    return [min(each) for each in zip(*(ratios(case, name) for name in PEERS), strict=True)]


def _is(workload: str, T: int | None = None) -> Callable[[Case], bool]:
    def applies(case: Case) -> bool:
        return (case["workload"], case["dtype"], case["F"]) == (workload, "bf16", 1) and T in (
            None,
            case["T"],
        )

    return applies


TARGETS = (
    Target("T=1 planted: naive / ours", _is("planted", 1), lambda c: ratios(c, "naive"), 300, 150),
    Target("T=1 planted: lean / ours", _is("planted", 1), lambda c: ratios(c, "lean"), 80),
    Target(
        "T=1, ends at L0: ours − an op that does nothing",
        _is("planted", 1),
        _beyond_nothing,
        10,
        at_least=False,
        unit=" µs",
    ),
    Target(
        "T=512 planted: naive / ours", _is("planted", 512), lambda c: ratios(c, "naive"), 40, 20
    ),
    Target("T=512 planted: lean / ours", _is("planted", 512), lambda c: ratios(c, "lean"), 12),
    Target(
        "T=512 planted: ours / (L0 + one read of W_enc)",
        _is("planted", 512),
        _over_bound,
        1.3,
        at_least=False,
    ),
    Target("any T, worst: naive / ours", _is("worst"), lambda c: ratios(c, "naive"), 3, 2),
    Target("any T, worst: fastest peer / ours", _is("worst"), _fastest_peer, 1),
    Target(
        "any T, worst: ours / F.linear",
        _is("worst"),
        lambda c: [1 / ratio for ratio in ratios(c, "linear")],
        1.05,
        at_least=False,
    ),
)


def render(result: dict, everything: bool = False) -> str:
    """Markdown of one recorded result; `everything` adds each ratio's spread."""
    cases = result["cases"]
    headings = [f"{HEADINGS.get(name, name)} / ours" for name in BASELINES]
    header = ["workload", "dtype", "T", "F", "ours", *headings, "undecided", "live", "work", "read"]
    return "\n\n".join(
        [
            table(header, [_row(case, everything) for case in cases]),
            _legend(cases, everything),
            judged(TARGETS, cases),
            circumstances(result["machine"]),
        ]
    )


def _row(case: Case, everything: bool) -> list[str]:
    shares = [percent(case[name]) for name in ("undecided", "live", "work", "read")]
    name = [case["workload"], case["dtype"], str(case["T"]), str(case["F"])]
    compared = [spread(ratios(case, name), everything) for name in BASELINES]
    return [*name, duration(median(case["seconds"]["ours"])), *compared, *shares]


def _legend(cases: list[Case], everything: bool) -> str:
    shape = ", ".join(f"{name}={cases[0][name]}" for name in ("d", "N", "k"))
    spread = " and the interquartile range" if everything else ""
    close = max(case["close"] for case in cases)
    but = f", but for {close} inside the error of fp32 sums" if close else ""
    agree = 100 * min(share for case in cases for share in case["agreement"].values())
    return (
        f"{shape}; T tokens a call, F edited latents. Times and ratios are medians of shuffled "
        f"rounds, in parentheses the worst round{spread}. undecided, live: shares of the (token, "
        "latent) pairs above zero, and among the k largest; work: what the decisions need of an "
        "encoder pass; read: how much of W_enc a call reads. Verified first, on the same inputs: "
        f"ours decides every pair as fp64 does{but}; each baseline agrees within 2 % of |x'| on "
        f"at least {agree:.3g} % of the tokens."
    )
