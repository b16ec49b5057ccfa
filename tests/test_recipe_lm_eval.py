"""steer_path files of lm-evaluation-harness: its formulas, or a refusal."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

import saesteer_fast as sf
from saesteer_fast.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = torch.tensor([[5, 17, 60, 2, 33], [9, 5, 71, 44, 8]])
HEAD = (
    "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,"
    "head_index,sae_id,description,"
)


@pytest.fixture(scope="module")
def model(make_phi3):
    return make_phi3()


@pytest.fixture
def saes(tmp_path, make_sae, monkeypatch):
    """In the working directory: saes/layers.1, saes/layers.2 and other/deep/one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = {
        "saes/layers.1": make_sae(seed=1, hookpoint=None),
        "saes/layers.2": make_sae(seed=2, hookpoint=None),
        "other/deep/one": make_sae(seed=3, hookpoint="layers.1"),
    }
    for place, sae in made.items():
        # The harness adds W_dec[f] as it is, whatever its length.
        sae.W_dec.mul_(1.7)
        sae.save(place, "saelens" if "deep" in place else "sparsify")
    return made


def written(*rows: str, head: str = HEAD) -> Path:
    """A .csv file in another folder than the working directory."""
    path = Path("files/steer.csv")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def added(x, v, c):
    return x + c * v


def clamped(x, v, c, b=0):
    """Its component along v, seen from b, becomes c."""
    unit = v / v.norm()
    return x + (c - (x - b) @ unit)[..., None] * unit


@torch.inference_mode()
def logits(model, changes=()):
    """With each (module's name, function of its output in fp64) applied by a plain hook."""
    handles = []
    for name, change in changes:

        def hook(_module, _args, out, change=change):
            return change(out.double()).float()

        handles.append(model.base_model.get_submodule(name).register_forward_hook(hook))
    try:
        return model(PROMPT).logits
    finally:
        for handle in handles:
            handle.remove()


def agree(recipe, model, *changes):
    with recipe.attach(model):
        given = logits(model)
    expected = logits(model, changes)
    # fp32 sums of 32 terms, through at most two layers.
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits(model)).abs().max() > 0.1


def row(sae, latent):
    return sae.W_dec[latent].double()


def test_the_documented_example(saes, model):
    """With its empty cells and the comma at the end of each line."""
    path = written("sparsify,add,saes,layers.1,30,10.0,,,,")
    v = row(saes["saes/layers.1"], 30)
    agree(sf.load_steering(path), model, ("layers.1", lambda x: added(x, v, 10)))


def test_clamp_is_one_of_the_projection(saes, model):
    sae = saes["saes/layers.2"]
    path = written("sparsify,clamp,saes,layers.2,7,-4.5,,,,")
    recipe = sf.load_steering(path)
    v, b = row(sae, 7), sae.b_dec.double()
    agree(recipe, model, ("layers.2", lambda x: clamped(x, v, -4.5, b)))
    assert recipe.steerings[0].measure == "projection"


def test_several_rows_on_one_layer(saes, model):
    """All are added, of one SAE or two; the harness keeps the last."""
    one, two, three = saes.values()
    path = written(
        "sparsify,add,saes,layers.1,30,10.0,,,,",
        "sparsify,clamp,saes,layers.2,3,6,,,,",
        'sae_lens,add,other,layers.1,5,3,,deep/one,"commas, in it",',
        "sparsify,add,saes,layers.1,0,-7,,,,",
        "sae_lens,add,other,,6,2,,deep/one,the SAE's own hookpoint,",
    )
    recipe = sf.load_steering(path)
    assert [len(step.edits) for step in recipe.steerings] == [2, 1, 2]
    sums = 10 * row(one, 30) - 7 * row(one, 0) + 3 * row(three, 5) + 2 * row(three, 6)
    agree(
        recipe,
        model,
        ("layers.1", lambda x: x + sums),
        ("layers.2", lambda x: clamped(x, row(two, 3), 6, two.b_dec.double())),
    )


def test_one_sae_on_two_layers(saes, model):
    """Without sae_id, sparse_model is the SAE's own folder."""
    path = written(
        "sae_lens,add,other,layers.1,5,3,,deep/one,,",
        "sae_lens,add,other/deep/one,layers.2,6,2,,,,",
    )
    three = saes["other/deep/one"]
    agree(
        sf.load_steering(path),
        model,
        ("layers.1", lambda x: added(x, row(three, 5), 3)),
        ("layers.2", lambda x: added(x, row(three, 6), 2)),
    )


def test_rows_in_a_row_read_their_sae_once(saes, monkeypatch):
    read = []
    monkeypatch.setattr(
        sf.SAE, "load", lambda path, load=sf.SAE.load: read.append(path) or load(path)
    )
    sf.load_steering(written(*(f"sparsify,add,saes,layers.1,{i},6,,,," for i in range(3))))
    assert len(read) == 1


def test_attached_from_elsewhere(saes, model, monkeypatch, tmp_path_factory):
    recipe = sf.load_steering(written("sparsify,add,saes,layers.1,30,10,,,,"))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    v = row(saes["saes/layers.1"], 30)
    agree(recipe, model, ("layers.1", lambda x: added(x, v, 10)))


def test_a_file_as_spreadsheets_write_it(saes):
    """With a byte order mark, and commas for columns that are not there."""
    path = written("sparsify,add,saes,layers.1,3,6,,,,,,,")
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert sf.load_steering(path).steerings[0].edits == {3: sf.add(6)}


def test_fewest_columns(saes, model):
    """As the harness' README makes it; without an action it adds."""
    head = "loader,sparse_model,hookpoint,feature_index,steering_coefficient"
    path = written("sparsify,saes,layers.1,30.0,10.0", head=head)
    v = row(saes["saes/layers.1"], 30)
    agree(sf.load_steering(path), model, ("layers.1", lambda x: added(x, v, 10)))


def test_check_and_save(saes, model, capsys):
    path = written("sparsify,add,saes,layers.1,30,10,,,,", "sparsify,clamp,saes,layers.2,3,6,,,,")
    main(["check", str(path)])
    shown = capsys.readouterr().out
    assert "addition: lm-eval's add" in shown and "clamp of the projection: lm-eval" in shown
    recipe = sf.load_steering(path)
    recipe.save("files/steer.json")
    with sf.load_steering("files/steer.json").attach(model):
        given = logits(model)
    with recipe.attach(model):
        assert torch.equal(logits(model), given)


WRONG = {
    "clamp after add": (
        ["sparsify,add,saes,layers.1,3,6,,,,", "sparsify,clamp,saes,layers.1,4,6,,,,"],
        r"line 3: hookpoint: layers.1 has a clamp and another row",
    ),
    "add after clamp": (
        ["sparsify,clamp,saes,layers.1,3,6,,,,", "sparsify,add,saes,layers.1,4,6,,,,"],
        r"line 3: hookpoint: layers.1 has a clamp and another row",
    ),
    "two clamps, two SAEs": (
        ["sparsify,clamp,saes,layers.1,3,6,,,,", "sae_lens,clamp,other,,4,6,,deep/one,,"],
        r"line 3: hookpoint: layers.1 has a clamp and another row",
    ),
    "latent twice": (
        ["sparsify,add,saes,layers.1,3,6,,,,", "", "sparsify,add,saes,layers.1,3,6,,,,"],
        r"line 4: feature_index: 3 of .*saes/layers.1 is there twice",
    ),
    "action": (["sparsify,ad,saes,layers.1,3,6,,,,"], "action: got 'ad', .*did you mean 'add'"),
    "no action": (["sparsify,,saes,layers.1,3,6,,,,"], "action: got '', accepted are add, clamp"),
    "loader": (["sparsity,add,saes,layers.1,3,6,,,,"], "loader: got .*did you mean 'sparsify'"),
    "head": (["sparsify,add,saes,layers.1,3,6,0,,,"], "head_index: got '0', heads are not steered"),
    "no SAE": (["sparsify,add,saes,layers.7,3,6,,,,"], r"sae: path: no folder .*saes/layers.7"),
    "no repository": (
        ["sparsify,add,org/name,layers.7,3,6,,,,"],
        "no folder org/name/layers.7 here",
    ),
    "no repository of sae_lens": (
        ["sae_lens,add,org/name,layers.2,5,3,,,,"],
        "no repository org/name from the Hub",
    ),
    "no model": (["sparsify,add,,layers.7,3,6,,,,"], "sparse_model: is missing"),
    "no hookpoint": (["sparsify,add,saes,,3,6,,,,"], "hookpoint: is missing"),
    "no layer": (["sae_lens,add,saes,,3,6,,nowhere,,"], "hookpoint: is missing, and the SAE names"),
    "release": (
        ["sae_lens,add,gemma-scope-2b-pt-res-canonical,layers.20,12082,240.0,,a/b,dogs,"],
        "'gemma-scope-2b-pt-res-canonical', a release that only sae_lens knows",
    ),
    "latent": (["sparsify,add,saes,layers.1,128,6,,,,"], "feature_index: got 128, .* 0 to 127"),
    "half a latent": (["sparsify,add,saes,layers.1,3.5,6,,,,"], "got '3.5', a latent is needed"),
    "negative latent": (["sparsify,add,saes,layers.1,-1,6,,,,"], "got '-1', a latent is needed"),
    "NaN": (
        ["sparsify,add,saes,layers.1,3,nan,,,,"],
        "steering_coefficient: got nan, a number that is finite",
    ),
    "overflow": (["sparsify,add,saes,layers.1,3,1e39,,,,"], "is finite in fp32"),
    "clamped to an overflow": (
        ["sparsify,clamp,saes,layers.1,3,1e39,,,,"],
        "steering_coefficient: got 1e.39, a number that is finite in fp32",
    ),
    "word": (["sparsify,add,saes,layers.1,3,x,,,,"], "steering_coefficient: got 'x', a number"),
    "short": (["sparsify,add,saes,layers.1,3"], "steering_coefficient: got '', a number"),
    "long": (["sparsify,add,saes,layers.1,3,6,,,,,x"], "line 2: has more cells than"),
    "unnamed": (["sparsify,add,saes,layers.1,3,6,,,,x"], "line 2: has more cells than"),
    "no row": ([], "holds no row"),
    "quote": (['sparsify,add,"saes'], "not valid CSV"),
    **dict.fromkeys(
        ("normalize", "decoder_norm"),
        (["sparsify,add,scaled,layers.1,3,6,,,,"], "scaled/layers.1 rescales what it"),
    ),
}
RESCALED = {"normalize": "layer_norm", "decoder_norm": True}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(saes, make_sae, name):
    rows, message = WRONG[name]
    if name in RESCALED:
        fields = {name: getattr(make_sae(), name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        scaled = sf.SAE(**fields, k=8, **{name: RESCALED[name]})
        scaled.save("scaled/layers.1", "saelens")
    if name == "no layer":
        make_sae(hookpoint=None).save("saes/nowhere")
    path = written(*rows)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        sf.load_steering(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_a_scale_is_refused(saes):
    place = Path("other/deep/one")
    config = json.loads((place / "cfg.json").read_text())
    config["normalize_activations"] = "expected_average_only_in"
    (place / "cfg.json").write_text(json.dumps(config))
    (place / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    with pytest.raises(ValueError, match="other/deep/one rescales what it reads"):
        sf.load_steering(written("sae_lens,add,other,layers.1,5,3,,deep/one,,"))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (HEAD.replace("action", "hook_action"), "column 'hook_action': .*did you mean 'action'"),
        (HEAD.replace("hookpoint", "description"), "column 'hookpoint': is missing"),
        (HEAD + ",action", "a column is there twice"),
        ("", "column 'loader': is missing"),
    ],
)
def test_wrong_columns_are_named(saes, head, message):
    with pytest.raises(ValueError, match=message):
        sf.load_steering(written("sparsify,add,saes,layers.1,3,6,,,,", head=head))


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match=r"empty.csv: column 'loader': is missing"):
        sf.load_steering(tmp_path / "empty.csv")


def stored(content, name="steer.pt") -> Path:
    torch.save(content, name)
    return Path(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_vectors(tmp_path, monkeypatch, model, dtype):
    monkeypatch.chdir(tmp_path)
    v, u, b = (torch.randn(1, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    v, u, b = v.to(dtype), 3 * u.to(dtype), b.to(dtype)[0]
    content = {
        "layers.0": {"steering_vector": v, "action": "add", "head_index": None, "bias": None},
        "layers.2.mlp": {"steering_vector": u[0], "action": "clamp", "steering_coefficient": 3.5},
        "layers.1": {
            "steering_vector": u,
            "steering_coefficient": torch.tensor(-2),
            "action": "clamp",
            "bias": b[None],
        },
    }
    recipe = sf.load_steering(stored(content, "steer.pth"))
    agree(
        recipe,
        model,
        ("layers.0", lambda x: added(x, v[0].double(), 1)),
        ("layers.2.mlp", lambda x: clamped(x, u[0].double(), 3.5)),
        ("layers.1", lambda x: clamped(x, u[0].double(), -2, b.double())),
    )
    with pytest.raises(ValueError, match=r"steerings\[0\]\.sae: lies in no file"):
        recipe.save("steer.json")


def test_vectors_of_a_machine_with_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    (step,) = sf.load_steering(stored({"layers.0": VECTOR})).steerings
    assert step.sae.device.type == "cpu"


def test_check_shows_vectors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = {"layers.0": {"steering_vector": torch.full((4,), 2.0), "action": "add"}}
    main(["check", str(stored(content))])
    assert "SAE      a vector in the file: N=1, d=4" in (shown := capsys.readouterr().out)
    assert "add(1), |direction| 4; addition: lm-eval's add" in shown


VECTOR = {"steering_vector": torch.ones(4), "action": "clamp"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"holds a list, \{hookpoint: ...\} is needed"),
        ({}, r"holds a dict, \{hookpoint: ...\} is needed"),
        ({3: VECTOR}, "3: no hookpoint, a module's name"),
        ({"a": torch.ones(4)}, "a: got a Tensor, {steering_vector, action, ...} is needed"),
        ({"a": {"action": "add"}}, "a: key 'steering_vector': is missing"),
        ({"a": VECTOR | {"steering_coeficient": 2}}, "did you mean 'steering_coefficient'"),
        ({"a": VECTOR | {"action": "clam"}}, "a: action: got 'clam', .*did you mean 'clamp'"),
        (
            {"a": VECTOR | {"action": "add", "bias": torch.ones(4)}},
            "bias: 'add' does not use it",
        ),
        ({"a": VECTOR | {"head_index": 0}}, "head_index: got 0, heads are not steered"),
        ({"a": VECTOR | {"steering_vector": torch.zeros(4)}}, "steering_vector: is zero"),
        ({"a": VECTOR | {"steering_vector": torch.ones(2, 4)}}, r"got shape \(2, 4\), \[d\] or"),
        ({"a": VECTOR | {"steering_vector": torch.ones(())}}, r"got shape \(\), \[d\] or"),
        ({"a": VECTOR | {"steering_vector": [1.0]}}, "got list, a tensor of numbers"),
        ({"a": VECTOR | {"steering_vector": torch.ones(4).bool()}}, "got torch.bool, a tensor of"),
        ({"a": VECTOR | {"steering_vector": torch.ones(4).cfloat()}}, "got torch.complex64, a ten"),
        (
            {"a": VECTOR | {"steering_vector": torch.ones(4).to_sparse()}},
            r"steering_vector: got torch\.sparse_coo, a dense tensor",
        ),
        ({"a": VECTOR | {"steering_vector": torch.ones(4) / 0}}, "holds NaN or infinity"),
        ({"a": VECTOR | {"bias": torch.ones(3)}}, "bias: is for width 3, steering_vector for 4"),
        ({"a": VECTOR | {"steering_coefficient": "much"}}, "got 'much', a number is needed"),
        ({"a": VECTOR | {"steering_coefficient": torch.ones(2)}}, "got tensor.*, a number is nee"),
        ({"a": VECTOR | {"steering_coefficient": 10**400}}, "got 1000.*, a number is needed"),
        ({"a": VECTOR | {"steering_coefficient": float("inf")}}, "finite in fp32 is needed"),
    ],
)
def test_wrong_vectors_are_named(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        sf.load_steering(stored(content))
    assert str(raised.value).startswith("steer.pt: ")


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("cut", ["torch", "pickle", "empty", "short", "text"])
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, cut):
    monkeypatch.chdir(tmp_path)
    path = stored({"layers.0": Evil()})
    if cut == "pickle":
        path.write_bytes(pickle.dumps({"layers.0": Evil()}, protocol=2))
    if cut in ("empty", "short"):
        path.write_bytes(path.read_bytes()[: 0 if cut == "empty" else -100])
    if cut == "text":
        path.write_text("loader,action\n")
    with pytest.raises(ValueError, match=r"^steer\.pt: cannot be read with weights_only=True"):
        sf.load_steering(path)
    assert not Path("executed").exists()
