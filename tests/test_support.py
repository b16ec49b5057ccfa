"""Every cell of the table of what is supported, in docs/usage.md, against the truth."""

from __future__ import annotations

import os
from itertools import product
from types import SimpleNamespace

import pytest
from ops_cases import DTYPES
from support import (
    EDITED,
    IMPLEMENTATIONS,
    MEASURES,
    REFUSED,
    assert_rounded,
    build,
    given_edits,
    stream,
    truth,
)

import saesteer_fast as sf
from saesteer_fast import choice, ops
from saesteer_fast.edits import KINDS
from saesteer_fast.plan import ERRORS
from saesteer_fast.weights import MEASURES as SAE_MEASURES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""test_triton.py runs this file too, in a process where Triton is interpreted."""
RUN_HERE = [impl for impl in IMPLEMENTATIONS if (impl == "triton") == INTERPRETED]


@pytest.fixture(params=RUN_HERE)
def impl(request, monkeypatch) -> str:
    """An implementation; the CUDA kernels take tensors on the CPU, and run as PTX."""
    if request.param == "cuda":
        machine = request.getfixturevalue("cuda_machine").settle()

        def run_by(name):
            def run(*arguments):
                given = list(arguments)
                while given[-1] is None:  # its signatures end where the defaults begin
                    given.pop()
                return getattr(machine, name)(*given)

            return run

        by_machine = SimpleNamespace(**{name: run_by(name) for name in ops._NAMES})
        monkeypatch.setitem(ops._BY, "cuda", by_machine)
        monkeypatch.setattr(choice, "_runs", lambda *_: True)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize(("measure", "kind", "error"), list(product(MEASURES, EDITED, ERRORS)))
def test_cell(measure, kind, error, dtype, impl, poisoned_memory):
    sae, x = build(measure, dtype, N=8, K=2), stream(5, seed=0, dtype=dtype)
    value = {"scale": 0.5, "at_most": 0.4}.get(kind, 1.5)
    edits = {latent: (kind, value) for latent in (2, 5)}
    options = {"error": error, "impl": impl}
    if measure == "projection":
        options["measure"] = measure
    if (measure, error) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[measure, error]):
            sf.steer(x, sae, given_edits(edits), **options)
        return
    y = sf.steer(x, sae, given_edits(edits), **options)
    expected = truth(x, sae, edits, error=error, projection=measure == "projection")
    assert y.dtype == dtype and (expected - x.double()).abs().max() > 0.1
    # Triton's interpreter cuts the end off a bf16 where a GPU rounds.
    assert_rounded(y, expected, roundings=2 if INTERPRETED else 1)


def test_nothing_is_left_out():
    assert MEASURES == [*SAE_MEASURES, "projection"] and tuple(EDITED) == KINDS
    assert set(IMPLEMENTATIONS) | {"auto"} == set(choice.IMPLS) == set(ops._BY)
