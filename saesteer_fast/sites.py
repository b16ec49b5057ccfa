"""Where a model is steered: from a layer's number, or a module's name, to the module.

Only the language decoder is searched, as transformers' `get_decoder` tells it from vision and audio
towers. Its layers are its one list of as many modules as the configuration has layers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from . import hookpoints
from .errors import nearest
from .numbers import FLOATS, is_integer
from .sae import SAE

# What torch.compile, FSDP and activation checkpoints put into the names of what they wrap, a model
# or a part of one, and give as it is; and what DDP and PEFT put into those of whole models.
_TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS = (*_TRANSPARENT, "module", "base_model.model")
_TOKENS_FIRST = ("XLNetModel",)
"""Which no shape tells, where a batch has as many rows as columns."""


class Site(NamedTuple):
    path: str
    """As the decoder names the module."""
    module: nn.Module
    """Its output is steered."""
    decoder: nn.Module
    """It calls the module, and is given the attention mask."""
    model: nn.Module
    """It generates."""

    @property
    def is_layer(self) -> bool:
        """Whether it is a whole layer of the decoder."""
        return re.fullmatch(r"\w+\.\d+", self.path) is not None

    @property
    def width(self) -> int | None:
        """Of the residual stream, where the model says it."""
        return getattr(_config(self.decoder) or _config(self.model), "hidden_size", None)


def of(model: nn.Module, layer: int | str | None, sae: SAE) -> Site:
    """Where `sae` steers: at `layer`, or by default at its own hookpoint.

    Raises what `locate` does, and ValueError where a layer's stream is not as wide as the SAE.
    Warns where both name layers, and not the same.
    """
    site = locate(model, sae.hookpoint if layer is None else layer)
    if site.is_layer and site.width not in (None, sae.d):
        raise ValueError(f"sae: is for width {sae.d}, {site.path} is {site.width} wide")
    own = hookpoints.layer_of(sae.hookpoint)
    if site.is_layer and own not in (None, int(site.path.rpartition(".")[2])):
        warnings.warn(f"layer: {site.path} is steered by an SAE of {sae.hookpoint}", stacklevel=3)
    return site


def locate(model: nn.Module, layer: int | str | None) -> Site:
    """The site of `layer`, by number or name.

    A name is one of `model.named_modules()`, with or without its leading parts and those that
    torch.compile, FSDP, DDP and PEFT put in. Whatever the model calls them, "layers.6" is decoder
    layer 6, and so are TransformerLens' "blocks.6.hook_resid_post" and "blocks.7.hook_resid_pre".
    Raises TypeError or ValueError for anything else.
    """
    if not isinstance(model, nn.Module):
        names = ("model", "_model")  # of transformers' pipelines, of nnsight
        held = [name for name in names if isinstance(getattr(model, name, None), nn.Module)]
        hint = f"; its .{held[0]} is one" if held else ""
        raise TypeError(f"model: got {type(model).__name__}, a torch.nn.Module is needed{hint}")
    if _is_list(model):
        raise TypeError(f"model: got a {type(model).__name__}, the model that holds it is needed")
    language = _language(model)
    lists = _layer_lists(language)
    if layer is None:
        raise ValueError(
            f"layer: none is given, and the SAE names no hookpoint; {_accepted(lists)}"
        )
    decoder, stem = language, ""
    if len(lists) == 1:
        above, _, stem = next(iter(lists)).rpartition(".")
        decoder = language.get_submodule(above)
    if isinstance(layer, str):
        path = _named(model, decoder, stem, layer, lists)
    else:
        path = _numbered(language, lists, stem, layer)
    module = decoder.get_submodule(path)
    if type(decoder).__name__ in _TOKENS_FIRST:
        raise ValueError(
            f"model: {type(decoder).__name__} keeps its stream as [T, B, d]; [B, T, d] is needed"
        )
    if _is_list(module):
        raise ValueError(
            f"layer: {path} is a list of modules, which nobody calls; name one of them"
        )
    _refuse_shared(decoder, path, module)
    return Site(path, module, decoder, model)


def device(site: Site) -> torch.device:
    """Where the site's output will be: where its weights are, or are brought for a call."""
    tensors = [*site.module.parameters(), *site.module.buffers()] or [*site.decoder.parameters()]
    floating = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    if floating and all(dtype == torch.float64 for dtype in floating):
        raise TypeError(
            f"model: {site.path} is torch.float64, accepted are {', '.join(map(str, FLOATS))}"
        )
    if not any(tensor.is_meta for tensor in tensors):
        return tensors[0].device if tensors else torch.device("cpu")
    brought = _execution_device(site.module)
    if brought is None:
        raise ValueError(f"model: {site.path} is on meta; load its weights first")
    return brought


def is_at(decoder: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether the decoder still has the output of `module` at `path`; half a microsecond.

    An adapter that was put around it adds to that output.
    """
    place = decoder
    for name in path.split("."):
        while name not in place._modules:
            place = _wrapped(place)
            if place is None:
                return False
        place = place._modules[name]
    while place is not module and place is not None:
        place = _wrapped(place)
    return place is module


def _language(model: nn.Module) -> nn.Module:
    """The language decoder, or what holds it."""
    told = {one: path for path, one in _outermost(model, lambda one: hasattr(one, "get_decoder"))}
    if len(told) > 1:
        told = {one: path for one, path in told.items() if one.can_generate()} or told
    if len(told) > 1:
        raise ValueError(
            f"model: {type(model).__name__} holds several: {', '.join(told.values())}; "
            "steer one of them"
        )
    if not told:
        return model
    (model,) = told
    decoder = model.get_decoder()
    # Of some it gives what makes logits, for that is what they call their decoder.
    return decoder if any(map(_is_list, decoder.modules())) else model


def _layer_lists(language: nn.Module) -> dict[str, nn.ModuleList]:
    """What may be the list of decoder layers: those that are as long as it, or all if none is."""
    count = getattr(_config(language), "num_hidden_layers", None)
    lists = dict(_outermost(language, _is_list))
    as_long = {path: modules for path, modules in lists.items() if len(modules) == count}
    return as_long or lists


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList)


def _outermost(module: nn.Module, wanted: Callable, path: str = "") -> Iterator:
    """Names and modules that are wanted, and lie in no other one that is."""
    if wanted(module):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _outermost(child, wanted, f"{path}.{name}" if path else name)


def _numbered(language: nn.Module, lists: dict, stem: str, layer: int) -> str:
    if not is_integer(layer):
        given = type(layer).__name__ if isinstance(layer, nn.Module) else repr(layer)
        raise TypeError(f"layer: got {given}, an integer or a module's name is needed")
    if len(lists) != 1:
        found = f"several lists of layers: {', '.join(lists)}" if lists else "no list of layers"
        raise ValueError(f"layer: {type(language).__name__} has {found}; name a module")
    if not 0 <= layer < len(*lists.values()):
        raise ValueError(f"layer: got {layer}, {_accepted(lists)}")
    return f"{stem}.{layer}"


def _accepted(lists: dict) -> str:
    numbers = f"0 to {len(*lists.values()) - 1}, and " if len(lists) == 1 else ""
    return f"accepted are {numbers}names of modules"


def _named(model: nn.Module, decoder: nn.Module, stem: str, name: str, lists: dict) -> str:
    """The path in `decoder` of what is called `name` there, or in a module around it."""
    paths = {id(module): path for path, module in decoder.named_modules() if path}
    # Of some wrappers no module is the decoder that they tell of.
    prefix = next((path for path, module in model.named_modules() if module is decoder), None)
    around = [decoder] if prefix is None else _around(model, prefix)
    for spelling in dict.fromkeys((name, _unwrapped(name))):
        found = {id(module) for root in around if (module := _submodule(root, spelling))}
        if len(found) > 1:
            raise ValueError(f"layer: {name!r} is the name of several modules; give a longer one")
        if found and found.isdisjoint(paths):
            raise ValueError(
                f"layer: {name!r} is no module inside the language decoder; {_accepted(lists)}"
            )
        if found:
            return paths[found.pop()]
    canonical = _canonical(name, stem)
    if canonical in paths.values():
        return canonical
    named = [path for path in paths.values() if path not in lists]
    known = [*named, *(f"{prefix}.{path}" for path in named if prefix)]
    hint = nearest(name, [path for path in known if _numberless(path) != _numberless(name)])
    number = re.search(r"(?<![-\d])\d+$", name)
    if not hint and number and f"{stem}.{int(number[0])}" in known:
        hint = f"; did you mean {int(number[0])} or 'layers.{int(number[0])}'?"
    raise ValueError(
        f"layer: {type(model).__name__} has no module {name!r}, {_accepted(lists)}{hint}"
    )


def _numberless(name: str) -> str:
    """Names that are alike but for their numbers are no misspellings of each other."""
    return re.sub(r"-?\d+", "N", name)


def _canonical(name: str, stem: str) -> str | None:
    """The path of the decoder layer in a spelling that is not a model's own."""
    if re.fullmatch(r"blocks\.\d+\.hook_\w+", name):
        point, name = name, hookpoints.of_transformer_lens(name)
        if name is None:
            raise ValueError(
                f"layer: {point!r} is the output of no module, or of different ones in different "
                "models; accepted are blocks.N.hook_resid_post, and hook_resid_pre of N > 0"
            )
    match = re.fullmatch(r"layers\.(\d+)", name)
    return f"{stem}.{int(match[1])}" if match and stem else None


def _around(model: nn.Module, prefix: str) -> list[nn.Module]:
    """The modules on the way to the decoder, from it to the model."""
    around = [model]
    for name in prefix.split(".") if prefix else ():
        around.insert(0, getattr(around[0], name))
    return around


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = f".{name}".replace(f".{wrapper}.", ".")[1:]
    return name


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path) if path else None
    except AttributeError:
        return None


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper gives the output of."""
    return next((module._modules[key] for key in _TRANSPARENT if key in module._modules), None)


def _refuse_shared(decoder: nn.Module, path: str, module: nn.Module) -> None:
    every = decoder.named_modules(remove_duplicate=False)
    places = [name for name, found in every if found is module]
    if len(places) > 1:
        raise ValueError(f"layer: {path} is one module in several places: {', '.join(places)}")


def _config(module: nn.Module):
    """Of the text, where a model reads more."""
    config = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate brings weights that it keeps elsewhere, and on meta between calls."""
    for inner in module.modules():
        hook = getattr(inner, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    return None
