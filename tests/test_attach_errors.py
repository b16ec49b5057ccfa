"""sf.steering never leaves a model silently unsteered, or hooked by half."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import saesteer_fast as sf

EDITS = {3: 6.0}
PROMPT = torch.tensor([[5, 17, 60, 2, 33]])


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return {
        (name, kind): dict(getattr(module, kind))
        for name, module in model.named_modules()
        for kind in kinds
        if getattr(module, kind)
    }


@pytest.fixture(autouse=True)
def no_hook_is_left(model):
    before = hooks(model)
    yield
    assert hooks(model) == before


@pytest.mark.fault(82)
@pytest.mark.parametrize("options", [{}, {"measure": "projection"}, {"error": "drop"}])
def test_a_latent_that_writes_nothing(model, make_sae, options):
    """As those by which a dictionary was padded."""
    sae = make_sae(hookpoint="layers.1")
    sae.W_dec[77] = 0
    for edits in (EDITS | {77: 0.0}, [{}, {77: sf.scale(2)}]):
        with pytest.raises(ValueError, match="edits: latent 77 has the direction 0, nothing would"):
            sf.steering(model, sae, edits, **options)
    sf.steering(model, sae, EDITS, **options).remove()


@pytest.mark.fault(53)
@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (4, ValueError, "layer: got 4, accepted are 0 to 3"),
        (-1, ValueError, "layer: got -1, accepted are 0 to 3"),
        (1.0, TypeError, "layer: got 1.0, an integer or a module's name"),
        (True, TypeError, "layer: got True"),
        (
            "layers.9",
            ValueError,
            r"Phi3ForCausalLM has no module 'layers.9', .*; did you mean 'layers",
        ),
        ("layer.1", ValueError, r"no module 'layer\.1', .*; did you mean 'layers\.1'"),
        ("2", ValueError, r"'2', accepted are 0 to 3, and names of .* mean 2 or 'layers\.2'\?$"),
        ("blocks.2", ValueError, r"no module 'blocks\.2', .* did you mean 2 or 'layers\.2'\?$"),
        ("6", ValueError, "no module '6', accepted are 0 to 3, and names of modules$"),
        ("layers.-1", ValueError, r"no module 'layers\.-1'"),
        ("blocks.9.hook_resid_post", ValueError, "no module 'blocks.9.hook_resid_post'"),
        ("blocks.0.hook_resid_pre", ValueError, "is the output of no module, or of different"),
        ("blocks.1.hook_mlp_out", ValueError, r"accepted are blocks\.N\.hook_resid_post"),
        ("lm_head", ValueError, "'lm_head' is no module inside the language decoder"),
        ("model", ValueError, "'model' is no module inside the language decoder"),
        ("", ValueError, "no module '', accepted are 0 to 3, and names of modules$"),
        ("norm.weight", ValueError, "no module 'norm.weight'"),
    ],
)
def test_layer_that_is_not_there(model, sae, layer, error, message):
    with pytest.raises(error, match=message):
        sf.steering(model, sae, EDITS, layer=layer)


def test_no_layer_at_all(model, make_sae):
    with pytest.raises(ValueError, match="the SAE names no hookpoint; accepted are 0 to 3, and"):
        sf.steering(model, make_sae(hookpoint=None), EDITS)


@pytest.mark.fault(53)
def test_hookpoint_of_another_model(model, make_sae):
    with pytest.raises(ValueError, match=r"no module 'h\.3'"):
        sf.steering(model, make_sae(hookpoint="h.3"), EDITS)


def test_model_without_layers(sae):
    with pytest.raises(ValueError, match="Linear has no list of layers; name a module"):
        sf.steering(nn.Linear(32, 32), sae, EDITS, layer=0)


def test_arguments_of_the_wrong_kind(model, sae):
    with pytest.raises(TypeError, match=r"model: got str, a torch\.nn\.Module is needed"):
        sf.steering("phi-3", sae, EDITS, layer=1)
    with pytest.raises(TypeError, match="sae: got str, an SAE is needed"):
        sf.steering(model, "layers.1", EDITS)
    with pytest.raises(TypeError, match="edits: got list, a mapping"):
        sf.steering(model, sae, [(3, 1.0), (3, 2.0)])
    with pytest.raises(ValueError, match="edits: latent 128 is not among 0 to 127"):
        sf.steering(model, sae, {128: 1.0})
    with pytest.raises(ValueError, match="edits: latent 3 is given nan"):
        sf.steering(model, sae, {3: float("nan")})


def test_unknown_impl_is_found_before_the_model_runs(model, sae):
    with pytest.raises(ValueError, match="impl"):
        sf.steering(model, sae, EDITS, impl="fastest")


@pytest.mark.fault(8)
def test_sae_for_another_width(model, make_sae):
    with pytest.raises(ValueError, match=r"sae: is for width 48, layers\.1 is 32 wide"):
        sf.steering(model, make_sae(d=48), EDITS)


def test_width_of_a_module_inside_a_layer(model, sae, make_sae):
    with sf.steering(model, sae, EDITS, layer="layers.1.mlp.gate_up_proj"):
        with pytest.raises(
            ValueError, match=r"sae: is for width 32, layers\.1\.mlp\.gate_up_proj gives"
        ):
            model(PROMPT)
    plain = model(PROMPT).logits
    with sf.steering(model, make_sae(d=128), EDITS, layer="layers.1.mlp.gate_up_proj"):
        assert not torch.equal(model(PROMPT).logits, plain)


def test_double_precision(make_phi3, sae):
    with pytest.raises(TypeError, match=r"model: layers\.1 is torch\.float64"):
        sf.steering(make_phi3().double(), sae, EDITS)
    model = make_phi3()
    with sf.steering(model, sae, EDITS):
        with pytest.raises(TypeError, match=r"x: got torch\.float64, accepted"):
            model.double()(PROMPT)


def test_model_without_weights(make_phi3, sae):
    with torch.device("meta"):
        model = make_phi3()
    with pytest.raises(ValueError, match=r"model: layers\.1 is on meta; load its weights first"):
        sf.steering(model, sae, EDITS)


@pytest.mark.fault(61)
def test_model_that_moved_afterwards(sae):
    model = nn.Sequential(nn.Linear(32, 32))
    with sf.steering(model, sae, EDITS, layer="0"):
        model.to("meta")
        with pytest.raises(ValueError, match="x: is on meta, the SAE's weights on cpu"):
            model(torch.ones(1, 32, device="meta"))


@pytest.mark.fault(69)
def test_module_that_is_passed_by(model, sae, monkeypatch):
    """A forward that is called by name runs no hooks."""
    monkeypatch.setattr(type(model.model.norm), "__call__", lambda self, x: self.forward(x))
    with sf.steering(model, sae, EDITS, layer="norm"):
        with pytest.raises(RuntimeError, match="norm was not called as a module: nothing was"):
            model(PROMPT)
    model(PROMPT)


@pytest.mark.fault(69)
def test_lists_of_modules_are_never_called(model, sae):
    with pytest.raises(ValueError, match="layer: layers is a list of modules, which nobody calls"):
        sf.steering(model, sae, EDITS, layer="layers")
    with pytest.raises(TypeError, match="model: got a ModuleList, the model that holds it is"):
        sf.steering(model.model.layers, sae, EDITS, layer=1)


def test_module_that_gives_no_tensor(model, sae):
    with sf.steering(model, sae, EDITS, layer="rotary_emb"):
        with pytest.raises(ValueError, match=r"sae: is for width 32, rotary_emb gives \("):
            model(PROMPT)
    silent = nn.Sequential(nn.Identity())
    with sf.steering(silent, sae, EDITS, layer="0"):
        with pytest.raises(TypeError, match="0 gives a dict, no tensor"):
            silent({})


def test_set_refuses_and_changes_nothing(model, sae):
    with sf.steering(model, sae, {3: 6.0, 77: -2.0}) as handle:
        before = repr(handle)
        for edits, error, message in [
            ({4: 1.0}, ValueError, r"edits: latent 4 is not edited; edited are \[3, 77\]"),
            ({3: 1.0, -1: 1.0}, ValueError, "edits: latent -1 is not edited"),
            ({3: 1.0, 77: float("nan")}, ValueError, "edits: latent 77 is given nan"),
            ({77: torch.tensor(float("nan"))}, ValueError, "edits: a strength is nan, which is"),
            ({3: torch.tensor(1e39, dtype=torch.float64)}, ValueError, "is inf, which is not fin"),
            ({3: "1"}, TypeError, "edits: latent 3 is given '1'"),
            ([(3, 1.0)], TypeError, "edits: got list"),
        ]:
            with pytest.raises(error, match=message):
                handle.set(edits)
            assert repr(handle) == before


def test_removed_is_removed(model, sae):
    handle = sf.steering(model, sae, EDITS)
    handle.remove()
    for use in (
        lambda: handle.set({3: 1.0}),
        lambda: handle.choose([0]),
        lambda: handle.prompt(1),
    ):
        with pytest.raises(RuntimeError, match=r"this steering of layers\.1 was removed"):
            use()
    with pytest.raises(RuntimeError, match="was removed; attach a new one"):
        with handle:
            pass


def clear(model):
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def clear_the_decoder(model):
    """Where the padding would go unnoticed."""
    model.model._forward_pre_hooks.clear()


def clear_what_looks_after_calls(model):
    model.model._forward_hooks.clear()


def replace(model):
    for module in model.modules():
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()


@pytest.mark.fault(86)
@pytest.mark.parametrize("lose", [clear, clear_the_decoder, clear_what_looks_after_calls, replace])
def test_hooks_that_somebody_removed_are_missed(make_phi3, sae, lose):
    lost = r"layers\.1: somebody removed hooks of this steering.*calls since then were not steered"
    model = make_phi3()
    before = hooks(model)
    with pytest.raises(RuntimeError, match=lost):
        with sf.steering(model, sae, EDITS):
            lose(model)
    handle = sf.steering(model, sae, EDITS)
    lose(model)
    for use in (lambda: handle.set(EDITS), handle.__enter__, handle.remove):
        with pytest.raises(RuntimeError, match=lost):
            use()
    handle.remove()
    assert hooks(model) == before


@pytest.mark.fault(86)
def test_an_error_in_the_body_comes_before_missed_hooks(make_phi3, sae):
    recipe = sf.Recipe([sf.Steering(sae, EDITS), sf.Steering(sae, {4: 1.0})])
    model = make_phi3()
    before = hooks(model)
    for attach in (lambda: sf.steering(model, sae, EDITS), lambda: recipe.attach(model)):
        with pytest.raises(ZeroDivisionError):
            with attach():
                clear(model)
                raise ZeroDivisionError
    handles = recipe.attach(model)
    clear(model)
    with pytest.raises(RuntimeError, match="somebody removed"):
        handles.remove()
    handles.remove()
    assert hooks(model) == before


def test_a_handle_does_not_keep_the_model(make_phi3, sae):
    model = make_phi3()
    handle, kept = sf.steering(model, sae, EDITS), weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None
    handle.remove()


def test_a_layer_outlives_its_decoder(make_phi3, sae):
    model = make_phi3()
    handle, layer = sf.steering(model, sae, EDITS), model.model.layers[1]
    del model
    gc.collect()
    handle.remove()
    assert not layer._forward_hooks


@pytest.mark.fault(87)
@pytest.mark.parametrize("scope", ["all", "generated"])
def test_a_thread_is_joined_before_the_steering_is_removed(make_phi3, sae, scope):
    """As where a streamer is read after the `with` block."""
    model = make_phi3()
    inside, go_on = threading.Event(), threading.Event()

    def wait(module, args, output):
        inside.set()
        assert go_on.wait(60)

    def generating():
        options = {"max_new_tokens": 3}
        thread = threading.Thread(target=model.generate, args=(PROMPT,), kwargs=options)
        thread.start()
        return thread

    foreign = model.model.layers[0].register_forward_hook(wait)
    with pytest.raises(RuntimeError, match=r"layers\.1: another thread is in the middle of a call"):
        with sf.steering(model, sae, EDITS, scope=scope):
            thread = generating()
            assert inside.wait(60)
    go_on.set()
    thread.join()
    foreign.remove()
    with sf.steering(model, sae, EDITS, scope=scope):
        generating().join()


@pytest.mark.fault(87)
def test_a_stream_that_was_read_to_its_end_is_over(make_phi3, sae):
    """generate returns a moment later."""
    model, ended = make_phi3(), threading.Event()

    class Streamer:
        def put(self, ids):
            pass

        def end(self):
            ended.set()

    options = {"max_new_tokens": 3, "streamer": Streamer()}
    for _ in range(20):
        ended.clear()
        with sf.steering(model, sae, EDITS, scope="generated"):
            thread = threading.Thread(target=model.generate, args=(PROMPT,), kwargs=options)
            thread.start()
            assert ended.wait(60)
        thread.join()


@pytest.mark.fault(88)
def test_a_layer_that_runs_several_times(make_sae):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, embedding_size=32, intermediate_size=48, num_attention_heads=4)
    config = transformers.AlbertConfig(vocab_size=64, num_hidden_layers=3, **sizes)
    model = transformers.AlbertModel(config).eval()
    with sf.steering(model, make_sae(hookpoint=None), EDITS, layer=0):
        with pytest.raises(RuntimeError, match="runs several times in a call of its decoder"):
            model(PROMPT)


@pytest.mark.fault(6)
def test_a_stream_whose_first_size_is_of_tokens(make_sae):
    """In a batch of as many rows as columns no shape tells."""
    transformers = pytest.importorskip("transformers")
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)
    with pytest.raises(ValueError, match=r"XLNetModel keeps its stream as \[T, B, d\]"):
        sf.steering(transformers.XLNetModel(config), make_sae(hookpoint=None), EDITS, layer=1)


def test_strengths_that_are_tensors_are_finite(model, sae):
    with pytest.raises(ValueError, match="edits: a strength is nan, which is not finite"):
        sf.steering(model, sae, {3: 1.0, 4: torch.tensor(float("nan"))})


def test_a_block_is_entered_once(model, sae):
    """Else the inner end would leave the outer block unsteered."""
    with sf.steering(model, sae, EDITS) as handle:
        with pytest.raises(RuntimeError, match=r"layers\.1 is in a `with` block already"):
            with handle:
                pass
        assert sf.steerings(model) == [handle]


@pytest.mark.fault(62)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_is_not_copied(model, sae, copied):
    """Its copy would remove the hooks of the original."""
    with sf.steering(model, sae, EDITS) as handle:
        with pytest.raises(TypeError, match="a Handle cannot be copied or pickled"):
            copied(handle)
        assert sf.steerings(model) == [handle]


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (-1, ValueError, "columns: got -1, the prompt's length is needed"),
        (3.5, TypeError, "columns: got 3.5, an integer or an int64 tensor"),
        (True, TypeError, "columns: got True"),
        ("5", TypeError, "columns: got '5'"),
        (None, TypeError, "columns: got None"),
        ([5], TypeError, r"columns: got \[5\]"),
        (torch.tensor(5), TypeError, r"columns: got torch.int64 \(\), an integer or"),
        (torch.tensor([5.0]), TypeError, r"columns: got torch.float32 \(1,\)"),
        (torch.tensor([5, -2]), ValueError, "columns: got -2"),
        (torch.tensor([5, 5]), ValueError, "prompt: 2 rows are given for a batch of 1"),
    ],
)
def test_a_prompt_is_told_by_its_length(model, sae, columns, error, message):
    with sf.steering(model, sae, EDITS, scope="generated") as handle:
        with pytest.raises(error, match=message), handle.prompt(columns):
            model(PROMPT)
        expected = model(PROMPT).logits
        with handle.prompt(np.int64(5)):
            assert torch.equal(model(PROMPT).logits, expected)
        with handle.prompt(0):
            nothing_was_asked = model(PROMPT).logits
    with sf.steering(model, sae, EDITS):
        assert torch.equal(model(PROMPT).logits, nothing_was_asked)


def test_prompts_are_told_one_after_the_other(model, sae):
    """Coroutines of one thread would be told of each other's."""
    with sf.steering(model, sae, EDITS, scope="generated") as handle:
        expected = model(PROMPT, use_cache=False).logits
        with handle.prompt(3):
            within = model(PROMPT).logits
            with pytest.raises(RuntimeError, match=r"inside of another `with handle\.prompt`"):
                with handle.prompt(5):
                    pass
            assert torch.equal(model(PROMPT).logits, within)
        assert torch.equal(model(PROMPT, use_cache=False).logits, expected)
        assert not torch.equal(within, expected)


@pytest.mark.fault(49)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_error_in_the_body(model, sae, error):
    before = hooks(model)
    with pytest.raises(error):
        with sf.steering(model, sae, EDITS):
            assert hooks(model) != before
            raise error
    assert hooks(model) == before


@pytest.mark.fault(49)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", [0, 2])
def test_error_in_the_model(model, sae, error, layer):
    """In a layer before the steered one, and after: the next call is as if nothing had happened."""

    def fail(module, args, output):
        raise error

    ids = torch.tensor([[0, 0, 5, 17], [8, 9, 5, 17]])
    mask = (ids != 0).long()
    with sf.steering(model, sae, EDITS), torch.no_grad():
        alone = model.model.layers[1](*layer_inputs(model, ids))
        expected = model(ids, attention_mask=mask).logits
        assert torch.equal(model.model.layers[1](*layer_inputs(model, ids)), alone)
        foreign = model.model.layers[layer].register_forward_hook(fail)
        with pytest.raises(error):
            model(ids, attention_mask=mask)
        foreign.remove()
        if error is RuntimeError:
            assert torch.equal(model.model.layers[1](*layer_inputs(model, ids)), alone)
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)


def layer_inputs(model, ids):
    embeds = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    return embeds, None, positions, None, False, model.model.rotary_emb(embeds, positions)


def test_attached_during_a_call(model, sae):
    """By another thread, or here by a hook: nothing has seen which tokens these are."""
    handles = []

    def attach(module, args, output):
        handles.append(sf.steering(model, sae, EDITS, scope="prompt"))

    foreign = model.model.layers[0].register_forward_hook(attach)
    with pytest.raises(
        ValueError, match=r"outside of its decoder, .* or where it was attached dur"
    ):
        model(PROMPT)
    foreign.remove()
    with torch.no_grad(), handles[0]:
        steered = model(PROMPT).logits
    assert not torch.equal(steered, model(PROMPT).logits)


@pytest.mark.fault(49, 50)
@pytest.mark.parametrize("failing", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_while_attaching(model, sae, monkeypatch, failing, error):
    def fail(*args, **options):
        raise error

    before = hooks(model)
    monkeypatch.setattr(model.model, failing, fail)
    with pytest.raises(error):
        sf.steering(model, sae, EDITS)
    assert hooks(model) == before
