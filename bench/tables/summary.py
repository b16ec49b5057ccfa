"""What README says of the benchmarks: a few rows of the op suite, and a line each of the others."""

from __future__ import annotations

from statistics import median

from .common import Case, circumstances, duration, number, percent, ratios, shapes, table
from .contestants import BASELINES, HEADINGS, LIBRARIES, best
from .memory import size
from .model import added
from .op import TARGETS

SHOWN = {"dtype": "bf16", "F": 1}
OTHERS = (*BASELINES, *LIBRARIES[:2], "linear")


def render(op: dict, model: dict | None, memory: dict | None) -> str:
    """Markdown of the suites' recorded results."""
    lines = [_targets(op), model and _model(model), memory and _memory(memory)]
    return f"{_op(op)}\n\n{_listed(lines)}"


def elsewhere(results: list[dict]) -> str:
    """The same of the op's results alone, of other processors."""
    said = [f"{_op(result)}\n\n{_listed([_targets(result)])}" for result in results]
    return "\n\n".join(said) or "No other run of the op is recorded."


def _listed(lines: list[str | None]) -> str:
    return "\n".join(f"- {line}" for line in lines if line)


def _op(result: dict) -> str:
    cases = [c for c in result["cases"] if c.get("short", True) and SHOWN.items() <= c.items()]
    legend = (
        f"{shapes(cases)} bf16, one edited latent; tokens of one call; medians. undecided: the "
        f"share of tokens that the first rung leaves open. {circumstances(result['machine'])}"
    )
    return f"{_times_of(cases)}\n\n{legend}"


def _times_of(cases: list[Case]) -> str:
    headings = [f"{HEADINGS.get(name, name)} / ours" for name in OTHERS]
    rows = [
        [case["workload"], str(case["T"]), duration(median(case["seconds"]["ours"]))]
        + [_times(case, name) for name in OTHERS]
        + [percent(case["undecided"])]
        for case in cases
    ]
    return table(["workload", "tokens", "ours", *headings, "undecided"], rows)


def _times(case: Case, name: str) -> str:
    chosen = best(case, name)
    return f"{number(median(ratios(case, chosen)))}×" if chosen else "—"


def _targets(result: dict) -> str:
    judged = [cells for each in TARGETS if (cells := each.judge(result["cases"]))]
    missed = [title for title, _, verdict in judged if verdict != "met"]
    over = f"{len(judged)} targets of the op in docs/benchmarks.md, by the median of every case"
    return f"Missed of {over}: {'; '.join(missed)}." if missed else f"Met: all {over}."


def _model(result: dict) -> str:
    """Next to what differs when nothing is attached."""
    said = [
        f"{case['run']} {added(case, 'ours')}, naive {added(case, 'naive')}, and unsteered once "
        f"more {added(case, 'again')}, which is the noise"
        for case in result["cases"]
    ]
    layers, machine = result["cases"][0]["layers"], result["machine"]
    return (
        f"Time added to Phi-3 Mini ({layers} of 32 layers, random weights, {machine['device']}, "
        f"{machine['cores']} cores; in parentheses the least and the most): {'; '.join(said)}."
    )


def _memory(result: dict) -> str:
    ours, naive = (max(c["bytes"][name] for c in result["cases"]) for name in ("ours", "naive"))
    return f"Memory beyond inputs and output: at most {size(ours)}; naive up to {size(naive)}."
