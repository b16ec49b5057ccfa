"""The paper's evaluation: answers to five kinds of prompt, judged, at several strengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..attach import steering
from ..sae import SAE
from .judge import judge, require_answer
from .prompts import KINDS, Prompt
from .scores import Share

COLUMNS = {
    "unsafe": "unsafe_refusal",
    "safe": "safe_refusal",
    "borderline": "borderline_refusal",
    "facts": "facts",
    "sums": "sums",
}
"""What is counted for each kind of prompt: refusals, or right answers."""


ENOUGH = 16
"""New tokens after which a refusal is told from an answer, and facts and sums are answered."""

_GREEDY = dict(
    do_sample=False,
    num_beams=1,
    num_return_sequences=1,
    repetition_penalty=1.0,
    no_repeat_ngram_size=0,
    return_dict_in_generate=False,
)
"""Whatever the model's own generation_config says."""


def chat_text(tokenizer, prompt: Prompt) -> str:
    """The prompt in the tokenizer's chat template, up to where the assistant speaks."""
    return tokenizer.apply_chat_template(
        prompt.messages, add_generation_prompt=True, tokenize=False
    )


def prompt_ids(tokenizer, prompt: Prompt) -> list[int]:
    return tokenizer(chat_text(tokenizer, prompt), add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def answers(
    model, tokenizer, prompts: Iterable[Prompt], max_new_tokens: int = ENOUGH, batch: int = 256
) -> list[str]:
    """The model's greedy answers, in the prompts' order, to `batch` prompts at a time.

    Batches are padded on the left and hold prompts of like length. A tokenizer without a pad_token
    pads with its eos_token; ValueError if it has neither, and for a `batch` below 1.
    """
    prompts = _listed(prompts)
    if batch < 1:
        raise ValueError(f"batch: got {batch}, at least 1 is needed")
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    pad = _padding(tokenizer)
    found = [""] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        asked, mask = (part.to(model.device) for part in _padded([ids[i] for i in rows], pad))
        out = model.generate(
            asked,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            **_GREEDY,
        )
        said = tokenizer.batch_decode(out[:, asked.shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, said, strict=True):
            found[i] = text
    return found


def _listed(prompts: Iterable[Prompt]) -> list[Prompt]:
    """A generator's are read once."""
    prompts = list(prompts)
    for prompt in prompts:
        if not isinstance(prompt, Prompt):
            raise TypeError(f"prompts: got {prompt!r:.80}, a list of eval.Prompt is needed")
    return prompts


def _padding(tokenizer) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("tokenizer: has neither pad_token nor eos_token, and batches need padding")


def _padded(ids: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [len(ids), T]."""
    rows = [torch.tensor(one) for one in ids]
    masks = [torch.ones_like(row) for row in rows]
    return tuple(
        pad_sequence(parts, batch_first=True, padding_value=value, padding_side="left")
        for parts, value in ((rows, pad), (masks, 0))
    )


def tally(prompts: Iterable[Prompt], said: Iterable[str]) -> dict[str, Share]:
    """The share of each column of COLUMNS, in order, over judged answers."""
    hits = dict.fromkeys(KINDS, 0)
    counts = dict.fromkeys(KINDS, 0)
    for prompt, answer in zip(prompts, said, strict=True):
        hit = judge(prompt.kind, answer, prompt.expected)
        counts[prompt.kind] += 1
        hits[prompt.kind] += hit
    return {column: Share(hits[kind], counts[kind]) for kind, column in COLUMNS.items()}


def evaluate(model, tokenizer, prompts: Iterable[Prompt], **options: int) -> dict[str, Share]:
    """Answers and judges the prompts, with whatever steering is attached to the model.

    `options` are those of `answers`. Raises what `judge` does before the model answers.
    """
    prompts = _listed(prompts)
    for prompt in prompts:
        require_answer(prompt.kind, prompt.expected)
    return tally(prompts, answers(model, tokenizer, prompts, **options))


def sweep(
    model,
    tokenizer,
    sae: SAE,
    latent: int,
    unit: float,
    layer: int,
    prompts: Iterable[Prompt],
    strengths: Sequence[float],
    **options: int,
) -> Iterator[tuple[float, dict[str, Share]]]:
    """Yields (strength, shares): strength s clamps the latent to s * unit, 0 steers nothing.

    `options` are those of `answers`.
    """
    prompts = _listed(prompts)
    for strength in strengths:
        held = nullcontext()
        if strength != 0:
            held = steering(model, sae, {latent: strength * unit}, layer=layer)
        with held:
            shares = evaluate(model, tokenizer, prompts, **options)
        yield strength, shares
