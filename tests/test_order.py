"""The order in which latents are counted: found by calibration, kept with the SAE, never seen in a
result."""

from __future__ import annotations

import copy
import errno
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ops_cases import permutation, same_bits
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import saesteer_fast as sf
from saesteer_fast import measures
from saesteer_fast.measures import Measured

pytestmark = pytest.mark.usefixtures("one_thread")
N, D, K = 90, 24, 6
FILE = "saesteer_order.safetensors"
LATENTS = (3, 40, 41)


def stream(*lead: int, seed: int = 0) -> Tensor:
    return torch.randn(*lead, D, generator=torch.Generator().manual_seed(seed))


def integers(*sizes: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, sizes, generator=random).float()


@pytest.fixture(scope="module")
def tied() -> sf.SAE:
    """Sums of small integers: exact, and equal for many latents."""
    return sf.SAE(
        W_enc=integers(N, D, seed=1),
        b_enc=integers(N, seed=2),
        W_dec=integers(N, D, seed=3),
        b_dec=integers(D, seed=4),
        k=K,
        hookpoint="layers.1",
    )


def counts(sae: sf.SAE, x: Tensor) -> Tensor:
    """In how many tokens each latent is live, dense, in fp64."""
    p = (x.double() - sae.b_dec.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    live = torch.zeros_like(p).scatter(-1, p.topk(sae.k).indices, 1.0) * (p > 0)
    return live.reshape(-1, len(sae.W_enc)).sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_most_often_live_first(make_sae, dtype, monkeypatch):
    sae, x = make_sae(D, N, K), stream(3, 70).to(dtype)
    expected = counts(sae, x).argsort(descending=True, stable=True)
    calibrated = sae.calibrate(x)
    assert torch.equal(calibrated.order, expected) and sae.order is None
    assert calibrated.W_enc.data_ptr() == sae.W_enc.data_ptr()
    monkeypatch.setattr(measures, "TOKENS", 9)
    for batches in (x, list(x), iter([x[:1], x[1:1], x[1:]])):
        assert torch.equal(sae.calibrate(batches).order, expected)
    other = calibrated.calibrate(stream(200, seed=1))
    assert not torch.equal(other.order, expected) and torch.equal(calibrated.order, expected)


@pytest.mark.parametrize(
    "settings", [{"normalize": "layer_norm"}, {"scale": 0.5}, {"decoder_norm": True}], ids=str
)
def test_counts_what_encoding_finds(make_sae, settings):
    sae, x = replace(make_sae(D, N, K), **settings), 3 * stream(200) + 1
    live = (sae.encode(x) > 0).sum(0)
    assert torch.equal(sae.calibrate(x).order, live.argsort(descending=True, stable=True))


def test_tokens_of_nan_count_nowhere(make_sae):
    sae, x = make_sae(D, N, K), stream(50)
    broken = torch.cat([x, torch.full((9, D), torch.nan)])
    assert torch.equal(sae.calibrate(broken).order, sae.calibrate(x).order)


def test_calibrates_in_inference_mode_for_use_with_gradients(make_sae):
    with torch.inference_mode():
        sae = make_sae(D, N, K).calibrate(stream(50))
        Measured(sae, LATENTS)
    x = stream(5).requires_grad_()
    sf.steer(x, sae, {3: 2.0}).sum().backward()
    assert x.grad is not None


def in_orders(sae: sf.SAE) -> list[sf.SAE]:
    orders = [permutation(N), torch.arange(N).flip(0), sae.calibrate(integers(99, D, seed=9)).order]
    return [replace(sae, order=order) for order in orders]


EDITS = {
    "set": {3: 2.0, 40: -1.0},
    "kinds": {3: sf.scale(2.0), 40: sf.add(1.0), 41: sf.at_most(1.0)},
    "rows": [{3: 2.0}, {}, {40: sf.at_least(3.0)}],
}


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize("when", [None, sf.active(7, above=1.0)], ids=["always", "when"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_steering_changes_no_bit(tied, edits, error, when, impl):
    x = integers(3, 40, D, seed=5)
    options = dict(error=error, when=when, impl=impl)
    expected = sf.steer(x, tied, EDITS[edits], **options)
    assert not torch.equal(expected, x)
    for sae in in_orders(tied):
        assert same_bits(sf.steer(x, sae, EDITS[edits], **options), expected)


@pytest.mark.parametrize(
    "settings", [{}, {"scale": 0.5}, {"normalize": "layer_norm"}, {"decoder_norm": True}], ids=str
)
def test_measuring_changes_no_bit(make_sae, tied, settings):
    """Ties in the second SAE, and there on the k-th place."""
    for sae, x in ((make_sae(D, N, K), stream(200)), (tied, integers(200, D, seed=5))):
        sae = replace(sae, **settings)
        expected = Measured(sae, range(N)).acts(x)
        assert torch.equal(expected, sae.encode(x)) or settings
        for other in in_orders(sae):
            measured = Measured(other, range(N))
            assert same_bits(measured.acts(x), expected)
            assert torch.equal(other.encode(x), sae.encode(x))
            unsaid = torch.ops.saesteer.feature_acts(
                x, measured.W_enc, measured.b_enc, measured.rows, K
            )
            assert settings or sae is not tied or not torch.equal(unsaid, expected)


def test_gradients_are_the_same(tied):
    gradients = []
    for sae in (tied, *in_orders(tied)):
        x = integers(40, D, seed=5).requires_grad_()
        sf.steer(x, sae, {3: 2.0, 40: sf.scale(0.5)}).square().sum().backward()
        gradients.append(x.grad)
    assert all(same_bits(other, gradients[0]) for other in gradients[1:])


def test_rows_are_stored_in_this_order_once(make_sae):
    sae = make_sae(D, N, K).calibrate(stream(200))
    first, second = Measured(sae, LATENTS), Measured(sae, [5])
    assert torch.equal(first.W_enc, sae.W_enc[sae.order]) and first.fused
    assert torch.equal(first.W_enc[first.rows], sae.W_enc[list(LATENTS)])
    assert first.W_enc.data_ptr() == second.W_enc.data_ptr() != sae.W_enc.data_ptr()
    for measure in ("projection", "none"):
        assert Measured(sae, LATENTS, measure=measure).order is None


class Widest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made inside."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        self.made = max([self.made, *sizes])
        return made


@pytest.mark.parametrize("measure", ["topk", "projection"])
def test_a_second_call_makes_nothing_of_the_dictionarys_size(make_sae, measure):
    sae, x = make_sae(D, N, K).calibrate(stream(200)), stream(1)
    measure = None if measure == "topk" else measure
    with Widest() as first:
        sf.steer(x, sae, {3: 2.0}, measure=measure)
    with Widest() as second:
        sf.steer(x, sae, {40: 2.0, 3: sf.scale(1.5)}, measure=measure)
    assert second.made <= 2 * D and (first.made >= N) == (measure is None)


def test_kept_by_copies_moves_and_folding(make_sae):
    sae = make_sae(D, N, K).calibrate(stream(200))
    folded = replace(sae, scale=2.0).fold()
    half = sae.to(dtype=torch.bfloat16)
    copies = copy.copy(sae), copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))
    for other in (sae.to("cpu"), half, folded, *copies):
        assert torch.equal(other.order, sae.order) and other.order.dtype == torch.int64


BAD = {
    "a list": (list(range(N)), TypeError, "got list, a tensor is needed"),
    "int32": (torch.arange(N).int(), TypeError, "got torch.int32, accepted is torch.int64"),
    "too short": (torch.arange(N - 1), ValueError, rf"got shape \({N - 1},\), \({N},\) is needed"),
    "twice": (torch.arange(N).clamp(max=N - 2), ValueError, f"each of the latents 0 to {N - 1}"),
    "from 1": (torch.arange(N) + 1, ValueError, f"each of the latents 0 to {N - 1} once"),
    "elsewhere": (torch.arange(N, device="meta"), ValueError, "is on meta, W_enc on cpu"),
}


@pytest.mark.parametrize("kind", BAD)
def test_no_order(make_sae, kind):
    order, error, message = BAD[kind]
    with pytest.raises(error, match=f"^order: .*{message}"):
        replace(make_sae(D, N, K), order=order)


def test_only_topk_has_one(make_sae):
    sae = replace(make_sae(D, N, K), measure="relu", k=None)
    with pytest.raises(ValueError, match="calibrate: only topk ranks latents, this SAE has relu"):
        sae.calibrate(stream(5))
    with pytest.raises(ValueError, match="order: measure 'relu' does not use it, only 'topk' does"):
        replace(sae, order=torch.arange(N))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (stream(5)[:, 1:], rf"x: got shape \(5, {D - 1}\), the SAE is for \[..., {D}\]"),
        (torch.tensor(1.0), r"x: got shape \(\)"),
        (stream(0), "x: holds no token"),
        ([], "x: holds no token"),
    ],
)
def test_calibration_needs_tokens_of_this_width(make_sae, x, message):
    with pytest.raises(ValueError, match=message):
        make_sae(D, N, K).calibrate(x)


@pytest.mark.parametrize(
    ("x", "given"), [(stream(5).numpy(), "ndarray"), ([[stream(5)]], "list"), (["x"], "str")]
)
def test_calibration_needs_tensors(make_sae, x, given):
    with pytest.raises(TypeError, match=f"x: got {given}, a tensor is needed"):
        make_sae(D, N, K).calibrate(x)


@pytest.fixture(params=["sparsify", "saelens"])
def folder(request, tmp_path, make_sae) -> Path:
    """A calibrated SAE on disk."""
    place = tmp_path / "layers.1"
    make_sae(D, N, K).calibrate(stream(200)).save(place, request.param)
    return place


def test_saved_beside_the_formats_own_files(folder, make_sae, tmp_path):
    sae = sf.SAE.load(folder)
    assert torch.equal(sae.order, make_sae(D, N, K).calibrate(stream(200)).order)
    own = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert own.pop(FILE)
    format = "saelens" if "sae_weights.safetensors" in own else "sparsify"
    make_sae(D, N, K).save(tmp_path / "bare" / "layers.1", format)
    bare = tmp_path / "bare" / "layers.1"
    assert own.keys() == {file.name for file in bare.iterdir()}
    assert own["cfg.json"] == (bare / "cfg.json").read_bytes()

    # Over one that has an order.
    make_sae(D, N, K).save(folder, format)
    assert not (folder / FILE).exists() and sf.SAE.load(folder).order is None


def test_a_save_that_fails_leaves_the_order_that_was_there(folder, make_sae, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(path, content):
        raise OSError("full")

    for format in ("sparsify", "saelens"):
        monkeypatch.setattr(f"saesteer_fast.formats.{format}.write_json", fail)
    format = "saelens" if "sae_weights.safetensors" in before else "sparsify"
    with pytest.raises(OSError, match="full"):
        make_sae(D, N, K).save(folder, format)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.fault(46)
def test_saved_through_a_link_to_another_disk(folder, make_sae, tmp_path, monkeypatch):
    link = tmp_path / "links" / "layers.1"
    link.parent.mkdir()
    link.symlink_to(folder)
    put = os.replace

    def replace(source, target):
        if Path(source).parents[1] != folder.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        put(source, target)

    monkeypatch.setattr(os, "replace", replace)
    format = "saelens" if (folder / "sae_weights.safetensors").exists() else "sparsify"
    sae = make_sae(D, N, K, seed=5)
    sae.save(link, format)
    assert link.is_symlink() and torch.equal(sf.SAE.load(folder).W_dec, sae.W_dec)


ORDER = permutation(N)
BROKEN = {
    "of another SAE": ({"order": torch.arange(N + 1)}, rf"order: got shape .* \({N},\) is needed"),
    "no permutation": (
        {"order": torch.zeros(N).long()},
        "order: does not name each of the latents",
    ),
    "int32": ({"order": ORDER.int()}, "order is I32, accepted is I64"),
    "another name": ({"ordre": ORDER}, "lacks order; is it called 'ordre'"),
    "more": ({"order": ORDER, "counts": ORDER}, "holds counts besides order"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_of_something_else(folder, kind):
    tensors, message = BROKEN[kind]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / FILE)
    with pytest.raises(ValueError, match=f"{FILE}: {message}"):
        sf.SAE.load(folder)


@pytest.mark.parametrize("keep", [0, 20, -1])
def test_a_file_cut_short(folder, keep):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{FILE}: not a whole safetensors file"):
        sf.SAE.load(folder)


def test_a_flipped_bit_that_leaves_a_permutation(folder):
    content = bytearray((folder / FILE).read_bytes())
    content[-16:] = content[-8:] + content[-16:-8]
    (folder / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"{FILE}: order is damaged: its checksum differs"):
        sf.SAE.load(folder)


def test_the_file_alone_is_no_sae(folder):
    with pytest.raises(ValueError, match="is one file of an SAE's folder"):
        sf.SAE.load(folder / FILE)
