"""Turns recorded results into tables: `python -m bench.report [--write | --check]`.

Without an option the newest result is printed as Markdown; --write puts it into README.md between
its markers, --check fails unless it is there already.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from . import miniature

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
BLOCKS: dict[str, Callable[[Path], str]] = {
    "bench:op": lambda results: render(newest(results)),
    "demo": miniature.demo,
    "mini": lambda _: miniature.mini(),
}
"""What README.md holds between `<!-- name -->` and `<!-- /name -->`, from the stored results."""

Case = dict
PEERS = ("naive", "lean", "smart")
BASELINES = (*PEERS, "linear", "copy")
HEADINGS = {"linear": "F.linear", "copy": "copy of x"}


def ratios(case: Case, name: str) -> list[float]:
    """How many times as long as ours, round by round."""
    seconds = case["seconds"]
    return [theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True)]


@dataclass(frozen=True)
class Target:
    """A bound on a number that each round of some cases has; the worst case's median decides."""

    text: str
    applies: Callable[[Case], bool]
    measure: Callable[[Case], list[float]]
    bound: float
    floor: float | None = None
    at_least: bool = True
    unit: str = "×"

    def judge(self, cases: Iterable[Case]) -> list[str] | None:
        """Cells of its row, or None if no case has been measured."""
        found = [(median(values := self.measure(c)), c, values) for c in cases if self.applies(c)]
        if not found:
            return None
        value, case, rounds = (min if self.at_least else max)(found, key=lambda each: each[0])
        met = value >= self.bound if self.at_least else value <= self.bound
        verdict = "met" if met else "**missed**"
        if not met and self.floor is not None and value >= self.floor:
            verdict += f", floor of {self.floor:g}{self.unit} met"
        sign = "≥" if self.at_least else "≤"
        worst = (min if self.at_least else max)(rounds)
        measured = f"{number(value)}{self.unit} (worst round {number(worst)}, at T={case['T']})"
        return [f"{self.text} {sign} {self.bound:g}{self.unit}", measured, verdict]


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


def number(value: float) -> str:
    """Three significant digits, two below 1."""
    if value == 0:
        return "0"
    digits = (3 if abs(value) >= 1 else 2) - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):.{max(digits, 0)}f}"


def duration(seconds: float) -> str:
    unit, name = ((1e6, "µs"), (1e3, "ms"), (1, "s"))[(seconds >= 1e-3) + (seconds >= 1)]
    return f"{number(seconds * unit)} {name}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _row(case: Case, everything: bool) -> list[str]:
    def cell(name: str) -> str:
        values = ratios(case, name)
        low, _, high = quantiles(values, n=4)
        spread = f", IQR {number(high - low)}" if everything else ""
        return f"{number(median(values))}× ({number(min(values))}{spread})"

    percent = [f"{100 * case[name]:.3g} %" for name in ("undecided", "live", "work", "read")]
    name = [case["workload"], case["dtype"], str(case["T"]), str(case["F"])]
    return [*name, duration(median(case["seconds"]["ours"])), *map(cell, BASELINES), *percent]


def render(result: dict, everything: bool = False) -> str:
    """Markdown of one recorded result; `everything` adds each ratio's spread."""
    cases = result["cases"]
    headings = [f"{HEADINGS.get(name, name)} / ours" for name in BASELINES]
    header = ["workload", "dtype", "T", "F", "ours", *headings, "undecided", "live", "work", "read"]
    judged = [cells for target in TARGETS if (cells := target.judge(cases))]
    return "\n\n".join(
        [
            table(header, [_row(case, everything) for case in cases]),
            _legend(cases, everything),
            table(["target", "measured", ""], judged),
            _circumstances(result["machine"]),
        ]
    )


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


def _circumstances(machine: dict) -> str:
    state = " with changes" if machine["dirty"] else ""
    return (
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['instructions']}; PyTorch {machine['torch']}; commit {machine['commit']}"
        f"{state}; {machine['date'][:10]}."
    )


def save(result: dict, folder: Path) -> Path:
    """Stores a result, a case a line, under its suite and date."""
    lines = ",\n".join(json.dumps(case) for case in result["cases"])
    head = json.dumps({key: value for key, value in result.items() if key != "cases"}, indent=1)
    date = result["machine"]["date"][:19].replace(":", "-")
    path = folder / f"{result['suite']}-{date}.json"
    folder.mkdir(exist_ok=True)
    path.write_text(f'{head[:-2]},\n "cases": [\n{lines}\n]}}\n')
    return path


def newest(folder: Path) -> dict:
    """The result with the latest date; FileNotFoundError if there is none."""
    results = [json.loads(path.read_text()) for path in folder.glob("op-*.json")]
    if not results:
        raise FileNotFoundError(
            "bench/results holds no result: `python -m pytest bench --record` stores one"
        )
    return max(results, key=lambda result: result["machine"]["date"])


def placed(readme: str, name: str, block: str) -> str:
    """readme with block between its markers; ValueError if it has not one of each, in order."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, begin, rest = readme.partition(opening)
    _, end, after = rest.partition(closing)
    if not (begin and end):
        raise ValueError(f"README.md: the markers {opening} and {closing} are missing")
    return f"{before}{opening}\n{block}\n{closing}{after}"


def main(
    arguments: list[str] | None = None,
    results: Path = RESULTS,
    readme: Path = ROOT / "README.md",
) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="put the tables into README.md")
    mode.add_argument("--check", action="store_true", help="fail if README.md holds other tables")
    options = parser.parse_args(arguments)
    try:
        blocks = {name: rendered(results) for name, rendered in BLOCKS.items()}
        if not (options.write or options.check):
            print("\n\n".join(blocks.values()))
            return
        text = wanted = readme.read_text()
        for name, block in blocks.items():
            wanted = placed(wanted, name, block)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    if options.write:
        readme.write_text(wanted)
    elif text != wanted:
        sys.exit("README.md differs from the stored results: `python -m bench.report --write`")


if __name__ == "__main__":
    main()
