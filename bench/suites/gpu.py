"""What `make gpu` runs on the GPU, in steps (verify/steps.py): `python -m bench.suites.gpu PART
STORE`, which bench/gpu.py calls.

smoke        every kernel of --impl alone
measure      the floors (a copy, a product, a launch), the op against what a careful PyTorch user
             writes, what a call costs the host and the memory, decode steps of a full-size Phi-3
             Mini

Times are the device's: replays of a CUDA graph that holds several calls, each with other tokens.

ours, triton            saesteer_fast.ops.steer by those kernels, after they were found right
ours in steps           without the kernel that does all for few tokens in one launch
naive, lean, smart      baselines.py, bf16; "smart, compiled": under torch.compile
linear, copy            one encoder pass and nothing else; a copy of x
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saesteer_fast as sf
from saesteer_fast import env
from saesteer_fast.verify import smoke, steps

from .. import exactness, machine, peers, workloads
from ..tables.contestants import BASELINES, compiled
from ..tables.gpu import KERNELS
from ..timing import Contestant, interleaved
from ..workloads import Workload

DEVICE = "cuda"

TOKENS = (1, 8192, 64, 512, 8, 2048)
"""What matters most first: the time may end before the list."""
SEVERAL, SEVERAL_TOKENS = 4, (1, 512, 8192)
"""Latents edited at once, and for how many tokens that is measured."""
COMPILED_TOKENS = (1, 512, 8192)
IN_STEPS, IN_STEPS_TOKENS = "ours in steps", (1, 8, 64)
CALLS, CALLED = 512, 4096
"""Calls in one graph, at most, and of how many tokens; at least two calls."""
ROUNDS, ROUND_SECONDS = 7, 0.02
QUEUED = 100
"""Calls in a row while the host is timed: so few that the device's queue never fills."""
COPIED, SIDE = 1 << 30, 8192
"""Bytes of the copy and side of the product that the floors are taken from."""
LAYER = 6
"""Of Phi-3 Mini, whose output is steered."""
STEPS = {"graph": 128, "eager": 8}
"""Decode steps in a round, each with another token; the host alone bounds the eager ones."""


def facts() -> dict:
    """COMMIT in the environment names the commit, for a tree that came without its history."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    except FileNotFoundError:
        driver = "unknown"
    found = machine.facts()
    return found | {
        "commit": os.environ.get("COMMIT", found["commit"]),
        "device": torch.cuda.get_device_name(0),
        "processor": found["device"],
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver.strip(),
        "cuda": torch.version.cuda,
        "triton": env.report()["versions"]["triton"],
        "cuda_library": env.report()["build"]["CUDA"],
    }


# ---- time ----


def graphed(call: Callable[[Tensor], object], inputs: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for x in inputs[:2]:
            call(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            call(x)
    return graph


def replayed(run: Callable[[], object]) -> list[float]:
    """Seconds a run, by round."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(runs: int) -> float:
        start.record()
        for _ in range(runs):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / runs

    timed(2)
    runs = max(1, int(ROUND_SECONDS / max(timed(1), 1e-7)))
    return [timed(runs) for _ in range(ROUNDS)]


def seconds(call: Callable[[Tensor], object], inputs: Sequence[Tensor]) -> list[float]:
    """Seconds a call, by round."""
    graph = graphed(call, inputs)
    return [each / len(inputs) for each in replayed(graph.replay)]


def floors() -> dict[str, float]:
    """Bytes a second of a copy (read and written), FLOP a second of a product, seconds a launch."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    copy = statistics.median(replayed(lambda: target.copy_(source)))
    a, b = torch.randn(2, SIDE, SIDE, device=DEVICE).bfloat16()
    product = statistics.median(replayed(lambda: a @ b))
    one = torch.zeros(1, device=DEVICE)
    launch = statistics.median(seconds(lambda x: x.add_(1), [one] * 100))
    return {"copy": 2 * COPIED / copy, "product": 2 * SIDE**3 / product, "launch": launch}


def on_host(by: str) -> list[float]:
    """Seconds that a call of one token that ends at L0 keeps the host, by round; the first round
    warms up."""
    w = workload("planted", 1)
    call, x = contestant(w, by), w.settled(1)[0]
    found = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(QUEUED):
            call(x)
        found.append((time.perf_counter() - start) / QUEUED)
    return found[1:]


# ---- the op ----


@cache
def whole() -> dict[str, Workload]:
    """Both workloads, on the GPU."""
    shape = workloads.Shape(stream=max(TOKENS), worst=max(TOKENS))
    return {w.name: w for w in workloads.build("bf16", SEVERAL, shape, device=DEVICE)}


@cache
def workload(name: str, features: int) -> Workload:
    return whole()[name].first(features)


@cache
def torch_compiled(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(run, dynamic=False)


def contestant(w: Workload, name: str) -> Callable[[Tensor], Tensor]:
    if name == IN_STEPS:
        return in_steps(contestant(w, "ours"))
    if name in KERNELS or name == "reference":
        return partial(peers.steer, w, impl=KERNELS.get(name, name))
    if name == "copy":
        return torch.clone
    if name == "linear":
        b_enc = w.b_enc.to(w.W_enc.dtype)
        return lambda x: F.linear(x, w.W_enc, b_enc)
    if name in BASELINES:
        return peers.baselines(w)[name]
    return peers.baselines(w, torch_compiled)[name.removesuffix(compiled(""))]


def in_steps(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def stepwise(x: Tensor) -> Tensor:
        with mock.patch.dict(os.environ, SAESTEER_LADDER="steps"):
            return call(x)

    return stepwise


def batches(w: Workload, tokens: int) -> list[Tensor]:
    """Other tokens for each call of a graph."""
    found = w.batches(tokens)[: calls(tokens)]
    return found * (1 + (len(found) == 1))


def calls(tokens: int) -> int:
    return min(CALLS, max(2, CALLED // tokens))


def about(name: str, tokens: int, features: int) -> dict:
    """The case, with the shares of the tokens that are timed."""
    w = workload(name, features)
    case = {"dtype": "bf16", "d": w.x.shape[1], "N": len(w.W_enc), "k": w.k}
    return case | w.shares(tokens, calls(tokens))


def timed(name: str, tokens: int, features: int, by: str) -> list[float]:
    """Seconds a call, by round; kernels of ours must be right on these tokens first."""
    w = workload(name, features)
    call = contestant(w, by)
    if impl := KERNELS.get(by.split()[0]):
        some = w.batches(tokens)[: max(1, 512 // tokens)]
        exactness.check_ours(w, some, call, partial(peers.feature_acts, w, impl=impl))
    return seconds(call, batches(w, tokens))


def memory(by: str) -> dict[str, int]:
    """The most bytes that one call holds at once beyond its inputs and its output, by tokens."""
    found = {}
    for tokens in sorted(TOKENS):
        w = workload("worst", 1)
        call, x = contestant(w, by), w.batches(tokens)[0]
        call(x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = call(x)
        found[str(tokens)] = torch.cuda.max_memory_allocated() - before - y.nbytes
    return found


# ---- a whole model ----


@cache
def phi3_mini() -> nn.Module:
    from .. import phi3  # transformers may be missing: all else goes on

    return phi3.build(device=DEVICE)


def decode_step(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """One token through the model, with each call the next of ids [n, 1], always at the same place
    of a static cache."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=256)
    at, place = ids.new_zeros(1), ids.new_full((1, 1), 100)

    def step() -> Tensor:
        # Each token moves the cache on: without this some later one would not fit.
        if lengths := [layer.cumulative_length for layer in cache.layers if layer.is_initialized]:
            torch._foreach_zero_(lengths)
            torch._foreach_add_(lengths, 100)
        token = ids.index_select(0, at)
        at.add_(1).remainder_(len(ids))
        return model(token, position_ids=place, past_key_values=cache, use_cache=True).logits

    step()
    at.zero_()
    return step


def runner(how: str, ids: Tensor) -> Callable[[], object]:
    step = decode_step(phi3_mini(), ids)
    return graphed(lambda _: step(), [None]).replay if how == "graph" else step


def read(how: str, ids: Tensor) -> Tensor:
    """The layer's output, steered if the model is, a token a step: [len(ids), d]."""
    from .. import phi3

    layer, seen, rows = phi3_mini().model.layers[LAYER], [], []
    with phi3.hooked(layer, lambda module, args, output: seen.append(output[0])):
        step = runner(how, ids)
        for _ in ids:
            step()
            rows.append(seen[-1].clone())  # of a graph always the same tensor
    return torch.cat(rows)


@cache
def planted_on_phi3() -> tuple[Tensor, Workload, sf.SAE, sf.SAE]:
    """Tokens, the workload that they are at the layer, its SAE, and one in which the edited latent
    is always live."""
    ids = torch.arange(7, 7 + STEPS["graph"], device=DEVICE)[:, None]
    planted = whole()["planted"]
    return ids, *workloads.on_stream(read("graph", ids), planted.W_enc, planted.W_dec, planted.k)


def decode_steps(by: str, how: str) -> dict:
    """Seconds a step by round: unsteered twice, steered as planted on the model's own stream, and
    steered at a latent that is always live. The layer's output is verified first."""
    impl = KERNELS[by]
    ids, w, sae, worst = planted_on_phi3()
    ids = ids[: STEPS[how]]
    unsteered = read(how, ids)

    def steered(by_sae: sf.SAE) -> AbstractContextManager:
        edits = {int(w.features[0]): workloads.VALUE}
        return sf.steering(phi3_mini(), by_sae, edits, layer=LAYER, impl=impl)

    ways = {"unsteered": nullcontext, "again": nullcontext}
    ways |= {"ours": partial(steered, sae), "worst": partial(steered, worst)}
    for name, b_enc in (("ours", w.b_enc), ("worst", worst.b_enc_folded)):
        case = replace(w, name=f"decode step, {name}", x=unsteered, b_enc=b_enc)
        with ways[name]():
            outputs = read(how, ids).split(1)
        exactness.check_outputs(case, outputs, impl)
    contestants = {}
    for name, way in ways.items():
        with way():
            step = runner(how, ids)
        around = nullcontext if how == "graph" else way
        contestants[name] = Contestant(partial(_run, step), [len(ids)], whole=True, around=around)
    found = interleaved(contestants, rounds=5)
    seconds = {name: [each / len(ids) for each in rounds] for name, rounds in found.items()}
    return {"T": 1, "tokens": len(ids), "seconds": seconds, **w.shares(1)}


def _run(step: Callable[[], object], count: int) -> None:
    for _ in range(count):
        step()
    torch.cuda.synchronize()


# ---- all of it ----


def measures() -> dict[str, Callable[[], object]]:
    """By name; bench/tables/gpu.py knows a case by the form of its name."""
    found: dict[str, Callable[[], object]] = {"machine": facts, "floors": floors}

    def add(names: Sequence[str], tokens: Sequence[int], features: int) -> None:
        for T in tokens:
            for name in ("planted", "worst"):
                key = f"{name} T={T} F={features}"
                found.setdefault(f"{key} case", partial(about, name, T, features))
                for by in names:
                    found[f"{key} {by}"] = partial(timed, name, T, features, by)

    add((*KERNELS, "linear", "copy"), TOKENS, 1)
    add((IN_STEPS,), IN_STEPS_TOKENS, 1)
    for by in (*KERNELS, "reference", "copy"):
        found[f"host: {by}"] = partial(on_host, by)
    for by in KERNELS:
        found[f"memory: {by}"] = partial(memory, by)
    for by in KERNELS:
        for how in STEPS:
            found[f"decode step: {by}, {how}"] = partial(decode_steps, by, how)
    add(tuple(KERNELS), SEVERAL_TOKENS, SEVERAL)
    add(BASELINES[::-1], TOKENS, 1)
    for name in BASELINES[::-1]:
        add((compiled(name),), COMPILED_TOKENS, 1)
    return found


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("smoke", "measure"))
    parser.add_argument("store", type=Path)
    parser.add_argument("--impl", default="cuda")
    options = parser.parse_args(arguments)
    part = smoke.steps(options.impl, DEVICE) if options.part == "smoke" else measures()
    steps.work(part, options.store, torch.cuda.synchronize)


if __name__ == "__main__":
    main()
