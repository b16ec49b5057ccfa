"""What tests/ptx makes of PTX: what instructions compute, against PyTorch and Python's integers,
and that what a GPU would not forgive is found."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from ptx.executor import Executor
from torch import Tensor

MODULE = """
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry kernel(.param .u64 source, .param .u64 target, .param .align 64 .b8 map[128])
{{
.reg .pred %p<9>;
.reg .b16 %h<9>;
.reg .b32 %r<40>, %tid, %lane, %block, %memory;
.reg .f32 %f<200>;
.reg .b64 %d<20>, %in, %out, %map;
ld.param.u64 %in, [source];
ld.param.u64 %out, [target];
mov.b64 %map, map;
cvta.param.u64 %map, %map;
mov.u32 %tid, %tid.x;
and.b32 %lane, %tid, 31;
mov.u32 %block, %ctaid.x;
mov.u32 %memory, dynamic;
{body}
ret;
}}
"""


@pytest.fixture(params=range(4), ids="seed{}".format)
def run(request, ptx_executor: Executor):
    """Runs a kernel's body on two tensors, in one of the orders that threads may take."""

    def run(body: str, source: Tensor, target: Tensor, **options) -> Tensor:
        return execute(ptx_executor, body, source, target, seed=request.param, **options)

    return run


def execute(
    executor: Executor,
    body: str,
    source: Tensor,
    target: Tensor,
    *,
    threads=32,
    blocks=1,
    shared=0,
    together=False,
    tensor_map: Tensor | None = None,
    seed=0,
) -> Tensor:
    kernel = executor.load(MODULE.format(body=body).encode(), "kernel")
    addresses = [torch.tensor(t.data_ptr()) for t in (source, target)]
    described = torch.zeros(128, dtype=torch.uint8) if tensor_map is None else tensor_map
    try:
        grid = blocks, 1, 1
        executor.launch(kernel, grid, threads, shared, together, [*addresses, described], seed=seed)
    finally:
        executor.unload(kernel)
    return target


# ---- registers ----


def wrap(value: int, bits: int, signed: bool) -> int:
    value %= 1 << bits
    return value - (1 << bits) if signed and value >> (bits - 1) else value


EDGES = [0, 1, 2, 5, 31, 32, 63, 64, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1]
EDGES += [2**63, 2**64 - 1, 0x0123456789ABCDEF]


def divided(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(a: int, at: int, length: int) -> int:
    return a >> at & ((1 << length) - 1)


def permuted(a: int, b: int, chosen: int) -> int:
    both = (a | b << 32).to_bytes(8, "little")
    out = bytearray()
    for place in range(4):
        which = chosen >> 4 * place & 15
        byte = both[which & 7]
        out.append((255 if byte >> 7 else 0) if which & 8 else byte)
    return int.from_bytes(out, "little")


INTEGERS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_integers(ptx_executor, bits, signed):
    pairs = [(a, b) for a in EDGES for b in EDGES]
    kind, letter = "s" if signed else "u", "d" if bits == 64 else "r"
    values = [(wrap(a, bits, signed), wrap(b, bits, signed)) for a, b in pairs]
    names = {
        f"{op}.{'b' if op in ('and', 'or', 'xor') else kind}{bits}": of
        for op, of in INTEGERS.items()
    }
    names[f"mul.hi.{kind}{bits}"] = lambda a, b: a * b >> bits
    for name, of in names.items():
        found = binary(ptx_executor, name, pairs, letter, bits)
        wanted = [wrap(of(a, b), bits, False) for a, b in values]
        assert found == wanted, name
    name = f"div.{kind}{bits}"
    kept = [(a, b) for a, b in pairs if wrap(b, bits, signed)]
    wanted = [
        wrap(divided(wrap(a, bits, signed), wrap(b, bits, signed)), bits, False) for a, b in kept
    ]
    assert binary(ptx_executor, name, kept, letter, bits) == wanted
    for name, of in {
        f"shl.b{bits}": lambda a, b: a << b if b < bits else 0,
        f"shr.{kind}{bits}": lambda a, b: a >> min(b, bits),
    }.items():
        by = [(a, b % 2**32) for a, b in pairs]
        wanted = [wrap(of(wrap(a, bits, signed), b), bits, False) for a, b in by]
        assert binary(ptx_executor, name, by, letter, bits, shift=True) == wanted, name


def binary(executor, name: str, pairs, letter: str, bits: int, shift: bool = False) -> list[int]:
    """The instruction's results for all pairs, as they come without a sign."""
    source = torch.tensor([[wrap(v, 64, True) for v in pair] for pair in pairs])
    by = "cvt.u32.u64 %r9, %d2;" if shift else ""
    second = "%r9" if shift else f"%{letter}2"
    body = f"""
    mad.lo.s32 %r20, %block, 32, %tid;
    setp.ge.s32 %p1, %r20, {len(pairs)};
    @%p1 ret;
    mad.wide.s32 %d5, %r20, 16, %in;
    mad.wide.s32 %d6, %r20, 8, %out;
    ld.global.v2.u64 {{%d1, %d2}}, [%d5];
    cvt.u32.u64 %r1, %d1;
    cvt.u32.u64 %r2, %d2;
    {by}
    {name} %{letter}3, %{letter}1, {second};
    st.global.u{bits} [%d6], %{letter}3;
    """
    target = torch.zeros(len(pairs), dtype=torch.int64)
    execute(executor, body, source, target, blocks=-(-len(pairs) // 32))
    return [wrap(v, bits, False) for v in target.tolist()]


A, B = 0x89ABCDEF, 0x01234567
BITS = {
    "mad.lo.s32 %r3, %r1, %r2, 7": A * B + 7,
    "mul.wide.u32 %d3, %r1, %r2; cvt.u32.u64 %r3, %d3": A * B,
    "mul.wide.s32 %d3, %r1, %r2; shr.u64 %d3, %d3, 32; cvt.u32.u64 %r3, %d3": (A - 2**32) * B >> 32,
    "mad.wide.u32 %d3, %r1, %r2, 5; shr.u64 %d3, %d3, 32; cvt.u32.u64 %r3, %d3": (A * B + 5) >> 32,
    "bfe.u32 %r3, %r1, 5, 9": field(A, 5, 9),
    "bfe.s32 %r3, %r1, 28, 4": -8,
    "bfe.u32 %r3, %r1, 28, 99": field(A, 28, 4),
    "bfi.b32 %r3, %r1, %r2, 8, 12": B & ~0xFFF00 | field(A, 0, 12) << 8,
    "prmt.b32 %r3, %r1, %r2, 0x3340": permuted(A, B, 0x3340),
    "prmt.b32 %r3, %r1, %r2, 0x7B8F": permuted(A, B, 0x7B8F),
    "popc.b32 %r3, %r1": A.bit_count(),
    "clz.b32 %r3, %r2": 7,
    "brev.b32 %r3, %r1": int(f"{A:032b}"[::-1], 2),
    "not.b32 %r3, %r1": ~A,
    "neg.s32 %r3, %r1": -A,
    "abs.s32 %r3, %r1": 2**32 - A,
    "cvt.s32.s8 %r3, %r1": -17,
    "cvt.u32.u16 %r3, %h1": 0xCDEF,
    "mov.b32 {%h2, %h3}, %r1; mov.b32 %r3, {%h3, %h2}": 0xCDEF89AB,
    "mov.b64 %d3, {%r1, %r2}; shr.u64 %d3, %d3, 16; cvt.u32.u64 %r3, %d3": 0x456789AB,
    "selp.b32 %r3, %r1, %r2, !%p2": B,
    "and.pred %p3, %p2, !%p2; selp.b32 %r3, 1, 2, %p3": 2,
    "redux.sync.add.s32 %r3, %lane, -1": 496,
    "redux.sync.max.s32 %r3, %lane, -1": 31,
    "elect.sync %r3|%p3, -1; selp.b32 %r3, 5, 5, %p3": 5,
    "vote.sync.ballot.b32 %r3, %p2, -1": 2**32 - 1,
}


@pytest.mark.parametrize("instructions", BITS)
def test_bits(ptx_executor, instructions):
    body = f"""
    mov.u32 %r1, {A:#x};
    mov.u32 %r2, {B:#x};
    mov.b32 {{%h1, %h2}}, %r1;
    setp.eq.s32 %p2, %r1, %r1;
    {instructions};
    mad.wide.s32 %d6, %tid, 4, %out;
    st.global.u32 [%d6], %r3;
    """
    found = execute(ptx_executor, body, torch.zeros(1), torch.zeros(32, dtype=torch.int32))
    assert {v % 2**32 for v in found.tolist()} == {BITS[instructions] % 2**32}


NAN, INF = math.nan, math.inf
REALS = [0.0, -0.0, 1.0, -1.5, 3.0e38, -3.0e38, 1e-40, 65519.0, 65520.0, INF, -INF, NAN]
REALS += [1.00390625, 1.01171875, 2.5, 3.5, -2.5, 2.0**31, -(2.0**31), 2.0**40]


def reals(executor, instruction: str, *columns: list[float]) -> Tensor:
    """%f3, or %r3, of the instruction for %f1 and %f2, as bits."""
    source = torch.tensor(list(zip(*columns, strict=True)))
    body = f"""
    mad.lo.s32 %r20, %block, 32, %tid;
    setp.ge.s32 %p1, %r20, {len(source)};
    @%p1 ret;
    mad.wide.s32 %d5, %r20, {4 * source.shape[1]}, %in;
    mad.wide.s32 %d6, %r20, 4, %out;
    ld.global.f32 %f1, [%d5];
    ld.global.f32 %f2, [%d5 + {4 * source.shape[1] - 4}];
    {instruction};
    st.global.b32 [%d6], {"%f3" if " %f3" in instruction else "%r3"};
    """
    target = torch.zeros(len(source), dtype=torch.int32)
    return execute(executor, body, source, target, blocks=-(-len(source) // 32))


def test_products_and_sums_round_once(ptx_executor):
    a, b = [list(c) for c in zip(*((a, b) for a in REALS for b in REALS), strict=True)]
    x, y = torch.tensor(a), torch.tensor(b)
    for name, wanted in {
        "add.f32 %f3, %f1, %f2": x + y,
        "sub.f32 %f3, %f1, %f2": x - y,
        "mul.f32 %f3, %f1, %f2": x * y,
        "fma.rn.f32 %f3, %f1, %f2, %f2": (x.double() * y.double() + y.double()).float(),
        "max.f32 %f3, %f1, %f2": torch.fmax(x, y),
        "max.NaN.f32 %f3, %f1, %f2": torch.maximum(x, y),
        "min.f32 %f3, %f1, %f2": torch.fmin(x, y),
    }.items():
        found = reals(ptx_executor, name, a, b).view(torch.float32)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_know_nan(ptx_executor, name):
    a, b = [list(c) for c in zip(*((a, b) for a in REALS for b in REALS), strict=True)]
    x, y = torch.tensor(a), torch.tensor(b)
    ordered = ~(x.isnan() | y.isnan())
    holds = getattr(torch, name)(x, y)
    for suffix, wanted in {"": holds & ordered, "u": holds | ~ordered}.items():
        set_one = f"setp.{name}{suffix}.f32 %p2, %f1, %f2; selp.b32 %r3, 1, 0, %p2"
        assert torch.equal(reals(ptx_executor, set_one, a, b).bool(), wanted)
    for which, wanted in {"num": ordered, "nan": ~ordered}.items():
        set_one = f"setp.{which}.f32 %p2, %f1, %f2; selp.b32 %r3, 1, 0, %p2"
        assert torch.equal(reals(ptx_executor, set_one, a, b).bool(), wanted)


def test_conversions(ptx_executor):
    x = torch.tensor(REALS)
    convert = partial(reals, ptx_executor)
    for name, dtype in {"bf16": torch.bfloat16, "f16": torch.float16}.items():
        back = f"cvt.rn.{name}.f32 %h1, %f1; cvt.f32.{name} %f3, %h1"
        found = convert(back, REALS).view(torch.float32)
        torch.testing.assert_close(found, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
        pairs = convert(f"cvt.rn.{name}x2.f32 %r3, %f1, %f2", REALS, REALS[::-1])
        upper = (pairs >> 16).short().view(dtype).float()
        torch.testing.assert_close(upper, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    whole = [v for v in REALS if abs(v) < 2**31]
    assert convert("cvt.rni.s32.f32 %r3, %f1", whole).tolist() == [round(v) for v in whole]
    assert convert("cvt.rzi.s32.f32 %r3, %f1", whole).tolist() == [int(v) for v in whole]
    assert convert("cvt.rmi.s32.f32 %r3, %f1", [-1.5, INF, NAN]).tolist() == [-2, 2**31 - 1, 0]


# ---- lanes ----


@pytest.mark.parametrize(
    ("kind", "by", "clamp"), [("bfly", 5, 31), ("up", 3, 0), ("down", 4, 31), ("idx", 9, 31)]
)
def test_shuffles(ptx_executor, kind, by, clamp):
    body = f"""
    mul.lo.s32 %r1, %tid, 7;
    shfl.sync.{kind}.b32 %r2|%p1, %r1, {by}, {clamp}, -1;
    mad.wide.s32 %d6, %tid, 4, %out;
    st.global.u32 [%d6], %r2;
    """
    found = execute(ptx_executor, body, torch.zeros(1), torch.zeros(32, dtype=torch.int32))
    source = {"bfly": lambda t: t ^ by, "up": lambda t: t - by, "down": lambda t: t + by}
    from_ = [source.get(kind, lambda t: by)(t) for t in range(32)]
    wanted = [7 * (s if 0 <= s < 32 else t) for t, s in enumerate(from_)]
    assert found.tolist() == wanted


def test_lanes_part_and_meet_again(run):
    """Each goes round a loop as often as its number says; then all are needed at once."""
    body = """
    mov.u32 %r1, 0;
    mov.u32 %r2, %lane;
    again:
    setp.eq.s32 %p1, %r2, 0;
    @%p1 bra done;
    add.s32 %r1, %r1, %r2;
    sub.s32 %r2, %r2, 1;
    bra again;
    done:
    redux.sync.add.s32 %r3, %r1, -1;
    mad.wide.s32 %d6, %tid, 4, %out;
    st.global.u32 [%d6], %r3;
    """
    found = run(body, torch.zeros(1), torch.zeros(32, dtype=torch.int32))
    assert set(found.tolist()) == {sum(t * (t + 1) // 2 for t in range(32))}


# ---- memory: what is right, and what is found ----

MINE = "mad.lo.s32 %r1, %tid, 4, %memory; st.shared.u32 [%r1], %tid;"
"""Everybody's number into shared memory."""
NEIGHBOURS = """
xor.b32 %r2, %tid, 33;
mad.lo.s32 %r2, %r2, 4, %memory;
ld.shared.u32 %r3, [%r2];
mad.wide.s32 %d6, %tid, 4, %out;
st.global.u32 [%d6], %r3;
"""
OF_64 = dict(threads=64, shared=256)


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def test_a_barrier_orders_warps(run):
    found = run(MINE + "bar.sync 0;" + NEIGHBOURS, torch.zeros(1), integers(64), **OF_64)
    assert found.tolist() == [t ^ 33 for t in range(64)]
    with pytest.raises(RuntimeError, match=r"a race|nobody has written"):
        run(MINE + NEIGHBOURS, torch.zeros(1), integers(64), **OF_64)
    with pytest.raises(RuntimeError, match=r"a race|nobody has written"):
        run(MINE + "bar.warp.sync -1;" + NEIGHBOURS, torch.zeros(1), integers(64), **OF_64)


def test_a_barrier_counts(run):
    body = """
    setp.lt.s32 %p1, %tid, 37;
    bar.red.popc.u32 %r3, 0, %p1;
    bar.red.popc.u32 %r2, 0, !%p1;
    mad.lo.s32 %r3, %r3, 100, %r2;
    mad.wide.s32 %d6, %tid, 4, %out;
    st.global.u32 [%d6], %r3;
    """
    assert run(body, torch.zeros(1), integers(64), **OF_64).tolist() == [3727] * 64


def test_lanes_of_a_warp_race_too(run):
    there = NEIGHBOURS.replace("33", "1")
    found = run(MINE + "bar.warp.sync -1;" + there, torch.zeros(1), integers(64), **OF_64)
    assert found.tolist() == [t ^ 1 for t in range(64)]
    with pytest.raises(RuntimeError, match="a race"):
        run(MINE + there, torch.zeros(1), integers(64), **OF_64)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("st.shared.u32 [%memory + 254], 1;", "misaligned"),
        ("st.shared.u32 [%memory + 256], 1;", "outside of the block's shared memory"),
        ("ld.shared.u32 %r3, [%memory];", "nobody has written"),
        ("setp.lt.s32 %p1, %tid, 32; @%p1 bar.sync 0;", "waits for ever"),
        ("setp.lt.s32 %p1, %tid, 16; @%p1 bar.sync 0;", "not by all lanes"),
        ("setp.eq.s32 %p1, %tid, 0; @%p1 bra a; bar.sync 0; ret; a: bar.sync 1;", "for each other"),
        ("setp.eq.s32 %p1, %tid, 63; @%p1 trap;", "a trap"),
        ("a: bra a;", "does not end"),
        ("mul.approx.f32 %f1, %f1, %f1;", "not known here"),
        ("add.s32 %r1, %r1, %nobody;", "special register"),
        ("add.s32 %r1, %r1, nobody;", "is not known"),
        ("bra nowhere;", "no label"),
    ],
)
def test_what_a_gpu_would_not_forgive(run, body, said):
    with pytest.raises(RuntimeError, match=said):
        run(body, torch.zeros(1), integers(64), **OF_64)


PUBLISHED = """
setp.ne.s32 %p1, %tid, 0;
@%p1 ret;
setp.ne.s32 %p2, %block, 0;
@%p2 bra reader;
st.global.u32 [%out], 7;
{fence}
st.relaxed.gpu.global.u32 [%out + 8], 1;
ret;
reader:
ld.relaxed.gpu.global.u32 %r1, [%out + 8];
setp.eq.s32 %p3, %r1, 0;
@%p3 bra reader;
{fence}
ld.global.u32 %r2, [%out];
st.global.u32 [%out + 4], %r2;
"""
TWO = dict(blocks=2, together=True)


def test_fences_order_blocks(run):
    fenced = PUBLISHED.format(fence="fence.acq_rel.gpu;")
    assert run(fenced, torch.zeros(1), integers(4), **TWO).tolist() == [7, 7, 1, 0]
    with pytest.raises(RuntimeError, match="a race"):
        run(PUBLISHED.format(fence=""), torch.zeros(1), integers(4), **TWO)
    released = PUBLISHED.format(fence="").replace("ld.relaxed", "ld.acquire")
    released = released.replace("st.relaxed", "st.release")
    assert run(released, torch.zeros(1), integers(4), **TWO).tolist() == [7, 7, 1, 0]


def test_what_is_of_one_block_orders_no_other(run):
    narrow = PUBLISHED.format(fence="fence.acq_rel.gpu;").replace("relaxed.gpu", "relaxed.cta")
    with pytest.raises(RuntimeError, match="a race"):
        run(narrow, torch.zeros(1), integers(4), **TWO)
    for fence in ("fence.acq_rel.cta;", "membar.cta;"):
        with pytest.raises(RuntimeError, match="not known here"):
            run(PUBLISHED.format(fence=fence), torch.zeros(1), integers(4), **TWO)


def test_what_is_read_past_coherence_is_not_written(run):
    """By nobody while the kernel runs, though in order: a stale line may answer."""
    read = "ld.global.nc.u32 %r1, [%in];"
    store = "st.global.u32 [{at}], %r1;"
    source = integers(1) + 5
    assert run(read + store.format(at="%out"), source, integers(1), threads=1).tolist() == [5]
    for body in (
        read + "add.u32 %r1, %r1, 1;" + store.format(at="%in"),
        "mov.u32 %r1, 7;" + store.format(at="%in") + read,
    ):
        with pytest.raises(RuntimeError, match="past coherence"):
            run(body, source, integers(1), threads=1)


def test_shared_memory_has_an_end(run):
    with pytest.raises(RuntimeError, match="more shared memory"):
        run("", torch.zeros(1), integers(1), shared=229 << 10)


def test_blocks_that_never_meet_race(run):
    """Though one may end before the other begins."""
    with pytest.raises(RuntimeError, match="a race"):
        run("st.global.u32 [%out], %block;", torch.zeros(1), integers(1), blocks=2)


def test_atomics_do_not_race(run):
    body = "atom.global.add.u32 %r1, [%out], 1; red.global.gpu.relaxed.max.s32 [%out + 4], %tid;"
    found = run(body, torch.zeros(1), integers(2), blocks=3, threads=64)
    assert found.tolist() == [192, 63]
    with pytest.raises(RuntimeError, match="a race"):
        run(body + "ld.global.u32 %r2, [%out];", torch.zeros(1), integers(2), blocks=3)


COPIED = """
mad.wide.s32 %d1, %tid, 16, %in;
mad.lo.s32 %r1, %tid, 16, %memory;
cp.async.cg.shared.global [%r1], [%d1], 16, {there};
cp.async.commit_group;
{wait}
bar.sync 0;
xor.b32 %r2, %tid, 33;
mad.lo.s32 %r2, %r2, 16, %memory;
ld.shared.u32 %r3, [%r2];
mad.wide.s32 %d6, %tid, 4, %out;
st.global.u32 [%d6], %r3;
"""


def test_copies_are_waited_for(run):
    source = torch.arange(256, dtype=torch.int32)
    launch = dict(threads=64, shared=1024)
    found = run(
        COPIED.format(there=16, wait="cp.async.wait_group 0;"), source, integers(64), **launch
    )
    assert found.tolist() == [4 * (t ^ 33) for t in range(64)]
    nothing = COPIED.format(there=0, wait="cp.async.wait_group 0;")
    assert not run(nothing, source, integers(64), **launch).any()
    with pytest.raises(RuntimeError, match=r"a race|before its copies"):
        run(COPIED.format(there=16, wait="cp.async.wait_group 1;"), source, integers(64), **launch)


# ---- products of matrices ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_warps_product(ptx_executor, dtype):
    """ldmatrix of a [16, 16] and b [8, 16], both by rows, then mma.sync."""
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    source = torch.randn(24, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    body = f"""
    mad.wide.s32 %d1, %tid, 16, %in;
    mad.lo.s32 %r1, %tid, 16, %memory;
    ld.global.v4.u32 {{%r2, %r3, %r4, %r5}}, [%d1];
    st.shared.v4.u32 [%r1], {{%r2, %r3, %r4, %r5}};
    setp.ge.s32 %p1, %tid, 16;
    @%p1 bra filled;
    ld.global.v4.u32 {{%r2, %r3, %r4, %r5}}, [%d1 + 512];
    st.shared.v4.u32 [%r1 + 512], {{%r2, %r3, %r4, %r5}};
    filled:
    bar.warp.sync -1;
    and.b32 %r6, %lane, 15;
    shr.u32 %r7, %lane, 4;
    mad.lo.s32 %r8, %r6, 32, %memory;
    mad.lo.s32 %r8, %r7, 16, %r8;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r8];
    and.b32 %r6, %lane, 7;
    bfe.u32 %r7, %lane, 3, 1;
    mad.lo.s32 %r8, %r6, 32, %memory;
    mad.lo.s32 %r8, %r7, 16, %r8;
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r14, %r15}}, [%r8 + 512];
    mov.f32 %f4, 0f3F800000;
    mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{%f0, %f1, %f2, %f3}},
      {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%f4, %f4, %f4, %f4}};
    shr.u32 %r6, %lane, 2;
    and.b32 %r7, %lane, 3;
    mad.wide.s32 %d2, %r6, 32, %out;
    mad.wide.s32 %d2, %r7, 8, %d2;
    st.global.v2.f32 [%d2], {{%f0, %f1}};
    st.global.v2.f32 [%d2 + 256], {{%f2, %f3}};
    """
    found = execute(ptx_executor, body, source, torch.zeros(16, 8), shared=768)
    a, b = source[:16].double(), source[16:].double()
    torch.testing.assert_close(found, (a @ b.T + 1).float(), rtol=1e-6, atol=1e-6)


ACCUMULATORS = ", ".join(f"%f{i}" for i in range(4))
GROUPS_PRODUCT = """
setp.ne.s32 %p1, %tid, 0;
@%p1 bra initialised;
mbarrier.init.shared::cta.b64 [%memory], 1;
fence.mbarrier_init.release.cluster;
initialised:
bar.sync 0;
@%p1 bra issued;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%memory], 9216;
add.s32 %r1, %memory, 1024;
cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
  [%r1], [%map, {{0, 0}}], [%memory];
issued:
{wait}
add.s32 %r2, %memory, 1024;
cvt.u64.u32 %d1, %r2;
shr.u64 %d1, %d1, 4;
or.b64 %d1, %d1, 0x4000004000010000;
add.s64 %d2, %d1, 512;
{fence}
setp.ne.s32 %p2, 0, 0;
{products}
wgmma.commit_group.sync.aligned;
{finish}
shr.u32 %r3, %tid, 5;
shr.u32 %r4, %lane, 2;
mad.lo.s32 %r3, %r3, 16, %r4;
and.b32 %r4, %lane, 3;
mad.wide.s32 %d3, %r3, 32, %out;
mad.wide.s32 %d3, %r4, 8, %d3;
st.global.v2.f32 [%d3], {{%f0, %f1}};
st.global.v2.f32 [%d3 + 256], {{%f2, %f3}};
"""
WAIT = """
waiting: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%memory], 0;
@!%p3 bra waiting;
"""
FINISH = "wgmma.wait_group.sync.aligned 0;"


def groups_product(
    run, tensor_map, source, wait=WAIT, fence="wgmma.fence.sync.aligned;", finish=FINISH
) -> Tensor:
    """Of 64 rows and 8 more, 64 columns each, which one copy brings."""
    products = "".join(
        f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{ACCUMULATORS}}}, %d1, %d2,"
        f" %p2, 1, 1, 0, 0; add.s64 %d1, %d1, 2; add.s64 %d2, %d2, 2; setp.eq.s32 %p2, 0, 0;"
        for _ in range(4)
    )
    body = GROUPS_PRODUCT.format(wait=wait, fence=fence, products=products, finish=finish)
    launch = dict(threads=128, shared=1024 + 9216, tensor_map=tensor_map)
    return run(body, source, torch.zeros(64, 8), **launch)


@pytest.fixture
def boxed(ptx_executor) -> tuple[Tensor, Tensor]:
    """A matrix, and the map of boxes of 72 rows and 64 columns in it, swizzled."""
    source = torch.randn(72, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    return source, ptx_executor.tensor_map(source.data_ptr(), [72, 64], [64, 1], [72, 64], 2, 128)


def test_a_warpgroups_product_of_what_a_tensor_copy_brings(run, boxed):
    source, tensor_map = boxed
    found = groups_product(run, tensor_map, source)
    wanted = source[:64].double() @ source[64:].double().T
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)


def test_tensor_copies_and_products_are_waited_for(run, boxed):
    source, tensor_map = boxed
    with pytest.raises(
        RuntimeError, match=r"a race|in flight|nobody has written|before its copies"
    ):
        groups_product(run, tensor_map, source, wait="")
    with pytest.raises(RuntimeError, match="a product in flight writes"):
        groups_product(run, tensor_map, source, finish="")
    for fence in ("", "wgmma.fence.sync.aligned; mov.f32 %f0, %f1;"):
        with pytest.raises(RuntimeError, match=r"used since the last wgmma.fence"):
            groups_product(run, tensor_map, source, fence=fence)


def test_products_of_ordinary_writes_need_a_fence(run):
    body = """
    mad.lo.s32 %r1, %tid, 16, %memory;
    mov.u32 %r2, 0;
    st.shared.v4.u32 [%r1], {{%r2, %r2, %r2, %r2}};
    {fence}
    bar.sync 0;
    cvt.u64.u32 %d1, %memory;
    shr.u64 %d1, %d1, 4;
    or.b64 %d1, %d1, 0x0000001000080000;
    wgmma.fence.sync.aligned;
    setp.ne.s32 %p2, 0, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
      {{%f0, %f1, %f2, %f3}}, %d1, %d1, %p2, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    """
    launch = dict(threads=128, shared=2048)
    run(body.format(fence="fence.proxy.async.shared::cta;"), torch.zeros(1), integers(1), **launch)
    with pytest.raises(RuntimeError, match="without a proxy fence"):
        run(body.format(fence=""), torch.zeros(1), integers(1), **launch)
