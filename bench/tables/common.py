"""How every table writes numbers, ratios, targets and what was measured on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median, quantiles

Case = dict
TARGET_HEADER = ["target", "measured", ""]


def number(value: float) -> str:
    """Three significant digits, two below 1."""
    if value == 0:
        return "0"
    digits = (3 if abs(value) >= 1 else 2) - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):.{max(digits, 0)}f}"


def duration(seconds: float) -> str:
    unit, name = ((1e6, "µs"), (1e3, "ms"), (1, "s"))[(seconds >= 1e-3) + (seconds >= 1)]
    return f"{number(seconds * unit)} {name}"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def of_tokens(share: float) -> str:
    """On how many of them at least, for a sentence."""
    return "on every token" if share == 1 else f"on at least {percent(share)} of the tokens"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def shapes(cases: list[Case]) -> str:
    """Of all workloads, and of the real one where that is another."""
    told = {
        each["workload"] == "real": [f"{n}={each[n]}" for n in ("d", "N", "k")] for each in cases
    }
    said = [f"{'real: ' * real}{', '.join(shape)}" for real, shape in sorted(told.items())]
    return f"{'; '.join(said)};"


def ratios(case: Case, name: str, base: str = "ours") -> list[float]:
    """How many times as long as `base`, round by round."""
    seconds = case["seconds"]
    return [theirs / ours for theirs, ours in zip(seconds[name], seconds[base], strict=True)]


def least_to_most(values: list[float], unit: str = "") -> str:
    """Median and, in parentheses, the least and the most."""
    middle, *ends = (number(each) for each in (median(values), min(values), max(values)))
    return f"{middle}{unit} ({' to '.join(ends)})"


def spread(values: list[float], everything: bool = False) -> str:
    """Median and, in parentheses, the least; `everything` adds the interquartile range."""
    low, _, high = quantiles(values, n=4)
    more = f", IQR {number(high - low)}" if everything else ""
    return f"{number(median(values))}× ({number(min(values))}{more})"


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

    @property
    def title(self) -> str:
        return f"{self.text} {'≥' if self.at_least else '≤'} {self.bound:g}{self.unit}"

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
        worst = (min if self.at_least else max)(rounds)
        measured = f"{number(value)}{self.unit} (worst round {number(worst)}, at T={case['T']})"
        return [self.title, measured, verdict]


def judged(targets: Iterable[Target], cases: list[Case]) -> str:
    """The table of all targets that have been measured."""
    rows = [cells for target in targets if (cells := target.judge(cases))]
    return table(TARGET_HEADER, rows)


def circumstances(machine: dict, more: str | None = None) -> str:
    """The line below every table: device, threads or what `more` says, versions, commit, day."""
    state = " with changes" if machine["dirty"] else ""
    packages = machine.get("packages", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    if more is None:
        more = f"{machine['cores']} cores, {machine['threads']} threads, {machine['instructions']}"
    return (
        f"{machine['device']}, {more}; "
        f"PyTorch {machine['torch']}{versions and f', {versions}'}; "
        f"commit {machine['commit']}{state}; {machine['date'][:10]}."
    )
