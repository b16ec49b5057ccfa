"""A Phi-3 Mini of random bf16 weights: its costs without its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

OPTIONS: dict = {}
"""Of `Phi3Config`, which is Phi-3 Mini's without any."""
BLOCK = 1 << 24
"""Random numbers that all weights are cut from: drawing 3.8 billion takes longer than measuring."""
DEVIATION = 0.02


def build(layers: int | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """A `Phi3ForCausalLM`, of all its layers unless told otherwise."""
    config = Phi3Config(**OPTIONS | ({} if layers is None else {"num_hidden_layers": layers}))
    with torch.device("meta"):
        model = Phi3ForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    random = torch.Generator().manual_seed(0)
    block = torch.empty(BLOCK, dtype=torch.bfloat16).normal_(0, DEVIATION, generator=random)
    block = block.to(device).repeat(2)
    with torch.no_grad():
        for weight in model.parameters():
            _fill(weight, block, random)
    decoder = model.model  # its buffers are no weights, and come out of meta empty
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(device)
    return model


@contextmanager
def hooked(module: nn.Module, hook: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _fill(weight: Tensor, block: Tensor, random: torch.Generator) -> None:
    """Norms with 1; all else with the block, each time from another place on."""
    if weight.ndim == 1:
        weight.fill_(1)
        return
    for piece in weight.view(-1).split(BLOCK):
        start = torch.randint(BLOCK, (), generator=random)
        piece.copy_(block[start : start + len(piece)])
