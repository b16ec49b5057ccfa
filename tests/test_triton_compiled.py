"""The Triton kernels compiled ahead of time, with the tiles that each architecture is given: they
compile, use its matrix instructions, and keep the product's loop free of spills."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from saesteer_fast.triton_kernels import configs, dispatch, launch  # noqa: E402
from saesteer_fast.triton_kernels.configs import ANY, Tile  # noqa: E402
from saesteer_fast.triton_kernels.dispatch import Kernel  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}
REGISTERS = 1 << 16
"""Of one multiprocessor, NVIDIA's."""
SPILLED = 96
"""Bytes a thread may spill, outside of the product's loop: sums take half of the registers there
are, and what is left over changes with Triton's release."""

INTEGERS = ("T", "N", "d", "F", "k", "low", "high", "shares", "stride", "count", "value_stride")
POINTERS = {
    "b": "*fp32",
    "features": "*i64",
    "order": "*i64",
    "values": "*fp32",
    "acts": "*fp32",
    "beaten": "*i32",
    "decided": "*i32",
    "waiting": "*i32",
    "length": "*i32",
    "keys": "*i64",
    "indices": "*i64",
    "last": "*i64",
}
DIVISIBLE = ("N", "d")


def compiled(kernel, architecture: str, numbers: str, absent=(), described=None, **options):
    """A kernel for x and W of `numbers`, and what its launch passes as `options`."""
    try:
        target = TARGETS[architecture]
        triton.compiler.make_backend(target).hash()
    except Exception as error:  # Triton 3.4 has no linker for AMD of its own
        pytest.skip(str(error))
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in absent or kernel.params[place].is_constexpr:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = "i32"
        else:
            signature[name] = POINTERS.get(name, f"*{numbers}")
        if signature[name].startswith("*") or name in DIVISIBLE:
            attributes[(place,)] = [["tt.divisibility", 16]]
    if described:
        signature["W"] = f"tensordesc<{numbers}[{described.BLOCK_N},{described.BLOCK_K}]>"
        del attributes[(kernel.arg_names.index("W"),)]
    constants = {
        (place,): options.pop(name, None)
        for place, name in enumerate(kernel.arg_names)
        if signature[name] == "constexpr"
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def compiled_product(
    kernel: Kernel, architecture: str, numbers: str, tile: Tile, *best, ordered: bool = False
):
    """A kernel on `preacts`, as it is launched where BLOCK_K divides d."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[numbers]
    options = kernel.options(*best, tile, dtype, tile.described, True)
    absent = () if ordered else ("order",)
    if tile.most != ANY:
        absent += ("last",) if kernel is launch.TOPK else ("waiting", "length")
    described = tile.described and tile
    return compiled(kernel.kernel, architecture, numbers, absent, described, **options)


def nvidia_tool(name: str, option: str, binary, tmp_path: Path) -> str:
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    command = [TOOLS / name, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def assert_fits(binary, architecture: str, tmp_path: Path, per_sm=1, warps=4, spilled=0) -> None:
    assert per_sm * binary.metadata.shared <= SHARED_MEMORY[architecture]
    if architecture.startswith("gfx"):
        assembly = binary.asm["amdgcn"]
        for count_of in ("vgpr_spill_count", "private_segment_fixed_size"):
            assert set(re.findall(rf"\.{count_of}:\s+(\d+)", assembly)) == {"0"}
        return
    usage = nvidia_tool("cuobjdump", "-res-usage", binary, tmp_path)
    registers, stack, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage).groups()
    )
    assert stack <= spilled and local == 0, usage
    assert registers * 32 * warps * per_sm <= REGISTERS, usage


def assert_loop_is_free(binary, tmp_path: Path) -> None:
    """Nothing is spilled between the first and the last matrix instruction."""
    lines = nvidia_tool("cuobjdump", "-sass", binary, tmp_path).splitlines()
    at = [i for i, line in enumerate(lines) if re.search(r"\b(HMMA|HGMMA|UTC\w*MMA)", line)]
    assert len(at) > 1
    inside = "\n".join(lines[at[0] : at[-1]])
    assert not re.search(r"\b(STL|LDL)\b", inside)


def halves(kind: str) -> list:
    return [
        pytest.param(architecture, tile, id=f"{architecture}-{tile.BLOCK_M}x{tile.BLOCK_N}")
        for architecture in TARGETS
        for tile in getattr(configs.HALF[architecture], kind)
    ]


MATRIX = {"sm80": "mma.sync", "sm90": "wgmma.mma_async", "sm100": "tcgen05.mma", "gfx942": "v_mfma"}


def assert_uses_matrix_instructions(binary, architecture: str, tile: Tile) -> None:
    assembly = binary.asm["amdgcn" if architecture == "gfx942" else "ptx"]
    wanted = (
        MATRIX["sm80"] if tile.BLOCK_M < 64 and architecture[:2] == "sm" else MATRIX[architecture]
    )
    assert wanted in assembly
    if tile.described:
        assert "cp.async.bulk.tensor" in assembly


@pytest.mark.parametrize(("architecture", "tile"), halves("count"))
def test_count(architecture, tile, tmp_path):
    binary = compiled_product(launch.COUNT, architecture, "bf16", tile)
    assert_uses_matrix_instructions(binary, architecture, tile)
    assert_fits(binary, architecture, tmp_path, tile.per_sm, tile.num_warps, SPILLED)
    if architecture.startswith("sm"):
        assert_loop_is_free(binary, tmp_path)


@pytest.mark.parametrize("tile", configs.HALF["sm90"].count, ids=lambda tile: str(tile.BLOCK_M))
def test_count_in_another_order(tile, tmp_path):
    binary = compiled_product(launch.COUNT, "sm90", "bf16", tile, ordered=True)
    assert_fits(binary, "sm90", tmp_path, tile.per_sm, tile.num_warps, SPILLED)
    assert_loop_is_free(binary, tmp_path)


@pytest.mark.parametrize(("architecture", "tile"), halves("topk"))
def test_topk(architecture, tile, tmp_path):
    best = 32 if tile.most == ANY else launch.MOST_K
    binary = compiled_product(launch.TOPK, architecture, "bf16", tile, best)
    assert_uses_matrix_instructions(binary, architecture, tile)
    assert_fits(binary, architecture, tmp_path, tile.per_sm, tile.num_warps, SPILLED)
    if architecture.startswith("sm"):
        assert_loop_is_free(binary, tmp_path)


@pytest.mark.parametrize("architecture", ["sm80", "gfx942"])
@pytest.mark.parametrize("place", range(2))
def test_fp32_is_multiplied_as_fp32(architecture, place, tmp_path):
    for kernel, tile, *best in (
        (launch.COUNT, configs.FP32.count[place]),
        (launch.TOPK, configs.FP32.topk[place], 32),
    ):
        binary = compiled_product(kernel, architecture, "fp32", tile, *best)
        assert_fits(binary, architecture, tmp_path, tile.per_sm, tile.num_warps, SPILLED)
        assembly = binary.asm["amdgcn" if architecture == "gfx942" else "ptx"]
        assert "tf32" not in assembly and "xf32" not in assembly


@pytest.mark.parametrize("absent", [("mask",), ("mask", "y")], ids=str)
def test_project_of_wide_rows(absent, tmp_path):
    options = launch.PROJECT.options(8192)
    binary = compiled(launch.PROJECT.kernel, "sm90", "bf16", absent, **options)
    assert_fits(binary, "sm90", tmp_path, 1, options["num_warps"], SPILLED)


@pytest.mark.parametrize("architecture", ["sm90", "gfx942"])
@pytest.mark.parametrize(
    ("kernel", "absent"),
    [
        pytest.param(launch.PROJECT, ("mask",), id="project"),
        pytest.param(launch.PROJECT, ("mask", "y"), id="project in place"),
        pytest.param(launch.ADD, (), id="add"),
        pytest.param(launch.ADD, ("y",), id="add in place"),
        pytest.param(launch.MERGE, (), id="merge"),
        pytest.param(launch.DECODE, (), id="decode"),
    ],
)
def test_the_others(architecture, kernel, absent, tmp_path):
    block = {launch.MERGE: 8192, launch.DECODE: 1024}.get(kernel, 4096)
    options = kernel.options(block)
    binary = compiled(kernel.kernel, architecture, "bf16", absent, **options)
    # Of project two programs fit; for that some releases spill four registers.
    per_sm, spilled = (2, 16) if kernel is launch.PROJECT else (1, 0)
    assert_fits(binary, architecture, tmp_path, per_sm, options["num_warps"], spilled)
    # What is overwritten may not be read by the path that stores do not reach.
    assert "ld.global.nc" not in binary.asm.get("ptx", "")


def test_tables_are_in_order():
    for tiles in (*configs.HALF.values(), configs.FP32, configs.INTERPRETER):
        for launches in tiles:
            sizes = [tile.most for tile in launches]
            assert sizes == sorted(set(sizes)) and sizes[-1] == ANY and len(sizes) > 1
        assert tiles.topk[0].BLOCK_M == 16


def test_mixed_types_meet_in_fp32():
    half, single = torch.empty(1, dtype=torch.float16), torch.empty(1)
    assert configs.meets_in(half, half) == torch.float16
    assert (
        configs.meets_in(half, single) == configs.meets_in(half, half.bfloat16()) == torch.float32
    )


@pytest.mark.parametrize("release", [(3, 6), (3, 8)])
def test_blackwell_needs_a_fence(monkeypatch, release):
    monkeypatch.setattr(configs, "RELEASE", release)
    monkeypatch.setattr(configs, "architecture", lambda device: "sm100")
    monkeypatch.setattr(configs, "key", lambda *_: "nothing is stored under this")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B200")
    uncached, asked = configs.tiles.__wrapped__, (torch.device("cuda"), torch.bfloat16)
    if release >= configs.FENCED:
        assert uncached(*asked) == configs.HALF["sm100"]
    else:
        with pytest.raises(RuntimeError, match=r"products on NVIDIA B200 need a fence .*; 3\.8 or"):
            uncached(*asked)


def test_what_is_not_loaded_is_not_captured(monkeypatch):
    monkeypatch.setattr(dispatch, "SEARCHES", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"Triton loads decode at its first call .* once before"):
        launch.decode(torch.ones(1, 2), torch.zeros(1, 2).long(), torch.ones(3, 8), torch.ones(8))


def test_machines_of_one_kind_share_a_table(monkeypatch):
    for name, major, minor in (("sm90", 9, 0), ("sm100", 10, 3), ("sm86", 8, 6), ("sm120", 12, 0)):
        properties = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, p=properties: p)
        assert configs.architecture(torch.device("cuda")) == name
