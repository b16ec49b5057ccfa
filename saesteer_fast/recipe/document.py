"""The JSON document of a recipe, version 1: read, with every mistake named by its place; written.

    {
      "format": "saesteer-steering",
      "version": 1,
      "model": "microsoft/Phi-3-mini-4k-instruct",
      "steerings": [
        {
          "sae": "layers.6",
          "layer": 6,
          "edits": {"22373": 12.0, "511": {"kind": "at_most", "value": 2.0}},
          "scope": "generated",
          "when": {"active": {"7": 0.5}, "gate": {"weights": {"30": 0.8}, "bias": -2.0}}
        }
      ]
    }

`model` says of which model they are, for people to read; nothing is checked by it. The keys of a
steering are the arguments of sf.steering; `sae` and `edits` are needed, the others have its
defaults.

    sae      a folder or file, relative to this file's folder, or a repository on the Hub
    layer    a number, or a module's name
    edits    {latent: edit}, one configuration for all rows, where an edit is a number, which sets,
             or {"kind", "value"} with a kind of edits.KINDS;
             [configuration, ...] for the rows of the batch;
             {name: configuration}, a table: its names must not read as integers
    rows     [name or number, ...] of configurations
    scope    "all", "prompt", "generated"; {"positions": [0, -1]}; {"not_tokens": [1, 2]};
             {"mask": [[true, false], ...]}; [scope, ...]
    when     {"active": {latent: threshold}}, or {"gate": gate}, or both. A gate is
             {"weights": {latent: weight}, "bias", "threshold", "pool"}, or the path of its file,
             relative to this one's folder
    error, measure, impl

schema.json beside this module says the same as a JSON Schema, for editors and other programs.
"""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..choice import IMPLS
from ..conditions import Condition, Gate, Logistic, active, gate, gate_of, split
from ..edits import KINDS, Edit
from ..errors import named
from ..formats import files, hub
from ..node import Node
from ..plan import ERRORS
from ..sae import SAE
from ..scopes import NAMED, NotTokens, Positions, Scope, not_tokens, positions
from ..weights import MEASURES
from ..writing import write_whole
from . import Recipe, Steering

FORMAT, VERSION = "saesteer-steering", 1

_INTEGER = re.compile("[-+]?[0-9]+")


def read(path: Path) -> Recipe:
    """The recipe in a JSON file; see load_steering."""
    with named(f"{path}: "):
        return _parse(path.read_bytes(), path.parent)


def _parse(text: bytes, folder: Path) -> Recipe:
    """The recipe of a document, paths in which are relative to `folder`."""
    root = Node.of(text)
    readers = {
        "format": lambda node: node.equals(FORMAT),
        "version": lambda node: node.equals(VERSION),
        "model": Node.text,
        "steerings": lambda node: tuple(
            _steering(item, folder) for item in node.items("a list of steerings")
        ),
    }
    # First, for what else may be there depends on them.
    for name, node in root.mapping("an object is needed").items():
        if name in ("format", "version"):
            readers[name](node)
    read = root.read("a steering file", readers, ("format", "version", "steerings"))
    return Recipe(read["steerings"], read.get("model"))


def _steering(node: Node, folder: Path) -> Steering:
    readers = {
        "sae": lambda node: _located(node, folder),
        "edits": _edits,
        "layer": _name,
        "scope": _scope,
        "rows": lambda node: [_name(row) for row in node.items("a list of configurations")],
        "when": lambda node: _when(node, folder),
        "error": lambda node: node.one_of(ERRORS),
        "measure": lambda node: node.one_of((*MEASURES, "projection")),
        "impl": lambda node: node.one_of(IMPLS),
    }
    given = node.read("a steering", readers, ("sae", "edits"))
    with named(f"{node.place}."):
        return Steering(**given)


def _located(node: Node, folder: Path) -> str:
    text = node.text()
    with named(f"{node.place}: "):
        place = files.absolute(_from(folder, text))
        return text if hub.is_id(text) and not place.exists() else str(place)


def _from(folder: Path, text: str) -> Path:
    """A path as the file in `folder` says it; ~ is the reader's home."""
    return folder / os.path.expanduser(text)


def _name(node: Node) -> str | int:
    return node.text() if isinstance(node.value, str) else node.integer(0)


def _edits(node: Node):
    if isinstance(node.value, list):
        return [_configuration(row) for row in node.items("a list of configurations")]
    if not isinstance(node.value, dict) or not node.value:
        return _configuration(node)
    tables = any(isinstance(value, dict) for value in node.value.values())
    if not tables or any(map(_INTEGER.fullmatch, node.value)):
        return _configuration(node)
    return {name: _configuration(row) for name, row in node.mapping("a table").items()}


def _configuration(node: Node) -> dict[int, Edit]:
    return node.latents("edit", _edit)


def _edit(node: Node) -> Edit:
    if not isinstance(node.value, dict):
        return Edit("set", node.number())
    readers = {"kind": lambda node: node.one_of(KINDS), "value": Node.number}
    return Edit(**node.read("an edit", readers, ("kind", "value")))


def _scope(node: Node) -> Scope:
    if isinstance(node.value, list):
        return [_scope(part) for part in node.items("a list of scopes")]
    if not isinstance(node.value, dict):
        return node.one_of(NAMED)
    readers = {
        "positions": lambda node: positions(*_integers(node)),
        "not_tokens": lambda node: not_tokens(_integers(node, 0)),
        "mask": _mask,
    }
    found = list(node.read("a scope", readers).values())
    if len(found) != 1:
        node.refuse(f"one of {', '.join(readers)} is needed; a list of scopes holds several")
    return found[0]


def _integers(node: Node, least: int = -(2**63)) -> list[int]:
    return [item.integer(least) for item in node.items("a list of integers")]


def _mask(node: Node) -> Tensor:
    rows = [row.items("a list of true and false") for row in node.items("a list of rows")]
    for row in rows:
        for item in row:
            if not isinstance(item.value, bool):
                item.refuse("true or false is needed")
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{node.place}: rows of one length are needed")
    return torch.tensor([[item.value for item in row] for row in rows])


def _when(node: Node, folder: Path) -> list[Condition]:
    readers = {
        "active": lambda node: active(node.numbers("threshold")),
        "gate": lambda node: _gate(node, folder),
    }
    found = list(node.read("conditions", readers).values())
    return found or node.refuse(f"{' or '.join(readers)} is needed")


def _gate(node: Node, folder: Path) -> Gate:
    if isinstance(node.value, str):
        with named(f"{node.place}: "):
            return gate(_from(folder, node.text()))
    return gate_of(node)


def write(recipe: Recipe, path: Path) -> None:
    """See Recipe.save."""
    if path.suffix != ".json":
        raise ValueError(f"path: got {path}, a name that ends in .json is needed")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: no folder {path.parent} to write {path.name} into")
    content = {"format": FORMAT, "version": VERSION}
    if recipe.model is not None:
        content["model"] = recipe.model
    steerings = []
    for place, step in enumerate(recipe.steerings):
        with named(f"steerings[{place}]."):
            steerings.append(_written(step, path.parent))
    text = json.dumps(content | {"steerings": steerings}, indent=2).encode() + b"\n"
    # What cannot be read back is refused before it takes another file's place.
    _parse(text, path.parent)
    write_whole(path, text)


def _written(step: Steering, folder: Path) -> dict[str, object]:
    members: dict[str, object] = {"sae": _relative(step.sae, folder)}
    if step.layer is not None:
        members["layer"] = _plain(step.layer)
    members["edits"] = _plain_edits(step.edits)
    if step.rows is not None:
        members["rows"] = [_plain(row) for row in step.rows]
    if not isinstance(step.scope, str) or step.scope != "all":
        members["scope"] = _plain_scope(step.scope)
    if step.when is not None:
        members["when"] = _plain_conditions(step.when)
    for name, default in (("error", "keep"), ("measure", None), ("impl", "auto")):
        if getattr(step, name) != default:
            members[name] = getattr(step, name)
    return members


def _relative(sae: SAE | str, folder: Path) -> str:
    if isinstance(sae, SAE):
        raise ValueError("sae: lies in no file that could be named; SAE.save it, and give its path")
    sae = os.fspath(sae)
    if hub.is_id(sae) and not Path(sae).exists():
        return sae
    path = Path(os.path.relpath(files.absolute(sae), os.path.realpath(folder))).as_posix()
    return f"./{path}" if hub.is_id(path) else path


def _plain(name: str | int) -> str | int:
    """Integers of other libraries as Python's own."""
    return name if isinstance(name, str) else operator.index(name)


def _plain_edits(edits) -> object:
    if not isinstance(edits, Mapping):
        return [_plain_edits(row) for row in edits]
    return {str(key): _plain_edit(value) for key, value in edits.items()}


def _plain_edit(edit) -> object:
    if isinstance(edit, Mapping):
        return _plain_edits(edit)
    edit = edit if isinstance(edit, Edit) else Edit("set", edit)
    value = edit.value.item() if isinstance(edit.value, Tensor) else edit.value
    return value if edit.kind == "set" else {"kind": edit.kind, "value": value}


def _plain_scope(scope: Scope) -> object:
    if isinstance(scope, Positions):
        return {"positions": list(scope.places)}
    if isinstance(scope, NotTokens):
        return {"not_tokens": list(scope.ids)}
    if isinstance(scope, Tensor):
        return {"mask": scope.tolist()}
    return scope if isinstance(scope, str) else [_plain_scope(part) for part in scope]


def _plain_conditions(when) -> dict[str, object]:
    members, (tokens, prompt) = {}, split(when)
    if tokens is not None:
        members["active"] = {str(latent): above for latent, above in tokens.above.items()}
    if prompt is not None:
        decide = prompt.decide
        if not isinstance(decide, Logistic):
            raise ValueError("when.gate: is decided by a callable, which is no data")
        weights = zip(map(str, prompt.latents), decide.weights, strict=True)
        members["gate"] = {
            "weights": dict(weights),
            "bias": decide.bias,
            "threshold": decide.threshold,
            "pool": decide.pool,
        }
    return members
