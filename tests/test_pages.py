"""README and docs/ hold what was recorded and what is tested, and nothing else between markers."""

from __future__ import annotations

import re

import pytest
from bench_cases import op_result, record_demo

from bench import ROOT, report
from tests import pages


def main(mode, folder):
    pages.main([mode], results=folder, root=folder)


@pytest.fixture
def result():
    return op_result()


@pytest.fixture
def folder(tmp_path, result):
    """Recorded results, and every page with nothing between its markers."""
    report.save(result, tmp_path)
    record_demo(tmp_path)
    (tmp_path / "docs").mkdir()
    for page, names in pages.blocks(tmp_path).items():
        markers = "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in names)
        (tmp_path / page).write_text(f"before\n{markers}after\n")
    return tmp_path


def test_what_is_written_is_so():
    pages.main(["--check"])


def test_every_marker_is_filled():
    found = {
        str(file.relative_to(ROOT)): set(re.findall("<!-- /(.+) -->", file.read_text()))
        for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    }
    known = {page: set(names) for page, names in pages.blocks(report.RESULTS).items()}
    assert {page: names for page, names in found.items() if names} == known


def test_check_detects_drift(folder):
    blocks = pages.blocks(folder)
    every = [*blocks, *pages.whole()]
    main("--write", folder)
    for page in every:
        text = (folder / page).read_text()
        assert page not in blocks or (text.startswith("before\n") and text.endswith("after\n"))
        drifted = text.replace("\n<!-- /", "!\n<!-- /", 1) if "<!--" in text else f"{text}!"
        (folder / page).write_text(drifted)
    listed = re.escape(", ".join(every))
    with pytest.raises(SystemExit, match=f"tested: {listed}: `python -m tests.pages --write`"):
        main("--check", folder)
    (folder / every[-1]).unlink()
    with pytest.raises(SystemExit, match=f"tested: {listed}: "):
        main("--check", folder)
    main("--write", folder)
    main("--check", folder)


def test_another_result_is_another_page(folder, result):
    main("--write", folder)
    result["cases"][0]["seconds"]["naive"] = [1] * 9
    result["machine"]["date"] = "2026-02-02T03:04:05+00:00"
    report.save(result, folder)
    with pytest.raises(SystemExit, match=r"tested: README\.md, docs/benchmarks\.md: "):
        main("--check", folder)


def test_what_is_missing_is_said(folder, tmp_path_factory):
    with pytest.raises(SystemExit, match="no result of the suite op"):
        pages.main(["--write"], results=tmp_path_factory.mktemp("nothing"), root=folder)
    (folder / "docs" / "benchmarks.md").write_text("no markers")
    with pytest.raises(SystemExit, match=r"docs/benchmarks\.md: the markers <!-- bench:work"):
        main("--write", folder)
    assert (folder / "README.md").read_text().startswith("before\n<!-- demo -->\n<!--"), "half"
