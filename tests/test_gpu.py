"""What only a real GPU shows of the CUDA kernels: full sizes, graphs, streams, devices, memory,
large addresses, torch.compile, the sanitizers. What they compute is in test_cuda_host.py too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from ops_cases import DTYPES, Case, assert_steered, integer_case, random_case, same_bits
from torch import Tensor

from saesteer_fast import ops, reference

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

D, N, K = 512, 4096, 32
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))


def on(device: str, case: Case) -> Case:
    tensors = {f.name: getattr(case, f.name) for f in fields(case)}
    return replace(case, **{k: t.to(device) for k, t in tensors.items() if isinstance(t, Tensor)})


def some_live(T: int, dtype=torch.bfloat16, *, F: int = 4, device: str = "cuda") -> Case:
    """Features that are live in token 0."""
    case = random_case(T, D, N, K, 0, dtype, dtype)
    features = case.rows(slice(0, 1)).encode("reference")[1][0, K - F :]
    return on(device, case.but(features=features, values=torch.linspace(-2, 9, F)))


def settled(case: Case) -> Tensor:
    """x of the same shape for which no p_f is positive."""
    pull = -100.0 * case.W_enc[case.features].float().sum(0)
    return pull.to(case.x.dtype).expand_as(case.x).contiguous()


def test_the_library_is_here():
    assert ops._NO_CUDA is None and frozenset(ops._NAMES) == ops._CUDA
    assert "impl='cuda'" in ops.implementations()["cuda"]


@EVERY_DTYPE
@pytest.mark.parametrize("T", [1, 16, 17, 64, 65, 300, 3000])
def test_decisions_are_fp64s(T, dtype):
    case = some_live(T, dtype)
    live, safe = case.acts("cuda") > 0, ~case.undecided()
    exact = reference.feature_acts(*case.encoder, case.features, K, dtype=torch.float64) > 0
    assert live[0].any() and torch.equal(live[safe], exact[safe])
    print(f"T={T} {dtype}: {(~safe).double().mean():.2e} of the decisions within rounding")
    assert_steered(case, case.steer("cuda"), live)


@EVERY_DTYPE
@pytest.mark.parametrize("T", [1, 40, 700])
def test_integers_are_exact(T, dtype):
    case = on("cuda", integer_case(T, 320, 3000, 32, 5, dtype, dtype))
    exact = reference.feature_acts(*case.encoder, case.features, 32, dtype=torch.float64)
    assert torch.equal(case.acts("cuda").double(), exact)
    assert same_bits(case.steer("cuda") + 0.0, case.truth().to(dtype) + 0.0)
    values, indices = reference.encode(*case.encoder, 32, dtype=torch.float64)
    ours = case.encode("cuda")
    assert torch.equal(ours[0].double(), values) and torch.equal(ours[1], indices)
    recon = ops.decode(*ours, case.W_dec, case.b_dec, impl="cuda")
    assert torch.equal(recon, reference.decode(values, indices, case.W_dec, case.b_dec))


@pytest.mark.parametrize("T", [1, 33, 600])
def test_a_full_size_dictionary(T):
    """Phi-3 Mini's width, with ties; the same run twice, bit for bit."""
    case = on("cuda", integer_case(T, 3072, 24576, 32, 4, *2 * (torch.bfloat16,)))
    exact = reference.feature_acts(*case.encoder, case.features, 32)
    assert torch.equal(case.acts("cuda"), exact)
    assert same_bits(case.steer("cuda"), case.steer("cuda"))
    values, indices = case.encode("cuda")
    expected = reference.encode(*case.encoder, 32)
    assert torch.equal(values, expected[0]) and torch.equal(indices, expected[1])


# ---- what must not wait for the device ----


@pytest.mark.fault(68)
@pytest.mark.parametrize("T", [1, 40, 200])
def test_a_graph_replays_on_any_input(T):
    case = some_live(T)
    x = case.x.clone()
    fixed = case.but(x=x)
    graph = torch.cuda.CUDAGraph()
    fixed.steer("cuda")
    with torch.cuda.graph(graph):
        y, acts = fixed.steer("cuda"), fixed.acts("cuda")
        indices = fixed.encode("cuda")[1]
    for content in (settled(case), case.x, settled(case), case.x.flip(-1), case.x):
        x.copy_(content)
        y.zero_()
        graph.replay()
        eager = case.but(x=content)
        assert same_bits(y, eager.steer("cuda")) and same_bits(acts, eager.acts("cuda"))
        assert torch.equal(indices, eager.encode("cuda")[1])
    assert (acts > 0).any()


@pytest.mark.fault(68)
@pytest.mark.parametrize("T", [1, 200])
def test_nothing_waits_for_the_device(T):
    case = some_live(T)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.steer("cuda"), case.acts("cuda")
        ops.decode(*case.encode("cuda"), case.W_dec, case.b_dec, impl="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.fault(31, 68)
def test_streams_do_not_meet():
    cases = [some_live(200), some_live(150, F=7)]
    cases[1] = cases[1].but(x=cases[1].x.flip(-1))
    expected = [case.steer("cuda") for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(20):
        for case, stream, results in zip(cases, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(case.steer("cuda"))
    torch.cuda.synchronize()
    for results, y in zip(found, expected, strict=True):
        assert all(same_bits(result, y) for result in results)


@pytest.mark.fault(68)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    case = some_live(200)
    other = on("cuda:1", case)
    assert same_bits(other.steer("cuda").cpu(), case.steer("cuda").cpu())
    with pytest.raises(RuntimeError, match="W_enc is not on cuda:1, where x is"):
        other.but(W_enc=case.W_enc).steer("cuda")


@pytest.mark.fault(19)
def test_arguments_on_the_cpu_are_named():
    case = some_live(3)
    for name in ("W_enc", "b_enc", "features", "values"):
        with pytest.raises(RuntimeError, match=f"{name} is not on cuda:0, where x is"):
            case.but(**{name: getattr(case, name).cpu()}).steer("cuda")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_without_a_break(mode):
    case = some_live(70)
    compiled = torch.compile(
        lambda x: 2 * ops.steer(x, *case.edit[1:], impl="cuda"), fullgraph=True, mode=mode
    )
    for _ in range(3):
        assert torch.equal(compiled(case.x), 2 * case.steer("cuda"))


@pytest.mark.parametrize("op", ["steer", "feature_acts", "encode"])
def test_opcheck(op):
    case = some_live(5, torch.float32)
    given = {
        "steer": case.edit,
        "feature_acts": (*case.encoder, case.features, K),
        "encode": (*case.encoder, K),
    }
    torch.library.opcheck(getattr(torch.ops.saesteer_cuda, op).default, given[op])


# ---- memory ----


@pytest.mark.parametrize("T", [1, 8192, 50_000])
@pytest.mark.parametrize("F", [1, 16])
def test_memory_beside_the_output_is_bounded(T, F):
    case = some_live(T, F=F)
    case.steer("cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = case.steer("cuda")
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before - y.nbytes <= (1 << 20) + 4096


def room(gigabytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GB of device memory")


@pytest.mark.fault(17)
def test_tokens_beyond_32_bit_addresses():
    room(20)
    T = (1 << 31) // D + 100
    case = some_live(100)
    x = case.x.new_zeros(T, D)
    x[:100] = x[-100:] = case.x
    y = case.but(x=x).steer("cuda")
    expected = case.steer("cuda")
    assert same_bits(y[-100:], expected) and same_bits(y[:100], expected)


@pytest.mark.fault(17)
def test_latents_beyond_32_bit_addresses():
    room(30)
    latents = (1 << 31) // D + 300
    random = torch.Generator("cuda").manual_seed(0)
    signs = dict(generator=random, device="cuda", dtype=torch.int8)
    W_enc = torch.randint(-1, 2, (latents, D), **signs).bfloat16()
    x = torch.randint(-1, 2, (90, D), **signs).bfloat16()
    b_enc = torch.zeros(latents, device="cuda")
    features = latents - 300 + (x[:3].float() @ W_enc[-300:].float().T).argmax(-1).unique()
    for T, k in ((3, 1), (3, latents // 2), (90, latents // 2), (3, latents)):
        acts = ops.feature_acts(x[:T], W_enc, b_enc, features, k, impl="cuda")
        few = [reference.feature_acts(row, W_enc, b_enc, features, k) for row in x[:T].split(1)]
        assert torch.equal(acts, torch.cat(few))


# ---- sanitizers ----

SMALL = "gpu and (truth or integers or unaligned or spoil or nothing_to_change)"
FEW = "gpu and steer_and_feature_acts_are_the_truth"
TOOLS = {"memcheck": SMALL, "racecheck": FEW, "synccheck": FEW, "initcheck": FEW}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_sanitizer_finds_nothing(tool):
    """On small shapes, without PyTorch's pool: every tensor is an allocation of its own."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    tests = Path(__file__).with_name("test_cuda_host.py")
    done = subprocess.run(
        [
            *(sanitizer, f"--tool={tool}", "--error-exitcode=9", "--kernel-name=kns=saesteer"),
            "--report-api-errors=no",  # PyTorch asks the driver for functions that it may lack
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *(tests, "-m", "gpu", "-k", TOOLS[tool]),
        ],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0 and " passed" in done.stdout, (done.stdout + done.stderr)[-6000:]
