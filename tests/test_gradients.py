"""Gradients through the stream and the strengths: those of the exact identity, nothing detached."""

from __future__ import annotations

import itertools
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from support import EDITED, LATENTS, MEASURES, N, build, given_edits, stream, truth

import saesteer_fast as sf
from saesteer_fast import reference
from saesteer_fast.edits import KINDS, Table

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "learn_strength.py"


def close(gradient, expected):
    bound = 1e-5 * expected.abs().max() + 1e-6
    return gradient is not None and ((gradient.double() - expected).abs() <= bound).all()


@pytest.mark.fault(14)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_path_in_double_precision(kind):
    """gradcheck of measuring, editing and writing back, each in fp64."""
    sae, x = build(), stream(4).double().requires_grad_()
    table = Table({latent: EDITED[kind][0](1.5) for latent in LATENTS}, N, torch.device("cpu"))
    features = torch.tensor(table.latents)
    directions = sae.W_dec[features]
    values = table.values.double().requires_grad_()

    def steered(x, values):
        arguments = x, sae.W_enc, sae.b_enc_folded, features, sae.k
        acts = reference.feature_acts(*arguments, dtype=torch.float64)
        amounts = table.amounts(acts, values, table.kinds)
        return reference.add_directions(x, directions, amounts)

    assert torch.autograd.gradcheck(steered, (x, values))
    acts = reference.feature_acts(x, sae.W_enc, sae.b_enc_folded, features, sae.k)
    assert (acts > 0).any() and (acts == 0).any()


def gradients(y, x, strengths):
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    return torch.autograd.grad((y * weights.to(y.dtype)).sum(), [x, *strengths])


@pytest.mark.fault(14)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("kind", EDITED)
@pytest.mark.parametrize(
    ("measure", "error"),
    [("projection", "keep"), *itertools.product(MEASURES[:-1], ["keep", "drop"])],
)
def test_every_measure_and_edit(measure, kind, error, impl):
    """Against autograd of the dense textbook form in fp64."""
    projection = measure == "projection"
    sae, x = build(measure), stream(12)
    strengths = [torch.tensor(value, requires_grad=True) for value in (1.5, -0.5, 0.7, 0.3)]
    named = {latent: (kind, value) for latent, value in zip(LATENTS, strengths, strict=True)}
    x_own = x.clone().requires_grad_()
    options = {"measure": "projection"} if projection else {"error": error}
    y = sf.steer(x_own, sae, given_edits(named), impl=impl, **options)
    found = gradients(y, x_own, strengths)

    doubles = [value.detach().double().requires_grad_() for value in strengths]
    named = {latent: (kind, value) for latent, value in zip(LATENTS, doubles, strict=True)}
    x_true = x.double().requires_grad_()
    expected = gradients(truth(x_true, sae, named, None, error, projection), x_true, doubles)
    assert all(map(close, found, expected))
    assert expected[0].abs().max() > 0 and any(grad != 0 for grad in expected[1:])


@pytest.mark.fault(72)
@pytest.mark.parametrize("edit", [lambda value: value, sf.scale], ids=["set", "scale"])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_rounds_no_gradient(edit, compiled):
    """Compiling writes the gradient's graph down while the call's autocast is on."""
    sae, x = build(), stream(12).requires_grad_()
    strengths = [torch.tensor(value, requires_grad=True) for value in (1.5, -0.5)]

    def steered(x, one, other):
        return sf.steer(x, sae, {3: edit(one), 40: edit(other)})

    expected = gradients(steered(x, *strengths), x, strengths)
    if compiled:
        steered = torch.compile(steered, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = steered(x, *strengths)
        inside = torch.autograd.grad(y.sum(), [x, *strengths], retain_graph=True)
    found = gradients(y, x, strengths)
    assert all(map(torch.equal, found, expected))
    outside = torch.autograd.grad(steered(x, *strengths).sum(), [x, *strengths])
    assert all(map(torch.equal, inside, outside))


@pytest.mark.parametrize("options", [{"normalize": "layer_norm"}, {"scale": 3.0}])
def test_through_normalisation(options):
    sae, x = build(**options), 4 * stream(12) + 1
    strengths = [torch.tensor(value, requires_grad=True) for value in (1.5, 0.5)]
    x_own = x.clone().requires_grad_()
    edits = {3: strengths[0], 40: sf.scale(strengths[1])}
    found = gradients(sf.steer(x_own, sae, edits), x_own, strengths)

    x_true, doubles = x.double().requires_grad_(), [s.detach().double() for s in strengths]
    doubles = [value.requires_grad_() for value in doubles]
    z, back = x_true * sae.scale, 1 / sae.scale
    if sae.normalize == "layer_norm":
        back = x_true.std(-1, keepdim=True)
        z = (x_true - x_true.mean(-1, keepdim=True)) / (back + 1e-5)
    named = {3: ("set", doubles[0]), 40: ("scale", doubles[1])}
    y = x_true + (truth(z, build(), named) - z) * back
    assert all(map(close, found, gradients(y, x_true, doubles)))


def test_masks_rows_and_conditions_cut_gradients():
    sae, x = build(), stream(3, 8).requires_grad_()
    mask = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    strengths = [torch.tensor(value, requires_grad=True) for value in (1.5, -0.5)]
    rows = [{3: strengths[0]}, {}, {40: sf.add(strengths[1])}]
    found = gradients(sf.steer(x, sae, rows, mask=mask), x, strengths)

    x_true = x.detach().double().requires_grad_()
    doubles = [value.detach().double().requires_grad_() for value in strengths]
    named = [{3: ("set", doubles[0])}, {}, {40: ("add", doubles[1])}]
    y = torch.stack([truth(x_true[i], sae, named[i], mask[i]) for i in range(3)])
    assert all(map(close, found, gradients(y, x_true, doubles)))

    y = sf.steer(x, sae, {3: sf.scale(2.0)}, when=sf.active(3, above=1e6))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_streams_have_gradients_of_their_dtype(dtype):
    sae, x = build(), stream(12, dtype=dtype).requires_grad_()
    strength = torch.tensor(1.5, requires_grad=True)
    y = sf.steer(x, sae, {3: sf.at_least(strength), 40: sf.scale(0.5)})
    found = gradients(y, x, [strength])
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    x_true, double = x.detach().double().requires_grad_(), strength.detach().double()
    named = {3: ("at_least", double.requires_grad_()), 40: ("scale", 0.5)}
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(dtype).double()
    loss = (truth(x_true, sae, named) * weights).sum()
    expected = torch.autograd.grad(loss, [x_true, double])
    for gradient, true in zip(found, expected, strict=True):
        assert (
            (gradient.double() - true).abs() <= 8 * torch.finfo(dtype).eps * true.abs().max()
        ).all()


def test_strengths_of_a_steered_model(make_phi3, make_sae):
    """A leaf, read at every call; and its gradient is the finite difference."""
    model, ids = make_phi3(), torch.tensor([[5, 17, 60, 2]])
    with sf.steering(model, make_sae(), {3: 2.0, 77: sf.scale(1.5)}) as handle:
        strengths = handle.strengths.requires_grad_()
        assert strengths.is_leaf and strengths.shape == (2,) and handle.latents == [3, 77]
        loss = model(ids).logits.square().mean()
        (gradient,) = torch.autograd.grad(loss, [strengths])
        with torch.no_grad():
            strengths[0] += 1e-2
            above = model(ids).logits.square().mean()
            strengths[0] -= 2e-2
            below = model(ids).logits.square().mean()
        assert gradient[0] == pytest.approx(((above - below) / 2e-2).item(), rel=0.05)
        handle.set({3: 1.0})
        assert strengths.requires_grad and handle.strengths[0] == 1.0


def checkpointed_by_transformers(model, **options) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def checkpointed_with_its_hooks(model) -> None:
    checkpoint = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model.model.layers[1] = checkpoint.checkpoint_wrapper(model.model.layers[1])


@pytest.mark.fault(63)
@pytest.mark.parametrize(
    "checkpoint",
    [
        partial(checkpointed_by_transformers, use_reentrant=True),
        partial(checkpointed_by_transformers, use_reentrant=False),
        checkpointed_with_its_hooks,
    ],
    ids=["reentrant", "not reentrant", "with hooks"],
)
@pytest.mark.parametrize("edits", [{3: 4.0}, {3: sf.scale(2.0), 40: sf.at_least(1.0)}])
def test_gradient_checkpointing(make_phi3, make_sae, edits, checkpoint):
    """What is computed again is steered again."""
    model, ids = make_phi3().train(), torch.tensor([[5, 17, 60, 2]])
    weight = model.model.layers[0].mlp.down_proj.weight

    def gradient():
        model.zero_grad()
        model(ids, use_cache=False).logits.square().mean().backward()
        return weight.grad.clone()

    plain = gradient()
    with sf.steering(model, make_sae(), edits):
        expected = gradient()
        checkpoint(model)
        torch.testing.assert_close(gradient(), expected)
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.fault(63)
def test_what_is_computed_again_has_no_scope(make_phi3, make_sae):
    """The decoder does not run then, so nothing tells of its tokens."""
    model, ids = make_phi3().train(), torch.tensor([[5, 17, 60, 2]])
    with sf.steering(model, make_sae(), {3: 4.0}, scope="prompt"):
        checkpointed_with_its_hooks(model)
        loss = model(ids).logits.square().mean()
        with pytest.raises(ValueError, match=r"layers\.1 runs outside of its decoder"):
            loss.backward()


def test_strengths_that_are_not_leaves_of_the_steering(make_phi3, make_sae):
    strength = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(
        ValueError, match="edits: a strength requires a gradient; learn `strengths` instead"
    ):
        sf.steering(make_phi3(), make_sae(), {3: strength})
    with sf.steering(make_phi3(), make_sae(), {3: strength.detach()}) as handle:
        assert handle.strengths.tolist() == [2.0]


@pytest.mark.fault(15)
@pytest.mark.parametrize("edits", [{3: 2.0}, {3: sf.scale(2.0)}, {3: sf.add(1.0)}])
def test_forward_mode_is_refused(edits):
    """The kernels have no rule for it, and would give zero. The reference has."""
    sae, x = build(), stream(3)
    for impl in ("auto", "reference"):

        def of_x(x, impl=impl):
            return sf.steer(x, sae, edits, impl=impl)

        def of_strength(v, impl=impl):
            return sf.steer(x, sae, {3: v}, impl=impl)

        for function, at in ((of_x, x), (of_strength, torch.tensor(1.0))):
            if impl == "auto":
                with pytest.raises(NotImplementedError, match="has no forward-mode gradient; acc"):
                    torch.func.jvp(function, (at,), (at,))
                with pytest.raises(NotImplementedError, match="has no forward-mode gradient; acc"):
                    torch.func.hessian(lambda t, f=function: f(t).square().sum())(at)
            else:
                _, tangent = torch.func.jvp(function, (at,), (at,))
                slope = torch.func.jacrev(function)(at)
                torch.testing.assert_close(tangent, torch.tensordot(slope, at, at.ndim))


@pytest.mark.fault(15)
@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("measure", MEASURES)
def test_vmap(measure):
    """Over streams and over strengths."""
    sae, x = build(measure), stream(3, 5)
    options = {"measure": "projection"} if measure == "projection" else {}
    for edits in ({3: 2.0}, {3: sf.scale(0.5), 40: sf.at_least(1.0)}):
        mapped = torch.func.vmap(lambda x, edits=edits: sf.steer(x, sae, edits, **options))(x)
        torch.testing.assert_close(mapped, sf.steer(x, sae, edits, **options), atol=1e-5, rtol=0)
    values = torch.tensor([1.0, -2.0])
    mapped = torch.func.vmap(lambda v: sf.steer(x, sae, {3: v}, **options))(values)
    for y, value in zip(mapped, values.tolist(), strict=True):
        torch.testing.assert_close(y, sf.steer(x, sae, {3: value}, **options), atol=1e-5, rtol=0)


@pytest.mark.fault(14, 15)
@pytest.mark.parametrize("measure", MEASURES)
def test_torch_func(measure):
    """grad, jacrev and vmap of grad, through x and through a strength, against autograd."""
    sae, x = build(measure), stream(4)
    options = {"measure": "projection"} if measure == "projection" else {}

    def loss(x, v):
        return sf.steer(x, sae, {3: v, 40: sf.scale(v)}, **options).square().sum()

    leaves = x.clone().requires_grad_(), torch.tensor(1.5, requires_grad=True)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for transform in (torch.func.grad, torch.func.jacrev):
        found = transform(loss, argnums=(0, 1))(x, torch.tensor(1.5))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    each = torch.func.vmap(torch.func.grad(loss), (0, None))(x, torch.tensor(1.5))
    torch.testing.assert_close(each, expected[0], atol=1e-5, rtol=1e-5)


def test_the_example_learns():
    learned = runpy.run_path(str(EXAMPLE))
    assert learned["losses"][-1] < 0.5 * learned["losses"][0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_module_computed_again_knows_no_padding(make_phi3, make_sae, reentrant):
    """A reentrant checkpoint compares nothing: padding would be steered in what it computes."""
    model, ids = make_phi3().train(), torch.tensor([[5, 17, 60, 2], [4, 6, 9, 5]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with sf.steering(model, make_sae(), {3: sf.add(4.0)}, layer="layers.1.mlp") as handle:
        handle.strengths.requires_grad_()
        checkpointed_by_transformers(model, use_reentrant=reentrant)
        loss = model(ids, attention_mask=mask, use_cache=False).logits.square().mean()
        with pytest.raises(RuntimeError, match="is computed again by a checkpoint"):
            loss.backward()
