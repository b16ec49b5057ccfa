"""A Triton driver for the CPU: kernels are compiled for an NVIDIA GPU, as far as to PTX, and ptx.h
runs that.

Every tensor that a kernel gets ends at a page that nobody may touch, so that reading or writing
past its end kills the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import torch
import triton
from torch import Tensor
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.tools.tensor_descriptor import TensorDescriptor

from ptx.executor import Executor, Kernel
from ptx.memory import fenced
from saesteer_fast import choice

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}
"""What a block may have of it, by architecture."""
NUMBERS = {"i32": torch.int32, "i64": torch.int64}
SWIZZLES = (0, 32, 64, 128)
"""Bytes, by Triton's number of the mode."""
HUGE = 1 << 30
"""Bytes from which on a tensor is not copied to where it ends at a forbidden page."""


def activate(library: str, architecture: int) -> Executor:
    """From here on this process has a GPU for Triton's kernels, whose memory is the CPU's."""
    backends["nvidia"] = Backend(PtxBackend, Driver)
    executor = Executor(library)
    executor.take_as_tritons()
    triton.runtime.driver.set_active(Driver(executor, architecture))
    major, minor = divmod(architecture, 10)
    properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=3)
    torch.cuda.get_device_properties = lambda device: properties
    torch.cuda.get_device_name = lambda device: f"sm_{architecture} on the CPU"
    torch.cuda.is_current_stream_capturing = lambda: False
    choice._runs = lambda impl, x: True
    return executor


class PtxBackend(CUDABackend):
    """NVIDIA's, without the assembler: PTX is the binary."""

    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict, *others) -> None:
        super().add_stages(stages, *others)
        del stages["cubin"]

    def hash(self) -> str:
        # Part of the key in Triton's cache, where other binaries of the same kernels may be.
        return f"ptx-{super().hash()}"


class Memory:
    """Copies of a launch's tensors, each before its forbidden page."""

    def __init__(self):
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def address(self, t: Tensor) -> int:
        storage = t.untyped_storage()
        if storage.nbytes() >= HUGE:
            return t.data_ptr()
        start = storage.data_ptr()
        if start not in self._copies:
            original = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._copies[start] = original, fenced(original)
        return self._copies[start][1].data_ptr() + t.data_ptr() - start

    def copy_back(self) -> None:
        for original, copy in self._copies.values():
            original.copy_(copy)


class Launcher:
    """Calls a compiled kernel, as Triton asks a driver to."""

    def __init__(self, executor: Executor, source, metadata):
        self._executor, self._metadata = executor, metadata
        self._types = tuple(source.signature.values())
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError(f"{metadata.name} asks for scratch memory")

    def __call__(self, x: int, y: int, z: int, stream, kernel: Kernel, *others) -> None:
        _packed, _launch, _enter, _exit, *arguments = others
        memory = Memory()
        parameters = list(self._parameters(arguments, memory))
        wanted = self._metadata
        threads, together = 32 * wanted.num_warps, wanted.launch_cooperative_grid
        self._executor.launch(kernel, (x, y, z), threads, wanted.shared, together, parameters)
        memory.copy_back()

    def _parameters(self, arguments: list, memory: Memory) -> Iterator[Tensor]:
        metas = iter(self._metadata.tensordesc_meta or ())
        for kind, value in zip(self._types, arguments, strict=True):
            if kind.startswith("tensordesc"):
                yield self._described(value, memory.address(value.base), next(metas))
                yield from (torch.tensor(size, dtype=torch.int32) for size in value.shape)
                yield from (torch.tensor(stride) for stride in value.strides)
            elif kind.startswith("*"):
                yield torch.tensor(memory.address(value))
            elif kind != "constexpr":
                yield torch.tensor(value, dtype=NUMBERS[kind])
        # Two kinds of scratch memory: none.
        yield from torch.zeros(2, dtype=torch.int64)

    def _described(self, value: TensorDescriptor, address: int, meta: dict) -> Tensor:
        box, swizzle = meta["block_size"], SWIZZLES[meta["swizzle"]]
        shape = value.shape, value.strides, box
        return self._executor.tensor_map(address, *shape, meta["elem_size"], swizzle)


class Driver(DriverBase):
    """What Triton asks about a GPU."""

    def __init__(self, executor: Executor, architecture: int):
        self._executor, self._architecture = executor, architecture
        self.utils, self.launcher_cls = self, partial(Launcher, executor)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("times on the CPU say nothing of a GPU")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched from C++")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self._architecture]}

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple:
        """The module, the kernel, its registers and spills, which nobody knows, and its threads."""
        kernel = self._executor.load(ptx, name)
        return kernel, kernel, 0, 0, self._executor.most_threads(kernel)

    def unload_module(self, kernel: Kernel) -> None:
        self._executor.unload(kernel)
