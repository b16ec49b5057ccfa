"""torch.compile: no graph breaks, and nothing is compiled again where only tensors changed."""

from __future__ import annotations

import pytest
import torch
from support import EDITED, MEASURES, build, stream
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import saesteer_fast as sf

EDITS = {3: 6.0, 77: -2.0}
TABLE = {"off": {}, "strong": EDITS, "weak": {3: 1.0, 5: sf.scale(0.5)}}
IDS = torch.tensor([[0, 0, 0, 5, 17, 60], [7, 8, 9, 5, 17, 60], [0, 33, 2, 17, 5, 90]])
OTHER = torch.tensor([[0, 44, 45, 5, 17, 61], [0, 0, 9, 6, 17, 60], [3, 33, 2, 18, 5, 91]])
MASKED = torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) > 0.5

STEERINGS = {
    "set": (EDITS, {}),
    "several kinds": ({3: sf.scale(0.5), 77: sf.at_least(2.0), 5: 1.0}, {}),
    "add": ({3: sf.add(3.0)}, {}),
    "projection": (EDITS, {"measure": "projection"}),
    "error dropped": (EDITS, {"error": "drop"}),
    "prompt": (EDITS, {"scope": "prompt"}),
    "generated": (EDITS, {"scope": "generated"}),
    "positions": (EDITS, {"scope": sf.positions(0, -1, 7)}),
    "not tokens": (EDITS, {"scope": sf.not_tokens([17])}),
    "mask": (EDITS, {"scope": MASKED}),
    "rows": (TABLE, {"rows": ["off", "strong", "weak"]}),
    "active": (EDITS, {"when": sf.active(1, above=0.1)}),
    "gate": (EDITS, {"when": sf.gate({1: 1.0}, -0.15)}),
    "gate, generated": (EDITS, {"when": sf.gate({1: 1.0}, -0.15), "scope": "generated"}),
}
BRIEFLY = ("set", "add", "projection", "generated", "not tokens", "gate")
"""Tried without generating, to save time: each differs little from another one."""


@pytest.fixture(autouse=True)
def dynamo():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sae(make_sae):
    return make_sae(hookpoint="layers.0")


@pytest.fixture
def model(make_phi3):
    """Its first layer, which is steered: tracing takes its time."""
    model = make_phi3()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


def generate(model, ids, **options):
    mask = (ids != 0).long()
    return model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **options)


@pytest.mark.fault(54)
@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *((name, {"cache_implementation": "static"}) for name in STEERINGS if name not in BRIEFLY),
        *((name, {}) for name in ("rows", "gate, generated")),
    ],
)
def test_generation(model, sae, name, cache):
    """One graph for the prompt, one or two for decoding; then whatever changes is a tensor's
    content: strengths, masks, choices, padding, decisions."""
    edits, options = STEERINGS[name]
    if name == "mask":
        options = {"scope": MASKED.clone()}
    with torch.no_grad(), sf.steering(model, sae, edits, **options) as handle:

        def change():
            handle.strengths.mul_(0.5)
            if name == "rows":
                handle.choose(["weak", "weak", "strong"])
            if name == "mask":
                handle.mask.logical_not_()

        before = [generate(model, ids, **cache) for ids in (IDS, OTHER)]
        kept = handle.strengths.clone()
        change()
        after = [generate(model, ids, **cache) for ids in (IDS, OTHER)]
        handle.strengths.copy_(kept)
        if name == "rows":
            handle.choose(["off", "strong", "weak"])
        if name == "mask":
            handle.mask.logical_not_()

        counter = CompileCounter()
        model.forward = torch.compile(model.forward, backend=counter, fullgraph=True)
        assert torch.equal(generate(model, IDS, **cache), before[0])
        assert counter.frame_count <= 3
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(generate(model, OTHER, **cache), before[1])
            change()
            for ids, expected in zip((IDS, OTHER), after, strict=True):
                assert torch.equal(generate(model, ids, **cache), expected)


@pytest.mark.parametrize("name", BRIEFLY)
def test_a_call(model, sae, name):
    edits, options = STEERINGS[name]
    calls = [{"input_ids": ids, "attention_mask": (ids != 0).long()} for ids in (IDS, OTHER)]
    with torch.no_grad(), sf.steering(model, sae, edits, **options) as handle:
        counter = CompileCounter()
        run = torch.compile(model, backend=counter, fullgraph=True)
        for call in calls:
            given = run(**call, use_cache=False).logits
            torch.testing.assert_close(given, model(**call, use_cache=False).logits)
            handle.strengths.mul_(0.5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["several kinds", "rows", "gate", "mask", "error dropped"])
def test_traced_with_its_gradients(model, sae, name):
    """Through AOTAutograd, which makes graphs of the ops and of their backwards."""
    edits, options = STEERINGS[name]
    model.requires_grad_(False)
    embeds = model.get_input_embeddings()(IDS)
    mask = (IDS != 0).long()

    def gradients(run, strengths):
        x = embeds.clone().requires_grad_()
        loss = run(inputs_embeds=x, attention_mask=mask, use_cache=False).logits.square().mean()
        return torch.autograd.grad(loss, [x, strengths])

    with sf.steering(model, sae, edits, **options) as handle:
        strengths = handle.strengths.requires_grad_()
        expected = gradients(model, strengths)
        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(model, backend=counter, fullgraph=True)
        for gradient, true in zip(gradients(run, strengths), expected, strict=True):
            torch.testing.assert_close(gradient, true, atol=1e-5, rtol=1e-3)
        with torch.no_grad():
            strengths.mul_(0.5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            gradients(run, strengths)
    assert counter.frame_count == 1


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_every_measure_and_edit(measure, error):
    sae, x = build(measure), stream(5)
    options = {"measure": "projection"} if measure == "projection" else {"error": error}
    edits = {3 + place: make(0.5) for place, (make, _) in enumerate(EDITED.values())}
    edit = sf.prepare(sae, edits, **options)
    run = torch.compile(edit, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(x), edit(x))
    with torch._dynamo.config.patch(error_on_recompile=True):
        edit.strengths.mul_(3.0)
        torch.testing.assert_close(run(x), edit(x))


def test_the_functional_form(sae):
    """It builds its tensors anew each call, so a compiled function may hold it, at a price."""
    x = stream(5)[:, :1].expand(5, 32).contiguous()
    run = torch.compile(lambda x, mask: sf.steer(x * 2, sae, EDITS, mask=mask), backend="eager")
    mask = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(run(x, mask), sf.steer(x * 2, sae, EDITS, mask=mask))


def test_inductor(sae):
    """The default backend, once."""
    edit = sf.prepare(sae, TABLE, rows=["off", "strong", "weak"])
    x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))
    run = torch.compile(edit, fullgraph=True)
    for rows in (["off", "strong", "weak"], ["weak", "off", "off"]):
        edit.choose(rows)
        torch.testing.assert_close(run(x), sf.steer(x, sae, TABLE, rows=rows))


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        return self.model(ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("scope", [sf.positions(-1), "prompt"], ids=str)
def test_an_export_of_any_length(model, sae, scope):
    """Sizes are then neither numbers nor tensors."""

    module = Logits(model)
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},) * 2
    with sf.steering(model, sae, EDITS, scope=scope):
        given = IDS, (IDS != 0).long()
        exported = torch.export.export(module, given, dynamic_shapes=sizes, strict=False).module()
        for ids in (IDS, torch.cat([IDS, OTHER], 1)[:2]):
            given = ids, (ids != 0).long()
            torch.testing.assert_close(exported(*given), module(*given))


MADE = {
    "export": lambda module: torch.export.export(module, (IDS,)).module(),
    "trace": lambda module: torch.jit.trace(module, IDS, check_trace=False),
}


@pytest.mark.parametrize("how", MADE)
@pytest.mark.filterwarnings("ignore")
def test_what_is_exported_shares_the_strengths(model, sae, how):
    """Also once the model is steered no more."""
    module = Logits(model)
    with torch.no_grad(), sf.steering(model, sae, EDITS) as handle:
        made = MADE[how](module)
        handle.set({3: 1.0})
        expected = module(IDS)
        handle.remove()
        torch.testing.assert_close(made(IDS), expected)
