"""The miniature's model: a small Phi-3 and its training loop."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..eval import prompt_ids
from .tokenizer import CONTEXT


class ModelConfig(NamedTuple):
    """Sizes and training of the model. The head size, width / heads, must be 32 or 64."""

    width: int = 128
    layers: int = 6
    heads: int = 4
    feed_forward: int = 384
    examples: int = 96_000
    batch: int = 64
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05


def build_model(tokenizer, config: ModelConfig):
    """An untrained transformers.Phi3ForCausalLM, drawn from torch's global seed."""
    from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    model = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.feed_forward,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=CONTEXT,
            original_max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    return model


def encode_example(tokenizer, prompt, answer: str) -> tuple[list[int], int]:
    """(token ids of the prompt and its answer up to <|end|>, how many of them are the prompt)."""
    question = prompt_ids(tokenizer, prompt)
    reply = tokenizer(answer + "<|end|>", add_special_tokens=False)["input_ids"]
    return question + reply, len(question)


def train_model(model, encoded: list[tuple[list[int], int]], config: ModelConfig, seed: int = 0):
    """Trains on one pass over the examples, the loss on the answers; yields each step's loss."""
    batches = _batches(encoded, config.batch, seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / config.warmup, 0.5 + 0.5 * math.cos(math.pi * step / len(batches))
        ),
    )
    model.train()
    for batch in batches:
        ids, real = collate(batch, model.config.pad_token_id)
        scored = _answered(batch, real)[:, 1:]
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][scored]), ids[:, 1:][scored])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()
    model.eval()


def _batches(encoded, size: int, seed: int) -> list[list[tuple[list[int], int]]]:
    """Batches of like length, in random order: little padding, and still a mixture."""
    rng = random.Random(f"batches {seed}")
    shuffled = rng.sample(encoded, len(encoded))
    batches = []
    for start in range(0, len(shuffled), 32 * size):
        window = sorted(shuffled[start : start + 32 * size], key=lambda example: len(example[0]))
        mixed = [window[i : i + size] for i in range(0, len(window), size)]
        rng.shuffle(mixed)
        batches += mixed
    return batches


def collate(batch, pad: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], padded on the right, and where they are real."""
    length = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), length), pad)
    real = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, (tokens, _) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        real[row, : len(tokens)] = True
    return ids, real


def _answered(batch, real: Tensor) -> Tensor:
    """Of the real tokens, those of the answers: what the loss is on."""
    asked = torch.tensor([asked for _, asked in batch])
    return real & (torch.arange(real.shape[1]) >= asked[:, None])
