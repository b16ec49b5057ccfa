"""The number types: what streams and weights may be stored in, and the ends of fp32, which sums,
strengths and thresholds are kept in."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What hidden states and weights may be stored in; sums are always fp32."""

TINY = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float32).max
