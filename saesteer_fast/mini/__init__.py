"""The paper in miniature: a small Phi-3 that refuses, its tokenizer and its SAE, shipped here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..sae import SAE

ASSETS = Path(__file__).with_name("assets")
"""What `saesteer mini build` made; transformers loads model and tokenizer from here."""


class Miniature(NamedTuple):
    """What a build leaves."""

    model: Any
    """transformers.Phi3ForCausalLM, fp32, in eval mode."""
    tokenizer: Any
    sae: SAE
    layer: int
    """The decoder layer whose output the SAE reads."""
    metrics: dict
    """metrics.json: how it was built and how good it is."""


def load(path: str | Path = ASSETS) -> Miniature:
    """Reads the miniature from a folder that `saesteer mini build` wrote; by default the shipped.

    Raises FileNotFoundError if it is not there.
    """
    path = Path(path)
    if not (path / "metrics.json").is_file():
        raise FileNotFoundError(
            f"path: got {path}, which holds no metrics.json; accepted is a folder "
            "that `saesteer mini build --out` wrote"
        )
    metrics = json.loads((path / "metrics.json").read_text())
    layer = metrics["layer"]
    return Miniature(*language_model(path), SAE.load(path / f"layers.{layer}"), layer, metrics)


def language_model(path: Path) -> tuple[Any, Any]:
    """The model and the tokenizer in folder `path`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


@contextmanager
def running_on(threads: int) -> Iterator[None]:
    """Has torch use so many threads for as long as it lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
