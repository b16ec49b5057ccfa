"""Two commits side by side: which are refused, what is measured, and the table."""

import subprocess

import pytest
from bench_cases import SMALL

from bench import compare, exactness, machine, timing, workloads
from bench.suites.op import Case
from saesteer_fast import ops


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits, of which the first is tagged old."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]

    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, *author, *arguments], check=True)

    git("init", "-q")
    for text in "12":
        (tmp_path / "file").write_text(text)
        git("add", "file")
        git("commit", "-qm", text)
    git("tag", "old", "HEAD~1")
    return tmp_path


def test_commits(repository):
    old, head = compare.commits("old")
    assert [len(old), len(head)] == [40, 40] and compare.commits(old[:8]) == [old, head]


@pytest.mark.parametrize(
    "revision, complaint",
    [("none", "got 'none', a commit"), ("--all", "got '--all'"), ("HEAD", "HEAD is HEAD itself")],
)
def test_refuses_a_revision(repository, revision, complaint):
    with pytest.raises(ValueError, match=complaint):
        compare.commits(revision)


def test_refuses_what_is_not_committed(repository):
    (repository / "file").write_text("3")
    with pytest.raises(SystemExit, match=r"bench-compare: HEAD: commit or undo .*\n.*file"):
        compare.main(["old"])


def test_says_that_a_commit_does_not_build(repository, monkeypatch):
    monkeypatch.setattr(compare, "TREES", repository / "build")
    with pytest.raises(SystemExit, match=r"does not build:\n.*setup.py"):
        compare.main(["old"])


def test_refuses_another_trees_package(tmp_path):
    with pytest.raises(ImportError, match="is loaded, not what lies in"):
        compare.child(str(tmp_path))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(workloads, "FULL", SMALL)
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-4)
    some = [Case(w, "bf16", 16, 1, SMALL.d, SMALL.N, SMALL.k) for w in ("planted", "worst")]
    monkeypatch.setattr(compare, "cases", lambda full: some)
    return [str(case) for case in some]


def test_measures_each_case(small):
    found = compare.measure()
    assert list(found) == small and all(seconds > 0 for seconds in found.values())


def test_measures_nothing_that_is_wrong(small, monkeypatch):
    monkeypatch.setattr(ops, "steer", lambda x, *_, **__: x)
    with pytest.raises(exactness.Disagreement):
        compare.measure()


def test_table():
    pairs = [({"a": 2e-6}, {"a": 1e-6}), ({"a": 4e-6}, {"a": 3e-6}), ({"a": 6e-6}, {"a": 9e-6})]
    text = compare.render(["old", "new"], pairs)
    assert "| case | old | new | new / old |" in text
    assert "| a | 4.00 µs | 3.00 µs | 0.75× (0.50 to 1.50) |" in text
