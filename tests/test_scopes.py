"""Scopes in generation: whatever the cache does, the tokens that are steered are the named ones.

The truth is a textbook hook under use_cache=False, where a call holds every column of its rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import IDS, MASK, generate
from torch import nn

import saesteer_fast as sf
from saesteer_fast.scopes import Positions

pytestmark = pytest.mark.usefixtures("one_thread")
EDITS = {3: 6.0, 77: -2.0}
COLUMNS = IDS.shape[1]


@pytest.fixture(autouse=True)
def generate_is_the_models_own(model):
    yield
    assert "generate" not in vars(model)


def real(width):
    return nn.functional.pad(MASK, (0, max(0, width - COLUMNS)), value=1).bool()[:, :width]


def positions(width):
    return real(width).long().cumsum(1) - 1


def columns(width):
    return torch.arange(width)[None]


def rows(mask, ids):
    """A mask of the prompts, for all of their rows."""
    return mask.repeat_interleave(len(ids) // len(mask), 0)


EXPLICIT = torch.rand(3, COLUMNS + 3, generator=torch.Generator().manual_seed(2)) > 0.5

# Each: a scope, and which of the first `width` columns of the ids it means.
SCOPES = {
    "all": ("all", lambda ids: columns(ids.shape[1]) >= 0),
    "prompt": ("prompt", lambda ids: columns(ids.shape[1]) < COLUMNS),
    "generated": ("generated", lambda ids: columns(ids.shape[1]) >= COLUMNS),
    "first": (sf.positions(0), lambda ids: positions(ids.shape[1]) == 0),
    "last of the prompt": (
        sf.positions(-1),
        lambda ids: columns(ids.shape[1]) == COLUMNS - 1,
    ),
    "places": (
        sf.positions(1, 7, -2),
        lambda ids: (
            (positions(ids.shape[1]) == 1)
            | (positions(ids.shape[1]) == 7)
            | (columns(ids.shape[1]) == COLUMNS - 2)
        ),
    ),
    "not tokens": (sf.not_tokens([17, 60]), lambda ids: (ids != 17) & (ids != 60)),
    "mask": (
        EXPLICIT,
        lambda ids: nn.functional.pad(EXPLICIT, (0, 30))[:, : ids.shape[1]],
    ),
    "both": (
        ["generated", sf.not_tokens([17])],
        lambda ids: (columns(ids.shape[1]) >= COLUMNS) & (ids != 17),
    ),
}
OPTIONS = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunks of 4": {"prefill_chunk_size": 4},
    "chunks of 1": {"prefill_chunk_size": 1},
    "static, chunks": {"cache_implementation": "static", "prefill_chunk_size": 4},
    "beams": {"num_beams": 3},
    "beams, static": {"num_beams": 3, "cache_implementation": "static"},
    "several answers": {"num_beams": 4, "num_return_sequences": 2},
}


@contextmanager
def textbook_hook(model, textbook, sae, meant, layer=1):
    """Steer the columns that `meant(ids)` says, in calls that hold all columns."""
    seen = {}

    def note(module, args, kwargs):
        seen["ids"] = args[0] if args else kwargs["input_ids"]

    def hook(module, args, output):
        ids = seen["ids"]
        mask = rows(meant(ids), ids) & rows(real(ids.shape[1]), ids)
        return textbook(output, sae, EDITS, mask).to(output.dtype)

    handles = [
        model.model.register_forward_pre_hook(note, with_kwargs=True),
        model.model.layers[layer].register_forward_hook(hook),
    ]
    yield
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def true_ids(model, sae, textbook):
    """What generate gives with the textbook hook; beams search differently, so by their number."""
    found = {}

    def ids(name, options):
        beams = {key: options[key] for key in options if key.startswith("num_")}
        key = name, tuple(beams.items())
        if key not in found:
            with textbook_hook(model, textbook, sae, SCOPES[name][1]):
                found[key] = generate(model, use_cache=False, **beams)
        return found[key]

    return ids


@pytest.mark.fault(56, 57, 59)
@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("how", OPTIONS)
def test_generation(model, sae, true_ids, name, how):
    options = OPTIONS[how]
    expected = true_ids(name, options)
    with sf.steering(model, sae, EDITS, scope=SCOPES[name][0]):
        assert torch.equal(generate(model, **options), expected)


def test_scopes_differ(true_ids):
    """So the test above can fail."""
    found = [true_ids(name, {}) for name in SCOPES]
    same = sum(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert same <= 3


@pytest.mark.fault(56, 57)
@pytest.mark.parametrize("name", SCOPES)
def test_the_layer_gives_exactly_that(model, sae, textbook, name):
    """Token by token, in the prompt and two steps of decoding."""
    scope, meant = SCOPES[name]

    def outputs():
        seen = []
        hook = model.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(o))
        ids = generate(model, count=3)
        hook.remove()
        return ids, seen

    with sf.steering(model, sae, EDITS, scope=scope):
        ids, steered = outputs()
    assert [len(chunk[0]) for chunk in steered] == [COLUMNS, 1, 1]
    with textbook_hook(model, textbook, sae, meant):
        seen = []
        hook = model.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(o))
        with torch.no_grad():
            width = COLUMNS + 2
            mask = real(width).long()
            places = (mask.cumsum(1) - 1).clamp(min=0)
            model(ids[:, :width], attention_mask=mask, position_ids=places, use_cache=False)
        hook.remove()
    torch.testing.assert_close(
        torch.cat(steered, 1)[real(width)], seen[0][real(width)], atol=1e-4, rtol=0
    )


@pytest.mark.fault(59)
def test_prompt_lookup(model, sae):
    """Candidates are checked several at a time, and the cache is cropped."""
    ids = torch.tensor([[5, 17, 60, 2, 5, 17, 60, 2, 5, 17]])
    for scope in ["prompt", "generated", sf.positions(11, 12, -1), sf.not_tokens([17])]:
        with sf.steering(model, sae, EDITS, scope=scope):
            expected = generate(model, ids, 10)
            assert torch.equal(generate(model, ids, 10, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("how", ["cache", "no cache", "static"])
def test_sequences_that_finish_early(model, sae, textbook, how):
    scope, meant = SCOPES["generated"]
    with textbook_hook(model, textbook, sae, meant):
        end = generate(model, use_cache=False)[0, COLUMNS + 1].item()
        ends = {"eos_token_id": end, "pad_token_id": 0}
        expected = generate(model, use_cache=False, **ends)
    assert (expected[0, COLUMNS + 2 :] == 0).all() and (expected[1:, -1] != 0).any()
    with sf.steering(model, sae, EDITS, scope=scope):
        assert torch.equal(generate(model, **ends, **OPTIONS[how]), expected)


def test_each_generate_has_its_own_prompt(model, sae):
    prompts = [IDS[1:2, :3], IDS[1:2], IDS[1:2, :1]]
    for scope in ["prompt", "generated", sf.positions(-1)]:
        alone = []
        for ids in prompts:
            with sf.steering(model, sae, EDITS, scope=scope):
                alone.append(generate(model, ids))
        with sf.steering(model, sae, EDITS, scope=scope):
            for ids, expected in zip(prompts, alone, strict=True):
                assert torch.equal(generate(model, ids), expected)
            with pytest.raises(RuntimeError):
                generate(model, prompts[0], num_beams=-1)
            assert torch.equal(generate(model, prompts[0]), alone[0])


@pytest.mark.parametrize("new_tokens_only", [False, True])
def test_a_conversation_goes_on_from_its_cache(model, sae, new_tokens_only):
    """All of what was said before is prompt, the model's own words too."""
    from transformers import DynamicCache

    turn, more = IDS[1:2], torch.tensor([[44, 45]])
    for scope in ["prompt", "generated", sf.positions(0, -1)]:
        with sf.steering(model, sae, EDITS, scope=scope):
            cache = DynamicCache(config=model.config)
            said = generate(model, turn, 4, past_key_values=cache)
        text = torch.cat([said, more], 1)
        with sf.steering(model, sae, EDITS, scope=scope):
            ids = text[:, cache.get_seq_length() :] if new_tokens_only else text
            given = {"past_key_values": cache, "attention_mask": torch.ones_like(text)}
            steered = generate(model, ids, 4, **given)
        with sf.steering(model, sae, EDITS, scope=scope):
            again = DynamicCache(config=model.config)
            generate(model, turn, 4, past_key_values=again)
        by_hand = continued(model, sae, scope, text, again, 4)
        assert torch.equal(steered[:, -4:], by_hand[:, -4:])


@pytest.mark.parametrize("scope", ["generated", "prompt", sf.positions(-1, 14)], ids=str)
def test_a_conversation_goes_on_from_a_static_cache(model, sae, scope):
    transformers = pytest.importorskip("transformers")

    def answers(cache):
        first = generate(model, IDS[1:2], 4, past_key_values=cache)
        ids = torch.cat([first, torch.tensor([[33, 2, 17]])], 1)
        return generate(model, ids, 6, past_key_values=cache)

    static = transformers.StaticCache(config=model.config, max_cache_len=32)
    with sf.steering(model, sae, EDITS, scope=scope):
        expected = answers(transformers.DynamicCache())
        assert torch.equal(answers(static), expected)
    assert not torch.equal(answers(transformers.DynamicCache()), expected)


def continued(model, sae, scope, text, cache, count):
    """Greedy decoding by hand from a cache, the prompt's length said by hand."""
    ids, width = text, text.shape[1]
    with sf.steering(model, sae, EDITS, scope=scope) as handle, handle.prompt(width):
        for _ in range(count):
            new = ids[:, cache.get_seq_length() :]
            with torch.no_grad():
                logits = model(new, past_key_values=cache).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("scope", ["prompt", "generated", sf.positions(0, -1)])
def test_embeddings_in_place_of_ids(model, sae, scope):
    ids = IDS[1:2]
    embeds = model.get_input_embeddings()(ids)
    with sf.steering(model, sae, EDITS, scope=scope):
        expected = generate(model, ids)[:, COLUMNS:]
        given = {"inputs_embeds": embeds, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(**given), expected)


def test_a_prompt_of_embeddings_asks_for_no_ids(model, sae):
    """Where another of the scopes leaves all of it out."""
    given = {"inputs_embeds": model.get_input_embeddings()(IDS[1:2]), "max_new_tokens": 6}
    with sf.steering(model, sae, EDITS, scope=["generated", sf.not_tokens([17])]):
        expected = generate(model, IDS[1:2])[:, COLUMNS:]
        assert torch.equal(model.generate(**given, do_sample=False), expected)


def test_generate_without_a_prompt_begins_with_one_token(model, sae):
    for scope in ("prompt", "generated"):
        with sf.steering(model, sae, EDITS, scope=scope):
            expected = model.generate(torch.tensor([[1]]), max_new_tokens=6, do_sample=False)
            assert torch.equal(model.generate(max_new_tokens=6, do_sample=False), expected)


def test_loops_by_hand(model, sae):
    for scope in ["prompt", "generated", sf.positions(0, -1)]:
        with sf.steering(model, sae, EDITS, scope=scope):
            expected = generate(model, IDS[1:2])
            ids, cache = IDS[1:2], None
            for _ in range(6):
                past = 0 if cache is None else cache.get_seq_length()
                with torch.no_grad():
                    output = model(ids[:, past:], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(ids, expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_loops_by_hand_that_say_their_prompt(model, sae, use_cache):
    """In chunks, and without a cache."""
    for scope in ["prompt", "generated", sf.positions(0, -1)]:
        with sf.steering(model, sae, EDITS, scope=scope) as handle:
            expected = generate(model, IDS[1:2])
            ids, cache = IDS[1:2], None
            with handle.prompt(COLUMNS), torch.no_grad():
                if use_cache:
                    cache = model(ids[:, :4], use_cache=True).past_key_values
                for _ in range(6):
                    past = 0 if cache is None else cache.get_seq_length()
                    options = {"past_key_values": cache, "use_cache": use_cache}
                    logits = model(ids[:, past:], **options).logits
                    ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(ids, expected)


def test_more_tokens_than_the_cache_holds_are_generated(model, sae):
    def called():
        cache = model(IDS[1:2, :2], use_cache=True).past_key_values
        options = {"past_key_values": cache, "output_hidden_states": True}
        return model(IDS[1:2, 2:], **options).hidden_states[2]

    plain = called()
    with sf.steering(model, sae, EDITS, scope="generated"):
        assert (called() != plain).any(-1).all()


def test_texts_that_are_scored(model, sae, textbook):
    """Rows whose prompts end at different columns, padded on the right."""
    ids = torch.tensor([[7, 8, 9, 5, 17, 60], [33, 2, 17, 5, 0, 0]])
    mask, ends = (ids != 0).long(), torch.tensor([2, 3])
    scopes = {
        "prompt": lambda place: place < ends[:, None],
        "generated": lambda place: place >= ends[:, None],
        sf.positions(-1): lambda place: place == ends[:, None] - 1,
    }

    def layer():
        seen = []
        hook = model.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(o))
        with torch.no_grad():
            model(ids, attention_mask=mask)
        hook.remove()
        return seen[0]

    x = layer()
    for scope, meant in scopes.items():
        with sf.steering(model, sae, EDITS, scope=scope) as handle, handle.prompt(ends):
            y = layer()
        steered = meant(torch.arange(6).expand(2, -1)) & mask.bool()
        torch.testing.assert_close(y.double(), textbook(x, sae, EDITS, steered), atol=1e-4, rtol=0)
        assert torch.equal(y[~steered], x[~steered])


def test_generate_inside_of_a_told_prompt(model, sae):
    with sf.steering(model, sae, EDITS, scope="generated") as handle:
        expected = generate(model)
        with handle.prompt(3):
            within = model(IDS, attention_mask=MASK).logits
            assert torch.equal(generate(model), expected)
            assert torch.equal(model(IDS, attention_mask=MASK).logits, within)


def test_a_text_is_scored_inside_of_generate(model, sae):
    def score(ids, logits):
        with handle.prompt(3), torch.no_grad():
            model(IDS[1:2])
        return logits

    with sf.steering(model, sae, EDITS, scope="generated") as handle:
        expected = generate(model)
        assert torch.equal(generate(model, logits_processor=[score]), expected)


def test_a_mask_changes_in_place(model, sae, textbook):
    mask = torch.zeros(1, 6, dtype=torch.bool)
    ids = IDS[1:2]
    with torch.no_grad(), sf.steering(model, sae, EDITS, scope=mask) as handle:
        plain = model(ids).logits
        handle.mask[0, 2] = True
        steered = model(ids).logits
        mask[0, 1] = True  # the caller's own stays its own
        assert torch.equal(model(ids).logits, steered)
        with pytest.raises(ValueError, match="scope: 1 rows are given for a batch of 3"):
            model(IDS)
    assert torch.equal(plain[:, :2], steered[:, :2])
    assert (plain[:, 2:] - steered[:, 2:]).abs().amax((0, 2)).min() > 1e-3


def test_one_mask_is_shown(model, sae):
    some = torch.ones(1, 6, dtype=torch.bool)
    with sf.steering(model, sae, EDITS, scope=[some, some]) as handle:
        with pytest.raises(ValueError, match="scope: it holds 2 masks"):
            _ = handle.mask


def test_where_all_or_none_are_in_no_mask_is_made(model, sae, monkeypatch):
    """Which keeps decoding cheap."""
    seen = []
    steer = sf.ops.steer

    def noted(x, *args, mask=None, **options):
        seen.append((x.shape[1], mask))
        return steer(x, *args, mask=mask, **options)

    with sf.steering(model, sae, EDITS, scope="generated") as generated:
        monkeypatch.setattr(sf.ops, "steer", noted)
        model.generate(IDS[1:2], max_new_tokens=3, do_sample=False)
        generated.remove()
        assert [count for count, _ in seen] == [1, 1]
        seen.clear()
    with sf.steering(model, sae, EDITS, scope="prompt"):
        model.generate(IDS[1:2], max_new_tokens=3, do_sample=False)
    assert [count for count, _ in seen] == [0, COLUMNS]


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        ("prompts", "scope: got 'prompts', accepted are 'all', .*did you mean 'prompt'"),
        (["all", "generate"], "did you mean 'generated'"),
        (["prompt", "generated"], "scope: got 'generated' and 'prompt', .* give one of the two"),
        (["generated", sf.positions(-2, -1)], "got 'generated' and Positions.*and no token is in"),
        (["generated", [sf.positions(0), ["prompt"]]], "no token is in both"),
        (None, "scope: got None, accepted are"),
        (3, "scope: got 3"),
        (torch.ones(3), r"scope: got a tensor torch.float32 \(3,\), bool \[B, S\] is needed"),
        (torch.ones(3, 0, dtype=torch.bool), "scope: got a tensor"),
        ([], r"scope: got \[\], one scope or more is needed"),
    ],
)
def test_bad_scopes_are_named(model, sae, scope, message):
    with pytest.raises(ValueError, match=message):
        sf.steering(model, sae, EDITS, scope=scope)


def test_bad_places_are_named(model, sae):
    with pytest.raises(TypeError, match=r"positions: got 1\.5, integers are needed"):
        sf.positions(1.5)
    with pytest.raises(ValueError, match=r"positions: no place is given; sf\.positions\(0\)"):
        sf.positions()
    with pytest.raises(TypeError, match=r"got \[0, -1\], .* one by one: sf\.positions\(0, -1\)"):
        sf.positions([0, -1])
    with pytest.raises(TypeError, match=r"not_tokens: got 3, a list of ids is needed"):
        sf.not_tokens(3)
    with pytest.raises(TypeError, match=r"not_tokens: got tensor\(3\), a list of ids is needed"):
        sf.not_tokens(torch.tensor(3))
    with pytest.raises(TypeError, match="not_tokens: got 'ab', a list of ids is needed"):
        sf.not_tokens("ab")
    with pytest.raises(ValueError, match="not_tokens: got -1, ids start at 0"):
        sf.not_tokens([-1])
    with pytest.raises(ValueError, match="positions: got 9223372036854775808, integers of 64"):
        sf.positions(2**63)
    with sf.steering(model, sae, EDITS) as handle:
        with pytest.raises(ValueError, match="scope: it holds 0 masks"):
            _ = handle.mask


def test_not_tokens_needs_ids(model, sae):
    with sf.steering(model, sae, EDITS, scope=sf.not_tokens([1])):
        with pytest.raises(ValueError, match="not_tokens needs input_ids, and the decoder was"):
            model(inputs_embeds=torch.ones(1, 2, 32))


def test_a_decoder_of_embeddings_alone_has_no_ids(sae):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Identity()])

        def forward(self, hidden):
            return self.layers[0](hidden)

    stack = Stack()
    with sf.steering(stack, sae, EDITS, layer=0, scope=sf.not_tokens([1])):
        with pytest.raises(ValueError, match="not_tokens needs input_ids"):
            stack(torch.ones(1, 3, 32))
    with sf.steering(stack, sae, EDITS, layer=0):
        x = torch.ones(32)
        assert torch.equal(stack(x), sf.steer(x, sae, EDITS))


class OneLayer(nn.Module):
    """A decoder whose layer is given what `stream` makes of the ids."""

    def __init__(self, layer: nn.Module, stream: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.layers, self.stream = nn.ModuleList([layer]), stream

    def forward(self, input_ids):
        return self.layers[0](self.stream(input_ids))


def test_modules_that_see_other_tokens(model, sae):
    """Their tokens have no place in a sequence."""
    with sf.steering(model, sae, EDITS, scope="prompt", layer="embed_tokens") as handle:
        model(IDS)
        handle.remove()

    flat = OneLayer(nn.Identity(), lambda ids: torch.ones(ids.numel(), 32))
    with sf.steering(flat, sae, EDITS, layer=0):
        assert flat(IDS).shape == (18, 32)
    with sf.steering(flat, sae, EDITS, layer=0, scope="prompt"):
        with pytest.raises(ValueError, match=r"scope: layers.0 gives \(18, 32\), which are not"):
            flat(IDS)
    with sf.steering(flat, sae, EDITS, layer=0, when=sf.active(3)) as handle:
        flat(IDS)
        assert handle.decisions == []


def test_modules_inside_a_layer_may_have_heads(sae):
    heads = OneLayer(nn.Sequential(nn.Identity()), lambda ids: torch.ones(*ids.shape, 2, 32))
    with sf.steering(heads, sae, EDITS, layer="layers.0.0"):
        assert torch.equal(heads(IDS), sf.steer(torch.ones(*IDS.shape, 2, 32), sae, EDITS))


def test_positions_after_padding_that_nobody_counts(sae):
    """A mask with a row a query shows padding among its queries, and none before them."""
    model, cache = Stream(), Cache(static=False)
    rows = torch.ones(3, 1, COLUMNS, COLUMNS, dtype=torch.bool).tril() & MASK.bool()[:, None, None]
    with sf.steering(model, sae, EDITS, scope=sf.positions(0), layer=0) as handle:
        with handle.prompt(COLUMNS):
            x, y = model.embed(IDS), model(IDS[:, :4], rows[:, :, :4, :4], None, cache)
            assert torch.equal((y != x[:, :4]).any(-1), positions(4).eq(0) & real(4))
            with pytest.raises(ValueError, match="nothing says how much padding stands before"):
                model(IDS[:, 4:], rows[:, :, 4:], None, cache)


class Remembers(torch.nn.Module):
    """A decoder that keeps its past in a tuple, as models did before transformers had caches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(97, 32)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(32, 32) for _ in range(2)])

    def forward(self, input_ids, past_key_values=None):
        x, past = self.embed(input_ids), past_key_values or (0.0, 0.0)
        new = []
        for layer, before in zip(self.layers, past, strict=True):
            new.append(before + x.sum(1, keepdim=True))
            x = layer(x + new[-1])
        return x, tuple(new)


class AsTransformerLens(Remembers):
    def forward(self, input_ids, past_kv_cache=None):
        return super().forward(input_ids, past_kv_cache)


@pytest.mark.fault(77)
@pytest.mark.parametrize("scope", ["prompt", "generated", sf.positions(0)], ids=str)
@pytest.mark.parametrize("decoder", [Remembers, AsTransformerLens])
def test_a_past_without_a_length_is_refused(sae, scope, decoder):
    model = decoder()
    with sf.steering(model, sae, EDITS, layer=0, scope=scope):
        _, past = model(IDS)
        with pytest.raises(ValueError, match="the cache is a tuple, which tells no length"):
            model(IDS[:, :1], past)
    with sf.steering(model, sae, EDITS, layer=0):
        steered, _ = model(IDS[:, :1], past)
    assert not torch.equal(steered, model(IDS[:, :1], past)[0])


@pytest.mark.fault(75)
def test_packed_sequences_are_refused(model, sae):
    with sf.steering(model, sae, EDITS, scope="prompt"):
        with pytest.raises(ValueError, match="several sequences are packed in a row"):
            model.model(IDS, cu_seq_lens_q=torch.tensor([0, 2, 6]))
        begins_anew = torch.tensor([[0, 1, 0, 1, 2, 3]]).expand(3, -1)
        with pytest.raises(ValueError, match="several sequences are packed in a row"):
            model(IDS, position_ids=begins_anew)
        model(IDS, position_ids=torch.arange(3, 9)[None])
        padded = {"position_ids": (MASK.cumsum(1) - 1).masked_fill(MASK == 0, 1)}
        model(IDS, attention_mask=MASK, **padded)
        inside = torch.ones(3, 1, COLUMNS, COLUMNS, dtype=torch.bool).tril()
        model(IDS, attention_mask=inside & MASK.bool()[:, None, None], **padded)
        with pytest.raises(ValueError, match="several sequences are packed in a row"):
            model(IDS, attention_mask=inside, position_ids=begins_anew)


@pytest.mark.fault(85)
def test_how_tokens_are_rotated_is_not_where_they_stand(model, sae):
    for ids in (torch.arange(5, 11)[None], torch.zeros(1, 6, dtype=torch.long)):
        given = {"position_ids": ids, "output_hidden_states": True}
        x = model(IDS, **given).hidden_states[2]
        with sf.steering(model, sae, EDITS, scope=sf.positions(0, -1)) as handle:
            with handle.prompt(COLUMNS):
                y = model(IDS, **given).hidden_states[2]
        assert ((y != x).any(-1) == torch.tensor([True, *[False] * 4, True])).all()


@pytest.mark.fault(84)
@pytest.mark.parametrize("scope", ["prompt", "generated", sf.positions(0)], ids=str)
def test_a_mask_of_more_columns_than_the_prompt(model, sae, scope):
    wide = nn.functional.pad(MASK, (0, 5), value=1)
    with sf.steering(model, sae, EDITS, scope=scope):
        with pytest.raises(ValueError, match="attention_mask: has 11 columns, but generate is giv"):
            generate(model, IDS, attention_mask=wide)


@pytest.mark.fault(58)
@pytest.mark.parametrize("scope", [sf.positions(-1), sf.positions(0, 2), sf.positions(-3, -2)])
def test_padding_on_the_right_is_no_place(model, sae, scope):
    """With a static cache the decoder is given a mask with a row a query; a chunk shows it too
    late. (After the prompt transformers itself counts places anew.)"""
    ids = torch.tensor([[5, 17, 60, 0, 0], [7, 8, 9, 5, 17]])
    mask = (ids != 0).long()
    with sf.steering(model, sae, EDITS, scope=["prompt", scope]):
        expected = generate(model, ids, attention_mask=mask)
        static = generate(model, ids, attention_mask=mask, cache_implementation="static")
        assert torch.equal(static, expected)
        with pytest.raises(ValueError, match="attention_mask: pads on the right, which a prompt"):
            generate(model, ids, attention_mask=mask, prefill_chunk_size=2)
        whole = generate(model, ids[1:])
        assert torch.equal(generate(model, ids[1:], prefill_chunk_size=2), whole)


@pytest.mark.fault(59)
def test_a_static_cache_by_hand(model, sae):
    """Its length is on the device: one token goes on, several need a word."""
    from transformers import StaticCache

    with sf.steering(model, sae, EDITS, scope="generated") as handle, torch.no_grad():
        expected = generate(model, IDS[1:2], 3)
        cache, ids = StaticCache(config=model.config, max_cache_len=16), IDS[1:2]
        for new in (ids, None, None):
            new = ids[:, -1:] if new is None else new
            logits = model(new, past_key_values=cache).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(ids, expected)
        with pytest.raises(ValueError, match="the cache keeps its length on the device"):
            model(IDS[1:2, :2], past_key_values=cache)
        with handle.prompt(COLUMNS):
            model(IDS[1:2, :2], past_key_values=cache)


@pytest.mark.fault(83)
@pytest.mark.parametrize("by", ["argument", "config", "model"])
@pytest.mark.parametrize("name", ["max_new_tokens", "max_length"])
def test_one_new_token_is_never_read(model, sae, monkeypatch, name, by):
    """Asked for one by one, tokens would come back as parts of prompts, and none be steered."""
    before = 0 if name == "max_new_tokens" else IDS.shape[1]

    def asking(new: int) -> dict:
        if by == "argument":
            return {name: before + new}
        if by == "model":
            monkeypatch.setattr(model.generation_config, name, before + new)
            return {}
        config = pytest.importorskip("transformers").GenerationConfig
        return {"generation_config": config(**{name: before + new})}

    for scope in ("generated", ["generated", sf.not_tokens([1])]):
        with sf.steering(model, sae, EDITS, scope=scope):
            with pytest.raises(ValueError, match=r"'generated' would steer nothing.* one new"):
                model.generate(IDS, **asking(1))
            assert model.generate(IDS, **asking(2)).shape[1] == IDS.shape[1] + 2
    with sf.steering(model, sae, EDITS, scope="prompt"):
        assert model.generate(IDS, **asking(1)).shape[1] == IDS.shape[1] + 1


def test_a_configuration_given_by_its_place(model, sae):
    config = pytest.importorskip("transformers").GenerationConfig
    with sf.steering(model, sae, EDITS, scope="generated"):
        with pytest.raises(ValueError, match="asked for one new token"):
            model.generate(IDS[1:2], config(max_new_tokens=1))
        with pytest.raises(ValueError, match="guidance_scale is 2"):
            model.generate(IDS[1:2], config(max_new_tokens=3, guidance_scale=2.0))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("scope", ["prompt", "generated"])
def test_a_prompt_of_one_token(sae, static, scope):
    """What comes onto an empty cache is a prompt, wherever the cache counts."""
    model, cache, ids = Stream(), Cache(static), IDS[:, 2:3]
    with sf.steering(model, sae, EDITS, layer=0, scope=scope):
        changed = [(model(ids, None, None, cache) != model.embed(ids)).any() for _ in range(3)]
    assert changed == [scope == "prompt", scope == "generated", scope == "generated"]


class Cache:
    """Counts columns as caches do, on the host or, as static ones, in a tensor in place."""

    def __init__(self, static):
        self.length = torch.tensor([0]) if static else 0

    def get_seq_length(self):
        return self.length

    def grow(self, count):
        self.length += count


class Stream(nn.Module):
    """A decoder that hands on what it embeds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(97, 32).requires_grad_(False)
        self.layers = nn.ModuleList([nn.Identity()])

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None):
        hidden = self.layers[0](self.embed(input_ids))
        past_key_values.grow(input_ids.shape[1])
        return hidden


def not_refused(scope: list) -> bool:
    names = [part for part in scope if isinstance(part, str)]
    ends = [part for part in scope if isinstance(part, Positions) and max(part.places) < 0]
    return "generated" not in names or not ("prompt" in names or ends)


@st.composite
def sequences(draw):
    """Left-padded prompts and what was generated after them, cut into calls anywhere."""
    batch, prompt, more = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 6)),
        draw(st.integers(0, 4)),
    )
    width = prompt + more
    pads = draw(st.lists(st.integers(0, prompt - 1), min_size=batch, max_size=batch))
    token = st.lists(st.integers(1, 5), min_size=width, max_size=width)
    ids = torch.tensor(draw(st.lists(token, min_size=batch, max_size=batch)))
    real = torch.arange(width) >= torch.tensor(pads)[:, None]
    cuts = draw(st.sets(st.integers(1, max(1, width - 1))))
    bounds = [0, *sorted(cut for cut in cuts if cut < width), width]
    places = st.lists(st.integers(-7, 8), min_size=1, max_size=3).map(
        lambda found: sf.positions(*found)
    )
    tokens = st.lists(st.integers(1, 5), max_size=2).map(sf.not_tokens)
    flags = st.lists(st.booleans(), min_size=batch * 7, max_size=batch * 7)
    masks = flags.map(lambda found: torch.tensor(found).view(batch, 7))
    part = st.one_of(st.sampled_from(["all", "prompt", "generated"]), places, tokens, masks)
    several = st.lists(part, min_size=1, max_size=3).filter(not_refused)
    scope = draw(st.one_of(part, several))
    return ids, real, prompt, bounds, scope, draw(st.booleans())


def meant(scope, ids, real, prompt):
    """[B, S] bool, written out."""
    width = ids.shape[1]
    column, position = torch.arange(width)[None], real.long().cumsum(1) - 1
    if isinstance(scope, list):
        return torch.stack([meant(part, ids, real, prompt) for part in scope]).all(0)
    if isinstance(scope, str):
        inside = {"all": column >= 0, "prompt": column < prompt, "generated": column >= prompt}
        return inside[scope] & real
    if isinstance(scope, torch.Tensor):
        return nn.functional.pad(scope, (0, width))[:, :width] & real
    inside = torch.zeros_like(real)
    for row in range(len(ids)):
        length = real[row, :prompt].sum()
        for place in range(width):
            if hasattr(scope, "ids"):
                inside[row, place] = ids[row, place].item() not in scope.ids
            else:
                at = position[row, place]
                inside[row, place] = at in scope.places or at - length in [
                    back for back in scope.places if back < 0 and at < length
                ]
    return inside & real


@pytest.mark.fault(56)
@given(sequences())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_scope_of_any_sequence_in_any_calls(case):
    ids, real, prompt, bounds, scope, static = case
    torch.manual_seed(0)
    model = Stream()
    weights = nn.functional.normalize(torch.randn(64, 32), dim=1)
    sae = sf.SAE(W_enc=weights, b_enc=torch.zeros(64), W_dec=weights, b_dec=torch.ones(32), k=4)
    cache, found = Cache(static), []
    with sf.steering(model, sae, {3: 5.0, 7: sf.add(1.0)}, layer=0, scope=scope) as handle:
        with handle.prompt(prompt):
            for begin, end in itertools.pairwise(bounds):
                # Where the length is on the device, only a row a query tells what is padding.
                mask = real[:, :end].long()
                if static:
                    seen = torch.arange(end) <= torch.arange(begin, end)[:, None]
                    mask = (seen & real[:, None, :end])[:, None]
                places = (real.long().cumsum(1) - 1).clamp(min=0)[:, begin:end] if static else None
                found.append(model(ids[:, begin:end], mask, places, cache))
    x, y = model.embed(ids), torch.cat(found, 1)
    inside = meant(scope, ids, real, prompt)
    expected = sf.steer(x, sae, {3: 5.0, 7: sf.add(1.0)}, mask=inside)
    if static:
        # A single token is never looked up in such a mask: padding may be steered.
        y, x, expected, inside = (each[real] for each in (y, x, expected, inside))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)
    assert torch.equal(y[~inside], x[~inside])


def test_a_prompt_that_nobody_enters_is_missed(model, sae):
    with sf.steering(model, sae, EDITS, scope="generated") as handle:
        with pytest.warns(UserWarning, match="prompt: said nothing, for no `with` entered it"):
            handle.prompt(2)
        with pytest.raises(TypeError, match=r"columns: got 2\.0, an integer or an int64 tensor"):
            handle.prompt(2.0)
