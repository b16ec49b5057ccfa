"""The Triton kernels on a GPU: real sizes, the CPU's decisions, graphs, streams, memory, addresses.
What they compute on small input is in test_triton_kernels.py."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from ops_cases import DTYPES, Case, assert_steered, integer_case, random_case, same_bits
from torch import Tensor

from saesteer_fast import ops, reference

pytest.importorskip("triton", reason="Triton is not installed")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

D, N, K = 512, 4096, 32
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))


def on(device: str, case: Case) -> Case:
    tensors = {f.name: getattr(case, f.name) for f in fields(case)}
    return replace(case, **{k: t.to(device) for k, t in tensors.items() if isinstance(t, Tensor)})


def some_live(T: int, dtype=torch.bfloat16, weights=None, *, F: int = 4, d: int = D) -> Case:
    """Features that are live in token 0, on the CPU."""
    case = random_case(T, d, N, K, 0, dtype, weights or dtype)
    features = case.rows(slice(0, 1)).encode("reference")[1][0, K - F :]
    return case.but(features=features, values=torch.linspace(-2, 9, F))


def settled(case: Case) -> Tensor:
    """x of the same shape for which no p_f is positive."""
    pull = -100.0 * case.W_enc[case.features].float().sum(0)
    return pull.to(case.x.dtype).expand_as(case.x).contiguous()


# ---- decisions ----


@EVERY_DTYPE
@pytest.mark.parametrize("T", [1, 2, 16, 17, 64, 65, 300, 3000])
def test_decisions_are_fp64s_and_the_cpus(T, dtype):
    on_cpu = some_live(T, dtype)
    case = on("cuda", on_cpu)
    live = case.acts("triton") > 0
    safe = ~case.undecided()
    exact = reference.feature_acts(*case.encoder, case.features, K, dtype=torch.float64) > 0
    assert torch.equal(live[safe], exact[safe])
    assert torch.equal(live[safe].cpu(), (on_cpu.acts("cpu") > 0)[safe.cpu()])
    positive = reference.preacts(case.x, case.W_enc, case.b_enc)[:, case.features] > 0
    assert live[0].any() and (T < 16 or ((positive & ~live).any() and (~positive).any()))
    assert_steered(case, case.steer("triton"), live)


@pytest.mark.parametrize("pair", [(DTYPES[0], DTYPES[1]), (DTYPES[1], DTYPES[0]), DTYPES[1:]])
@pytest.mark.parametrize("d", [511, 3072])
def test_mixed_types_and_widths(pair, d):
    case = on("cuda", some_live(70, *pair, d=d))
    live, safe = case.acts("triton") > 0, ~case.undecided()
    exact = reference.feature_acts(*case.encoder, case.features, K, dtype=torch.float64) > 0
    assert live.any() and torch.equal(live[safe], exact[safe])
    assert_steered(case, case.steer("triton"), live)


@EVERY_DTYPE
@pytest.mark.parametrize("T", [1, 40, 200])
def test_integers_are_exact(T, dtype):
    case = integer_case(T, 320, 1000, 32, 0, dtype, dtype)
    features = case.rows(slice(0, 1)).encode("reference")[1][0, 24:30]
    case = on("cuda", case.but(features=features, values=torch.arange(-2.0, 4.0)))
    exact = reference.feature_acts(*case.encoder, case.features, 32, dtype=torch.float64)
    assert (exact[0] > 0).all()
    assert torch.equal(case.acts("triton").double(), exact)
    assert same_bits(case.steer("triton") + 0.0, case.truth().to(dtype) + 0.0)
    values, indices = reference.encode(*case.encoder, 32, dtype=torch.float64)
    ours = case.encode("triton")
    assert torch.equal(ours[0].double(), values) and torch.equal(ours[1], indices)


def test_every_latent_counts_when_all_may_be_live():
    """k = N: every positive feature is live, and only after the whole scan."""
    case = on("cuda", some_live(300)).but(k=N)
    acts = case.acts("triton")
    p = ops.project(case.x, case.W_enc[case.features], case.b_enc[case.features], impl="triton")
    assert torch.equal(acts, p.clamp(min=0)) and (acts > 0).any()


@pytest.mark.parametrize("k", [32, 300])
@pytest.mark.parametrize("T", [1, 70, 700])
def test_encode_finds_the_largest(T, k):
    case = on("cuda", some_live(T)).but(k=k)
    values, indices = case.encode("triton")
    p = reference.preacts(case.x, case.W_enc, case.b_enc)
    best = p.sort(descending=True).values[:, :k]
    torch.testing.assert_close(values.double(), best.clamp(min=0), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(p.gather(-1, indices), best, atol=1e-3, rtol=1e-4)
    assert (indices.sort().values.diff() > 0).all()


def test_the_device_without_a_choice_gives_the_same():
    case = on("cuda", some_live(70))
    assert same_bits(ops.steer(*case.edit, impl="auto"), torch.ops.saesteer.steer(*case.edit))


# ---- what must not wait for the device ----


@pytest.mark.fault(68)
@pytest.mark.parametrize("T", [1, 40, 200])
def test_a_graph_replays_on_any_input(T):
    case = on("cuda", some_live(T))
    x = case.x.clone()
    fixed = case.but(x=x)
    fixed.steer("triton"), fixed.acts("triton"), fixed.encode("triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, acts = fixed.steer("triton"), fixed.acts("triton")
        indices = fixed.encode("triton")[1]
    shuffled = case.x.flip(-1)
    for content in (settled(case), case.x, settled(case), shuffled, case.x):
        x.copy_(content)
        y.zero_()
        graph.replay()
        eager = case.but(x=content)
        assert same_bits(y, eager.steer("triton")) and same_bits(acts, eager.acts("triton"))
        assert torch.equal(indices, eager.encode("triton")[1])
    assert (acts > 0).any()


@pytest.mark.fault(68)
@pytest.mark.parametrize("T", [1, 200])
def test_nothing_waits_for_the_device(T):
    case = on("cuda", some_live(T))

    def all_ops():
        case.steer("triton"), case.acts("triton")
        ops.decode(*case.encode("triton"), case.W_dec, case.b_dec, impl="triton")

    all_ops()
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_ops()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.fault(31, 68)
def test_streams_do_not_meet():
    cases = [on("cuda", some_live(200)), on("cuda", some_live(150, F=7))]
    cases[1] = cases[1].but(x=cases[1].x.flip(-1))
    expected = [case.steer("triton") for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(20):
        for case, stream, results in zip(cases, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(case.steer("triton"))
    torch.cuda.synchronize()
    for results, y in zip(found, expected, strict=True):
        assert all(same_bits(result, y) for result in results)


def test_compiles_without_a_break():
    case = on("cuda", some_live(70))
    compiled = torch.compile(
        lambda x: 2 * ops.steer(x, *case.edit[1:], impl="triton"), fullgraph=True
    )
    assert torch.equal(compiled(case.x), 2 * case.steer("triton"))


# ---- memory ----


@pytest.mark.parametrize("T", [1, 8192, 50_000])
@pytest.mark.parametrize("F", [1, 16])
def test_memory_beside_the_output_is_bounded(T, F):
    edit = on("cuda", some_live(T, F=F)).edit
    ops.steer(*edit, impl="triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = ops.steer(*edit, impl="triton")
    torch.cuda.synchronize()
    beside = torch.cuda.max_memory_allocated() - before - y.nbytes
    assert beside <= (1 << 20) + 64 * T + 4096


def room(gigabytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GB of device memory")


@pytest.mark.fault(17)
def test_tokens_beyond_32_bit_addresses():
    room(20)
    T = (1 << 31) // D + 100
    case = on("cuda", some_live(100))
    x = case.x.new_zeros(T, D)
    x[:100] = x[-100:] = case.x
    y = case.but(x=x).steer("triton")
    expected = case.steer("triton")
    assert same_bits(y[-100:], expected) and same_bits(y[:100], expected)


@pytest.mark.fault(17)
def test_latents_beyond_32_bit_addresses():
    room(30)
    latents = (1 << 31) // D + 300
    random = torch.Generator("cuda").manual_seed(0)
    signs = dict(generator=random, device="cuda", dtype=torch.int8)
    W_enc = torch.randint(-1, 2, (latents, D), **signs).bfloat16()
    x = torch.randint(-1, 2, (3, D), **signs).bfloat16()
    b_enc = torch.zeros(latents, device="cuda")
    p = x.float() @ W_enc[-300:].float().T
    features = latents - 300 + p.argmax(-1).unique()
    for k in (1, latents // 2, latents):
        acts = ops.feature_acts(x, W_enc, b_enc, features, k, impl="triton")
        few = [reference.feature_acts(row, W_enc, b_enc, features, k) for row in x.split(1)]
        assert torch.equal(acts, torch.cat(few))
