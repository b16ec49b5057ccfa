"""sparsify's format: a folder with cfg.json and sae.safetensors.

    cfg.json          d_in, k, num_latents (0: d_in * expansion_factor), activation, ...
    sae.safetensors   encoder.weight [N, d], encoder.bias [N], W_dec [N, d], b_dec [d]

A folder is named for its hookpoint: `layers.6` is read from the output of decoder layer 6. Where
N = d a transposed W_enc cannot be told from a right one. Source: EleutherAI/sparsify 1.3,
SparseCoder.load_from_disk.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from ..errors import nearest
from ..sae import SAE
from .files import read_json, read_tensors, write_folder, write_json, write_tensors

FILES = ("cfg.json", "sae.safetensors")

_KEYS = {"encoder.weight": "W_enc", "encoder.bias": "bias", "W_dec": "W_dec", "b_dec": "b_dec"}
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
_HOOKPOINT = re.compile(r"(\w+\.)*(layers|h)\.\d+(\.\w+)*")


def recognises(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def load(folder: Path) -> SAE:
    """The SAE in `folder`; see SAE.load."""
    for name in FILES:
        if not (folder / name).is_file():
            found = [entry.name for entry in folder.iterdir()]
            raise FileNotFoundError(f"{folder}: lacks {name}{nearest(name, found, 'is it called')}")
    source = folder / "cfg.json"
    config = read_json(source)
    N, d = _check_config(source, config)
    shapes = {"encoder.weight": (N, d), "encoder.bias": (N,), "W_dec": (N, d), "b_dec": (d,)}
    tensors = read_tensors(folder / "sae.safetensors", shapes)
    try:
        return SAE(
            **{_KEYS[key]: tensor for key, tensor in tensors.items()},
            k=config["k"],
            hookpoint=folder.name if _HOOKPOINT.fullmatch(folder.name) else None,
            config=config,
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def save(sae: SAE, folder: Path) -> None:
    """Write `sae` into `folder`; see SAE.save."""
    config = {key: sae.config.get(key, value) for key, value in _DEFAULTS.items()}
    config |= {"k": int(sae.k), "d_in": sae.d}
    if _num_latents(config) != sae.num_latents:
        config["num_latents"] = sae.num_latents
    tensors = {key: getattr(sae, name) for key, name in _KEYS.items()}
    write_folder(
        folder,
        {
            "cfg.json": lambda path: write_json(path, config),
            "sae.safetensors": lambda path: write_tensors(path, tensors),
        },
    )


def _num_latents(config: dict[str, object]) -> int:
    return config["num_latents"] or config["d_in"] * config["expansion_factor"]


def _check_config(source: Path, config: dict[str, object]) -> tuple[int, int]:
    """N and d, of a configuration that describes a plain top-k SAE."""
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise ValueError(f"{source}: activation is {activation!r}, accepted is 'topk'")
    for key, why in _NEED_FALSE.items():
        if config.get(key, False) is not False:
            raise ValueError(f"{source}: {key} is {config[key]!r}, accepted is false: {why}")
    unknown = sorted(config.keys() - _DEFAULTS.keys() - _NEED_FALSE.keys())
    for key in unknown:
        warnings.warn(f"{source}: {key} is not known and ignored", stacklevel=2)
    sizes = {
        "k": _integer(source, config, "k", unknown, least=1),
        "d_in": _integer(source, config, "d_in", unknown, least=1),
        "num_latents": _integer(source, {"num_latents": 0} | config, "num_latents", unknown),
    }
    if not sizes["num_latents"]:
        sizes["expansion_factor"] = _integer(source, config, "expansion_factor", unknown, least=1)
    N = _num_latents(sizes)
    if sizes["k"] > N:
        raise ValueError(f"{source}: k is {sizes['k']}, more than the {N} latents")
    return N, sizes["d_in"]


def _integer(
    source: Path, config: dict[str, object], key: str, unknown: list[str], least: int = 0
) -> int:
    if key not in config:
        raise ValueError(f"{source}: lacks {key}{nearest(key, unknown, 'is it called')}")
    value = config[key]
    if type(value) is not int or value < least:
        raise ValueError(f"{source}: {key} is {value!r}, an integer of at least {least} is needed")
    return value
