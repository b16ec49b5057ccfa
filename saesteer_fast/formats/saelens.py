"""SAELens's format: a folder with cfg.json and sae_weights.safetensors.

    cfg.json                   architecture, d_in, d_sae, k, ...; before 6.0 flat, hook_point, ...
    sae_weights.safetensors    W_enc [d, N], b_enc [N], W_dec [N, d], b_dec [d]
                               jumprelu: and threshold [N]
                               gated: b_gate, b_mag, r_mag [N], and no b_enc
    activation_scaler.json     {"scaling_factor": s}, of a checkpoint whose scale is not folded in

Source: SAELens 6.54, sae_lens/saes and loading/pretrained_sae_loaders.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from .. import hookpoints
from ..weights import Weights
from . import order, settings
from .files import (
    FOLD,
    Safetensors,
    read_json,
    read_weights,
    require_files,
    require_tensor,
    write_folder,
    write_json,
    write_tensors,
)
from .protocol import Fields

FILES = ("cfg.json", "sae_weights.safetensors", "activation_scaler.json")
NEEDED = "cfg.json and sae_weights.safetensors"

_MEASURES = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "threshold",
    "gated": "gated",
}
_COMMON = {"W_enc": ("W_enc", "dN"), "W_dec": ("W_dec", "Nd"), "b_dec": ("b_dec", "d")}
_OWN = {
    "standard": {"b_enc": ("b_enc", "N")},
    "topk": {"b_enc": ("b_enc", "N")},
    "jumprelu": {"b_enc": ("b_enc", "N"), "threshold": ("threshold", "N")},
    "gated": {"b_gate": ("b_enc", "N"), "r_mag": ("r_mag", "N"), "b_mag": ("b_mag", "N")},
}
_NORMALIZE = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
    "expected_average_only_in": "none",
}
_KNOWN = {
    "architecture",
    "d_in",
    "d_sae",
    "dtype",
    "device",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "metadata",
    "k",
    "rescale_acts_by_decoder_norm",
}
_RENAMED = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
_METADATA = ("model_name", "hook_name", "prepend_bos", "context_size", "dataset_path")
VERSION = "6.0.0"
"""The oldest SAELens that reads what is saved here."""


def recognises(folder: Path) -> bool:
    return (folder / "sae_weights.safetensors").is_file()


def load(folder: Path) -> Fields:
    require_files(folder, FILES[:2])
    source = folder / "cfg.json"
    config = _modern(source, read_json(source))
    is_transcoder = "transcoder" in str(config.get("architecture"))
    why = "; a transcoder's output is not its input's stream" if is_transcoder else ""
    architecture = settings.one_of(source, config, "architecture", _MEASURES, why)
    layout = _COMMON | _OWN[architecture]
    tensors = Safetensors(folder / "sae_weights.safetensors")
    N, d = (settings.integer(source, config, key) for key in ("d_sae", "d_in"))
    _drop_scaling(tensors, N)
    normalize = settings.one_of(source, config, "normalize_activations", _NORMALIZE)
    metadata = config.get("metadata") or {}
    return dict(
        **read_weights(tensors, layout, {"N": N, "d": d}),
        k=settings.integer(source, config, "k") if architecture == "topk" else None,
        measure=_MEASURES[architecture],
        subtract_b_dec=settings.flag(source, config, "apply_b_dec_to_input", True),
        decoder_norm=settings.flag(source, config, "rescale_acts_by_decoder_norm", False),
        normalize=_NORMALIZE[normalize],
        scale=_scale(source, config),
        hookpoint=hookpoints.of_transformer_lens(metadata.get("hook_name"))
        or hookpoints.of_folder(folder),
        config={"metadata": metadata},
    )


def save(sae: Weights, folder: Path) -> None:
    architectures = {measure: name for name, measure in _MEASURES.items()}
    _check_expressible(sae, architectures)
    architecture = architectures[sae.measure]
    layout = _COMMON | _OWN[architecture]
    tensors = {
        key: getattr(sae, name).T if letters == "dN" else getattr(sae, name)
        for key, (name, letters) in layout.items()
    }
    write_folder(
        folder,
        {
            "cfg.json": lambda path: write_json(path, _config(sae, architecture)),
            "sae_weights.safetensors": lambda path: write_tensors(path, tensors),
        }
        | order.writers(sae),
    )


def _config(sae: Weights, architecture: str) -> dict[str, object]:
    names = {name: key for key, name in reversed(_NORMALIZE.items())}
    own = {"k": sae.k, "rescale_acts_by_decoder_norm": sae.decoder_norm}
    metadata = dict(sae.config.get("metadata") or {})
    said = hookpoints.of_transformer_lens(metadata.get("hook_name"))
    if said is not None and said != sae.hookpoint:
        del metadata["hook_name"]
    hook_name = hookpoints.to_transformer_lens(sae.hookpoint)
    if hook_name and said != sae.hookpoint:
        metadata["hook_name"] = hook_name
    return {
        "d_in": sae.d,
        "d_sae": sae.num_latents,
        "dtype": _dtype(sae),
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "normalize_activations": names[sae.normalize],
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": VERSION} | metadata,
        **(own if architecture == "topk" else {}),
        "architecture": architecture,
    }


def _dtype(sae: Weights) -> str:
    """Wide enough for every weight: SAELens keeps all in one."""
    dtype = sae.W_enc.dtype
    for tensor in (sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold, sae.r_mag, sae.b_mag):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return str(dtype).removeprefix("torch.")


def _check_expressible(sae: Weights, architectures: dict[str, str]) -> None:
    if sae.measure not in architectures:
        raise ValueError(f"SAELens has no measure {sae.measure!r}, only {', '.join(architectures)}")
    if sae.scale != 1:
        raise ValueError(f"SAELens cannot say scale={sae.scale}; {FOLD}")
    if sae.decoder_norm and sae.measure != "topk":
        raise ValueError(f"SAELens cannot say decoder_norm for {sae.measure!r}; {FOLD}")


def _modern(source: Path, config: dict[str, object]) -> dict[str, object]:
    """The configuration as SAELens 6 writes it."""
    if isinstance(config.get("metadata"), dict):
        for key in sorted(config.keys() - _KNOWN):
            warnings.warn(f"{source}: {key} is not known and ignored", stacklevel=3)
        return {"normalize_activations": "none"} | config
    config = {_RENAMED.get(key, key): value for key, value in config.items()}
    said = {"activation_fn": config.get("activation_fn") or "relu"}
    activation = settings.one_of(source, said, "activation_fn", ("relu", "topk"))
    config.setdefault("architecture", "standard")
    if activation == "topk":
        config["architecture"] = "topk"
        own = settings.mapping(source, config, "activation_fn_kwargs")
        config["k"] = own.get("k", config.get("k"))
    normalize = config.get("normalize_activations")
    if normalize is None or isinstance(normalize, bool):
        normalize = "expected_average_only_in" if normalize else "none"
    metadata = {key: config[key] for key in _METADATA if key in config}
    return config | {"normalize_activations": normalize, "metadata": metadata}


def _scale(source: Path, config: dict[str, object]) -> float:
    """What SAELens multiplies every token by in training, and folds in only when it ends."""
    if config["normalize_activations"] != "expected_average_only_in":
        return 1.0
    path = source.with_name("activation_scaler.json")
    if not path.is_file():
        raise ValueError(
            f"{source}: normalize_activations is 'expected_average_only_in', and there is no "
            "activation_scaler.json to say by how much; fold the factor in with SAELens, or write "
            'it there as {"scaling_factor": ...}'
        )
    return settings.positive(path, read_json(path), "scaling_factor")


def _drop_scaling(tensors: Safetensors, N: int) -> None:
    """Older files carry a factor a latent for finetuning, which is 1 unless it was used."""
    if "scaling_factor" in tensors.shapes:
        require_tensor(tensors, "scaling_factor", (N,))
        if not bool((tensors.read("scaling_factor") == 1).all()):
            raise ValueError(
                f"{tensors.path}: scaling_factor is not 1: finetuned activations are not supported"
            )
        del tensors.shapes["scaling_factor"]
