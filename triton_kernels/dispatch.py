"""Launches a kernel in the compilation that arguments of the same kind had before. Triton's search
for it, made anew at each launch, takes the host longer than steering a token takes a device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs

SEARCHES = configs.INTERPRETED or torch.version.hip is not None
"""Whether Triton searches all the same: its interpreter compiles nothing, and for AMD it compiles
otherwise for tensors beyond 2 GB."""


class Kernel:
    """A kernel, and the compilations that it was launched in.

    Its parameters are tensors and the numbers that it is compiled for, then the numbers that it is
    not specialised on, then constants. `options` makes these, and what Triton takes beside them, of
    what a launch is `made` of.
    """

    def __init__(self, kernel, options: Callable[..., dict]):
        self.kernel, self.options = kernel, options
        self.found: dict[Hashable, tuple] = {}

    def launch(self, grid: tuple[int, int, int], made: tuple, *arguments) -> None:
        """On the current device and stream, with arguments for all parameters but constants."""
        if SEARCHES:
            self.kernel[grid](*arguments, **self.options(*made))
            return
        like = made, self.kind(arguments)
        if like in self.found:
            compiled, constants = self.found[like]
            compiled[grid](*arguments, *constants)
        else:
            self._require_no_capture()
            options = self.options(*made)
            constants = [options[name] for name in self.kernel.arg_names[len(arguments) :]]
            self.found[like] = self.kernel[grid](*arguments, **options), constants

    def _require_no_capture(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"saesteer: Triton loads {self.kernel.__name__} at its first call of this kind, "
                "which no CUDA graph can capture; make the same call once before"
            )

    def kind(self, arguments: tuple) -> Hashable:
        """What Triton's choice depends on, `made` apart: the device, types, which tensors start at
        whole 16 bytes, what is absent, the numbers compiled for, and which others need 64 bits."""
        of = [
            (a.dtype, a.data_ptr() % 16 == 0)
            if isinstance(a, Tensor)
            else a.base.dtype
            if isinstance(a, TensorDescriptor)
            else a
            for a in arguments[: self._free]
        ]
        wide = [number > configs.ANY for number in arguments[self._free :]]
        return arguments[0].device, *of, *wide

    @cached_property
    def _free(self) -> int:
        """The first number that the kernel is not specialised on."""
        return next(p.num for p in self.kernel.params if p.do_not_specialize)
