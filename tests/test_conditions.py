"""Conditions: steering that the SAE's own activations switch on, and why they did."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from prompts import IDS, MASK, generate
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import saesteer_fast as sf
from saesteer_fast.conditions import Cause, Decision

pytestmark = pytest.mark.usefixtures("one_thread")
EDITS = {3: 6.0, 77: -2.0}


def layer_output(model, *args, **options):
    seen = []
    hook = model.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(o))
    with torch.no_grad():
        model(*args, **options)
    hook.remove()
    return seen[0]


@pytest.fixture(scope="module")
def acts(model, sae):
    """The SAE's activations of the prompts, [3, 6, N] fp64, padding at 0."""
    x = layer_output(model, IDS, attention_mask=MASK).double()
    p = (x - sae.b_dec.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    top = p.relu().topk(sae.k, dim=-1)
    dense = torch.zeros_like(p).scatter(-1, top.indices, top.values)
    return dense * MASK[..., None]


@pytest.fixture(scope="module")
def telling(acts):
    """Three latents, each of which is live on some rows' prompts only."""
    live = (acts.amax(1) > 0.3).sum(0)
    return torch.nonzero((live > 0) & (live < 3)).flatten().tolist()[:3]


def test_a_latent_per_token(sae):
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    acts = sae.encode(x)
    often = (acts > 0).sum(0).argsort(descending=True)[:2].tolist()
    middle = acts[:, often[0]][acts[:, often[0]] > 0].median().item()
    for limits in [{often[0]: 0.0}, {often[0]: middle}, {often[0]: 0.1, often[1]: 0.0}]:
        on = torch.stack([acts[:, f] > limit for f, limit in limits.items()]).all(0)
        assert 0 < on.sum() < 40
        for edits in (EDITS, {3: sf.scale(2.0)}, {often[0]: 0.0}, {3: sf.add(1.0)}):
            y = sf.steer(x, sae, edits, when=sf.active(limits))
            assert torch.equal(y, sf.steer(x, sae, edits, mask=on))
    assert sf.active(5, above=1.0) == sf.active({5: 1.0})


def test_a_latent_per_token_with_a_mask_and_rows(sae):
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) > 0.5
    on = mask & (sae.encode(x)[..., 5] > 0)
    y = sf.steer(x, sae, [EDITS, {}], mask=mask, when=sf.active(5))
    assert torch.equal(y, sf.steer(x, sae, [EDITS, {}], mask=on))


@pytest.mark.parametrize("scope", ["all", "generated", sf.positions(-1, 6)])
def test_a_latent_per_token_in_a_model(model, sae, textbook, telling, scope):
    """Cached or not, and against a hook that reads the SAE itself."""
    latent = telling[0]
    with sf.steering(model, sae, EDITS, when=sf.active(latent), scope=scope) as handle:
        cached = generate(model)
        assert torch.equal(generate(model, use_cache=False), cached)
        assert torch.equal(generate(model, cache_implementation="static"), cached)
        if scope == "all":
            y = layer_output(model, IDS, attention_mask=MASK)
            told = handle.decisions
    if scope == "all":
        x = layer_output(model, IDS, attention_mask=MASK)
        on = (sae.encode(x)[..., latent] > 0) & MASK.bool()
        torch.testing.assert_close(y.double(), textbook(x, sae, EDITS, on), atol=1e-4, rtol=0)
        assert torch.equal(y[~on], x[~on])
        assert [row.on for row in told] == on.any(1).tolist()
        assert {row.by for row in told} == {"active"}


@pytest.mark.parametrize("pool", ["max", "mean", "last"])
def test_a_logistic_gate_is_what_it_says(model, sae, acts, telling, pool):
    weights, bias = dict(zip(telling, (1.5, -0.7, 2.0), strict=False)), -0.4
    lengths = MASK.sum(1, keepdim=True)
    pooled = {"max": acts.amax(1), "mean": acts.sum(1) / lengths, "last": acts[:, -1]}[pool]
    scores = sum(weight * pooled[:, f] for f, weight in weights.items()) + bias
    # A threshold between two of the rows, so that some are let through.
    middle = scores.sort().values[:2].mean().item() if scores.std() > 0 else 0.0
    threshold = 1 / (1 + math.exp(-middle))
    when = sf.gate(weights, bias, threshold=threshold, pool=pool)
    with sf.steering(model, sae, EDITS, when=when) as handle:
        gated = generate(model)
        decisions = handle.decisions
    assert [decision.on for decision in decisions] == (scores > middle).tolist()
    assert [decision.score for decision in decisions] == pytest.approx(scores.tolist(), abs=1e-4)
    with sf.steering(model, sae, EDITS):
        steered = generate(model)
    plain = generate(model)
    for row, decision in enumerate(decisions):
        assert torch.equal(gated[row], (steered if decision.on else plain)[row])
    assert {True} < {d.on for d in decisions} or pool == "last"


@pytest.fixture
def gate(acts, telling):
    """Lets through exactly the rows whose prompt has the first telling latent."""
    limit = acts[..., telling[0]].amax(1).clamp(max=0.3).max().item() / 2
    return sf.gate({telling[0]: 1.0}, -limit)


@pytest.fixture
def expected(model, sae, acts, gate, telling):
    """Of a gate with scope "all": rows let through as steered, others as not."""
    on = acts[..., telling[0]].amax(1) > 0.15

    def ids(scope="all", **options):
        with sf.steering(model, sae, EDITS, scope=scope):
            steered = generate(model, **options)
        plain = generate(model, **options)
        each = len(plain) // len(on)
        return torch.where(on.repeat_interleave(each)[:, None], steered, plain)

    assert on.any() and not on.all()
    return ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
    ],
)
@pytest.mark.parametrize("scope", ["all", "prompt", "generated"])
def test_a_gate_is_held_for_the_whole_generation(model, sae, gate, expected, scope, options):
    with sf.steering(model, sae, EDITS, when=gate, scope=scope):
        ids = generate(model, **options)
    assert torch.equal(ids, expected(scope, **options))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_a_gate_waits_for_the_last_chunk(model, sae, gate, expected, options):
    whole = expected()
    for size in (1, 4, 6):
        with sf.steering(model, sae, EDITS, when=gate, scope="generated"):
            ids = generate(model, prefill_chunk_size=size, **options)
        assert torch.equal(ids, expected("generated"))
    with sf.steering(model, sae, EDITS, when=gate):
        with pytest.raises(RuntimeError, match="the prompt comes in chunks, and the gate"):
            generate(model, prefill_chunk_size=4, **options)
        assert torch.equal(generate(model), whole)


def test_a_gate_waits_for_the_last_chunk_by_hand(model, sae, acts):
    early, whole = (acts[1, :width].amax(0) for width in (4, 6))
    latent = int((whole - early).argmax())
    when = sf.gate({latent: 1.0}, -float(early[latent] + whole[latent]) / 2)
    with sf.steering(model, sae, EDITS, scope="generated", when=when) as handle, torch.no_grad():
        with handle.prompt(6):
            cache = model(IDS[1:2, :4], use_cache=True).past_key_values
            assert handle.decisions == []
            model(IDS[1:2, 4:], past_key_values=cache)
        assert [decision.on for decision in handle.decisions] == [True]


def test_every_prompt_has_its_own_decision(model, sae, gate, expected):
    whole = expected()
    with sf.steering(model, sae, EDITS, when=gate) as handle:
        for rows in ([0, 1, 2], [2], [1, 0], [0, 1, 2]):
            ids = IDS[rows]
            assert torch.equal(generate(model, ids), whole[rows])
            assert len(handle.decisions) == len(rows)


def test_a_gate_decides_once_and_keeps_no_graph(model, sae):
    asked = []
    when = sf.gate(lambda prompt: asked.append(prompt) or prompt.real.any(1), latents=[5])
    with sf.steering(model, sae, EDITS, when=when):
        model(IDS, attention_mask=MASK)
        assert not asked.pop().acts.requires_grad
        generate(model, use_cache=False)
    assert len(asked) == 1


def test_a_gate_forgets_what_came_before_generate(model, sae, gate):
    def went_on(cache):
        generate(model, IDS[1:2])
        with pytest.raises(RuntimeError, match="the gate has seen no prompt"):
            model(IDS[:, -1:], past_key_values=cache)

    with sf.steering(model, sae, EDITS, when=gate) as handle, torch.no_grad():
        went_on(model(IDS, attention_mask=MASK).past_key_values)
        with handle.prompt(6):
            went_on(model(IDS, attention_mask=MASK).past_key_values)


class Called(TorchDispatchMode):
    """Which ops are called, by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_the_decode_path_measures_nothing(model, sae, gate):
    """After the prompt, only edits do, and nothing more is read by the host."""

    def called():
        names, mask, cache = [], MASK, None
        for ids in (IDS, IDS[:, -1:]):
            with Called() as seen, torch.no_grad():
                cache = model(ids, attention_mask=mask, past_key_values=cache).past_key_values
            mask = torch.cat([mask, mask[:, -1:]], 1)
            names.append(seen.names)
        return names

    plain = called()
    with sf.steering(model, sae, EDITS, when=gate):
        for name in ("saesteer::feature_acts", "aten::_local_scalar_dense"):
            more = [a[name] - b[name] for a, b in zip(called(), plain, strict=True)]
            assert more == [1 if "acts" in name else 0, 0]


def test_loops_by_hand(model, sae, gate, expected):
    whole = expected()
    with sf.steering(model, sae, EDITS, when=gate), torch.no_grad():
        ids, mask, cache = IDS, MASK, None
        for _ in range(6):
            past = 0 if cache is None else cache.get_seq_length()
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
            output = model(
                ids[:, past:],
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
            mask = nn.functional.pad(mask, (0, 1), value=1)
        assert torch.equal(ids, whole)
        with pytest.raises(RuntimeError, match="gate was decided for 3 rows, now there are 1"):
            cache.batch_select_indices(torch.tensor([0]))
            model(ids[:1, -1:], past_key_values=cache)
    with sf.steering(model, sae, EDITS, when=gate), torch.no_grad():
        with pytest.raises(RuntimeError, match="the gate has seen no prompt"):
            model(ids[:1, -1:], past_key_values=cache)


def test_texts_that_are_scored(model, sae, acts):
    """Only the prompt decides: what follows in the same call is not looked at."""
    ends, live = torch.tensor([4, 4, 4]), acts > 0.15
    on, later = live[:, :4].any(1), live.any(1)
    latent = int(((on != later).any(0) & (on[0] != on[1])).nonzero()[0])
    on = on[:, latent]
    with sf.steering(model, sae, EDITS, when=sf.gate({latent: 1.0}, -0.15)) as handle:
        with handle.prompt(ends):
            layer_output(model, IDS, attention_mask=MASK)
            assert [decision.on for decision in handle.decisions] == on.tolist()
            layer_output(model, IDS[[1, 0, 2]], attention_mask=MASK[[1, 0, 2]])
            swapped = [decision.on for decision in handle.decisions]
    assert swapped == on[[1, 0, 2]].tolist()


def test_a_callable_decides(model, sae, acts, telling):
    seen = []

    def decide(prompt):
        seen.append(prompt)
        return (prompt.ids == 33).any(1)

    with sf.steering(model, sae, EDITS, when=sf.gate(decide, latents=telling)) as handle:
        gated = generate(model)
        decisions = handle.decisions
    with sf.steering(model, sae, EDITS):
        steered = generate(model)
    plain = generate(model)
    assert torch.equal(gated, torch.cat([plain[:2], steered[2:]]))
    (prompt,) = seen
    assert torch.equal(prompt.ids, IDS) and torch.equal(prompt.real, MASK.bool())
    real = MASK.bool()
    torch.testing.assert_close(
        prompt.acts[real].double(), acts[..., telling][real], atol=1e-4, rtol=0
    )
    assert [decision.on for decision in decisions] == [False, False, True]
    assert decisions[0].score is None


@pytest.mark.parametrize("given", [True, [True] * 3, torch.ones(3), torch.ones(2).bool()])
def test_a_callable_that_gives_something_else(model, sae, given):
    with sf.steering(model, sae, EDITS, when=sf.gate(lambda prompt: given)):
        with pytest.raises(TypeError, match=r"gate: its callable gave .*, bool \(3,\) is needed"):
            model(IDS)


def test_causes_are_named(model, sae, acts, telling):
    first, second, _ = telling
    when = sf.gate({first: 2.0, second: -1.0}, -0.3)
    for options in ({}, {"prefill_chunk_size": 4}):
        with sf.steering(model, sae, EDITS, when=when, scope="generated") as handle:
            generate(model, **options)
            decisions = handle.decisions
        for row, decision in enumerate(decisions):
            peaks = {f: acts[row, :, f].max().item() for f in (first, second)}
            sizes = {f: peaks[f] * weight for f, weight in ((first, 2.0), (second, 1.0))}
            named = [f for f in sorted(sizes, key=lambda f: -sizes[f]) if peaks[f] > 0]
            assert [cause.latent for cause in decision.causes] == named
            for cause in decision.causes:
                column = acts[row, :, cause.latent].argmax()
                assert cause.token == MASK[row, :column].sum()
                assert cause.act == pytest.approx(peaks[cause.latent], abs=1e-4)
            assert decision.score == pytest.approx(2 * peaks[first] - peaks[second] - 0.3, abs=1e-4)


@pytest.mark.parametrize("pool", ["max", "mean", "last"])
def test_causes_are_of_what_the_gate_pools(model, sae, acts, pool):
    """A latent that is silent where the gate looks caused nothing, and is not named."""
    early = ((acts.amax(1) > 0.3) & (acts[:, -1] == 0)).any(0).nonzero().flatten().tolist()[:2]
    late = (acts[:, -1] > 0.3).any(0).nonzero().flatten().tolist()[:2]
    weights = dict(zip(early + late, (30.0, -0.2, 1.0, -2.0), strict=True))
    lengths = MASK.sum(1, keepdim=True)
    pooled = {"max": acts.amax(1), "mean": acts.sum(1) / lengths, "last": acts[:, -1]}[pool]
    with sf.steering(model, sae, EDITS, when=sf.gate(weights, pool=pool)) as handle:
        layer_output(model, IDS, attention_mask=MASK)
        decisions = handle.decisions
    for row, decision in enumerate(decisions):
        shares = {f: abs(weight * pooled[row, f].item()) for f, weight in weights.items()}
        named = [f for f in sorted(shares, key=lambda f: -shares[f]) if shares[f]]
        assert [cause.latent for cause in decision.causes] == named
        for cause in decision.causes:
            column = -1 if pool == "last" else acts[row, :, cause.latent].argmax()
            assert cause.token == MASK[row].cumsum(0)[column] - 1
            assert cause.act == pytest.approx(acts[row, column, cause.latent].item(), abs=1e-4)
    assert {f for d in decisions for f in early if f not in [c.latent for c in d.causes]}


def test_causes_of_a_mean_are_ordered_by_it(model, sae, acts):
    peaks, means = acts[1].amax(0), acts[1].sum(0) / MASK[1].sum()
    live = (peaks > 0.3).nonzero().flatten()
    order = live[(means / peaks)[live].argsort()].tolist()
    brief, steady = order[0], order[-1]
    weights = {brief: 1.05 / peaks[brief].item(), steady: 1 / peaks[steady].item()}
    for pool, expected in (("max", [brief, steady]), ("mean", [steady, brief])):
        with sf.steering(model, sae, EDITS, when=sf.gate(weights, pool=pool)) as handle:
            layer_output(model, IDS, attention_mask=MASK)
            assert [cause.latent for cause in handle.decisions[1].causes] == expected


def test_decisions_read_like_sentences():
    decision = Decision("gate", 1, True, (Cause(511, 3.21, 14), Cause(7, 0.5, 0)), 2.0)
    causes = "latent 511 at 3.2 on token 14, latent 7 at 0.5 on token 0"
    assert str(decision) == f"row 1 steered: {causes}; log-odds 2"
    assert str(decision._replace(score=None)) == f"row 1 steered: {causes}"
    assert str(decision._replace(on=False, causes=())) == (
        "row 1 not steered: no latent active; log-odds 2"
    )


def test_both_conditions_must_hold(model, sae, gate, telling):
    when = [sf.active(telling[1]), gate]
    with sf.steering(model, sae, EDITS, when=when) as handle:
        y = layer_output(model, IDS, attention_mask=MASK)
        both = {by: [d.on for d in handle.decisions if d.by == by] for by in ("active", "gate")}
    x = layer_output(model, IDS, attention_mask=MASK)
    on = (sae.encode(x)[..., telling[1]] > 0) & MASK.bool() & torch.tensor(both["gate"])[:, None]
    assert torch.equal((y != x).any(-1), on) and on.any()


def test_two_gates_are_refused(model, sae):
    one = sf.gate({3: 1.0})
    with pytest.raises(ValueError, match=r"when: one sf\.active .* and one sf\.gate are accepted"):
        sf.steering(model, sae, EDITS, when=[one, one])


def test_where_no_one_asked(model, sae):
    with sf.steering(model, sae, EDITS) as handle:
        with pytest.raises(ValueError, match="when: this steering has no condition"):
            _ = handle.decisions
    with sf.steering(model, sae, EDITS, when=sf.active(3)) as handle:
        assert handle.decisions == []


@pytest.mark.fault(74)
def test_a_gate_needs_the_whole_prompt(model, sae, telling):
    """Also what a cache holds already, as of a system prompt or of an earlier turn."""
    gate = sf.gate({telling[0]: 1.0}, -0.1)
    with sf.steering(model, sae, EDITS, scope="generated", when=gate) as handle, torch.no_grad():
        cache = model(IDS[1:2, :3]).past_key_values
        with pytest.raises(ValueError, match="of which 3 columns are in the cache already"):
            generate(model, IDS[1:2], past_key_values=cache)
        cache = model(IDS[1:2, :3]).past_key_values
        with handle.prompt(6), pytest.raises(ValueError, match="3 columns are in the cache"):
            model(IDS[1:2, 3:], past_key_values=cache)
        generate(model, IDS[1:2])
        assert len(handle.decisions) == 1


@pytest.mark.fault(84)
def test_a_gate_counts_no_padding(model, sae, gate):
    """Of a mask as long as a static cache it reads what transformers reads; where a mask tells
    nothing, it asks for one."""
    wide = nn.functional.pad(MASK, (0, 5), value=1)
    with torch.no_grad(), sf.steering(model, sae, EDITS, when=gate) as handle:
        model(IDS)
        with_padding = handle.decisions
        model(IDS, attention_mask=MASK)
        without = handle.decisions
        model(IDS, attention_mask=wide)
        assert handle.decisions == without != with_padding
        with pytest.raises(ValueError, match="when: nothing says which of the prompt's tokens are"):
            model(IDS, attention_mask=MASK[:, 1:])


@pytest.fixture
def padded_latent(model, sae):
    """Live on the padding of the first prompt, and on no other of its tokens."""
    live = sae.encode(layer_output(model, IDS, attention_mask=MASK))[0] > 0
    real = MASK[0].bool()
    return int((live[~real].any(0) & ~live[real].any(0)).nonzero()[0])


@pytest.mark.parametrize("pool", ["max", "mean", "last"])
def test_gates_pool_no_padding(model, sae, padded_latent, pool):
    with sf.steering(model, sae, EDITS, when=sf.gate({padded_latent: 1.0}, 0.5, pool=pool)) as held:
        layer_output(model, IDS, attention_mask=MASK)
        assert held.decisions[0].score == 0.5


def test_decisions_count_no_padding(model, sae, padded_latent):
    with sf.steering(model, sae, EDITS, when=sf.active(padded_latent)) as handle:
        layer_output(model, IDS, attention_mask=MASK)
        decision = handle.decisions[0]
    assert not decision.on and not decision.causes


def test_one_encoder_serves_edits_and_conditions(model, sae):
    when = [sf.active(5), sf.gate({7: 1.0})]
    with sf.steering(model, sae, {3: sf.add(1.0)}, when=when) as handle:
        plan = handle._plan
        assert plan.measured.measure == "none"
        assert plan.on_active.W_enc.data_ptr() == plan.on_gate.W_enc.data_ptr()
        assert plan.on_active.W_enc.data_ptr() == sae.W_enc.data_ptr()


GATE = {"weights": {"511": 0.8, "7": -1.1}, "bias": -2.0, "threshold": 0.3, "pool": "last"}


def test_a_gate_from_a_file(tmp_path, monkeypatch):
    expected = sf.gate({511: 0.8, 7: -1.1}, -2.0, threshold=0.3, pool="last")
    (tmp_path / "gate.json").write_text(json.dumps(GATE))
    assert sf.gate(tmp_path / "gate.json") == expected
    assert sf.gate(str(tmp_path / "gate.json")) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sf.gate("~/gate.json") == expected
    tensors = {
        "latents": torch.tensor([511, 7]),
        "weights": torch.tensor([0.8, -1.1], dtype=torch.float64),
    }
    rest = {"bias": "-2.0", "threshold": "0.3", "pool": "last"}
    save_file(tensors, tmp_path / "gate.safetensors", rest)
    assert sf.gate(tmp_path / "gate.safetensors") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gate.json", "{", "gate: gate.json: not valid JSON"),
        ("gate.json", "[" * 10**5, "gate.json: not valid JSON"),
        ("gate.json", "[1]", r"gate.json: got \[1\], an object of a gate is needed"),
        ("gate.json", "{}", "gate.json: weights: is missing"),
        ("gate.json", json.dumps(GATE | {"weigths": 1}), "weigths: got 1, .* 'weights'"),
        ("gate.json", json.dumps(GATE | {"weights": {"a": 1}}), r"weights\.a: no latent"),
        ("gate.json", json.dumps(GATE | {"weights": {"1_0": 1}}), r'weights\["1_0"\]: no latent'),
        ("gate.json", '{"weights": {"5": 1, "5": 2}}', r'weights\["5"\]: is there twice'),
        ("gate.json", '{"weights": {"5": 1}, "bias": 1, "bias": 2}', "bias: is there twice"),
        ("gate.json", json.dumps(GATE | {"weights": {}}), "weights: got {}, one latent or more"),
        ("gate.json", json.dumps(GATE | {"threshold": 1.0}), "json: threshold: got 1.0, a prob"),
        ("gate.json", json.dumps(GATE | {"pool": "maxx"}), "pool: got \"maxx\", .* mean 'max'"),
        ("gate.json", json.dumps(GATE | {"bias": float("inf")}), "bias: got Infinity, a number"),
        ("gate.pt", "", "gate.pt: is neither .json nor .safetensors"),
        ("gate.safetensors", "{}", "gate: gate.safetensors: "),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        sf.gate(tmp_path / name)


@pytest.mark.parametrize(
    ("changed", "metadata", "message"),
    [
        ({"latents": torch.tensor([5, 5])}, {}, "names a latent twice"),
        ({"latents": torch.tensor([5.7, 9.0])}, {}, "latents of torch.float32"),
        ({"latents": torch.tensor([5])}, {}, r"latents \(1,\) and weights \(2,\)"),
        ({"weights": torch.tensor([1, 2])}, {}, "weights of torch.int64"),
        ({"bias": torch.tensor(-4.0)}, {}, "has the tensors bias, latents, weights"),
        ({}, {"bias": "abc"}, "bias is 'abc', a number is needed"),
        ({}, {"treshold": "0.5"}, "metadata 'treshold'; accepted .* mean 'threshold'"),
        ({}, {"bias": "nan"}, "bias: got nan"),
    ],
)
def test_bad_tensors_are_named(tmp_path, changed, metadata, message):
    tensors = {"latents": torch.tensor([5, 9]), "weights": torch.tensor([1.0, 2.0])}
    save_file(tensors | changed, tmp_path / "gate.safetensors", metadata)
    with pytest.raises(ValueError, match="gate: gate.safetensors: .*" + message):
        sf.gate(tmp_path / "gate.safetensors")


def test_what_a_gate_would_not_use_is_refused(tmp_path):
    (tmp_path / "gate.json").write_text(json.dumps(GATE))
    with pytest.raises(ValueError, match=r"bias: got -2\.0, but the file says it"):
        sf.gate(tmp_path / "gate.json", -2.0)
    with pytest.raises(ValueError, match="pool: got 'last', but a callable decides by itself"):
        sf.gate(lambda prompt: prompt.real[:, 0], pool="last", latents=[1])
    with pytest.raises(ValueError, match=r"latents: got \(7, 8\), but the weights name them"):
        sf.gate({5: 1.0}, latents=[7, 8])


def test_what_active_would_not_use_is_refused():
    with pytest.raises(ValueError, match=r"above: got 5\.0, but the thresholds say it"):
        sf.active({3: 1.0}, above=5.0)
    assert sf.active({3: 1.0}).above == {3: 1.0} and sf.active(3, above=5.0).above == {3: 5.0}


def test_a_missing_file_is_named(tmp_path):
    (tmp_path / "gate.json").write_text(json.dumps(GATE))
    with pytest.raises(FileNotFoundError, match=r"gate: no file .*gat\.json; .* 'gate\.json'"):
        sf.gate(tmp_path / "gat.json")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sf.active({}), ValueError, "latents: got no latent, one or more are"),
        (lambda: sf.active("5"), TypeError, "latents: latent '5' is no integer; 5 is one"),
        (lambda: sf.active(5, above="1"), TypeError, "above: got '1', a number"),
        (lambda: sf.active(5, above=float("nan")), ValueError, "above: got nan, a number that is"),
        (lambda: sf.active([5, 6]), TypeError, r"latents: latent \[5, 6\] is no integer"),
        (lambda: sf.gate({5: 1e300}), ValueError, "by: latent 5 is given 1e.300, .* in fp32 is"),
        (lambda: sf.gate([5]), TypeError, "by: got list, a mapping, a path or a callable"),
        (lambda: sf.gate({5.0: 1.0}), TypeError, "by: latent 5.0 is no integer"),
        (lambda: sf.gate({5: float("inf")}), ValueError, "by: latent 5 is given inf"),
        (lambda: sf.gate({5: 1.0}, threshold=0), ValueError, "threshold: got 0, a probability"),
    ],
)
def test_bad_conditions_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("when", "error", "message"),
    [
        ("511", TypeError, "when: got str, accepted are sf.active and sf.gate"),
        ({511: 1.0}, TypeError, "when: got dict"),
        ([sf.active(1), sf.active(2)], ValueError, "when: one sf.active .of several latents."),
        (sf.active(128), ValueError, "when: latent 128 is not among 0 to 127"),
        (sf.gate({-1: 1.0}), ValueError, "when: latent -1 is not among"),
    ],
)
def test_bad_when_is_named(model, sae, when, error, message):
    with pytest.raises(error, match=message):
        sf.steering(model, sae, EDITS, when=when)
