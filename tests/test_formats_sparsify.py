"""sparsify's two files, and every fault of files that we know of."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import saesteer_fast as sf
from saesteer_fast import formats

N, D, K = 24, 10, 4


@pytest.fixture
def folder(tmp_path, make_sae) -> Path:
    """A sound folder to break."""
    make_sae(D, N, K, hookpoint="layers.3").save(tmp_path / "layers.3")
    return tmp_path / "layers.3"


def configure(folder: Path, **changed):
    path = folder / "cfg.json"
    config = json.loads(path.read_text()) | changed
    kept = {key: value for key, value in config.items() if value is not ...}
    path.write_text(json.dumps(kept))


def alter(folder: Path, **changed):
    path = folder / "sae.safetensors"
    tensors = load_file(path) | {key.replace("__", "."): value for key, value in changed.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_saved_is_loaded(tmp_path, make_sae, dtype):
    sae = make_sae(D, N, K, dtype=dtype, hookpoint="layers.17")
    sae.save(str(tmp_path / "deep" / "layers.17"))
    back = sf.SAE.load(str(tmp_path / "deep" / "layers.17"))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "b_enc_folded"):
        assert torch.equal(getattr(back, name), getattr(sae, name)), name
        assert getattr(back, name).dtype == getattr(sae, name).dtype
    assert (back.k, back.hookpoint) == (K, "layers.17")


@pytest.mark.parametrize("settings", [{"measure": "groupmax"}, {"k": N}], ids=str)
def test_settings_are_saved(tmp_path, make_sae, settings):
    sae = replace(make_sae(D, N, K), **settings)
    sae.save(tmp_path / "sae")
    back = sf.SAE.load(tmp_path / "sae")
    assert (back.measure, back.k) == (sae.measure, sae.k)


def test_a_scale_is_not_lost(tmp_path, make_sae):
    sae = replace(make_sae(D, N, K), scale=0.5)
    with pytest.raises(ValueError, match=r"sparsify cannot say scale=0\.5; fold\(\)"):
        sae.save(tmp_path / "sae")


def test_other_libraries_are_told_the_framework(folder):
    """transformers 4 refuses files that do not say it."""
    with safe_open(folder / "sae.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_tied_weights(tmp_path):
    W = torch.randn(N, D)
    sf.SAE(W_enc=W, b_enc=torch.zeros(N), W_dec=W, b_dec=torch.zeros(D), k=K).save(
        tmp_path / "tied"
    )
    back = sf.SAE.load(tmp_path / "tied")
    assert torch.equal(back.W_enc, W) and torch.equal(back.W_dec, W)


@pytest.mark.parametrize(
    ("name", "hookpoint"),
    [
        ("layers.6", "layers.6"),
        ("layers.6.mlp", "layers.6.mlp"),
        ("model.layers.10", "model.layers.10"),
        ("h.3", "h.3"),
        ("my-sae", None),
        ("my-layers.6", None),
        ("layers.6-old", None),
        ("layers.6 (1)", None),
        ("layers.six", None),
        ("run.2", None),
        ("layers", None),
    ],
)
def test_hookpoint_is_the_name_of_the_folder(tmp_path, make_sae, name, hookpoint):
    make_sae(D, N, K, hookpoint=hookpoint).save(tmp_path / name)
    assert sf.SAE.load(tmp_path / name).hookpoint == hookpoint


@pytest.mark.parametrize("format", ["sparsify", "saelens"])
@pytest.mark.parametrize(
    ("own", "name"),
    [("layers.2", "layers.9"), ("layers.2.mlp", "layers.2"), ("blocks.2.hook_resid_pre", "h.2")],
)
def test_a_folder_named_for_another_hookpoint_is_refused(tmp_path, make_sae, own, name, format):
    sae = make_sae(D, N, K, hookpoint=own)
    with pytest.raises(ValueError, match=f"{name} names hookpoint {name}, the SAE's is {own};"):
        sae.save(tmp_path / name, format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "own",
    ["layers.2", "h.2", "model.layers.2", "blocks.2.hook_resid_post", "blocks.3.hook_resid_pre"],
)
def test_a_hookpoint_may_go_by_another_name(tmp_path, make_sae, own):
    make_sae(D, N, K, hookpoint=own).save(tmp_path / "layers.2")
    assert sf.SAE.load(tmp_path / "layers.2").hookpoint == "layers.2"


def test_a_link_names_the_hookpoint(folder, tmp_path):
    (tmp_path / "layers.9").symlink_to(folder)
    assert sf.SAE.load(tmp_path / "layers.9").hookpoint == "layers.9"


@pytest.mark.fault(46)
def test_what_is_above_a_link_is_above_where_it_leads(folder, tmp_path, make_sae):
    """As for the system, and for every other program."""
    (folder / "inner").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(folder / "inner")
    make_sae(D, N, K, seed=1, hookpoint=None).save(tmp_path / "elsewhere" / "layers.3")
    expected = sf.SAE.load(folder)
    for path in ("link/..", "link/../../layers.3", "link/../inner/../../layers.3"):
        sae = sf.SAE.load(tmp_path / "elsewhere" / path)
        assert torch.equal(sae.W_enc, expected.W_enc) and sae.hookpoint == "layers.3"


def test_relative_path(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert sf.SAE.load(".").hookpoint == "layers.3"


def test_older_configuration(folder):
    configure(folder, activation=..., skip_connection=..., transcode=..., signed=False)
    assert sf.SAE.load(folder).k == K


@pytest.mark.fault(39)
def test_unknown_setting_is_reported(folder):
    configure(folder, rescale=2)
    with pytest.warns(UserWarning, match="rescale is not known and ignored"):
        sf.SAE.load(folder)


def test_settings_survive_a_round_trip(folder, tmp_path):
    configure(folder, multi_topk=True, normalize_decoder=False)
    sf.SAE.load(folder).save(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "cfg.json").read_text())
    assert config["multi_topk"] is True and config["normalize_decoder"] is False
    assert (config["num_latents"], config["k"], config["d_in"]) == (N, K, D)


@pytest.mark.fault(24, 34, 39, 40)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": ...}, "cfg.json: lacks k$"),
        ({"k": ..., "kk": 4}, "lacks k"),
        ({"d_in": ..., "d_im": 10}, "lacks d_in; is it called 'd_im'"),
        ({"num_latents": 0, "expansion_factor": ...}, "lacks expansion_factor"),
        ({"k": "8"}, "k is '8', an integer of at least 1"),
        ({"k": 4.0}, "k is 4.0, an integer"),
        ({"k": True}, "k is True, an integer"),
        ({"k": None}, "k is None, an integer"),
        ({"k": 0}, "k is 0, an integer of at least 1"),
        ({"k": N + 1}, "k is 25, more than the 24 latents"),
        ({"d_in": 12}, r"W_dec has shape \(24, 10\)|encoder.weight has shape \(24, 10\)"),
        ({"num_latents": 25}, r"has shape \(24, 10\), \(25, 10\) is needed"),
        ({"num_latents": "24"}, "num_latents is '24', an integer"),
        ({"activation": "jumprelu"}, "activation is 'jumprelu', accepted are topk, groupmax"),
        ({"activation": "groupmx"}, "did you mean 'groupmax'"),
        ({"activation": "groupmax", "k": 5}, "k: got 5 groups, which do not divide 24 latents"),
        ({"activation": None}, "activation is None"),
        ({"transcode": True}, "transcode is True, accepted is false: a transcoder"),
        ({"skip_connection": True}, "skip_connection is True, accepted is false"),
        ({"skip_connection": "false"}, "skip_connection is 'false', accepted is false"),
        ({"signed": True}, "signed is True, accepted is false"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is not known and ignored")
def test_bad_settings_are_named(folder, changed, message):
    configure(folder, **changed)
    with pytest.raises(ValueError, match=message):
        sf.SAE.load(folder)


@pytest.mark.fault(39)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"k": 4,}', b"[" * 100_000],
    ids=["empty", "open", "list", "null", "no text", "comma", "deep"],
)
def test_broken_json(folder, content):
    (folder / "cfg.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"cfg\.json: (not valid JSON|holds a)"):
        sf.SAE.load(folder)


def bad(value: float) -> torch.Tensor:
    tensor = torch.ones(N, D)
    tensor[5, 5] = value
    return tensor


@pytest.mark.fault(34, 35, 36, 38)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"W_dec": None}, "lacks W_dec$"),
        ({"W_dec": None, "W_decc": torch.ones(N, D)}, "lacks W_dec; is it called 'W_decc'"),
        ({"W_skip": torch.ones(D, D)}, "holds W_skip besides"),
        ({"encoder__weight": torch.ones(D, N)}, r"encoder.weight has shape \(10, 24\).*transposed"),
        ({"W_dec": torch.ones(D, N)}, r"W_dec has shape \(10, 24\).*transposed"),
        ({"b_dec": torch.ones(N)}, r"b_dec has shape \(24,\)"),
        ({"encoder__bias": torch.ones(1, N)}, r"encoder.bias has shape \(1, 24\)"),
        ({"W_dec": torch.ones(N, D).char()}, "W_dec is I8, accepted are F32, BF16, F16"),
        ({"encoder__weight": torch.ones(N, D).double()}, "encoder.weight is F64, accepted"),
        ({"W_dec": bad(torch.nan)}, "W_dec: NaN or infinity in row 5"),
        ({"encoder__weight": bad(torch.inf)}, "W_enc: NaN or infinity in row 5"),
        ({"encoder__weight": bad(-torch.inf).half()}, "W_enc: NaN or infinity in row 5"),
    ],
)
def test_bad_weights_are_named(folder, changed, message):
    alter(folder, **changed)
    with pytest.raises(ValueError, match=message):
        sf.SAE.load(folder)


def header(content: dict | bytes, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int) -> dict:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


def encoded(begin: int, end: int) -> bytes:
    return json.dumps(entry(begin, end)).encode()


@pytest.mark.fault(32, 33, 42)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 4096,
        struct.pack("<Q", 2**40) + b"{}",
        header(b'{"a": '),
        header({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        header({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)),
        header(b'{"a": %b, "a": %b}' % (encoded(0, 8), encoded(8, 16)), bytes(16)),
        header({"a": entry(0, 8)}, bytes(9)),
        header({"a": entry(0, 8)}, bytes(7)),
        pickle.dumps({"W_dec": [1.0]}),
    ],
    ids=[
        "empty",
        "zeros",
        "endless header",
        "broken header",
        "overlap",
        "gap",
        "twice",
        "trailing byte",
        "short",
        "pickle",
    ],
)
def test_broken_tensor_file(folder, content):
    (folder / "sae.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"sae\.safetensors: not a whole safetensors file"):
        sf.SAE.load(folder)


@pytest.mark.fault(32)
@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_truncated(folder, keep):
    path = folder / "sae.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        sf.SAE.load(folder)


@pytest.mark.fault(42)
def test_pickle_is_refused_and_not_executed(folder, tmp_path):
    witness = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(witness),)

    path = folder / "sae.safetensors"
    torch.save(Bomb(), path)
    with pytest.raises(ValueError, match="it is a pickle, which is never executed"):
        sf.SAE.load(folder)
    shutil.copy(path, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"old\.pt: holds objects .* executed \(posix\.mkdir\)"):
        sf.SAE.load(tmp_path / "old.pt")
    assert not witness.exists()


@pytest.mark.fault(34)
@pytest.mark.parametrize("name", ["cfg.json", "sae.safetensors"])
def test_missing_file(folder, name):
    (folder / name).rename(folder / f"old_{name}")
    with pytest.raises(FileNotFoundError, match=rf"lacks {name}; is it called 'old_{name}'"):
        sf.SAE.load(folder)


def test_missing_folder(folder):
    with pytest.raises(FileNotFoundError, match=r"no folder .*layers\.4; did you mean 'layers\.3'"):
        sf.SAE.load(folder.with_name("layers.4"))
    with pytest.raises(FileNotFoundError, match="no folder"):
        sf.SAE.load(folder.parent / "nowhere" / "layers.3")


def test_folder_of_folders(folder):
    with pytest.raises(FileNotFoundError, match=r"SAEs are inside: layers\.3"):
        sf.SAE.load(folder.parent)
    (folder.parent / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no SAE; needed are cfg\.json and sae"):
        sf.SAE.load(folder.parent / "empty")


@pytest.mark.fault(46)
@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(folder):
    (folder / "sae.safetensors").chmod(0)
    with pytest.raises(OSError, match=r"sae\.safetensors"):
        sf.SAE.load(folder)


@pytest.mark.fault(45)
def test_file_may_be_cut_short_while_loaded(folder):
    sae = sf.SAE.load(folder)
    before = sae.W_enc.clone()
    os.truncate(folder / "sae.safetensors", 0)
    assert torch.equal(sae.W_enc, before)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.fault(44)
@pytest.mark.parametrize("failing", ["write_json", "write_tensors", "os.fsync"])
def test_failed_save_leaves_what_was_there(tmp_path, make_sae, monkeypatch, failing):
    def fail(*_):
        raise OSError("No space left on device")

    make_sae(D, N, K, hookpoint=None).save(tmp_path / "layers.3")
    (tmp_path / "layers.3" / "README").write_text("kept")
    before = tree(tmp_path)
    target = formats.files.os if failing == "os.fsync" else formats.sparsify
    monkeypatch.setattr(target, failing.removeprefix("os."), fail)
    for name in ("layers.3", "layers.4"):
        with pytest.raises(OSError, match="No space left"):
            make_sae(D, N, K, seed=1, hookpoint=None).save(tmp_path / name)
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["layers.3"]


def test_save_over_an_older_one(folder, make_sae):
    (folder / "README").write_text("kept")
    sae = make_sae(D, N, K, seed=1, hookpoint="layers.3")
    sae.save(folder)
    assert torch.equal(sf.SAE.load(folder).W_enc, sae.W_enc)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README",
        "cfg.json",
        "sae.safetensors",
    ]


def test_save_obeys_the_umask(folder):
    (folder / "plain").touch()
    mode = (folder / "plain").stat().st_mode
    assert {path.stat().st_mode for path in folder.iterdir()} == {mode}


@pytest.mark.fault(43)
def test_killed_save_leaves_the_good_files(folder, make_sae):
    """SIGKILL while the weights are written: the older SAE is whole."""
    before = tree(folder)
    script = """
        import os, signal, sys
        import saesteer_fast as sf
        from saesteer_fast import formats
        def die(path, tensors):
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        formats.sparsify.write_tensors = die
        sf.SAE.load(sys.argv[1]).save(sys.argv[1])
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(folder)])
    assert result.returncode == -9
    assert tree(folder) == before
