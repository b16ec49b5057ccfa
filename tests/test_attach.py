"""sf.steering on whole models, against a textbook hook written here."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import saesteer_fast as sf
from saesteer_fast import attach, ops

pytestmark = pytest.mark.usefixtures("one_thread")
EDITS = {3: 6.0, 77: -2.0}
PROMPT = torch.tensor([[5, 17, 60, 2, 33, 8, 90]])


@pytest.fixture
def model(make_phi3):
    return make_phi3()


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return {
        (name, kind): list(getattr(module, kind).values())
        for name, module in model.named_modules()
        for kind in kinds
    }


@contextmanager
def textbook_hook(model, textbook, sae, edits, layer=1, mask=None):
    def hook(module, args, output):
        return textbook(output, sae, edits, mask).to(output.dtype)

    handle = model.model.layers[layer].register_forward_hook(hook)
    yield
    handle.remove()


def greedy(model, ids, count, **options):
    return model.generate(ids, max_new_tokens=count, do_sample=False, **options)


def greedy_by_hand(model, ids, count):
    """Greedy decoding without a cache and without generate."""
    with torch.no_grad():
        for _ in range(count):
            logits = model(ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


def layer_output(model, layer, *args, **options):
    """What decoder layer `layer` hands on, all hooks that are there already included."""
    seen = []
    handle = model.model.layers[layer].register_forward_hook(lambda m, a, o: seen.append(o))
    with torch.no_grad():
        model(*args, **options)
    handle.remove()
    return seen[0]


def assert_same(y, expected, tolerance=1e-4):
    torch.testing.assert_close(y, expected, atol=tolerance, rtol=0)


@pytest.mark.fault(48)
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_is_the_textbook_hook(model, sae, textbook, layer, poisoned_memory):
    with torch.no_grad():
        plain = model(PROMPT).logits
        with textbook_hook(model, textbook, sae, EDITS, layer):
            expected = model(PROMPT).logits
        with sf.steering(model, sae, EDITS, layer=layer):
            assert_same(model(PROMPT).logits, expected)
        assert torch.equal(model(PROMPT).logits, plain)
    assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precision_models(make_phi3, make_sae, textbook, dtype, weights):
    model, sae = make_phi3().to(dtype), make_sae(dtype=weights)
    x = layer_output(model, 1, PROMPT)
    with sf.steering(model, sae, EDITS):
        y = layer_output(model, 1, PROMPT)
    truth = textbook(x, sae, EDITS)
    bound = torch.finfo(dtype).eps / 2 * truth.abs() + 1e-5
    assert y.dtype == dtype and ((y.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("layer", [1, None, "layers.1", "model.layers.1"])
def test_ways_to_name_a_layer(model, sae, textbook, layer):
    x = layer_output(model, 1, PROMPT)
    with sf.steering(model, sae, EDITS, layer=layer):
        assert_same(layer_output(model, 1, PROMPT).double(), textbook(x, sae, EDITS))


def test_layer_overrides_the_hookpoint(model, make_sae, textbook):
    sae = make_sae(hookpoint="layers.3")
    x = layer_output(model, 2, PROMPT)
    with sf.steering(model, sae, EDITS, layer=2):
        assert_same(layer_output(model, 2, PROMPT).double(), textbook(x, sae, EDITS))


def test_a_module_inside_a_layer(model, sae, textbook):
    def outputs():
        seen = []
        handle = model.model.layers[1].mlp.register_forward_hook(lambda m, a, o: seen.append(o))
        with torch.no_grad():
            model(PROMPT)
        handle.remove()
        return seen[0]

    x = outputs()
    with sf.steering(model, sae, EDITS, layer="layers.1.mlp"):
        assert_same(outputs().double(), textbook(x, sae, EDITS))


def test_the_base_model_alone(model, sae, textbook):
    x = layer_output(model, 1, PROMPT)
    with sf.steering(model.model, sae, EDITS, layer=1):
        assert_same(layer_output(model, 1, PROMPT).double(), textbook(x, sae, EDITS))


@pytest.mark.fault(60)
@pytest.mark.parametrize("captured_before", [False, True])
def test_hidden_states_show_the_steered_stream(model, sae, textbook, captured_before):
    with torch.no_grad():
        if captured_before:
            model(PROMPT, output_hidden_states=True)
        with sf.steering(model, sae, EDITS):
            steered = model(PROMPT, output_hidden_states=True)
            logits = model(PROMPT).logits
        plain = model(PROMPT, output_hidden_states=True)
    assert_same(steered.hidden_states[2].double(), textbook(plain.hidden_states[2], sae, EDITS))
    for before in (0, 1):
        assert torch.equal(steered.hidden_states[before], plain.hidden_states[before])
    assert torch.equal(steered.logits, logits)


@pytest.mark.fault(56, 59)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=["cache", "no cache", "static cache", "prompt lookup"],
)
def test_generate_steers_every_step(model, sae, textbook, options):
    with textbook_hook(model, textbook, sae, EDITS):
        expected = greedy_by_hand(model, PROMPT, 8)
    assert not torch.equal(expected, greedy_by_hand(model, PROMPT, 8))
    with sf.steering(model, sae, EDITS):
        for _ in range(2):
            assert torch.equal(greedy(model, PROMPT, 8, **options), expected)


@pytest.mark.fault(59)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beam_search(model, sae, textbook, options):
    with textbook_hook(model, textbook, sae, EDITS):
        expected = greedy(model, PROMPT, 8, **options)
    with sf.steering(model, sae, EDITS):
        assert torch.equal(greedy(model, PROMPT, 8, **options), expected)


ROWS = [[5, 17, 60, 2, 33, 8, 90], [44, 9, 71], [12, 80, 23, 6, 51]]


def padded(side):
    width = max(map(len, ROWS))
    ids, mask = torch.zeros(2, len(ROWS), width, dtype=torch.int64)
    for row, tokens in enumerate(ROWS):
        place = slice(width - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return ids, mask


@pytest.mark.fault(57, 58)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("by_name", [True, False])
def test_padding_is_left_alone(model, sae, textbook, side, by_name, poisoned_memory):
    ids, mask = padded(side)
    args, options = ((ids,), {"attention_mask": mask}) if by_name else ((ids, mask), {})
    x = layer_output(model, 1, *args, **options)
    with sf.steering(model, sae, EDITS):
        y = layer_output(model, 1, *args, **options)
        base = layer_output_of_base(model, ids, mask)
    real = mask.bool()
    assert torch.equal(y[~real], x[~real])
    assert_same(y.double(), textbook(x, sae, EDITS, real))
    assert torch.equal(base, y)


def layer_output_of_base(model, ids, mask):
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(o))
    with torch.no_grad():
        model.model(ids, mask)
    handle.remove()
    return seen[0]


@pytest.mark.fault(57)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_each_row_of_a_padded_batch_is_as_if_alone(model, sae, options):
    ids, mask = padded("left")
    with sf.steering(model, sae, EDITS):
        together = greedy(model, ids, 8, attention_mask=mask, **options)
        for row, tokens in enumerate(ROWS):
            alone = greedy(model, torch.tensor([tokens]), 8)
            assert torch.equal(together[row, ids.shape[1] :], alone[0, len(tokens) :])


@pytest.mark.fault(57)
def test_padding_in_a_chunk_after_a_cache(model, sae, textbook):
    """The mask has a column a key: only its last ones are those of the tokens that come now."""
    ids, mask = padded("left")
    with torch.no_grad():
        cache = model(ids[:, :3], attention_mask=mask[:, :3]).past_key_values
        options = {"attention_mask": mask, "past_key_values": cache}
        x = layer_output(model, 1, ids[:, 3:], **options | {"past_key_values": clone(cache)})
        with sf.steering(model, sae, EDITS):
            y = layer_output(model, 1, ids[:, 3:], **options)
    real = mask[:, 3:].bool()
    assert not real.all()
    assert_same(y.double(), textbook(x, sae, EDITS, real))
    assert torch.equal(y[~real], x[~real])


def clone(cache):
    return copy.deepcopy(cache)


@pytest.mark.fault(57, 58)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("added", [False, True])
def test_padding_shows_in_a_mask_with_a_row_a_query(sae, textbook, side, added):
    """Also where every query attends to all real keys."""
    model = Decoder()
    ids, mask = padded(side)
    for causal in (False, True):
        rows = mask[:, None, None].expand(-1, 1, 7, -1).bool()
        rows = rows.tril() if causal else rows
        given = torch.where(rows, 0.0, torch.finfo(torch.float32).min) if added else rows
        x = model(ids, given)
        with sf.steering(model, sae, EDITS, layer=1):
            y = model(ids, given)
        assert_same(y.double(), textbook(x, sae, EDITS, mask.bool()))
        assert torch.equal(y[mask == 0], x[mask == 0])


@pytest.mark.fault(81)
@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min, -1e4])
def test_a_mask_that_weighs_keys_pads_none_of_them(sae, textbook, masked):
    """Attention may be biased, also towards no token and away from the token itself."""
    model = Decoder()
    ids, mask = padded("left")
    bias = torch.randn(len(ids), 1, 7, 7, generator=torch.Generator().manual_seed(0)) - 5
    given = bias.masked_fill(mask[:, None, None] == 0, masked).masked_fill(
        ~torch.ones(7, 7).bool().tril(), masked
    )
    x = model(ids, given)
    with sf.steering(model, sae, EDITS, layer=1):
        assert_same(model(ids, given).double(), textbook(x, sae, EDITS, mask.bool()))


@pytest.mark.parametrize("kind", ["none", "paged", "too short"])
def test_every_position_is_steered_where_padding_is_unknown(sae, textbook, kind):
    """Keys of a cache in pages are in no order."""
    model = Decoder()
    ids, mask = padded("left")
    given = {
        "none": None,
        "paged": torch.eye(7, 12).bool().flip(1).expand(len(ids), 1, 7, 12),
        "too short": mask[:, 1:],
    }[kind]
    x = model(ids, given)
    with sf.steering(model, sae, EDITS, layer=1):
        assert_same(model(ids, given).double(), textbook(x, sae, EDITS))


@pytest.mark.fault(84)
def test_a_mask_as_long_as_a_static_cache(sae, textbook):
    model = Decoder()
    ids, mask = padded("left")
    given = nn.functional.pad(mask, (0, 9), value=1)
    x = model(ids, given)
    with sf.steering(model, sae, EDITS, layer=1):
        assert_same(model(ids, given).double(), textbook(x, sae, EDITS, mask.bool()))


class Output(NamedTuple):
    hidden: torch.Tensor
    cache: str


class Layer(nn.Module):
    def __init__(self, as_tuple=None):
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.as_tuple = as_tuple

    def forward(self, hidden):
        hidden = hidden + torch.tanh(self.linear(hidden))
        kept = Output(hidden, "cache")
        return {None: hidden, tuple: tuple(kept), Output: kept}[self.as_tuple]


class Decoder(nn.Module):
    """A decoder without attention; `model.layers` is where Hugging Face keeps its own."""

    def __init__(self, as_tuple=None):
        super().__init__()
        torch.manual_seed(0)
        self.as_tuple = as_tuple
        self.embed = nn.Embedding(97, 32)
        self.layers = nn.ModuleList(Layer(as_tuple) for _ in range(2))
        self.requires_grad_(False)

    def forward(self, ids, attention_mask=None, past_key_values=None):
        hidden = self.embed(ids)
        for layer in self.layers:
            output = layer(hidden)
            assert type(output) is (self.as_tuple or torch.Tensor)
            hidden, rest = output if self.as_tuple else (output, "cache")
            assert rest == "cache"
        return hidden


@pytest.mark.fault(48)
@pytest.mark.parametrize("as_tuple", [tuple, Output])
def test_layers_that_return_tuples(sae, textbook, as_tuple):
    ids, mask = padded("left")
    x = Decoder(as_tuple)(ids)
    model = Decoder(as_tuple)
    with sf.steering(model, sae, EDITS, layer=1):
        assert_same(model(ids, mask).double(), textbook(x, sae, EDITS, mask.bool()))


def test_set_changes_the_values_in_place(model, sae):
    with torch.no_grad():
        with sf.steering(model, sae, {3: 2.0, 77: 5.0}):
            expected = model(PROMPT).logits
        with sf.steering(model, sae, EDITS) as handle:
            before = model(PROMPT).logits
            handle.set({77: 5})
            handle.set({3: 2.0})
            assert torch.equal(model(PROMPT).logits, expected)
            handle.set(EDITS)
            assert torch.equal(model(PROMPT).logits, before)
            handle.set({})
            assert torch.equal(model(PROMPT).logits, before)


def test_handle_says_what_it_holds(model, sae):
    with sf.steering(model, sae, EDITS) as handle:
        handle.set({3: 1.5})
        assert repr(handle) == "Handle(layers.1: {3: 1.5, 77: -2.0})"
    assert repr(handle).endswith(", removed)")


def test_no_edits_change_no_bit(model, sae):
    with torch.no_grad():
        plain = model(PROMPT).logits
        with sf.steering(model, sae, {}):
            assert torch.equal(model(PROMPT).logits, plain)


@pytest.mark.fault(15)
@pytest.mark.parametrize("attach_inside", [False, True])
def test_inference_mode(model, sae, textbook, attach_inside):
    with textbook_hook(model, textbook, sae, EDITS):
        expected = greedy_by_hand(model, PROMPT, 6)
    with torch.inference_mode(attach_inside):
        handle = sf.steering(model, sae, {3: 0.0, 77: 0.0})
    with torch.inference_mode():
        handle.set({77: -2.0})
    handle.set({3: 6.0})
    with torch.inference_mode():
        assert torch.equal(greedy(model, PROMPT, 6), expected)
    model(PROMPT).logits.sum().backward()
    handle.remove()


def test_gradient_is_the_textbook_forms(model, sae, textbook):
    def gradient():
        embeds = model.get_input_embeddings()(PROMPT).detach().requires_grad_()
        model(inputs_embeds=embeds).logits.sum().backward()
        return embeds.grad

    with textbook_hook(model, textbook, sae, EDITS):
        expected = gradient()
    with sf.steering(model, sae, EDITS):
        assert_same(gradient(), expected, 1e-3 * expected.abs().max())


@pytest.mark.fault(49)
def test_works_without_with(model, sae):
    before = hooks(model)
    handle = sf.steering(model, sae, EDITS)
    assert hooks(model) != before
    handle.remove()
    handle.remove()
    assert hooks(model) == before


@pytest.mark.fault(61)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_model_may_change_later(model, sae, textbook, dtype):
    with sf.steering(model, sae, EDITS):
        model.to(dtype)
        y = layer_output(model, 1, PROMPT)
    truth = textbook(layer_output(model, 1, PROMPT), sae, EDITS)
    bound = torch.finfo(dtype).eps / 2 * truth.abs() + 1e-5
    assert y.dtype == dtype and ((y.double() - truth).abs() <= bound).all()


@pytest.mark.fault(52)
def test_steerings_of_one_layer_act_in_order(model, sae, textbook):
    x = layer_output(model, 1, PROMPT)
    edits = [{3: 6.0}, {3: -2.0, 9: 5.0}, {9: 1.0}]
    handles, expected = [], x
    for edit in edits:
        handles.append(sf.steering(model, sae, edit))
        expected = textbook(expected, sae, edit)
        assert_same(layer_output(model, 1, PROMPT).double(), expected)
    reversed_order = x
    for edit in reversed(edits):
        reversed_order = textbook(reversed_order, sae, edit)
    assert (reversed_order - expected).abs().max() > 0.1
    handles[0].remove()
    left = textbook(textbook(x, sae, edits[1]), sae, edits[2])
    assert_same(layer_output(model, 1, PROMPT).double(), left)
    handles[2].remove()
    handles[1].remove()
    assert torch.equal(layer_output(model, 1, PROMPT), x)


def test_one_sae_on_several_layers(model, sae, textbook):
    with textbook_hook(model, textbook, sae, EDITS, 0):
        with textbook_hook(model, textbook, sae, {5: 3.0}, 2):
            expected = model(PROMPT).logits
    with sf.steering(model, sae, EDITS, layer=0), sf.steering(model, sae, {5: 3.0}, layer=2):
        assert_same(model(PROMPT).logits, expected)


def test_several_saes(model, sae, make_sae, textbook):
    """Of other sizes, on one layer and on others."""
    wide, other = make_sae(N=300, k=5, seed=1), make_sae(N=40, k=3, seed=2)
    with (
        textbook_hook(model, textbook, sae, EDITS, 1),
        textbook_hook(model, textbook, wide, {5: 9.0}, 1),
    ):
        with textbook_hook(model, textbook, other, {7: 4.0}, 3):
            expected = greedy_by_hand(model, PROMPT, 6)
    with sf.steering(model, sae, EDITS, layer=1), sf.steering(model, other, {7: 4.0}, layer=3):
        with sf.steering(model, wide, {5: 9.0}, layer=1):
            assert torch.equal(greedy(model, PROMPT, 6), expected)


@pytest.mark.fault(65)
def test_two_models(make_phi3, sae):
    one, two = make_phi3(seed=0), make_phi3(seed=1)
    with torch.no_grad():
        plain = two(PROMPT).logits
        with sf.steering(one, sae, EDITS):
            alone = one(PROMPT).logits
            assert torch.equal(two(PROMPT).logits, plain)
            with sf.steering(two, sae, {5: 3.0}):
                assert torch.equal(one(PROMPT).logits, alone)
                assert not torch.equal(two(PROMPT).logits, plain)


@pytest.mark.fault(51)
def test_foreign_hooks_stay_and_see_the_steered_stream(model, sae, textbook):
    layer, seen = model.model.layers[1], []
    layer.register_forward_hook(lambda m, a, o: seen.append(o))
    with torch.no_grad():
        model(PROMPT)
        with sf.steering(model, sae, EDITS):
            later = layer.register_forward_hook(lambda m, a, o: seen.append(o))
            model(PROMPT)
            later.remove()
        model(PROMPT)
    x, steered, also, last = seen
    assert torch.equal(steered, also)
    assert_same(steered.double(), textbook(x, sae, EDITS))
    assert torch.equal(last, x)


@pytest.mark.fault(70)
def test_what_an_earlier_hook_kept_is_not_overwritten(model, sae):
    kept = []
    for part in (model.model.layers[1].mlp, model.model.layers[1].input_layernorm):
        part.register_forward_hook(lambda m, a, o: kept.append((o, o.clone())))
    with sf.steering(model, sae, EDITS), torch.no_grad():
        model(PROMPT)
    assert len(kept) == 2 and all(torch.equal(now, then) for now, then in kept)


def meet_inside(*models):
    """Make each of two threads wait inside layer 0 for the other one."""
    both = threading.Barrier(2, timeout=30)

    def wait(module, args, output):
        both.wait()

    for model in models:
        model.layers[0].register_forward_hook(wait)


@pytest.mark.fault(64)
def test_threads_do_not_see_each_others_padding(sae):
    """Two threads inside one model at once, each with a batch padded in its own way."""
    model = Decoder()
    calls = [padded("left"), padded("right")]
    with sf.steering(model, sae, EDITS, layer=1):
        expected = [model(ids, mask) for ids, mask in calls]
        meet_inside(model)
        results = {}

        def run(turn):
            results[turn] = model(*calls[turn])

        threads = [threading.Thread(target=run, args=(turn,)) for turn in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for turn in (0, 1):
        assert torch.equal(results[turn], expected[turn])


@pytest.mark.fault(64, 65)
def test_a_steered_model_leaves_another_threads_model_alone(sae):
    one, two = Decoder(), Decoder()
    ids, _ = padded("left")
    plain = two(ids)
    meet_inside(one, two)
    with sf.steering(one, sae, EDITS, layer=1):
        thread = threading.Thread(target=one, args=(ids,))
        thread.start()
        assert torch.equal(two(ids), plain)
        thread.join()


@pytest.mark.fault(62)
def test_a_copy_of_a_steered_model_is_steered(model, sae):
    with torch.no_grad():
        plain = model(PROMPT).logits
        with sf.steering(model, sae, EDITS) as handle:
            steered = model(PROMPT).logits
            twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
            handle.set({3: 0.0})
            assert sf.steerings(model) == [handle]
        assert torch.equal(model(PROMPT).logits, plain)
        for twin in twins:
            assert torch.equal(twin(PROMPT).logits, steered)
            assert sf.steerings(twin) == []


def test_what_is_attached_is_listed(model, make_phi3, sae):
    """Also what nobody holds, as after a notebook's cell that ran twice."""
    assert sf.steerings(model) == []
    for strength in (6.0, 7.0):
        sf.steering(model, sae, {3: strength}, layer=2)
    with sf.steering(model.model, sae, EDITS, layer=0, scope="prompt") as newest:
        one, two, three = sf.steerings(model)
        assert "{3: 6.0}" in repr(one) and "{3: 7.0}" in repr(two) and three is newest
        assert sf.steerings(model.model.layers[0]) == [newest]
        assert sf.steerings(torch.compile(model, backend="eager")) == [one, two, newest]
        assert sf.steerings(make_phi3()) == []
    one.remove()
    assert sf.steerings(model) == [two]
    for handle in sf.steerings(model):
        handle.remove()
    assert sf.steerings(model) == [] and not any(hooks(model).values())
    with pytest.raises(TypeError, match=r"model: got NoneType, a torch\.nn.Module is needed"):
        sf.steerings(None)


def test_what_is_attached_keeps_no_model_alive(make_phi3, sae):
    model = make_phi3()
    sf.steering(model, sae, EDITS, scope="prompt")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.fault(62)
def test_saved_weights_are_unsteered(model, sae, tmp_path):
    before = model.state_dict()
    with sf.steering(model, sae, EDITS):
        model.save_pretrained(tmp_path)
        assert model.state_dict().keys() == before.keys()
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)


def test_only_the_encoder_and_the_edited_rows_are_kept(model, make_sae):
    sae = make_sae(N=4096)
    with sf.steering(model, sae, EDITS) as handle:
        measured = vars(handle._plan.measured)
        held = [tensor for tensor in measured.values() if isinstance(tensor, torch.Tensor)]
    assert measured["W_enc"].data_ptr() == sae.W_enc.data_ptr()
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in held}
    del kept[sae.W_enc.data_ptr()]
    assert sum(kept.values()) == 4096 * 4 + len(EDITS) * (32 * 4 + 8)


def compiled(model, how):
    options = {"backend": "eager", "fullgraph": True}
    if how == "wrapped":
        return torch.compile(model, **options)
    if how == "in place":
        model.compile(**options)
    elif how == "layer":
        model.layers[1].compile(**options)
    elif how == "layer, wrapped":
        model.layers[1] = torch.compile(model.layers[1], **options)
    elif how == "forward":
        model.forward = torch.compile(model.forward, **options)
    else:
        return torch.compile(lambda *args: model(*args), **options)
    return model


HOW = ["wrapped", "in place", "layer", "layer, wrapped", "forward", "function"]


@pytest.fixture
def dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.fault(54, 55)
@pytest.mark.parametrize(
    ("how", "attach_to_the_wrapper"), [("wrapped", True), *((how, False) for how in HOW)]
)
def test_attached_to_a_compiled_model(sae, textbook, dynamo, how, attach_to_the_wrapper):
    """Also where the mask is noted outside of what is compiled, and read inside."""
    model = Decoder()
    run = compiled(model, how)
    calls = [padded("left"), padded("right")]
    plain = [run(*call) for call in calls]
    for edits in (EDITS, {5: 3.0}):
        with sf.steering(run if attach_to_the_wrapper else model, sae, edits, layer=1):
            for call, x in zip(calls, plain, strict=True):
                assert_same(run(*call).double(), textbook(x, sae, edits, call[1].bool()))
        for call, x in zip(calls, plain, strict=True):
            assert torch.equal(run(*call), x)


def test_compiled_after_attaching(model, sae, dynamo):
    ids, mask = padded("left")
    with torch.no_grad(), sf.steering(model, sae, EDITS) as handle:
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        run = torch.compile(model, backend="eager", fullgraph=True)
        assert_same(run(ids, attention_mask=mask, use_cache=False).logits, expected)
        handle.set({3: 1.0})
        changed = model(ids, attention_mask=mask, use_cache=False).logits
        assert (changed - expected).abs().max() > 0.1
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_same(run(ids, attention_mask=mask, use_cache=False).logits, changed)


def test_the_op_is_called_once_a_layer_and_step(model, sae, monkeypatch):
    calls, steer = [], ops.steer

    def counted(x, *args, **options):
        calls.append(tuple(x.shape))
        return steer(x, *args, **options)

    with sf.steering(model, sae, EDITS):
        monkeypatch.setattr(ops, "steer", counted)
        greedy(model, PROMPT, 4)
    assert calls == [(1, 7, 32), (1, 1, 32), (1, 1, 32), (1, 1, 32)]


@pytest.mark.fault(19)
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_model_on_a_gpu_with_an_sae_on_the_cpu(model, sae, textbook):
    ids, mask = (t.cuda() for t in padded("left"))
    model.cuda()
    x = layer_output(model, 1, ids, attention_mask=mask)
    with sf.steering(model, sae, {3: 1.0, 77: -2.0}) as handle:
        handle.set({3: 6.0})
        y = layer_output(model, 1, ids, attention_mask=mask)
    assert_same(y.cpu().double(), textbook(x.cpu(), sae, EDITS, mask.cpu().bool()))


def test_a_latent_that_is_edited_already(model, sae, make_sae):
    """As where a notebook's cell runs twice."""
    with sf.steering(model, sae, {3: sf.add(2.0), 5: 1.0}):
        with pytest.warns(UserWarning, match=r"latents \[3\] are edited at layers\.1 already"):
            sf.steering(model, sae, {3: sf.add(2.0), 7: 1.0}).remove()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sf.steering(model, sae, {7: 1.0}).remove()
            sf.steering(model, make_sae(seed=9), {3: 1.0}).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.steering(model, sae, {3: 1.0}).remove()


def test_an_old_transformers_is_refused(model, sae, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.8.1")
    with pytest.raises(RuntimeError, match=r"is of transformers 5\.8\.1, .* 5\.9 or newer"):
        sf.steering(model, sae, {3: 1.0})
    sf.steering(torch.nn.Sequential(torch.nn.Linear(32, 32)), sae, {3: 1.0}, layer="0").remove()
    needed = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f"transformers>={'.'.join(map(str, attach.OLDEST))}" in needed


@pytest.mark.parametrize("change", [{"measure": "projection"}, {"dtype": torch.bfloat16}], ids=str)
def test_a_latent_that_is_edited_already_in_another_way(make_phi3, make_sae, change):
    model, sae = make_phi3(), make_sae()
    sae = replace(sae, W_dec=2 * sae.W_dec)
    other = sae.to(dtype=change.get("dtype"))
    with sf.steering(model, sae, {3: 1.0}):
        with pytest.warns(UserWarning, match=r"latents \[3\] are edited at layers\.1 already"):
            sf.steering(model, other, {3: 2.0}, measure=change.get("measure")).remove()


def test_what_lost_a_hook_is_listed(make_phi3, sae):
    """So that it can be removed: the decoder's hooks make every call raise."""
    model = make_phi3()
    handle = sf.steering(model, sae, EDITS)
    model.model.layers[1]._forward_hooks.clear()
    assert sf.steerings(model) == [handle]
    with pytest.raises(RuntimeError, match="somebody removed hooks"):
        handle.remove()
    model(PROMPT)
