"""Which module a layer's number or name means, in models of every build."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, SIZES, TOKENS, build
from torch import nn

import saesteer_fast as sf
from saesteer_fast import sites

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")
BY_NAME = {family.name: family for family in FAMILIES}


def located(model, layer):
    return sites.locate(model, layer).module


@pytest.mark.parametrize(
    "name",
    [
        "layers.1",
        "model.layers.1",
        "model.model.layers.1",
        "base_model.model.model.layers.1",
        "module.model.layers.1",
        "_orig_mod.model.layers.1",
        "model._orig_mod.layers.1",
        "blocks.1.hook_resid_post",
        "blocks.2.hook_resid_pre",
    ],
)
@pytest.mark.parametrize("wrapper", ["none", "compiled", "another module"])
def test_spellings_of_a_layer(make_phi3, name, wrapper):
    model = make_phi3()
    layer = model.model.layers[1]
    if wrapper == "compiled":
        model = torch.compile(model, backend="eager")
    elif wrapper == "another module":
        model = nn.ModuleDict({"model": model})
    if name == "model.model.layers.1" and wrapper != "another module":
        with pytest.raises(
            ValueError, match=r"has no module .*; did you mean '.*model\.layers\.1'"
        ):
            located(model, name)
    else:
        assert located(model, name) is layer


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("GPT-2", ["h.1", "transformer.h.1", "layers.1"]),
        ("OPT", ["layers.1", "decoder.layers.1", "model.decoder.layers.1"]),
        ("MPT", ["blocks.1", "transformer.blocks.1", "blocks.1.hook_resid_post"]),
        ("LLaVA", ["layers.1", "language_model.layers.1", "model.language_model.layers.1"]),
    ],
)
def test_spellings_of_a_family(family, names):
    model = build(BY_NAME[family])
    for name in (1, *names):
        assert located(model, name) is model.get_submodule(BY_NAME[family].layer)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("Gemma 3, multimodal", "model.vision_tower.encoder.layers.1"),
        ("LLaVA", "vision_tower.encoder.layers.1"),
        ("Qwen2-VL", "visual.blocks.1"),
        ("LLaVA", "model"),
    ],
)
def test_no_module_outside_of_the_language_decoder(family, name):
    with pytest.raises(ValueError, match=f"layer: '{name}' is no module inside the language deco"):
        located(build(BY_NAME[family]), name)


@pytest.mark.parametrize("name", ["encoder.layers.1", "blocks.1", "h.1"])
def test_a_towers_own_names_are_unknown(name):
    with pytest.raises(ValueError, match="has no module"):
        located(build(BY_NAME["LLaVA"]), name)


def lists(**lengths):
    return nn.ModuleDict(
        {name: nn.ModuleList(nn.Linear(4, 4) for _ in range(n)) for name, n in lengths.items()}
    )


def test_ambiguous_lists_are_named():
    with pytest.raises(ValueError, match="ModuleDict has several lists of layers: layers, norms;"):
        located(lists(layers=2, norms=2), 1)
    model = lists(layers=2, norms=2)
    assert located(model, "norms.1") is model["norms"][1]
    model.config = transformers.LlamaConfig(num_hidden_layers=3)
    model["blocks"] = lists(inner=3)
    assert located(model, 1) is model["blocks"]["inner"][1]


def test_a_name_of_two_modules_is_refused(make_phi3):
    model = make_phi3()
    model.norm = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="layer: 'norm' is the name of several modules; give a lo"):
        located(model, "norm")
    assert located(model, "model.norm") is model.model.norm


def test_a_module_may_be_called_as_wrappers_call_theirs():
    model = lists(layers=3)
    model["layers"][1].module = nn.Sequential(nn.Linear(4, 4))
    assert located(model, "layers.1.module.0") is model["layers"][1].module[0]


@pytest.mark.parametrize("told_by", ["the decoder", "the model"])
def test_the_width_is_told_by_the_decoder_or_by_the_model(make_phi3, make_sae, told_by):
    if told_by == "the decoder":
        model = nn.ModuleDict({"inner": make_phi3()})
    else:
        model = nn.ModuleDict({"inner": lists(layers=3)})
        model.config = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"sae: is for width 16, layers\.1 is 32 wide"):
        sf.steering(model, make_sae(d=16), {3: 6.0}, layer=1)


def test_experts_inside_a_layer_are_no_layers():
    model = lists(layers=3)
    for layer in model["layers"]:
        layer.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    assert located(model, 1) is model["layers"][1]


def test_a_vision_model_and_a_language_model_side_by_side(make_phi3):
    vision = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=8,
            patch_size=4,
        )
    )
    language = make_phi3()
    both = nn.ModuleDict({"vision": vision, "language": language})
    assert located(both, 1) is language.model.layers[1]
    both["draft"] = make_phi3()
    with pytest.raises(ValueError, match="holds several: language, draft; steer one of them"):
        located(both, 1)


def test_a_decoder_that_is_called_otherwise():
    """ModernBERT's head is its `decoder`; an encoder may have other lengths than its decoder."""
    kind = transformers.ModernBertDecoderForCausalLM
    model = kind(kind.config_class(**SIZES, **TOKENS))
    assert located(model, 1) is model.model.layers[1]
    kind = transformers.BartForConditionalGeneration
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = kind.config_class(encoder_layers=2, decoder_layers=3, **sizes, **heads)
    model = kind(config)
    assert located(model, 2) is model.model.decoder.layers[2]


def test_one_module_in_several_places():
    model = lists(layers=3)
    model["layers"][2] = model["layers"][0]
    with pytest.raises(ValueError, match=r"one module in several places: layers\.0, layers\.2"):
        located(model, 0)
    assert located(model, 1) is model["layers"][1]


def test_the_last_layer_is_steered_before_the_final_norm(make_phi3, make_sae, textbook):
    model, sae, seen = make_phi3(), make_sae(), []
    ids = torch.tensor([[5, 17, 60, 2]])
    layer = model.model.layers[3]
    with torch.no_grad():
        layer.register_forward_hook(lambda m, a, o: seen.append(o))
        model(ids)
        with sf.steering(model, sae, {3: 6.0}, layer=3):
            shown = model(ids, output_hidden_states=True).hidden_states[4]
    truth = textbook(seen[0], sae, {3: 6.0})
    torch.testing.assert_close(seen[1].double(), truth, atol=1e-4, rtol=0)
    torch.testing.assert_close(shown, model.model.norm(truth.float()), atol=1e-4, rtol=0)


class Quantised(nn.Module):
    """As GPTQ keeps its weights: integers, which are no parameters, and their scales."""

    def __init__(self, scale):
        super().__init__()
        self.register_buffer("weight", torch.randint(-9, 9, (32, 32), dtype=torch.int8))
        self.register_buffer("scale", torch.full((32,), 0.01, dtype=scale))

    def forward(self, x):
        return x @ (self.weight * self.scale).to(x.dtype)


@pytest.mark.parametrize("scale", [torch.float32, torch.float16])
def test_quantised_weights(make_sae, textbook, scale):
    sae, x = make_sae(), torch.randn(2, 3, 32)
    model = nn.Sequential(nn.Linear(32, 32), Quantised(scale))
    with torch.no_grad():
        expected = textbook(model(x), sae, {3: 6.0})
        with sf.steering(model, sae, {3: 6.0}, layer="1"):
            torch.testing.assert_close(model(x).double(), expected, atol=1e-4, rtol=0)


def test_the_device_is_that_of_the_steered_module_even_without_parameters():
    model = nn.Sequential(nn.Linear(32, 32), Quantised(torch.float32))
    model[1].to("meta")
    assert sites.device(sites.locate(model, "0")) == torch.device("cpu")
    with pytest.raises(ValueError, match="model: 1 is on meta"):
        sites.device(sites.locate(model, "1"))


def test_double_precision_is_seen_behind_integers():
    model = nn.Sequential(Quantised(torch.float64))
    with pytest.raises(TypeError, match=r"model: 0 is torch\.float64"):
        sites.device(sites.locate(model, "0"))


def test_a_buffer_of_double_precision_is_no_stream():
    model = nn.Sequential(nn.Linear(32, 32))
    model[0].register_buffer("scale", torch.ones(1, dtype=torch.float64))
    assert sites.device(sites.locate(model, "0")) == torch.device("cpu")


def test_a_layer_whose_own_weights_accelerate_brings():
    accelerate = pytest.importorskip("accelerate")
    model = lists(layers=2)
    accelerate.cpu_offload(model["layers"][1], execution_device=torch.device("cpu"))
    assert model["layers"][1].weight.is_meta
    assert sites.device(sites.locate(model, 1)) == torch.device("cpu")


def test_a_wrapper_that_hides_the_model_it_tells_of(make_phi3):
    """TransformerLens' TransformerBridge has it in no module."""

    class Bridge(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.hidden = [model]

        def get_decoder(self):
            return self.hidden[0].model

        def can_generate(self):
            return True

    model = make_phi3()
    bridge = Bridge(model)
    for layer in (1, "layers.1", "blocks.1.hook_resid_post"):
        assert located(bridge, layer) is model.model.layers[1]
    assert located(bridge, "layers.1.mlp") is model.model.layers[1].mlp
    with pytest.raises(ValueError, match=r"Bridge has no module 'layer\.1', .* mean 'layers\.1'"):
        located(bridge, "layer.1")


def test_what_holds_a_model_is_told(make_phi3):
    class Pipeline:
        model = make_phi3()

    with pytest.raises(
        TypeError, match=r"model: got Pipeline, a torch\.nn\.Module is needed; its "
    ):
        located(Pipeline(), 1)


@pytest.mark.filterwarnings("error")
def test_an_sae_of_another_layer(make_phi3, make_sae):
    model, sae = make_phi3(), make_sae(hookpoint="blocks.2.hook_resid_pre")
    for layer in (None, 1, "layers.1", "layers.2.mlp"):
        sf.steering(model, sae, {3: 1.0}, layer=layer).remove()
    sf.steering(build(BY_NAME["MPT"]), make_sae(), {3: 1.0}, layer=1).remove()  # its blocks.1
    part = make_sae(hookpoint="layers.1.mlp")  # of a layer, which names none
    sf.steering(model, part, {3: 1.0}, layer=2).remove()
    with pytest.warns(UserWarning, match="layer: layers.2 is steered by an SAE of blocks.2.hook_r"):
        sf.steering(model, sae, {3: 1.0}, layer=2).remove()
    with pytest.warns(UserWarning, match="edits: name no latent, so nothing is steered"):
        sf.steering(model, sae, {}).remove()
