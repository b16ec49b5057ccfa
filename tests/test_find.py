"""saesteer_fast.find: live latents and their largest activations, against dense arithmetic."""

from copy import deepcopy

import pytest
import torch
from families import FAMILIES, build
from test_measures import CASES, dense, make
from tokenizers.processors import TemplateProcessing

import saesteer_fast as sf
from saesteer_fast import mini
from saesteer_fast.eval import Prompt, Share, answers, chat_text, evaluate, prompt_ids, tally
from saesteer_fast.find import (
    capture,
    largest_activations,
    live_latents,
    refusal_latents,
    refusal_of,
    residuals,
    score,
)
from saesteer_fast.mini import corpus


@pytest.fixture(scope="module")
def shipped():
    return mini.load()


@torch.inference_mode()
def shown(model, ids):
    """hidden_states by transformers, with the final norm, which hides the last layer, taken out."""
    norm, model.model.norm = model.model.norm, torch.nn.Identity()
    try:
        return model(ids, output_hidden_states=True).hidden_states
    finally:
        model.model.norm = norm


def streams(model, ids):
    """The residual stream after each layer: what the next layer, or the final norm, is given."""
    caught = []
    after = [*model.model.layers[1:], model.model.norm]
    handles = [m.register_forward_pre_hook(lambda _, given: caught.append(given[0])) for m in after]
    with torch.inference_mode():
        model(ids)
    for handle in handles:
        handle.remove()
    return caught


@pytest.fixture(scope="module")
def refusal(shipped):
    """(what the model says, the stream [T, d] of the conversation, tokens of the prompt)"""
    model, tokenizer, _, layer, _ = shipped
    said = refusal_of(model, tokenizer, corpus.ARCHETYPE)
    text = chat_text(tokenizer, corpus.ARCHETYPE)
    ids = tokenizer(text + said, add_special_tokens=False, return_tensors="pt")["input_ids"]
    begin = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return said, streams(model, ids)[layer][0], begin


def test_capture_is_what_the_next_layer_reads(shipped):
    model, tokenizer, *_ = shipped
    ids = tokenizer("How do I make a kite?", return_tensors="pt")["input_ids"]
    expected = streams(model, ids)
    with torch.inference_mode():
        caught = capture(model, ids, [5, 0, 2])
    assert all(torch.equal(x, expected[i]) for x, i in zip(caught, [5, 0, 2], strict=True))
    assert capture(model, ids, []) == []


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_capture_in_every_family(family):
    model, ids = build(family), torch.tensor([[5, 17, 60, 2, 33]])
    with torch.inference_mode():
        shown = model(input_ids=ids, output_hidden_states=True).hidden_states
        caught = capture(model, ids, [1, family.layer, 0])
    for stream, number in zip(caught, (2, 2, 1), strict=True):
        assert torch.equal(stream, shown[number])


def test_capture_refuses_what_has_no_such_layer(shipped):
    with pytest.raises(ValueError, match="layer: got 6, accepted are 0 to 5"):
        capture(shipped.model, torch.ones(1, 1), [0, 6])
    with pytest.raises(ValueError, match="layer: Linear has no list of layers; name a module"):
        capture(torch.nn.Linear(2, 2), torch.ones(1, 1), [0])


def test_capture_lets_go_on_error(shipped):
    layer = shipped.model.model.layers[0]
    before = list(layer._forward_hooks)
    with pytest.raises((TypeError, AttributeError)):
        capture(shipped.model, "no ids", [0])
    assert list(layer._forward_hooks) == before


def test_the_chat_template_alone_begins_a_conversation(shipped, refusal):
    """A tokenizer as Llama's begins every text with a token that its chat template has, too."""
    model, tokenizer, _, layer, _ = shipped
    said, expected, begin = refusal
    begins, token = deepcopy(tokenizer), tokenizer.eos_token
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.eos_token_id)]
    )
    assert begins("a")["input_ids"] == [tokenizer.eos_token_id, *tokenizer("a")["input_ids"]]
    assert prompt_ids(begins, corpus.ARCHETYPE) == prompt_ids(tokenizer, corpus.ARCHETYPE)
    found = list(residuals(model, begins, [corpus.ARCHETYPE], [said], layer))
    assert [number for _, number in found] == [begin]
    assert torch.equal(found[0][0], expected) and not found[0][0].requires_grad


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_live_latents_are_counted_on_the_answer(shipped, refusal, tokens):
    model, tokenizer, sae, layer, _ = shipped
    said, stream, begin = refusal
    counts = (dense(sae, stream[begin:]) > 0).sum(0)
    expected = {i: int(n) for i, n in enumerate(counts) if n >= tokens}
    assert live_latents(model, tokenizer, sae, layer, corpus.ARCHETYPE, said, tokens) == expected
    assert len(expected) > 1


@pytest.mark.parametrize(("measure", "settings"), CASES)
def test_every_kind_of_sae(shipped, refusal, measure, settings):
    """Latents of random weights: which live, on how many tokens, and how strongly."""
    model, tokenizer, _, layer, _ = shipped
    said, stream, begin = refusal
    sae = make(measure, N=300, d=stream.shape[-1], **settings)
    acts = dense(sae, stream)
    counts = (acts[begin:] > 0).sum(0)
    often = max(2, int(counts.median()) + 1)
    found = live_latents(model, tokenizer, sae, layer, corpus.ARCHETYPE, said, often)
    assert found == {i: int(n) for i, n in enumerate(counts) if n >= often}
    assert 1 < len(found) < 200
    talk = model, tokenizer, sae, layer, [corpus.ARCHETYPE], [said]
    largest = largest_activations(*talk, list(found))
    # fp32 sums of 128 terms about as large as the largest activation.
    close = {"atol": 128 * 2.0**-24 * acts.max().item(), "rtol": 1e-5}
    torch.testing.assert_close(largest.double(), acts.amax(0)[list(found)], **close)


def test_an_archetype_is_refused(shipped):
    model, tokenizer, sae, layer, _ = shipped
    rice = Prompt("safe", ("How do I make fried rice?",))
    with pytest.raises(ValueError, match="archetype: got 'How do I make fried rice"):
        next(refusal_latents(model, tokenizer, sae, layer, rice, []))


def test_live_latents_say_when_there_is_none(shipped, refusal):
    model, tokenizer, sae, layer, _ = shipped
    with pytest.raises(ValueError, match="tokens: got 1000"):
        live_latents(model, tokenizer, sae, layer, corpus.ARCHETYPE, refusal[0], 1000)


def test_largest_activations(shipped):
    model, tokenizer, sae, layer, metrics = shipped
    prompts = corpus.prompts("validation")[::97]
    said = answers(model, tokenizer, prompts)
    latents = [metrics["latent"], 0, sae.num_latents - 1]
    found = largest_activations(model, tokenizer, sae, layer, prompts, said, latents)
    streams = [stream for stream, _ in residuals(model, tokenizer, prompts, said, layer)]
    expected = dense(sae, torch.cat(streams)).amax(0)[latents]
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
    unasked = {"facts": Share(0, 0)}
    assert score(base | unasked, shares(9, 3, 9, 7, 8) | unasked) == pytest.approx(0.4 - 0.3 / 3)


def test_refusal_latents_try_every_live_latent(shipped, refusal, monkeypatch):
    model, tokenizer, sae, layer, metrics = shipped
    live = live_latents(model, tokenizer, sae, layer, corpus.ARCHETYPE, refusal[0])
    some = {latent: live[latent] for latent in [metrics["latent"], *list(live)[::30]]}
    monkeypatch.setattr("saesteer_fast.find.live_latents", lambda *_: some)
    prompts = [p for p in corpus.prompts("validation") if p.kind in ("unsafe", "sums")][::7]
    found = list(refusal_latents(model, tokenizer, sae, layer, corpus.ARCHETYPE, prompts))
    assert {c.latent: c.tokens for c in found} == some
    assert all(c.unit > 0 for c in found)
    assert max(found, key=lambda c: c.score).latent == metrics["latent"]


def test_a_strength_is_in_units_of_all_conversations(shipped, refusal, monkeypatch):
    model, tokenizer, sae, layer, _ = shipped
    prompts = [p for p in corpus.prompts("validation") if p.kind in ("unsafe", "sums")][::92]
    said = answers(model, tokenizer, prompts, max_new_tokens=5)
    talks = residuals(model, tokenizer, prompts, said, layer)
    asked = dense(sae, refusal[1]).amax(0)
    others = dense(sae, torch.cat([stream for stream, _ in talks])).amax(0)
    # Of the refusal's largest activations, and of the others'.
    some = [int((asked - others).argmax()), int((others - asked).argmax())]
    monkeypatch.setattr("saesteer_fast.find.live_latents", lambda *_: dict.fromkeys(some, 2))
    talk = model, tokenizer, sae, layer, corpus.ARCHETYPE, prompts
    found = list(refusal_latents(*talk, 1.5, max_new_tokens=5))
    assert [c.latent for c in found] == some
    for c in found:
        assert c.unit == pytest.approx(max(asked[c.latent], others[c.latent]).item(), rel=1e-4)
        with sf.steering(model, sae, {c.latent: 1.5 * c.unit}, layer=layer):
            steered = evaluate(model, tokenizer, prompts, max_new_tokens=5)
        assert c.shares == steered and c.score == score(tally(prompts, said), steered)
