"""Three prompts of different lengths, padded on the left, and what a model says to them."""

from __future__ import annotations

import torch

IDS = torch.tensor([[0, 0, 0, 5, 17, 60], [7, 8, 9, 5, 17, 60], [0, 33, 2, 17, 5, 90]])
MASK = (IDS != 0).long()


def generate(model, ids=IDS, count=6, attention_mask=None, **options):
    """Greedy: the prompts, and `count` tokens more."""
    mask = (ids != 0).long() if attention_mask is None else attention_mask
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, **options
    )
