"""Steering in vLLM, by the worker that it is started with.

    python -m saesteer_fast.serve.vllm refuse.json serve microsoft/Phi-3-mini-4k-instruct

    llm = vllm.LLM("microsoft/Phi-3-mini-4k-instruct", **options("refuse.json"))

Of a table of configurations in the steering file each request chooses one by name, through
SamplingParams(extra_args={"saesteer": "strong"}), or "vllm_xargs" of the server's API; one that is
named "default" is for requests that choose none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from functools import cache
from pathlib import Path

from torch import Tensor

try:
    from vllm import __version__
    from vllm.config import CompilationMode, VllmConfig
    from vllm.platforms import current_platform
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.sample.logits_processor import LogitsProcessor as FirstProcessor
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondProcessor

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
    else:
        from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"saesteer_fast.serve.vllm needs vLLM, 0.31 or newer; there is no {error.name}: "
        "pip install vllm"
    ) from error

from ..recipe import Recipe, load_steering
from . import recipes
from .requests import DEFAULT, Span, configuration
from .steered import Steered

VARIABLE = "SAESTEER_STEERING"
"""The environment's name of the steering file, by which vLLM's processes learn of it."""

KEY = "saesteer"
"""Of a request's extra_args, its configuration's name; of vLLM's additional_config, ours."""

_WORKER, _CHOICE = f"{__spec__.name}.Worker", f"{__spec__.name}:Choice"
_SCHEDULER = f"{__spec__.name}.scheduler"


def options(steering: str | os.PathLike[str]) -> dict[str, object]:
    """Arguments of vllm.LLM, and of `vllm serve` with dashes, under which `steering` is served.

    They name what is in this module. The file's name goes into the environment, where vLLM's
    processes find it, so that a process can have one steered engine.

    Raises what load_steering does, and ValueError, naming the place, for what no engine can serve.
    """
    path = Path(steering).resolve()
    recipe = load_steering(path)
    recipes.names(recipe)
    chosen = {"worker_cls": _WORKER, "logits_processors": [_CHOICE]}
    if not recipes.prefixes(recipe).shared:
        chosen["scheduler_cls"] = _SCHEDULER
    os.environ[VARIABLE] = str(path)
    return chosen


class Choice(FirstProcessor, SecondProcessor):
    """Refuses requests for a configuration that is not there, or of which no token would be
    steered, before they run.

    Logits stay what they are: it is that vLLM asks these processors about a request's parameters.
    Each of its two model runners has a kind of its own; this is both.
    """

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        path, asked = _file(), _asked(sampling_params)
        configuration(_names(path), asked)
        name = DEFAULT if asked is None else asked
        if sampling_params.max_tokens == 1 and _begins_late(path, name):
            raise ValueError(
                "max_tokens: got 1; accepted are 2 and more, since with the scope generated none "
                "is steered before the first is there (beam search asks for one at a time)"
            )

    def __init__(self, vllm_config: VllmConfig, *_):
        pass

    def add_request(self, req_idx: int, sampling_params) -> bool:
        return False

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update) -> None:
        pass

    def apply(self, logits: Tensor, *_) -> Tensor:
        return logits


def scheduler(vllm_config: VllmConfig, **arguments):
    """The scheduler that vLLM would have chosen, whose requests find cached tokens only where
    those were steered as their own are."""
    config = copy(vllm_config.scheduler_config)
    config.scheduler_cls = None
    kind = type("Scheduler", (_Apart, config.get_scheduler_cls()), {})
    return kind(vllm_config=vllm_config, **arguments)


class _Apart:
    """vLLM finds a block of tokens again by its hash, and hashes each block with the one before:
    what is mixed into one tells all that follow apart."""

    def __init__(self, vllm_config: VllmConfig, **arguments):
        super().__init__(vllm_config=vllm_config, **arguments)
        recipe = load_steering(_file())
        self._names, self._prefixes = recipes.names(recipe), recipes.prefixes(recipe)
        self._hash = get_hash_fn_by_name(vllm_config.cache_config.prefix_caching_hash_algo)

    def add_request(self, request) -> None:
        if request._block_hasher is not None:
            for start, key in self._keys(request):
                self._mix(request, start, key)
        super().add_request(request)

    def _keys(self, request) -> Iterable[tuple[int, object]]:
        if request.resumable:  # its prompt grows, and another configuration may be asked for
            return [(0, request.request_id)]
        asked = _asked(request.sampling_params)
        chosen = configuration(self._names, asked) if self._names else 0
        return self._prefixes.keys(chosen, request.num_prompt_tokens)

    def _mix(self, request, start: int, key: object) -> None:
        """Hash blocks anew that have tokens from `start` on, those to come too."""
        del request.block_hashes[start // self.hash_block_size :]
        request._block_hasher = get_request_block_hasher(
            self.hash_block_size, lambda block: self._hash((key, block))
        )
        request.update_block_hashes()


class Worker(PlatformWorker):
    """vLLM's own, whose model is steered as the environment's steering file says.

    Raises ValueError for what of vLLM's would leave tokens unsteered, or steer them otherwise.
    """

    def __init__(self, vllm_config: VllmConfig, *args, **kwargs):
        self._recipe = load_steering(_file())
        _require_servable(self._recipe, vllm_config)
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, **kwargs) -> None:
        super().load_model(**kwargs)
        size = self.vllm_config.scheduler_config.max_num_batched_tokens
        self._steered = Steered(self._recipe, self.model_runner.get_model(), size)
        self._spans: dict[str, Span] = {}
        # What vLLM has compiled it keeps, and finds again by this among others.
        self.vllm_config.additional_config[KEY] = self._steered.digest
        if self._steered.tells_tokens_apart:
            _before_forward(self.model_runner, self._pack)

    def compile_or_warm_up_model(self):
        times = super().compile_or_warm_up_model()
        if self.vllm_config.compilation_config.mode != CompilationMode.NONE:
            self._steered.require_run()
        return times

    def execute_model(self, scheduler_output):
        if self._steered.tells_tokens_apart:
            self._schedule(scheduler_output)
        return super().execute_model(scheduler_output)

    def set_strengths(self, edits, steering: int = 0) -> None:
        """What Handle.set does, for one of the file's steerings, from the next call on.

            llm.collective_rpc("set_strengths", args=({22373: 8.0},))

        Raises what that does, and ValueError under prefix caching, which would go on with tokens
        that were steered before.
        """
        if self.cache_config.enable_prefix_caching:
            raise ValueError(
                "enable_prefix_caching: strengths change only where it is off, since it keeps what "
                "was steered before; start vLLM with enable_prefix_caching=False"
            )
        self._steered.layers[steering].plan.table.set(edits)

    def _schedule(self, output) -> None:
        """Note what vLLM's scheduler has for the next call."""
        requests, cached = self._steered.requests, output.scheduled_cached_reqs
        for request in output.finished_req_ids:
            requests.end(request)
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in output.scheduled_new_reqs:
            requests.begin(new.req_id, _asked(new.sampling_params), new.prompt_len)
            starts[new.req_id] = new.num_computed_tokens
        self._spans = {
            request: Span(request, starts[request], count)
            for request, count in output.num_scheduled_tokens.items()
        }

    def _pack(self, order: list[str], ids: Tensor | None) -> None:
        """Tell the steerings which tokens come, now that the order of the requests is known."""
        if set(order) != set(self._spans):
            raise RuntimeError(f"vLLM scheduled {[*self._spans]} and runs {order}")
        self._steered.pack([self._spans[request] for request in order], ids)


def _before_forward(runner, pack: Callable[[list[str], Tensor | None], None]) -> None:
    """Have `pack` called before every forward, replayed ones too, by either of vLLM's runners."""
    name = next((name for name in _RUNNERS if hasattr(runner, name)), None)
    if name is None:
        raise RuntimeError(f"vLLM {__version__} has neither of {', '.join(_RUNNERS)}")
    setattr(runner, name, _RUNNERS[name](runner, getattr(runner, name), pack))


def _packing_forward(runner, forward: Callable, pack: Callable) -> Callable:
    def packed(input_ids: Tensor | None = None, *args, **kwargs):
        pack(runner.input_batch.req_ids, input_ids)
        return forward(input_ids, *args, **kwargs)

    return packed


def _packing_inputs(runner, prepare: Callable, pack: Callable) -> Callable:
    def packed(*args, **kwargs):
        batch = prepare(*args, **kwargs)
        pack(batch.req_ids, batch.input_ids)
        return batch

    return packed


_RUNNERS = {"_model_forward": _packing_forward, "prepare_inputs": _packing_inputs}
"""What the first and the second model runner call before each forward."""


def _require_servable(recipe: Recipe, config: VllmConfig) -> None:
    names, parallel, model = recipes.names(recipe), config.parallel_config, config.model_config
    refused = {
        "pipeline_parallel_size": (
            parallel.pipeline_parallel_size > 1,
            "a process must have every steered layer",
        ),
        "kv_transfer_config": (
            config.kv_transfer_config is not None,
            "keys and values from elsewhere may be steered otherwise",
        ),
    }
    if recipes.tells_tokens_apart(recipe):
        refused |= {
            "speculative_config": (
                config.speculative_config is not None,
                "guessed tokens have no place yet",
            ),
            "prefill_context_parallel_size": (
                parallel.prefill_context_parallel_size > 1,
                "a process must have all of a request's tokens",
            ),
            "enable_dbo": (parallel.use_ubatching, "a call must have all of its tokens"),
        }
    if recipes.reads_ids(recipe) and (model.is_multimodal_model or model.enable_prompt_embeds):
        raise ValueError("scope: not_tokens needs ids, and this model is given embeddings")
    for name, (given, reason) in refused.items():
        if given:
            raise ValueError(f"{name}: leave it out under this steering file; {reason}")
    if names and _CHOICE not in (model.logits_processors or ()):
        raise ValueError(f"logits_processors: {_CHOICE!r} must be among them, which checks names")
    given, shared = config.scheduler_config.scheduler_cls, recipes.prefixes(recipe).shared
    if config.cache_config.enable_prefix_caching and given != _SCHEDULER and not shared:
        raise ValueError(
            f"scheduler_cls: got {given!r}; {_SCHEDULER!r} is needed, which keeps requests apart "
            "that are steered differently, or enable_prefix_caching=False"
        )


def _file() -> str:
    path = os.environ.get(VARIABLE)
    if not path:
        raise ValueError(f"{VARIABLE}: is not set; start vLLM with {__spec__.name}.options")
    return path


@cache
def _names(path: str) -> tuple[str, ...]:
    return recipes.names(load_steering(path))


@cache
def _begins_late(path: str, name: str) -> bool:
    return recipes.begins_late(load_steering(path), name)


def _asked(sampling_params) -> str | None:
    extra = None if sampling_params is None else sampling_params.extra_args
    return (extra or {}).get(KEY)


def main(arguments: list[str]) -> None:
    """vLLM's own command, with a steering file before its arguments."""
    usage = f"usage: python -m {__spec__.name} STEERING serve MODEL [...]"
    if len(arguments) < 2:
        raise SystemExit(usage)
    try:
        given = [*_flags(options(arguments[0]))]
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"{usage}\nerror: {error}") from None
    sys.argv = ["vllm", *arguments[1:], *given]
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


def _flags(options: dict[str, object]) -> Iterator[str]:
    for name, value in options.items():
        yield from (f"--{name.replace('_', '-')}", *([value] if isinstance(value, str) else value))


if __name__ == "__main__":
    main(sys.argv[1:])
