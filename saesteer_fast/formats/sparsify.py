"""sparsify's format: a folder with cfg.json and sae.safetensors.

    cfg.json          d_in, k, num_latents (0: d_in * expansion_factor), activation, ...
    sae.safetensors   encoder.weight [N, d], encoder.bias [N], W_dec [N, d], b_dec [d]

A folder is named for its hookpoint: `layers.6` is read from the output of decoder layer 6. Where
N = d a transposed W_enc cannot be told from a right one. Source: EleutherAI/sparsify 1.3,
SparseCoder.load_from_disk.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from .. import hookpoints
from ..weights import Weights
from . import order, settings
from .files import (
    FOLD,
    Safetensors,
    read_json,
    read_weights,
    require_files,
    write_folder,
    write_json,
    write_tensors,
)
from .protocol import Fields

FILES = ("cfg.json", "sae.safetensors")
NEEDED = " and ".join(FILES)

_LAYOUT = {
    "encoder.weight": ("W_enc", "Nd"),
    "encoder.bias": ("b_enc", "N"),
    "W_dec": ("W_dec", "Nd"),
    "b_dec": ("b_dec", "d"),
}
_MEASURES = ("topk", "groupmax")
_DEFAULTS = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": None,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": None,
}
_NEED_FALSE = {
    "transcode": "a transcoder's output is not its input's stream",
    "skip_connection": "a skip connection has weights of its own",
    "signed": "a signed SAE ranks latents by size and keeps negative ones",
}


def recognises(folder: Path) -> bool:
    return (folder / "sae.safetensors").is_file() or (
        (folder / "cfg.json").is_file() and not (folder / "sae_weights.safetensors").is_file()
    )


def load(folder: Path) -> Fields:
    require_files(folder, FILES)
    source = folder / "cfg.json"
    config = read_json(source)
    sizes = _check_config(source, config)
    return dict(
        **read_weights(Safetensors(folder / "sae.safetensors"), _LAYOUT, sizes),
        k=config["k"],
        measure=config.get("activation", "topk"),
        hookpoint=hookpoints.of_folder(folder),
        config=config,
    )


def save(sae: Weights, folder: Path) -> None:
    _check_expressible(sae)
    config = {key: sae.config.get(key, value) for key, value in _DEFAULTS.items()}
    config |= {"activation": sae.measure, "k": int(sae.k), "d_in": sae.d}
    if _num_latents(config) != sae.num_latents:
        config["num_latents"] = sae.num_latents
    tensors = {key: getattr(sae, name) for key, (name, _) in _LAYOUT.items()}
    write_folder(
        folder,
        {
            "cfg.json": lambda path: write_json(path, config),
            "sae.safetensors": lambda path: write_tensors(path, tensors),
        }
        | order.writers(sae),
    )


def _check_expressible(sae: Weights) -> None:
    needed = {"subtract_b_dec": True, "normalize": "none", "decoder_norm": False, "scale": 1}
    if sae.measure not in _MEASURES:
        raise ValueError(f"sparsify has no measure {sae.measure!r}, only {', '.join(_MEASURES)}")
    for name, value in needed.items():
        if getattr(sae, name) != value:
            hint = f"; {FOLD}" if name in ("decoder_norm", "scale") else ""
            raise ValueError(f"sparsify cannot say {name}={getattr(sae, name)!r}{hint}")


def _num_latents(config: dict[str, object]) -> int:
    return config["num_latents"] or config["d_in"] * config["expansion_factor"]


def _check_config(source: Path, config: dict[str, object]) -> dict[str, int]:
    """N and d, of a configuration that describes an SAE."""
    config = {"activation": "topk", "num_latents": 0} | config
    settings.one_of(source, config, "activation", _MEASURES)
    for key, why in _NEED_FALSE.items():
        if config.get(key, False) is not False:
            raise ValueError(f"{source}: {key} is {config[key]!r}, accepted is false: {why}")
    for key in sorted(config.keys() - _DEFAULTS.keys() - _NEED_FALSE.keys()):
        warnings.warn(f"{source}: {key} is not known and ignored", stacklevel=2)
    sizes = {
        "k": settings.integer(source, config, "k"),
        "d_in": settings.integer(source, config, "d_in"),
        "num_latents": settings.integer(source, config, "num_latents", least=0),
    }
    if not sizes["num_latents"]:
        sizes["expansion_factor"] = settings.integer(source, config, "expansion_factor")
    N = _num_latents(sizes)
    if sizes["k"] > N:
        raise ValueError(f"{source}: k is {sizes['k']}, more than the {N} latents")
    return {"N": N, "d": sizes["d_in"]}
