"""A model's generate, told to steerings: only its caller knows where the prompt ends."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

from torch import Tensor, nn

from .tokens import past_length


class Told(NamedTuple):
    """What is known of a sequence before the decoder is called."""

    columns: int | Tensor
    """Of the prompt, padding included; [B, 1] where rows differ."""
    end: int
    """The largest of them."""
    prompts: int | None = None
    """How many; each may get several rows. None if nobody says."""
    start: int = 0
    """Columns that the cache holds already."""
    once: bool = False
    """Whether all calls until told otherwise are of one batch of sequences."""
    drafts: bool = False
    """Whether another model checks what is generated."""


class Generate:
    """Stands in for `model.generate` and does what that does, telling listeners of the prompt.

    It is an attribute of the instance: a copy or a pickle of the model brings its own.
    """

    def __init__(self, model: nn.Module):
        self.model, self.listeners = model, []
        self.replaced = model.__dict__.get("generate")

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def original(self) -> Callable:
        return self.replaced or type(self.model).generate.__get__(self.model)

    def __call__(self, *args, **kwargs):
        self._require_shown_padding(**kwargs)
        told = _told(*args, **kwargs)
        with ExitStack() as until:
            for listener in self.listeners:
                until.enter_context(listener.told(told))
            return self.original(*args, **kwargs)

    def _require_shown_padding(
        self, *, attention_mask=None, generation_config=None, prefill_chunk_size=None, **others
    ) -> None:
        config = generation_config or getattr(self.model, "generation_config", None)
        chunk = prefill_chunk_size or getattr(config, "prefill_chunk_size", None)
        two = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        if chunk and two and not (attention_mask[:, -1] != 0).all():
            raise ValueError(
                "attention_mask: pads on the right, which a prompt in chunks shows too late; pad "
                "on the left, or leave prefill_chunk_size out"
            )


def listen(model: nn.Module, listener) -> Callable[[], None]:
    """Have `listener.told(Told)`, a context, around every generate inside `model`; undone by
    calling what is returned."""
    stands = []
    for module in model.modules():
        if callable(getattr(type(module), "generate", None)):
            if not isinstance(module.__dict__.get("generate"), Generate):
                module.generate = Generate(module)
            module.generate.listeners.append(listener)
            stands.append(module.generate)

    def undo() -> None:
        for stand in stands:
            stand.listeners.remove(listener)
            if not stand.listeners and stand.model.__dict__.get("generate") is stand:
                del stand.model.generate
                if stand.replaced is not None:
                    stand.model.generate = stand.replaced

    return undo


def _told(inputs: Tensor | None = None, *args, **kwargs) -> Told:
    """From the arguments of generate."""
    given = (kwargs.get("inputs_embeds"), inputs, kwargs.get("inputs"), kwargs.get("input_ids"))
    prompt = next((tensor for tensor in given if tensor is not None), None)
    batch, columns = (1, 1) if prompt is None else prompt.shape[:2]
    mask = kwargs.get("attention_mask")
    start = int(past_length(kwargs.get("past_key_values")))
    if isinstance(mask, Tensor) and mask.ndim == 2:
        columns = mask.shape[1]
    elif columns <= start:
        # Of a sequence that goes on from a cache, the new tokens alone may be given.
        columns += start
    drafts = bool(getattr(kwargs.get("generation_config"), "is_assistant", False))
    return Told(columns, columns, batch, start, once=True, drafts=drafts)
