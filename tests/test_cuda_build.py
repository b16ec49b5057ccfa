"""What the compiler made of the CUDA kernels: registers, stack, and the instructions that count.

Read off the built library, without a GPU, by cuobjdump: the toolkit's, or that in Triton's wheel.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import saesteer_fast
from saesteer_fast import _build

LIBRARY = Path(saesteer_fast.__file__).with_name("libsaesteer_cuda.so")
ARCHITECTURES = {a: f"sm_{a.replace('.', '')}" for a in ("8.0", "9.0a", "10.0")}
BUILT = [a.removesuffix("+PTX") for a in _build.facts()["cuda_architectures"]]
BF16, FP32 = 1, 0
SCANS = {"few": "Li64ELi64E", "fewest": "Li16ELi32E", "many": "Li128ELi128E"}


def cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    bundled = triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.exists() else None)


pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library is not built here"),
    pytest.mark.skipif(cuobjdump() is None, reason="there is no cuobjdump, nor Triton's"),
]


@pytest.fixture(params=ARCHITECTURES)
def arch(request) -> str:
    if request.param not in BUILT:
        pytest.skip(f"not built for {request.param}")
    return ARCHITECTURES[request.param]


def dump(what: str, arch: str) -> str:
    command = [cuobjdump(), what, "-arch", arch, LIBRARY]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def kernels(what: str, arch: str) -> dict[str, str]:
    """What is said of each function, by its mangled name."""
    parts = re.split(r"Function\s*:?\s+(_Z\w+)", dump(what, arch))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def of(arch: str, *marks: str) -> str:
    """The instructions of the one kernel whose name has all the marks."""
    found = [code for name, code in kernels("-sass", arch).items() if all_in(marks, name)]
    assert len(found) == 1, (marks, len(found))
    return found[0]


def all_in(marks: tuple[str, ...], name: str) -> bool:
    return all(mark in name for mark in marks)


def scan_groups(mark: str) -> str:
    if "9.0a" not in BUILT:
        pytest.skip("not built for 9.0a")
    return of("sm_90a", "scan_groups", mark)


def count(code: str, instruction: str) -> int:
    return len(re.findall(rf"\b{instruction}", code))


def test_nothing_spills_or_indexes_registers(arch):
    """A stack would be read and written in device memory."""
    usage = kernels("-res-usage", arch)
    assert len(usage) > 30
    for name, said in usage.items():
        assert re.search(r"STACK:0 ", said) and re.search(r"LOCAL:0 ", said), (name, said)
    for name, code in kernels("-sass", arch).items():
        assert "LDL" not in code and "STL" not in code, name


# Threads of a block, and blocks that must fit a multiprocessor's 65,536 registers at once
OCCUPANCY = {
    "(level0|settle|project_rows|add_rows)ILi0E": (128, 6),
    "(level0|settle|project_rows|add_rows)ILi(1|2|n1)E": (128, 8),  # of 16 bits, and any dtypes
    "decode_token": (128, 8),
    "6select": (512, 2),
    "scan_any.*Li16ELi2E": (256, 2),
    "scan_any.*Li8ELi3E": (128, 3),
    SCANS["fewest"]: (128, 2),
    SCANS["few"]: (128, 2),
    SCANS["many"]: (128, 2),
    "ladder_once.*mma": (128, 2),
    "ladder_once.*simt": (128, 3),
    "scan_groups": (384, 1),
}


@pytest.mark.parametrize("kernel", OCCUPANCY)
def test_registers_leave_room_for_the_blocks_that_are_planned(arch, kernel):
    threads, blocks = OCCUPANCY[kernel]
    usage = kernels("-res-usage", arch)
    found = [said for name, said in usage.items() if re.search(kernel, name)]
    assert found
    for said in found:
        registers = int(re.search(r"REG:(\d+)", said)[1])
        assert -(-registers // 8) * 8 * threads * blocks <= 65536, registers


@pytest.mark.parametrize("dtype", range(3), ids=["fp32", "bf16", "fp16"])
def test_rows_are_read_and_written_16_bytes_at_a_time(arch, dtype):
    for kernel in ("level0", "settle", "add_rows", "decode_token"):
        code = of(arch, f"{kernel}ILi{dtype}E")
        assert count(code, r"LDG\.E\.\S*128") and count(code, r"STG\.E\.\S*128"), kernel
    assert count(of(arch, f"project_rowsILi{dtype}E"), r"LDG\.E\.\S*128")


def test_nothing_is_read_past_coherence(arch):
    """x may be overwritten; LDG.CONSTANT may give what lay there before."""
    for name, code in kernels("-sass", arch).items():
        assert not count(code, r"LDG\S*CONSTANT"), name


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp16"])
def test_a_token_is_loaded_at_once(arch, bf16):
    """Three chunks of x and of a latent, no branch between them: one wait instead of six."""
    dtype = 1 if bf16 else 2
    for marks in ((f"level0ILi{dtype}E",), ("ladder_once", SCANS["fewest"], f"Lb{int(bf16)}E")):
        order = re.findall(r"\b(BRA|BAR|LDG\.E\.\S*128)", of(arch, *marks))
        runs = re.split("BRA|BAR", " ".join(order))
        assert max(run.count("LDG") for run in runs) >= 6, marks


def test_preactivations_are_stored_by_two_and_loaded_at_once(arch):
    """Six fours of a row, no branch between them; of the stores, nvcc parts a tile's first two."""
    if arch == "sm_90a":
        rows, columns = 2, (192 + 256) // 4
        stores = count(scan_groups("Lb1E"), r"STG\.E\.64")
        assert stores >= 0.9 * rows * columns / 2
    order = re.findall(r"\b(BRA|BAR|LDG\.E\.\S*128)", of(arch, "6select"))
    runs = re.split("BRA|BAR", " ".join(order))
    assert max(run.count("LDG") for run in runs) >= 6


@pytest.mark.parametrize("plan", SCANS)
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp16"])
def test_16_bit_scans_use_tensor_cores_and_asynchronous_copies(arch, plan, bf16):
    code = of(arch, "scan_16bit", SCANS[plan], f"Lb{int(bf16)}E")
    kind = r"HMMA\.16816\.F32\.BF16" if bf16 else r"HMMA\.16816\.F32\s"
    assert count(code, kind) >= 8
    assert count(code, r"LDGSTS\.E\.\S*128") and count(code, r"LDSM\.16\.\S*4")


@pytest.mark.parametrize("plan", ["few", "fewest"])
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp16"])
def test_one_launch_reads_as_the_separate_kernels_do(arch, plan, bf16):
    code = of(arch, "ladder_once", SCANS[plan], f"Lb{int(bf16)}E")
    scan = of(arch, "scan_16bit", SCANS[plan], f"Lb{int(bf16)}E")
    for instruction in (r"HMMA\.16816", r"LDSM\.16\.\S*4"):
        assert count(code, instruction) == count(scan, instruction)
    assert count(code, r"LDGSTS\.E\.\S*128") > count(scan, r"LDGSTS\.E\.\S*128")
    assert count(code, r"LDG\.E\.\S*128") and count(code, r"STG\.E\.\S*128")


@pytest.mark.parametrize(("kernel", "plans"), [("scan_any", [2, 8, 8]), ("ladder_once", [2])])
def test_fp32_is_never_rounded_for_a_tensor_core(arch, kernel, plans):
    """By the rows of tokens that a thread takes."""
    found = [
        (int(plan[1]), code)
        for name, code in kernels("-sass", arch).items()
        if (plan := re.search(rf"{kernel}.*simt4PlanILi(\d).*Li{FP32}E", name))
    ]
    assert sorted(rows for rows, _ in found) == plans
    for rows, code in found:
        assert not count(code, r"\w*MMA[.\s]") and count(code, r"FFMA\s") >= 32 * rows


@pytest.mark.parametrize("latents", [192, 256])
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp16"])
def test_hopper_multiplies_by_warpgroups_and_copies_boxes(bf16, latents):
    code = scan_groups(f"Lb{int(bf16)}E")
    kind = rf"64x{latents}x16\.F32" + (r"\.BF16" if bf16 else r"\s")
    assert count(code, rf"HGMMA\.{kind}") >= 4
    assert count(code, r"UTMALDG\.2D") and count(code, r"LDGSTS\.E\.\S*128")
    assert count(code, r"USETMAXREG\.TRY_ALLOC") and count(code, r"USETMAXREG\.DEALLOC")


def test_a_warpgroup_has_the_registers_that_it_uses():
    """Those that the producer gives back, and the consumers take."""
    _, *parts = re.split(r"USETMAXREG\.\S+ (?:UP\d, )?0x(\w+)", scan_groups("Lb1E"))
    shares = {
        int(parts[i], 16): max(map(int, re.findall(r"\bR(\d+)\b", parts[i + 1]))) for i in (0, 2)
    }
    assert len(parts) == 4 and min(shares) < 168 < max(shares)
    assert all(used < share for share, used in shares.items()), shares


def test_products_of_a_stage_are_issued_together():
    """Between them no wait: a compiler that cannot prove them independent would put one there."""
    order = re.findall(r"(HGMMA|WARPGROUP\.DEPBAR)", scan_groups("Lb1E"))
    runs = [len(run.split()) for run in " ".join(order).split("WARPGROUP.DEPBAR") if run.strip()]
    assert runs and all(run % 4 == 0 for run in runs), runs


def test_a_tile_ends_without_waiting_for_memory():
    """After the last products: biases from shared memory; what p_f is was asked for before."""
    parts = scan_groups("Lb1E").split("WARPGROUP.DEPBAR.LE gsb0, 0x0")
    freed = [part.split("SYNCS.ARRIVE")[0] for part in parts[1:]]
    assert {count(code, r"LDS\.64") for code in freed} == {192 // 8, 256 // 8}
    assert not any(count(code, "LDG") for code in freed)
    assert all(count(part.split("HGMMA")[-1], r"LDG\.E") >= 3 for part in parts[:-1])


@pytest.mark.parametrize(("plan", "most"), [("fewest", 100), ("few", 180)])
def test_a_stage_takes_few_instructions(arch, plan, most):
    """Else these, not memory, would bound the scan of few tokens."""
    stages = of(arch, "scan_16bit", SCANS[plan], "Lb1E").split("LDGDEPBAR")
    multiplied = [count(stage, r";\s+/\*") for stage in stages if count(stage, "HMMA")]
    assert min(multiplied) <= most, multiplied


@pytest.mark.parametrize("plan", ["few", "fewest"])
def test_the_next_tile_is_asked_for(arch, plan):
    """From Hopper on; once while a tile ends, and in one launch also at its start or, of the fewest
    tokens, before the first barrier or after it."""
    there, times = arch != "sm_80", 2 if plan == "few" else 3
    assert count(of(arch, "scan_16bit", SCANS[plan], "Lb1E"), r"UBLKPF\.L2") == there
    assert count(of(arch, "ladder_once", SCANS[plan], "Lb1E"), r"UBLKPF\.L2") == times * there


STUB = (
    'extern "C" int aoti_torch_get_current_cuda_stream(int, void** s) { *s = nullptr; return 0; }'
)
LOADS = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
import torch
from saesteer_fast import ops
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
torch.ops.load_library(sys.argv[2])
print(all(has_kernel(f"saesteer_cuda::{name}", "CUDA") for name in ops._NAMES))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_the_library_registers_every_op(tmp_path):
    """Also where PyTorch has no CUDA: the one function that is missing there has a stand-in."""
    (tmp_path / "stub.cpp").write_text(STUB)
    stub = tmp_path / "stub.so"
    command = ["g++", "-shared", "-fPIC", tmp_path / "stub.cpp", "-o", stub]
    subprocess.run(command, check=True)
    command = [sys.executable, "-c", LOADS, stub, LIBRARY]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr


def test_every_architecture_has_every_kernel():
    built = [ARCHITECTURES[a] for a in BUILT if a in ARCHITECTURES]
    names = [{re.sub(r"_GLOBAL__N__\w{8}", "", n) for n in kernels("-sass", a)} for a in built]
    assert names and all(n == names[0] for n in names)


def test_gpus_newer_than_the_build_find_ptx():
    asked = {a for a in _build.facts()["cuda_architectures"] if a.endswith("+PTX")}
    if not asked:
        pytest.skip("built without PTX")
    listed = subprocess.run(
        [cuobjdump(), "--list-ptx", LIBRARY], capture_output=True, text=True, check=True
    )
    for arch in asked:
        assert f"sm_{arch.removesuffix('+PTX').replace('.', '')}.ptx" in listed.stdout
