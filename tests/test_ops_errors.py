"""Bad arguments to the ops: every error names the argument and what is accepted."""

from __future__ import annotations

import re

import pytest
import torch
from ops_cases import permutation, random_case

from saesteer_fast import choice, ops

T, D, N, K = 5, 6, 9, 3
CASE = random_case(T, D, N, K, 2, masked=True)
MATRIX = torch.randn(4, 4)

GOOD = {
    "x": CASE.x,
    "W_enc": CASE.W_enc,
    "b_enc": CASE.b_enc,
    "W_dec": CASE.W_dec,
    "b_dec": CASE.b_dec,
    "directions": CASE.directions,
    "features": CASE.features,
    "values": CASE.values,
    "mask": CASE.mask,
    "order": permutation(N),
    "k": K,
}
ENCODER = ("x", "W_enc", "b_enc")
TAKES = {
    "steer": (*ENCODER, "directions", "features", "values", "k", "mask", "order"),
    "steer_": (*ENCODER, "directions", "features", "values", "k", "mask", "order"),
    "feature_acts": (*ENCODER, "features", "k", "order"),
    "encode": (*ENCODER, "k"),
    "project": ENCODER,
}
FLOATS = "accepted: float32, bfloat16, float16"

# argument, what comes instead, how the message goes on after the argument's name
BAD = {
    "scalar x": ("x", torch.tensor(1.0), r" has shape \[\]; accepted: \[..., d\]"),
    "double x": ("x", CASE.x.double(), f" is float64; {FLOATS}"),
    "integer x": ("x", CASE.x.int(), f" is int32; {FLOATS}"),
    "bool x": ("x", CASE.x > 0, f" is bool; {FLOATS}"),
    "complex x": ("x", CASE.x + 0j, f" is .*; {FLOATS}"),
    "narrow x": ("x", CASE.x[:, :1], None),
    "wide x": ("x", torch.randn(T, D + 1), None),
    "W_enc of another width": (
        "W_enc",
        CASE.W_enc[:, :1].contiguous(),
        rf" has shape \[{N}, 1\]; accepted: \[N, {D}\]",
    ),
    "transposed W_enc": (
        "W_enc",
        CASE.W_enc.T.contiguous(),
        rf" has shape \[{D}, {N}\]; accepted: \[N, {D}\], a latent a row",
    ),
    "flat W_enc": ("W_enc", CASE.W_enc.flatten(), rf" has shape .*; accepted: \[N, {D}\]"),
    "empty W_enc": ("W_enc", CASE.W_enc[:0], rf" has shape \[0, {D}\]; accepted"),
    "double W_enc": ("W_enc", CASE.W_enc.double(), f" is float64; {FLOATS}"),
    "int8 W_enc": ("W_enc", CASE.W_enc.char(), f" is .*; {FLOATS}"),
    "strided W_enc": (
        "W_enc",
        torch.randn(N, 2 * D)[:, ::2],
        r" is not contiguous.*call .contiguous\(\) once",
    ),
    "short b_enc": ("b_enc", CASE.b_enc[:-1], rf" has shape \[{N - 1}\]; accepted: \[{N}\]"),
    "b_enc as a row": ("b_enc", CASE.b_enc[None], rf" has shape \[1, {N}\]; accepted: \[{N}\]"),
    "strided b_enc": (
        "b_enc",
        torch.randn(2 * N)[::2],
        rf" has shape \[{N}\]; accepted: \[{N}\], contiguous",
    ),
    "bfloat16 b_enc": ("b_enc", CASE.b_enc.bfloat16(), " is bfloat16; accepted: float32"),
    "double b_enc": ("b_enc", CASE.b_enc.double(), " is float64; accepted: float32"),
    "k of 0": ("k", 0, f" is 0; accepted: 1 to {N}"),
    "negative k": ("k", -1, f" is -1; accepted: 1 to {N}"),
    "k above N": ("k", N + 1, f" is {N + 1}; accepted: 1 to {N}, the number of latents"),
    "huge k": ("k", 2**40, f" is {2**40}; accepted: 1 to {N}"),
    "feature below 0": ("features", torch.tensor([1, -1]), f" holds -1; accepted: 0 to {N - 1}"),
    "feature of N": ("features", torch.tensor([N, 1]), f" holds {N}; accepted: 0 to {N - 1}"),
    "huge feature": ("features", torch.tensor([1, 2**40]), f" holds {2**40}; accepted: 0 to"),
    "feature twice": ("features", torch.tensor([2, 2]), " holds 2 twice; .* once"),
    "int32 features": ("features", CASE.features.int(), " is int32; accepted: int64"),
    "float features": ("features", CASE.features.float(), " is float32; accepted: int64"),
    "bool features": ("features", CASE.features > 0, " is bool; accepted: int64"),
    "features in a matrix": (
        "features",
        CASE.features[None],
        r" has shape \[1, 2\]; accepted: \[F\]",
    ),
    "scalar feature": ("features", torch.tensor(1), r" has shape \[\]; accepted: \[F\]"),
    "directions of other features": (
        "directions",
        CASE.W_dec,
        rf" has shape \[{N}, {D}\]; accepted: \[F, d\]",
    ),
    "narrow directions": (
        "directions",
        CASE.directions[:, :1],
        r" has shape \[2, 1\]; accepted: \[F, d\]",
    ),
    "flat directions": ("directions", CASE.directions[0], rf" has shape \[{D}\]; accepted"),
    "double directions": ("directions", CASE.directions.double(), f" is float64; {FLOATS}"),
    "one value": ("values", CASE.values[:1], r" has shape \[1\]; accepted: \[F\], or"),
    "scalar value": ("values", torch.tensor(1.0), r" has shape \[\]; accepted: \[F\], or"),
    "values of other tokens": (
        "values",
        torch.randn(T + 1, 2),
        rf" has shape \[{T + 1}, 2\]; accepted: \[F\], or x's leading sizes and F",
    ),
    "values to broadcast": ("values", torch.randn(1, 2), r" has shape \[1, 2\]; accepted"),
    "bfloat16 values": ("values", CASE.values.bfloat16(), " is bfloat16; accepted: float32"),
    "double values": ("values", CASE.values.double(), " is float64; accepted: float32"),
    "short mask": ("mask", CASE.mask[1:], rf" has shape \[{T - 1}\]; accepted: x's leading sizes"),
    "mask as wide as x": ("mask", CASE.x > 0, rf" has shape \[{T}, {D}\]; accepted: x's leading"),
    "scalar mask": ("mask", torch.tensor(True), r" has shape \[\]; accepted: x's leading sizes"),
    "float mask": ("mask", CASE.mask.float(), " is float32; accepted: bool"),
    "short order": ("order", torch.arange(N - 1), rf" has shape \[{N - 1}\]; accepted: \[{N}\]"),
    "order in a matrix": ("order", torch.arange(N)[None], rf" has shape .*; accepted: \[{N}\]"),
    "strided order": (
        "order",
        torch.arange(2 * N)[::2],
        rf" has shape \[{N}\]; accepted: \[{N}\], contiguous, the latent of each row of W_enc",
    ),
    "int32 order": ("order", torch.arange(N).int(), " is int32; accepted: int64"),
    "float order": ("order", torch.arange(N).float(), " is float32; accepted: int64"),
    "int64 mask": ("mask", CASE.mask.long(), " is int64; accepted: bool"),
}


def call(op: str, by=torch.ops.saesteer, **changed):
    arguments = GOOD | changed
    if op == "steer_":
        arguments["x"] = arguments["x"].clone(memory_format=torch.contiguous_format)
    names = TAKES.get(op, changed)  # decode and add_directions are given all, in order
    return getattr(by, op)(*(arguments[name] for name in names))


@pytest.mark.fault(8, 9, 20, 21, 24, 30)
@pytest.mark.parametrize(
    ("op", "kind"),
    [
        pytest.param(op, kind, id=f"{op}: {kind}")
        for kind, (argument, _, _) in BAD.items()
        for op, takes in TAKES.items()
        if argument in takes
    ],
)
def test_the_error_names_the_argument(op, kind):
    argument, bad, message = BAD[kind]
    # A wrong x shows in W_enc, which says how wide x may be.
    expected = "W_enc has shape" if message is None else re.escape(argument) + message
    said = refusal(op, {argument: bad})
    assert re.match(f"saesteer::{op}: {expected}", said)
    if " holds " not in expected:  # without numbers, for torch.compile
        bare = {name: meta(value) for name, value in (GOOD | {argument: bad}).items()}
        assert refusal(op, bare) == said


def refusal(op: str, changed: dict) -> str:
    """What C++ and Python say of the arguments, word by word the same."""
    said = set()
    for by in (torch.ops.saesteer, ops._REFERENCE):
        with pytest.raises(RuntimeError) as refused:
            call(op, by, **changed)
        said.add(str(refused.value))
    assert len(said) == 1, said
    return said.pop()


def meta(value):
    """A tensor without its numbers, in the same layout."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def test_of_several_repeated_features_the_same_one_is_named():
    changed = {"features": torch.tensor([1, 2, 2, 1]), "directions": CASE.W_dec[:4]}
    assert "features holds 2 twice" in refusal("steer", changed | {"values": torch.ones(4)})


def test_good_arguments_pass():
    """What the changes above are changes of."""
    for op in TAKES:
        call(op)
        call(op, ops._REFERENCE)
    call("steer", mask=None, order=None)
    call("feature_acts", order=None)
    ops.decode(*CASE.encode(), CASE.W_dec, CASE.b_dec)


VALUES, INDICES = CASE.encode()
BAD_DECODE = {
    "scalar values": ("values", torch.tensor(1.0), r" has shape \[\]; accepted: \[..., k\]"),
    "bfloat16 values": ("values", VALUES.bfloat16(), " is bfloat16; accepted: float32"),
    "short indices": (
        "indices",
        INDICES[:, :1],
        rf" has shape \[{T}, 1\]; accepted: values' shape",
    ),
    "int32 indices": ("indices", INDICES.int(), " is int32; accepted: int64"),
    "index below 0": ("indices", INDICES - N, f" holds -.*; accepted: 0 to {N - 1}"),
    "index of N": ("indices", INDICES + N, f" holds .*; accepted: 0 to {N - 1}"),
    "flat W_dec": ("W_dec", CASE.W_dec.flatten(), r" has shape .*; accepted: \[N, d\]"),
    "double W_dec": ("W_dec", CASE.W_dec.double(), f" is float64; {FLOATS}"),
    "strided W_dec": ("W_dec", torch.randn(N, 2 * D)[:, ::2], " is not contiguous"),
    "short b_dec": ("b_dec", CASE.b_dec[1:], rf" has shape \[{D - 1}\]; accepted: \[d\]"),
    "b_dec to broadcast": ("b_dec", CASE.b_dec[:1], r" has shape \[1\]; accepted: \[d\]"),
    "double b_dec": ("b_dec", CASE.b_dec.double(), f" is float64; {FLOATS}"),
}


@pytest.mark.parametrize("kind", BAD_DECODE)
def test_the_error_of_decode_names_the_argument(kind):
    argument, bad, message = BAD_DECODE[kind]
    good = {"values": VALUES, "indices": INDICES, "W_dec": CASE.W_dec, "b_dec": CASE.b_dec}
    said = refusal("decode", good | {argument: bad})
    assert re.match(f"saesteer::decode: {argument}{message}", said)


BAD_ADDITION = {
    "double x": ("x", CASE.x.double(), f" is float64; {FLOATS}"),
    "scalar x": ("x", torch.tensor(1.0), r" has shape \[\]; accepted: \[..., d\]"),
    "flat directions": (
        "directions",
        CASE.directions[0],
        rf" has shape \[{D}\]; accepted: \[F, d\]",
    ),
    "narrow directions": ("directions", CASE.directions[:, 1:], " has shape .*; accepted: "),
    "double directions": ("directions", CASE.directions.double(), f" is float64; {FLOATS}"),
    "one coefficient": ("coef", CASE.values[:1], r" has shape \[1\]; accepted: \[F\], or"),
    "coefficients to broadcast": ("coef", CASE.values[None], r" has shape \[1, 2\]; accepted: "),
    "bfloat16 coefficients": ("coef", CASE.values.bfloat16(), " is bfloat16; accepted: float32"),
    "coefficients elsewhere": ("coef", CASE.values.to("meta"), " is on meta, x on cpu"),
}


@pytest.mark.parametrize("kind", BAD_ADDITION)
def test_the_error_of_add_directions_names_the_argument(kind):
    argument, bad, message = BAD_ADDITION[kind]
    good = {"x": CASE.x, "directions": CASE.directions, "coef": CASE.values}
    said = refusal("add_directions", good | {argument: bad})
    assert re.match(f"saesteer::add_directions: {argument}{message}", said)


@pytest.mark.fault(24)
@pytest.mark.parametrize("k", [2.0, "3", None])
def test_k_must_be_an_integer(k):
    with pytest.raises((RuntimeError, TypeError), match=r"'k'|argument k"):
        call("steer", k=k)


@pytest.mark.fault(19, 30)
@pytest.mark.parametrize("op", TAKES)
def test_tensors_on_two_devices_are_refused(op):
    """A tensor without data, as loading on "meta" leaves it, must not give a result without one."""
    for name in TAKES[op]:
        if isinstance(GOOD[name], torch.Tensor):
            message = "is on cpu, x on meta" if name == "x" else f"{name} is on meta, x on cpu"
            with pytest.raises(RuntimeError, match=message):
                call(op, **{name: GOOD[name].to("meta")})


@pytest.mark.fault(19)
def test_decode_on_two_devices_is_refused():
    good = (VALUES, INDICES, CASE.W_dec, CASE.b_dec)
    for i in range(4):
        mixed = [t.to("meta") if i == j else t for j, t in enumerate(good)]
        with pytest.raises(RuntimeError, match="meta"):
            torch.ops.saesteer.decode(*mixed)


@pytest.mark.parametrize("kind", ["sparse", "mkldnn"])
def test_other_layouts_are_refused(kind):
    x = CASE.x.to_sparse() if kind == "sparse" else CASE.x.to_mkldnn()
    with pytest.raises(NotImplementedError, match="saesteer::steer"):
        call("steer", x=x)


@pytest.mark.parametrize("impl", ["Reference", "numpy", "", None])
def test_an_unknown_implementation_is_refused(impl):
    with pytest.raises(ValueError, match=r"^impl: got .*, accepted are auto, cpu, cuda, triton"):
        CASE.steer(impl)


@pytest.mark.parametrize(
    ("impl", "device", "accepted"),
    [
        ("cuda", "cpu", "auto, cpu, reference"),
        ("triton", "cpu", "auto, cpu, reference"),
        ("cpu", "meta", "auto, reference"),
        ("cuda", "meta", "auto, reference"),
    ],
)
def test_an_implementation_for_another_device_is_refused(impl, device, accepted, monkeypatch):
    monkeypatch.setitem(choice.MISSING, "cuda", None)  # as where it is built
    case = CASE.but(x=CASE.x.to(device))
    for run in (case.steer, case.acts, case.encode):
        message = f"^impl: {impl!r} cannot run for a tensor on {device}; accepted: {accepted}"
        with pytest.raises(ValueError, match=message):
            run(impl)


def test_what_a_call_asks_for_goes_before_the_environment(monkeypatch):
    monkeypatch.setattr(choice, "_DEFAULT", "cuda")
    with pytest.raises(ValueError, match=r"^SAESTEER_IMPL: 'cuda' cannot run for a tensor on cpu"):
        CASE.acts()
    assert torch.allclose(CASE.acts("cpu"), CASE.acts("reference"), atol=1e-5)


@pytest.mark.parametrize("argument", ["W_enc", "b_enc", "directions"])
def test_no_gradient_means_an_error(argument):
    wanted = GOOD[argument].clone().requires_grad_()
    for op, takes in TAKES.items():
        if argument in takes:
            with pytest.raises(
                NotImplementedError, match=f"saesteer::{op}: no gradient for {argument}"
            ):
                call(op, **{argument: wanted})


@pytest.mark.parametrize("argument", ["W_dec", "b_dec"])
def test_no_gradient_for_the_decoder(argument):
    good = {"values": VALUES, "indices": INDICES, "W_dec": CASE.W_dec, "b_dec": CASE.b_dec}
    good[argument] = good[argument].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=f"saesteer::decode: no gradient for {argument}"):
        torch.ops.saesteer.decode(*good.values())
