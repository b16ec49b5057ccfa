"""SAEs from the Hugging Face Hub: a cache as huggingface_hub lays it out, and no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import saesteer_fast as sf

huggingface_hub = pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, make_sae) -> Path:
    """What is left of org/saes after layers.6 was fetched."""
    repository = tmp_path / "hub" / "models--org--saes"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    sae = make_sae(10, 24, 4, hookpoint="layers.6")
    sae.save(repository / "snapshots" / COMMIT / "layers.6")
    return tmp_path / "hub"


def offline(cache: Path, script: str) -> str:
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(sf.__file__).parents[1])  # built in place, perhaps
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        check=True,
        text=True,
        cwd=cache,
    )
    return result.stdout


def test_offline_reads_what_was_fetched(cache):
    out = offline(
        cache,
        """
        import saesteer_fast as sf
        print(sf.SAE.load("org/saes/layers.6"))
        for path in ("org/saes/layers.7", "org/saes", "org/others/layers.6", "org/saes/../../x"):
            try:
                sf.SAE.load(path)
            except FileNotFoundError as error:
                print(error)
        """,
    )
    loaded, layer, root, repository, traversal = out.splitlines()
    assert "24 latents, d=10, topk, k=4, hookpoint='layers.6'" in loaded
    assert "and no layers.7 in org/saes" in layer and "did you mean 'layers.6'" in layer
    assert "SAEs are inside: layers.6" in root
    assert "no folder org/others/layers.6 here, and no repository org/others" in repository
    assert "no folder" in traversal and "repository" not in traversal


@pytest.fixture
def fetched(cache, monkeypatch) -> list[list[str]]:
    """Patterns of what is asked of the Hub, which has `cache`."""
    asked = []

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        assert repository == "org/saes"
        asked.append(allow_patterns)
        return str(cache / "models--org--saes" / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_only_the_files_of_an_sae_are_asked_for(fetched):
    assert sf.SAE.load("org/saes/layers.6").hookpoint == "layers.6"
    (patterns,) = fetched
    names = ("cfg.json", "sae.safetensors", "ae.pt", "activation_scaler.json")
    assert {f"layers.6/{name}" for name in (*names, "saesteer_order.safetensors")} <= set(patterns)
    assert all(pattern.startswith("layers.6") for pattern in patterns)
    assert not any(letter in pattern for pattern in patterns for letter in "*?[")


@pytest.mark.parametrize("folder", ["", "width_1m/l0=30+x"])
def test_folders_of_a_repository(fetched, cache, make_sae, folder):
    make_sae(10, 24, 3).save(cache / "models--org--saes" / "snapshots" / COMMIT / folder)
    assert sf.SAE.load(f"org/saes/{folder}".rstrip("/")).k == 3
    assert f"{folder}/cfg.json".lstrip("/") in fetched[0]


def test_one_file_of_a_repository(fetched):
    with pytest.raises(ValueError, match=r"sae\.safetensors is one file of .* give .*layers\.6$"):
        sf.SAE.load("org/saes/layers.6/sae.safetensors")
    assert "layers.6/sae.safetensors" in fetched[0]


def test_a_folder_here_goes_first(fetched, tmp_path, monkeypatch, make_sae):
    monkeypatch.chdir(tmp_path)
    make_sae(10, 24, 3, hookpoint="layers.6").save("org/saes/layers.6")
    assert sf.SAE.load("org/saes/layers.6").k == 3 and not fetched


@pytest.mark.parametrize(
    "path",
    ["layers.6", "/org/saes", "./org/saes", "org/../saes", "org/.saes", "org//x", "org/s aes"],
)
def test_what_is_no_repository(fetched, path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        sf.SAE.load(path)
    assert not fetched


def test_a_path_is_no_repository(fetched):
    with pytest.raises(FileNotFoundError, match="no folder"):
        sf.SAE.load(Path("org/saes/layers.6"))
    assert not fetched


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"no folder org/saes; .* install huggingface_hub"):
        sf.SAE.load("org/saes")


def test_a_hub_that_is_out_of_reach(monkeypatch):
    def snapshot_download(repository: str, **_):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=r"no repository org/saes .*\(no network\)"):
        sf.SAE.load("org/saes")


@pytest.mark.fault(39)
def test_nothing_of_the_repository_is_trusted(fetched, cache):
    config = next(cache.rglob("cfg.json"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"k": 10**9}))
    with pytest.raises(ValueError, match="k is 1000000000, more than the 24 latents"):
        sf.SAE.load("org/saes/layers.6")
