"""What one call costs beyond its arithmetic: one token that ends at L0, by ever more of what stands
around the kernel.

add         x + x
nothing     a compiled op of steer's signature that computes nothing
dispatched  torch.ops.saesteer.steer
op          saesteer_fast.ops.steer, which chooses the implementation; op_no_grad, op_grad: under
            torch.no_grad, and with a gradient for x; all else under torch.inference_mode
prepared    what sf.prepare gave
steer       sf.steer, which prepares too
bare        a module that calls its one layer, which does nothing
hook        and a forward hook that does nothing
hooks       three of them, where sf.steering has its own
steering    sf.steering; _mask: and an attention mask; _no_grad; _generated: scope="generated" on a
            call that is all prompt, so that no token is steered
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import saesteer_fast as sf
from saesteer_fast import ops

from .. import exactness, native, workloads
from ..timing import Contestant, interleaved
from ..workloads import Workload

ROUNDS = 11
TOKENS = 64
CASE = "T1"
NAMES = (
    *("add", "nothing", "dispatched", "op", "op_no_grad", "op_grad", "prepared", "steer"),
    *("bare", "hook", "hooks", "steering", "steering_mask", "steering_no_grad"),
    "steering_generated",
)
STEERED = tuple(
    name for name in NAMES if name.startswith(("op", "prepared", "steer", "dispatched"))
)


def cases(full: bool) -> list[str]:
    return [CASE]


def names(case: str) -> tuple[str, ...]:
    return NAMES


class Decoder(nn.Module):
    """The least that sf.steering takes for a model: a list of one layer, which does nothing."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity()])

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layers[0](inputs_embeds)


@contextmanager
def idle(decoder: Decoder, all_three: bool) -> Iterator[None]:
    """Hooks that do nothing; with all three, where sf.steering has its own."""

    def nothing(*_):
        return None

    with ExitStack() as undo:
        undo.callback(decoder.layers[0].register_forward_hook(nothing).remove)
        if all_three:
            undo.callback(decoder.register_forward_hook(nothing, always_call=True).remove)
            undo.callback(decoder.register_forward_pre_hook(nothing, with_kwargs=True).remove)
        yield


@contextmanager
def entered(*contexts: Callable) -> Iterator[None]:
    with ExitStack() as undo:
        for context in contexts:
            undo.enter_context(context())
        yield


def contestants(w: Workload, calls: list[Tensor]) -> dict[str, Contestant]:
    """Of calls of one token each, [1, 1, d]."""
    fixed = w.W_enc, w.b_enc, w.directions, w.features, w.values, w.k
    sae = sf.SAE(w.W_enc, w.b_enc, w.W_dec, w.b_dec, w.k, subtract_b_dec=False)
    edits = {int(w.features[0]): workloads.VALUE}
    prepared, machine, decoder = sf.prepare(sae, edits), native.load(), Decoder()
    mask = torch.ones(1, 1, dtype=torch.int64)
    learned = [x.clone().requires_grad_() for x in calls]
    attached = partial(sf.steering, decoder, sae, edits, layer=0)

    def of(call: Callable, *around: Callable, inputs: list[Tensor] = calls) -> Contestant:
        return Contestant(call, inputs, around=partial(entered, *around))

    def op(x: Tensor) -> Tensor:
        return ops.steer(x, *fixed)

    def masked(x: Tensor) -> Tensor:
        return decoder(x, attention_mask=mask)

    inference, no_grad = torch.inference_mode, torch.no_grad
    return {
        "add": of(lambda x: x + x, inference),
        "nothing": of(lambda x: machine.nothing(x, *fixed), inference),
        "dispatched": of(lambda x: torch.ops.saesteer.steer(x, *fixed), inference),
        "op": of(op, inference),
        "op_no_grad": of(op, no_grad),
        "op_grad": of(op, inputs=learned),
        "prepared": of(prepared, inference),
        "steer": of(lambda x: sf.steer(x, sae, edits), inference),
        "bare": of(decoder, inference),
        "hook": of(decoder, inference, partial(idle, decoder, False)),
        "hooks": of(decoder, inference, partial(idle, decoder, True)),
        "steering": of(decoder, inference, attached),
        "steering_mask": of(masked, inference, attached),
        "steering_no_grad": of(masked, no_grad, attached),
        "steering_generated": of(decoder, inference, partial(attached, scope="generated")),
    }


def verify_all(w: Workload, ways: dict[str, Contestant], calls: list[Tensor]) -> None:
    """Raises Disagreement unless all that steer do it, and alike."""
    settled = torch.cat(calls).flatten(0, 1)

    def outputs(name: str) -> list[Tensor]:
        with ways[name].around():
            return [ways[name].call(x).flatten(0, 1) for x in calls]

    right = outputs("op")
    given = iter(right)
    exactness.check_ours(
        replace(w, x=settled),
        list(settled.split(1)),
        lambda x: next(given),
        lambda x: torch.zeros(len(x), 1),
    )
    for name in STEERED:
        wanted = calls if name == "steering_generated" else right
        if not torch.equal(torch.cat(outputs(name)), torch.cat(wanted).view(-1, w.x.shape[1])):
            raise exactness.Disagreement(f"{name} differs from saesteer_fast.ops.steer")


@contextmanager
def measuring(every: list[str]) -> Iterator[Callable[[str], dict]]:
    """A case's record: `seconds` a call by contestant and round."""

    def measure(case: str) -> dict:
        w, _ = workloads.build("bf16", 1)
        calls = [x[None] for x in w.settled(1)[:TOKENS]]
        ways = contestants(w, calls)
        verify_all(w, ways, calls)
        N, d = w.W_enc.shape
        found = {"dtype": "bf16", "T": 1, "F": 1, "d": d, "N": N, "k": w.k}
        return found | {"seconds": interleaved(ways, ROUNDS)}

    yield measure
