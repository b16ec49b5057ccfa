"""The Triton kernels, compiled for GPUs and run on the CPU by tests/ptx, in processes of their own.

A choice of test_triton_kernels.py: every kernel and kind of tile. SAESTEER_PTX=all runs all of it.
And test_triton_traffic.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

KERNELS = Path(__file__).with_name("test_triton_kernels.py")
EVERY_TILE = {
    80: ["bfloat16-0", "bfloat16-17", "float32-17"],
    90: ["bfloat16-0", "bfloat16-17", "float16-16", "float32-0"],
}
"""Numbers and widths that are loaded and multiplied in other ways."""
OTHERS = {
    80: [
        "test_in_place_is_bit_for_bit_the_same[20-4-bfloat16-bfloat16]",
        "test_in_place_refuses_what_it_would_get_wrong",  # rows that several threads hold
    ],
    90: [
        "test_any_dtypes[bfloat16-float32]",
        "test_rows_in_another_order_change_no_bit[18-3]",
        "test_a_latent_that_is_nan_beats_every_number",
        "test_encode_in_passes_keeps_the_order_of_ties",
        "test_add_directions",
        "test_tensors_anywhere_in_memory",
        "test_numbers_of_tokens_share_a_compilation",
        "test_rows_beyond_32_bit_addresses",
    ],
}


@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compiled_for(architecture, executor_library, tmp_path):
    tests = [f"test_every_tile[{case}]" for case in EVERY_TILE[architecture]] + OTHERS[architecture]
    chosen = [f"{KERNELS}::{test}" for test in tests]
    if os.environ.get("SAESTEER_PTX") == "all":
        chosen = [KERNELS]
    chosen.append(KERNELS.with_name("test_triton_traffic.py"))
    clean = {k: v for k, v in os.environ.items() if k not in ("SAESTEER_IMPL", "TRITON_INTERPRET")}
    here = {"PTX_ARCHITECTURE": str(architecture), "PTX_LIBRARY": str(executor_library)}
    here |= {"CUDA_VISIBLE_DEVICES": "", "SAESTEER_TILES": str(tmp_path / "none.json")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen],
        env=clean | here,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
