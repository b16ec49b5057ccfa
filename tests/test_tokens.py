"""What a decoder's attention_mask tells: which tokens are padding, and where prompts end."""

from __future__ import annotations

import pytest
import torch
from prompts import IDS, MASK
from torch import nn

import saesteer_fast as sf
from saesteer_fast.tokens import padding

pytestmark = pytest.mark.usefixtures("one_thread")
EDITS = {3: 6.0, 77: -2.0}
A_ROW_A_QUERY = torch.ones(6, 6, dtype=torch.bool).tril() & MASK.bool()[:, None, None]


def stream(model, ids, mask):
    return model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]


@pytest.mark.parametrize("real", [-1, 2])
def test_whatever_is_not_0_is_no_padding(model, sae, real):
    with sf.steering(model, sae, EDITS, scope=sf.positions(1, -1)):
        assert torch.equal(stream(model, IDS, MASK * real), stream(model, IDS, MASK))


def test_a_row_a_query_tells_of_padding_whatever_the_past():
    transformers = pytest.importorskip("transformers")
    wide = nn.functional.pad(A_ROW_A_QUERY, (3, 0))
    past = transformers.DynamicCache()
    for start, cache in ((0, None), (5, past), (torch.tensor(3), past)):
        mask, real = padding(wide, start, 6, cache)
        assert mask is None and torch.equal(real, MASK.bool())


def test_one_row_for_all_queries_tells_nothing():
    assert padding(MASK.bool()[:, None, None], 0, 6) == (None, None)


def test_of_several_kinds_one_that_tells_is_read():
    mask, real = padding({"sliding_attention": None, "chunked_attention": MASK}, 0, 6)
    assert torch.equal(mask, MASK) and torch.equal(real, MASK.bool())


def test_prompts_end_before_padding_on_the_right(model, sae):
    ids = torch.tensor([[5, 17, 60, 0, 0], [7, 8, 9, 5, 17]])
    mask = torch.ones(5, 5, dtype=torch.bool).tril() & (ids != 0)[:, None, None]
    plain = stream(model, ids, mask)
    with sf.steering(model, sae, EDITS, scope=sf.positions(-1)):
        changed = (stream(model, ids, mask) != plain).any(-1)
    assert changed.nonzero().tolist() == [[0, 2], [1, 4]]
