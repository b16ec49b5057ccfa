"""Steering a whole model: `steering` attaches hooks (hooks.py), its Handle speaks to them."""

from __future__ import annotations

import sys
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn

from . import sites
from .choice import Impl
from .conditions import Decision, When
from .edits import Configurations
from .generation import Told, listen
from .hooks import Hooks
from .numbers import is_integer
from .plan import ErrorTerm, Held, Plan, Reading, Rows, require_sae
from .sae import SAE
from .scopes import Scope, Scoped
from .sites import Site

OLDEST = (5, 9)
"""Of the releases of transformers that can be steered."""

RETURNING = 0.1
"""Seconds that a generation may take to return once it has streamed its last token."""


def steering(
    model: nn.Module,
    sae: SAE,
    edits: Configurations,
    *,
    layer: int | str | None = None,
    scope: Scope = "all",
    rows: Rows | None = None,
    when: When | None = None,
    error: ErrorTerm = "keep",
    measure: Reading | None = None,
    impl: Impl = "auto",
) -> Handle:
    """Edit latents of `sae` in `model`, from now until the handle is removed.

        with sf.steering(model, sae, {22373: 12.0}, layer=6) as handle:
            model.generate(...)
            handle.set({22373: 8.0})

    What is steered is the output of decoder layer `layer` (0 is the first), or of the module it
    names ("layers.6", "layers.6.mlp", "model.layers.6"); by default, of sae.hookpoint. In a model
    that reads more than text, it is the language decoder's. `edits`, `rows`, `error` and `measure`,
    the formula, dtypes and errors are those of `steer`; a list of edits has one for each row of the
    batch. Steerings of one module act in the order in which they were attached, each on what the
    one before it made, and before anyone else's hooks, unless one is registered with prepend=True
    later.

    scope says which tokens: "all", "prompt", "generated", sf.positions, sf.not_tokens, a bool
    tensor [B, S], or a list, all of which must hold; padding never. when, one sf.active and one
    sf.gate or either, asks the SAE's own activations.

    The prompt is what model.generate is given; a reference to that method taken before attaching
    does not tell. Any other call without a cache, or with an empty one, is of a prompt; what is
    called onto a cache is generated; `handle.prompt` says otherwise. Rows that generate repeats,
    for beams or several answers, share what was given for their prompt.

    ValueError is raised for "generated" where generate is asked for one new token, since the last
    token of an answer is never read; and for all but scope "all" of one configuration where nothing
    tells where a prompt ends: encoder-decoders, caches and recurrent states without a length,
    virtual tokens (prompt tuning), and guidance, which reads a second prompt.

    Padding is left alone where the decoder is given an attention_mask of [B, past + T], or the
    4-D one that generate makes for a static cache. Without one nothing says what is padding, and
    every position is steered; what real tokens get is the same.

    Kept on the module's device: W_enc in the SAE's dtype and b_enc in fp32 (a row a latent, where
    the measure needs no more), one row of W_dec a latent; the whole SAE for error="drop". Rows are
    fp32 where the SAE has decoder_norm, and W_enc is there once more in its `order`. The model's
    dtype may change later, its device may not. Adapters may come and go, but where one is put
    around the steered module itself, calls raise RuntimeError: attach after that. Steering belongs
    to the model, whichever thread calls it, so attach and remove while none does; a deep copy or a
    pickle of the model is steered too, and save_pretrained writes the weights as they are,
    unsteered. A model may be compiled before or after; attaching makes torch.compile forget all it
    compiled, for it looks for no new hooks by itself, whereas strengths, masks and choices change
    in place. A CUDA graph replays what it captured; an exported program stays steered, by the
    strengths that the handle sets.
    """
    require_sae(sae)
    _require_transformers(model)
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps a model in another one
    site = sites.of(model, layer, sae)
    device = sites.device(site)
    plan = Plan(sae, edits, device, when=when, error=error, measure=measure, impl=impl)
    plan.choose(rows)
    plan.require_ready()
    _warn_of_another(site, plan)
    hooks = Hooks(site, plan, Scoped(scope, device))
    _warn_of_guesses(site, hooks)
    return Handle(site, hooks)


def steerings(model: nn.Module) -> list[Handle]:
    """The handles that are attached to `model`, or to any part of it, oldest first.

        for handle in sf.steerings(model):
            handle.remove()

    (`remove` raises where somebody has cleared hooks, when it is done; go on with the others then.)
    A copy of a steered model is steered for good, and has none. Raises TypeError for what is no
    torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, a torch.nn.Module is needed")
    # By either of its hooks, one of which somebody may have cleared.
    found = {
        hooks: key
        for module in model.modules()
        for registered in (module._forward_hooks, module._forward_pre_hooks)
        for key, hooks in _ours(registered).items()
    }
    return [hooks.handle for hooks in sorted(found, key=found.get) if hooks.handle is not None]


class Handle(Held):
    """One steering of one model; `steering` makes it. Leaving its `with` block removes it."""

    def __init__(self, site: Site, hooks: Hooks):
        super().__init__(hooks.plan)
        self._name, self._hooks = site.path, hooks
        hooks.handle = self
        self._module, self._decoder = weakref.ref(site.module), weakref.ref(site.decoder)
        self._undo = _install(site, hooks)
        self._attached, self._entered = True, False

    @property
    def mask(self) -> Tensor:
        """[B, S] bool: the mask in the scope, read at every call, so it may change in place. Raises
        ValueError where the scope has none, or several."""
        return self._hooks.scope.mask

    @property
    def decisions(self) -> list[Decision]:
        """What `when` said last, and why: of each row, the sf.active of the model's latest call,
        and the sf.gate of its latest prompt. Reading waits for the device. Raises ValueError for a
        steering without a condition."""
        return self._hooks.decisions()

    def set(self, edits: Configurations) -> None:
        self._require_attached()
        super().set(edits)

    def choose(self, rows: Rows) -> None:
        self._require_attached()
        super().choose(rows)

    def prompt(self, columns: int | Tensor) -> AbstractContextManager[None]:
        """While inside, this thread's calls are of sequences whose first `columns` columns,
        padding included, are the prompt: a number, or int64 [B] where rows differ.

        For loops written by hand, and for texts that are not generated but scored; generate says
        it itself. A call without a cache or with an empty one begins the next sequences. Raises
        RuntimeError inside of another such block in the same thread, as coroutines may be, and
        warns where no `with` enters it.
        """
        self._require_attached()
        return _Prompt(self._hooks.told(_told_by_hand(columns, self._plan.device)))

    def remove(self) -> None:
        """Stop steering. Removing twice does no harm.

        Raises RuntimeError where somebody else had removed its hooks before, and where another
        thread is seen in the middle of a call.
        """
        self.__exit__(None, None, None)

    def _require_attached(self) -> None:
        if not self._attached:
            raise RuntimeError(f"this steering of {self._name} was removed; attach a new one")
        self._require_hooks()

    def _require_hooks(self) -> None:
        module, decoder, hooks = self._module(), self._decoder(), self._hooks
        if module is None or decoder is None:  # and nobody calls them
            return
        if not (
            hooks.steer in module._forward_hooks.values()
            and hooks.after in decoder._forward_hooks.values()
            and hooks.before in decoder._forward_pre_hooks.values()
        ):
            raise RuntimeError(
                f"{self._name}: somebody removed hooks of this steering, as by clearing all of a "
                "module; calls since then were not steered, or with their padding"
            )

    def _require_no_other_thread(self) -> None:
        others, end = self._hooks.calls.others(), time.monotonic() + RETURNING
        while (
            any(call.told for call in others)
            and not any(call.running for call in others)
            and time.monotonic() < end
        ):
            time.sleep(1e-3)
        if any(call.told or call.running for call in others):
            raise RuntimeError(
                f"{self._name}: another thread is in the middle of a call of the model, whose rest "
                "is not steered, or was interrupted in one; join it before the steering is removed"
            )

    def __enter__(self) -> Handle:
        self._require_attached()
        if self._entered:
            raise RuntimeError(f"this steering of {self._name} is in a `with` block already")
        self._entered = True
        return self

    def __exit__(self, error: type[BaseException] | None, *exc_info: object) -> None:
        attached, self._attached = self._attached, False
        with self._undo:
            if attached and error is None:
                self._require_hooks()
                self._require_no_other_thread()

    def __reduce__(self):
        raise TypeError(
            "a Handle cannot be copied or pickled: it removes the hooks of one model; a copy of "
            "the model alone is steered too"
        )

    def __repr__(self) -> str:
        state = "" if self._attached else ", removed"
        return f"Handle({self._name}: {self._plan.table.described()}{state})"


def _require_transformers(model: nn.Module) -> None:
    """pip asks for it too, but what another package wants may have won."""
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, nn.Module):
        return
    release = tuple(map(int, library.__version__.split(".")[:2]))
    if release < OLDEST and any(isinstance(m, library.PreTrainedModel) for m in model.modules()):
        raise RuntimeError(
            f"model: is of transformers {library.__version__}, where static caches and continuous "
            f"batching would be steered wrongly; {'.'.join(map(str, OLDEST))} or newer is needed"
        )


class _Prompt(AbstractContextManager):
    """Handle.prompt's context, which is missed where nobody enters it."""

    def __init__(self, told: AbstractContextManager[None]):
        self._told, self._entered = told, False

    def __enter__(self) -> None:
        self._entered = True
        self._told.__enter__()

    def __exit__(self, *exc_info: object) -> bool | None:
        return self._told.__exit__(*exc_info)

    def __del__(self):
        if not self._entered:
            warnings.warn(
                "prompt: said nothing, for no `with` entered it: `with handle.prompt(columns):`",
                stacklevel=2,
            )


def _told_by_hand(columns: int | Tensor, device: torch.device) -> Told:
    if isinstance(columns, Tensor) and columns.dtype == torch.int64 and columns.ndim == 1:
        ends = columns.tolist()
        columns = columns.to(device)[:, None]
    elif is_integer(columns):
        ends = [int(columns)]
        columns = int(columns)
    else:
        is_tensor = isinstance(columns, Tensor)
        given = f"{columns.dtype} {tuple(columns.shape)}" if is_tensor else repr(columns)
        raise TypeError(f"columns: got {given}, an integer or an int64 tensor [B] is needed")
    if min(ends, default=0) < 0:
        raise ValueError(f"columns: got {min(ends)}, the prompt's length is needed, 0 or more")
    return Told(columns, max(ends, default=0))


def _install(site: Site, hooks: Hooks) -> ExitStack:
    """Register all hooks or none; closing what is returned removes them."""
    with ExitStack() as undo:

        def register(handle: torch.utils.hooks.RemovableHandle) -> None:
            undo.callback(handle.remove)

        register(site.module.register_forward_hook(hooks.steer))
        _put_first(site.module)
        register(site.decoder.register_forward_hook(hooks.after, always_call=True))
        # Last, and so removed first: no other thread's call awaits a hook that is not there.
        register(site.decoder.register_forward_pre_hook(hooks.before, with_kwargs=True))
        if hooks.follows:
            undo.callback(listen(site.model, hooks))
        _recompile()
        return undo.pop_all()


def _warn_of_another(site: Site, plan: Plan) -> None:
    """As of a handle that a notebook's cell made when it ran before."""
    for hooks in _ours(site.module._forward_hooks).values():
        twice = [f for f in plan.table.latents if _moves_alike(f, plan, hooks.plan)]
        if twice:
            warnings.warn(
                f"edits: latents {twice} are edited at {site.path} already, and both edits act; "
                "sf.steerings(model) lists what is attached",
                stacklevel=3,
            )


def _warn_of_guesses(site: Site, hooks: Hooks) -> None:
    """As of the decoder alone, where the model around it generates without a cache."""
    asks = "scope" if hooks.scope.turn is not None else "when" if hooks.plan.gate else None
    alone = site.model is site.decoder and not hasattr(site.model, "generate")
    if asks and alone and "past_key_values" in hooks.following.places:
        warnings.warn(
            f"{asks}: {type(site.model).__name__} has no generate that says where a prompt ends: "
            "calls without a cache are taken for prompts, those onto one for what is generated; "
            "attach to the model that generates, or say it by handle.prompt",
            stacklevel=3,
        )


def _moves_alike(latent: int, plan: Plan, other: Plan) -> bool:
    if latent not in other.table.columns:
        return False
    one, two = (
        each.measured.directions[each.table.columns[latent]].to("cpu", torch.float32)
        for each in (plan, other)
    )
    return bool(torch.cosine_similarity(one, two, 0) > 0.999)  # of any length and dtype


def _put_first(module: nn.Module) -> None:
    """Put steerings before all other hooks, the oldest first.

    So output_hidden_states, which transformers reads by hooks on the layers, shows what is steered.
    """
    for key in sorted(_ours(module._forward_hooks), reverse=True):
        module._forward_hooks.move_to_end(key, last=False)


def _ours(registered: Mapping[int, Callable]) -> dict[int, Hooks]:
    """What steers, of a module's hooks, by their keys, of which later ones are larger."""
    ours = Hooks.steer, Hooks.before
    return {k: h.__self__ for k, h in registered.items() if getattr(h, "__func__", 0) in ours}


def _recompile() -> None:
    """Dynamo does not look for hooks again once it compiled a model: make it forget what it did."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
