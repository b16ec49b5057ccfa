"""Builds the miniature from nothing: corpus, tokenizer, model, SAEs, and the choice of the layer.

    OUT/config.json, model.safetensors, tokenizer.json, ...   as transformers loads them
    OUT/layers.L/cfg.json, sae.safetensors                    the SAE of layer L, sparsify's format
    OUT/metrics.json                                          what was built, and how good it is

The same seed, threads, machine and versions give the same weights and metrics, bit for bit.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..eval import evaluate
from ..find import Candidate, capture, refusal_latents
from ..sae import SAE
from . import corpus, language_model, running_on
from .model import ModelConfig, build_model, collate, encode_example, train_model
from .sae import SaeConfig, TopK, quality, train_sae
from .tokenizer import VOCAB_SIZE, train_tokenizer


class BuildConfig(NamedTuple):
    """Everything that a build depends on but its seed and threads."""

    model: ModelConfig = ModelConfig()
    sae: SaeConfig = SaeConfig()
    vocab_size: int = VOCAB_SIZE
    tokenizer_examples: int = 20_000
    sae_examples: int = 8_000
    """Conversations whose residuals train the SAEs; an eighth as many more measure them."""
    every: int = 5
    """Which validation prompts choose the latent: one in so many."""


DEFAULT = BuildConfig()


def build(out: str | Path, seed: int = 0, threads: int = 1, config: BuildConfig = DEFAULT) -> dict:
    """Builds the miniature into the folder `out` and returns what metrics.json holds."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before all the training
    with running_on(threads):
        model, tokenizer, encoded = _language_model(config, seed)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        # As it ships: rounding in place rounds the rotary frequencies too, loading does not.
        model, tokenizer = language_model(out)
        validation = corpus.prompts("validation", seed)
        held_out = {"validation": validation, "test": corpus.prompts("test", seed)}
        base = {split: evaluate(model, tokenizer, asked) for split, asked in held_out.items()}
        layers = _sweep_layers(model, tokenizer, encoded, validation[:: config.every], config, seed)
    best = max(layers, key=lambda record: record["score"])
    best.pop("sae").save(out / f"layers.{best['layer']}")
    metrics = {
        "seed": seed,
        "threads": threads,
        "config": {
            **config._asdict(),
            "model": config.model._asdict(),
            "sae": config.sae._asdict(),
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "base": base,
        "layer": best["layer"],
        "latent": best["candidates"][0]["latent"],
        "layers": [{k: v for k, v in record.items() if k != "sae"} for record in layers],
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def _language_model(config: BuildConfig, seed: int):
    """(the trained model in bf16, its tokenizer, the encoded examples)"""
    written = list(corpus.examples(config.model.examples, seed))
    texts = (text for prompt, said in written for text in (*prompt.turns, said))
    tokenizer = train_tokenizer(islice(texts, config.tokenizer_examples), config.vocab_size)
    encoded = [encode_example(tokenizer, *example) for example in written]
    torch.manual_seed(seed)
    model = build_model(tokenizer, config.model)
    steps = -(-len(encoded) // config.model.batch)
    for loss in (bar := _progress(train_model(model, encoded, config.model, seed), "model", steps)):
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return model.to(torch.bfloat16), tokenizer, encoded


def _sweep_layers(model, tokenizer, encoded, prompts, config: BuildConfig, seed: int) -> list[dict]:
    """Each layer's SAE, how good it is, and what its latents do when clamped, best latent first."""
    held_out = config.sae_examples // 8
    layers = range(config.model.layers)
    sample = encoded[: config.sae_examples + held_out]
    fit = _residuals(model, sample[held_out:], layers)
    measure = _residuals(model, sample[:held_out], layers)
    return [
        _try_layer(model, tokenizer, layer, fit[layer], measure[layer], prompts, config, seed)
        for layer in layers
    ]


def _try_layer(model, tokenizer, layer, fit, measure, prompts, config, seed) -> dict:
    torch.manual_seed(seed)
    trained = TopK(fit, config.sae)
    steps = train_sae(trained, fit, config.sae)
    for unexplained in (bar := _progress(steps, f"SAE {layer}", config.sae.steps)):
        bar.set_postfix(unexplained=f"{unexplained:.3f}", refresh=False)
    sae = _as_sae(trained, layer)
    tried = refusal_latents(model, tokenizer, sae, layer, corpus.ARCHETYPE, prompts)
    candidates = sorted(_progress(tried, f"latents {layer}"), key=lambda c: -c.score)
    return {
        "layer": layer,
        **quality(trained, measure),
        "score": round(candidates[0].score, 4),
        "candidates": [_plain(candidate) for candidate in candidates],
        "sae": sae,
    }


def _as_sae(trained: TopK, layer: int) -> SAE:
    """The trained weights as the library's SAE, whose hookpoint names the layer."""
    return SAE(
        trained.W_enc.detach(),
        trained.b_enc.detach(),
        trained.W_dec.detach(),
        trained.b_dec.detach(),
        k=trained.k,
        hookpoint=f"layers.{layer}",
    )


@torch.inference_mode()
def _residuals(model, encoded, layers: Iterable[int]) -> list[Tensor]:
    """The residual stream [T, d] of every token of the encoded conversations, at each layer."""
    caught = []
    for start in range(0, len(encoded), 64):
        batch = encoded[start : start + 64]
        ids, real = collate(batch, model.config.pad_token_id)
        caught.append([stream[real] for stream in capture(model, ids, layers)])
    return [torch.cat(streams) for streams in zip(*caught, strict=True)]


def _plain(candidate: Candidate) -> dict:
    """As JSON holds it, rounded; of its columns only the shares."""
    shares = {column: round(share.value, 4) for column, share in candidate.shares.items()}
    numbers = {"unit": round(candidate.unit, 4), "score": round(candidate.score, 4)}
    return {**candidate._asdict(), **numbers, "shares": shares}


def _progress(steps: Iterable, name: str, total: int | None = None):
    from tqdm import tqdm

    return tqdm(steps, desc=name, total=total, dynamic_ncols=True)
