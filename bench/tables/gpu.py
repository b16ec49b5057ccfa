"""The results of `make gpu`: the op against its floors and its baselines, the targets, what a call
costs the host, a whole model's decode step, and what was checked. A run that ended too soon says
what it lacks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from statistics import median

from .common import (
    TARGET_HEADER,
    Case,
    Target,
    circumstances,
    duration,
    least_to_most,
    number,
    percent,
    ratios,
    spread,
    table,
)
from .contestants import BASELINES, HEADINGS, best
from .memory import allowed
from .model import COLUMNS, added

CASE = re.compile(r"(?P<workload>\w+) T=(?P<T>\d+) F=(?P<F>\d+) (?P<by>.+)")
KERNELS = {"ours": "cuda", "triton": "triton"}
"""The implementation that each contestant of ours runs."""
OP = ("triton", *BASELINES, "linear", "copy")
CALLERS = {
    "ours": '`impl="cuda"`',
    "triton": '`impl="triton"`',
    "reference": '`impl="reference"`',
    "copy": "`x.clone()`",
}
WAYS = ("again", "ours", "worst")
"""Of the model suite's columns, those that a decode step has here."""


# ---- what a run found ----


def found(result: Mapping, step: str):
    """What a step of `measure` found; None if it failed or did not run."""
    return result.get("measure", {}).get(step, {}).get("found")


def machine(result: Mapping) -> dict:
    return (found(result, "machine") or {}) | result["machine"]


def cases(result: Mapping) -> list[Case]:
    """The op's, in the order of F and T, with what failed; all that was planned."""
    missing = {name: {} for name in result.get("missing", {}).get("measure", ())}
    by_case: dict[tuple, Case] = {}
    for name, each in (result.get("measure", {}) | missing).items():
        if not (match := CASE.fullmatch(name)):
            continue
        key = int(match["F"]), match["workload"], int(match["T"])
        case = by_case.setdefault(key, dict(zip(("F", "workload", "T"), key, strict=True)))
        case.setdefault("seconds", {}), case.setdefault("failed", {})
        if "failed" in each:
            case["failed"][match["by"]] = each["failed"]
        elif "found" in each and match["by"] == "case":
            case.update(each["found"])
        elif "found" in each:
            case["seconds"][match["by"]] = each["found"]
    return [by_case[key] for key in sorted(by_case)]


def floors(case: Case, rates: Mapping[str, float]) -> dict[str, float]:
    """Seconds that the op must take for these tokens, by what bounds it: bytes to be moved,
    products, a launch."""
    T, d, N = case["T"], case["d"], case["N"]
    moved = 2 * T * d * 2 + case["read"] * N * d * 2
    multiplied = 2 * T * case["work"] * N * d
    return {
        "bytes": moved / rates["copy"],
        "products": multiplied / rates["product"],
        "launch": rates["launch"],
    }


def mistakes(result: Mapping, *kernels: str) -> list[str]:
    """What was found wrong of `cuda` and `triton`, or of those named; a part that did not run at
    all is wrong too."""
    kernels = kernels or tuple(KERNELS.values())
    parts = {"checks": result.get("checks"), "measure": cases(result)}
    wrong = [part for part, ran in parts.items() if not ran]
    smoked = {_kernel(each) for each in smoke_tests(result)}
    wrong += [f"smoke of {each}" for each in kernels if each not in smoked]
    wrong += [name for name in result if name.endswith(" broke")]
    for name, found_wrong in tried(result).items():
        if _kernel(name) in kernels:
            wrong += found_wrong
    for name, each in result.get("measure", {}).items():
        by = re.search(rf"\b({'|'.join(KERNELS)})\b", name)
        if "failed" in each and by and KERNELS[by[0]] in kernels:
            wrong.append(name)
    return wrong


def tried(result: Mapping) -> dict[str, list[str]]:
    """Of every check and every smoke test, what it found wrong or left out."""
    checks = result.get("checks", {}).items()
    found_wrong = {name: [name] if each["exit"] else [] for name, each in checks}
    for name, each in smoke_tests(result).items():
        wrong = [step for step, of in each.items() if "failed" in of]
        left_out = result["missing"].get(name, ())
        found_wrong[name] = [f"{name}: {step}" for step in (*wrong, *left_out)]
    return found_wrong


def smoke_tests(result: Mapping) -> dict[str, dict]:
    """What each found, by step."""
    return {name: each for name, each in result.items() if name.startswith("smoke ")}


def _kernel(check: str) -> str:
    """Whose check it is, by its name."""
    return "triton" if "triton" in check else "cuda"


def standing(result: Mapping | None) -> str:
    """What a run says of the implementations, for a sentence."""
    if result is None:
        return "**neither has run on a GPU**"
    said = (
        f"`{kernel}` {'**not all right**' if mistakes(result, kernel) else 'right'}"
        for kernel in KERNELS.values()
    )
    return f"on {machine(result).get('device', 'a GPU')} `make gpu` found {' and '.join(said)}"


# ---- targets ----


def _us(by: str):
    return lambda case: [1e6 * each for each in case["seconds"][by]]


def _read(by: str):
    """Bytes of W_enc a second."""
    return lambda case: [case["N"] * case["d"] * 2 / each for each in case["seconds"][by]]


def _over(by: str, base: str):
    return lambda case: ratios(case, by, base)


def _is(workload: str, *tokens: int):
    return lambda case: (
        (case.get("workload"), case.get("F")) == (workload, 1)
        and (not tokens or case["T"] in tokens)
    )


FEW = (1, 8, 64)
TARGETS = (
    Target(
        "T=1 to 64 worst: ours", _is("worst", *FEW), _us("ours"), 55, at_least=False, unit=" µs"
    ),
    Target(
        "T=1 to 64 worst: W_enc, read by ours",
        _is("worst", *FEW),
        lambda case: [each / 1e12 for each in _read("ours")(case)],
        2.75,
        unit=" TB/s",
    ),
    Target(
        "T=8192 worst: ours / F.linear",
        _is("worst", 8192),
        _over("ours", "linear"),
        1.15,
        at_least=False,
    ),
    Target(
        "T=8192 planted: ours / copy of x",
        _is("planted", 8192),
        _over("ours", "copy"),
        3,
        at_least=False,
    ),
    Target(
        "T=1 planted, in a CUDA graph: ours",
        _is("planted", 1),
        _us("ours"),
        4,
        at_least=False,
        unit=" µs",
    ),
    Target(
        "decode step of Phi-3 Mini, in a CUDA graph: ours more than unsteered",
        lambda case: case.get("step") == ("ours", "graph"),
        lambda case: [100 * (ratio - 1) for ratio in ratios(case, "ours", "unsteered")],
        1,
        at_least=False,
        unit=" %",
    ),
    Target(
        "any T, worst: memory of ours / (1 MiB + 64 bytes a token)",
        lambda case: case.get("memory") == "ours",
        lambda case: [case["bytes"] / allowed(case)],
        1,
        at_least=False,
    ),
    Target(
        "T=8192 worst: Triton / F.linear",
        _is("worst", 8192),
        _over("triton", "linear"),
        1.25,
        at_least=False,
    ),
    Target(
        "T=1 to 64 worst: W_enc, read by Triton, of the copy's rate",
        _is("worst", *FEW),
        lambda case: [100 * each / case["rates"]["copy"] for each in _read("triton")(case)],
        85,
        unit=" %",
    ),
    Target(
        "any T, planted: Triton / ours",
        _is("planted"),
        _over("triton", "ours"),
        1.2,
        at_least=False,
    ),
    Target(
        "any T, worst: memory of Triton / (1 MiB + 64 bytes a token)",
        lambda case: case.get("memory") == "triton",
        lambda case: [case["bytes"] / allowed(case)],
        1,
        at_least=False,
    ),
)


def _judged(target: Target, measured: Iterable[Case]) -> list[str]:
    """A target that some of its cases lack is not met."""
    there, lacking = [], []
    for case in filter(target.applies, measured):
        try:
            target.measure(case)
        except KeyError:
            lacking.append(str(case["T"]))
        else:
            there.append(case)
    cells = target.judge(there) or [target.title, "not measured", "open"]
    if lacking and cells[-1] == "met":
        cells[-1] = f"open: not measured at T={', '.join(lacking)}"
    return cells


def _memory(result: Mapping) -> list[Case]:
    return [
        {"memory": by, "T": int(T), "bytes": bytes_}
        for by in KERNELS
        for T, bytes_ in (found(result, f"memory: {by}") or {}).items()
    ]


def _decode_steps(result: Mapping) -> list[Case]:
    return [
        {"step": (by, how), **step}
        for by in KERNELS
        for how in ("graph", "eager")
        if (step := found(result, f"decode step: {by}, {how}"))
    ]


# ---- Markdown ----


def short(result: dict) -> str:
    """What README shows of one recorded result: the op and the targets."""
    return "\n\n".join([*_measured(result, everything=False), _circumstances(result)])


def render(result: dict, everything: bool = False) -> str:
    """Markdown of one recorded result; `everything` adds each ratio's spread."""
    parts = [
        *_measured(result, everything),
        _models(_decode_steps(result)),
        _hosts(result),
        _checked(result),
        _lacking(result),
        _circumstances(result),
    ]
    return "\n\n".join(filter(None, parts))


def _measured(result: dict, everything: bool) -> list[str]:
    """Times of the op, and the targets."""
    rates = found(result, "floors")
    op = cases(result)
    for case in op if rates else ():
        case["rates"] = rates
    times = [_op(op, everything), _legend(op, rates)] if op else ["The op was not measured."]
    judged = [_judged(t, [*op, *_memory(result), *_decode_steps(result)]) for t in TARGETS]
    return [*times, table(TARGET_HEADER, judged)]


def _op(op: list[Case], everything: bool) -> str:
    header = ["workload", "F", "T", "ours", *(f"{HEADINGS.get(n, n)} / ours" for n in OP)]
    rows = [
        [case["workload"], str(case["F"]), str(case["T"]), _time(case)]
        + [_compared(case, name, everything) for name in OP]
        + [_share(case), percent(case["undecided"]) if "undecided" in case else "—"]
        for case in op
    ]
    return table([*header, "of its floor", "undecided"], rows)


def _time(case: Case) -> str:
    if "ours" in case["seconds"]:
        return duration(median(case["seconds"]["ours"]))
    return "**failed**" if "ours" in case["failed"] else "—"


def _compared(case: Case, name: str, everything: bool) -> str:
    """Next to ours or, where there is no time of ours, its own."""
    if not (chosen := best(case, name)):
        return "**failed**" if name in case["failed"] else "—"
    mark = " c" if chosen != name else ""
    if "ours" not in case["seconds"]:
        return duration(median(case["seconds"][chosen])) + mark
    return spread(ratios(case, chosen), everything) + mark


def _share(case: Case) -> str:
    if not ("rates" in case and "read" in case and "ours" in case["seconds"]):
        return "—"
    by, floor = max(floors(case, case["rates"]).items(), key=lambda each: each[1])
    return f"{percent(floor / median(case['seconds']['ours']))} ({by})"


def _legend(op: list[Case], rates: Mapping[str, float] | None) -> str:
    known = next((case for case in op if "d" in case), None)
    shape = "d={d}, N={N}, k={k}, {dtype}; ".format(**known) if known else ""
    measured = "not measured"
    if rates:
        measured = (
            f"{number(rates['copy'] / 1e12)} TB/s of a copy, "
            f"{number(rates['product'] / 1e12)} TFLOP/s of a bf16 product, "
            f"{number(1e6 * rates['launch'])} µs a launch"
        )
    return (
        f"{shape}T tokens a call, F edited latents; ours: the CUDA kernels. Times on the device, "
        "of calls in a CUDA graph, each with other tokens; medians of rounds, in parentheses the "
        "worst round; each contestant by itself, ours and Triton after they were found right on "
        "the same tokens. c: under torch.compile it was faster, and that is shown. of its floor: "
        "the least time that the bytes, the products or the launch take, whichever is most, by "
        f"the rates of this run: {measured}. undecided: of the (token, latent) pairs that were "
        "timed."
    )


def _models(decoded: list[Case]) -> str:
    if not decoded:
        return ""
    header = ["decode step of Phi-3 Mini", "tokens", "unsteered", *(COLUMNS[name] for name in WAYS)]
    rows = [
        [f"{CALLERS[case['step'][0]]}, {case['step'][1]}", str(case["tokens"])]
        + [duration(median(case["seconds"]["unsteered"]))]
        + [added(case, name) for name in WAYS]
        + [percent(case["undecided"])]
        for case in decoded
    ]
    return (
        f"{table([*header, 'undecided'], rows)}\n\nRandom bf16 weights, all layers, steered at the "
        "output of layer 6, one token at position 100; graph: replays of a CUDA graph. Per cent "
        "more time than unsteered, medians of shuffled rounds, in parentheses the least and the "
        "most; unsteered again tells how much of that is noise; worst: a latent that is live for "
        "every token. Verified first: the layer's output is steered."
    )


def _hosts(result: Mapping) -> str:
    rows = [
        [what, least_to_most([1e6 * each for each in seconds])]
        for by, what in CALLERS.items()
        if (seconds := found(result, f"host: {by}"))
    ]
    if not rows:
        return ""
    header = ["one call of T=1 that ends at L0", "µs of the host (least to most)"]
    return table(header, rows)


def _checked(result: Mapping) -> str:
    rows = [[name, *_said(result, name, wrong)] for name, wrong in tried(result).items()]
    if not rows:
        return "Nothing was checked."
    went_on = {"SAESTEER_SCAN": result.get("scan", "all"), "SAESTEER_LADDER": result.get("ladder")}
    left_out = [
        f"`{name}={way}`" for name, way in went_on.items() if way not in ("all", "once", None)
    ]
    how = f"\n\nThe rest ran with {' and '.join(left_out)}." if left_out else ""
    return table(["check", "found", ""], rows) + how


def _said(result: Mapping, name: str, wrong: list[str]) -> tuple[str, str]:
    check = result.get("checks", {}).get(name)
    if check and check["exit"] is None:
        return check["summary"], "**not run**"
    steps = len(result.get(name, ())) + len(result["missing"].get(name, ()))
    said = check["summary"] if check else f"{steps - len(wrong)} of {steps} right"
    return said, "**wrong**" if wrong else "right"


def _lacking(result: Mapping) -> str:
    """What failed, was skipped or did not run, one a line."""
    lines = [
        f"{part}: did not run" for part in ("build", "checks", "measure") if part not in result
    ]
    if not smoke_tests(result):
        lines.insert(0, "smoke: did not run")
    lines += [f"{name}: {why}" for name, why in result.items() if name.endswith(" broke")]
    if not result.get("build", {}).get("cuda", True):
        lines.append("build: without the CUDA kernels")
    for part, of in (smoke_tests(result) | {"": result.get("measure", {})}).items():
        for name, each in of.items():
            if "failed" in each:
                step = f"{part}: {name}" if part else name
                lines.append(f"{step}: {each['failed'].splitlines()[0]}")
    for part, names in result["missing"].items():
        if names:
            lines.append(f"{part}: {len(names)} steps did not run, from `{names[0]}` on")
    for name, each in result.get("checks", {}).items():
        for how in ("failed", "skipped"):
            lines += [f"{name}: {how}: {test}" for test in each.get(how, ())]
    listed = "\n".join(f"- {line}" for line in lines)
    return f"Failed, skipped or not run:\n\n{listed}" if lines else ""


def _circumstances(result: Mapping) -> str:
    about = machine(result)
    if "device" not in about:
        return f"The device and the versions are not recorded; {about['date'][:10]}."
    packages = {"Triton": about["triton"], **about["packages"]}
    device = (
        f"{about['multiprocessors']} multiprocessors, compute capability {about['capability']}, "
        f"driver {about['driver']}, CUDA {about['cuda']}, {about['processor']}, "
        f"{about['cores']} cores"
    )
    return circumstances(about | {"packages": packages}, device)
