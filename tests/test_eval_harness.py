"""lm-evaluation-harness on a steered model: what it scores and generates is steered."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch

import saesteer_fast as sf
from saesteer_fast import mini
from saesteer_fast.eval import chat_text
from saesteer_fast.mini import corpus

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
from lm_eval.models.huggingface import HFLM  # noqa: E402

from saesteer_fast.eval.harness import SteeredHF  # noqa: E402

EDITS = {219: 24.4}
ANSWERS = (" I'm sorry, but I can't help with that.", " It is blue.", " Yes")


@pytest.fixture(scope="module")
def shipped():
    return mini.load()


@pytest.fixture(scope="module")
def asked(shipped) -> list[str]:
    """Prompts of different lengths, so that batches are padded."""
    found = {}
    for prompt in corpus.prompts("test"):
        text = chat_text(shipped.tokenizer, prompt)
        found.setdefault(len(shipped.tokenizer(text).input_ids), text)
    return [found[length] for length in sorted(found)][:6]


@pytest.fixture
def tasks(asked, tmp_path, monkeypatch):
    """One that scores given answers, and one that generates."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [json.dumps({"text": text, "choices": ANSWERS, "gold": 1}) for text in asked]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "asked.jsonl")}},
        "test_split": "test",
        "doc_to_text": "text",
        "target_delimiter": "",
    }
    scored = {"task": "scored", "output_type": "multiple_choice", "doc_to_choice": "choices"}
    generated = {"task": "generated", "output_type": "generate_until", "doc_to_target": "gold"}
    generated["generation_kwargs"] = {"max_gen_toks": 12, "until": ["\0"], "do_sample": False}
    return {
        "scored": common | scored | {"doc_to_target": "gold"},
        "generated": common | generated,
    }


def recipe(sae, **arguments) -> sf.Recipe:
    return sf.Recipe([sf.Steering(sae, **({"edits": EDITS, "layer": 5} | arguments))])


def answers(lm, task: dict) -> list:
    """What the harness got for each prompt."""
    found = lm_eval.simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


@contextmanager
def plainly(shipped, textbook):
    """The dense formula in a plain hook, on every token."""

    def steer(module, args, output):
        return textbook(output, shipped.sae, EDITS).to(output.dtype)

    hook = shipped.model.model.layers[5].register_forward_hook(steer)
    yield
    hook.remove()


@torch.no_grad()
def score(shipped, text: str, answer: str) -> float:
    """The answer's log-probability, one sequence at a time."""
    context, whole = (shipped.tokenizer(t).input_ids for t in (text, text + answer))
    logits = shipped.model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logits[i - 1, whole[i]].item() for i in range(len(context), len(whole)))


def test_given_answers_are_scored_steered(shipped, asked, tasks, textbook):
    lm = SteeredHF(shipped.model, recipe(shipped.sae), tokenizer=shipped.tokenizer, batch_size=4)
    found = answers(lm, tasks["scored"])
    for handle in lm.handles:
        handle.remove()
    with plainly(shipped, textbook):
        wanted = [[score(shipped, text, answer) for answer in ANSWERS] for text in asked]
    unsteered = [[score(shipped, text, answer) for answer in ANSWERS] for text in asked]
    got = torch.tensor([[value for value, _ in row] for row in found])
    torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-4, atol=1e-3)
    assert (got - torch.tensor(unsteered)).abs().max() > 1


@pytest.mark.parametrize("scope, batch_size", [("all", 4), ("generated", 4), ("generated", "auto")])
def test_generated_answers_are_steered(shipped, asked, tasks, scope, batch_size):
    steering = recipe(shipped.sae, scope=scope)
    options = {"tokenizer": shipped.tokenizer, "batch_size": batch_size, "max_batch_size": 4}
    lm = SteeredHF(shipped.model, steering, **options)
    found = [row[0] for row in answers(lm, tasks["generated"])]
    lm.handles.remove()
    with steering.attach(shipped.model):
        wanted = [generate(shipped, text) for text in asked]
    assert found == wanted
    assert found != [generate(shipped, text) for text in asked]


def generate(shipped, text: str) -> str:
    ids = shipped.tokenizer(text, return_tensors="pt").input_ids
    made = shipped.model.generate(ids, max_new_tokens=12, do_sample=False)
    return shipped.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_file_is_read_and_the_model_loaded_by_name(tasks, tmp_path, shipped, textbook, asked):
    recipe(str(mini.ASSETS / "layers.5")).save(tmp_path / "refuse.json")
    arguments = {"pretrained": str(mini.ASSETS), "steering": str(tmp_path / "refuse.json")}
    found = lm_eval.simple_evaluate(
        model="saesteer",
        model_args=arguments | {"device": "cpu", "dtype": "float32"},
        tasks=[tasks["scored"]],
        limit=1,
        bootstrap_iters=0,
        log_samples=True,
    )
    (value, _), *_ = found["samples"]["scored"][0]["filtered_resps"]
    with plainly(shipped, textbook):
        assert value == pytest.approx(score(shipped, asked[0], ANSWERS[0]), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(
    "arguments, place",
    [
        ({"scope": "generated"}, "scope"),
        ({"scope": [sf.not_tokens([1]), "prompt"]}, "scope"),
        ({"scope": sf.positions(0, -1)}, "scope"),
        ({"when": sf.gate({30: 0.8}, -2.0)}, "when"),
    ],
)
def test_what_depends_on_prompts_is_refused_where_answers_are_given(
    shipped, tasks, arguments, place
):
    lm = SteeredHF(shipped.model, recipe(shipped.sae, **arguments), tokenizer=shipped.tokenizer)
    with lm.handles, pytest.raises(ValueError, match=rf"steerings\[0\]\.{place} depends on where"):
        answers(lm, tasks["scored"])


@pytest.mark.parametrize(
    "arguments, place",
    [
        ({"edits": [EDITS, {}]}, "edits"),
        ({"edits": {"on": EDITS, "off": {}}, "rows": ["on"]}, "rows"),
        ({"scope": torch.ones(1, 3, dtype=torch.bool)}, "scope"),
    ],
)
def test_what_names_rows_is_refused(shipped, arguments, place):
    with pytest.raises(ValueError, match=rf"steerings\[0\]\.{place}: the harness makes its own"):
        SteeredHF(shipped.model, recipe(shipped.sae, **arguments), tokenizer=shipped.tokenizer)


def test_answers_of_another_steering_are_not_taken(shipped, tasks, tmp_path):
    lm = SteeredHF(shipped.model, recipe(shipped.sae), tokenizer=shipped.tokenizer)
    with lm.handles, pytest.raises(ValueError, match="use_cache: answers are kept by the question"):
        lm_eval.simple_evaluate(
            model=lm, tasks=[tasks["scored"]], use_cache=str(tmp_path / "answers")
        )


def test_nothing_is_left_on_a_model_that_cannot_be_steered(shipped):
    with pytest.raises(ValueError, match=r"steerings\[0\]\.layer"):
        SteeredHF(shipped.model, recipe(shipped.sae, layer=99), tokenizer=shipped.tokenizer)
    assert not shipped.model.model.layers[5]._forward_hooks
    HFLM(shipped.model, tokenizer=shipped.tokenizer)
