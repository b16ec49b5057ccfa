"""Steering in an engine, without the engine: tokens of many requests in one call, each steered as
its request asked, whichever way they are packed."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from families import SIZES, TOKENS
from torch import nn

import saesteer_fast as sf
from saesteer_fast.scopes import Scoped
from saesteer_fast.serve import recipes, steered
from saesteer_fast.serve.requests import Packed, Requests, Span, configuration
from saesteer_fast.serve.steered import Steered

D, SIZE, VOCABULARY = 32, 40, 20
TABLE = {"default": {}, "strong": {3: 9.0, 77: -8.0}, "other": {5: 4.0, 77: 2.0}}
STRONG = TABLE["strong"]


class LlamaDecoderLayer(nn.Module):
    """Gives the stream in two parts, as vLLM's of that name."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, hidden, residual):
        stream = hidden + residual
        return self.linear(stream), stream


class WholeLayer(nn.Module):
    """Gives it whole, with a batch of one, as those of transformers."""

    __module__ = "transformers.models.toy"

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, stream):
        return stream + self.linear(stream)


class Toy(nn.Module):
    """[T] ids to [T, d]: no token sees another, so that a call may hold any of them."""

    def __init__(self, layer=LlamaDecoderLayer):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_hidden_layers=3, hidden_size=D)
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(layer() for _ in range(3))
        self.requires_grad_(False)

    def forward(self, ids):
        hidden, residual = self.embedding(ids), torch.zeros(len(ids), D)
        if isinstance(self.layers[0], WholeLayer):
            hidden = hidden[None]
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden[0]
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return hidden + residual


@pytest.fixture(scope="module")
def sae(make_sae):
    return make_sae(d=D)


def recipe(sae, edits=STRONG, **arguments) -> sf.Recipe:
    return sf.Recipe([sf.Steering(sae, edits, **arguments)])


def expected(model, textbook, sae, ids, edits, mask) -> torch.Tensor:
    """The dense formula after layer 1, for one whole request."""
    with torch.no_grad():
        stream = model.embedding(ids)
        for place, layer in enumerate(model.layers):
            stream = stream + layer.linear(stream)
            if place == 1 and edits:
                stream = textbook(stream, sae, edits, mask).to(stream.dtype)
    return stream


INSIDE = {
    "all": lambda place, prompt, token: True,
    "prompt": lambda place, prompt, token: place < prompt,
    "generated": lambda place, prompt, token: place >= prompt,
    "positions": lambda place, prompt, token: place == 2 or place == prompt - 1,
    "not_tokens": lambda place, prompt, token: token not in (1, 2, 3),
    "both": lambda place, prompt, token: place < prompt and token not in (1, 2, 3),
}
SCOPES = {
    "positions": sf.positions(2, -1),
    "not_tokens": sf.not_tokens([1, 2, 3]),
    "both": ["prompt", sf.not_tokens([1, 2, 3])],
}


def serve(served, model, requests, seed) -> dict[str, torch.Tensor]:
    """What the model gives for each request, a few tokens of some of them at a time, in any order;
    requests that were cut begin again now and then."""
    chance = random.Random(seed)
    given = {name: [] for name in requests}
    for name, (_, prompt, asked) in requests.items():
        served.requests.begin(name, asked, prompt)
    while left := [n for n, (ids, *_) in requests.items() if sum(map(len, given[n])) < len(ids)]:
        spans, room = [], SIZE
        for name in chance.sample(left, chance.randint(1, len(left))):
            if chance.random() < 0.1:
                given[name] = []
            start = sum(map(len, given[name]))
            count = min(chance.randint(1, 9), len(requests[name][0]) - start, room)
            if count:
                spans.append(Span(name, start, count))
                room -= count
        ids = torch.cat([requests[n][0][start : start + count] for n, start, count in spans])
        padded = torch.cat([ids, torch.zeros(chance.randint(0, SIZE - len(ids)), dtype=torch.long)])
        served.pack(spans, padded)
        parts = model(padded)[: len(ids)].split([span.count for span in spans])
        for span, part in zip(spans, parts, strict=True):
            given[span.request].append(part)
    return {name: torch.cat(parts) for name, parts in given.items()}


@pytest.mark.parametrize("layer", [LlamaDecoderLayer, WholeLayer])
@pytest.mark.parametrize("scope", INSIDE)
def test_each_token_is_steered_as_its_request_asked(sae, textbook, scope, layer):
    random_ids = torch.Generator().manual_seed(1)
    requests = {
        f"request {i}": (
            torch.randint(0, VOCABULARY, (12 + i,), generator=random_ids),
            4 + i,
            [None, "strong", "other"][i % 3],
        )
        for i in range(7)
    }
    model = Toy(layer)
    served = Steered(recipe(sae, TABLE, layer=1, scope=SCOPES.get(scope, scope)), model, SIZE)
    found = serve(served, model, requests, seed=len(scope))
    for name, (ids, prompt, asked) in requests.items():
        inside = [INSIDE[scope](place, prompt, int(token)) for place, token in enumerate(ids)]
        edits = TABLE[asked or "default"]
        wanted = expected(model, textbook, sae, ids, edits, torch.tensor(inside))
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5)
        unsteered = expected(model, textbook, sae, ids, {}, None)
        changed = (found[name] - unsteered).abs().amax(1) > 1e-4
        assert not changed[~torch.tensor(inside)].any()
        assert changed.any() == (bool(edits) and any(inside))


@pytest.mark.parametrize("scope", ["all", "generated"])
def test_a_condition_is_read_token_by_token(sae, textbook, scope):
    model, ids, prompt = Toy(), torch.arange(VOCABULARY), 7
    stream = model.embedding(ids)
    for layer in model.layers[:2]:
        stream = stream + layer.linear(stream)
    live = sae.encode(stream) > 0.05
    both_sides = live[:prompt].any(0) & live[prompt:].any(0) & ~live.all(0)
    latent = int(both_sides.nonzero()[0])
    served = Steered(recipe(sae, when=sf.active({latent: 0.05}), scope=scope), model, SIZE)
    served.requests.begin("r", None, prompt)
    served.pack([Span("r", 0, VOCABULARY)], ids)
    on = live[:, latent] & (ids >= (prompt if scope == "generated" else 0))
    wanted = expected(model, textbook, sae, ids, STRONG, on)
    torch.testing.assert_close(model(ids), wanted, rtol=1e-5, atol=1e-5)


def test_steerings_of_one_layer_act_one_after_the_other(sae, make_sae, textbook):
    other, ids = make_sae(d=D, seed=1), torch.arange(VOCABULARY)
    steps = [sf.Steering(sae, STRONG, layer=1), sf.Steering(other, {9: 5.0}, layer=1)]
    model = Toy()
    Steered(sf.Recipe(steps), model, SIZE)
    stream = model.embedding(ids)
    for layer in model.layers[:2]:
        stream = stream + layer.linear(stream)
    stream = textbook(textbook(stream, sae, STRONG).float(), other, {9: 5.0}).float()
    wanted = stream + model.layers[2].linear(stream)
    torch.testing.assert_close(model(ids), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arguments", [{"error": "drop"}, {"measure": "projection"}])
def test_an_engine_steers_as_a_model_is_steered(sae, arguments):
    ids, model, served = torch.arange(VOCABULARY), Toy(WholeLayer), Toy(WholeLayer)
    plain = model(ids)
    with sf.steering(model, sae, STRONG, layer=1, **arguments):
        wanted = model(ids)
    assert (wanted - plain).abs().max() > 0.1
    Steered(recipe(sae, layer=1, **arguments), served, SIZE)
    torch.testing.assert_close(served(ids), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "Phi3", "Qwen3"])
def test_layers_of_transformers_give_the_stream_whole(sae, name):
    """Some of vLLM's are called the same, and give it in two parts."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, f"{name}ForCausalLM")
    model = kind(kind.config_class(**SIZES, **TOKENS)).eval().requires_grad_(False)
    ids = torch.arange(1, 8)
    with sf.steering(model, sae, STRONG):
        wanted = model(ids[None]).logits
    served = Steered(recipe(sae), model, SIZE)
    served.requests.begin("r", None, 7)
    served.pack([Span("r", 0, 7)], ids)
    torch.testing.assert_close(model(ids[None]).logits, wanted)


@pytest.mark.parametrize("name", ["OwnLayer", "LlamaDecoderLayer"])
def test_layers_of_a_models_own_code_give_the_stream_whole(sae, name):
    """What transformers loads with trust_remote_code lies in transformers_modules."""
    own = type(name, (WholeLayer,), {"__module__": "transformers_modules.org.name.modeling_own"})
    ids, model, served = torch.arange(VOCABULARY), Toy(WholeLayer), Toy(own)
    with sf.steering(model, sae, STRONG, layer=1):
        wanted = model(ids)
    Steered(recipe(sae, layer=1), served, SIZE)
    torch.testing.assert_close(served(ids), wanted, rtol=1e-5, atol=1e-5)


def test_every_layer_follows_the_requests(sae):
    ids, model = torch.arange(VOCABULARY), Toy()
    plain = model(ids)
    steps = [sf.Steering(sae, STRONG, layer=layer, scope="generated") for layer in (0, 2)]
    served = Steered(sf.Recipe(steps), model, SIZE)
    served.requests.begin("r", None, 7)
    served.pack([Span("r", 0, VOCABULARY)], ids)
    assert torch.equal((model(ids) - plain).abs().amax(1) > 1e-4, ids >= 7)


def test_tokens_that_nothing_is_said_of_are_steered(sae):
    ids, model = torch.arange(VOCABULARY), Toy()
    plain = model(ids)
    Steered(recipe(sae, scope="generated"), model, SIZE)
    assert ((model(ids) - plain).abs().amax(1) > 1e-4).all()


def test_compiled_whole_it_follows_what_changes_in_place(sae, textbook):
    model = Toy()
    served = Steered(recipe(sae, TABLE, scope="generated"), model, SIZE)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.arange(12)
    for asked, prompt in (("strong", 4), ("other", 4), ("strong", 9), (None, 0)):
        served.requests.begin("one", asked, prompt)
        served.pack([Span("one", 0, 12)], ids)
        mask = torch.arange(12) >= prompt
        wanted = expected(model, textbook, sae, ids, TABLE[asked or "default"], mask)
        with torch.compiler.set_stance("fail_on_recompile" if asked != "strong" else "default"):
            torch.testing.assert_close(compiled(ids), wanted, rtol=1e-5, atol=1e-5)
    served.require_run()


def test_a_model_that_passes_its_steering_by_is_noticed(sae):
    model = Toy()
    served = Steered(recipe(sae), model, SIZE)
    for layer in model.layers:
        layer._forward_hooks.clear()
    model(torch.arange(3))
    with pytest.raises(RuntimeError, match=r"layers\.1 was compiled without its steering"):
        served.require_run()


def test_digests_tell_compiled_models_apart(sae, monkeypatch):
    """By the layer, and by the op that a process with several engines has for each."""

    def digest(layer):
        return Steered(recipe(sae, layer=layer), Toy(), SIZE).digest

    def anew(layer):
        monkeypatch.setattr(steered, "_KEYS", itertools.count())
        return digest(layer)

    assert anew(0) == anew(0) != anew(1)
    assert anew(0) != digest(0)


def test_parts_of_two_shapes_are_not_summed(sae):
    """As where an engine shares a part out among processes."""
    key = Steered(recipe(sae), Toy(), SIZE).layers[0].key
    with pytest.raises(RuntimeError, match=r"gives parts of \(4, 32\) and \(1, 32\)"):
        torch.ops.saesteer_serve.steer(torch.zeros(4, D), torch.zeros(1, D), key)


def test_more_tokens_than_said_are_refused(sae):
    model = Toy()
    Steered(recipe(sae, scope="prompt"), model, SIZE)
    with pytest.raises(RuntimeError, match="41 tokens in a call, 40 at most"):
        model(torch.zeros(41, dtype=torch.long))


def test_what_cannot_be_packed_is_named(sae):
    served = Steered(recipe(sae, scope="prompt"), Toy(), SIZE)
    with pytest.raises(ValueError, match="spans: request 'one' is none of those that run"):
        served.pack([Span("one", 0, 3)], None)
    served.requests.begin("one", None, 41)
    with pytest.raises(RuntimeError, match="41 tokens in a call, 40 at most"):
        served.pack([Span("one", 0, 41)], None)


def test_what_has_ended_runs_no_more():
    requests = Requests(("default",))
    requests.begin("r", None, 2)
    for _ in range(2):
        requests.end("r")
    with pytest.raises(ValueError, match="request 'r' is none of those that run"):
        requests.tokens([Span("r", 0, 1)])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"edits": [STRONG, {}]}, r"steerings\[0\]\.edits: an engine makes its own batches"),
        ({"edits": TABLE, "rows": ["strong"]}, r"steerings\[0\]\.rows: an engine makes its own"),
        ({"scope": torch.ones(1, 4, dtype=torch.bool)}, r"scope: an engine makes its own"),
        ({"when": sf.gate({3: 1.0})}, "when: a gate reads whole prompts"),
    ],
)
def test_what_no_engine_can_serve_is_named(sae, arguments, message):
    with pytest.raises(ValueError, match=message):
        recipes.names(recipe(sae, **arguments))


def test_tables_must_have_the_same_names(sae):
    steps = [sf.Steering(sae, TABLE), sf.Steering(sae, {"default": {}, "strnog": STRONG})]
    with pytest.raises(ValueError, match=r"steerings\[1\]\.edits: .*'strnog'.*'strong'"):
        recipes.names(sf.Recipe(steps))
    steps[1] = sf.Steering(sae, dict(reversed(TABLE.items())))
    assert recipes.names(sf.Recipe(steps)) == ("default", "other", "strong")


@pytest.mark.parametrize(
    "arguments, apart, prefixes, ids",
    [
        ({}, False, (False, None), False),
        ({"scope": ["all"]}, False, (False, None), False),
        ({"scope": sf.not_tokens([1])}, True, (False, None), True),
        ({"scope": ["prompt", sf.not_tokens([1])]}, True, (False, 0), True),
        ({"scope": sf.positions(0)}, True, (False, None), False),
        ({"scope": sf.positions(-1)}, True, (False, -1), False),
        ({"scope": "generated"}, True, (False, 0), False),
        ({"edits": TABLE}, True, (True, None), False),
        ({"edits": TABLE, "scope": sf.positions(0)}, True, (True, None), False),
        ({"edits": TABLE, "scope": "prompt"}, True, (True, 0), False),
        ({"edits": TABLE, "scope": "generated"}, True, (False, 0), False),
        ({"edits": TABLE, "scope": ["generated", sf.not_tokens([1])]}, True, (False, 0), True),
        ({"edits": TABLE, "scope": sf.positions(0, -3)}, True, (True, -3), False),
        ({"edits": TABLE, "scope": ["prompt", sf.positions(-3, -1)]}, True, (False, -3), False),
    ],
)
def test_what_an_engine_must_know(sae, arguments, apart, prefixes, ids):
    given = recipe(sae, **arguments)
    assert recipes.reads_ids(given) is ids
    assert recipes.tells_tokens_apart(given) is apart
    assert recipes.prefixes(given) == prefixes
    assert recipes.prefixes(given).shared is (prefixes == (False, None))


def test_any_steering_may_read_ids(sae):
    steps = [sf.Steering(sae, STRONG, scope=scope) for scope in ("all", sf.not_tokens([1]))]
    assert recipes.reads_ids(sf.Recipe(steps))


@pytest.mark.parametrize(
    ("arguments", "late"),
    [
        ({}, set()),
        ({"scope": "generated"}, {"default", "strong"}),
        ({"scope": ["generated", sf.not_tokens([1])], "edits": TABLE}, {"strong"}),
        ({"scope": "prompt", "edits": TABLE}, set()),
    ],
)
def test_which_configurations_one_token_cannot_show(sae, arguments, late):
    given = recipe(sae, **arguments)
    assert {name for name in ("default", "strong") if recipes.begins_late(given, name)} == late


def test_prefixes_of_several_steerings(sae):
    late = sf.Steering(sae, TABLE, scope="generated")
    early = sf.Steering(sae, STRONG, scope=sf.positions(0, -2))
    assert recipes.prefixes(sf.Recipe([late, early])) == (False, -2)
    assert recipes.prefixes(sf.Recipe([late, sf.Steering(sae, TABLE)])) == (True, 0)


@pytest.mark.parametrize("scope", [*INSIDE, "the last", "late"])
def test_what_is_told_alike_is_steered_alike(sae, scope):
    """Of the same tokens that begin two requests, up to any of them."""
    given = {"the last": sf.positions(-3, -1), "late": ["generated", sf.not_tokens([1, 2])]}
    given = given | SCOPES
    made = recipe(sae, TABLE, scope=given.get(scope, scope))
    ids = torch.randint(0, VOCABULARY, (12,), generator=torch.Generator().manual_seed(1))
    inside = Scoped(made.steerings[0].scope)
    requests = [*itertools.product(range(len(TABLE)), range(1, 12))]
    shared = 0
    for (one, first), (other, second) in itertools.combinations(requests, 2):
        told = [*zip(told_apart(made, one, first), told_apart(made, other, second), strict=True)]
        same = next((place for place, (a, b) in enumerate(told) if a != b), len(ids))
        masks = [steered_tokens(inside, ids, prompt)[:same] for prompt in (first, second)]
        assert torch.equal(*masks)
        assert one == other or not masks[0].any()
        shared += same
    assert shared


def told_apart(made, configuration, prompt) -> list[object]:
    """By what each token's block would be, if it held one token."""
    told = [None] * 12
    for start, key in recipes.prefixes(made).keys(configuration, prompt):
        told[start:] = [key] * (12 - start)
    return told


def steered_tokens(inside, ids, prompt) -> torch.Tensor:
    packed = Packed(torch.arange(12)[None], torch.full((1, 12), prompt), ids[None])
    found = inside(packed)
    return torch.ones(12, dtype=torch.bool) if found is True else found[0]


def test_names_are_chosen_or_refused():
    names = ("default", "strong")
    assert [configuration(names, asked) for asked in (None, "default", "strong")] == [0, 0, 1]
    assert configuration((), None) == 0
    with pytest.raises(ValueError, match=r"no configuration 'strnog'.*did you mean 'strong'\?"):
        configuration(names, "strnog")
    with pytest.raises(ValueError, match=r"no configuration is named; accepted are \['strong'\]"):
        configuration(("strong",), None)
    with pytest.raises(ValueError, match="all requests are steered in one way"):
        configuration((), "strong")
    with pytest.raises(ValueError, match=r"no configuration \['strong'\]"):
        configuration(names, ["strong"])
    with pytest.raises(ValueError, match="no configuration ''"):
        configuration(names, "")


def test_what_the_first_call_would_refuse_is_refused_before(sae, make_sae):
    with pytest.raises(ValueError, match=r"steerings\[0\]\.impl: 'cuda' cannot run .* on cpu"):
        Steered(recipe(sae, impl="cuda"), Toy(), SIZE)
    still = make_sae(d=D)
    still.W_dec[3] = 0
    with pytest.raises(ValueError, match=r"steerings\[0\]\.edits: latent 3 has the direction 0"):
        Steered(recipe(still), Toy(), SIZE)


def test_layers_that_are_not_known_are_refused(sae):
    class StrangeLayer(LlamaDecoderLayer):
        pass

    with pytest.raises(ValueError, match="not known how StrangeLayer gives its stream"):
        Steered(recipe(sae), Toy(StrangeLayer), SIZE)
    with pytest.raises(ValueError, match=r"layers\.1\.linear is no decoder layer"):
        Steered(recipe(sae, layer="layers.1.linear"), Toy(), SIZE)
    model = Toy()
    good = sf.Steering(sae, STRONG, layer=0)
    with pytest.raises(ValueError, match=r"steerings\[1\]\.layer: got 7"):
        Steered(sf.Recipe([good, sf.Steering(sae, STRONG, layer=7)]), model, SIZE)
    assert not model.layers[0]._forward_hooks


def test_the_op_is_as_pytorch_asks(sae):
    served = Steered(recipe(sae), Toy(), SIZE)
    stream = torch.randn(2, 5, D)
    op = torch.ops.saesteer_serve.steer.default
    for residual in (None, stream[1]):
        torch.library.opcheck(op, (stream[0], residual, served.layers[0].key))
