"""What the kernels in Triton cannot do yet."""

from __future__ import annotations

from torch import Tensor


def check_no_order(op: str, order: Tensor | None) -> None:
    if order is not None:
        raise RuntimeError(f"saesteer::{op}: order is not supported by Triton's kernels yet")
