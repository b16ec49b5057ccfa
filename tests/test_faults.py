"""Every known fault is held by a test, and docs/faults.md names it."""

from __future__ import annotations

from pathlib import Path

from faults import FAULTS, holders

TESTS = Path(__file__).parent
NUMBERS = [number for faults in FAULTS.values() for number in faults]


def test_every_fault_is_held():
    assert sorted(NUMBERS) == list(range(1, len(NUMBERS) + 1))
    held = holders(TESTS)
    assert not [number for number in NUMBERS if number not in held]
    assert not held.keys() - set(NUMBERS)
    # The rest of the list needs no GPU.
    assert [n for n in NUMBERS if all(on_gpu for *_, on_gpu in held[n])] == [68]


def test_marks_are_read(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "@pytest.mark.gpu\n@pytest.mark.fault(3, 5)\ndef test_one(): ...\n"
        "@pytest.mark.parametrize('x', [7])\n@pytest.mark.fault(5)\ndef test_two(): ...\n"
        "def test_three(): ...\n"
    )
    assert holders(tmp_path) == {
        3: [("test_some.py", "test_one", True)],
        5: [("test_some.py", "test_one", True), ("test_some.py", "test_two", False)],
    }
