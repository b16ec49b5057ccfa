"""Which tokens a decoder is called with, and where in their sequences they stand.

`Following` reads it from the decoder's arguments; from one call to the next a `Call` remembers how
much of the prompt has been read, and what was decided on it.
"""

from __future__ import annotations

import inspect
import threading
import weakref

import torch
from torch import Tensor, nn

from .conditions import Seen
from .generation import Told
from .scopes import spread
from .sites import Site
from .tokens import Tokens, packed, padding, past_length


class Call:
    """What a thread must remember: of the running call of the decoder, and of its sequences."""

    def __init__(self):
        self.tokens: Tokens | None = None
        self.running = False
        """Whether the decoder is."""
        self.awaited_by: nn.Module | None = None
        """The decoder, until it calls the steered module."""
        self.told: Told | None = None
        self.begin()

    def begin(self) -> None:
        """The next call is the first of its sequences."""
        self.began = self.cached = False
        self.read = 0 if self.told is None else self.told.start
        self.seen: tuple[Seen, ...] = ()
        self.on: Tensor | None = None

    def follow(self, start: int | Tensor, count: int, embedded: bool, cached: bool) -> int | Tensor:
        """Notice that sequences begin, and how much of their prompts has been read; the start."""
        told = self.told
        if not isinstance(start, Tensor):
            if told is not None and told.once:
                self._compare(start, count, embedded)
            elif start == 0:
                self.begin()
            self.read = start
        elif told is not None and self.read < told.end:
            # Prompts are read in order, so that a length on the device is known here too.
            start = self.read
        if told is not None and self.read < told.end:
            self.read += count
        self.began, self.cached = True, cached
        return start

    def _compare(self, start: int, count: int, embedded: bool) -> None:
        """Refuse a generation of which the decoder sees other columns than generate was given."""
        told = self.told
        extra = max(start - told.start, start + count - told.end if embedded else 0)
        # Not self.read, which changes at every step: who compiles would do it at every step.
        if extra > 0 and not self.began:
            raise ValueError(
                f"scope: the decoder has {extra} columns more than the prompt that generate was "
                "given; virtual tokens, as of prompt tuning, can only be steered with scope 'all'"
            )
        if start == 0 and self.began and (self.cached or count <= self.read):
            raise ValueError(
                f"scope: inside of generate, {count} tokens came without a past, after "
                f"{self.read}; a cache that does not count, or a second prompt, as of guidance, "
                "can only be steered with scope 'all'"
            )


class Calls(threading.local):
    """One call a thread: threads may share a model.

    Set once and changed inside, because Dynamo loses writes to the attributes of a thread's local.
    """

    def __init__(self, everyones: weakref.WeakSet[Call], lock: threading.Lock):
        self.running = Call()
        self._everyones, self._lock = everyones, lock
        with lock:
            everyones.add(self.running)

    @classmethod
    def new(cls) -> Calls:
        return cls(weakref.WeakSet(), threading.Lock())

    def __reduce__(self):
        return Calls.new, ()

    def others(self) -> list[Call]:
        """Those of other threads."""
        with self._lock:
            return [call for call in self._everyones if call is not self.running]


class Following:
    """Reads the calls of one decoder; where it `follows`, they must tell where prompts end."""

    def __init__(self, site: Site, device: torch.device, follows: bool):
        self.device, self.follows = device, follows
        parameters = inspect.signature(site.decoder.forward).parameters
        self.places = {name: place for place, name in enumerate(parameters)}
        if follows:
            self._require_followable(site)

    def tokens(self, call: Call, args: tuple, kwargs: dict) -> Tokens | None:
        """What the decoder is called with, on the steered module's device; None if it does not
        tell."""
        ids = self._argument("input_ids", args, kwargs)
        embeds = self._argument("inputs_embeds", args, kwargs)
        if ids is None and embeds is None:
            ids = args[0] if args else None
            if isinstance(ids, Tensor) and ids.is_floating_point():
                ids, embeds = None, ids
        given = ids if ids is not None else embeds
        if not isinstance(given, Tensor) or given.ndim < 2:
            return None
        batch, count = given.shape[:2]
        cache = self._argument("past_key_values", args, kwargs)
        if cache is None:
            cache = self._argument("past_kv_cache", args, kwargs)  # TransformerLens'
        start = past_length(cache)
        asked = self._argument("attention_mask", args, kwargs)
        position_ids = self._argument("position_ids", args, kwargs)
        told = Told(0, 0)
        if self.follows:
            if not (cache is None or hasattr(cache, "get_seq_length")):
                raise ValueError(
                    f"scope: the cache is a {type(cache).__name__}, which tells no length; "
                    "only scope 'all' of one configuration can do without"
                )
            told = call.told or Told(_guessed(start, count), 0)
            start = call.follow(start, count, ids is None, cache is not None)
        mask, real = map(self._here, padding(asked, start, count, cache))
        places_tell = asked is None or (mask is None and real is not None)
        if self.follows and (
            "cu_seq_lens_q" in kwargs or (places_tell and packed(position_ids, real))
        ):
            raise ValueError("scope: several sequences are packed in a row; give each its own")
        tokens = Tokens(
            batch=batch,
            prompts=told.prompts,
            count=count,
            start=start,
            prompt=told.columns,
            mask=mask,
            real=real,
            ids=ids,
            position_ids=position_ids,
            opaque=asked is not None and mask is None,
            device=self.device,
        )
        if isinstance(told.columns, Tensor) and told.columns.ndim:
            tokens.prompt = spread(told.columns, tokens, "prompt")
        return tokens

    def _require_followable(self, site: Site) -> None:
        config, kind = getattr(site.model, "config", None), type(site.decoder).__name__
        if getattr(config, "is_encoder_decoder", False):
            reason = "decodes what an encoder was given the prompt of"
        elif "use_cache" in self.places and "past_key_values" not in self.places:
            reason = "keeps a state that has no length"
        elif any(map(_prompt_is_learned, site.model.modules())):
            reason = "is given virtual tokens, which nobody counts"
        else:
            return
        raise ValueError(
            f"scope: {kind} {reason}, so nothing says where the prompt ends; only scope 'all' of "
            "one configuration can do without"
        )

    def _here(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.device == self.device:
            return tensor
        return tensor.to(self.device)

    def _argument(self, name: str, args: tuple, kwargs: dict):
        if name in kwargs:
            return kwargs[name]
        place = self.places.get(name, len(args))
        return args[place] if place < len(args) else None


def _guessed(start: int | Tensor, count: int) -> int | Tensor:
    """Columns of the prompt where nobody says."""
    if not isinstance(start, Tensor):
        return start or count
    if count == 1:
        return start.reshape(()).clamp(min=1)
    raise ValueError(
        "scope: the cache keeps its length on the device, so nothing says whether these "
        f"{count} tokens are a prompt; call the model inside `with handle.prompt(columns)`"
    )


def _prompt_is_learned(module: nn.Module) -> bool:
    """Whether PEFT puts virtual tokens before what the module is given."""
    config = getattr(module, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))
