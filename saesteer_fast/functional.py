"""Steering tensors: `steer` once, or, after `prepare`, many times."""

from __future__ import annotations

from torch import Tensor

from .choice import Impl
from .conditions import Active
from .edits import Configurations
from .plan import ErrorTerm, Held, Plan, Reading, Rows, require_sae
from .sae import SAE
from .scopes import both


def steer(
    x: Tensor,
    sae: SAE,
    edits: Configurations,
    *,
    mask: Tensor | None = None,
    rows: Rows | None = None,
    when: Active | None = None,
    error: ErrorTerm = "keep",
    measure: Reading | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Edit latents of `sae` in x, keeping what the SAE cannot express.

        x' = x + sum over f in edits of (edit_f(a_f(x)) - a_f(x)) W_dec[f]

    x [..., d] fp32, bf16 or fp16, on the SAE's device. `edits` is {latent: constant}, or with
    sf.add, sf.scale, sf.set_if_active, sf.at_least, sf.at_most in place of a constant; constants
    are in units of the activation, 0 ablates, negative ones are allowed. A list of such mappings
    edits x[0], x[1], ... each in its own way; a mapping {name: mapping} is a table, out of which
    `rows` names or counts one for each. {} leaves alone.

    mask, bool [...] = x.shape[:-1], and `when`, sf.active of other latents, say which tokens.
    Tokens outside come out bit-identical, and so do those that no edit changes, unless the error is
    dropped. Sums are fp32, and x' is rounded once to x's dtype. Differentiable in x, and in
    strengths that are tensors of one number. Raises TypeError or ValueError, naming the argument;
    RuntimeError for an SAE whose tensors were written to.

    measure "projection" reads a = (x - b_dec)·W_dec[f] / |W_dec[f]| in place of the SAE's own
    activation, and writes along the same unit vector. error "drop" gives decode(a') for every token
    whose mapping is not {}, changed or not.

    Equivalent to `decode(a') + (x - decode(a))` (O'Brien et al. 2024, arXiv 2411.11296). Clamps
    in use elsewhere are points of these axes:

        set, the error kept            SAELens hooks with the error term, AxBench: {f: c}
        set where it fires             Farrell et al. 2024: {f: sf.set_if_active(c)}
        at least c                     AxBench's minimum clamp: {f: sf.at_least(c)}
        clamp of the projection        lm-eval's `steered`: {f: c}, measure="projection"
        set, the error dropped         {f: c}, error="drop"

    Overwriting the weakest of the k live latents (MisterXY89/sae-refusal-eval) is none, and is
    not offered: it changes a latent that nobody named.
    """
    plan = _plan(sae, edits, rows, when=when, error=error, measure=measure, impl=impl)
    plan.require_effect()
    return _steered(plan, x, mask)


def prepare(
    sae: SAE,
    edits: Configurations,
    *,
    rows: Rows | None = None,
    when: Active | None = None,
    error: ErrorTerm = "keep",
    measure: Reading | None = None,
    impl: Impl = "auto",
) -> Prepared:
    """What `steer` does with these arguments, to be called with x, and a mask if there is one.

        edit = sf.prepare(sae, {22373: 12.0})
        hook = "blocks.6.hook_resid_post", lambda x, hook: edit(x)
        hooked_transformer.run_with_hooks(ids, fwd_hooks=[hook])

    For hooks and loops of your own: the arguments are checked, and the latents' rows gathered,
    once. torch.compile takes it whole. Raises what `steer` does, and ValueError for a strength that
    requires a gradient; learn `strengths` instead. Warns where nothing is edited.
    """
    plan = _plan(sae, edits, rows, when=when, error=error, measure=measure, impl=impl)
    plan.require_ready()
    return Prepared(plan)


class Prepared(Held):
    """One steering of tensors; `prepare` makes it. It keeps of the SAE what `steering` does."""

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x' [..., d] in x's dtype, for x [..., d] fp32, bf16 or fp16, on the SAE's device; mask,
        bool [...] = x.shape[:-1], is True where tokens are steered. Raises TypeError or ValueError,
        naming the argument."""
        return _steered(self._plan, x, mask)

    def __repr__(self) -> str:
        return f"Prepared({self._plan.table.described()})"


def _plan(sae: SAE, edits, rows: Rows | None, **options) -> Plan:
    require_sae(sae)
    plan = Plan(sae, edits, sae.device, **options)
    if plan.gate is not None:
        raise ValueError("when: sf.gate is decided by a prompt, which only sf.steering sees")
    plan.choose(rows)
    return plan


def _steered(plan: Plan, x: Tensor, mask: Tensor | None) -> Tensor:
    if plan.active is not None:
        plan.check(x, mask)
        mask = both(mask, plan.holds(x)[1])
    return plan(x, mask, plan.chosen)
