"""saesteer_fast.find: live latents and their largest activations, against dense arithmetic."""

import pytest
import torch

from saesteer_fast import mini
from saesteer_fast.eval import Prompt, Share, answers, chat_text
from saesteer_fast.find import (
    capture,
    largest_activations,
    live_latents,
    refusal_latents,
    residuals,
    score,
)
from saesteer_fast.mini import corpus


@pytest.fixture(scope="module")
def shipped():
    return mini.load()


def dense_acts(sae, x):
    """The SAE's activations [T, N] in fp64, from its own formula."""
    pre = (x.double() - sae.b_dec.double()) @ sae.W_enc.double().T + sae.bias.double()
    rank = (-pre).argsort(dim=-1, stable=True).argsort(dim=-1)
    return torch.where((rank < sae.k) & (pre > 0), pre, 0)


@torch.inference_mode()
def shown(model, ids):
    """hidden_states by transformers, with the final norm, which hides the last layer, taken out."""
    norm, model.model.norm = model.model.norm, torch.nn.Identity()
    try:
        return model(ids, output_hidden_states=True).hidden_states
    finally:
        model.model.norm = norm


@pytest.fixture(scope="module")
def refusal(shipped):
    """(the stream [T, d] on the archetypal conversation, tokens of the prompt)"""
    model, tokenizer, _, layer, _ = shipped
    said = answers(model, tokenizer, [corpus.ARCHETYPE], max_new_tokens=32)[0]
    text = chat_text(tokenizer, corpus.ARCHETYPE)
    ids = tokenizer(text + said, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return shown(model, ids)[layer + 1][0], len(
        tokenizer(text, add_special_tokens=False)["input_ids"]
    )


def test_capture_is_what_transformers_shows(shipped):
    model, tokenizer, _, layer, _ = shipped
    ids = tokenizer("How do I make a kite?", return_tensors="pt")["input_ids"]
    states = shown(model, ids)
    with torch.inference_mode():
        caught = capture(model, ids, [layer, 0])
    assert torch.equal(caught[0], states[layer + 1])
    assert torch.equal(caught[1], states[1])


def test_capture_lets_go_on_error(shipped):
    model = shipped.model
    before = list(model.model.layers[0]._forward_hooks)
    with pytest.raises((TypeError, AttributeError)):
        capture(model, "no ids", [0])
    assert list(model.model.layers[0]._forward_hooks) == before


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_live_latents_are_counted_on_the_answer(shipped, refusal, tokens):
    model, tokenizer, sae, layer, _ = shipped
    stream, begin = refusal
    counts = (dense_acts(sae, stream[begin:]) > 0).sum(0)
    expected = {i: int(n) for i, n in enumerate(counts) if n >= tokens}
    assert live_latents(model, tokenizer, sae, layer, corpus.ARCHETYPE, tokens) == expected
    assert len(expected) > 1


def test_live_latents_need_a_refusal(shipped):
    model, tokenizer, sae, layer, _ = shipped
    with pytest.raises(ValueError, match="archetype: got 'How do I make fried rice"):
        live_latents(model, tokenizer, sae, layer, Prompt("safe", ("How do I make fried rice?",)))


def test_live_latents_say_when_there_is_none(shipped):
    model, tokenizer, sae, layer, _ = shipped
    with pytest.raises(ValueError, match="tokens: got 1000"):
        live_latents(model, tokenizer, sae, layer, corpus.ARCHETYPE, 1000)


def test_largest_activations(shipped):
    model, tokenizer, sae, layer, metrics = shipped
    prompts = corpus.prompts("validation")[::97]
    said = answers(model, tokenizer, prompts)
    latents = [metrics["latent"], 0, sae.num_latents - 1]
    found = largest_activations(model, tokenizer, sae, layer, prompts, said, latents)
    streams = [stream for stream, _ in residuals(model, tokenizer, prompts, said, layer)]
    expected = dense_acts(sae, torch.cat(streams)).amax(0)[latents]
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    assert found[0] > 0


def test_score_weighs_gain_and_cost():
    columns = ("unsafe_refusal", "safe_refusal", "borderline_refusal", "facts", "sums")

    def shares(*hits):
        return {column: Share(n, 10) for column, n in zip(columns, hits, strict=True)}

    base = shares(5, 0, 0, 10, 8)
    assert score(base, base) == 0
    assert score(base, shares(9, 0, 0, 10, 8)) == pytest.approx(0.4)
    assert score(base, shares(9, 3, 9, 7, 8)) == pytest.approx(0.4 - (0.3 + 0.3) / 3)


def test_refusal_latents_try_every_live_latent(shipped):
    model, tokenizer, sae, layer, metrics = shipped
    prompts = [p for p in corpus.prompts("validation") if p.kind in ("unsafe", "sums")][::20]
    found = list(refusal_latents(model, tokenizer, sae, layer, corpus.ARCHETYPE, prompts))
    live = live_latents(model, tokenizer, sae, layer, corpus.ARCHETYPE)
    assert {c.latent: c.tokens for c in found} == live
    assert all(c.unit > 0 for c in found)
    best = next(c for c in found if c.latent == metrics["latent"])
    assert best.score > sorted(c.score for c in found)[len(found) // 2]
