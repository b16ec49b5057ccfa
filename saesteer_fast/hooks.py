"""What a steering does while the model runs: three hooks.

`before` the decoder runs notes what its tokens are; `steer` replaces the steered module's output;
`after` the decoder ran forgets them, and raises if the module was passed by. In between they follow
each sequence: where its prompt ends, and what was decided on it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from . import sites
from .conditions import Decision, Seen, decided, decisions
from .generation import Told
from .plan import Plan
from .scopes import Scoped, both, spread
from .sites import Site
from .tokens import Tokens, packed, padding, past_length


class _Call:
    """What a thread must remember: of the running call of the decoder, and of its sequences."""

    def __init__(self):
        self.tokens: Tokens | None = None
        self.awaited_by: nn.Module | None = None
        self.told: Told | None = None
        self.begin()

    def begin(self) -> None:
        """The next call is the first of its sequences."""
        self.began = False
        self.read = 0 if self.told is None else self.told.start
        self.seen: tuple[Seen, ...] = ()
        self.on: Tensor | None = None


class _Calls(threading.local):
    """One call a thread: threads may share a model.

    Set once and changed inside, because Dynamo loses writes to the attributes of a thread's local.
    """

    def __init__(self):
        self.running = _Call()

    def __reduce__(self):
        return _Calls, ()


class Hooks:
    """What one steering does, and knows, while the model runs."""

    def __init__(self, site: Site, plan: Plan, scope: Scoped):
        self.path, self.is_layer = site.path, site.is_layer
        self.plan, self.scope = plan, scope
        self.calls = _Calls()
        parameters = inspect.signature(site.decoder.forward).parameters
        self.places = {name: place for place, name in enumerate(parameters)}
        self.follows = not scope.everything or plan.gate is not None or plan.table.rowwise
        if self.follows:
            self._require_followable(site)
        self.active: tuple[Seen, Tensor] | None = None
        self.gated: tuple[tuple[Seen, ...], Tensor] | None = None
        self.handle = None  # which attach.py gives it

    def __getstate__(self) -> dict:
        """A handle removes hooks of its own model only, not those of a copy."""
        return vars(self) | {"handle": None}

    def before(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        call = self.calls.running
        call.awaited_by = decoder
        call.tokens = self._tokens(call, args, kwargs)

    def steer(self, module: nn.Module, args: tuple, output):
        hidden = output[0] if isinstance(output, tuple) else output
        self._require_stream(hidden)
        call = self.calls.running
        decoder, call.awaited_by = call.awaited_by, None
        self._require_place(decoder, module)
        tokens = call.tokens
        lead = hidden.shape[:-1]
        if tokens is not None and (tokens.batch, tokens.count) != lead:
            tokens = None
        if tokens is None and self.follows:
            outside = decoder is None and call.tokens is None
            raise ValueError(self._lost(hidden, outside))
        mask = self._mask(call, tokens, hidden)
        if mask is False:
            return None
        if mask is True:
            mask = None
        elif mask.shape != lead:
            mask = mask.expand(lead)
        chosen = self.plan.chosen
        if chosen is not None:
            chosen = spread(chosen, tokens, self.plan.chosen_by)
        steered = self.plan(hidden, mask, chosen)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    def after(self, decoder: nn.Module, args: tuple, output) -> None:
        call = self.calls.running
        passed_by = call.awaited_by is not None and output is not None
        call.tokens, call.awaited_by = None, None
        if passed_by:
            raise RuntimeError(f"{self.path} was not called as a module: nothing was steered")

    @contextmanager
    def told(self, told: Told) -> Iterator[None]:
        call = self.calls.running
        if call.told is not None and not call.told.once and not told.once:
            raise RuntimeError(
                "prompt: this thread is inside of another `with handle.prompt` of this steering; "
                "coroutines share one, so do not await in it"
            )
        before, found = dict(vars(call)), (self.active, self.gated)
        call.told = told
        call.begin()
        try:
            yield
        finally:
            vars(call).update(before)
            if call.told is None or not call.told.once:
                call.begin()
            elif call.on is not None:  # a generate within one, which drafts its candidates
                self.active, self.gated = found

    def decisions(self) -> list[Decision]:
        plan, found = self.plan, []
        if plan.active is None and plan.gate is None:
            raise ValueError("when: this steering has no condition, so nothing is decided")
        if self.active is not None:
            seen, on = self.active
            found += decisions(plan.active, (seen,), (on & seen.counted()).any(-1))
        if self.gated is not None:
            found += decisions(plan.gate, *self.gated)
        return found

    def _tokens(self, call: _Call, args: tuple, kwargs: dict) -> Tokens | None:
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
        start = past_length(cache)
        asked = self._argument("attention_mask", args, kwargs)
        position_ids = self._argument("position_ids", args, kwargs)
        told = Told(0, 0)
        if self.follows:
            if "cu_seq_lens_q" in kwargs or (asked is None and packed(position_ids)):
                raise ValueError("scope: several sequences are packed in a row; give each its own")
            told = call.told or Told(self._guessed(start, count), 0)
            start = self._follow(call, start, count, ids is None)
            rows = told.columns.shape[:1] if isinstance(told.columns, Tensor) else ()
            if rows not in ((), (batch,)):
                raise ValueError(
                    f"prompt: columns of {rows[0]} rows are given for a batch of {batch}"
                )
        mask, real = map(self._here, padding(asked, start, count, cache))
        return Tokens(
            batch,
            told.prompts,
            count,
            start,
            told.columns,
            mask,
            real,
            ids,
            position_ids,
            asked is not None and mask is None,
            self.plan.device,
        )

    def _require_stream(self, hidden) -> None:
        if not isinstance(hidden, Tensor):
            raise TypeError(f"{self.path} gives a {type(hidden).__name__}, no tensor to steer")
        if hasattr(hidden, "full_tensor"):
            raise TypeError(
                f"{self.path} gives a DTensor, {hidden.placements}; a plain tensor with the whole "
                "width is needed: gather it at the end of the layer"
            )
        if self.is_layer and hidden.ndim > 3:
            raise ValueError(f"{self.path} gives {tuple(hidden.shape)}, not one vector a token")

    def _lost(self, hidden: Tensor, outside: bool) -> str:
        """Why nothing says which tokens these are."""
        given = tuple(hidden.shape)
        why = f"gives {given}, which are not the tokens that its decoder was called with"
        if outside:
            why = (
                "runs outside of its decoder, as where a checkpoint computes it again, or where it "
                "was attached during a call"
            )
        return f"scope: {self.path} {why}; only scope 'all' of one configuration can do that"

    def _require_place(self, decoder: nn.Module | None, module: nn.Module) -> None:
        if decoder is not None and not sites.is_at(decoder, self.path, module):
            raise RuntimeError(
                f"model: {self.path} is no longer the module that is steered: it, or one around "
                "it, was wrapped, as by an adapter, or moved; remove the steering and attach it "
                "again"
            )

    def _require_followable(self, site: Site) -> None:
        config, kind = getattr(site.model, "config", None), type(site.decoder).__name__
        if getattr(config, "is_encoder_decoder", False):
            reason = "decodes what an encoder was given the prompt of"
        elif "use_cache" in self.places and "past_key_values" not in self.places:
            reason = "keeps a state that has no length"
        else:
            return
        raise ValueError(
            f"scope: {kind} {reason}, so nothing says where the prompt ends; only scope 'all' of "
            "one configuration can do without"
        )

    def _guessed(self, start: int | Tensor, count: int) -> int | Tensor:
        """Columns of the prompt where nobody says."""
        if isinstance(start, int):
            return start or count
        if count == 1:
            return start
        raise ValueError(
            "scope: the cache keeps its length on the device, so nothing says whether these "
            f"{count} tokens are a prompt; call the model inside `with handle.prompt(columns)`"
        )

    def _follow(self, call: _Call, start: int | Tensor, count: int, embedded: bool) -> int | Tensor:
        """Notice that sequences begin, and how much of their prompts has been read; the start."""
        told = call.told
        if isinstance(start, int):
            if told is not None and told.once:
                self._compare(call, start, count, embedded)
            if start == 0 and not (told is not None and told.once and call.on is not None):
                call.begin()
            call.read = start
        elif told is not None and call.read < told.end:
            # Prompts are read in order, so that a length on the device is known here too.
            start = call.read
        if told is not None and call.read < told.end:
            call.read += count
        call.began = True
        return start

    def _compare(self, call: _Call, start: int, count: int, embedded: bool) -> None:
        """Refuse a generation of which the decoder sees other columns than generate was given."""
        told = call.told
        extra = max(start - told.start, start + count - told.end if embedded else 0)
        # Not call.read, which changes at every step: who compiles would do it at every step.
        if extra > 0 and not call.began:
            raise ValueError(
                f"scope: the decoder has {extra} columns more than the prompt that generate was "
                "given; virtual tokens, as of prompt tuning, can only be steered with scope 'all'"
            )
        if start == 0 and call.began and count <= call.read:
            raise ValueError(
                f"scope: inside of generate, {count} tokens came without a past, after "
                f"{call.read}; a cache that does not count, or a second prompt, as of guidance, "
                "can only be steered with scope 'all'"
            )

    def _mask(self, call: _Call, tokens: Tokens | None, hidden: Tensor) -> bool | Tensor:
        """Which tokens are steered: [B or 1, T] bool, or True or False for all or none."""
        mask = True if self.scope.everything else self.scope(tokens)
        if self.plan.gate is not None:
            mask = both(mask, self._gate(call, tokens, hidden, mask))
        if self.plan.active is not None and mask is not False:
            acts, on = self.plan.holds(hidden)
            mask = both(mask, on)
            if tokens is not None:
                self.active = Seen(acts, tokens, generated=True), on
        if mask is not False and tokens is not None and tokens.real is not None:
            mask = both(mask, tokens.real)
        return mask

    def _gate(self, call: _Call, tokens: Tokens, hidden: Tensor, mask: bool | Tensor):
        """Which rows the gate lets through, [B, 1] bool; False while it is not decided yet."""
        if call.on is None:
            self._decide(call, tokens, hidden, mask)
        if call.on is None:
            return False
        if len(call.on) != tokens.batch:
            raise RuntimeError(
                f"when: the gate was decided for {len(call.on)} rows, now there are {tokens.batch}"
            )
        return call.on[:, None]

    def _decide(self, call: _Call, tokens: Tokens, hidden: Tensor, mask: bool | Tensor) -> None:
        plan = self.plan
        if not call.seen and tokens.generated() is True:
            raise RuntimeError(
                "when: the gate has seen no prompt, only what comes after one; call the model with "
                "the prompt first"
            )
        drafts = call.told is not None and call.told.drafts
        if not (drafts or call.seen or (isinstance(tokens.start, int) and tokens.start == 0)):
            raise ValueError(
                f"when: the gate is decided on the whole prompt, of which {tokens.start} columns "
                "are in the cache already; call the model with all of it, without past_key_values"
            )
        acts = plan.on_gate.acts(hidden.detach(), plan.impl)
        call.seen = (*call.seen, Seen(acts, tokens, generated=False))
        if call.told is None or call.read >= call.told.end:
            call.on = decided(plan.gate, call.seen)
            self.gated, call.seen = (call.seen, call.on), ()
        elif mask is not False:
            raise RuntimeError(
                "when: the prompt comes in chunks, and the gate is decided by its last one; only "
                "scope 'generated' can wait for that"
            )

    def _here(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.device == self.plan.device:
            return tensor
        return tensor.to(self.plan.device)

    def _argument(self, name: str, args: tuple, kwargs: dict):
        if name in kwargs or not args:
            return kwargs.get(name)
        place = self.places.get(name, len(args))
        return args[place] if place < len(args) else None
