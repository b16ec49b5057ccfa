"""dictionary_learning's format: a folder with config.json and ae.pt.

    config.json    {"trainer": {"dict_class", "activation_dim", "dict_size", "k", "layer", ...}}
    ae.pt          a state dict; `_CLASSES` has its keys

BatchTopK classes measure by the threshold that training left behind, as they do by themselves at
inference. An AutoEncoder's decoder is normalised on loading, as the library does. Source:
saprmarks/dictionary_learning 0.1, dictionary.py, trainers/*.py and utils.load_dictionary.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..weights import row_norms
from . import settings
from .files import read_json, read_weights, require_files
from .protocol import Fields
from .zips import Torch

FILES = ("config.json", "ae.pt")
NEEDED = " and ".join(FILES)

_LINEAR = {
    "encoder.weight": ("W_enc", "Nd"),
    "encoder.bias": ("b_enc", "N"),
    "decoder.weight": ("W_dec", "dN"),
}
_MATRICES = {
    "W_enc": ("W_enc", "dN"),
    "b_enc": ("b_enc", "N"),
    "W_dec": ("W_dec", "Nd"),
    "b_dec": ("b_dec", "d"),
}
_GATED = {
    "encoder.weight": ("W_enc", "Nd"),
    "gate_bias": ("b_enc", "N"),
    "r_mag": ("r_mag", "N"),
    "mag_bias": ("b_mag", "N"),
    "decoder.weight": ("W_dec", "dN"),
    "decoder_bias": ("b_dec", "d"),
}
_B_DEC = {"b_dec": ("b_dec", "d")}
_THRESHOLD = {"threshold": ("threshold", "N")}
_CLASSES = {
    "AutoEncoder": ("relu", _LINEAR | {"bias": ("b_dec", "d")}, ()),
    "AutoEncoderNew": ("relu", _LINEAR | {"decoder.bias": ("b_dec", "d")}, ()),
    "GatedAutoEncoder": ("gated", _GATED, ()),
    "JumpReluAutoEncoder": ("threshold", _MATRICES | _THRESHOLD, ()),
    "AutoEncoderTopK": ("topk", _LINEAR | _B_DEC, ("k", "threshold")),
    "BatchTopKSAE": ("threshold", _LINEAR | _B_DEC, ("k", "threshold")),
    "MatryoshkaBatchTopKSAE": ("threshold", _MATRICES, ("k", "threshold", "group_sizes")),
}
"""Of each class its measure, its weights, and what else its file holds."""

_UNSUBTRACTED = ("JumpReluAutoEncoder", "AutoEncoderNew")


def recognises(folder: Path) -> bool:
    return (folder / "ae.pt").is_file()


def load(folder: Path) -> Fields:
    require_files(folder, FILES)
    source = folder / "config.json"
    config = read_json(source)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise ValueError(f"{source}: trainer is {trainer!r}, an object is needed")
    name = settings.one_of(source, trainer, "dict_class", _CLASSES)
    measure, layout, buffers = _CLASSES[name]
    tensors = Torch(folder / "ae.pt")
    own = _buffers(tensors, buffers, measure, source, trainer)
    N, d = (settings.integer(source, trainer, key) for key in ("dict_size", "activation_dim"))
    weights = read_weights(tensors, layout, {"N": N, "d": d})
    if "threshold" in own:
        own["threshold"] = torch.full_like(weights["b_enc"], own["threshold"], dtype=torch.float32)
    return dict(
        **weights,
        **own,
        measure=measure,
        subtract_b_dec=name not in _UNSUBTRACTED,
        decoder_norm=name == "AutoEncoder" and not _unit(weights["W_dec"]),
        hookpoint=_hookpoint(trainer),
        config=config,
    )


def _buffers(
    tensors: Torch, names: tuple[str, ...], measure: str, source: Path, trainer: dict[str, object]
) -> dict[str, float | int]:
    """k or the one threshold of all latents, taken off what the file holds besides weights."""
    found = {}
    for name in names:
        if name in tensors.shapes and name != "group_sizes":
            found[name] = tensors.scalar(name)
        tensors.shapes.pop(name, None)
    if measure == "topk":
        if "k" not in found:
            return {"k": settings.integer(source, trainer, "k")}
        k = settings.integer(tensors.path, found, "k")
        if trainer.get("k", k) != k:
            raise ValueError(f"{source}: k is {trainer['k']!r}, but {k} in {tensors.path.name}")
        return {"k": k}
    if measure == "threshold" and "k" in names:
        if found.get("threshold", -1) < 0:
            raise ValueError(
                f"{tensors.path}: threshold is not set: a BatchTopK SAE needs the one that "
                "training ends with"
            )
        return {"threshold": found["threshold"]}
    return {}


def _unit(rows: torch.Tensor) -> bool:
    norms = row_norms(rows)
    return torch.allclose(norms, torch.ones_like(norms))


def _hookpoint(trainer: dict[str, object]) -> str | None:
    site, layer = trainer.get("submodule_name"), trainer.get("layer")
    read = isinstance(site, str) and site.startswith("resid_post") and type(layer) is int
    return f"layers.{layer}" if read else None
