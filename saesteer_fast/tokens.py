"""The tokens of one call of a decoder: which are padding, where they stand, where the prompt ends.

A token has two places. Its column counts everything in its row from the first call of the sequence
on, padding too: the cache's length tells it. Its position counts the row's real tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASKED = -1000.0
"""What an additive mask adds to a score so that nothing is left of it, in any dtype. Larger numbers
are a bias, as ALiBi's."""


@dataclass(kw_only=True)
class Tokens:
    """B rows of T tokens each."""

    batch: int
    prompts: int | None
    """How many prompts generate was given, each of which may have several rows."""
    count: int
    """T."""
    start: int | Tensor
    """Column of the first; a tensor of one number where the cache counts on its device."""
    prompt: int | Tensor
    """Columns of the prompt, [B, 1] where rows differ; later ones are generated."""
    mask: Tensor | None
    """[B, start + T], nonzero where a column is no padding; None where nothing says."""
    real: Tensor | None
    """[B, T] bool, False for padding; None where there is none, or nothing says."""
    ids: Tensor | None
    """[B, T]; None where the decoder is given embeddings."""
    position_ids: Tensor | None
    """As the decoder is given them; those that count in several directions say nothing."""
    opaque: bool
    """Whether a mask is given that does not count the padding before these tokens."""
    device: torch.device

    @property
    def begins(self) -> bool:
        """Whether they are known to be the first of their sequences."""
        return not isinstance(self.start, Tensor) and self.start == 0

    @property
    def columns(self) -> Tensor:
        """[T] int64."""
        return torch.arange(self.count, device=self.device) + self._start

    @property
    def positions(self) -> Tensor:
        """[B or 1, T] int64: how many real tokens stand before each in its row."""
        if self.mask is not None:
            return ((self.mask != 0).cumsum(1) - 1)[:, -self.count :].clamp(min=0)
        if self.opaque:
            # Else they tell how tokens are rotated, not what stands before them.
            if self.position_ids is not None and self.position_ids.ndim == 2:
                return self.position_ids.to(self.device)
            if self.begins and self.real is not None:
                return (self.real.cumsum(1) - 1).clamp(min=0)
            raise ValueError(
                "scope: nothing says how much padding stands before these tokens; give the decoder "
                "position_ids, or an attention_mask [B, past + T]"
            )
        return self.columns[None]

    @property
    def prompt_lengths(self) -> Tensor:
        """[B or 1, 1] or [B or 1, T] int64: how many real tokens a row's prompt has."""
        mask = self.real if self.mask is None and self.begins else self.mask
        if mask is None:
            return self.prompt - (self.columns - self.positions)
        width = mask.shape[1]
        inside = torch.arange(width, device=mask.device) < self.prompt
        counted = ((mask != 0) & inside).sum(1, keepdim=True)
        # Columns still to come, in later chunks, are no padding: that stands on the left.
        to_come = self.prompt - width
        return counted + (to_come.clamp(min=0) if isinstance(to_come, Tensor) else max(to_come, 0))

    def generated(self) -> bool | Tensor:
        """Which tokens are: [1 or B, T] bool, or True or False where all or none are."""
        if not isinstance(self.start, Tensor) and not isinstance(self.prompt, Tensor):
            if self.start >= self.prompt:
                return True
            if self.start + self.count <= self.prompt:
                return False
        return (self.columns >= self.prompt).view(-1, self.count)

    def counted(self, generated: bool) -> Tensor:
        """Which tokens are no padding and, unless `generated`, of the prompt: [1 or B, T] bool."""
        counted = torch.ones(1, self.count, dtype=torch.bool, device=self.device)
        if not generated:
            made = self.generated()
            counted = counted & (~made if isinstance(made, Tensor) else not made)
        return counted if self.real is None else counted & self.real

    @property
    def _start(self) -> int | Tensor:
        if not isinstance(self.start, Tensor):
            return self.start
        return self.start.to(self.device).reshape(())


def past_length(cache) -> int | Tensor:
    """How many columns the cache holds; 0 without one."""
    if cache is None:
        return 0
    length = getattr(cache, "get_seq_length", None)
    past = 0 if length is None else length()
    if isinstance(past, Tensor):
        # A cache that counts in place would change what is kept of it.
        return past.clone()
    if past == 0:
        # The first layer of some keeps no columns, but a state, or nothing at all.
        layers = [each for each in getattr(cache, "layers", ()) if hasattr(each, "get_seq_length")]
        return max([0, *(each.get_seq_length() for each in layers if hasattr(each, "keys"))])
    return past


def padding(
    mask, start: int | Tensor, count: int, cache=None
) -> tuple[Tensor | None, Tensor | None]:
    """`Tokens.mask` and `Tokens.real` from a decoder's attention_mask, as far as it tells.

    A mask with a column a key tells if it has [B, start + T] of them; of more, as for a static
    cache, transformers reads so many. One with a row a query, [B, 1, T, keys], bool or what is
    added to scores, tells too: only padding does not attend to itself, or, where nothing says which
    key that is, on the left, to nothing. Whoever is told nothing steers everything, which no real
    token can notice, whereas columns read wrongly would leave real ones unsteered.
    """
    if isinstance(mask, dict):  # one a kind of attention
        kinds = (mask["full_attention"],) if "full_attention" in mask else mask.values()
        for kind in kinds:
            told = padding(kind, start, count, cache)
            if told[1] is not None:
                return told
        return None, None
    if not isinstance(mask, Tensor):
        return None, None
    if mask.ndim == 2 and not isinstance(start, Tensor) and mask.shape[1] >= start + count:
        mask = mask[:, : start + count]
        return mask, mask[:, start:] != 0
    if mask.ndim == 4 and count > 1 and mask.shape[2] == count:
        attended = (mask if mask.dtype == torch.bool else mask > MASKED)[:, 0]
        spare = attended.shape[2] - count  # keys of the past, and of a static cache's future
        ordered = spare == 0 or hasattr(cache, "get_seq_length")
        if not isinstance(start, Tensor) and start <= spare and ordered:
            return None, attended.diagonal(start, 1, 2)
        return None, attended.any(-1)
    return None, None


def packed(position_ids, real: Tensor | None) -> bool:
    """Whether positions [B, T] begin anew among a row's real tokens, as of sequences that share it.

    Waits for their device, so it is not asked while a call is compiled or captured.
    """
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return False
    if torch.compiler.is_compiling() or (
        position_ids.is_cuda and torch.cuda.is_current_stream_capturing()
    ):
        return False
    anew = position_ids.diff() < 0
    if real is not None:
        anew = anew & (real[:, 1:] & real[:, :-1]).to(anew.device)
    return bool(anew.any())
