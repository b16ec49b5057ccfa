"""README and docs/ say of the tests what the tests are."""

from __future__ import annotations

import pytest

from bench import ROOT, report
from bench.tables import gpu
from saesteer_fast import choice, ops
from tests import tables


def test_a_gpu_runs_by_itself_only_what_was_right_on_one():
    kernels = {impl for _, impls in choice.ON_GPU for impl in impls} - {"reference"}
    recorded = report.latest(report.RESULTS, "gpu")
    assert not kernels or recorded, f"no run of `make gpu` is recorded, but ON_GPU names {kernels}"
    for impl in kernels:
        assert gpu.mistakes(recorded, impl) == []


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (((0, ("reference",)),), "plain PyTorch, `saesteer_fast/reference.py`"),
        (((0, ("cuda", "triton")),), "`cuda`, else `triton`"),
        (
            ((0, ("triton", "reference")), (8192, ("cuda",))),
            "`triton`, else plain PyTorch, `saesteer_fast/reference.py`; "
            "from 8192 tokens on `cuda`",
        ),
    ],
)
def test_devices_are_what_the_op_chooses(monkeypatch, rows, text):
    monkeypatch.setattr(choice, "ON_GPU", rows)
    assert tables.devices_table().endswith(f"until then {text} |")


@pytest.mark.parametrize("name", ops._NAMES)
def test_usage_has_the_signatures(name):
    arguments = getattr(ops._OPS, name).default._schema.arguments
    signature = ", ".join(a.name + "=None" * a.has_default_value() for a in arguments)
    assert f"`torch.ops.saesteer.{name}({signature})`" in (ROOT / "docs" / "usage.md").read_text()
