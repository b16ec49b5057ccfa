"""The CUDA runtime of tests/ptx: launches at a device's limits run, and past them are refused."""

from __future__ import annotations

import ctypes

import pytest

SOURCE = """
#include "cuda/launch.h"
#include "cuda/stream.h"
#include "guarded.h"

using namespace saesteer::cuda;

namespace {
__global__ void __launch_bounds__(256) count(int* threads) {
  __shared__ int kept;
  if (threadIdx.x == 0) kept = blockDim.x;
  __syncthreads();
  if (threadIdx.x == 1) atomicAdd(threads, kept);
}
}  // namespace

extern "C" {
const char* run(int* threads, int blocks, int block, int shared, int allowed, bool together) {
  return guarded([&] {
    checked(cudaFuncSetAttribute(count, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed),
            "allowed");
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = together;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = kStream;
    config.attrs = &cooperative;
    config.numAttrs = 1;
    checked(cudaLaunchKernelEx(&config, count, threads), "launch");
  });
}

const char* map(const char* matrix, int64_t rows, int64_t width, int box_rows) {
  return guarded([&] { tensor_map(matrix, true, rows, width, box_rows); });
}
}
"""

# Of a block with the kernel's own 4 bytes
PLAIN = (48 << 10) - 4
MOST = {"sm_80": (163 << 10) - 4, "sm_90a": (227 << 10) - 4}


@pytest.fixture(scope="module")
def compiled(compile_cuda, tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("count")
    source = folder / "count.cu"
    source.write_text(SOURCE)
    library = ctypes.CDLL(str(compile_cuda(folder, source)))
    library.run.restype = library.map.restype = ctypes.c_char_p
    return library


@pytest.fixture(params=MOST)
def arch(request) -> str:
    return request.param


@pytest.fixture
def library(arch, compiled) -> ctypes.CDLL:
    compiled.settle_machine(3, 3, 9 if arch == "sm_90a" else 8, ctypes.c_bool(True), 0)
    return compiled


def run(library, blocks=2, block=64, shared=0, allowed=0, together=False) -> None:
    threads = ctypes.c_int()
    arguments = ctypes.byref(threads), blocks, block, shared, allowed, ctypes.c_bool(together)
    before = library.launches()
    error = library.run(*arguments)
    assert library.launches() == before + (error is None)
    if error is not None:
        raise RuntimeError(error.decode())
    assert threads.value == blocks * block


def test_launches_run_to_the_limits(library, arch):
    run(library)
    run(library, block=256)
    run(library, shared=PLAIN)
    run(library, shared=MOST[arch], allowed=MOST[arch])
    run(library, blocks=3 * 8, block=256, together=True)
    run(library, blocks=3, shared=MOST[arch], allowed=MOST[arch], together=True)


def test_no_launch_goes_past_them(library, arch):
    most = MOST[arch]
    refused = {
        "a launch of 0 x 1 x 1 blocks": dict(blocks=0),
        "257 threads a block; the kernel takes at most 256": dict(block=257),
        f"{PLAIN + 1} bytes of shared memory; the kernel may have {PLAIN}": dict(shared=PLAIN + 1),
        f"{most + 1} bytes of shared memory beside the kernel's own 4": dict(allowed=most + 1),
        "more blocks together than the device holds: 24": dict(blocks=25, block=256, together=True),
        "more blocks together than the device holds: 3": dict(
            blocks=4, shared=most, allowed=most, together=True
        ),
    }
    for error, launch in refused.items():
        with pytest.raises(RuntimeError, match=error):
            run(library, **launch)


def test_a_tensor_map_is_made_by_the_drivers_rules(library, arch):
    memory = (ctypes.c_char * (64 * 64 * 2 + 16))()
    aligned = -ctypes.addressof(memory) % 16

    def error(off=0, width=64, box_rows=64) -> int | None:
        at = ctypes.c_void_p(ctypes.addressof(memory) + aligned + off)
        said = library.map(at, ctypes.c_int64(64), ctypes.c_int64(width), box_rows)
        return said and int(said.split()[-1])

    not_supported, invalid = 801, 1
    wrong = [error(off=8), error(width=63), error(box_rows=257)]
    if arch == "sm_80":
        assert error() == not_supported
    else:
        assert error() is None and wrong == [invalid] * 3
