"""OpenAI's format: one file, a state dict that torch.save wrote.

    pre_bias [d], latent_bias [N], encoder.weight [N, d], decoder.weight [d, N]
    activation   "TopK", with activation_state_dict {"k", "postact_fn"}, or "ReLU"

TopK files normalise every token. Source: openai/sparse_autoencoder, model.py.
"""

from __future__ import annotations

from pathlib import Path

from . import qwen_scope, settings
from .files import read_weights
from .protocol import Fields
from .zips import Torch

FILES = ("autoencoder.pt",)  # as on the Hub; here it may have any name
NEEDED = "one .pt file"

_LAYOUT = {
    "encoder.weight": ("W_enc", "Nd"),
    "latent_bias": ("b_enc", "N"),
    "decoder.weight": ("W_dec", "dN"),
    "pre_bias": ("b_dec", "d"),
}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def recognises(path: Path) -> bool:
    return _file(path) is not None


def load(path: Path) -> Fields:
    tensors = Torch(_file(path))
    activation = settings.one_of(tensors.path, tensors.settings, "activation", ("TopK", "ReLU"))
    for name in _STATISTICS:
        tensors.shapes.pop(name, None)
    topk = _topk(tensors) if activation == "TopK" else {"measure": "relu"}
    return dict(**read_weights(tensors, _LAYOUT), **topk)


def _topk(tensors: Torch) -> dict[str, object]:
    state = settings.mapping(tensors.path, tensors.settings, "activation_state_dict")
    why = "; another lets negative activations live"
    settings.one_of(tensors.path, state, "postact_fn", ("ReLU",), why)
    return {"k": settings.integer(tensors.path, state, "k"), "normalize": "layer_norm"}


def _file(path: Path) -> Path | None:
    """`path`, or the one .pt file in it that is not Qwen Scope's."""
    if path.is_file():
        return path if path.suffix == ".pt" else None
    inside = sorted(file for file in path.glob("*.pt") if not qwen_scope.recognises(file))
    return inside[0] if len(inside) == 1 else None
