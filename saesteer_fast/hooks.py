"""What a steering does while the model runs: three hooks.

`before` the decoder runs notes what its tokens are (following.py); `steer` replaces the steered
module's output; `after` the decoder ran forgets them, and raises if the module was passed by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import sites
from .conditions import Decision, Seen, decided, decisions
from .following import Call, Calls, Following
from .generation import Told
from .plan import Plan
from .scopes import Scoped, both, spread
from .sites import Site
from .tokens import Tokens


class Hooks:
    """What one steering does, and knows, while the model runs."""

    def __init__(self, site: Site, plan: Plan, scope: Scoped):
        self.path, self.is_layer = site.path, site.is_layer
        self.plan, self.scope = plan, scope
        self.calls = Calls.new()
        self.follows = not scope.everything or plan.gate is not None or plan.table.rowwise
        self.following = Following(site, plan.device, self.follows)
        self.active: tuple[Seen, Tensor] | None = None
        self.gated: tuple[tuple[Seen, ...], Tensor] | None = None
        self.padded = False  # whether any call has told of padding
        self.handle = None  # which attach.py gives it

    def __getstate__(self) -> dict:
        """A handle removes hooks of its own model only, not those of a copy."""
        return vars(self) | {"handle": None}

    def before(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        call = self.calls.running
        call.tokens = self.following.tokens(call, args, kwargs)
        call.running, call.awaited_by = True, decoder
        if call.tokens is not None and call.tokens.real is not None:
            self.padded = True  # not read: torch.compile would compile again when it has changed

    def steer(self, module: nn.Module, args: tuple, output):
        hidden = output[0] if isinstance(output, tuple) else output
        self._require_stream(hidden)
        call = self.calls.running
        decoder, call.awaited_by = call.awaited_by, None
        if decoder is None and call.running and self.is_layer:
            raise RuntimeError(
                f"{self.path} runs several times in a call of its decoder, so that it is no layer "
                "of its own; a module inside of it can be named, and is steered each time"
            )
        self._require_place(decoder, module)
        tokens = call.tokens
        if tokens is None and self.padded and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{self.path} is computed again by a checkpoint, where nothing says which tokens "
                "are padding; checkpoint whole layers, or give the decoder no attention_mask"
            )
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
        if not isinstance(output, tuple):
            return steered
        replaced = (steered, *output[1:])
        return output._make(replaced) if hasattr(output, "_make") else replaced  # a namedtuple

    def after(self, decoder: nn.Module, args: tuple, output) -> None:
        call = self.calls.running
        passed_by = call.awaited_by is not None and output is not None
        call.running, call.tokens, call.awaited_by = False, None, None
        # What a model drafts with its first layers, it reads again with all.
        drafts = call.told is not None and call.told.drafts
        if passed_by and not drafts:
            raise RuntimeError(
                f"{self.path} was not called as a module: nothing was steered; the call ended "
                "before it, or something else was called in its place, as its forward"
            )

    @contextmanager
    def told(self, told: Told) -> Iterator[None]:
        call = self.calls.running
        if call.told is not None and not call.told.once and not told.once:
            raise RuntimeError(
                "prompt: this thread is inside of another `with handle.prompt` of this steering; "
                "coroutines share one, so do not await in it"
            )
        if told.new == 1 and self.scope.begins_late and not told.drafts:
            raise ValueError(
                "scope: 'generated' would steer nothing, since generate is asked for one new "
                "token, which is not read again; accepted are 2 and more (max_new_tokens)"
            )
        before, gated = dict(vars(call)), self.gated
        call.told = told
        call.begin()
        try:
            yield
        finally:
            vars(call).update(before)
            if call.told is None or not call.told.once:
                call.begin()
            else:  # a generate within one, which drafts its candidates
                self.gated = gated

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

    def _require_stream(self, hidden) -> None:
        if not isinstance(hidden, Tensor):
            raise TypeError(f"{self.path} gives a {type(hidden).__name__}, no tensor to steer")
        if hasattr(hidden, "full_tensor"):
            raise TypeError(
                f"{self.path} gives a DTensor, {hidden.placements}; a plain tensor with the whole "
                "width is needed: gather it at the end of the layer"
            )
        if hidden.is_floating_point() and hidden.shape[-1:] != (self.plan.d,):
            raise ValueError(
                f"sae: is for width {self.plan.d}, {self.path} gives {tuple(hidden.shape)}"
            )
        if self.is_layer and hidden.ndim > 3:
            raise ValueError(f"{self.path} gives {tuple(hidden.shape)}, not one vector a token")

    def _lost(self, hidden: Tensor, outside: bool) -> str:
        """Why nothing says which tokens these are."""
        given = tuple(hidden.shape)
        why = f"gives {given}, which are not the tokens that its decoder was called with"
        if outside:
            why = (
                "runs outside of its decoder, as where a checkpoint computes it again, where the "
                "decoder's forward is called in its place, or where it was attached during a call"
            )
        return f"scope: {self.path} {why}; only scope 'all' of one configuration can do that"

    def _require_place(self, decoder: nn.Module | None, module: nn.Module) -> None:
        if decoder is not None and not sites.is_at(decoder, self.path, module):
            raise RuntimeError(
                f"model: {self.path} is no longer the module that is steered: it, or one around "
                "it, was wrapped, as by an adapter, or moved; remove the steering and attach it "
                "again"
            )

    def _mask(self, call: Call, tokens: Tokens | None, hidden: Tensor) -> bool | Tensor:
        """Which tokens are steered: [B or 1, T] bool, or True or False for all or none."""
        mask = self.scope(tokens)
        if self.plan.gate is not None:
            mask = both(mask, self._gate(call, tokens, hidden, mask))
        if self.plan.active is not None and mask is not False:
            acts, on = self.plan.holds(hidden)
            mask = both(mask, on)
            if tokens is not None:
                self.active = Seen(acts, tokens, generated=True), on
        if tokens is not None and tokens.real is not None:
            mask = both(mask, tokens.real)
        return mask

    def _gate(self, call: Call, tokens: Tokens, hidden: Tensor, mask: bool | Tensor):
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

    def _decide(self, call: Call, tokens: Tokens, hidden: Tensor, mask: bool | Tensor) -> None:
        plan = self.plan
        if tokens.generated() is True:
            raise RuntimeError(
                "when: the gate has seen no prompt, only what comes after one; call the model with "
                "the prompt first"
            )
        drafts = call.told is not None and call.told.drafts
        if not (drafts or call.seen or tokens.begins):
            raise ValueError(
                f"when: the gate is decided on the whole prompt, of which {tokens.start} columns "
                "are in the cache already; call the model with all of it, without past_key_values"
            )
        if tokens.opaque and tokens.real is None and tokens.count > 1:
            raise ValueError(
                "when: nothing says which of the prompt's tokens are padding, which no gate "
                "counts; give the decoder an attention_mask [B, past + T]"
            )
        acts = plan.on_gate.acts(hidden.detach(), plan.impl)
        call.seen = (*call.seen, Seen(acts, tokens, generated=False))
        if call.told is None or call.read >= call.told.end:
            call.on = decided(plan.gate, call.seen)
            self.gated = call.seen, call.on
        elif mask is not False:
            raise RuntimeError(
                "when: the prompt comes in chunks, and the gate is decided by its last one; only "
                "scope 'generated' can wait for that"
            )
