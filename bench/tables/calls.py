"""The calls suite: a ladder of what stands around the kernel, each rung with what it adds."""

from __future__ import annotations

from .common import Case, Target, circumstances, judged, least_to_most, table

RUNGS = {
    "add": ("`x + x`", None),
    "nothing": ("an op of `steer`'s signature that does nothing", None),
    "dispatched": ("`torch.ops.saesteer.steer`", "nothing"),
    "op": ("`saesteer_fast.ops.steer`", "dispatched"),
    "op_no_grad": ("the same under `no_grad`", "op"),
    "op_grad": ("the same with a gradient for `x`", "op"),
    "prepared": ("what `sf.prepare` gave", "op"),
    "steer": ("`sf.steer`", "prepared"),
    "bare": ("a module with one layer that does nothing", None),
    "hook": ("and one hook that does nothing", "bare"),
    "hooks": ("and three of them", "bare"),
    "steering": ("`sf.steering`, which has three", "bare"),
    "steering_mask": ("the same, called with an attention mask", "steering"),
    "steering_no_grad": ("and under `no_grad`", "steering_mask"),
    "steering_generated": ('`scope="generated"`, a prompt', "bare"),
}
"""Of each contestant what it is, and what it is compared with."""


def beyond(case: Case, name: str, base: str) -> list[float]:
    """Microseconds more than base, round by round."""
    seconds = case["seconds"]
    return [1e6 * (a - b) for a, b in zip(seconds[name], seconds[base], strict=True)]


TARGETS = (
    Target(
        "T=1, ends at L0: `torch.ops.saesteer.steer` − an op that does nothing",
        lambda case: True,
        lambda case: beyond(case, "dispatched", "nothing"),
        10,
        at_least=False,
        unit=" µs",
    ),
)


def render(result: dict, everything: bool = False) -> str:
    """Markdown of one recorded result; `everything` changes nothing."""
    (case,) = result["cases"]
    shape = ", ".join(f"{name}={case[name]}" for name in ("T", "F", "d", "N", "k"))
    legend = (
        f"{case['dtype']}, {shape}; every token ends at L0. Under `inference_mode` unless told "
        "otherwise; medians of shuffled rounds, in parentheses the least and the most. Verified "
        "first: all that steer give the same bits, within the op's error bound of fp64."
    )
    rows = [_row(case, name) for name in RUNGS]
    return "\n\n".join(
        [
            table(["one call", "µs", "more than", "by µs"], rows),
            legend,
            judged(TARGETS, result["cases"]),
            circumstances(result["machine"]),
        ]
    )


def _row(case: Case, name: str) -> list[str]:
    what, base = RUNGS[name]
    taken = [1e6 * each for each in case["seconds"][name]]
    more = ["", ""] if base is None else [RUNGS[base][0], least_to_most(beyond(case, name, base))]
    return [what, least_to_most(taken), *more]
