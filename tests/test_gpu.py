"""What only a real GPU shows of the CUDA and Triton kernels: full sizes, the CPU's decisions, CUDA
graphs, streams, devices, memory, large addresses, torch.compile, the sanitizers. What they compute
is in test_cuda_host.py and test_triton_kernels.py too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ops_cases import DTYPES, Case, assert_steered, integer_case, random_case, same_bits
from torch import Tensor

from saesteer_fast import choice, ops, reference

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

D, N, K = 512, 4096, 32
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
TRITON_ALONE = pytest.mark.parametrize("impl", ["triton"], indirect=True)


@pytest.fixture(params=["cuda", "triton"])
def impl(request) -> str:
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    return request.param


def some_live(T: int, dtype=torch.bfloat16, weights=None, *, F: int = 4, d: int = D) -> Case:
    """Features that are live in token 0."""
    case = random_case(T, d, N, K, 0, dtype, weights or dtype)
    features = case.rows(slice(0, 1)).encode("reference")[1][0, K - F :]
    return case.but(features=features, values=torch.linspace(-2, 9, F)).on("cuda")


def settled(case: Case) -> Tensor:
    """x of the same shape for which no p_f is positive."""
    pull = -100.0 * case.W_enc[case.features].float().sum(0)
    return pull.to(case.x.dtype).expand_as(case.x).contiguous()


def run_all(case: Case, impl: str) -> None:
    case.steer(impl), case.acts(impl)
    ops.decode(*case.encode(impl), case.W_dec, case.b_dec, impl=impl)


def compile_triton(case: Case, impl: str) -> None:
    """Which its first call does, and may wait for the device then; the CUDA library has no such
    call."""
    if impl == "triton":
        run_all(case, impl)


def test_the_library_is_here():
    assert choice.MISSING["cuda"] is None
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert all(has_kernel(f"saesteer_cuda::{name}", "CUDA") for name in ops._NAMES)
    assert "impl='cuda': is there" in choice.implementations()["cuda"]


# ---- decisions ----


def assert_decides_as_fp64(case: Case, impl: str) -> None:
    live, safe = case.acts(impl) > 0, ~case.undecided()
    exact = reference.feature_acts(*case.encoder, case.features, K, dtype=torch.float64) > 0
    assert live[0].any() and torch.equal(live[safe], exact[safe])
    print(f"{(~safe).double().mean():.2e} of the decisions within rounding")
    assert_steered(case, case.steer(impl), live)


@EVERY_DTYPE
@pytest.mark.parametrize("T", [1, 2, 16, 17, 64, 65, 300, 3000])
def test_decisions_are_fp64s_and_the_cpus(T, dtype, impl):
    case = some_live(T, dtype)
    assert_decides_as_fp64(case, impl)
    live, safe = case.acts(impl) > 0, ~case.undecided()
    assert torch.equal(live[safe].cpu(), (case.on("cpu").acts("cpu") > 0)[safe.cpu()])
    positive = reference.preacts(case.x, case.W_enc, case.b_enc)[:, case.features] > 0
    assert T < 16 or ((positive & ~live).any() and (~positive).any())


@TRITON_ALONE
@pytest.mark.parametrize("pair", [(DTYPES[0], DTYPES[1]), (DTYPES[1], DTYPES[0]), DTYPES[1:]])
@pytest.mark.parametrize("d", [511, 3072])
def test_mixed_types_and_widths(pair, d, impl):
    assert_decides_as_fp64(some_live(70, *pair, d=d), impl)


@EVERY_DTYPE
@pytest.mark.parametrize("T", [1, 40, 200, 700])
def test_integers_are_exact(T, dtype, impl):
    case = integer_case(T, 320, 3000, 32, 0, dtype, dtype)
    features = case.rows(slice(0, 1)).encode("reference")[1][0, 24:30]
    case = case.but(features=features, values=torch.arange(-2.0, 4.0)).on("cuda")
    exact = reference.feature_acts(*case.encoder, case.features, 32, dtype=torch.float64)
    assert (exact[0] > 0).all()
    assert torch.equal(case.acts(impl).double(), exact)
    assert same_bits(case.steer(impl) + 0.0, case.truth().to(dtype) + 0.0)
    values, indices = reference.encode(*case.encoder, 32, dtype=torch.float64)
    ours = case.encode(impl)
    assert torch.equal(ours[0].double(), values) and torch.equal(ours[1], indices)
    recon = ops.decode(*ours, case.W_dec, case.b_dec, impl=impl)
    assert torch.equal(recon, reference.decode(values, indices, case.W_dec, case.b_dec))


@pytest.mark.parametrize("T", [1, 33, 600])
def test_a_full_size_dictionary(T, impl):
    """Phi-3 Mini's width, with ties; the same run twice, bit for bit."""
    case = integer_case(T, 3072, 24576, 32, 4, *2 * (torch.bfloat16,)).on("cuda")
    exact = reference.feature_acts(*case.encoder, case.features, 32)
    assert torch.equal(case.acts(impl), exact)
    assert same_bits(case.steer(impl), case.steer(impl))
    values, indices = case.encode(impl)
    expected = reference.encode(*case.encoder, 32)
    assert torch.equal(values, expected[0]) and torch.equal(indices, expected[1])


@EVERY_DTYPE
@pytest.mark.parametrize("T", [1, 2, 5, 8, 16, 17, 64])
def test_one_launch_gives_the_bits_of_three(T, dtype, monkeypatch):
    case = integer_case(T, 3072, 24576, 32, 4, dtype, dtype).on("cuda")
    for each in (case, case.but(x=settled(case)), some_live(T, dtype), some_live(T, dtype, F=17)):
        at_once = each.steer("cuda"), each.acts("cuda")
        monkeypatch.setenv("SAESTEER_LADDER", "steps")
        assert same_bits(at_once[0], each.steer("cuda"))
        assert same_bits(at_once[1], each.acts("cuda"))
        monkeypatch.delenv("SAESTEER_LADDER")


@TRITON_ALONE
def test_every_latent_counts_when_all_may_be_live(impl):
    """k = N: every positive feature is live, and only after the whole scan."""
    case = some_live(300).but(k=N)
    acts = case.acts(impl)
    p = ops.project(case.x, case.W_enc[case.features], case.b_enc[case.features], impl=impl)
    assert torch.equal(acts, p.clamp(min=0)) and (acts > 0).any()


@TRITON_ALONE
@pytest.mark.parametrize("k", [32, 300])
@pytest.mark.parametrize("T", [1, 70, 700])
def test_encode_finds_the_largest(T, k, impl):
    case = some_live(T).but(k=k)
    values, indices = case.encode(impl)
    p = reference.preacts(case.x, case.W_enc, case.b_enc)
    best = p.sort(descending=True).values[:, :k]
    torch.testing.assert_close(values.double(), best.clamp(min=0), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(p.gather(-1, indices), best, atol=1e-3, rtol=1e-4)
    assert (indices.sort().values.diff() > 0).all()


def test_the_device_without_a_choice_gives_the_same():
    case = some_live(70)
    assert same_bits(ops.steer(*case.edit, impl="auto"), torch.ops.saesteer.steer(*case.edit))


# ---- what must not wait for the device ----


@pytest.mark.fault(68)
@pytest.mark.parametrize("T", [1, 40, 200])
def test_a_graph_replays_on_any_input(T, impl):
    case = some_live(T)
    x = case.x.clone()
    fixed = case.but(x=x)
    compile_triton(fixed, impl)
    fixed.steer(impl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, acts = fixed.steer(impl), fixed.acts(impl)
        indices = fixed.encode(impl)[1]
    for content in (settled(case), case.x, settled(case), case.x.flip(-1), case.x):
        x.copy_(content)
        y.zero_()
        graph.replay()
        eager = case.but(x=content)
        assert same_bits(y, eager.steer(impl)) and same_bits(acts, eager.acts(impl))
        assert torch.equal(indices, eager.encode(impl)[1])
    assert (acts > 0).any()


@pytest.mark.fault(68)
@pytest.mark.parametrize("T", [1, 200])
def test_nothing_waits_for_the_device(T, impl):
    case = some_live(T)
    compile_triton(case, impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all(case, impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.fault(31, 68)
@pytest.mark.parametrize("tokens", [(200, 150), (8, 3), (1, 200)], ids=str)
def test_streams_do_not_meet(tokens, impl):
    """Nor do blocks that wait for each other wait for another launch to end."""
    cases = [some_live(tokens[0]), some_live(tokens[1], F=7)]
    cases[1] = cases[1].but(x=cases[1].x.flip(-1))
    expected = [case.steer(impl) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(20):
        for case, stream, results in zip(cases, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(case.steer(impl))
    torch.cuda.synchronize()
    for results, y in zip(found, expected, strict=True):
        assert all(same_bits(result, y) for result in results)


@pytest.mark.parametrize("op", ["steer", "encode"])
@pytest.mark.parametrize("T", [1, 200])
def test_a_new_thread_needs_no_other_call_first(T, op):
    """It has no CUDA context yet, and memory comes from PyTorch's pool without one."""
    case = some_live(T)
    run = {"steer": case.steer, "encode": case.encode}[op]
    run("cuda")
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run, "cuda").result()


@pytest.mark.fault(68)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    case = some_live(200)
    other = case.on("cuda:1")
    assert same_bits(other.steer("cuda").cpu(), case.steer("cuda").cpu())
    with pytest.raises(RuntimeError, match="W_enc is on cpu, x on cuda:1; move one to the other"):
        other.but(W_enc=case.W_enc).steer("cuda")


@pytest.mark.fault(19)
def test_arguments_on_the_cpu_are_named():
    case = some_live(3)
    for name in ("W_enc", "b_enc", "features", "values"):
        with pytest.raises(
            RuntimeError, match=f"{name} is on cpu, x on cuda:0; move one to the other"
        ):
            case.but(**{name: getattr(case, name).cpu()}).steer("cuda")


@pytest.mark.parametrize(
    ("impl", "mode"),
    [("cuda", "default"), ("cuda", "reduce-overhead"), ("triton", "default")],
    indirect=["impl"],
)
def test_compiles_without_a_break(impl, mode):
    case = some_live(70)
    compiled = torch.compile(
        lambda x: 2 * ops.steer(x, *case.edit[1:], impl=impl), fullgraph=True, mode=mode
    )
    for _ in range(3):
        assert torch.equal(compiled(case.x), 2 * case.steer(impl))


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

A_TOKEN = {"cuda": 0, "triton": 64}
"""Bytes."""


@pytest.mark.parametrize("T", [1, 8192, 50_000])
@pytest.mark.parametrize("F", [1, 16])
def test_memory_beside_the_output_is_bounded(T, F, impl):
    edit = some_live(T, F=F).edit
    ops.steer(*edit, impl=impl)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = ops.steer(*edit, impl=impl)
    torch.cuda.synchronize()
    beside = torch.cuda.max_memory_allocated() - before - y.nbytes
    assert beside <= (1 << 20) + A_TOKEN[impl] * T + 4096


def room(gigabytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GB of device memory")


@pytest.mark.fault(17)
def test_tokens_beyond_32_bit_addresses(impl):
    room(20)
    T = (1 << 31) // D + 100
    case = some_live(100)
    x = case.x.new_zeros(T, D)
    x[:100] = x[-100:] = case.x
    y = case.but(x=x).steer(impl)
    expected = case.steer(impl)
    assert same_bits(y[-100:], expected) and same_bits(y[:100], expected)


@pytest.mark.fault(17)
def test_latents_beyond_32_bit_addresses(impl):
    room(30)
    latents = (1 << 31) // D + 300
    random = torch.Generator("cuda").manual_seed(0)
    signs = dict(generator=random, device="cuda", dtype=torch.int8)
    W_enc = torch.randint(-1, 2, (latents, D), **signs).bfloat16()
    x = torch.randint(-1, 2, (90, D), **signs).bfloat16()
    b_enc = torch.zeros(latents, device="cuda")
    features = latents - 300 + (x[:3].float() @ W_enc[-300:].float().T).argmax(-1).unique()
    for T, k in ((3, 1), (3, latents // 2), (90, latents // 2), (3, latents)):
        acts = ops.feature_acts(x[:T], W_enc, b_enc, features, k, impl=impl)
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
