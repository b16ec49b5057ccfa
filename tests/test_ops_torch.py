"""The ops as parts of PyTorch: opcheck, shapes without data, torch.compile, gradients, modes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ops_cases import DTYPES, Case, integer_case, permutation, random_case, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck

from saesteer_fast import ops

OPS = torch.ops.saesteer
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))


def calls(case: Case) -> dict[str, tuple]:
    """The arguments of every op on one case."""
    values, indices = case.encode()
    return {
        "steer": (*case.edit, case.mask, case.order),
        "feature_acts": (*case.encoder, case.features, case.k, case.order),
        "project": case.encoder,
        "add_directions": (case.x, case.directions, case.values),
        "encode": (*case.encoder, case.k),
        "decode": (values.detach(), indices, case.W_dec, case.b_dec),
    }


OP_NAMES = tuple(calls(random_case(1)))


def op_names() -> set[str]:
    return {
        schema.name.removeprefix("saesteer::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("saesteer::")
    }


def test_every_op_is_tested_here():
    """But for the one that gives nothing, which test_inplace.py tests."""
    assert op_names() == {*OP_NAMES, "steer_"}


@pytest.mark.fault(19, 22)
@EVERY_DTYPE
@pytest.mark.parametrize("op", OP_NAMES)
def test_opcheck(op, dtype):
    weights = torch.float32 if dtype == torch.float16 else dtype
    case = random_case((2, 5), 33, 65, 4, 2, dtype, weights, per_token=True, masked=True)
    arguments = calls(case.stored(permutation(65)))[op]
    opcheck(getattr(OPS, op), arguments)
    first = arguments[0].clone().requires_grad_()
    opcheck(getattr(OPS, op), (first, *arguments[1:]))


@pytest.mark.fault(5, 22)
def test_opcheck_of_the_corners():
    shared = random_case(5)
    opcheck(OPS.steer, (*shared.edit, None))
    opcheck(OPS.feature_acts, (*shared.encoder, shared.features, 8, None))
    opcheck(OPS.steer, (*shared.edit[:-2], shared.values.clone().requires_grad_(), 8, None))
    opcheck(OPS.steer, (*random_case((), masked=True).edit, None))
    none = random_case(5, F=0)
    opcheck(OPS.steer, (*none.edit, None))
    opcheck(OPS.add_directions, (none.x, none.directions, none.values))
    empty = random_case(0)
    opcheck(OPS.steer, (*empty.edit, None))
    opcheck(OPS.encode, (*empty.encoder, 4))


@pytest.mark.fault(5, 19)
@pytest.mark.parametrize("op", OP_NAMES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 0, 4)], ids=str)
def test_meta_tensors_have_the_shapes_of_real_ones(op, lead):
    case = random_case(lead, 33, 65, 4, 2, torch.bfloat16, torch.float16, per_token=True)
    arguments = calls(case.stored(permutation(65)))[op]
    bare = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments]
    real, meta = (getattr(OPS, op)(*a) for a in (arguments, bare))
    for r, m in zip(*(t if isinstance(t, tuple) else (t,) for t in (real, meta)), strict=True):
        assert m.is_meta and (m.shape, m.dtype, m.stride()) == (r.shape, r.dtype, r.stride())


def compiled(function: Callable, **options) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


def all_ops(case: Case, x: torch.Tensor, values: torch.Tensor, mask: torch.Tensor):
    """Every op between ordinary PyTorch."""
    rest = case.edit[1:5]
    y = ops.steer(2 * x, *rest, values, case.k, mask=mask, order=case.order) + 1
    acts = ops.feature_acts(y, *case.encoder[1:], case.features, case.k, order=case.order)
    top, indices = ops.encode(y, *case.encoder[1:], case.k)
    recon = ops.decode(top, indices, case.W_dec, case.b_dec)
    p = ops.project(y, case.W_enc[:3], case.b_enc[:3])
    return y, acts, top, indices, p, ops.add_directions(recon.to(x.dtype), case.directions, acts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_compiles_in_one_graph(dtype):
    case = random_case((3, 5), 33, 65, 4, 2, dtype, dtype, masked=True).stored(permutation(65))

    def run(x, values, mask):
        return all_ops(case, x, values, mask)

    arguments = (case.x, case.values, case.mask)
    for eager, other in zip(
        run(*arguments), compiled(run, backend="aot_eager")(*arguments), strict=True
    ):
        assert same_bits(eager, other)


def test_other_values_masks_and_lengths_do_not_recompile():
    case = random_case(5, masked=True)

    def run(x, values, mask):
        return ops.steer(x, *case.edit[1:5], values, case.k, mask=mask)

    graph = compiled(run, backend="aot_eager", dynamic=True)
    graph(case.x, case.values, case.mask)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, T in enumerate((5, 5, 7, 64)):
            other = random_case(T, seed=seed, masked=True)
            arguments = (other.x, other.values, other.mask)
            assert same_bits(graph(*arguments), run(*arguments))


def test_trains_through_a_compiled_graph():
    case = random_case((3, 5), masked=True)

    def loss(x, values):
        return ops.steer(x.sin(), *case.edit[1:5], values, case.k, mask=case.mask).pow(2).sum()

    gradients = []
    for run in (loss, compiled(loss, backend="aot_eager")):
        x, values = (t.clone().requires_grad_() for t in (case.x, case.values))
        run(x, values).backward()
        gradients.append((x.grad, values.grad))
    for eager, other in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, other)


def textbook(case: Case, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """decode(a') + (x - decode(a)), dense, in whatever precision x has."""
    W_enc, b_enc, W_dec = (t.to(x.dtype) for t in (case.W_enc, case.b_enc, case.W_dec))
    top = (x @ W_enc.mT + b_enc).topk(case.k)
    acts = x.new_zeros(*x.shape[:-1], len(W_enc)).scatter(-1, top.indices, top.values.relu())
    chosen = torch.zeros(len(W_enc), dtype=torch.bool).index_fill(0, case.features, True)
    wide = x.new_zeros(*x.shape[:-1], len(W_enc))
    wide = wide.index_copy(-1, case.features, values.expand(*x.shape[:-1], -1))
    changed = torch.where(chosen, wide, acts) @ W_dec + (x - acts @ W_dec)
    return changed if case.mask is None else torch.where(case.mask[..., None], changed, x)


@pytest.mark.fault(14)
@EVERY_DTYPE
@pytest.mark.parametrize("lead", [(), (63,), (3, 7)], ids=str)
@pytest.mark.parametrize("per_token", [False, True], ids=["shared", "per_token"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_gradients_of_steer(dtype, lead, per_token, masked):
    case = random_case(lead, 33, 65, 8, 5, dtype, dtype, per_token=per_token, masked=masked)
    sure = ~case.undecided().any(-1, keepdim=True)
    weight = sure * torch.randn(case.x.shape, generator=torch.Generator().manual_seed(9))
    weight = weight.to(dtype)

    x, values = case.x.clone().requires_grad_(), case.values.clone().requires_grad_()
    y = ops.steer(x, *case.edit[1:5], values, case.k, mask=case.mask)
    grads = torch.autograd.grad((y * weight).sum(), (x, values))

    exact_x, exact_values = (t.detach().double().requires_grad_() for t in (x, values))
    changed = textbook(case, exact_x, exact_values)
    truth = torch.autograd.grad((changed * weight.double()).sum(), (exact_x, exact_values))
    assert truth[0].abs().sum() > 0
    assert [g.dtype for g in grads] == [dtype, torch.float32]
    rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-4}
    torch.testing.assert_close(grads[0].double(), truth[0], **rounding)
    torch.testing.assert_close(grads[1].double(), truth[1], rtol=1e-5, atol=1e-4)
    assert case.acts().gt(0).any() or lead == ()


@pytest.mark.fault(14)
def test_gradients_of_the_others():
    """Against autograd through dense fp64 forms."""
    case = random_case((3, 7), 33, 65, 8, 5)
    assert not case.undecided().any()
    x64 = case.x.double().requires_grad_()
    W, b = case.W_enc.double(), case.b_enc.double()
    p = x64 @ W.mT + b
    top = p.topk(case.k)
    acts = torch.zeros_like(p).scatter(-1, top.indices, top.values.relu())
    directions, coef = case.directions.double(), case.values.double().requires_grad_()
    dense = {
        "feature_acts": (acts[..., case.features], x64),
        "project": (p, x64),
        "encode": (top.values.relu(), x64),
        "add_directions": (x64 + coef @ directions, x64),
    }
    for op, (truth, wanted) in dense.items():
        x, *rest = calls(case)[op]
        x = x.clone().requires_grad_()
        out = getattr(OPS, op)(x, *rest)
        out = out[0] if isinstance(out, tuple) else out
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
        (ours,) = torch.autograd.grad((out * weight).sum(), x)
        (exact,) = torch.autograd.grad((truth * weight).sum(), wanted, retain_graph=True)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)

    values, indices, W_dec, b_dec = calls(case)["decode"]
    values.requires_grad_()
    weight = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(9))
    (ours,) = torch.autograd.grad(
        (OPS.decode(values, indices, W_dec, b_dec) * weight).sum(), values
    )
    exact = torch.einsum("...d,...kd->...k", weight.double(), W_dec[indices].double())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)

    terms = case.values.clone().requires_grad_()
    y = OPS.add_directions(case.x, case.directions, terms)
    (ours,) = torch.autograd.grad((y * weight).sum(), terms)
    (exact,) = torch.autograd.grad(((x64 + coef @ directions) * weight).sum(), coef)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_no_gradient_passes_what_is_not_live():
    """Of the k largest some are below zero, and read as 0."""
    case = random_case(5, 33, 65, 60, 0)
    x, x64 = case.x.clone().requires_grad_(), case.x.double().requires_grad_()
    values, _ = OPS.encode(x, case.W_enc, case.b_enc, case.k)
    assert (values == 0).any()
    p = x64 @ case.W_enc.double().mT + case.b_enc.double()
    (ours,) = torch.autograd.grad(values.sum(), x)
    (exact,) = torch.autograd.grad(p.relu().topk(case.k).values.sum(), x64)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "directions"])
def test_weights_have_no_gradient(name):
    case = random_case(2)
    given = dict(W_enc=case.W_enc, b_enc=case.b_enc, directions=case.directions)
    given[name] = given[name].detach().clone().requires_grad_()
    rest = dict(features=case.features, values=case.values, k=case.k)
    with pytest.raises(NotImplementedError, match=f"no gradient for {name}, only for x and values"):
        OPS.steer(case.x, **given, **rest)


@pytest.mark.parametrize("case", [random_case(0), random_case(5, F=0), random_case((), F=0)])
def test_gradients_of_nothing(case):
    x, values = case.x.clone().requires_grad_(), case.values.clone().requires_grad_()
    for y in (
        ops.steer(x, *case.edit[1:5], values, case.k),
        ops.add_directions(x, case.directions, values),
    ):
        grad_x, grad_values = torch.autograd.grad(y.sum(), (x, values))
        assert torch.equal(grad_x, torch.ones_like(x))
        assert torch.equal(grad_values, torch.zeros_like(values))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradients_do_not_depend_on_the_order_of_rows(impl):
    """Where ties decide what is live."""
    natural = integer_case(F=65, per_token=True)
    stored = natural.stored(permutation(130))
    assert not torch.equal(stored.acts() > 0, stored.but(order=None).acts() > 0)
    found = []
    for case in (natural, stored):
        x, values = case.x.clone().requires_grad_(), case.values.clone().requires_grad_()
        y = case.but(x=x, values=values).steer(impl)
        of_acts = torch.autograd.grad(case.but(x=x).acts(impl).square().sum(), x)
        found.append((*torch.autograd.grad(y.square().sum(), (x, values)), *of_acts))
    for ours, other in zip(*found, strict=True):
        assert same_bits(ours + 0.0, other + 0.0)


def test_reference_has_the_same_gradients():
    case = random_case((3, 7), masked=True)
    gradients = []
    for impl in ("cpu", "reference"):
        x, values = case.x.clone().requires_grad_(), case.values.clone().requires_grad_()
        y = ops.steer(x, *case.edit[1:5], values, case.k, mask=case.mask, impl=impl)
        gradients.append(torch.autograd.grad(y.square().sum(), (x, values)))
    for ours, other in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.fault(15)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    case = random_case()
    x = case.x.clone().requires_grad_()
    with mode():
        y = case.but(x=x).steer()
        assert not y.requires_grad and same_bits(y, case.steer())
        assert same_bits(case.but(x=case.x.clone()).steer(), y)
    assert case.but(x=x).steer().requires_grad


@pytest.mark.fault(15)
def test_transforms_without_gradients():
    """They see the op under torch.no_grad too, where plain calls pass autograd by."""
    case = random_case(5)

    def run(x: torch.Tensor) -> torch.Tensor:
        return case.but(x=x).steer()

    def cut(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            constant = run(x)
        return (constant + x).sum()

    slope = torch.func.grad(lambda x: run(x).sum())
    expected = slope(case.x)
    assert torch.equal(torch.func.grad(cut)(case.x), torch.ones_like(case.x))
    with torch.no_grad():
        assert same_bits(torch.func.vmap(run)(case.x), torch.stack([run(x) for x in case.x]))
        assert same_bits(slope(case.x), expected)
        with pytest.raises(NotImplementedError, match="has no forward-mode gradient"):
            torch.func.jvp(run, (case.x,), (case.x,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            run(forward_ad.make_dual(case.x, case.x))
        assert same_bits(compiled(run)(case.x), run(case.x))


def flipped(t: torch.Tensor) -> torch.Tensor:
    return t.flip(0) if t.dim() else ~t


def one(found):
    """The output of an op that can be differentiated."""
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.fault(15)
@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("op", OP_NAMES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("per_token", [False, True], ids=["shared", "per_token"])
def test_vmap(op, lead, per_token):
    """Over any of the tensors, one or several, at any dimension: the loop, bit for bit."""
    arguments = calls(random_case(lead, 9, 12, 4, 3, per_token=per_token, masked=True))[op]
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
    run = getattr(OPS, op)
    for mapped in [[i] for i in tensors] + [tensors, tensors[:1] + tensors[-1:]]:
        in_dims = [min(i % 2, a.dim()) if i in mapped else None for i, a in enumerate(arguments)]
        pairs = list(zip(arguments, in_dims, strict=True))
        both = [a if dim is None else torch.stack([a, flipped(a)], dim) for a, dim in pairs]
        other = [a if dim is None else flipped(a) for a, dim in pairs]
        found = torch.func.vmap(run, tuple(in_dims))(*both)
        assert torch.equal(
            one(found), torch.stack([one(run(*each)) for each in (arguments, other)])
        )


@pytest.mark.fault(14, 15)
@pytest.mark.parametrize("op", OP_NAMES)
def test_torch_func(op):
    """What torch.func makes of an op is what autograd does, or an error; never a silent zero."""
    x, *rest = calls(random_case((2, 5), 9, 12, 4, 3, masked=True))[op]

    def run(x):
        return one(getattr(OPS, op)(x, *rest))

    def loss(x):
        return run(x).sin().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert expected.abs().max() > 0
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.func.vjp(loss, x)[1](torch.tensor(1.0))[0], expected)
    jacobian = torch.autograd.functional.jacobian(run, x)
    torch.testing.assert_close(torch.func.jacrev(run)(x), jacobian)
    twice = torch.func.vmap(torch.func.grad(loss))(torch.stack([x, x]))
    torch.testing.assert_close(twice, torch.stack([expected, expected]))
    for forward in (torch.func.jacfwd(run), torch.func.hessian(loss), torch.func.linearize):
        with pytest.raises(NotImplementedError, match=f"saesteer::{op}: has no forward-mode"):
            forward(run, x) if forward is torch.func.linearize else forward(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match=f"saesteer::{op}: has no forward-mode"):
            run(dual)
        run(x)


def test_torch_func_compiles():
    case = random_case((2, 5))
    gradient = torch.func.vmap(torch.func.grad(lambda x: ops.steer(x, *case.edit[1:]).sin().sum()))
    assert torch.equal(compiled(gradient, backend="aot_eager")(case.x), gradient(case.x))


@pytest.mark.fault(31)
def test_python_threads_do_not_disturb_each_other():
    cases = [random_case(200, 67, 300, 8, 3, seed=seed, per_token=True) for seed in range(8)]
    alone = [case.steer() for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(Case.steer, cases * 5))
    for i, y in enumerate(together):
        assert same_bits(y, alone[i % 8])


@pytest.mark.fault(19)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fake_tensors_of_a_gpu_that_is_not_here():
    with FakeTensorMode():
        x, W, directions = (torch.empty(n, 16, device="cuda") for n in (3, 8, 2))
        b, values = torch.empty(8, device="cuda"), torch.empty(2, device="cuda")
        features = torch.empty(2, dtype=torch.int64, device="cuda")
        y = ops.steer(x, W, b, directions, features, values, 2)
        acts = ops.feature_acts(x, W, b, features, 2)
    assert (y.device.type, y.shape, acts.shape) == ("cuda", (3, 16), (3, 2))
