"""A model's generate, told to steerings: only its caller knows where the prompt ends."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
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
    new: int | None = None
    """How many tokens are asked for; None if nobody says."""


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
        if not self.listeners:  # somebody kept it
            return self.original(*args, **kwargs)
        asked = partial(self._asked, args, kwargs)
        _require_shown_padding(kwargs.get("attention_mask"), asked("prefill_chunk_size"))
        _require_one_prompt(asked("guidance_scale"))
        told = _told(asked, *args, **kwargs)
        with ExitStack() as until:
            for listener in self.listeners:
                until.enter_context(listener.told(told))
            return self.original(*args, **kwargs)

    def _asked(self, args: tuple, kwargs: dict, name: str):
        """An option of this call: its own, or that of its configuration, or the model's."""
        if name in kwargs:
            return kwargs[name]
        given = (*args, kwargs.get("generation_config"))
        configs = (*given, getattr(self.model, "generation_config", None))
        values = (getattr(config, name, None) for config in configs)
        return next((value for value in values if value is not None), None)


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


def _require_shown_padding(mask: Tensor | None, chunk: int | None) -> None:
    if chunk and isinstance(mask, Tensor) and mask.ndim == 2 and not (mask[:, -1] != 0).all():
        raise ValueError(
            "attention_mask: pads on the right, which a prompt in chunks shows too late; pad on "
            "the left, or leave prefill_chunk_size out"
        )


def _require_one_prompt(guidance: float | None) -> None:
    """Guidance reads another, with a cache or with rows of its own."""
    if guidance not in (None, 1):
        raise ValueError(
            f"scope: guidance_scale is {guidance}, for which generate reads a second prompt; only "
            "scope 'all' of one configuration can do that"
        )


def _told(asked: Callable, inputs: Tensor | None = None, *args, **kwargs) -> Told:
    """From the arguments of generate."""
    given = (kwargs.get("inputs_embeds"), inputs, kwargs.get("inputs"), kwargs.get("input_ids"))
    prompt = next((each for each in given if each is not None), None)
    if not isinstance(prompt, Tensor | None):
        raise ValueError(
            f"scope: generate is given a {type(prompt).__name__}, which does not tell how many "
            "tokens the prompt has; give their ids, [B, T]"
        )
    batch, columns = (1, 1) if prompt is None else prompt.shape[:2]
    new, most = asked("max_new_tokens"), asked("max_length")
    if new is None and most is not None:
        new = most - columns
    mask = kwargs.get("attention_mask")
    start = int(past_length(kwargs.get("past_key_values")))
    if isinstance(mask, Tensor) and mask.ndim == 2:
        if prompt is not None and mask.shape[1] not in (columns, start + columns):
            raise ValueError(
                f"attention_mask: has {mask.shape[1]} columns, but generate is given {columns} and "
                f"its cache holds {start}, so nothing says where the prompt ends; accepted are "
                f"{start + columns}"
            )
        columns = mask.shape[1]
    elif columns <= start:
        # Of a sequence that goes on from a cache, the new tokens alone may be given.
        columns += start
    drafts = bool(asked("is_assistant"))
    return Told(columns, columns, batch, start, once=True, drafts=drafts, new=new)
