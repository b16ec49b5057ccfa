"""Steering a whole model: hooks that hold latents at constants while it runs.

Three hooks make one steering. One, before the decoder runs, notes which tokens are padding; one
replaces the steered module's output; one, after the decoder ran, forgets them, and raises if the
module was passed by.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import nearest
from .sae import SAE
from .steering import Clamp, require_sae

_LAYER_LISTS = ("layers", "h", "model.layers", "transformer.h", "gpt_neox.layers")


def steering(
    model: nn.Module,
    sae: SAE,
    edits: Mapping[int, float],
    *,
    layer: int | str | None = None,
    impl: str = "auto",
) -> Handle:
    """Hold latents of `sae` at constants in `model`, from now until the handle is removed.

        with sf.steering(model, sae, {22373: 12.0}, layer=6) as handle:
            model.generate(...)
            handle.set({22373: 8.0})

    What is steered is the output of decoder layer `layer` (0 is the first), or of the module it
    names ("layers.6", "layers.6.mlp", "model.layers.6"); by default, of sae.hookpoint. Formula,
    dtypes and errors are those of `steer`. Steerings of one module act in the order in which they
    were attached, each on what the one before it made, and before anyone else's hooks.

    Padding is left alone where the decoder is given a 2-D attention_mask, [B, past + T]. Without
    one, or with a 4-D one (generate makes one for a static cache), nothing says what is padding,
    and every position is steered; what real tokens get is the same.

    W_enc, b_enc and one row of W_dec a latent are kept on the module's device, in the SAE's dtype;
    the model's dtype may change later, its device may not. Steering belongs to the model, whichever
    thread calls it; a deep copy or a pickle of the model is steered too, and save_pretrained writes
    the weights as they are, unsteered. A model may be compiled before or after; attaching makes
    torch.compile forget all it compiled, for it looks for no new hooks by itself. A CUDA graph that
    was captured replays what it captured.
    """
    require_sae(sae)
    site = _locate(model, sae.hookpoint if layer is None else layer)
    _check_width(model, sae, site)
    clamp = Clamp(sae, edits, _device(site))
    # Steering no tokens finds now what the model's first call would find.
    clamp(clamp.W_enc.new_empty(0, clamp.d), impl=impl)
    return Handle(site, clamp, impl)


class Handle:
    """One steering of one model; `steering` makes it. Leaving its `with` block removes it."""

    def __init__(self, site: _Site, clamp: Clamp, impl: str):
        self._name, self._clamp = site.path, clamp
        self._undo = _install(site, _Hooks(site, clamp, impl))
        self._attached = True

    def set(self, edits: Mapping[int, float]) -> None:
        """Change constants of latents that are steered already, from the model's next call on.

        Raises ValueError for a latent that is not, and for NaN or infinity; RuntimeError once the
        steering is removed.
        """
        self._require_attached()
        self._clamp.set(edits)

    def remove(self) -> None:
        """Stop steering. Removing twice does no harm."""
        self._attached = False
        self._undo.close()

    def _require_attached(self) -> None:
        if not self._attached:
            raise RuntimeError(f"this steering of {self._name} was removed; attach a new one")

    def __enter__(self) -> Handle:
        self._require_attached()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "" if self._attached else ", removed"
        return f"Handle({self._name}: {self._clamp.edits}{state})"


class _Site(NamedTuple):
    path: str
    module: nn.Module
    """Its output is steered."""
    decoder: nn.Module
    """It calls the module, and is given the attention mask."""


class _Call:
    """What a running call of the decoder must remember."""

    mask: Tensor | None = None
    awaited: bool = False


class _Calls(threading.local):
    """One call a thread: threads may share a model.

    Set once and changed inside, because Dynamo loses writes to the attributes of a thread's local.
    """

    def __init__(self):
        self.running = _Call()

    def __reduce__(self):
        return _Calls, ()


class _Hooks:
    """The hooks of one steering."""

    def __init__(self, site: _Site, clamp: Clamp, impl: str):
        self.path, self.clamp, self.impl = site.path, clamp, impl
        self.calls = _Calls()
        self.parameters = list(inspect.signature(site.decoder.forward).parameters)

    def before(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = self._argument("attention_mask", args, kwargs)
        cache = self._argument("past_key_values", args, kwargs)
        call = self.calls.running
        call.mask, call.awaited = _real_tokens(mask, cache), True

    def steer(self, module: nn.Module, args: tuple, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor):
            raise TypeError(f"{self.path} gives a {type(hidden).__name__}, no tensor to steer")
        call = self.calls.running
        call.awaited = False
        mask = call.mask
        if mask is not None:
            fits = mask.shape == hidden.shape[:-1]
            mask = mask.to(hidden.device, torch.bool) if fits else None
        steered = self.clamp(hidden, mask, self.impl)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    def after(self, decoder: nn.Module, args: tuple, output) -> None:
        call = self.calls.running
        passed_by = call.awaited and output is not None
        call.mask, call.awaited = None, False
        if passed_by:
            raise RuntimeError(f"{self.path} was not called as a module: nothing was steered")

    def _argument(self, name: str, args: tuple, kwargs: dict):
        if name in kwargs or name not in self.parameters:
            return kwargs.get(name)
        place = self.parameters.index(name)
        return args[place] if place < len(args) else None


def _real_tokens(mask, cache) -> Tensor | None:
    """[B, T], nonzero where a token of this call is no padding; None if the call does not tell.

    Only a mask with a column a key tells: [B, past + T]. Whoever is given None steers everything,
    which no real token can notice, whereas columns read wrongly would leave real ones unsteered.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    past = 0 if cache is None else getattr(cache, "get_seq_length", lambda: None)()
    # A static cache counts in a tensor, which only a device synchronisation could read.
    return mask[:, past:] if isinstance(past, int) else None


def _install(site: _Site, hooks: _Hooks) -> ExitStack:
    """Register all hooks or none; closing what is returned removes them."""
    with ExitStack() as undo:

        def register(handle: torch.utils.hooks.RemovableHandle) -> None:
            undo.callback(handle.remove)

        register(site.module.register_forward_hook(hooks.steer))
        _put_first(site.module)
        register(site.decoder.register_forward_hook(hooks.after, always_call=True))
        # Last, and so removed first: no other thread's call awaits a hook that is not there.
        register(site.decoder.register_forward_pre_hook(hooks.before, with_kwargs=True))
        _recompile()
        return undo.pop_all()


def _put_first(module: nn.Module) -> None:
    """Put steerings before all other hooks, the oldest first.

    So output_hidden_states, which transformers reads by hooks on the layers, shows what is steered.
    """
    hooks = module._forward_hooks
    ours = [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", 0), _Hooks)]
    for key in sorted(ours, reverse=True):
        hooks.move_to_end(key, last=False)


def _recompile() -> None:
    """Dynamo does not look for hooks again once it compiled a model: make it forget what it did."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _locate(model: nn.Module, layer: int | str | None) -> _Site:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, a torch.nn.Module is needed")
    if layer is None:
        raise ValueError("layer: none is given, and the SAE names no hookpoint")
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps a model in another one
    base = getattr(model, "base_model", model)
    path = layer if isinstance(layer, str) else _layer_path(base, layer)
    for root in (base, model):
        module = _submodule(root, path)
        if module is not None:
            return _Site(path, module, _owner_of_layers(root, path))
    names = [name for name, _ in base.named_modules()]
    raise ValueError(f"layer: {type(model).__name__} has no module {path!r}{nearest(path, names)}")


def _layer_path(base: nn.Module, layer: int) -> str:
    if isinstance(layer, bool) or not isinstance(layer, Integral):
        raise TypeError(f"layer: got {layer!r}, a number or a module's name is needed")
    for path in _LAYER_LISTS:
        layers = _submodule(base, path)
        if isinstance(layers, nn.ModuleList):
            if not 0 <= layer < len(layers):
                raise ValueError(f"layer: got {layer}, accepted are 0 to {len(layers) - 1}")
            return f"{path}.{layer}"
    raise ValueError(
        f"layer: {type(base).__name__} has no {', '.join(_LAYER_LISTS)}; name a module"
    )


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path) if path else None
    except AttributeError:
        return None


def _owner_of_layers(root: nn.Module, path: str) -> nn.Module:
    """The module that holds the list of layers in which `path` lies; `root` if there is none."""
    owner = root
    for name in path.split("."):
        inner = getattr(owner, name)
        if isinstance(inner, nn.ModuleList):
            return owner
        owner = inner
    return root


def _check_width(model: nn.Module, sae: SAE, site: _Site) -> None:
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", None)
    is_layer = site.path.rpartition(".")[2].isdigit()
    if is_layer and width not in (None, sae.d):
        raise ValueError(f"sae: is for width {sae.d}, {site.path} is {width} wide")


def _device(site: _Site) -> torch.device:
    parameter = next(chain(site.module.parameters(), site.decoder.parameters()), None)
    if parameter is None:
        return torch.device("cpu")
    if parameter.is_meta:
        raise ValueError(f"model: {site.path} is on meta; load its weights first")
    if parameter.dtype == torch.float64:
        raise TypeError(f"model: {site.path} is {parameter.dtype}, which the op does not take")
    return parameter.device
