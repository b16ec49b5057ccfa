"""What following a generation must leave alone: copies, threads, wrappers, others' changes."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

import saesteer_fast as sf

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")
EDITS = {3: 40.0, 77: -30.0}
IDS = torch.tensor([[7, 8, 9, 5, 17, 60]])
FOLLOWING = {
    "scope": {"scope": "generated"},
    "gate": {"when": sf.gate({1: 1.0}, 5.0), "scope": ["generated", sf.not_tokens([1])]},
    "rows": {"edits": [EDITS]},
}


@pytest.fixture
def model(make_phi3):
    return make_phi3()


def steering(model, sae, name):
    return sf.steering(model, sae, **({"edits": EDITS} | FOLLOWING[name]))


def generate(model, ids=IDS, **options):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, **options
    )


@pytest.mark.fault(62)
@pytest.mark.parametrize("name", FOLLOWING)
def test_copies_follow_their_own_generation(model, sae, name):
    plain = generate(model)
    with steering(model, sae, name) as handle:
        steered = generate(model)
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        handle.set([{3: 0.0, 77: 0.0}] if name == "rows" else {3: 0.0, 77: 0.0})
        assert not torch.equal(generate(model), steered)
    assert torch.equal(generate(model), plain) and not torch.equal(steered, plain)
    for twin in twins:
        assert twin.generate.model is twin
        assert torch.equal(generate(twin), steered)


@pytest.mark.fault(62)
@pytest.mark.parametrize("name", FOLLOWING)
def test_saved_weights_are_unsteered(model, sae, name, tmp_path):
    with steering(model, sae, name):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(generate(again), generate(model))


def test_generate_looks_like_itself(model, sae):
    before = inspect.signature(model.generate)
    with steering(model, sae, "scope"):
        assert inspect.signature(model.generate) == before
    assert "generate" not in vars(model)


def test_only_those_who_must_follow_it(model, sae):
    with sf.steering(model, sae, EDITS), sf.steering(model, sae, EDITS, when=sf.active(3)):
        assert "generate" not in vars(model)


@pytest.mark.fault(52)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_several_at_once(model, sae, order):
    plain = generate(model)
    handles = [steering(model, sae, "scope"), sf.steering(model, sae, {5: 40.0}, scope="prompt")]
    both = generate(model)
    handles[order[0]].remove()
    left = generate(model)
    with sf.steering(model, sae, {9: 0.0}, scope="generated"):
        generate(model)
    assert torch.equal(generate(model), left)
    handles[order[1]].remove()
    assert torch.equal(generate(model), plain)
    assert len({tuple(ids[0].tolist()) for ids in (plain, both, left)}) == 3


def test_removing_one_leaves_the_other_told(model, sae):
    with sf.steering(model, sae, EDITS, scope="generated"):
        expected = generate(model, use_cache=False)
        sf.steering(model, sae, {5: 4.0}, scope="prompt").remove()
        assert torch.equal(generate(model, use_cache=False), expected)


def test_text_does_not_tell_how_long_it_is(model, sae):
    with sf.steering(model, sae, EDITS, scope="generated"):
        with pytest.raises(ValueError, match=r"scope: generate is given a str, .* give their ids"):
            model.generate("Hello")


def test_a_decoder_alone_does_not_know_who_generates(model, sae):
    """The model around it may, without a cache or in chunks: what is called onto a cache is taken
    for generated, all else for prompts."""
    with pytest.warns(UserWarning, match="scope: Phi3Model has no generate that says where"):
        with sf.steering(model.model, sae, EDITS, scope="generated"):
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sf.steering(model, sae, EDITS, scope="generated"):
            pass
        with sf.steering(model.model, sae, EDITS, scope=sf.positions(0)):
            pass


@pytest.mark.fault(51)
def test_someone_elses_generate_is_called_and_kept(model, sae):
    calls, own = [], model.generate

    def noted(*args, **options):
        calls.append(1)
        return own(*args, **options)

    expected = generate(model)
    model.generate = noted
    with sf.steering(model, sae, {3: 0.0}, scope=sf.positions(99)):
        assert torch.equal(generate(model), expected)
    assert model.generate is noted and calls == [1]


class Wrapper(nn.Module):
    """As adapters wrap models: its own generate calls the inner one."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = model, model.config

    def forward(self, *args, **options):
        return self.base_model(*args, **options)

    def generate(self, *args, **options):
        return self.base_model.generate(*args, **options)


@pytest.mark.fault(67)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 2}])
def test_a_model_inside_another(model, sae, options):
    with steering(model, sae, "scope"):
        expected = generate(model)
    wrapper = Wrapper(model)
    with sf.steering(wrapper, sae, EDITS, scope="generated", layer="model.layers.1"):
        assert torch.equal(generate(wrapper, **options), expected)
        assert torch.equal(generate(model, **options), expected)
    assert "generate" not in vars(model) and "generate" not in vars(wrapper)


@pytest.mark.fault(49)
@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_generate(model, sae, name, error):
    calls = []

    def fail(module, args, output):
        calls.append(1)
        if len(calls) == 3:
            raise error

    with steering(model, sae, name):
        expected = generate(model)
        hook = model.model.layers[2].register_forward_hook(fail)
        with pytest.raises(error):
            generate(model)
        hook.remove()
        assert torch.equal(generate(model), expected)
        with torch.no_grad():  # outside of generate, a call without a cache is a prompt
            again = model(IDS).logits
    with torch.no_grad():
        assert torch.equal(again, model(IDS).logits) == (name != "rows")


@pytest.mark.fault(64)
def test_threads_have_their_own_prompts(model, sae):
    prompts = [IDS, IDS[:, :2], IDS[:, 1:5]]
    with steering(model, sae, "scope"):
        expected = [generate(model, ids) for ids in prompts]
        found, start = {}, threading.Barrier(len(prompts), timeout=60)

        def run(turn):
            start.wait()
            found[turn] = [generate(model, prompts[turn]) for _ in range(3)]

        threads = [threading.Thread(target=run, args=(turn,)) for turn in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for turn, ids in enumerate(expected):
        assert all(torch.equal(again, ids) for again in found[turn])


def test_decisions_of_another_thread_can_be_read(model, sae):
    with steering(model, sae, "gate") as handle:
        thread = threading.Thread(target=generate, args=(model,))
        thread.start()
        thread.join()
        assert [decision.on for decision in handle.decisions] == [True]


@pytest.mark.fault(61)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FOLLOWING)
def test_dtype_of_the_model_may_change_later(make_phi3, sae, name, dtype):
    changed, model = make_phi3(), make_phi3().to(dtype)
    with steering(changed, sae, name), steering(model, sae, name):
        changed.to(dtype)
        assert torch.equal(generate(changed), generate(model))


@pytest.mark.fault(72)
@pytest.mark.parametrize(
    ("edits", "options"),
    [
        (EDITS, {}),
        ({3: sf.scale(2.0), 5: sf.at_least(1.0)}, {}),
        (EDITS, {"measure": "projection"}),
        (EDITS, {"error": "drop"}),
        (EDITS, {"when": [sf.active(20), sf.gate({20: 1.0}, -0.1)]}),
        ([EDITS], {"scope": "prompt"}),
    ],
)
def test_autocast(make_phi3, make_sae, edits, options):
    """Sums stay fp32, attached inside or outside; x has the dtype that autocast gives it."""
    outputs = []
    for attach_inside in (True, False):
        model = make_phi3()
        layer = model.model.layers[1]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=attach_inside):
            handle = sf.steering(model, make_sae(), edits, **options)
        seen = []
        layer.register_forward_hook(lambda m, a, o, seen=seen: seen.append(o))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(IDS)
            handle.remove()
            model(IDS)
        steered, x = seen
        assert steered.dtype == x.dtype and not torch.equal(steered, x)
        outputs.append(steered)
        if "when" not in options:
            plain = {key: value for key, value in options.items() if key != "scope"}
            assert torch.equal(steered, sf.steer(x, make_sae(), edits, **plain))
    assert torch.equal(*outputs)


FORK = """
import os, torch, saesteer_fast as sf
torch.manual_seed(0)
W, b, zero = torch.randn(512, 64), torch.randn(512), torch.zeros(64)
sae = sf.SAE(W_enc=W, b_enc=b, W_dec=W, b_dec=zero, k=8)
x = torch.randn(256, 64)
expected = sf.steer(x, sae, {3: 2.0})
pid = os.fork()
if pid == 0:
    same = torch.equal(sf.steer(x[:1], sae, {3: 2.0}), expected[:1])
    os._exit(0 if same else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


@pytest.mark.fault(66)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_steers_too():
    """Few tokens, as in a worker of a data loader, after the parent used its threads."""
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)


def test_continuous_batching(make_phi3, sae):
    """Requests are packed into a row: all of their tokens are steered, or none comes out."""
    model, prompts = make_phi3(), [[5, 17, 60, 2], [33, 8], [9, 44, 51, 7, 7, 12]]
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("this transformers has no continuous batching")
    options = {
        "generation_config": transformers.GenerationConfig(max_new_tokens=6, eos_token_id=-1),
        "continuous_batching_config": transformers.ContinuousBatchingConfig(
            num_blocks=4, block_size=32, max_batch_tokens=32
        ),
    }
    unsteered = model.generate_batch(prompts, **options)
    with sf.steering(model, sae, EDITS, layer=1):
        found = model.generate_batch(prompts, **options)
        wanted = [
            model.generate(torch.tensor([ids]), max_new_tokens=6)[0, len(ids) :] for ids in prompts
        ]
    found, unsteered = ([o.generated_tokens for o in out.values()] for out in (found, unsteered))
    assert found == [ids.tolist() for ids in wanted] != unsteered
    with sf.steering(model, sae, EDITS, layer=1, scope="generated"):
        refused = model.generate_batch(prompts, **options)
    assert all("packed in a row" in o.error and not o.generated_tokens for o in refused.values())
