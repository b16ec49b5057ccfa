"""What steering adds to a whole model: Phi-3 Mini with random bf16 weights, a prompt of 512 tokens
and decode steps after it.

unsteered, again    nothing attached, twice: how far apart no difference is measured
ours                sf.steering, one latent of a top-k SAE set to a constant
worst               the same, of a latent that is live for every token
naive               a forward hook that does baselines.naive
vector              a forward hook that adds a vector, and reads no SAE

The SAE's biases and the edited latent are chosen from the model's own stream, to the shares of the
planted workload. Short: the first layers only, so that steering weighs more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
from torch import Tensor

import saesteer_fast as sf

from .. import exactness, peers, phi3, workloads
from ..timing import Contestant, interleaved

PROMPT, STEPS = 512, 16
ROUNDS = {"prefill": 3, "decode": 5}
STEERED = ("ours", "worst", "naive")


@dataclass(frozen=True)
class Case:
    run: str
    layers: int
    layer: int
    T: int

    def __str__(self) -> str:
        return f"{self.run}-{self.layers}layers"


def cases(full: bool) -> list[Case]:
    layers, layer = (32, 6) if full else (2, 1)
    return [Case("prefill", layers, layer, PROMPT), Case("decode", layers, layer, 1)]


def names(case: Case) -> tuple[str, ...]:
    return "unsteered", "again", *STEERED, "vector"


class Subject:
    """The model, what it is called with, and the ways to steer it."""

    def __init__(self, layers: int, layer: int):
        random = torch.Generator().manual_seed(0)
        self.model, self.layer = phi3.build(layers), layer
        self.steered = self.model.model.layers[layer]
        drawn = torch.randint(self.model.config.vocab_size, (PROMPT + STEPS,), generator=random)
        prompt, *steps = drawn[None].split([PROMPT] + [1] * STEPS, dim=1)
        self.inputs = {"prefill": [prompt], "decode": steps}
        self.calls = {"prefill": self.prefill, "decode": self.decode}
        self.cache = self.prefill(prompt).past_key_values
        stream = {run: torch.cat(self.streams(run)) for run in self.calls}
        rows, shape = torch.cat([*stream.values()]), workloads.FULL
        W_enc, W_dec = workloads.dictionary(shape.N, rows.shape[1], rows.dtype, random)
        self.workload, self.sae, self.worst = workloads.on_stream(
            rows, W_enc, W_dec.to(rows.dtype), shape.k, met_from=PROMPT
        )
        self.workloads = {run: replace(self.workload, name=run, x=x) for run, x in stream.items()}

    def prefill(self, ids: Tensor):
        return self.model(ids, use_cache=True, logits_to_keep=1)

    def decode(self, ids: Tensor) -> None:
        """One token after the prompt, which the cache then forgets."""
        self.model(ids, past_key_values=self.cache, use_cache=True)
        self.cache.crop(-1)

    def streams(self, run: str) -> list[Tensor]:
        """The steered layer's output, [T, d] a call."""
        seen: list[Tensor] = []
        with phi3.hooked(self.steered, lambda module, args, output: seen.append(output[0])):
            for ids in self.inputs[run]:
                self.calls[run](ids)
        return seen

    def ways(self) -> dict[str, Callable[[], AbstractContextManager]]:
        w, naive = self.workload, peers.baselines(self.workload)["naive"]
        edits = {int(w.features[0]): workloads.VALUE}
        vector = workloads.VALUE * w.directions[0]
        hooks = {
            "naive": lambda module, args, output: naive(output),
            "vector": lambda module, args, output: output + vector,
        }
        return {
            "unsteered": nullcontext,
            "again": nullcontext,
            "ours": lambda: sf.steering(self.model, self.sae, edits, layer=self.layer),
            "worst": lambda: sf.steering(self.model, self.worst, edits, layer=self.layer),
            **{
                name: lambda hook=hook: phi3.hooked(self.steered, hook)
                for name, hook in hooks.items()
            },
        }


def verify_all(subject: Subject, run: str) -> float:
    """Raises Disagreement unless the layer's output is steered, and the other layers get that; the
    share of tokens on which naive agrees."""
    found = {}
    for name in STEERED:
        with subject.ways()[name]():
            found[name] = subject.streams(run)
    planted = subject.workloads[run]
    worst = replace(planted, name=f"{run}, worst", b_enc=subject.worst.b_enc_folded)
    exactness.check_outputs(planted, found["ours"])
    exactness.check_outputs(worst, found["worst"])
    if not (worst.truth > 0).all():
        raise exactness.Disagreement(f"{run}, worst: a token does not need the whole scan")
    return exactness.check_baseline(planted, "naive", torch.cat(found["naive"]))


@contextmanager
def measuring(every: list[Case]) -> Iterator[Callable[[Case], dict]]:
    """A case's record: `seconds` a call by contestant and round."""
    subject = cache(Subject)

    @torch.inference_mode()
    def measure(case: Case) -> dict:
        of_layers = subject(case.layers, case.layer)
        w = of_layers.workloads[case.run]
        agreement = verify_all(of_layers, case.run)
        call, inputs = of_layers.calls[case.run], of_layers.inputs[case.run]
        contestants = {
            name: Contestant(call, inputs, whole=True, around=way)
            for name, way in of_layers.ways().items()
        }
        seconds = interleaved(contestants, ROUNDS[case.run])
        found = {"d": w.x.shape[1], "N": len(w.W_enc), "k": w.k, "F": 1, **w.shares(case.T)}
        return asdict(case) | found | {"agreement": agreement, "seconds": seconds}

    yield measure
