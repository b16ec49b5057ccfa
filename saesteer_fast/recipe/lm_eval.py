"""The files that lm-evaluation-harness takes as `steer_path` for its `steered` models.

    action   formula                               here
    add      x + c v                               sf.add(c)
    clamp    x + (c - (x - b)·u) u,  u = v / |v|   c, measure="projection"

v is W_dec[feature_index] and b is b_dec of an SAE that a `.csv` file names, a row a latent; or
`steering_vector` and `bias` (none is 0) in a `.pt` file, {hookpoint: {...}}. The clamp is one of
the projection: it asks no encoder, and is no clamp of the latent's activation.

What differs from the harness, which reads pickles that may execute anything, keeps only the last
of several rows for one hookpoint, refuses every "add" of a `.csv` file, and steers padding too:

- `.pt` files are read with weights_only=True;
- "add" adds, and all rows of one hookpoint that add are added, in whatever order;
- a hookpoint with a "clamp" and another row is refused: the result would depend on their order;
- padding is left alone, and so real tokens get what they would get without it.

Refused as well: `head_index`; a `bias` for "add"; a zero vector; SAEs that rescale what they read,
which the formula ignores; and releases of sae_lens, names of which only it knows what they mean. A
`sparse_model` is looked for as the harness does: in the working directory, then on the Hub.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..edits import add
from ..errors import named, nearest, one_of
from ..formats import files
from ..numbers import finite
from ..sae import SAE
from . import Recipe, Steering, load_sae

_ACTIONS = ("add", "clamp")
_LOADERS = ("sparsify", "sae_lens")
_COLUMNS = ("loader", "sparse_model", "hookpoint", "feature_index", "steering_coefficient")
_MORE_COLUMNS = ("action", "head_index", "sae_id", "description")
_KEYS = ("steering_vector", "action")
_MORE_KEYS = ("steering_coefficient", "bias", "head_index")


def read_csv(path: Path) -> Recipe:
    """The recipe in a `.csv` file, in which a row is a latent."""
    load, rows = lru_cache(1)(load_sae), {}
    with named(f"{path}: "):
        for line, row in _rows(path):
            with named(f"line {line}: "):
                _collect(rows, _row(row, load))
    return Recipe(tuple(rows.values()))


def read_vectors(path: Path) -> Recipe:
    """The recipe in a `.pt` file, in which a hookpoint has a vector."""
    with named(f"{path}: "):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a broken pickle can fail in any way
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"cannot be read with weights_only=True ({reason})") from None
        if not isinstance(content, Mapping) or not content:
            raise ValueError(f"holds a {type(content).__name__}, {{hookpoint: ...}} is needed")
        steerings = []
        for hookpoint, told in content.items():
            with named(f"{hookpoint}: "):
                steerings.append(_vector(hookpoint, told))
        return Recipe(tuple(steerings))


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Each row's cells by column, and its line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="", restval="", strict=True)
            rows = [(reader.line_num, row) for row in reader]
            columns = reader.fieldnames or []
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"not valid CSV ({error})") from None
    _known("column", [name for name in columns if name], _COLUMNS, _MORE_COLUMNS)
    if len(set(columns)) < len(columns):
        raise ValueError("a column is there twice")
    if not rows:
        raise ValueError("holds no row")
    for line, row in rows:
        # The harness's own example ends its lines with a comma.
        if any(row.pop("", "")):
            raise ValueError(f"line {line}: has more cells than there are columns")
    return rows


def _row(row: Mapping[str, str], load: Callable[[str], SAE]) -> Steering:
    action = row.get("action", "add")
    one_of("action", action, _ACTIONS)
    if row.get("head_index"):
        raise ValueError(f"head_index: got {row['head_index']!r}, heads are not steered")
    latent = _number("feature_index", row["feature_index"])
    if not latent.is_integer() or latent < 0:
        raise ValueError(f"feature_index: got {row['feature_index']!r}, a latent is needed")
    place, sae = _sparse_model(row, load)
    if latent >= sae.num_latents:
        raise ValueError(
            f"feature_index: got {latent:.0f}, accepted are 0 to {sae.num_latents - 1}"
        )
    value = _number("steering_coefficient", row["steering_coefficient"])
    return _steering(place, row["hookpoint"] or sae.hookpoint, int(latent), action, value)


def _sparse_model(row: Mapping[str, str], load: Callable[[str], SAE]) -> tuple[str, SAE]:
    """Where the SAE of a row lies, and the SAE."""
    one_of("loader", row["loader"], _LOADERS)
    model, folder = row["sparse_model"], row["hookpoint"]
    if not model:
        raise ValueError("sparse_model: is missing")
    if row["loader"] == "sae_lens":
        if "/" not in model and not Path(model).exists():
            raise ValueError(
                f"sparse_model: got {model!r}, a release that only sae_lens knows; give the "
                "repository on the Hub, or the folder, that has it"
            )
        folder = row.get("sae_id", "")
    elif not folder:
        raise ValueError("hookpoint: is missing")
    found = f"{model}/{folder}".rstrip("/")
    found = str(files.absolute(found)) if Path(model).exists() else found
    sae = load(found)
    if sae.normalize != "none" or sae.scale != 1 or sae.decoder_norm:
        raise ValueError(
            f"sparse_model: {found} rescales what it reads, which this formula ignores; write a "
            "JSON steering file"
        )
    return found, sae


def _collect(rows: dict[object, Steering], step: Steering) -> None:
    """Among the steerings of other rows, or into that of rows which add latents of the same SAE."""
    clamps = [other for other in rows.values() if other.layer == step.layer and other.measure]
    if clamps or (step.measure and any(other.layer == step.layer for other in rows.values())):
        raise ValueError(
            f"hookpoint: {step.layer} has a clamp and another row, and the result would depend on "
            "their order; write a JSON steering file, whose steerings act one after another"
        )
    before = rows.setdefault((step.layer, step.sae), step)
    if before is not step:
        ((latent, edit),) = step.edits.items()
        if latent in before.edits:
            raise ValueError(f"feature_index: {latent} of {step.sae} is there twice")
        before.edits[latent] = edit


def _vector(hookpoint: object, told: object) -> Steering:
    """A steering vector is the one latent of an SAE."""
    if not isinstance(hookpoint, str):
        raise ValueError("no hookpoint, a module's name is needed")
    if not isinstance(told, Mapping):
        raise ValueError(f"got a {type(told).__name__}, {{{', '.join(_KEYS)}, ...}} is needed")
    _known("key", list(told), _KEYS, _MORE_KEYS)
    action = told["action"]
    one_of("action", action, _ACTIONS)
    if told.get("head_index") is not None:
        raise ValueError(f"head_index: got {told['head_index']!r}, heads are not steered")
    if told.get("bias") is not None and action == "add":
        raise ValueError("bias: 'add' does not use it, and the harness refuses it; leave it out")
    vector = _flat("steering_vector", told["steering_vector"])
    bias = torch.zeros_like(vector) if told.get("bias") is None else _flat("bias", told["bias"])
    if not vector.any():
        raise ValueError("steering_vector: is zero, which steers nothing")
    if len(bias) != len(vector):
        raise ValueError(f"bias: is for width {len(bias)}, steering_vector for {len(vector)}")
    value = _number("steering_coefficient", told.get("steering_coefficient", 1.0))
    sae = SAE(
        W_enc=vector[None],
        b_enc=vector.new_zeros(1),
        W_dec=vector[None],
        b_dec=bias,
        measure="relu",
    )
    return _steering(sae, hookpoint, 0, action, value)


def _steering(sae: SAE | str, layer: str | None, latent: int, action: str, value: float):
    if layer is None:
        raise ValueError("hookpoint: is missing, and the SAE names none")
    if action == "add":
        return Steering(sae, {latent: add(value)}, layer)
    return Steering(sae, {latent: value}, layer, measure="projection")


def _flat(name: str, tensor: object) -> Tensor:
    """[d] fp32 of [d], or of [1, d] as the harness broadcasts it."""
    if not isinstance(tensor, Tensor) or tensor.dtype == torch.bool or tensor.is_complex():
        what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name}: got {what}, a tensor of numbers is needed")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: got {tensor.layout}, a dense tensor is needed")
    if tensor.ndim == 0 or tensor.numel() != tensor.shape[-1]:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, [d] or [1, d] is needed")
    flat = tensor.reshape(-1).float()
    if not flat.isfinite().all():
        raise ValueError(f"{name}: holds NaN or infinity in fp32")
    return flat


def _number(name: str, value: object) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name}: got {value!r}, a number is needed") from None
    return finite(f"{name}: got", number)


def _known(what: str, names: list, needed: tuple[str, ...], optional: tuple[str, ...]) -> None:
    accepted = (*needed, *optional)
    for name in names:
        if name not in accepted:
            hint = nearest(str(name), accepted)
            raise ValueError(f"{what} {name!r}: accepted are {', '.join(accepted)}{hint}")
    for name in needed:
        if name not in names:
            raise ValueError(f"{what} {name!r}: is missing")
