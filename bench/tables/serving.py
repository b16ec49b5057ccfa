"""The serving suite: what vLLM does unsteered, and what each way to steer adds, in percent."""

from __future__ import annotations

from statistics import median

from .common import Case, circumstances, duration, number, percent, table
from .model import added

MODELS = {"miniature": "miniature", "phi3": "Phi-3 Mini"}
RUNS = {"prompt": "prompts", "decode": "a token each"}
COLUMNS = {
    "again": "unsteered again",
    "ours": "ours",
    "table": "ours, a table",
    "naive": "naive",
}


def render(result: dict, everything: bool = False) -> str:
    """Markdown of one recorded result; `everything` changes nothing."""
    cases = result["cases"]
    header = ["model", "vLLM", "requests", "a step of", "unsteered", *COLUMNS.values()]
    header.insert(5, "tokens/s")
    engine = cases[0]["engine"]
    legend = (
        f"{_models(cases)}. Requests begin together, with prompts of {_prompt(cases)} tokens: all "
        "of these are one step, and then each step gives every request a token. ours: one "
        "configuration, the scope all; a table: three of them, chosen by requests in turn, the "
        "scope generated; naive: a forward hook with the textbook path. Per cent more time than "
        "unsteered, medians of shuffled rounds, in parentheses the least and the most; unsteered "
        "again, an engine of its own like all, tells how much of that is noise. "
        f"{_time(result)} Verified first: {_verified(cases)}."
    )
    versions = f"vLLM {engine['vllm']} with PyTorch {engine['torch']}"
    lines = [table(header, [_row(case) for case in cases]), legend]
    return "\n\n".join([*lines, f"{versions}; {circumstances(result['machine'])}"])


def _row(case: Case) -> list[str]:
    seconds = median(case["seconds"]["unsteered"])
    what = [MODELS[case["model"]], case["mode"], str(case["requests"]), RUNS[case["run"]]]
    base = [duration(seconds), number(case["T"] / seconds)]
    return [*what, *base, *(added(case, name) for name in COLUMNS)]


def _models(cases: list[Case]) -> str:
    """Each with its sizes, in the order of the rows."""
    first = {case["model"]: case for case in reversed(cases)}
    told = []
    for name in dict.fromkeys(case["model"] for case in cases):
        case = first[name]
        sizes = ", ".join(f"{size}={case[size]}" for size in ("d", "N", "k"))
        told.append(
            f"{MODELS[name]}: {case['layers']} layers, steered after layer {case['layer']}, "
            f"{sizes}, bf16, {percent(case['undecided'])} of the tokens undecided"
        )
    return "; ".join(told)


def _prompt(cases: list[Case]) -> int:
    (length,) = {case["T"] // case["requests"] for case in cases if case["run"] == "prompt"}
    return length


def _time(result: dict) -> str:
    if result["machine"]["cores"] == 1:
        return "Times are CPU time."
    taken = max(case["others"] for case in result["cases"])
    return f"Other processes took at most {percent(taken)} of the cores."


def _verified(cases: list[Case]) -> str:
    """By the worst of all engines."""
    pairs = [pair for case in cases for pair in case["scores"].values()]
    error = max(error for error, _ in pairs)
    moved = min(moved for _, moved in pairs if moved)
    return (
        f"log-probabilities of the tokens that were drawn are {number(error)} off those of "
        f"transformers at most (root mean square), where steering moves them by {number(moved)} at "
        "least"
    )
