"""Steering files: what they say is what is attached, and what is wrong in them is named."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
from pathlib import Path

import pytest
import torch

import saesteer_fast as sf
from saesteer_fast import mini
from saesteer_fast.cli import main
from saesteer_fast.conditions import POOLS
from saesteer_fast.edits import KINDS
from saesteer_fast.eval import answers, is_refusal
from saesteer_fast.mini import corpus
from saesteer_fast.plan import ERRORS
from saesteer_fast.recipe.document import __doc__ as DOCUMENTED
from saesteer_fast.weights import MEASURES

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
PROMPT = torch.tensor([[0, 17, 60, 2, 33], [9, 5, 71, 44, 8]])
MASK = [[True, False, True, True, False], [False, True, True, False, True]]
GATE = {"weights": {"88": 0.5, "103": -0.5}, "bias": -0.25, "threshold": 0.4, "pool": "mean"}

FULL = {
    "format": "saesteer-steering",
    "version": 1,
    "model": "org/name",
    "steerings": [
        {
            "sae": "layers.1",
            "layer": 2,
            "edits": {
                "both": {"3": 6.0, "5": {"kind": "add", "value": -2.5}},
                "one": {"5": {"kind": "add", "value": 1.0}},
                "none": {},
            },
            "rows": ["none", 0],
            "scope": [{"mask": MASK}, {"not_tokens": [71]}, {"positions": [0, -1, 2, 3]}, "prompt"],
            "when": {"active": {"3": -1.0, "7": 0.5}, "gate": GATE},
            "error": "drop",
            "measure": "topk",
            "impl": "reference",
        },
        {"sae": "layers.1", "layer": "layers.0", "edits": [{"1": 2.0}, {}], "scope": "all"},
        {"sae": "layers.1", "edits": {"3": {"kind": "at_most", "value": 1}}, "impl": "auto"},
    ],
}


@pytest.fixture(scope="module")
def sae(make_sae):
    return make_sae()


@pytest.fixture(scope="module")
def model(make_phi3):
    return make_phi3()


@pytest.fixture
def folder(tmp_path, sae):
    sae.save(tmp_path / "layers.1")
    return tmp_path


def written(folder: Path, document: object, name: str = "steering.json") -> Path:
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def one(**members) -> dict:
    """The document of one steering."""
    steering = {"sae": "layers.1", "edits": {"3": 6.0}} | members
    return {"format": "saesteer-steering", "version": 1, "steerings": [steering]}


@torch.inference_mode()
def logits(model):
    return model(PROMPT).logits


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


SAID = {
    "layer": ({"layer": 0}, {"layer": 0}),
    "module": ({"layer": "model.layers.2.mlp"}, {"layer": "model.layers.2.mlp"}),
    "kinds": (
        {
            "edits": {
                "3": 6,
                "4": {"kind": "set", "value": -1},
                "5": {"kind": "set_if_active", "value": 2.5},
                "6": {"kind": "add", "value": 0.5},
                "7": {"kind": "scale", "value": 3},
                "8": {"kind": "at_least", "value": 1.5},
                "9": {"kind": "at_most", "value": 0.25},
            }
        },
        {
            "edits": {
                3: 6,
                4: -1,
                5: sf.set_if_active(2.5),
                6: sf.add(0.5),
                7: sf.scale(3),
                8: sf.at_least(1.5),
                9: sf.at_most(0.25),
            }
        },
    ),
    "rows": ({"edits": [{"3": 6}, {"5": 2}]}, {"edits": [{3: 6}, {5: 2}]}),
    "table": (
        {"edits": {"a": {"3": 6}, "b": {"5": 2}}, "rows": ["b", 0]},
        {"edits": [{5: 2}, {3: 6}]},
    ),
    "generated": ({"scope": "generated", "layer": 0}, {"edits": {}}),
    "positions": (
        {"scope": {"positions": [1, -1]}},
        {"scope": torch.tensor([[False, True, False, False, True]] * 2)},
    ),
    "not_tokens": ({"scope": {"not_tokens": [60, 9]}}, {"scope": sf.not_tokens([60, 9])}),
    "mask": ({"scope": {"mask": MASK}}, {"scope": torch.tensor(MASK)}),
    "scopes": (
        {"scope": ["prompt", {"mask": MASK}, {"positions": [0]}]},
        {"scope": [torch.tensor(MASK), sf.positions(0)]},
    ),
    "active": ({"when": {"active": {"88": 15}}}, {"when": sf.active(88, 15)}),
    "gate": (
        {"when": {"gate": GATE}},
        {"when": sf.gate({88: 0.5, 103: -0.5}, -0.25, threshold=0.4, pool="mean")},
    ),
    "gate's file": (
        {"when": {"gate": "there/gate.json", "active": {"88": 15}}},
        {
            "when": [
                sf.gate({88: 0.5, 103: -0.5}, -0.25, threshold=0.4, pool="mean"),
                sf.active(88, 15),
            ]
        },
    ),
    "drop": ({"error": "drop"}, {"error": "drop"}),
    "projection": ({"measure": "projection"}, {"measure": "projection"}),
    "impl": ({"impl": "reference"}, {"impl": "reference"}),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_written_is_attached(folder, model, sae, name):
    members, meant = SAID[name]
    (folder / "there").mkdir()
    written(folder / "there", GATE, "gate.json")
    recipe = sf.load_steering(written(folder, one(**members)))
    recipe.save(folder / "again.json")
    again = sf.load_steering(folder / "again.json")
    assert again.steerings[0].edits == recipe.steerings[0].edits
    with recipe.attach(model) as (handle,):
        given = logits(model)
    with sf.steering(model, sae, **({"edits": {3: 6.0}} | meant)):
        assert torch.equal(logits(model), given)
    with again.attach(model):
        assert torch.equal(logits(model), given)
    assert torch.equal(logits(model), given) == (name == "generated")
    assert "removed" in repr(handle) and hooks(model) == 0


def test_steerings_act_in_order(folder, model, sae, textbook):
    """Two on one layer, one on another, against plain hooks."""
    document = one()
    document["steerings"] += [
        {"sae": "layers.1", "edits": {"3": 1.0}},
        {"sae": "./layers.1", "layer": 3, "edits": {"7": 4.0}},
    ]
    with sf.load_steering(written(folder, document)).attach(model) as handles:
        assert [handle.latents for handle in handles] == [[3], [3], [7]]
        assert sf.steerings(model) == list(handles)
        given = logits(model)

    def hook(*edits):
        def steered(_module, _args, out):
            for edit in edits:
                out = textbook(out, sae, edit).float()
            return out

        return steered

    layers = model.model.layers
    undo = [
        layers[1].register_forward_hook(hook({3: 6.0}, {3: 1.0})),
        layers[3].register_forward_hook(hook({7: 4.0})),
    ]
    torch.testing.assert_close(given, logits(model), atol=2e-4, rtol=1e-4)
    for handle in undo:
        handle.remove()
    assert (given - logits(model)).abs().max() > 0.1


def test_all_are_attached_or_none(folder, model, monkeypatch):
    document = one()
    document["steerings"] += [{"sae": "layers.1", "edits": {"5": 1}, "layer": 9}]
    with pytest.raises(ValueError, match=r"^steerings\[1\]\.layer: got 9, accepted are 0 to 3"):
        sf.load_steering(written(folder, document)).attach(model)
    assert hooks(model) == 0

    document["steerings"][1] |= {"layer": 2}
    recipe = sf.load_steering(written(folder, document))
    read = []
    monkeypatch.setattr(
        sf.SAE, "load", lambda path, load=sf.SAE.load: read.append(path) or load(path)
    )
    handles = recipe.attach(model)
    assert len(read) == 1 and hooks(model) > 0
    handles.remove()
    handles.remove()
    assert hooks(model) == 0 and sf.steerings(model) == []
    with pytest.raises(RuntimeError, match="was removed"), handles:
        pass
    with pytest.raises(ZeroDivisionError), recipe.attach(model):
        raise ZeroDivisionError
    assert hooks(model) == 0


def test_a_byte_order_mark_is_no_text(folder):
    (folder / "marked.json").write_bytes(json.dumps(one()).encode("utf-8-sig"))
    assert sf.load_steering(folder / "marked.json").steerings[0].edits == {
        3: sf.edits.Edit("set", 6.0)
    }


def test_paths_from_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    written(folder, GATE, "gate.json")
    written(folder, one(sae="~/layers.1", when={"gate": "~/gate.json"}))
    sf.load_steering("~/steering.json").save("~/again.json")
    for name in ("steering.json", "again.json"):
        (step,) = sf.load_steering(folder / name).steerings
        assert Path(step.sae).samefile(folder / "layers.1")


def test_saved_and_read_again(folder, tmp_path_factory):
    recipe = sf.load_steering(written(folder, FULL))
    recipe.save(folder / "again.json")
    meant = copy.deepcopy(FULL)
    meant["steerings"][1].pop("scope")
    meant["steerings"][2].pop("impl")
    assert json.loads((folder / "again.json").read_text()) == meant
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    sf.load_steering(folder / "again.json").save(elsewhere / "again.json")
    step = sf.load_steering(elsewhere / "again.json").steerings[0]
    assert Path(step.sae).samefile(folder / "layers.1")
    assert [path.name for path in elsewhere.iterdir()] == ["again.json"]


@pytest.mark.fault(46)
def test_a_file_in_a_linked_folder_names_the_same_sae(folder, sae, make_sae):
    (folder / "far" / "inner").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "far" / "inner")
    make_sae(seed=1).save(folder / "far" / "layers.1")
    sf.Recipe([sf.Steering(str(folder / "layers.1"), {3: 1.0})]).save(folder / "link" / "one.json")
    for path in (folder / "link" / "one.json", folder / "far" / "inner" / "one.json"):
        (step,) = sf.load_steering(path).steerings
        assert Path(step.sae).samefile(folder / "layers.1")


def test_a_path_is_never_taken_for_a_repository(folder, sae):
    sae.save(folder / "org/name")
    sf.Recipe([sf.Steering(str(folder / "org/name"), {3: 1.0})]).save(folder / "path.json")
    (step,) = json.loads((folder / "path.json").read_text())["steerings"]
    assert step["sae"] == "./org/name"


def test_a_folder_that_is_there_is_no_repository(folder, sae, monkeypatch, tmp_path_factory):
    sae.save(folder / "org/name")
    monkeypatch.chdir(folder)
    sf.Recipe([sf.Steering("org/name", {3: 1.0})]).save(folder / "path.json")
    written = json.loads((folder / "path.json").read_text())
    assert written["steerings"][0]["sae"] == "./org/name"
    written["steerings"][0]["sae"] = "org/name"
    (folder / "path.json").write_text(json.dumps(written))
    for here in (folder, tmp_path_factory.mktemp("elsewhere")):
        monkeypatch.chdir(here)
        (step,) = sf.load_steering(folder / "path.json").steerings
        assert Path(step.sae).samefile(folder / "org/name")


def test_what_a_program_makes_is_saved(folder):
    recipe = sf.Recipe(
        [
            sf.Steering(
                "org/name/layers.6",
                [{torch.tensor(3).item(): torch.tensor(2.5, requires_grad=True)}, {}],
                layer=torch.tensor(6).numpy()[()],
                rows=torch.tensor([1, 0]),
                when=[sf.active(5), sf.gate({3: torch.tensor(0.5).numpy()[()]})],
                measure="projection",
            )
        ]
    )
    recipe.save(folder / "made.json")
    (step,) = json.loads((folder / "made.json").read_text())["steerings"]
    assert step == {
        "sae": "org/name/layers.6",
        "layer": 6,
        "edits": [{"3": 2.5}, {}],
        "rows": [1, 0],
        "when": {
            "active": {"5": 0.0},
            "gate": {"weights": {"3": 0.5}, "bias": 0.0, "threshold": 0.5, "pool": "max"},
        },
        "measure": "projection",
    }
    assert sf.load_steering(folder / "made.json").steerings[0].sae == "org/name/layers.6"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda sae: sf.Steering(sae, {3: 1.0}), r"steerings\[0\]\.sae: lies in no file"),
        (
            lambda sae: sf.Steering("a/b", {3: 1.0}, when=sf.gate(lambda prompt: None)),
            r"steerings\[0\]\.when\.gate: is decided by a callable",
        ),
        (lambda sae: sf.Steering("a/b", {"7": {3: 1.0}}), r'edits\["7"\]'),
        (
            lambda sae: sf.Steering("a/b", {3: float("nan")}),
            "a number that is finite in fp32 is needed",
        ),
        (lambda sae: sf.Steering("a/b", {3: torch.tensor(float("inf"))}), r'edits\["3"\]: got Inf'),
    ],
)
def test_what_is_no_data_is_not_saved(tmp_path, sae, step, message):
    (tmp_path / "kept.json").write_text("before")
    with pytest.raises(ValueError, match=message):
        sf.Recipe([step(sae)]).save(tmp_path / "kept.json")
    assert (tmp_path / "kept.json").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, {}), TypeError, "sae: got int, an sf.SAE or a path is needed"),
        (("a/b", 3), TypeError, "edits: got int, a mapping or a list of mappings is needed"),
        (("a/b", {}, None, "promt"), ValueError, "scope: got 'promt', .* mean 'prompt'"),
        (("a/b", {}, 6, ["prompt", "generated"]), ValueError, "scope: got 'generated' and 'pr"),
    ],
)
def test_what_is_no_steering_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        sf.Steering(*arguments)


def test_a_save_that_fails_leaves_the_file(folder, monkeypatch):
    recipe = sf.load_steering(path := written(folder, one()))
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        recipe.save(path)
    assert path.read_bytes() == before
    assert {each.name for each in folder.iterdir()} == {path.name, "layers.1"}


def test_what_could_not_be_read_back_by_its_name_is_not_written(tmp_path):
    recipe = sf.Recipe([sf.Steering("a/b", {3: 1.0})])
    for name in ("steer.csv", "steer.yaml", "steer"):
        (tmp_path / name).write_text("before")
        with pytest.raises(ValueError, match=rf"path: got .*{name}, a name that ends in \.json"):
            recipe.save(tmp_path / name)
        assert (tmp_path / name).read_text() == "before"


WRONG = {
    "no JSON": ("{", "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "list": ([], r"json: got \[\], an object is needed"),
    "another format": ({"format": "x"}, 'format: got "x", "saesteer-steering" is needed'),
    "another version": (one() | {"version": 2}, "version: got 2, 1 is needed"),
    "true": (one() | {"version": True}, "version: got true"),
    "no version": ({"format": "saesteer-steering", "steerings": []}, "version: is missing"),
    "no steering": (one() | {"steerings": []}, r"steerings: got \[\], a list of steerings"),
    "unknown": (one() | {"modle": "x"}, "modle: got \"x\", no such key.*did you mean 'model'?"),
    "unknown inside": (one(layr=1), r"steerings\[0\]\.layr: got 1, .*did you mean 'layer'\?"),
    "no edits": (
        one() | {"steerings": [{"sae": "x"}]},
        r"steerings\[0\]\.edits: is missing",
    ),
    "kind": (
        one(edits={"511": {"kind": "at_mots", "value": 1}}),
        r'steerings\[0\]\.edits\["511"\]\.kind: got "at_mots", .*did you mean \'at_most\'\?',
    ),
    "no value": (one(edits={"5": {"kind": "add"}}), r'edits\["5"\]\.value: is missing; an edit'),
    "true value": (one(edits={"5": True}), r'edits\["5"\]: got true, a number is needed'),
    "huge value": (one(edits={"5": 10**300}), r'edits\["5"\]: got 1000.*\.\.\., .* fp32'),
    "latent": (one(edits={"05": 1.0, "6": 2.0}), r'edits\["05"\]: no latent'),
    "negative latent": (one(edits={"-1": 1.0}), r'edits\["-1"\]: no latent'),
    "number for a name": (one(edits={"-1": {"3": 1.0}}), r'edits\["-1"\]: no latent'),
    "signed number for a name": (one(edits={"+7": {"3": 1.0}}), r'edits\["\+7"\]: no latent'),
    "table of numbers": (one(edits={"on": 1.0}), r'edits\.on: no latent; latents are "0"'),
    "half a table": (
        one(edits={"on": {"3": 1.0}, "off": 1.0}),
        r"edits\.off: got 1.0, an object \{latent: edit\}",
    ),
    "table in table": (
        one(edits={"on": {"3": {"kind": "set", "value": 1}}, "5": {"3": 1}}),
        r"edits\.on: no latent",
    ),
    "scope": (one(scope="generate"), r"scope: got \"generate\", .*did you mean 'generated'\?"),
    "no token": (one(scope=["prompt", ["generated"]]), r"\[0\]\.scope: got 'generated' and 'pr"),
    "two scopes": (one(scope={"positions": [1], "mask": [[True]]}), "one of positions, not_tokens"),
    "position": (one(scope=[{"positions": [1.5]}]), r"scope\[0\]\.positions\[0\]: got 1.5, an int"),
    "huge position": (one(scope={"positions": [2**63]}), r"positions\[0\]: got 9223.*from -"),
    "token": (one(scope={"not_tokens": [-1]}), r"not_tokens\[0\]: got -1, an integer from 0"),
    "mask": (one(scope={"mask": [[True], [True, False]]}), "mask: rows of one length"),
    "mask of numbers": (one(scope={"mask": [[1]]}), r"mask\[0\]\[0\]: got 1, true or false"),
    "condition": (one(when={"activ": {"3": 1}}), r"when\.activ: .*did you mean 'active'\?"),
    "no condition": (one(when={}), r"when: got \{\}, active or gate is needed"),
    "no latent": (one(when={"active": {}}), r"when\.active: got \{\}, one latent or more"),
    "gate": (one(when={"gate": {"weights": {"3": 1}, "pool": "sum"}}), r"when\.gate\.pool: got"),
    "threshold": (
        one(when={"gate": {"weights": {"3": 1}, "threshold": 1}}),
        r"when\.gate\.threshold: got 1.0, a probability",
    ),
    "gate's file": (one(when={"gate": "no.json"}), r"when\.gate: gate: no file .*no\.json"),
    "gate's broken file": (
        one(when={"gate": "bad.json"}),
        r"when\.gate: gate: bad.json: not valid JSON",
    ),
    "error": (one(error="kept"), r"error: got \"kept\", accepted are keep, drop; did you mean"),
    "measure": (one(measure="projektion"), "did you mean 'projection'"),
    "layer": (one(layer=-1), "layer: got -1, an integer from 0"),
    "twice": ('{"format": "saesteer-steering", "format": "x"}', "format: is there twice"),
    "latent twice": (
        json.dumps(one()).replace('{"3": 6.0}', '{"3": 6.0, "3": 7.0}'),
        r'steerings\[0\]\.edits\["3"\]: is there twice',
    ),
    "NaN": (json.dumps(one(edits={"3": float("nan")})), r'edits\["3"\]: got NaN, a number'),
    "infinity": (json.dumps(one(edits={"3": float("-inf")})), r'edits\["3"\]: got -Infinity'),
    "overflow": (json.dumps(one()).replace("6.0", "1e999"), r'edits\["3"\]: got Infinity'),
    "digits": (json.dumps(one()).replace("6.0", "9" * 5000), "not valid JSON .*4300"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(tmp_path, name):
    document, message = WRONG[name]
    written(tmp_path, "{", "bad.json")
    path = written(tmp_path, document)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        sf.load_steering(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_files_that_are_none(folder):
    with pytest.raises(
        FileNotFoundError, match=r"path: no file .*stering.json; did you mean 'steer"
    ):
        written(folder, one())
        sf.load_steering(folder / "stering.json")
    with pytest.raises(
        ValueError, match=r"steering.yaml is no steering file; accepted are .json, "
    ):
        sf.load_steering(written(folder, one(), "steering.yaml"))
    with pytest.raises(ValueError, match=r"layers\.1 is a folder; accepted are files, \.json, "):
        sf.load_steering(folder / "layers.1")
    with pytest.raises(TypeError, match="path: got dict, the path of a steering file is needed"):
        sf.load_steering({})
    with pytest.raises(FileNotFoundError, match=r"no file .*layers\.2$"):
        sf.load_steering(folder / "layers.2")
    with pytest.raises(FileNotFoundError, match=r"^path: no folder .*none to write a.json into"):
        sf.load_steering(written(folder, one())).save(folder / "none" / "a.json")
    (folder / "latin.json").write_bytes(json.dumps(one(), ensure_ascii=False).encode("utf-16"))
    with pytest.raises(ValueError, match=r"latin\.json: not valid JSON"):
        sf.load_steering(folder / "latin.json")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"sae": "layers.7"}, r"^steerings\[0\]\.sae: path: no folder .*did you mean 'layers.1'"),
        ({"sae": "a\0b"}, r"^steerings\[0\]\.sae: path: no folder"),
        ({"sae": "../nowhere/layers.1"}, r"^steerings\[0\]\.sae: path: no folder"),
        ({"edits": {"128": 1}}, r"^steerings\[0\]\.edits: latent 128 is not among 0 to 127"),
        ({"rows": ["a"]}, r"^steerings\[0\]\.rows: edits is one configuration"),
        ({"edits": {"no": {}}, "rows": ["n"]}, r"^steerings\[0\]\.rows: no configuration 'n'"),
        ({"measure": "relu"}, r"^steerings\[0\]\.measure: got 'relu', accepted are topk, proj"),
        ({"when": {"active": {"200": 1}}}, r"^steerings\[0\]\.when: latent 200"),
        (
            {"sae": "narrow", "layer": 1},
            r"^steerings\[0\]\.sae: is for width 16, .*layers.1 is 32 wide",
        ),
        ({"layer": "layers.9"}, r"^steerings\[0\]\.layer: Phi3ForCausalLM has no module"),
    ],
)
def test_what_does_not_fit_is_named(folder, model, make_sae, members, message, monkeypatch):
    make_sae(d=16).save(folder / "narrow")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = written(folder, one(**members))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sf.load_steering(path).attach(model)
    assert hooks(model) == 0
    model.config.save_pretrained(folder / "model")
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(path), "--model", str(folder / "model")])
    assert str(stopped.value).startswith("saesteer check: steerings[0].")


def places(value, path=()):
    """Every place in a document."""
    yield path
    if not isinstance(value, (dict, list)):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from places(inner, (*path, key))


def changed(document, path, change):
    document = copy.deepcopy(document)
    if not path:
        return change(document)
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = change(owner[path[-1]])
    return document


SMALL = copy.deepcopy(FULL)
SMALL["steerings"] = SMALL["steerings"][:1]
SMALL["steerings"][0] |= {"edits": {"a": {"3": 6.0, "5": {"kind": "add", "value": 1}}}}
SMALL["steerings"][0]["scope"] = [
    "all",
    {"mask": [[True]]},
    {"not_tokens": [7]},
    {"positions": [0]},
]
VALUES = [None, True, "x", "", -1, 1.5, 2.0, 2**63, 1e39, [], {}, [[]], ["x"], {"5": 1}]
VALUES += [{"positions": [0], "not_tokens": [1]}]
KEYS = ("5", "05", "x", "+7", "mask")


def mutants():
    """SMALL with one thing in it replaced, added or gone."""
    yield SMALL
    for path in places(SMALL):
        for value in VALUES:
            yield changed(SMALL, path, lambda _, value=value: value)
        for key in keys(SMALL, path):
            yield changed(SMALL, path, lambda old, key=key: {k: old[k] for k in old if k != key})
        for key in KEYS if keys(SMALL, path) else ():
            yield changed(SMALL, path, lambda old, key=key: old | {key: 1})


def keys(document, path):
    for key in path:
        document = document[key]
    return list(document) if isinstance(document, dict) else []


def test_every_argument_can_be_written():
    schema = json.loads((ROOT / "saesteer_fast/recipe/schema.json").read_text())
    arguments = set(inspect.signature(sf.steering).parameters) - {"model"}
    assert arguments == set(schema["$defs"]["steering"]["properties"])
    assert arguments == {"sae", "edits", *sf.Steering("", {}).arguments()}


def test_every_choice_can_be_written(make_sae):
    defined = json.loads((ROOT / "saesteer_fast/recipe/schema.json").read_text())["$defs"]
    steering = defined["steering"]["properties"]
    assert defined["edit"]["anyOf"][1]["properties"]["kind"]["enum"] == list(KINDS)
    assert defined["gate"]["properties"]["pool"]["enum"] == list(POOLS)
    assert steering["measure"]["enum"] == [*MEASURES, "projection"]
    assert steering["error"]["enum"] == list(ERRORS)
    with pytest.raises(ValueError, match=f"accepted are {', '.join(steering['impl']['enum'])}$"):
        sf.steer(torch.zeros(1, 32), make_sae(), {0: 1.0}, impl="x")


def test_schema_and_reader_agree(tmp_path):
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    schema = json.loads((ROOT / "saesteer_fast/recipe/schema.json").read_text())
    validator.check_schema(schema)
    valid, counts = validator(schema).is_valid, {True: 0, False: 0}
    for document in mutants():
        try:
            sf.load_steering(written(tmp_path, document))
            accepted = True
        except FileNotFoundError:  # the gate's file, of which a schema knows nothing
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == valid(document), document
        counts[accepted] += 1
    assert min(counts.values()) > 30, counts


def test_check_prints_the_plan(folder, model, capsys):
    model.config.save_pretrained(folder / "model")
    document = copy.deepcopy(FULL)
    document["steerings"][0]["sae"] = str(folder / "layers.1")
    path = written(folder, document)
    main(["check", str(path), "--model", str(folder / "model")])
    first, second, third = capsys.readouterr().out.split("steerings[")[1:]
    for line in (
        "module   layers.2, a Phi3DecoderLayer of Phi3ForCausalLM\n",
        f"SAE      {folder / 'layers.1'}, sparsify: N=128, d=32, topk, k=8, float32\n",
        "edits    both: latent 3: set(6), |direction| 1; set, error dropped\n",
        "edits    both: latent 5: add(-2.5), |direction| 1; ",
        "edits    none: none\n",
        "rows     none, 0\n",
        "scope    a mask [2, 5], 6 in it and tokens that are not 71 and positions 0, -1, 2, 3 and "
        "prompt tokens; never padding\n",
        "on tokens with latent 3 > -1 and latent 7 > 0.5; after prompts that a gate lets through: ",
        "error    dropped",
        "impl     reference\n",
    ):
        assert line in first, first
    assert "edits    1: none\n" in second and "rows     0, 1\n" in second
    assert "module   layers.1 (the SAE's hookpoint), a" in third
    assert "when     always" in third


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({}, "set, error kept: SAELens"),
        ({"edits": {"3": {"kind": "set_if_active", "value": -3}}}, "set where it fires: Farrell"),
        ({"edits": {"3": {"kind": "at_least", "value": 3}}}, "minimum clamp: AxBench"),
        ({"measure": "projection"}, "clamp of the projection: lm-eval"),
        ({"error": "drop"}, "set, error dropped"),
        ({"edits": {"3": {"kind": "scale", "value": 3}}}, "no clamp with a name"),
        (
            {"edits": {"3": {"kind": "add", "value": 3}}, "measure": "projection"},
            "addition: lm-eval",
        ),
    ],
)
def test_check_names_the_clamp(folder, members, told, capsys):
    main(["check", str(written(folder, one(**members)))])
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("members", "kept"),
    [
        # W_enc and b_enc of 128 latents, or the direction that is both; its direction and
        # index, strength and kind.
        ({}, 4 * 128 * 33 + 4 * 32 + 8 + 4 + 1),
        ({"measure": "projection"}, 4 * 33 + 8 + 4 + 1),
        ({"edits": {"3": {"kind": "add", "value": 1}}}, 4 * 32 + 8 + 4 + 1),
        # A condition's directions, indices; the encoder is shared.
        ({"when": {"active": {"5": 1}}}, 4 * 128 * 33 + 2 * (4 * 32 + 8) + 4 + 1),
        # The whole SAE, and b_enc folded.
        ({"error": "drop"}, 4 * (128 * 65 + 32) + 4 * 128 + 4 * 32 + 8 + 4 + 1),
    ],
)
def test_check_counts_memory(folder, members, kept, capsys):
    main(["check", str(written(folder, one(**members)))])
    assert f"memory   {kept / 1e3:.3g} kB on the module's device" in capsys.readouterr().out


def test_check_tells_each_direction(folder, make_sae, capsys):
    sae = make_sae(hookpoint="layers.0")
    sae.W_dec[5] *= 3
    sae.save(folder / "layers.0")
    main(["check", str(written(folder, one(sae="layers.0", edits={"3": 1, "5": 1})))])
    out = capsys.readouterr().out
    assert "latent 3: set(1), |direction| 1;" in out and "latent 5: set(1), |direction| 3;" in out


def test_check_of_a_table_out_of_which_requests_choose(folder, model, capsys):
    path = written(folder, one(edits={"default": {}, "strong": {"3": 6}}))
    main(["check", str(path)])
    assert "rows     each request names a configuration" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^steerings\[0\]\.rows: needed to choose among"):
        sf.load_steering(path).attach(model)


def test_a_recipe_is_of_steerings(sae):
    with pytest.raises(ValueError, match="steerings: there are none, so nothing would be steered"):
        sf.Recipe([])
    step = sf.Steering(sae, {3: 1.0})
    with pytest.raises(TypeError, match=r"steerings: got Steering, a list of sf\.Steering is"):
        sf.Recipe(step)
    with pytest.raises(TypeError, match=r"steerings\[1\]: got dict, an sf.Steering is needed"):
        sf.Recipe([step, {}])


def test_check_sees_that_nothing_would_be_steered(folder, make_sae, capsys):
    sae = make_sae(hookpoint="layers.0")
    sae.W_dec[3] = 0
    sae.save(folder / "layers.0")
    with pytest.raises(SystemExit, match=r"steerings\[0\]\.edits: latent 3 has the direction 0"):
        main(["check", str(written(folder, one(sae="layers.0")))])


def test_check_sees_that_nothing_tells_the_prompt(folder, capsys):
    transformers = pytest.importorskip("transformers")
    transformers.T5Config(
        d_model=32, d_ff=32, num_heads=2, num_layers=3, num_decoder_layers=3
    ).save_pretrained(folder / "t5")
    main(["check", str(written(folder, one())), "--model", str(folder / "t5")])
    path = str(written(folder, one(scope="generated")))
    with pytest.raises(SystemExit, match=r"steerings\[0\]\.scope: T5Stack decodes what an enc"):
        main(["check", path, "--model", str(folder / "t5")])


def test_check_makes_no_weights_of_the_model(folder, model, capsys):
    config = copy.deepcopy(model.config)
    config.intermediate_size = 2**45  # of which no machine could hold them
    config.save_pretrained(folder / "model")
    main(["check", str(written(folder, one())), "--model", str(folder / "model")])
    assert "a Phi3DecoderLayer" in capsys.readouterr().out


def test_check_needs_a_layer(folder, sae):
    sae.save(folder / "plain")
    with pytest.raises(SystemExit, match=r"steerings\[0\]\.layer: none is given, and the SAE"):
        main(["check", str(written(folder, one(sae="plain")))])


def test_check_needs_a_model_that_is_there(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "empty").mkdir()
    with pytest.raises(SystemExit, match="saesteer check: model: "):
        main(["check", str(written(folder, one())), "--model", str(folder / "empty")])
    config = {"model_type": "llama", "hidden_size": "wide"}
    (folder / "empty" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="saesteer check: model: "):
        main(["check", str(written(folder, one())), "--model", str(folder / "empty")])
    with pytest.raises(SystemExit, match="saesteer check: path: no file"):
        main(["check", str(folder / "none.json")])


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ((ROOT / "docs" / "usage.md").read_text(), r"```json\n(.*?)```"),
        (DOCUMENTED, r"^(    \{\n.*?^    \})"),
    ],
    ids=["usage", "document"],
)
def test_documented_files_are_read(tmp_path, text, pattern):
    (example,) = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    (step,) = sf.load_steering(written(tmp_path, example)).steerings
    assert 22373 in step.edits


@pytest.fixture(scope="module")
def shipped():
    return mini.load()


def test_example_refuses(shipped, capsys):
    """The example steers the miniature from complying to refusing."""
    path = ROOT / "examples/refuse.json"
    main(["check", str(path), "--model", str(mini.ASSETS)])
    assert "module   layers.5, a Phi3DecoderLayer" in capsys.readouterr().out
    prompts = [p for p in corpus.prompts("test") if p.kind == "unsafe"][:24]
    plain = answers(shipped.model, shipped.tokenizer, prompts)
    with sf.load_steering(path).attach(shipped.model):
        steered = answers(shipped.model, shipped.tokenizer, prompts)
    assert sum(map(is_refusal, steered)) == len(prompts) > sum(map(is_refusal, plain))


def test_what_cannot_be_entered_is_removed(model, sae):
    handles = sf.Recipe([sf.Steering(sae, {3: 1.0}), sf.Steering(sae, {9: 1.0})]).attach(model)
    handles[1].remove()
    with pytest.raises(RuntimeError, match="was removed"), handles:
        pass
    assert hooks(model) == 0


@pytest.mark.parametrize("edits", ["219", b"ab", [1], [{}, 3]])
def test_edits_of_another_kind_are_named(edits):
    with pytest.raises(TypeError, match=r"edits: got .*, a mapping or a list of mappings"):
        sf.Steering("layers.6", edits)
