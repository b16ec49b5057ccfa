"""A batch in which every row has its own configuration."""

from __future__ import annotations

import copy

import pytest
import torch
from prompts import IDS, MASK, generate

import saesteer_fast as sf

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [{3: 6.0, 77: -2.0}, {}, {5: sf.add(2.0), 77: sf.scale(0.5)}]
TABLE = {"off": {}, "strong": {3: 6.0, 77: -2.0}, "weak": {3: 1.0, 77: 0.0}}


def stream(*shape, dtype=torch.float32):
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.fault(71)
@pytest.mark.parametrize("shape", [(3,), (3, 7), (3, 2, 4), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_each_row_is_as_if_alone(sae, shape, dtype, error, poisoned_memory):
    x = stream(*shape, dtype=dtype)
    y = sf.steer(x, sae, ROWS, error=error)
    for row, edits in enumerate(ROWS):
        alone = sf.steer(x[row], sae, edits, error=error)
        torch.testing.assert_close(y[row], alone, atol=1e-6, rtol=torch.finfo(dtype).eps)
    assert torch.equal(y[1].view(torch.uint8), x[1].view(torch.uint8))


@pytest.mark.parametrize("rows", [[{3: 6.0}, {}, {3: -1.0}], [{3: 6.0}] * 3])
def test_where_all_edits_are_sets_of_the_same_latents(sae, rows, monkeypatch):
    """Then they are written by the fused op, rows without edits by its mask."""
    x = stream(3, 7)
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) > 0.3
    alone = [sf.steer(x[row], sae, edits, mask=mask[row]) for row, edits in enumerate(rows)]
    monkeypatch.setattr(sf.ops, "feature_acts", None)
    monkeypatch.setattr(sf.ops, "add_directions", None)
    y = sf.steer(x, sae, rows, mask=mask)
    torch.testing.assert_close(y, torch.stack(alone), atol=1e-6, rtol=0)
    untouched = ~mask | torch.tensor([not edits for edits in rows])[:, None]
    assert torch.equal(y[untouched], x[untouched])


@pytest.mark.parametrize("options", [{}, {"error": "drop"}, {"measure": "projection"}])
def test_rows_that_set_other_latents(sae, options):
    x, rows = stream(2, 40), [{3: 6.0}, {77: -2.0}]
    y = sf.steer(x, sae, rows, **options)
    for row, edits in enumerate(rows):
        torch.testing.assert_close(y[row], sf.steer(x[row], sae, edits, **options))


@pytest.mark.fault(1)
def test_a_broken_row_breaks_no_unsteered_one(sae):
    x = stream(3, 4)
    x[1, 2], x[2, 0] = torch.nan, torch.inf
    y = sf.steer(x, sae, ROWS)
    assert torch.equal(y[1].view(torch.int32), x[1].view(torch.int32))
    assert y[0].isfinite().all() and y[2, 0].isnan().all() and y[2, 1:].isfinite().all()


@pytest.mark.parametrize("rows", [["weak", "off", "strong"], torch.tensor([2, 0, 1]), [2, 0, 1]])
def test_a_table_is_chosen_from(sae, rows):
    x = stream(3, 5)
    y = sf.steer(x, sae, TABLE, rows=rows)
    for row, name in enumerate(["weak", "off", "strong"]):
        torch.testing.assert_close(y[row], sf.steer(x[row], sae, TABLE[name]), atol=1e-6, rtol=0)
    assert torch.equal(y[1], x[1])


@pytest.mark.fault(71)
@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("scope", ["all", "generated"])
def test_generation(model, sae, how, scope):
    alone = []
    for row, edits in enumerate(ROWS):
        with sf.steering(model, sae, edits, scope=scope):
            alone.append(generate(model, IDS[row : row + 1]))
    with sf.steering(model, sae, ROWS, scope=scope):
        assert torch.equal(generate(model, **how), torch.cat(alone))
    assert torch.equal(alone[1], generate(model, IDS[1:2]))
    assert not torch.equal(torch.cat(alone), generate(model))


@pytest.mark.fault(59, 71)
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 4, "num_return_sequences": 2}])
def test_rows_that_generate_repeats(model, sae, options):
    alone = []
    for row, edits in enumerate(ROWS):
        with sf.steering(model, sae, edits):
            alone.append(generate(model, IDS[row : row + 1], **options))
    with sf.steering(model, sae, ROWS):
        assert torch.equal(generate(model, **options), torch.cat(alone))


@pytest.mark.fault(71)
def test_unsteered_rows_are_bit_identical(model, sae):
    def outputs():
        with torch.no_grad():
            found = model(IDS, attention_mask=MASK, output_hidden_states=True)
        return [found.logits, *found.hidden_states]

    plain = outputs()
    with sf.steering(model, sae, [ROWS[0], {}, {}]):
        steered = outputs()
    for one, other in zip(plain, steered, strict=True):
        assert torch.equal(one[1:], other[1:])
    assert not torch.equal(plain[0][0], steered[0][0])


def test_choices_change_in_place(model, sae):
    with torch.no_grad(), sf.steering(model, sae, TABLE, rows=["off"] * 3) as handle:
        plain = model(IDS, attention_mask=MASK).logits
        held = handle._plan.chosen
        handle.choose(["strong", "off", "weak"])
        assert handle._plan.chosen is held
        mixed = model(IDS, attention_mask=MASK).logits
        assert torch.equal(mixed[1], plain[1])
        assert not torch.equal(mixed[0], plain[0]) and not torch.equal(mixed[2], plain[2])
        handle.set({"weak": {3: 6.0, 77: -2.0}})
        handle.choose(torch.tensor([1, 0, 1]))
        again = model(IDS, attention_mask=MASK).logits
        assert torch.equal(again[:2], mixed[:2]) and not torch.equal(again[2], mixed[2])
        handle.choose(["strong"])
        alone = model(IDS[:1], attention_mask=MASK[:1]).logits
        torch.testing.assert_close(alone[:, 3:], again[:1, 3:], atol=1e-4, rtol=0)


def test_rows_are_set_in_the_form_they_were_given(model, sae):
    with sf.steering(model, sae, ROWS) as handle:
        handle.set([{3: 1.0}, {}, {5: sf.add(1.0)}])
        assert "[{3: 1.0, 77: -2.0}, {}, {5: add(1), 77: scale(0.5)}]" in repr(handle)
        before = repr(handle)
        for edits, error, message in [
            ({3: 1.0}, TypeError, "changed in the form in which they were given"),
            ([{3: 1.0}], ValueError, "edits: got 1 rows, there are 3"),
            ([{3: 9.0}, {3: 1.0}, {}], ValueError, r"edits\[1\]: latent 3 is not edited; .* \[\]"),
            ([{3: sf.add(9.0)}, {}, {}], ValueError, r"edits\[0\]: .*edited by set, which set\(\)"),
        ]:
            with pytest.raises(error, match=message):
                handle.set(edits)
            assert repr(handle) == before
    with sf.steering(model, sae, TABLE, rows=["off"] * 3) as handle:
        with pytest.raises(ValueError, match=r"^edits: no configuration 'weka', .* mean 'weak'"):
            handle.set({"weka": {3: 1.0}})
        with pytest.raises(ValueError, match=r"edits\['off'\]: latent 3 is not edited"):
            handle.set({"off": {3: 1.0}})
        assert "'off': {}" in repr(handle) and handle.latents == [3, 77]
        assert handle.strengths.shape == (3, 2)


def test_copies_choose_for_themselves(model, sae):
    with torch.no_grad():
        with sf.steering(model, sae, TABLE, rows=["off", "weak", "strong"]) as handle:
            expected = model(IDS, attention_mask=MASK).logits
            twin = copy.deepcopy(model)
            handle.choose(["off"] * 3)
        assert torch.equal(twin(IDS, attention_mask=MASK).logits, expected)
        assert torch.equal(generate(twin), generate(copy.deepcopy(twin)))


@pytest.mark.parametrize(
    ("edits", "rows", "error", "message"),
    [
        (ROWS, [0, 1], ValueError, r"rows: 2 rows are given for x \(3, 4, 32\)"),
        (ROWS[:2], None, ValueError, "edits: 2 rows are given for x"),
        (TABLE, [0, 1], ValueError, "rows: 2 rows are given for x"),
        (ROWS, [0, 1, 3], ValueError, "rows: got 3, accepted are 0 to 2"),
        (ROWS, [0, "1", 2], ValueError, "rows: got '1', accepted are 0 to 2"),
        (ROWS, [0, 1, True], ValueError, "rows: got True, accepted are 0 to 2"),
        (TABLE, None, ValueError, r"rows: needed to choose among \['off', 'strong', 'weak'\]"),
        (TABLE, ["of", "off", "off"], ValueError, "no configuration 'of', .* mean 'off'"),
        (TABLE, "off", TypeError, "rows: got 'off', one configuration a row is needed"),
        (TABLE, 1, TypeError, "rows: got 1, one configuration a row is needed"),
        (TABLE, torch.ones(3), TypeError, r"rows: got torch.float32 \(3,\), integers"),
        (TABLE, torch.ones(3) > 0, TypeError, r"rows: got torch.bool \(3,\), integers"),
        ({3: {3: 1.0}}, None, TypeError, "edits: configuration 3 has no name"),
        ({"a": {3: 1.0}, 3: 2.0}, None, TypeError, "edits: latent 'a' is no integer"),
        ([], None, TypeError, "edits: got an empty list, a mapping"),
        ([{5: 1.0}, None, {}], None, TypeError, r"edits\[1\]: got None, a mapping .* leaves a row"),
        ([{}, {128: 1.0}, {}], None, ValueError, "latent 128 is not among 0 to 127"),
    ],
)
def test_bad_rows_are_named(sae, edits, rows, error, message):
    with pytest.raises(error, match=message):
        sf.steer(stream(3, 4), sae, edits, rows=rows)


def test_rows_for_another_batch(model, sae):
    with sf.steering(model, sae, ROWS):
        with pytest.raises(ValueError, match="edits: 3 rows are given for a batch of 6"):
            model(IDS.repeat(2, 1))
        with pytest.raises(ValueError, match="edits: 3 rows are given for a batch of 2"):
            generate(model, IDS[:2])
    with sf.steering(model, sae, TABLE, rows=[0, 1, 2]):
        with pytest.raises(ValueError, match="rows: 3 rows are given for a batch of 2"):
            model(IDS[:2])
