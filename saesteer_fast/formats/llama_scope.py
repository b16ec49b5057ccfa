"""Llama Scope's format: a folder with hyperparams.json and checkpoints/final.safetensors.

    hyperparams.json    d_model, d_sae, act_fn, jump_relu_threshold, dataset_average_activation_norm
    final.safetensors   encoder.weight [N, d], encoder.bias [N], decoder.weight [d, N], decoder.bias

Trained on tokens divided by s = dataset_average_activation_norm / sqrt(d), used on tokens as they
are: both biases are multiplied by s, and activations are in units of the stream. With
sparsity_include_decoder_norm the threshold holds for pre-activations times decoder norms. act_fn
"topk" is refused: the library announces a threshold for it, and takes the top k. Source:
OpenMOSS/Language-Model-SAEs at the SAEs' release, SparseAutoEncoder.from_config and SAEConfig.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .. import hookpoints
from ..numbers import is_number
from . import settings
from .files import Safetensors, read_json, read_weights, require_files
from .protocol import Fields

FILES = ("hyperparams.json", "checkpoints/final.safetensors")
NEEDED = " and ".join(FILES)

_LAYOUT = {
    "encoder.weight": ("W_enc", "Nd"),
    "encoder.bias": ("b_enc", "N"),
    "decoder.weight": ("W_dec", "dN"),
    "decoder.bias": ("b_dec", "d"),
}
_SETTINGS = {
    "act_fn": ("relu", ("jumprelu",)),
    "norm_activation": ("token-wise", ("dataset-wise", "inference")),
    "use_decoder_bias": (True, (True,)),
    "use_glu_encoder": (False, (False, None)),
    "apply_decoder_bias_to_pre_encoder": (True, (True, False)),
    "sparsity_include_decoder_norm": (True, (True, False)),
}
"""Of each what the library takes it for where a file leaves it out, and what is accepted."""


def recognises(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def load(folder: Path) -> Fields:
    require_files(folder, FILES)
    source = folder / "hyperparams.json"
    config = read_json(source)
    _check_config(source, config)
    d, scale = config["d_model"], 1.0
    weights = read_weights(
        Safetensors(folder / "checkpoints/final.safetensors"),
        _LAYOUT,
        {"N": config["d_sae"], "d": d},
    )
    if config["norm_activation"] == "dataset-wise":
        scale = config["dataset_average_activation_norm"]["in"] / d**0.5
    weights |= {name: weights[name].float() * scale for name in ("b_enc", "b_dec")}
    return dict(
        **weights,
        measure="threshold",
        threshold=torch.full(
            (config["d_sae"],), config["jump_relu_threshold"], dtype=torch.float32
        ),
        subtract_b_dec=bool(config["apply_decoder_bias_to_pre_encoder"]),
        decoder_norm=bool(config["sparsity_include_decoder_norm"]),
        hookpoint=hookpoints.of_transformer_lens(config.get("hook_point_in")),
        config=config,
    )


def _check_config(source: Path, config: dict[str, object]) -> None:
    for key, (default, accepted) in _SETTINGS.items():
        if config.setdefault(key, default) not in accepted:
            raise ValueError(
                f"{source}: {key} is {config[key]!r}, accepted are {', '.join(map(repr, accepted))}"
            )
    if config.get("hook_point_out", config.get("hook_point_in")) != config.get("hook_point_in"):
        raise ValueError(f"{source}: is a transcoder: its output is not its input's stream")
    for key in ("d_model", "d_sae"):
        settings.integer(source, config, key)
    settings.positive(source, config, "jump_relu_threshold")
    norms = config.get("dataset_average_activation_norm")
    if config["norm_activation"] == "dataset-wise":
        inside = norms.get("in") if isinstance(norms, dict) else None
        if not is_number(inside) or not inside > 0 or norms.get("out") != inside:
            raise ValueError(
                f"{source}: dataset_average_activation_norm is {norms!r}, "
                '{"in": a positive number, "out": the same} is needed'
            )
