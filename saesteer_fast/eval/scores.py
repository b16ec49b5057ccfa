"""A share of prompts, and how sure it is."""

from __future__ import annotations

import math
from typing import NamedTuple


class Share(NamedTuple):
    """hits of n prompts."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """hits / n, from 0 to 1; nan without prompts."""
        return self.hits / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson interval at 95 %."""
        return wilson(self.hits, self.n)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The Wilson score interval at 95 % of hits in n trials (Wilson 1927); (0, 1) without trials.

        (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),    p = hits/n, z = 1.96

    Raises ValueError unless 0 <= hits <= n.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"hits: got {hits}, accepted is 0 to n = {n}")
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    p, scale = hits / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / scale
    reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # It holds p, whatever rounding says at 0 and 1.
    return max(0.0, min(p, middle - reach)), min(1.0, max(p, middle + reach))
