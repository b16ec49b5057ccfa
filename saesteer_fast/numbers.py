"""Numbers: the dtypes of streams and weights; the ends of fp32, in which sums, strengths and
thresholds are kept; and which arguments are integers, finite numbers and latents.
"""

from __future__ import annotations

from numbers import Integral, Real

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What hidden states and weights may be stored in; sums are always fp32."""

TINY = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float32).max


def require_float(argument: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{argument}: got {dtype}, accepted are {', '.join(map(str, FLOATS))}")


def is_integer(value: object) -> bool:
    """Of Python or another library; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Of Python or another library; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_finite(value: Real) -> bool:
    """Whether fp32 can hold it."""
    return abs(value) <= LARGEST


def finite(what: str, value: object) -> float:
    """The value as a float. `what` begins the error, as in "bias: got": TypeError for what is no
    number, ValueError for one that is not finite."""
    if not is_number(value):
        raise TypeError(f"{what} {value!r}, a number is needed")
    if not is_finite(value):
        raise ValueError(f"{what} {value}, a number that is finite in fp32 is needed")
    return float(value)


def latent_of(argument: str, given: object) -> int:
    """The latent that an argument names; TypeError for what is no integer."""
    if not is_integer(given):
        hint = f"; {int(given)} is one" if isinstance(given, str) and given.isdecimal() else ""
        raise TypeError(f"{argument}: latent {given!r} is no integer{hint}")
    return int(given)
