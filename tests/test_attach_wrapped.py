"""sf.steering on models that other libraries changed: adapters, quantised or offloaded weights,
shards; and generations in which a second model drafts."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product

import pytest
import torch
from families import FAMILIES, build
from torch import nn

import saesteer_fast as sf

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")
EDITS = {3: 9.0, 77: -8.0}
IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 9]])
SCOPES = ["all", "generated"]


@pytest.fixture(scope="module")
def sae(make_sae):
    return make_sae()


@pytest.fixture
def model():
    return build(FAMILIES[0])


def generate(model, count=6, **options):
    return model.generate(
        input_ids=IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=count,
        do_sample=False,
        **options,
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@contextmanager
def textbook_hook(layer, textbook, sae, scope="all"):
    start = IDS.shape[1] if scope == "generated" else 0

    def hook(module, args, output):
        mask = (torch.arange(output.shape[1]) >= start).expand(output.shape[:2])
        return textbook(output, sae, EDITS, mask).to(output.dtype)

    handle = layer.register_forward_hook(hook)
    yield
    handle.remove()


# Adapters


@pytest.fixture
def peft():
    pytest.importorskip("accelerate")
    return pytest.importorskip("peft")


@pytest.fixture
def adapt(peft):
    """A LoRA that changes what the model says."""

    def adapted(model):
        config = peft.LoraConfig(
            r=4,
            target_modules=["qkv_proj", "down_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(3)
        return peft.get_peft_model(model, config).eval()

    return adapted


@pytest.fixture
def adapted_truth(adapt, textbook, sae):
    """What a steered model with the adapter says, by a plain hook and without a cache."""

    def truth(scope):
        model = adapt(build(FAMILIES[0]))
        with textbook_hook(model.get_base_model().model.layers[1], textbook, sae, scope):
            return generate(model, use_cache=False)

    return truth


@pytest.mark.parametrize("scope", SCOPES)
def test_an_adapter_around_a_steered_model(model, sae, adapt, adapted_truth, scope):
    with sf.steering(model, sae, EDITS, layer=1, scope=scope):
        adapted = adapt(model)
        assert torch.equal(generate(adapted), adapted_truth(scope))


@pytest.mark.fault(67)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_model_with_an_adapter(model, sae, adapt, adapted_truth, scope):
    expected, adapted = adapted_truth(scope), adapt(model)
    names = [1, "layers.1", "model.layers.1", "base_model.model.model.layers.1"]
    for layer in (*names, "blocks.1.hook_resid_post"):
        with sf.steering(adapted, sae, EDITS, layer=layer, scope=scope):
            assert torch.equal(generate(adapted), expected)
    with sf.steering(adapted, sae, EDITS, layer=1, scope=scope):
        adapted.merge_adapter()
        assert torch.equal(generate(adapted), expected)
        adapted.unmerge_adapter()
        assert torch.equal(generate(adapted), expected)
        with adapted.disable_adapter():
            assert not torch.equal(generate(adapted), expected)
        merged = adapted.merge_and_unload()
        assert torch.equal(generate(merged), expected)
    with sf.steering(merged, sae, EDITS, layer="base_model.model.model.layers.1", scope=scope):
        assert torch.equal(generate(merged), expected)


@pytest.mark.fault(73)
def test_an_adapter_around_the_steered_module(model, sae, adapt, textbook):
    name = "layers.1.mlp.down_proj"
    with sf.steering(model, sae, EDITS, layer=name):
        expected = generate(model)
        adapted = adapt(model)
        with pytest.raises(RuntimeError, match=rf"model: {name} is no longer the module"):
            generate(adapted)
        assert torch.equal(generate(adapted.unload()), expected)
    adapted = adapt(build(FAMILIES[0]))
    with textbook_hook(adapted.get_base_model().model.get_submodule(name), textbook, sae):
        expected = generate(adapted)
    with sf.steering(adapted, sae, EDITS, layer=name):
        assert torch.equal(generate(adapted), expected)


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.added = base, nn.Parameter(torch.tensor(0.5))

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs) + self.added


def wrap(model, name, wrapper):
    above, _, name = name.rpartition(".")
    above = model.model.get_submodule(above)
    setattr(above, name, wrapper(getattr(above, name)))


@pytest.mark.fault(73)
@pytest.mark.parametrize(
    ("name", "compiled"),
    [("layers.1", False), ("layers.1.mlp", False), ("layers.1.mlp.down_proj", True)],
)
def test_what_adds_to_the_steered_module(model, sae, textbook, name, compiled):
    if compiled:
        model.compile(backend="eager", fullgraph=True)
    with sf.steering(model, sae, EDITS, layer=name):
        logits(model)
        wrap(model, name, Adapter)
        with pytest.raises(RuntimeError, match="remove the steering and attach it again"):
            logits(model)
    with textbook_hook(model.model.get_submodule(name), textbook, sae):
        expected = logits(model)
    with sf.steering(model, sae, EDITS, layer=name):
        torch.testing.assert_close(logits(model), expected)


def test_what_adds_within_the_steered_module(model, sae, textbook):
    with sf.steering(model, sae, EDITS, layer="layers.1.mlp"):
        wrap(model, "layers.1.mlp.down_proj", Adapter)
        steered = logits(model)
    with textbook_hook(model.model.layers[1].mlp, textbook, sae):
        torch.testing.assert_close(steered, logits(model))


@pytest.mark.parametrize("name", ["layers.1", "layers.1.mlp", "layers.1.mlp.down_proj"])
def test_wrappers_that_add_nothing(model, sae, name):
    checkpoint = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    with sf.steering(model, sae, EDITS, layer=name):
        expected = logits(model)
        wrap(model, name, checkpoint.checkpoint_wrapper)
        assert torch.equal(logits(model), expected)
        wrap(model, "layers.1", partial(torch.compile, backend="eager"))
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_shift_the_prompt(model, sae, textbook, peft, kind):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = peft.get_peft_model(model, config).eval()
    with textbook_hook(model.model.layers[1], textbook, sae):
        expected = generate(adapted)
    with sf.steering(adapted, sae, EDITS, layer=1):
        assert torch.equal(generate(adapted), expected)
    with sf.steering(model, sae, EDITS, layer=1, scope="generated"):
        with pytest.raises(ValueError, match="scope: the decoder has 3 columns more than the"):
            generate(adapted)


@pytest.mark.fault(76)
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_leave_no_scope_but_all(model, sae, textbook, peft, kind):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = peft.get_peft_model(model, config).eval()
    with textbook_hook(model.model.layers[1], textbook, sae):
        expected = logits(adapted)
    with sf.steering(adapted, sae, EDITS, layer=1):
        torch.testing.assert_close(logits(adapted), expected)
    for scope in ("prompt", "generated", sf.positions(0), torch.ones(1, 7, dtype=torch.bool)):
        with pytest.raises(ValueError, match="scope: Phi3Model is given virtual tokens, which"):
            sf.steering(adapted, sae, EDITS, layer=1, scope=scope)
    with pytest.raises(ValueError, match="only scope 'all' of one configuration"):
        sf.steering(adapted, sae, EDITS, layer=1, when=sf.gate({3: 1.0}))


# Weights that are kept elsewhere, or in another form


@pytest.mark.fault(67)
@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_weights_that_accelerate_brings_for_a_call(model, sae, place, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    offloaded = build(FAMILIES[0])
    if place == "disk":
        parts = ["embed_tokens", "rotary_emb", "norm", "layers.0", "layers.2"]
        device_map = {f"model.{part}": "cpu" for part in parts}
        device_map |= {"lm_head": "cpu", "model.layers.1": "disk"}
        accelerate.dispatch_model(
            offloaded, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True
        )
    else:
        accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert next(offloaded.model.layers[1].parameters()).is_meta
    for layer in (1, 2, "layers.1.mlp", "layers.1.mlp.down_proj"):
        with sf.steering(model, sae, EDITS, layer=layer):
            expected = logits(model)
        with sf.steering(offloaded, sae, EDITS, layer=layer):
            assert torch.equal(logits(offloaded), expected)
    for scope in SCOPES:
        with sf.steering(model, sae, EDITS, layer=1, scope=scope):
            expected = generate(model)
        with sf.steering(offloaded, sae, EDITS, layer=1, scope=scope):
            assert torch.equal(generate(offloaded), expected)


@pytest.mark.filterwarnings("ignore")  # for what other quantisers come and go, this one is in torch
def test_quantised_linears(model, sae, textbook):
    """Their weights are packed integers, no parameters; the stream is what it was."""
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not torch.equal(logits(quantised), logits(model))
    for layer in ("layers.1", "layers.1.mlp", "layers.1.mlp.down_proj"):
        with textbook_hook(quantised.get_submodule(f"model.{layer}"), textbook, sae):
            expected = logits(quantised)
        with sf.steering(quantised, sae, EDITS, layer=layer):
            torch.testing.assert_close(logits(quantised), expected, atol=1e-3, rtol=1e-3)


# Shards


@pytest.fixture
def mesh():
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_parameters_that_are_sharded(model, sae, mesh):
    from torch.distributed.fsdp import fully_shard

    with sf.steering(model, sae, EDITS, layer=1):
        expected = logits(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with sf.steering(model, sae, EDITS, layer=1):
        assert torch.equal(logits(model), expected)
    wrapped = nn.parallel.DistributedDataParallel(build(FAMILIES[0]))
    for layer in (1, "model.layers.1", "module.model.layers.1"):
        with sf.steering(wrapped, sae, EDITS, layer=layer):
            assert torch.equal(logits(wrapped), expected)


@pytest.mark.fault(67)
def test_a_stream_that_is_sharded(model, sae, mesh):
    from torch.distributed.tensor import DTensor, Replicate

    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **options: DTensor.from_local(
        forward(*args, **options), mesh, [Replicate()]
    )
    with sf.steering(model, sae, EDITS, layer=1):
        with pytest.raises(TypeError, match=r"layers\.1 gives a DTensor, \(Replicate\(\),\); a"):
            logits(model)


# A second model, or a part of the first, that drafts what the first one confirms


@pytest.fixture
def draft():
    """Near enough to the model that some of its tokens are taken, and others are not."""
    draft = build(FAMILIES[0])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return draft


ASSISTED = {
    "all": {},
    "generated": {"scope": "generated"},
    "prompt": {"scope": "prompt"},
    "positions": {"scope": sf.positions(-1, 9, 12)},
    "gate": {"when": sf.gate({18: 1.0}, -5.0)},
    "gate, generated": {"when": sf.gate({18: 1.0}, -5.0), "scope": "generated"},
    "rows": {"edits": [EDITS]},
}


@pytest.mark.fault(59)
@pytest.mark.parametrize("name", ASSISTED)
@pytest.mark.parametrize("steered", ["model", "draft", "both"])
def test_a_second_model_that_drafts(model, draft, sae, name, steered):
    options = {"edits": EDITS, "layer": 1} | ASSISTED[name]
    counts = []
    model.model.register_forward_pre_hook(
        lambda m, a, k: counts.append(k["input_ids"].shape[1]), with_kwargs=True
    )
    plain = generate(model, 10)
    with nullcontext() if steered == "draft" else sf.steering(model, sae, **options):
        expected = generate(model, 10)
        with nullcontext() if steered == "model" else sf.steering(draft, sae, **options):
            counts.clear()
            assert torch.equal(generate(model, 10, assistant_model=draft), expected)
            taken = len(counts) < 10
            assert torch.equal(generate(model, 10), expected)
    assert taken and max(counts) > IDS.shape[1]
    assert torch.equal(expected, plain) == (steered == "draft")


@pytest.mark.parametrize(
    ("name", "layer"), [*product(ASSISTED, [0]), *product(["generated", "rows", "gate"], [2])]
)
def test_a_model_that_drafts_with_its_first_layers(model, sae, name, layer):
    """Of which the steered one may be none."""
    options = {"edits": EDITS, "layer": layer} | ASSISTED[name]
    plain = generate(model, 10)
    with sf.steering(model, sae, **options) as handle:
        expected = generate(model, 10)
        decided = handle.decisions if "when" in options else None
        assert torch.equal(generate(model, 10, assistant_early_exit=2), expected)
        assert decided is None or handle.decisions == decided
    assert not torch.equal(expected, plain)


@pytest.mark.fault(80)
@pytest.mark.parametrize("count", [1, 4, 12])
def test_guidance_has_a_prompt_of_its_own(model, sae, textbook, count):
    """Which may be longer than the one that is generated from."""
    options = {"guidance_scale": 1.5, "negative_prompt_ids": IDS.repeat(1, 2)[:, :count]}
    with textbook_hook(model.model.layers[1], textbook, sae):
        expected = generate(model, **options)
    with sf.steering(model, sae, EDITS, layer=1):
        assert torch.equal(generate(model, **options), expected)
    config = transformers.GenerationConfig(max_new_tokens=4, guidance_scale=1.5)
    with sf.steering(model, sae, EDITS, layer=1, scope="generated") as handle:
        generate(model, guidance_scale=1)
        for guided in (partial(generate, model, **options), partial(model.generate, IDS, config)):
            with pytest.raises(ValueError, match=r"scope: guidance_scale is 1.5, for which"):
                guided()
        handle.remove()
        guided()


@pytest.mark.fault(80)
def test_guidance_that_the_caller_brings(model, sae):
    guide = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model)
    with sf.steering(model, sae, EDITS, layer=1, scope="generated"):
        with pytest.raises(ValueError, match="or a second prompt, as of guidance, can only be"):
            generate(model, logits_processor=[guide])
        longer = lambda ids, scores: scores - model(IDS.repeat(1, 3)).logits[:, -1]  # noqa: E731
        with pytest.raises(ValueError, match="or a second prompt, as of guidance, can only be"):
            generate(model, logits_processor=[longer])
