"""What `saesteer check` prints: a recipe with all that its names stand for looked up."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .. import formats, sites
from ..edits import Edit
from ..errors import named
from ..hooks import Hooks
from ..plan import Plan
from ..sae import SAE
from ..scopes import NotTokens, Positions, Scope, Scoped
from ..sites import Site
from . import Steering, load_steering

_SEMANTICS = {
    ("set", "activation", "keep"): "set, error kept: SAELens hooks with the error term, AxBench",
    ("set_if_active", "activation", "keep"): "set where it fires: Farrell et al. 2024",
    ("at_least", "activation", "keep"): "minimum clamp: AxBench",
    ("set", "projection", "keep"): "clamp of the projection: lm-eval's clamp",
    ("set", "activation", "drop"): "set, error dropped",
    ("add", "activation", "keep"): "addition: lm-eval's add",
}
"""Who else does an edit of what, with what becomes of the error."""


def report(path: str | os.PathLike[str], model: str | None = None) -> str:
    """The plan of a steering file, as text; `model`, a folder or a repository on the Hub with a
    config.json, has its modules looked up too. Raises what is wrong with it, as attaching would.
    """
    recipe = load_steering(path)
    body = None if model is None else _without_weights(model)
    lines = [f"{path}: for {recipe.model or 'any model'}"]
    for place, facts in enumerate(recipe.each(lambda step, sae: [*_facts(step, sae, body)])):
        lines.append(f"steerings[{place}]")
        lines += (f"  {name:<9}{fact}" for name, fact in facts)
    return "\n".join(lines)


def _facts(step: Steering, sae: SAE, body: nn.Module | None) -> Iterator[tuple[str, str]]:
    layer = sae.hookpoint if step.layer is None else step.layer
    site = None if body is None else sites.of(body, step.layer, sae)
    yield "module", _module(step, layer, site)
    yield "SAE", f"{_source(step)}: N={sae.num_latents}, d={sae.d}, {sae.kind}, {_dtype(sae)}"
    keywords = {name: getattr(step, name) for name in ("when", "error", "measure")}
    plan = Plan(sae, step.edits, torch.device("cpu"), **keywords)
    if step.rows is not None or not step.is_table:
        plan.choose(step.rows)
    plan.require_ready()
    if site is not None:  # which raises where the model cannot be followed as the scope needs
        Hooks(site, plan, Scoped(step.scope, plan.device))
    yield "measure", _measured(plan.measured.measure)
    yield from _edits(step, plan)
    if plan.chosen is not None:
        yield "rows", ", ".join(map(str, step.rows or plan.chosen.tolist()))
    elif step.is_table:
        yield "rows", "each request names a configuration; in sf.steering, rows= does"
    yield "scope", f"{_scope(step.scope)}; never padding"
    yield "when", _condition(plan)
    yield "error", "kept" if step.error == "keep" else "dropped: decode(a') is returned"
    if step.impl != "auto":
        yield "impl", step.impl
    yield "memory", f"{_size(plan.nbytes)} on the module's device"


def _module(step: Steering, layer: int | str | None, site: Site | None) -> str:
    if layer is None:
        raise ValueError("layer: none is given, and the SAE names no hookpoint")
    by = " (the SAE's hookpoint)" if step.layer is None else ""
    if site is None:
        return f"{'decoder layer ' if isinstance(layer, int) else ''}{layer}{by}"
    return f"{site.path}{by}, a {type(site.module).__name__} of {type(site.model).__name__}"


def _source(step: Steering) -> str:
    if isinstance(step.sae, SAE):
        return "a vector in the file"
    return f"{step.sae}, {formats.name_of(step.sae)}"


def _dtype(sae: SAE) -> str:
    return str(sae.W_enc.dtype).removeprefix("torch.")


def _measured(measure: str) -> str:
    told = {
        "none": "none: no edit reads an activation",
        "projection": "projection: (x - b_dec)·W_dec[f] / |W_dec[f]|, no encoder",
    }
    return told.get(measure, f"{measure}: the SAE's own activation")


def _edits(step: Steering, plan: Plan) -> Iterator[tuple[str, str]]:
    """A line an edit, its configuration's name or number before it where there are several."""
    norms = plan.measured.directions.float().norm(dim=-1).tolist()
    configurations = plan.table.described()
    if not plan.table.rowwise:
        configurations = {"": configurations}
    elif isinstance(configurations, Sequence):
        configurations = dict(enumerate(configurations))
    for name, edits in configurations.items():
        before = f"{name}: " if plan.table.rowwise else ""
        if not edits:
            yield "edits", f"{before}none"
        for latent, edit in edits.items():
            edit = edit if isinstance(edit, Edit) else Edit("set", edit)
            norm = norms[plan.table.columns[latent]]
            told = _semantics(edit.kind, step)
            yield "edits", f"{before}latent {latent}: {edit}, |direction| {norm:.4g}; {told}"


def _semantics(kind: str, step: Steering) -> str:
    what = "projection" if step.measure == "projection" and kind != "add" else "activation"
    return _SEMANTICS.get((kind, what, step.error), "no clamp with a name elsewhere")


def _condition(plan: Plan) -> str:
    told = []
    if plan.active is not None:
        latents = (f"latent {f} > {above:g}" for f, above in plan.active.above.items())
        told.append(f"on tokens with {' and '.join(latents)}")
    if plan.gate is not None:
        count, decide = len(plan.gate.latents), plan.gate.decide
        told.append(
            f"after prompts that a gate lets through: {count} latents, {decide.pool}, "
            f"bias {decide.bias:g}, threshold {decide.threshold:g}"
        )
    return "; ".join(told) or "always"


def _scope(scope: Scope) -> str:
    if isinstance(scope, str):
        return f"{scope} tokens"
    if isinstance(scope, Positions):
        return f"positions {_short(scope.places)}"
    if isinstance(scope, NotTokens):
        return f"tokens that are not {_short(scope.ids)}"
    if isinstance(scope, Tensor):
        return f"a mask {list(scope.shape)}, {int(scope.sum())} in it"
    return " and ".join(map(_scope, scope))


def _short(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, ... ({len(numbers)})" if len(numbers) > 8 else shown


def _size(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"


def _without_weights(path: str) -> nn.Module:
    """The model of a configuration, on the meta device."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    with named("model: "), torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(path)
        except Exception as error:  # its checks of a configuration raise any kind
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{path}: {reason}") from None
        try:
            return AutoModelForCausalLM.from_config(config)
        except ValueError:  # one that transformers knows by no head
            return AutoModel.from_config(config)
