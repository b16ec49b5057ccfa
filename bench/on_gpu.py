"""What `bench.gpu` runs on the GPU, in steps (verify/steps.py): `python -m bench.on_gpu PART STORE`

smoke IMPL   every kernel of IMPL alone
measure      the floors (a copy, a product, a launch), what a call costs the host, the op against
             what a careful PyTorch user writes, a decode step of a full-size Phi-3 Mini

Times are the device's: replays of a CUDA graph that holds several calls, each with other tokens.

ours, triton            saesteer_fast.ops.steer by those kernels, after they were found right
naive, lean, smart      saesteer_fast.reference, bf16
compiled                smart under torch.compile
linear, copy            one encoder pass and nothing else; a copy of x
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import saesteer_fast as sf
from saesteer_fast import env, ops, reference
from saesteer_fast.verify import smoke, steps

from . import machine, verify, workloads
from .workloads import Workload

TOKENS = (1, 8192, 64, 512, 8, 2048)
"""What matters most first: the time may end before the list."""
SEVERAL, SEVERAL_TOKENS = 4, (1, 512, 8192)
"""Latents edited at once, and for how many tokens that is measured."""
COMPILED_TOKENS = (1, 512, 8192)
CALLS = 64
"""Calls in one graph, at most; as many as hold this many tokens at once, at least two."""
KERNELS = {"ours": "cuda", "triton": "triton"}


def facts() -> dict:
    """COMMIT in the environment names the commit where the tree came without its history."""
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


def replayed(run: Callable[[], object], budget: float = 0.15, rounds: int = 7) -> list[float]:
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
    runs = max(1, int(budget / rounds / max(timed(1), 1e-7)))
    return [timed(runs) for _ in range(rounds)]


def seconds(call: Callable[[Tensor], object], inputs: Sequence[Tensor]) -> list[float]:
    """Seconds a call, by round."""
    graph = graphed(call, inputs)
    return [each / len(inputs) for each in replayed(graph.replay)]


def floors() -> dict[str, float]:
    """Bytes a second of a copy (read and written), FLOP a second of a product, seconds a launch."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = statistics.median(replayed(lambda: target.copy_(source)))
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    product = statistics.median(replayed(lambda: a @ b))
    one = torch.zeros(1, device="cuda")
    launch = statistics.median(seconds(lambda x: x.add_(1), [one] * 100))
    return {"copy": 2 * source.nbytes / copy, "product": 2 * 8192**3 / product, "launch": launch}


def on_host() -> dict[str, float]:
    """Seconds that a call of one token that ends at L0 keeps the host, by implementation."""
    w = whole()["planted"]
    x = w.settled(1)[0]
    fixed = w.W_enc, w.b_enc, w.directions, w.features, w.values, w.k
    calls = {name: partial(ops.steer, x, *fixed, impl=impl) for name, impl in KERNELS.items()}
    calls["copy"] = x.clone
    return {name: host_seconds(call) for name, call in calls.items()}


def host_seconds(call: Callable[[], object], calls: int = 100, rounds: int = 9) -> float:
    """So few calls that the device's queue never fills; the first round warms up."""
    found = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls)
    return statistics.median(found[1:])


# ---- the op ----


@cache
def whole() -> dict[str, Workload]:
    """Both workloads, on the GPU."""
    shape = workloads.Shape(stream=max(TOKENS), worst=max(TOKENS))
    return {w.name: w for w in workloads.build("bf16", SEVERAL, shape, device="cuda")}


@cache
def workload(name: str, features: int) -> Workload:
    return whole()[name].first(features)


@cache
def compiled() -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(reference.smart, dynamic=False)


def contestant(w: Workload, name: str) -> Callable[[Tensor], Tensor]:
    rows = w.directions, w.features, w.values, w.k
    b_enc = w.b_enc.to(w.W_enc.dtype)
    if name in KERNELS:
        return lambda x: ops.steer(x, w.W_enc, w.b_enc, *rows, impl=KERNELS[name])
    if name in ("naive", "lean"):
        dense = w.W_enc, b_enc, w.W_dec, w.b_dec, w.features, w.values, w.k
        return lambda x: getattr(reference, name)(x, *dense)
    return {
        "smart": lambda x: reference.smart(x, w.W_enc, b_enc, *rows),
        "compiled": lambda x: compiled()(x, w.W_enc, b_enc, *rows),
        "linear": lambda x: F.linear(x, w.W_enc, b_enc),
        "copy": torch.clone,
    }[name]


def batches(w: Workload, tokens: int) -> list[Tensor]:
    """Other tokens for each call of a graph."""
    return w.batches(tokens)[: min(CALLS, max(2, 4096 // tokens))] * (1 + (tokens > len(w.x) // 2))


def about(name: str, tokens: int, features: int) -> dict:
    w = workload(name, features)
    case = {"dtype": "bf16", "d": w.x.shape[1], "N": len(w.W_enc), "k": w.k}
    return case | w.shares(tokens)


def timed(name: str, tokens: int, features: int, by: str) -> list[float]:
    """Seconds a call, by round; kernels of ours must be right on these tokens first."""
    w = workload(name, features)
    call = contestant(w, by)
    if impl := KERNELS.get(by):
        verify.check_ours(
            w,
            w.batches(tokens)[: max(1, 512 // tokens)],
            call,
            lambda x: ops.feature_acts(x, w.W_enc, w.b_enc, w.features, w.k, impl=impl),
        )
    return seconds(call, batches(w, tokens))


# ---- a whole model ----


@cache
def phi3() -> torch.nn.Module:
    """Phi-3 Mini, full size, random weights."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return Phi3ForCausalLM(Phi3Config()).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def decode_step(model: torch.nn.Module) -> Callable[[], Tensor]:
    """One token through the model, always at the same place of a static cache."""
    from transformers import StaticCache

    device = model.device
    cache = StaticCache(config=model.config, max_cache_len=256)
    ids, place = torch.full((1, 1), 7, device=device), torch.tensor([[100]], device=device)

    def step() -> Tensor:
        # Each token moves the cache on: without this some later one would not fit.
        if lengths := [layer.cumulative_length for layer in cache.layers if layer.is_initialized]:
            torch._foreach_zero_(lengths)
            torch._foreach_add_(lengths, 100)
        return model(ids, position_ids=place, past_key_values=cache, use_cache=True).logits

    step()
    return step


def decode_seconds(steered: bool, graph: bool) -> list[float]:
    model, w = phi3(), workload("planted", 1)
    if not steered:
        return _decode_seconds(model, graph)
    sae = sf.SAE(W_enc=w.W_enc, bias=w.b_enc, W_dec=w.W_dec, b_dec=w.b_dec, k=w.k)
    with sf.steering(model, sae, {int(w.features[0]): workloads.VALUE}, layer=6):
        return _decode_seconds(model, graph)


def _decode_seconds(model: torch.nn.Module, graph: bool) -> list[float]:
    step = decode_step(model)
    return replayed(graphed(lambda _: step(), [None]).replay if graph else step)


# ---- all of it ----


def measures() -> dict[str, Callable[[], object]]:
    """By name; `bench.gpu` knows a case by the form of its name."""
    found: dict[str, Callable[[], object]] = {"machine": facts, "floors": floors}

    def add(names: Sequence[str], tokens: Sequence[int], features: int) -> None:
        for T in tokens:
            for name in ("planted", "worst"):
                key = f"{name} T={T} F={features}"
                found.setdefault(f"{key} case", partial(about, name, T, features))
                for by in names:
                    found[f"{key} {by}"] = partial(timed, name, T, features, by)

    add(("ours", "triton", "linear", "copy"), TOKENS, 1)
    found["host"] = on_host
    for steered in (False, True):
        for graph in (True, False):
            name = f"{'steered' if steered else 'unsteered'}, {'graph' if graph else 'eager'}"
            found[f"decode step: {name}"] = partial(decode_seconds, steered, graph)
    add(("ours", "triton"), SEVERAL_TOKENS, SEVERAL)
    add(("smart", "lean", "naive"), TOKENS, 1)
    add(("compiled",), COMPILED_TOKENS, 1)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("smoke", "measure"))
    parser.add_argument("store", type=Path)
    parser.add_argument("--impl", choices=tuple(KERNELS.values()), default="cuda")
    options = parser.parse_args()
    part = smoke.steps(options.impl, "cuda") if options.part == "smoke" else measures()
    steps.work(part, options.store, torch.cuda.synchronize)


if __name__ == "__main__":
    main()
