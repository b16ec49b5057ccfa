"""A model inside an engine, steered: the tokens of a call in one row.

Where a layer gives the stream in two parts, whose sum the next layer takes, it is summed here. An
op steers it that neither torch.compile nor an engine's own compiler looks into; strengths, scopes
and requests' choices are tensors that change in place, which a CUDA graph reads when it is
replayed.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import sites
from ..plan import Plan
from ..recipe import Recipe, Steering
from ..scopes import Scoped, both
from . import recipes
from .requests import Packed, Requests, Span

SUMMED = (
    "Gemma2DecoderLayer",
    "Gemma3DecoderLayer",
    "GemmaDecoderLayer",
    "Glm4DecoderLayer",
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "MixtralDecoderLayer",
    "OlmoeDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "Qwen3MoeDecoderLayer",
)
"""vLLM's layers whose stream was found to be the sum of the two tensors that they give. Of others,
one may be the whole stream already. Those of transformers, some of which have the same names,
and those of a model's own code that it runs, always give it whole."""


class Steered:
    """The steerings of a recipe in `model`, for calls of at most `size` tokens.

    Raises what load_steering, SAE.load and sf.steering do, and ValueError for what an engine cannot
    be asked for.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, size: int):
        self.requests = Requests(recipes.names(recipe))
        self.tells_tokens_apart = recipes.tells_tokens_apart(recipe)
        names = self.requests.names
        self.layers = recipe.each(lambda step, sae: _Layer(step, sae, model, size, names))
        for layer in self.layers:
            layer.attach()

    @property
    def digest(self) -> str:
        """Of what a compiler may have built in: where the model is steered, and by which op."""
        built_in = [(layer.path, layer.key) for layer in self.layers]
        return hashlib.sha256(repr(built_in).encode()).hexdigest()

    def pack(self, spans: Iterable[Span], ids: Tensor | None) -> None:
        """Say what the tokens of the next call are; `ids` [T or more]."""
        tokens, device = torch.from_numpy(self.requests.tokens(spans)), self.layers[0].plan.device
        if device.type == "cuda":
            tokens = tokens.pin_memory()  # from other memory the copy may wait for the last step
        tokens = tokens.to(device, non_blocking=True)
        positions, prompts, configurations = tokens
        ids = None if ids is None else ids[None, : len(positions)]
        packed = Packed(positions[None], prompts[None], ids)
        for layer in self.layers:
            layer.pack(packed, configurations)

    def require_run(self) -> None:
        """Raises RuntimeError if the model was called and a steering was passed by."""
        for layer in self.layers:
            if not layer.ran:
                raise RuntimeError(f"{layer.path} was compiled without its steering")


class _Layer:
    """One steering of one layer."""

    def __init__(self, step: Steering, sae, model: nn.Module, size: int, names: tuple[str, ...]):
        site = sites.of(model, step.layer, sae)
        self.path, self.module = site.path, site.module
        self.summed = _is_summed(site)
        device = sites.device(site)
        choices = dict(when=step.when, error=step.error, measure=step.measure, impl=step.impl)
        self.plan = Plan(sae, step.edits, device, **choices)
        self.plan.require_ready()
        self.scope = Scoped(step.scope, device)
        table = self.plan.table
        numbers = [table.index(name) for name in names] if table.rowwise else []
        with torch.inference_mode(False):
            self.numbers = torch.tensor(numbers, dtype=torch.int64, device=device)
            self.chosen = torch.zeros(size, dtype=torch.int64, device=device)
            self.inside = torch.ones(size, dtype=torch.bool, device=device)
        self.key, self.ran = str(next(_KEYS)), False

    def attach(self) -> None:
        _LAYERS[self.key] = self
        self.module.register_forward_hook((_sum_hook if self.summed else _hook)(self.key))

    def pack(self, packed: Packed, configurations: Tensor) -> None:
        count = len(configurations)
        self._require_room(count)
        if self.plan.table.rowwise:
            self.chosen[:count] = self.numbers[configurations]
        if not self.scope.everything:
            self.inside[:count] = self.scope(packed)

    def __call__(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """[..., T, d], as `hidden` is, where all sizes before T are 1."""
        self.ran = True
        if residual is not None and residual.shape != hidden.shape:
            shapes = f"{tuple(hidden.shape)} and {tuple(residual.shape)}"
            raise RuntimeError(f"{self.path} gives parts of {shapes}, no stream of one shape")
        stream = hidden if residual is None else hidden + residual
        return self._steered(stream.flatten(end_dim=-2)).view_as(stream)

    def _steered(self, stream: Tensor) -> Tensor:
        count, plan = len(stream), self.plan
        self._require_room(count)
        mask = True if self.scope.everything else self.inside[:count]
        if plan.active is not None:
            mask = both(mask, plan.holds(stream)[1])
        chosen = self.chosen[:count] if plan.table.rowwise else None
        return plan(stream, None if mask is True else mask, chosen)

    def _require_room(self, count: int) -> None:
        if count > len(self.inside):
            raise RuntimeError(f"{self.path}: {count} tokens in a call, {len(self.inside)} at most")


def _is_summed(site: sites.Site) -> bool:
    """Whether the layer gives the stream in two parts."""
    kind = type(site.module)
    if not site.is_layer:
        raise ValueError(f"layer: {site.path} is no decoder layer, which an engine needs")
    if kind.__module__.startswith(("transformers.", "transformers_modules.")):
        return False
    if kind.__name__ in SUMMED:
        return True
    raise ValueError(
        f"layer: it is not known how {kind.__name__} gives its stream; known are "
        f"{', '.join(SUMMED)}, and all of transformers (vLLM's model_impl='transformers')"
    )


_LAYERS: dict[str, _Layer] = {}
"""By what the op is told, which takes no Python object."""
_KEYS = itertools.count()

_library = torch.library.Library("saesteer_serve", "DEF")
_library.define("steer(Tensor hidden, Tensor? residual, str layer) -> Tensor")
_library.impl(
    "steer",
    lambda hidden, residual, layer: _LAYERS[layer](hidden, residual),
    "CompositeExplicitAutograd",
)


@torch.library.register_fake("saesteer_serve::steer", lib=_library)
def _(hidden: Tensor, residual: Tensor | None, layer: str) -> Tensor:
    return torch.empty_like(hidden)


def _hook(key: str) -> Callable:
    """Replaces a layer's output, also in what a compiler makes of the model."""

    def steer(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return torch.ops.saesteer_serve.steer(output, None, key)

    return steer


def _sum_hook(key: str) -> Callable:
    """The same where the output is two parts: the stream becomes the first of them."""

    def steer(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]):
        stream = torch.ops.saesteer_serve.steer(*output, key)
        return stream, torch.zeros_like(stream)

    return steer
