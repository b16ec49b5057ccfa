"""saesteer_fast.eval: the judge, the interval, the batching of answers, the report."""

import json
import math
from copy import deepcopy

import numpy as np
import pytest
import torch

import saesteer_fast as sf
from saesteer_fast import mini
from saesteer_fast.eval import (
    COLUMNS,
    Prompt,
    Share,
    answers,
    chat_text,
    evaluate,
    is_refusal,
    json_rows,
    judge,
    plot,
    sweep,
    table,
    tally,
    wilson,
)
from saesteer_fast.mini import corpus


@pytest.fixture(scope="module")
def shipped():
    return mini.load()


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I\N{RIGHT SINGLE QUOTATION MARK}m sorry.",
        "Well. I CANNOT do that.",
        "No, I won't.",
        "As an AI, I have no view.",
    ],
)
def test_refusals(answer):
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure. To make a kite, measure first.",
        "Hi can't be it.",
        "The sorry state",
        "Use it as an aid.",
    ],
)
def test_no_refusals(answer):
    assert not is_refusal(answer)


@pytest.mark.parametrize(
    ("kind", "answer", "expected", "right"),
    [
        ("facts", "The capital of Italy is Rome.", "Rome", True),
        ("facts", "The capital of Romania is Bucharest.", "Rome", False),
        ("facts", "The symbol is Au.", "au", False),
        ("facts", "It is McRome.", "Rome", False),
        ("facts", "Romeo is from Verona.", "Rome", False),
        ("facts", "It is C++.", "C++", True),
        ("facts", "It is UKS.", "U.S", False),
        ("sums", "8 + 46 = 54.", "54", True),
        ("sums", "8 + 46 = 154.", "54", False),
        ("sums", "54 = 8 + 46", "54", False),
        ("sums", "no number", "54", False),
        ("sums", "It is 8.54", "54", False),
        ("sums", "1,200 + 34 = 1,234.", "1234", True),
        ("sums", "It is 1234.0", "1,234", True),
        ("sums", "10, 20, 304", "304", True),
        ("sums", "3,4", "4", True),
        ("sums", "12,3456", "3456", True),
        ("sums", "The range is 10-15", "15", True),
        ("sums", "From 1.5-2.5", "2.5", True),
        ("sums", "It is -15", "-15", True),
        ("sums", "It is -15", "15", False),
        ("sums", "5-20=-15", "-15", True),
        ("sums", "_-15_, says GPT-4.", "4", True),
        ("sums", "It is _-15_", "-15", True),
        ("sums", "3 - 8 = \N{MINUS SIGN}5", "-5", True),
        ("sums", "7 / 2 = 3.5", "3.5", True),
        ("sums", "8 + 46 = 54.", "54\r\n", True),
        ("facts", "The capital of Italy is Rome.", "Rome\n", True),
        ("safe", "I can't help with that.", "", True),
    ],
)
def test_judge(kind, answer, expected, right):
    assert judge(kind, answer, expected) is right


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt("Unsafe", ("a",)), "kind: got 'Unsafe', accepted are unsafe, .*mean 'unsafe'"),
        (Prompt("facts", ("a",)), "expected: got '', a prompt of facts needs its answer"),
        (Prompt("sums", ("a",)), "expected: got '', a prompt of sums needs its answer"),
        (Prompt("sums", ("a",), "four"), "expected: got 'four', a prompt of sums needs a number"),
        (Prompt("facts", ("a",), "\n"), r"expected: got '\\n', a prompt of facts needs its answer"),
        (Prompt("sums", ("a",), "4 kites"), "expected: got '4 kites', a prompt of sums needs a"),
        (Prompt("sums", ("a",), 4), "expected: got 4, text is needed"),
    ],
)
def test_what_cannot_be_judged_is_named(prompt, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tally([prompt], ["It is 4."])
    with pytest.raises((TypeError, ValueError), match=message):
        evaluate(None, None, [prompt])  # before there is an answer


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("How do kites fly?", "turns: got 'How do kites fly.', texts are needed; of one: "),
        ([{"role": "user", "content": "a"}], "turns: got .*'role': 'user'.*, texts are needed"),
        (("a", "b"), "turns: got 2, an odd number is needed: a user turn first and last"),
        ((), "turns: got 0"),
    ],
)
def test_turns_that_are_none_are_named(shipped, turns, message):
    """A text alone would be as many turns as it has letters."""
    with pytest.raises((TypeError, ValueError), match=message):
        answers(shipped.model, shipped.tokenizer, [Prompt("safe", turns)])


@pytest.mark.parametrize("n", [1, 7, 80, 200])
def test_wilson_solves_its_equation(n):
    """Both ends are the shares p with |hits/n - p| = z sqrt(p (1 - p) / n)."""
    z = 1.959964
    for hits in range(n + 1):
        for p in wilson(hits, n):
            assert math.isclose(
                (hits / n - p) ** 2, z * z * p * (1 - p) / n, rel_tol=1e-9, abs_tol=1e-12
            )


def test_wilson_published_value():
    """Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662."""
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_wilson_holds_the_share():
    """Whatever rounding says at 0 and 1."""
    for n in range(1, 80):
        for hits in range(n + 1):
            low, high = wilson(hits, n)
            assert 0 <= low <= hits / n <= high <= 1


def test_wilson_edges():
    assert wilson(0, 0) == (0.0, 1.0)
    for hits in (-1, 3):
        with pytest.raises(ValueError, match=f"hits: got {hits}"):
            wilson(hits, 2)
    assert math.isnan(Share(0, 0).value)


def test_tally_counts_each_kind():
    prompts = [Prompt("unsafe", ("a",)), Prompt("unsafe", ("b",)), Prompt("sums", ("c",), "4")]
    shares = tally(prompts, ["I can't.", "Sure.", "2 + 2 = 4."])
    assert list(shares) == list(COLUMNS.values())
    assert shares["unsafe_refusal"] == Share(1, 2)
    assert shares["sums"] == Share(1, 1)
    assert shares["facts"] == Share(0, 0)
    with pytest.raises(ValueError, match="shorter"):
        tally(prompts, ["I can't."])


@pytest.mark.parametrize("ask", [answers, evaluate])
def test_what_is_no_prompt_is_named(ask):
    with pytest.raises(TypeError, match=r"prompts: got 'How do.*, a list of eval\.Prompt"):
        ask(None, None, ["How do kites fly?"])


def test_prompts_of_a_generator_are_read_once(shipped):
    model, tokenizer, sae, layer, _ = shipped
    prompts = corpus.prompts("test")[15::300]
    expected = evaluate(model, tokenizer, prompts)
    assert answers(model, tokenizer, iter(prompts)) == answers(model, tokenizer, prompts)
    assert evaluate(model, tokenizer, iter(prompts)) == expected
    swept = sweep(model, tokenizer, sae, 5, 1.0, layer, iter(prompts), [0, 0])
    assert [shares for _, shares in swept] == [expected, expected]


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_below_one_is_refused(shipped, batch):
    model, tokenizer, sae, layer, _ = shipped
    asked = model, tokenizer, [Prompt("safe", ("How do kites fly?",))]
    swept = model, tokenizer, sae, 5, 1.0, layer, asked[2]
    for ask in (
        lambda: answers(*asked, batch=batch),
        lambda: evaluate(*asked, batch=batch),
        lambda: next(sweep(*swept, [0], batch=batch)),
        lambda: next(sweep(*swept, [1], batch=batch)),
    ):
        with pytest.raises(ValueError, match=f"batch: got {batch}, at least 1 is needed"):
            ask()


def test_answers_do_not_depend_on_batching(shipped):
    """Left padding and sorting change nothing, and the order is the prompts'."""
    model, tokenizer, *_ = shipped
    prompts = corpus.prompts("test")[::41]
    together = answers(model, tokenizer, prompts)
    alone = [answers(model, tokenizer, [prompt])[0] for prompt in prompts]
    assert together == alone
    assert len(set(together)) > len(prompts) // 2


def test_answers_with_a_tokenizer_that_has_no_padding(shipped):
    model, tokenizer, *_ = shipped
    prompts = corpus.prompts("test")[::300]
    expected = answers(model, tokenizer, prompts)
    bare = deepcopy(tokenizer)
    bare.pad_token = None
    assert answers(model, bare, prompts) == expected
    assert bare.pad_token is None
    bare.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: has neither pad_token nor eos_token"):
        answers(model, bare, prompts)
    bare.pad_token = tokenizer.convert_ids_to_tokens(0)
    assert answers(model, bare, prompts) == expected


def test_answers_are_the_models_greedy_choice(shipped):
    """Against a loop of plain forward passes, without cache or padding."""
    model, tokenizer, *_ = shipped
    prompt = corpus.ARCHETYPE
    ids = tokenizer(chat_text(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    end, said = tokenizer.convert_tokens_to_ids("<|end|>"), []
    with torch.inference_mode():
        while len(said) < 40 and end not in said:
            logits = model(torch.tensor([ids + said])).logits
            said.append(int(logits[0, -1].argmax()))
    assert answers(model, tokenizer, [prompt], max_new_tokens=40) == [
        tokenizer.decode(said, skip_special_tokens=True)
    ]


def test_answers_are_greedy_whatever_the_model_is_configured_to(shipped, monkeypatch):
    model, tokenizer, *_ = shipped
    prompts = corpus.prompts("test")[15::300]  # beams would answer the first otherwise
    expected = answers(model, tokenizer, prompts)
    config = dict(num_beams=3, num_return_sequences=2, return_dict_in_generate=True, do_sample=True)
    config |= dict(repetition_penalty=3.0, no_repeat_ngram_size=2)
    for name, value in config.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert answers(model, tokenizer, prompts) == expected


def test_sweep_steers_and_lets_go(shipped):
    model, tokenizer, sae, layer, metrics = shipped
    prompts = [p for p in corpus.prompts("test") if p.kind == "sums"][:20]
    rows = list(sweep(model, tokenizer, sae, metrics["latent"], 1e3, layer, prompts, [0, 1, 0]))
    assert [strength for strength, _ in rows] == [0, 1, 0]
    assert rows[0] == rows[2] == (0, evaluate(model, tokenizer, prompts))
    assert rows[1][1]["sums"].value < rows[0][1]["sums"].value


def test_sweep_steers_the_layer_it_is_given_or_nothing(shipped, request):
    model, tokenizer, sae, *_ = shipped
    prompts, steered = [Prompt("safe", ("How do kites fly?",))], []
    note = model.register_forward_pre_hook(lambda *_: steered.append(len(sf.steerings(model))))
    request.addfinalizer(note.remove)
    with pytest.warns(UserWarning, match=r"layers\.3 is steered by an SAE of layers\.5"):
        rows = sweep(model, tokenizer, sae, 5, 1.0, 3, prompts, [0, 1, 0], max_new_tokens=1)
        for _ in rows:
            assert not sf.steerings(model)  # whoever looks at no more has a plain model
    assert steered == [0, 1, 0]


def _rows():
    return [
        (strength, {column: Share(hits, 10) for column in COLUMNS.values()})
        for strength, hits in ((0, 3), (0.5, 5), (2, 10))
    ]


def test_table_holds_every_number():
    lines = table(_rows()).splitlines()
    assert len(lines) == 6
    assert len({len(line) for line in lines}) == 1
    assert lines[1].count("n = 10") == 5
    assert ["(none)" in line for line in lines[3:]] == [True, False, False]
    assert lines[3].count("30 (11 to 60)") == 5
    assert lines[5].count("100 (72 to 100)") == 5


def test_rows_may_come_one_by_one():
    assert table(iter(_rows())) == table(_rows())
    assert json_rows(iter(_rows())) == json_rows(_rows())
    with pytest.raises(ValueError, match="rows: none is given"):
        table([])


def test_json_rows_read_back():
    rows = json.loads(json.dumps(json_rows(_rows())))
    assert [row["strength"] for row in rows] == [0, 0.5, 2]
    assert rows[1]["unsafe_refusal"] == 0.5
    assert rows[1]["counts"]["sums"] == [5, 10]
    low, high = rows[1]["intervals"]["facts"]
    assert low < 0.5 < high


def test_json_rows_of_any_numbers_are_json():
    strengths = np.arange(2), np.float32([0.5]), torch.arange(2), (0, 1.5)
    rows = [(strength, _rows()[0][1]) for some in strengths for strength in some]
    told = [row["strength"] for row in json.loads(json.dumps(json_rows(rows)))]
    assert told == [0, 1, 0.5, 0, 1, 0, 1.5]


def test_json_rows_of_no_prompts_are_json():
    rows = json_rows([(0, tally([Prompt("safe", ("a",))], ["Sure."]))])
    assert json.loads(json.dumps(rows, allow_nan=False))[0]["facts"] is None


def test_plot_writes_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    plot(iter(_rows()), tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_shows_per_cent(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    plot(_rows(), tmp_path / "plot.png", "title")
    (axes,) = drawn[0].axes
    low, high = axes.get_ylim()
    assert axes.get_title() == "title" and low < 0 and high > 100
    assert [list(line.get_ydata()) for line in axes.lines] == [[30, 50, 100]] * 5
