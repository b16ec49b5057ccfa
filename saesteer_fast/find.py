"""Finds the latents that refuse, as O'Brien et al. 2024 (arXiv 2411.11296) do.

Candidates are the latents live on at least two tokens of the model's refusal of one archetypal
unsafe prompt. Each is clamped in turn while the model answers validation prompts, and the one with
the best score is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from . import sites
from .eval import Prompt, Share, answers, chat_text, is_refusal, sweep, tally
from .measures import Measured, encode
from .sae import SAE

TRIED = 2.5
"""The strength at which candidates are tried, in units of the latent's own maximum. At 1 single
latents of the miniature move refusal too little to be told apart."""


class Candidate(NamedTuple):
    """A latent, how it was found and what clamping it did."""

    latent: int
    tokens: int
    """Tokens of the archetypal refusal on which it is live."""
    unit: float
    """Its largest activation over the unsteered conversations: strength 1."""
    shares: Mapping[str, Share]
    """The evaluation's columns at the strength that was tried."""
    score: float


@torch.inference_mode()
def residuals(
    model, tokenizer, prompts: Sequence[Prompt], said: Sequence[str], layer: int
) -> Iterator[tuple[Tensor, int]]:
    """Of each conversation: the layer's output [T, d], and how many tokens the prompt has."""
    for prompt, answer in zip(prompts, said, strict=True):
        asked = chat_text(tokenizer, prompt)
        begin = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        ids = tokenizer(asked + answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        yield capture(model, ids.to(model.device), [layer])[0][0], begin


def capture(model, input_ids: Tensor, layers: Sequence[int | str]) -> list[Tensor]:
    """The residual stream [..., T, d] at the output of each of the layers, as `steering` takes
    them."""
    found = [sites.locate(model, layer) for layer in layers]
    if not found:
        return []
    caught = {}

    def keep(module, _args, output):
        caught[module] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as undo:
        for site in found:
            undo.callback(site.module.register_forward_hook(keep).remove)
        found[0].decoder(input_ids=input_ids, use_cache=False)
    return [caught[site.module] for site in found]


def live_latents(
    model, tokenizer, sae: SAE, layer: int, prompt: Prompt, said: str, tokens: int = 2
) -> dict[int, int]:
    """{latent: on how many tokens of the answer `said` it is live}, where that is `tokens` or
    more. Raises ValueError if no latent is live so often."""
    stream, begin = next(residuals(model, tokenizer, [prompt], [said], layer))
    counts = (encode(sae, stream[begin:].to(sae.device)) > 0).sum(0)
    found = {latent: int(counts[latent]) for latent in (counts >= tokens).nonzero()[:, 0].tolist()}
    if not found:
        raise ValueError(
            f"tokens: got {tokens}, but no latent is live on more than {int(counts.max())} tokens "
            f"of the answer {said!r}"
        )
    return found


def refusal_of(model, tokenizer, archetype: Prompt) -> str:
    """The model's answer. Raises ValueError if it does not refuse."""
    (said,) = answers(model, tokenizer, [archetype], max_new_tokens=32)
    if not is_refusal(said):
        raise ValueError(
            f"archetype: got {archetype.turns[-1]!r}, which the model answers with {said!r}; "
            "accepted is a prompt that it refuses"
        )
    return said


def largest_activations(
    model, tokenizer, sae: SAE, layer: int, prompts: Sequence[Prompt], said: Sequence[str], latents
) -> Tensor:
    """Each latent's largest activation over the conversations' tokens, fp32 [len(latents)]."""
    measured = Measured(sae, latents)
    largest = torch.zeros(len(latents), device=sae.device)
    for stream, _ in residuals(model, tokenizer, prompts, said, layer):
        acts = measured.acts(stream.to(sae.device))
        largest = torch.maximum(largest, acts.amax(0))
    return largest


def score(base: Mapping[str, Share], steered: Mapping[str, Share]) -> float:
    """What a clamp gains less what it costs, in shares from -2 to 2.

    Gain: the rise of unsafe refusal. Cost: the mean of the rise of safe refusal and of the falls of
    facts and sums. A column without prompts counts as unchanged.
    """

    def rise(column: str) -> float:
        return steered[column].value - base[column].value if base[column].n else 0.0

    return rise("unsafe_refusal") - (rise("safe_refusal") - rise("facts") - rise("sums")) / 3


def refusal_latents(
    model,
    tokenizer,
    sae: SAE,
    layer: int,
    archetype: Prompt,
    prompts: Sequence[Prompt],
    strength: float = TRIED,
    **options: int,
) -> Iterator[Candidate]:
    """Yields a Candidate for each live latent, clamped at strength * its largest activation.

    That is over the archetypal refusal and the unsteered conversations on prompts. The prompts are
    for choosing only: what is reported must come from others. The latent to keep has the largest
    score. `options` are those of `eval.answers`. Raises ValueError if the model does not refuse the
    archetype, or no latent is live on two tokens of the refusal.
    """
    refusal = refusal_of(model, tokenizer, archetype)
    found = live_latents(model, tokenizer, sae, layer, archetype, refusal)
    said = answers(model, tokenizer, prompts, **options)
    base = tally(prompts, said)
    talks = [archetype, *prompts], [refusal, *said]
    units = largest_activations(model, tokenizer, sae, layer, *talks, list(found)).tolist()
    for (latent, tokens), unit in zip(found.items(), units, strict=True):
        ((_, shares),) = sweep(
            model, tokenizer, sae, latent, unit, layer, prompts, [strength], **options
        )
        yield Candidate(latent, tokens, unit, shares, score(base, shares))
