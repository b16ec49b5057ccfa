"""Every model family, tiny and of random weights: its decoder layer 1 is steered like the textbook,
in one call, in generate, and in padded batches."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from families import FAMILIES, SIZES, TOKENS, build

import saesteer_fast as sf
from saesteer_fast import sites

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")
EDITS = {3: 9.0, 77: -8.0}
PROMPT = torch.tensor([[5, 17, 60, 2, 33, 8, 9]])
ROWS = [[5, 17, 60, 2, 33, 8, 9], [44, 9, 51]]
NEW = 5


@pytest.fixture(scope="module")
def sae(make_sae):
    return make_sae()


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return build(family)


@contextmanager
def hooked(layer, textbook, sae, start=0):
    """A plain hook on a layer, from a column of its rows on."""

    def hook(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        mask = (torch.arange(hidden.shape[1]) >= start).expand(hidden.shape[:2])
        steered = textbook(hidden, sae, EDITS, mask).to(hidden.dtype)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    handle = layer.register_forward_hook(hook)
    yield
    handle.remove()


@pytest.fixture
def textbook_hook(family, model, sae, textbook):
    return partial(hooked, model.get_submodule(family.layer), textbook, sae)


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
    for name in ("layers.1", "blocks.1.hook_resid_post", family.layer):
        assert sites.locate(model, name).module is model.get_submodule(family.layer)
    options = {"input_ids": PROMPT, "output_hidden_states": True}
    with torch.no_grad():
        plain = model(**options)
        with textbook_hook():
            expected = model(input_ids=PROMPT).logits
        with sf.steering(model, sae, EDITS, layer=1):
            steered = model(**options)
        assert torch.equal(model(input_ids=PROMPT).logits, plain.logits)
    torch.testing.assert_close(steered.logits, expected, atol=2e-3, rtol=1e-3)
    assert (expected - plain.logits).abs().max() > 0.1
    shown, truth = steered.hidden_states[2], textbook(plain.hidden_states[2], sae, EDITS)
    torch.testing.assert_close(shown.double(), truth, atol=1e-3, rtol=1e-4)
    assert torch.equal(steered.hidden_states[1], plain.hidden_states[1])


@pytest.mark.parametrize("scope", ["all", "generated"])
def test_generating_is_the_textbook_hook_without_a_cache(model, sae, textbook_hook, scope):
    with textbook_hook(PROMPT.shape[1] if scope == "generated" else 0):
        expected = generate_by_hand(model, PROMPT)
    with sf.steering(model, sae, EDITS, layer=1, scope=scope):
        assert torch.equal(generate(model, PROMPT), expected)


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


def of(name):
    return build(next(family for family in FAMILIES if family.name == name))


def tiny(kind, **options):
    torch.manual_seed(0)
    kind = getattr(transformers, kind)
    return kind(kind.config_class(**SIZES | options, **TOKENS)).eval()


@pytest.mark.parametrize("name", ["Mistral", "Gemma 2", "Gemma 3", "Cohere 2", "gpt-oss", "GPT-2"])
@pytest.mark.parametrize("scope", ["all", "generated"])
def test_static_caches_of_every_kind_of_attention(sae, name, scope):
    model = of(name)
    with sf.steering(model, sae, EDITS, layer=1, scope=scope):
        expected = generate(model, PROMPT)
        assert torch.equal(generate(model, PROMPT, cache_implementation="static"), expected)


WITH_IMAGE = torch.tensor([[5, 17, 63, 63, 63, 63, 2, 33]])
IMAGES = {
    "LLaVA": {"pixel_values": (1, 3, 8, 8)},
    "Gemma 3, multimodal": {
        "pixel_values": (1, 3, 8, 8),
        "token_type_ids": (WITH_IMAGE == 63).long(),
    },
    "Qwen2-VL": {
        "pixel_values": (16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (WITH_IMAGE == 63).long(),
    },
}


def test_sliding_attention_alone_tells_padding(sae):
    """Of the masks that generate makes for a static cache there is none of full attention."""
    kinds = ["sliding_attention"] * 3
    model = tiny("Qwen2ForCausalLM", layer_types=kinds, use_sliding_window=True, sliding_window=4)
    ids = torch.cat([torch.zeros(1, 2, dtype=torch.int64), PROMPT[:, :5]], 1)
    mask, every = (ids != 0).long(), dict.fromkeys(range(128), 1.0)
    with sf.steering(model, sae, EDITS, layer=1, when=sf.gate(every, pool="mean")) as handle:
        generate(model, ids, attention_mask=mask)
        expected = handle.decisions
        generate(model, ids, attention_mask=mask, cache_implementation="static")
        assert handle.decisions == expected


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("scope", ["all", "generated"])
def test_images_in_the_prompt(sae, textbook, name, scope):
    model, ids, images = of(name), WITH_IMAGE, dict(IMAGES[name])
    images["pixel_values"] = torch.randn(
        images["pixel_values"], generator=torch.Generator().manual_seed(0)
    )
    plain = generate(model, ids, **images)
    start = ids.shape[1] if scope == "generated" else 0
    past = [0]

    def hook(module, args, hidden):
        mask = (torch.arange(hidden.shape[1]) + past[0] >= start).expand(hidden.shape[:2])
        past[0] += hidden.shape[1]
        return textbook(hidden, sae, EDITS, mask).to(hidden.dtype)

    handle = model.model.language_model.layers[1].register_forward_hook(hook)
    expected = generate(model, ids, **images)
    handle.remove()
    with sf.steering(model, sae, EDITS, layer=1, scope=scope):
        assert torch.equal(generate(model, ids, **images), expected)
    assert not torch.equal(expected, plain)


def test_a_layer_that_gives_several_streams(sae):
    """Gemma 3n's AltUp: which of its four an SAE would read, nobody says."""
    model = tiny(
        "Gemma3nForCausalLM",
        layer_types=["full_attention"] * 3,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 3,
        intermediate_size=[48] * 3,
    )
    with pytest.raises(ValueError, match="several lists of layers: layers, altup_projections"):
        sf.steering(model, sae, EDITS, layer=1)
    with sf.steering(model, sae, EDITS, layer="model.layers.1"):
        with pytest.raises(ValueError, match=r"gives \(4, 1, 7, 32\), not one vector a token"):
            model(input_ids=PROMPT)


def test_an_encoder_has_the_prompt(sae):
    kind = transformers.T5ForConditionalGeneration
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=64, decoder_start_token_id=0, **sizes)).eval()
    with sf.steering(model, sae, EDITS, layer=1) as handle:
        assert repr(handle).startswith("Handle(block.1: ")
        generate(model, PROMPT)
    with pytest.raises(ValueError, match="T5Stack decodes what an encoder was given the prompt of"):
        sf.steering(model, sae, EDITS, layer=1, scope="generated")


def test_a_cache_that_does_not_count(sae, monkeypatch):
    """Taken for an empty one, it would make every token a prompt."""
    model = of("Llama")
    monkeypatch.setattr("saesteer_fast.following.past_length", lambda cache: 0)
    with sf.steering(model, sae, EDITS, layer=1, scope="generated"):
        with pytest.raises(
            ValueError, match="inside of generate, 1 tokens came without a past, after 7"
        ):
            generate(model, PROMPT)


@pytest.mark.parametrize("scope", ["all", "generated"])
def test_a_cache_whose_first_layer_keeps_a_state(sae, textbook, scope):
    """MiniMax' own, which says that it is empty."""
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    model = tiny("MiniMaxForCausalLM", layer_types=kinds, num_local_experts=4)
    start = PROMPT.shape[1] if scope == "generated" else 0
    with hooked(model.model.layers[1], textbook, sae, start):
        expected = generate_by_hand(model, PROMPT)
    with sf.steering(model, sae, EDITS, layer=1, scope=scope):
        assert torch.equal(generate(model, PROMPT), expected)


def test_a_state_without_a_length(sae, textbook):
    model = tiny("MambaForCausalLM", state_size=8)
    with hooked(model.backbone.layers[1], textbook, sae):
        expected = generate_by_hand(model, PROMPT)
    with sf.steering(model, sae, EDITS, layer=1):
        assert torch.equal(generate(model, PROMPT), expected)
    for options in ({"scope": "generated"}, {"when": sf.gate({3: 1.0})}):
        with pytest.raises(ValueError, match="MambaModel keeps a state that has no length, so"):
            sf.steering(model, sae, EDITS, layer=1, **options)
