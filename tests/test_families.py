"""Every model family, tiny and of random weights: its decoder layer 1 is steered like the textbook,
in one call, in generate, and in padded batches."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES, build

import saesteer_fast as sf

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")
EDITS = {3: 9.0, 77: -8.0}
PROMPT = torch.tensor([[5, 17, 60, 2, 33, 8, 9]])
ROWS = [[5, 17, 60, 2, 33, 8, 9], [44, 9, 51]]
NEW = 6


@pytest.fixture(scope="module")
def sae(make_sae):
    return make_sae()


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return build(family)


@pytest.fixture
def textbook_hook(family, model, sae, textbook):
    """A plain hook on the module that the table names, from a column of its rows on."""

    @contextmanager
    def hooked(start=0):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            mask = (torch.arange(hidden.shape[1]) >= start).expand(hidden.shape[:2])
            steered = textbook(hidden, sae, EDITS, mask).to(hidden.dtype)
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        handle = model.get_submodule(family.layer).register_forward_hook(hook)
        yield
        handle.remove()

    return hooked


def generate(model, ids, **options):
    options = {"attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **options)[:, ids.shape[1] :]


def generate_by_hand(model, ids):
    """Greedy, without a cache and without generate."""
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, start:]


def test_a_call_is_the_textbook_hook(family, model, sae, textbook, textbook_hook):
    options = {"input_ids": PROMPT, "output_hidden_states": True}
    with torch.no_grad():
        plain = model(**options)
        with textbook_hook():
            expected = model(input_ids=PROMPT).logits
        for layer in (1, "layers.1", "blocks.1.hook_resid_post", family.layer):
            with sf.steering(model, sae, EDITS, layer=layer):
                steered = model(**options)
            torch.testing.assert_close(steered.logits, expected, atol=2e-3, rtol=1e-3)
            shown = steered.hidden_states[2].double()
            truth = textbook(plain.hidden_states[2], sae, EDITS)
            torch.testing.assert_close(shown, truth, atol=1e-3, rtol=1e-4)
            assert torch.equal(steered.hidden_states[1], plain.hidden_states[1])
        assert torch.equal(model(input_ids=PROMPT).logits, plain.logits)
    assert (expected - plain.logits).abs().max() > 0.1


@pytest.mark.parametrize("scope", ["all", "generated"])
def test_generating_is_the_textbook_hook_without_a_cache(model, sae, textbook_hook, scope):
    with textbook_hook(PROMPT.shape[1] if scope == "generated" else 0):
        expected = generate_by_hand(model, PROMPT)
    with sf.steering(model, sae, EDITS, layer=1, scope=scope):
        assert torch.equal(generate(model, PROMPT), expected)
        assert torch.equal(generate(model, PROMPT, use_cache=False), expected)


def test_rows_of_a_padded_batch_are_as_if_alone(model, sae):
    width = max(map(len, ROWS))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in ROWS])
    with sf.steering(model, sae, EDITS, layer=1):
        together = generate(model, ids, attention_mask=(ids != 0).long())
        for row, tokens in zip(together, ROWS, strict=True):
            assert torch.equal(row, generate(model, torch.tensor([tokens]))[0])


def test_beams(model, sae, textbook_hook):
    with textbook_hook():
        expected = generate(model, PROMPT, num_beams=3)
    with sf.steering(model, sae, EDITS, layer=1):
        assert torch.equal(generate(model, PROMPT, num_beams=3), expected)
