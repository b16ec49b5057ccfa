"""sf.steer and sf.prepare: the right answer for good input, a clear error for bad."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

import saesteer_fast as sf

D, N, K = 40, 200, 8
EDITS = {3: 4.0, 77: -1.5, 150: 0.0}


@pytest.fixture(scope="module")
def sae(make_sae):
    return make_sae(D, N, K)


@pytest.fixture(scope="module")
def x():
    return torch.randn(50, D, generator=torch.Generator().manual_seed(1))


def assert_rounded(y, truth):
    """y is the truth, rounded once to its dtype after fp32 sums."""
    ulp = torch.finfo(y.dtype).eps / 2
    size = truth.abs().max()
    bound = ulp * truth.abs() + D * 2.0**-24 * size
    assert ((y.double() - truth).abs() <= bound).all()


@pytest.mark.fault(10, 23)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
def test_is_the_textbook_form(make_sae, textbook, x, dtype, weights, poisoned_memory):
    sae, x = make_sae(D, N, K, dtype=weights), x.to(dtype)
    y = sf.steer(x, sae, EDITS)
    assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
    assert_rounded(y, textbook(x, sae, EDITS))
    assert not torch.equal(y, x)


@pytest.mark.fault(5, 6)
@pytest.mark.parametrize(
    "shape", [(D,), (1, D), (7, D), (2, 3, D), (2, 1, 3, D), (0, D), (2, 0, D)]
)
def test_any_shape(sae, textbook, shape, poisoned_memory):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    y = sf.steer(x, sae, EDITS)
    assert y.shape == x.shape
    if y.numel():
        assert_rounded(y, textbook(x, sae, EDITS))


@pytest.mark.fault(7)
def test_any_strides(sae, x):
    y = sf.steer(x, sae, EDITS)
    wide = torch.randn(50, 2 * D)
    wide[:, ::2] = x
    views = {"columns": wide[:, ::2], "transposed": x.T.contiguous().T, "flipped": x.flip(0)}
    for name, view in views.items():
        expected = y.flip(0) if name == "flipped" else y
        torch.testing.assert_close(sf.steer(view, sae, EDITS), expected, atol=1e-5, rtol=0)
    repeated = sf.steer(x[:1].expand(5, D), sae, EDITS)
    torch.testing.assert_close(repeated, y[:1].expand(5, D), atol=1e-5, rtol=0)


@pytest.mark.fault(16)
def test_input_is_not_changed(sae, x):
    before = x.clone()
    y = sf.steer(x, sae, EDITS)
    assert torch.equal(x, before) and y.data_ptr() != x.data_ptr()


@pytest.mark.fault(22)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_edits_give_a_bit_identical_copy(sae, x, dtype):
    x = x.to(dtype)
    x[0, 0] = -0.0
    y = sf.steer(x, sae, {})
    assert y.data_ptr() != x.data_ptr()
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8))


def test_order_of_the_edits_does_not_matter(sae, x):
    backwards = dict(reversed(EDITS.items()))
    assert torch.equal(sf.steer(x, sae, backwards), sf.steer(x, sae, EDITS))


def test_mask_leaves_tokens_alone(sae, textbook, x, poisoned_memory):
    x = x.view(5, 10, D)
    mask = torch.rand(5, 10, generator=torch.Generator().manual_seed(3)) > 0.5
    mask[0], mask[1] = True, False  # a row steered, a row not
    y = sf.steer(x, sae, EDITS, mask=mask)
    assert_rounded(y, textbook(x, sae, EDITS, mask))
    assert torch.equal(y[~mask], x[~mask])


@pytest.mark.fault(1, 2)
def test_a_broken_row_breaks_no_other(sae, x):
    clean = sf.steer(x, sae, EDITS)
    broken = x.clone()
    broken[4, 2], broken[9, 0], broken[11, 1] = torch.nan, torch.inf, -torch.inf
    y = sf.steer(broken, sae, EDITS)
    others = [row for row in range(50) if row not in (4, 9, 11)]
    torch.testing.assert_close(y[others], clean[others], atol=1e-5, rtol=0)
    assert not y[[4, 9, 11]].isfinite().all(dim=-1).any()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_impl_is_passed_on(sae, textbook, x, impl):
    assert_rounded(sf.steer(x, sae, EDITS, impl=impl), textbook(x, sae, EDITS))


def test_unknown_impl(sae, x):
    with pytest.raises(ValueError, match="impl"):
        sf.steer(x, sae, EDITS, impl="fastest")


@pytest.mark.parametrize(
    "edits",
    [{np.int64(3): np.float32(4.0)}, {3: Fraction(4)}, {3: 4}, {3: torch.tensor([[4.0]])}],
    ids=["numpy", "ratio", "int", "tensor"],
)
def test_any_kind_of_number(sae, x, edits):
    assert torch.equal(sf.steer(x, sae, edits), sf.steer(x, sae, {3: 4.0}))


@pytest.mark.fault(11, 20, 21, 23)
@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        (
            [(3, 4.0), (3, 5.0)],
            TypeError,
            "edits: got list, a mapping .* or a list with a mapping a row",
        ),
        ({3}, TypeError, "edits: got set"),
        (None, TypeError, "edits: got NoneType"),
        ({N: 1.0}, ValueError, "edits: latent 200 is not among 0 to 199"),
        ({-1: 1.0}, ValueError, "edits: latent -1 is not among 0 to 199"),
        ({3.0: 1.0}, TypeError, "edits: latent 3.0 is no integer"),
        ({"3": 1.0}, TypeError, "edits: latent '3' is no integer; 3 is one"),
        ({True: 1.0}, TypeError, "edits: latent True is no integer"),
        ({3: float("nan")}, ValueError, "edits: latent 3 is given nan, .*finite"),
        ({3: float("-inf")}, ValueError, "edits: latent 3 is given -inf, .*finite"),
        ({3: 1e39}, ValueError, r"edits: latent 3 is given 1e\+39, .*finite in fp32"),
        ({3: "4"}, TypeError, "edits: latent 3 is given '4', a number is needed"),
        ({3: None}, TypeError, "edits: latent 3 is given None"),
        ({3: True}, TypeError, "edits: latent 3 is given True"),
        ({3: torch.tensor([1.0, 2.0])}, TypeError, "edits: latent 3 is given tensor"),
        ({3: torch.tensor(3)}, TypeError, r"tensor\(3\), a number or a floating-point tensor"),
    ],
)
def test_bad_edits_are_named(sae, x, edits, error, message):
    with pytest.raises(error, match=message):
        sf.steer(x, sae, edits)


@pytest.mark.fault(8, 9, 19)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, "x: got list, a tensor"),
        (
            torch.ones(3, D, dtype=torch.int64),
            TypeError,
            "x: got torch.int64, accepted are torch.fl",
        ),
        (torch.ones(3, D, dtype=torch.bool), TypeError, "x: got torch.bool, accepted"),
        (torch.ones(3, D).double(), TypeError, "x: got torch.float64, accepted"),
        (torch.ones(3, D + 1), ValueError, r"x: got shape \(3, 41\), the SAE is for \[..., 40\]"),
        (torch.ones(D, 1), ValueError, r"x: got shape \(40, 1\)"),
        (torch.tensor(1.0), ValueError, r"x: got shape \(\)"),
        (torch.ones(3, D, device="meta"), ValueError, "x: is on meta, the SAE's weights on cpu"),
    ],
)
def test_bad_x_is_named(sae, x, error, message):
    with pytest.raises(error, match=message):
        sf.steer(x, sae, EDITS)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(50), r"mask: got torch.float32 \(50,\), bool \(50,\) is needed"),
        (torch.ones(49, dtype=torch.bool), r"mask: got torch.bool \(49,\)"),
        (torch.ones(50, 1, dtype=torch.bool), r"mask: got torch.bool \(50, 1\)"),
    ],
)
def test_bad_mask_is_named(sae, x, mask, message):
    with pytest.raises(ValueError, match=message):
        sf.steer(x, sae, EDITS, mask=mask)
    with pytest.raises(TypeError, match="mask: got list, a bool tensor is needed"):
        sf.steer(x, sae, EDITS, mask=mask.tolist())


def test_bad_sae_is_named(x):
    with pytest.raises(TypeError, match=r"sae: got str, an SAE is needed; SAE\.load reads one"):
        sf.steer(x, "layers.6", EDITS)


TABLE = {"off": {}, "up": {3: sf.add(2.0)}, "down": {77: sf.scale(0.5), 3: -1.0}}
PREPARED = [
    (EDITS, {}),
    ({3: sf.at_least(2.0)}, {"when": sf.active({77: 0.1})}),
    ({3: 4.0}, {"measure": "projection"}),
    ({3: 4.0}, {"error": "drop"}),
    ([EDITS, {}, {5: 1.0}, {}, {3: 2.0}], {}),
    (TABLE, {"rows": ["up", "off", "down", "up", "off"]}),
]


@pytest.mark.parametrize(("edits", "options"), PREPARED)
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_prepared_does_the_same(sae, x, edits, options, masked):
    x = x.view(5, 10, D)
    mask = torch.arange(50).view(5, 10) % 7 > 0 if masked else None
    edit = sf.prepare(sae, edits, **options)
    expected = sf.steer(x, sae, edits, mask=mask, **options)
    assert not torch.equal(expected, x)
    for _ in range(2):
        assert torch.equal(edit(x, mask), expected)


def test_what_is_prepared_changes_in_place(sae, x):
    edit = sf.prepare(sae, EDITS)
    assert edit.latents == [*EDITS] and edit.strengths.tolist() == [*EDITS.values()]
    edit.set({3: 9.0})
    assert torch.equal(edit(x), sf.steer(x, sae, EDITS | {3: 9.0}))
    with pytest.raises(ValueError, match="edits: latent 5 is not edited"):
        edit.set({5: 1.0})
    x = x.view(5, 10, D)
    edit = sf.prepare(sae, TABLE, rows=["up", "off", "down", "up", "off"])
    edit.choose(["off", "off", "down", "down", "up"])
    assert torch.equal(edit(x), sf.steer(x, sae, TABLE, rows=["off", "off", "down", "down", "up"]))
    assert "up" in repr(edit) and repr(edit).startswith("Prepared(")


def test_strengths_of_what_is_prepared_are_learned(sae, x):
    edit = sf.prepare(sae, EDITS)
    edit.strengths.requires_grad_()
    given = {latent: torch.tensor(value, requires_grad=True) for latent, value in EDITS.items()}
    for _ in range(2):
        edit.strengths.grad = None
        edit(x).square().sum().backward()
    sf.steer(x, sae, given).square().sum().backward()
    assert torch.equal(edit.strengths.grad, torch.stack([one.grad for one in given.values()]))


def test_what_cannot_be_prepared(sae, x):
    with pytest.raises(TypeError, match=r"sae: got str, an SAE is needed; SAE\.load reads one"):
        sf.prepare("layers.6", EDITS)
    with pytest.raises(ValueError, match=r"when: sf\.gate is decided by a prompt"):
        sf.prepare(sae, EDITS, when=sf.gate({5: 1.0}))
    with pytest.raises(ValueError, match="learn `strengths` instead"):
        sf.prepare(sae, {3: torch.tensor(1.0, requires_grad=True)})
    with pytest.raises(ValueError, match="rows: needed to choose among"):
        sf.prepare(sae, TABLE)
    with pytest.raises(ValueError, match=r"impl: got 'cpuu', accepted are .*; did you mean 'cpu'"):
        sf.prepare(sae, EDITS, impl="cpuu")
    with pytest.raises(ValueError, match="impl: 'triton' cannot run for a tensor on cpu"):
        sf.prepare(sae, EDITS, impl="triton")
    edit = sf.prepare(sae, EDITS)
    with pytest.raises(ValueError, match=r"x: got shape \(3, 41\)"):
        edit(torch.ones(3, D + 1))
    with pytest.raises(ValueError, match=r"mask: got torch\.bool \(49,\)"):
        edit(x, torch.ones(49, dtype=torch.bool))


@pytest.mark.fault(23, 82)
@pytest.mark.parametrize("by", ["steer", "prepare"])
def test_what_would_steer_nothing_or_break_all_is_refused(sae, x, by):
    def steer(sae, edits):
        return sf.steer(x, sae, edits) if by == "steer" else sf.prepare(sae, edits)(x)

    W_dec = sae.W_dec.clone()
    W_dec[3] = 0
    still = sf.SAE(sae.W_enc, sae.b_enc, W_dec, sae.b_dec, K)
    assert not torch.equal(steer(still, {77: 1.0}), x)
    with pytest.raises(ValueError, match="latent 3 has the direction 0, nothing would be steered"):
        steer(still, EDITS)
    for strength in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match=r"edits: a strength is (inf|nan), which is not"):
            steer(sae, {3: torch.tensor(strength)})


def test_the_error_dropped_copies_no_sae(sae, x, monkeypatch):
    monkeypatch.setattr(sf.SAE, "__post_init__", None)
    sf.steer(x, sae, EDITS, error="drop")
    assert sae.to("cpu") is sae.to(dtype=torch.float32) is sae


def test_a_hook_of_transformer_lens(make_sae, textbook):
    lens = pytest.importorskip("transformer_lens", reason="TransformerLens is not installed")
    sizes = dict(n_layers=3, d_model=D, d_head=20, n_ctx=16, d_vocab=64, act_fn="gelu")
    model = lens.HookedTransformer(lens.HookedTransformerConfig(**sizes, seed=0))
    sae, ids = make_sae(D, N, K), torch.tensor([[5, 17, 60, 2], [7, 8, 9, 5]])
    edit = sf.prepare(sae, EDITS)

    def run(steered) -> torch.Tensor:
        hook = "blocks.1.hook_resid_post", lambda x, hook: steered(x).to(x.dtype)
        return model.run_with_hooks(ids, fwd_hooks=[hook])

    with torch.inference_mode():
        torch.testing.assert_close(run(edit), run(lambda x: textbook(x, sae, EDITS)))
        assert not torch.allclose(run(edit), model(ids))


def test_rows_that_edit_nothing_are_warned_of(sae):
    with pytest.warns(UserWarning, match="edits: name no latent, so nothing is steered"):
        sf.prepare(sae, [{}, {}])
