"""The `saesteer` command hands its arguments on."""

import re
import subprocess
import sys

import pytest
import torch

from saesteer_fast import SAE, __version__, cli


def test_demo_is_given_its_folder(monkeypatch):
    given = []
    monkeypatch.setattr("saesteer_fast.demo.run", given.append)
    cli.main(["demo"])
    cli.main(["demo", "--out", "elsewhere"])
    assert given == ["saesteer-demo", "elsewhere"]


def test_ctrl_c_ends_a_command_without_a_trace(monkeypatch):
    def run(out):
        raise KeyboardInterrupt

    monkeypatch.setattr("saesteer_fast.demo.run", run)
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo"])
    assert ended.value.code == 130


def test_mini_build_is_given_its_arguments(monkeypatch, capsys):
    given = []

    def build(*arguments):
        given.append(arguments)
        return {"latent": 7, "layer": 4}

    monkeypatch.setattr("saesteer_fast.mini.build.build", build)
    cli.main(["mini", "build"])
    cli.main(["mini", "build", "--out", "there", "--seed", "3", "--threads", "2"])
    assert given == [("saesteer-mini", 0, 1), ("there", 3, 2)]
    assert "latent 7 of layer 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("to", "target", "said"),
    [
        ("sparsify", "out", "None.*; hookpoint lost: only a folder named layers.2 keeps it"),
        ("sparsify", "layers.2", "'layers.2'[^;]*$"),
        ("saelens", "out", "'layers.2'[^;]*$"),
    ],
)
def test_convert_says_what_it_wrote(tmp_path, make_sae, capsys, to, target, said):
    make_sae(hookpoint="layers.2").save(tmp_path / "source", "saelens")
    cli.main(["convert", str(tmp_path / "source"), str(tmp_path / target), "--to", to])
    assert re.search(f"^Written: .*{target} .*hookpoint={said}", capsys.readouterr().out)
    assert SAE.load(tmp_path / target).num_latents == 128


def test_convert_does_not_rename_the_hookpoint(tmp_path, make_sae):
    make_sae(hookpoint="layers.2").save(tmp_path / "source", "saelens")
    with pytest.raises(SystemExit, match=r"names hookpoint layers\.9, the SAE's is layers\.2"):
        cli.main(
            ["convert", str(tmp_path / "source"), str(tmp_path / "layers.9"), "--to", "sparsify"]
        )
    assert not (tmp_path / "layers.9").exists()


def test_convert_folds_where_it_is_asked_to(tmp_path, make_sae, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = make_sae()
    weights = {name: getattr(plain, name) for name in ("W_enc", "b_enc", "b_dec")}
    sae = SAE(**weights, W_dec=2 * plain.W_dec, k=8, decoder_norm=True)
    sae.save("source", "saelens")
    with pytest.raises(SystemExit, match="saesteer convert: sparsify cannot say decoder_norm=True"):
        cli.main(["convert", "source", "folded", "--to", "sparsify"])
    cli.main(["convert", "source", "folded", "--to", "sparsify", "--fold"])
    torch.testing.assert_close(SAE.load("folded").W_dec, plain.W_dec)
    torch.testing.assert_close(SAE.load("folded").W_enc, 2 * plain.W_enc)
    cli.main(["convert", "source", "kept", "--to", "saelens"])
    assert SAE.load("kept").decoder_norm


@pytest.mark.parametrize("command", ["env", "verify"])
def test_a_command_runs_its_module(monkeypatch, command):
    called = []
    name = f"saesteer_fast.{command}"
    module = pytest.importorskip(name, reason="needs the built extension")
    monkeypatch.setattr(module, "main", lambda: called.append(True))
    cli.main([command])
    assert called == [True]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["mini"],
        ["dmo"],
        ["demo", "--threads", "2"],
        ["mini", "build", "--threads", "0"],
        ["convert", "a", "b"],
    ],
)
def test_wrong_arguments_are_named(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: saesteer" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit, match=r"saesteer: .*taken"):
        cli.main(["demo", "--out", str(tmp_path / "taken")])


def test_runs_as_a_module():
    shown = subprocess.run(
        [sys.executable, "-m", "saesteer_fast.cli", "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in ("demo", "mini", "env"))


def test_demo_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="matplotlib is missing: pip install matplotlib"):
        cli.main(["demo", "--out", str(tmp_path / "demo")])
    assert not (tmp_path / "demo").exists()


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"saesteer_fast {__version__}\n"
