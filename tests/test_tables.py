"""README and docs/ say of the tests what the tests are."""

from __future__ import annotations

import pytest

from tests import tables


def test_what_is_written_is_so():
    tables.main(["--check"])


def test_check_detects_drift(tmp_path, monkeypatch):
    blocks = "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in tables.BLOCKS)
    (tmp_path / "README.md").write_text(f"before\n{blocks}after\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"README\.md differs"):
        tables.main(["--check"])
    for drift in ("README.md", *(f"docs/{name}.md" for name in tables.PAGES)):
        tables.main(["--write"])
        tables.main(["--check"])
        text = (tmp_path / drift).read_text()
        (tmp_path / drift).write_text(text.replace("|", "!", 1))
        with pytest.raises(SystemExit, match=f"{drift} differs"):
            tables.main(["--check"])
    tables.main(["--write"])
    assert (tmp_path / "README.md").read_text().startswith("before\n")
