"""steer_ writes over x what steer gives, bit for bit, and nothing else; or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from ops_cases import DTYPES, Case, permutation, random_case, same_bits, threads
from ptx.memory import unwritable
from torch._inductor.utils import run_and_get_code
from torch.library import opcheck

from saesteer_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPS = torch.ops.saesteer
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
IMPLS = pytest.mark.parametrize("impl", ["cpu", "reference"])


def assert_in_place(case: Case, impl: str = "auto") -> None:
    """x between two rows of NaN becomes steer's result, and the NaN stays."""
    around = case.x.new_full((case.x.numel() + 2 * case.x.shape[-1],), torch.nan)
    before, x, after = around.split([case.x.shape[-1], case.x.numel(), case.x.shape[-1]])
    x = x.view(case.x.shape).copy_(case.x)
    expected = case.steer(impl)
    assert case.but(x=x).steer_(impl) is None
    assert same_bits(x, expected)
    assert before.isnan().all() and after.isnan().all()


# T, d, N, k; some token is live in the last two, all are in the first
SHAPES = [(1, 3072, 129, 129), (7, 3072, 200, 32), (63, 67, 129, 16), (3000, 5, 65, 3)]


@IMPLS
@EVERY_DTYPE
@pytest.mark.parametrize("F", [0, 1, 4, 17])
def test_it_is_what_steer_gives(impl, dtype, F):
    for shape, masked, weights in product(SHAPES, (False, True), {dtype, torch.bfloat16}):
        case = random_case(*shape, F, dtype, weights, masked=masked)
        assert_in_place(case, impl)
        stored = case.but(values=case.values.expand(shape[0], F)).stored(permutation(shape[2]))
        assert_in_place(stored, impl)


@EVERY_DTYPE
@pytest.mark.parametrize("offset", [-1e3, 1e3], ids=["all dead", "all live"])
def test_every_token_alike(dtype, offset):
    """Where L0 settles every token, and where none is settled before every latent is counted."""
    case = random_case(300, 67, 1000, 16, 4, dtype, dtype)
    b_enc = case.b_enc.index_fill(0, case.features, offset)
    for count in (1, 4):
        with threads(count):
            assert_in_place(case.but(b_enc=b_enc))


@IMPLS
@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
def test_any_leading_sizes(impl, lead):
    assert_in_place(random_case(lead, per_token=True, masked=True), impl)


@IMPLS
def test_bad_tokens_are_their_own(impl):
    case = random_case(20)
    case.x[3, 5], case.x[7] = torch.inf, torch.nan
    assert_in_place(case, impl)


@EVERY_DTYPE
def test_what_does_not_change_is_not_written(dtype):
    case = random_case(100, dtype=dtype, per_token=True)
    none = torch.zeros(100, dtype=torch.bool)
    with unwritable(case.x) as x:
        case.but(x=x, mask=none).steer_()
        case.but(x=x, values=case.acts()).steer_()
        case.but(x=x, features=case.features[:0], values=case.values[:, :0]).steer_()


# ---- what is refused ----


@IMPLS
def test_x_must_be_contiguous(impl):
    case = random_case(5, 6, 9, 3)
    message = "^saesteer::steer_: x is not contiguous.*; accepted: a contiguous x, or .*::steer, "
    for x in (case.x.T.contiguous().T, torch.randn(5, 12)[:, ::2], case.x[:1].expand(5, -1)):
        before = x.clone()
        with pytest.raises(RuntimeError, match=message):
            case.but(x=x).steer_(impl)
        assert torch.equal(x, before)


def sharing(case: Case) -> dict[str, dict]:
    """By argument: a call in which it lies in x's memory, in part."""
    T, d = case.x.shape
    memory = torch.zeros(4 * T * d)
    x, whole = memory[: T * d].view(T, d), memory.view(-1, d)
    return {
        "W_enc": {"x": x, "W_enc": whole[T - 1 :][:9]},
        "b_enc": {"x": x, "b_enc": memory[T * d - 1 :][:9]},  # but one number behind x
        "directions": {"x": x, "directions": whole[T - 1 : T + 1]},
        "features": {"x": x, "features": memory[:4].view(torch.int64)},
        "values": {"x": x, "values": x[:, :2]},
        "mask": {"x": x, "mask": memory[:2].view(torch.bool)[:T]},
        "order": {"x": x, "order": memory[:18].view(torch.int64)},
    }


@pytest.mark.fault(16)
@IMPLS
@pytest.mark.parametrize("argument", sharing(random_case(5, 6, 9, 3)))
def test_what_is_read_must_not_be_overwritten(impl, argument):
    case = random_case(5, 6, 9, 3)
    names = ("x", "W_enc", "b_enc", "directions", "features", "values", "k")
    arguments = dict(zip(names, case.edit, strict=True)) | sharing(case)[argument]
    message = f"^saesteer::steer_: {argument} lies in the memory of x.*; accepted: a copy of it"
    again = torch.from_dlpack(arguments[argument])  # the same memory, of another storage
    for lies_there in (arguments[argument], again):
        with pytest.raises(RuntimeError, match=message):
            ops.steer_(**arguments | {argument: lies_there}, impl=impl)
    arguments[argument] = arguments[argument].clone()
    if argument != "order":  # whose zeros would be no permutation, but nobody looks
        arguments["features"] = case.features
    ops.steer_(**arguments, impl=impl)


@IMPLS
def test_neighbours_in_one_buffer_are_apart(impl):
    """Tokens of one request in a batch, the weights behind them."""
    case = random_case(5, 6, 9, 3)
    memory = torch.cat([case.x, case.x, case.W_enc])
    x, other, W_enc = memory.split([5, 5, 9])
    case.but(x=x, W_enc=W_enc).steer_(impl)
    assert same_bits(x, case.steer(impl)) and same_bits(other, case.x)


# ---- autograd and torch.func ----


def no_gradient(argument: str) -> str:
    return f"^saesteer::steer_: no gradient for {argument}, .*; accepted: saesteer::steer, which"


@pytest.mark.fault(14)
@IMPLS
@pytest.mark.parametrize("argument", ["x", "values"])
def test_what_needs_a_gradient_is_refused(impl, argument):
    case = random_case()
    leaf = getattr(case, argument).clone().requires_grad_()
    for wanted in (leaf, leaf * 1):
        before = wanted.detach().clone()
        with pytest.raises(NotImplementedError, match=no_gradient(argument)):
            case.but(**{argument: wanted}).steer_(impl)
        assert torch.equal(wanted, before)
    with torch.autograd.forward_ad.dual_level():
        t = getattr(case, argument)
        dual = torch.autograd.forward_ad.make_dual(t.clone(), t)
        with pytest.raises(NotImplementedError, match=no_gradient(argument)):
            case.but(**{argument: dual}).steer_(impl)
        case.but(x=case.x.clone()).steer_(impl)


@pytest.mark.fault(15)
@IMPLS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(impl, mode):
    case = random_case()
    x, values = case.x.clone().requires_grad_(), case.values.clone().requires_grad_()
    expected = case.steer(impl)
    with mode():
        case.but(x=x, values=values).steer_(impl)
        inner = case.x.clone()
        case.but(x=inner).steer_(impl)
    assert same_bits(x.detach(), expected) and same_bits(inner, expected)


@pytest.mark.fault(14)
@IMPLS
@pytest.mark.parametrize("tracking", [True, False])
def test_a_gradient_that_needs_the_old_x_is_refused(impl, tracking):
    case = random_case()
    for alias in (lambda x: x, lambda x: x[3:], lambda x: x.detach()):
        x = case.x.clone()
        loss = (x * torch.ones(33, requires_grad=True)).sum()
        with torch.set_grad_enabled(tracking):
            random_case(len(alias(x))).but(x=alias(x)).steer_(impl)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.fault(15)
@IMPLS
def test_torch_func_is_refused(impl):
    case = random_case((2, 5))

    def run(x):
        case.but(x=x).steer_(impl)
        return x.sum()

    def by_vmap(x):
        return torch.func.vmap(run)(x[None])

    for transformed in (by_vmap, torch.func.grad(run), torch.func.jacfwd(run)):
        with pytest.raises(NotImplementedError, match=r"^saesteer::steer_: has no rule for"):
            transformed(case.x.clone())


# ---- as a part of PyTorch ----


@pytest.mark.fault(19, 22)
@EVERY_DTYPE
def test_opcheck(dtype):
    full = random_case((2, 5), 33, 65, 4, 2, dtype, dtype, per_token=True, masked=True)
    for case in (full.stored(permutation(65)), random_case(), random_case(0), random_case((), F=0)):
        opcheck(OPS.steer_, (case.x, *case.edit[1:], case.mask, case.order))


BATCH = random_case((3, 5), masked=True)


def steered(x: torch.Tensor) -> torch.Tensor:
    BATCH.but(x=x).steer_()
    return x


def on_an_intermediate(x):
    return steered(2 * x)


def on_a_view(x):
    y = 2 * x
    ops.steer_(y.view(15, 33), *BATCH.edit[1:], mask=BATCH.mask.view(15))
    return y


def between_uses(x):
    y = 2 * x
    before = y.sin()
    return steered(y) + before, before


def on_a_copy_that_is_needed(x):
    y = 2 * x
    return steered(y.clone()) - y


def on_the_input(x):
    return steered(x).sum()


COMPILED = [on_an_intermediate, on_a_view, between_uses, on_a_copy_that_is_needed, on_the_input]


@pytest.mark.fault(15)
@pytest.mark.parametrize("run", COMPILED)
@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
def test_compiles_in_one_graph(run, dynamic):
    torch.compiler.reset()
    given, ours = BATCH.x.clone(), BATCH.x.clone()
    expected = run(given)
    found = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")(ours)
    assert same_bits(ours, given)
    for a, b in zip(*([t] if torch.is_tensor(t) else t for t in (found, expected)), strict=True):
        assert same_bits(a, b)


def allocations(run: Callable, x: torch.Tensor) -> int:
    """Buffers of x's shape in the code that inductor makes of run."""
    torch.compiler.reset()
    found, (code,) = run_and_get_code(torch.compile(run, fullgraph=True), x.clone())
    torch.testing.assert_close(found, run(x.clone()))
    assert code.count("saesteer.steer_.default(") == 1
    return code.count(f"empty_strided_cpu({tuple(x.shape)}")


def test_inductor_adds_no_copy():
    """One buffer for an intermediate, none for the input."""
    x = BATCH.x
    assert allocations(on_an_intermediate, x) == 1 and allocations(on_the_input, x) == 0


def test_a_compiled_gradient_is_refused():
    torch.compiler.reset()
    run = torch.compile(on_an_intermediate, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"saesteer::steer_: no gradient for x"):
        run(BATCH.x.clone().requires_grad_())
