"""The GPU's results: `python -m bench.gpu [--out FOLDER] [--minutes 9]`, which `make gpu` calls.

Runs the tests that need a GPU, measures the floors (a copy, a product, a launch), verifies and
times the op against what a careful PyTorch user writes, then a decode step of a full-size Phi-3
Mini, and last the sanitizers; what finds no time is left out and listed. All of it goes into one
JSON file, written anew after each part. Times are the device's: replays of a CUDA graph that holds
several calls, each with other tokens.

ours, triton            saesteer_fast.ops.steer by those kernels
naive, lean, smart      saesteer_fast.reference, bf16
compiled                smart under torch.compile
linear, copy            one encoder pass and nothing else; a copy of x
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import saesteer_fast as sf
from saesteer_fast import env, ops, reference

from . import machine, verify, workloads
from .report import RESULTS
from .workloads import Workload

TOKENS = (1, 8, 64, 512, 2048, 8192)
FEATURES = (1, 4)
CALLS = 64
"""Calls in one graph, at most; as many as hold this many tokens at once, at least two."""
TESTS, SANITIZERS = "not sanitizer", "sanitizer"


class Clock:
    """What is left of the minutes."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self.end - time.monotonic()


def facts() -> dict:
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    except FileNotFoundError:
        driver = "unknown"
    return machine.facts() | {
        "device": torch.cuda.get_device_name(0),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver.strip(),
        "cuda": torch.version.cuda,
        "triton": env.report()["versions"]["triton"],
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


# ---- the op ----


def on_gpu(w: Workload) -> Workload:
    fields = ("x", "W_enc", "b_enc", "W_dec", "b_dec", "features")
    return replace(w, **{name: getattr(w, name).cuda() for name in fields})


def first(w: Workload, features: int) -> Workload:
    part = w.first(features)
    part.__dict__["values"] = part.values.cuda()
    return part


def contestants(w: Workload) -> dict[str, Callable[[Tensor], Tensor]]:
    fixed = w.W_enc, w.b_enc, w.directions, w.features, w.values, w.k
    b_enc = w.b_enc.to(w.W_enc.dtype)
    dense = w.W_enc, b_enc, w.W_dec, w.b_dec, w.features, w.values, w.k
    rows = w.W_enc, b_enc, w.directions, w.features, w.values, w.k
    compiled = torch.compile(reference.smart, dynamic=False)
    return {
        "ours": lambda x: ops.steer(x, *fixed, impl="cuda"),
        "triton": lambda x: ops.steer(x, *fixed, impl="triton"),
        "naive": lambda x: reference.naive(x, *dense),
        "lean": lambda x: reference.lean(x, *dense),
        "smart": lambda x: reference.smart(x, *rows),
        "compiled": lambda x: compiled(x, *rows),
        "linear": lambda x: F.linear(x, w.W_enc, b_enc),
        "copy": torch.clone,
    }


def batches(w: Workload, tokens: int) -> list[Tensor]:
    """Other tokens for each call of a graph."""
    return w.batches(tokens)[: min(CALLS, max(2, 4096 // tokens))] * (1 + (tokens > len(w.x) // 2))


def bytes_and_flops(w: Workload, case: dict) -> tuple[float, float]:
    """The least that the whole op must move and multiply, given what these tokens need."""
    T, size = case["T"], w.x.element_size()
    d, N = w.x.shape[1], len(w.W_enc)
    x = 2 * T * d * size
    return x + case["read"] * N * d * size, 2 * T * case["work"] * N * d


def measure(w: Workload, tokens: int, floor: dict[str, float]) -> dict:
    case = {"workload": w.name, "dtype": "bf16", "T": tokens, "F": len(w.features)}
    case |= {"d": w.x.shape[1], "N": len(w.W_enc), "k": w.k, **w.shares(tokens)}
    inputs, all_ways = batches(w, tokens), contestants(w)
    verify.check_ours(
        w,
        w.batches(tokens)[: max(1, 512 // tokens)],
        all_ways["ours"],
        lambda x: ops.feature_acts(x, w.W_enc, w.b_enc, w.features, w.k, impl="cuda"),
    )
    case["seconds"], case["failed"] = {}, {}
    for name, call in all_ways.items():
        try:
            case["seconds"][name] = seconds(call, inputs)
        except Exception as error:
            case["failed"][name] = f"{type(error).__name__}: {error}"[:300]
            torch.cuda.synchronize()
    moved, multiplied = bytes_and_flops(w, case)
    bound = max(moved / floor["copy"], multiplied / floor["product"], floor["launch"])
    case["floor"] = bound
    case["share_of_floor"] = bound / statistics.median(case["seconds"]["ours"])
    return case


def build(tokens: int) -> list[Workload]:
    """Both workloads of this many tokens, on the GPU."""
    shape = workloads.Shape(stream=tokens, worst=tokens)
    return [on_gpu(w) for w in workloads.build("bf16", max(FEATURES), shape)]


# ---- a whole model ----


def decode_step(w: Workload) -> dict[str, list[float]]:
    """Seconds of one token through Phi-3 Mini with random weights, by kind of run."""
    from transformers import Phi3Config, Phi3ForCausalLM, StaticCache

    config = Phi3Config()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = Phi3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    sae = sf.SAE(W_enc=w.W_enc, bias=w.b_enc, W_dec=w.W_dec, b_dec=w.b_dec, k=w.k)
    edits = dict.fromkeys(w.features[:1].tolist(), workloads.VALUE)
    ids = torch.full((1, 1), 7, device="cuda")
    position = torch.tensor([100], device="cuda")
    found = {}

    def run(name: str) -> None:
        cache = StaticCache(config=config, max_cache_len=256)

        def step(_=None):
            model(ids, past_key_values=cache, cache_position=position, use_cache=True)

        step()
        found[f"{name}, eager"] = replayed(step)
        found[f"{name}, graph"] = replayed(graphed(step, [ids]).replay)

    run("unsteered")
    with sf.steering(model, sae, edits, layer=6):
        run("steered")
    return found


# ---- all of it ----


def tests(only: str, minutes: float) -> dict[str, str | int]:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "gpu"]
    try:
        done = subprocess.run(
            [*command, "-k", only],
            cwd=machine.ROOT,
            env={name: value for name, value in os.environ.items() if name != "SAESTEER_IMPL"},
            capture_output=True,
            text=True,
            timeout=60 * minutes,
        )
        said, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        said, code = (late.stdout or b"").decode(), -1
    print(said[-6000:], flush=True)
    summary = re.findall(r"^.*(?:passed|failed|error).* in .*$", said, re.M)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.M)
    return {"exit": code, "summary": summary[-1] if summary else "no end", "failed": failed}


def table(cases: list[dict]) -> str:
    def cell(case: dict, name: str) -> str:
        each = case["seconds"].get(name)
        return f"{1e6 * statistics.median(each):10.1f}" if each else "         -"

    names = ("ours", "triton", "naive", "lean", "smart", "compiled", "linear", "copy")
    rows = [f"{'µs a call':20}" + "".join(f"{n:>10}" for n in names) + "  of floor  undecided"]
    for c in cases:
        label = f"{c['workload']} T={c['T']} F={c['F']}"
        shares = f"  {c['share_of_floor']:8.0%}  {c['undecided']:9.2%}"
        rows.append(f"{label:20}" + "".join(cell(c, n) for n in names) + shares)
    return "\n".join(rows)


@torch.inference_mode()
def run(out: Path, minutes: float) -> int:
    clock = Clock(minutes)
    result: dict = {"suite": "gpu", "machine": facts(), "left_out": [], "cases": []}
    path = out / f"gpu-{result['machine']['date'][:19].replace(':', '-')}.json"

    def save(**parts) -> None:
        result.update(parts)
        path.write_text(json.dumps(result, indent=1) + "\n")

    save(tests=tests(TESTS, min(4.5, minutes / 2)))
    floor = floors()
    save(floors=floor)
    whole = build(max(TOKENS))
    for T in TOKENS:
        for w in whole:
            for features in FEATURES:
                if clock.left() < 75 or (features > 1 and T not in (1, 512, 8192)):
                    result["left_out"].append([w.name, T, features])
                    continue
                result["cases"].append(measure(first(w, features), T, floor))
                save()
    try:
        save(model=decode_step(whole[0]))
    except Exception as error:
        save(model={"failed": f"{type(error).__name__}: {error}"[:300]})
    if clock.left() > 30:
        save(sanitizers=tests(SANITIZERS, clock.left() / 60))
    print(table(result["cases"]))
    print(json.dumps({k: result[k] for k in ("floors", "tests", "left_out")}, indent=1))
    print(f"recorded in {path}")
    return result["tests"]["exit"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON file")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop measuring after so many")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu: PyTorch sees no CUDA device", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    return run(options.out, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
