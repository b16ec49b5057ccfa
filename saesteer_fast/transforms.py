"""How an op takes part in autograd and torch.func: its gradient, its rule for vmap, and that it has
no forward mode; or that it overwrites its argument, and has none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .gradients import Gradient

_TOKENWISE = {"x", "values", "coef", "mask", "indices"}
"""Arguments with leading sizes, which take one more at no cost."""
_LIBRARIES: dict[str, torch.library.Library] = {}


def register(op: torch._ops.OpOverload, gradient: Gradient) -> None:
    """Make an op differentiable.

    grad, vjp, jacrev and vmap of torch.func compose with it. Forward mode raises
    NotImplementedError, where the dispatcher on its own would answer 0, and so does an argument
    that has no gradient and requires one.
    """
    function, arguments = _function(op, gradient), len(op._schema.arguments)

    def applied(*args):
        # The dispatcher leaves out what equals its default.
        return function.apply(*args, *[None] * (arguments - len(args)))

    def autograd(keyset, *args):
        wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if wanted or forward_ad._current_level >= 0:
            return applied(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    space, short = op._schema.name.split("::")
    library = _LIBRARIES.setdefault(space, torch.library.Library(space, "FRAGMENT"))
    library.impl(short, autograd, "Autograd", with_keyset=True)
    # Where torch.func comes in, before any of its transforms: they all know what a Function is.
    library.impl(short, applied, "FuncTorchDynamicLayerFrontMode")


def _function(op: torch._ops.OpOverload, gradient: Gradient) -> type[torch.autograd.Function]:
    """The op as an autograd.Function."""
    name, names = op._schema.name, [argument.name for argument in op._schema.arguments]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            for argument, needed in zip(names, ctx.needs_input_grad, strict=True):
                if needed and argument not in gradient.of:
                    raise NotImplementedError(
                        f"{name}: no gradient for {argument}, only for "
                        f"{' and '.join(gradient.of)}; detach it"
                    )
            gradient.save(ctx, inputs, output)

        @staticmethod
        def backward(ctx, *grads):
            with _without_autocast(grads[0].device):
                return gradient.backward(ctx, *grads)

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError(
                f"{name}: has no forward-mode gradient; accepted: backward ones, as grad, vjp, "
                'jacrev, or impl="reference"'
            )

        @staticmethod
        def vmap(info, in_dims, *args):
            mapped = {name for name, dim in zip(names, in_dims, strict=True) if dim is not None}
            if mapped <= _TOKENWISE:
                found = op(*_more_tokens(names, info.batch_size, in_dims, args))
            else:
                found = _stacked([op(*each) for each in _each(info.batch_size, in_dims, args)])
            return found, (0,) * len(found) if isinstance(found, tuple) else 0

    return Function


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Products inside are not rounded, whatever goes on outside. Only gradients have any of
    PyTorch's own in fp32: autocast knows none of the ops, and leaves the reference's fp64 alone."""
    known = torch.amp.is_autocast_available(device.type)
    on = known and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def called(op: torch._ops.OpOverload) -> Callable:
    """The op, past `autograd` above under torch.no_grad: a step into Python costs as much as a
    short call itself. Not past that of an op in place: overwriting counts there too."""
    if op._schema.is_mutable:
        return op

    def call(*args):
        # Tracing and inference_mode need no way past it.
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or torch.is_inference_mode_enabled()
            or forward_ad._current_level >= 0
        ):
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def register_in_place(op: torch._ops.OpOverload) -> None:
    """Make known that an op overwrites its first argument: what was saved of that for a gradient is
    then no longer taken. The op itself refuses to be differentiated or transformed.
    """

    def autograd(keyset, *args):
        if forward_ad._current_level >= 0 or torch._C._any_requires_grad(*args):
            require_untracked(op, *args)
        with torch._C._AutoDispatchBelowAutograd():
            op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        torch.autograd.graph.increment_version(args[0])

    def transformed(*args):
        require_untracked(op, *args)

    space, short = op._schema.name.split("::")
    library = _LIBRARIES.setdefault(space, torch.library.Library(space, "FRAGMENT"))
    library.impl(short, autograd, "Autograd", with_keyset=True)
    library.impl(short, transformed, "FuncTorchDynamicLayerFrontMode")


def require_untracked(op: torch._ops.OpOverload, *args: Tensor | int | None) -> None:
    """NotImplementedError if a gradient or a transform of torch.func would go through this call."""
    name = op._schema.name
    instead = f"accepted: {name.removesuffix('_')}, which gives a new tensor"
    if torch._C._functorch.maybe_current_level() is not None:
        raise NotImplementedError(
            f"{name}: has no rule for torch.func, as it overwrites x; {instead}"
        )
    for argument, given in zip(op._schema.arguments, args, strict=False):
        if isinstance(given, Tensor) and _is_tracked(given):
            raise NotImplementedError(
                f"{name}: no gradient for {argument.name}, as x is overwritten; {instead}, or "
                "torch.no_grad()"
            )


def _is_tracked(t: Tensor) -> bool:
    if t.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def _more_tokens(names: list[str], size: int, in_dims: tuple, args: tuple) -> list:
    """The arguments with the mapped dimension as the first of the leading sizes."""
    lead = [n for dim, n in enumerate(args[0].shape) if dim != in_dims[0]][:-1]

    def tokens(name: str, t: Tensor | None, dim: int | None) -> Tensor | None:
        if name not in _TOKENWISE or t is None:
            return t
        t = t[None] if dim is None else t.movedim(dim, 0)
        last = () if name == "mask" else t.shape[-1:]
        shared = [1] * (1 + len(lead) + len(last) - t.dim())  # one row of values for all tokens
        return t.reshape(len(t), *shared, *t.shape[1:]).expand(size, *lead, *last)

    return [tokens(*each) for each in zip(names, args, in_dims, strict=True)]


def _each(size: int, in_dims: tuple, args: tuple) -> list[list]:
    pairs = list(zip(args, in_dims, strict=True))
    # Weights must be contiguous.
    return [
        [t if dim is None else t.select(dim, i).contiguous() for t, dim in pairs]
        for i in range(size)
    ]


def _stacked(each: list) -> Tensor | tuple[Tensor, ...]:
    if isinstance(each[0], Tensor):
        return torch.stack(each)
    return tuple(map(torch.stack, zip(*each, strict=True)))
