"""What layers add to each row, beside one dense matrix after another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.kernels import PackedDelta
from dare_vllm.at_load.logit_mask import LogitMask
from dare_vllm.per_request.added_rows import AddedRows
from dare_vllm.per_request.sites import ADDED_BIAS, ADDED_WEIGHT, Change, LinearSite, Vectors
from dare_vllm.per_request.slots import RowSlots, rows_of
from tests.conftest import raw_bytes
from tests.kernels.deltas import bernoulli, deltas

SLOTS, WIDE, HIGH = 3, 24, 10


class Tables:
    """What vLLM's wrapper for LoRA has for each step."""

    def __init__(self, tokens: int = 16) -> None:
        self._token_lora_indices = torch.empty(tokens, dtype=torch.long)
        self._sampler_indices = torch.empty(tokens, dtype=torch.long)


def site_of(slots: list[int], **how: object) -> LinearSite:
    """A site for a step whose tokens have these slots."""
    tables = Tables()
    site = LinearSite("layer", RowSlots(tables, SLOTS), bias_width=HIGH, **how)
    tables._token_lora_indices[: len(slots)] = torch.tensor(slots)
    site.rows.keep = tables  # the tables live as long as the site
    return site


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_each_row_gets_the_sum_of_its_own_slots_changes(data: st.DataObject) -> None:
    slots = data.draw(st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=9))
    site = site_of(slots)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    dense = torch.zeros(SLOTS, HIGH, WIDE)
    bias = torch.zeros(SLOTS, HIGH)
    for slot in range(SLOTS):
        terms = data.draw(st.integers(0, 3))  # mixes have several
        changes = []
        for _ in range(terms):
            delta, weight = data.draw(deltas(6, WIDE)), data.draw(st.sampled_from([1.0, -0.5]))
            changes.append(Change(PackedDelta.from_delta(delta), weight))
            dense[slot, 4:] += weight * delta.dense()
        if changes:
            site.fill(slot, "weight", 4, changes)
        if data.draw(st.booleans()):
            own = torch.randn(HIGH, generator=generator)
            site.fill(slot, "bias", 0, [Change(own, 2.0)])
            bias[slot] += 2 * own
    x = torch.randn(len(slots), WIDE, generator=generator)
    before = torch.randn(len(slots), HIGH, generator=generator)
    found = site.add(before.clone(), x)
    for row, slot in enumerate(slots):
        if slot < 0:
            assert raw_bytes(found[row]) == raw_bytes(before[row])
        else:
            expected = before[row] + dense[slot] @ x[row] + bias[slot]
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
    for slot in range(SLOTS):
        site.clear(slot)
    assert raw_bytes(site.add(before.clone(), x)) == raw_bytes(before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_holds_one_operator_and_reads_the_slots_when_it_runs() -> None:
    site = site_of([0, -1, 1])
    delta = bernoulli(HIGH, WIDE, 0.5, 16)

    @torch.compile(backend="eager", fullgraph=True)
    def layer(x: torch.Tensor) -> torch.Tensor:
        return site.add(torch.zeros(len(x), HIGH), x)

    x = torch.randn(3, WIDE, generator=torch.Generator().manual_seed(0))
    expected = x @ delta.dense().T
    assert not layer(x).any()  # compiled before any adapter is there
    site.fill(0, "weight", 0, [Change(PackedDelta.from_delta(delta))])
    for slots in ([0, -1, 1], [-1, 0, 0], [1, 1, -1]):
        site.rows.keep._token_lora_indices[:3] = torch.tensor(slots)
        here = (torch.tensor(slots) == 0)[:, None]
        torch.testing.assert_close(layer(x), torch.where(here, expected, 0), rtol=1e-5, atol=1e-5)


def test_the_operator_passes_pytorchs_own_checks() -> None:
    site = site_of([0, 1, -1])
    site.fill(1, "weight", 0, [Change(PackedDelta.from_delta(bernoulli(HIGH, WIDE, 0.5, 16)))])
    operator = torch.ops.dare_vllm.add_changes.default
    arguments = (torch.zeros(3, HIGH), torch.randn(3, WIDE), site.number)
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_tables_begin_with_no_slot_and_are_found_by_their_wrapper() -> None:
    tables = Tables()
    rows = RowSlots(tables, SLOTS)
    assert rows_of(tables) is rows
    assert rows.of_tokens(16).tolist() == [-1] * 16
    assert rows.with_last(torch.tensor([-1, 0, 2, 99])).tolist() == [3, 0, 2, 3]


def test_rows_of_a_scored_prompt_are_found_in_the_step_they_are_slices_of() -> None:
    tables = Tables()
    rows = RowSlots(tables, SLOTS)
    tables._token_lora_indices[:6] = torch.tensor([0, 0, 1, 1, 1, -1])
    tables._sampler_indices[:2] = torch.tensor([2, 2])
    step = torch.randn(6, 8)
    with rows.scoring_prompts(step):
        assert rows.of_samples(step[1:5]).tolist() == [0, 1, 1, 1]
    assert rows.of_samples(step[1:3]).tolist() == [2, 2]


def test_vectors_of_slots_do_not_touch_each_other() -> None:
    rows = RowSlots(Tables(), SLOTS)
    vectors = Vectors(rows, 4)
    vectors.fill(0, 1, [Change(torch.tensor([1.0, 2.0]), 0.5)])
    vectors.fill(2, 0, [Change(torch.ones(4)), Change(torch.ones(4), 2.0)])
    slots = torch.tensor([0, 1, 2, -1])
    expected = [[0, 0.5, 1, 0], [0] * 4, [3] * 4, [0] * 4]
    assert vectors.of(slots).tolist() == expected
    assert vectors.touches(slots).tolist() == [True, False, True, False]
    vectors.clear(2)
    assert vectors.used
    vectors.clear(0)
    assert not vectors.used
    assert not vectors.of(slots).any()


def test_a_vector_is_no_matrix() -> None:
    site = site_of([0])
    with pytest.raises(TypeError, match="packed"):
        site.fill(0, "weight", 0, [Change(torch.ones(3))])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_added_rows_are_each_slots_own_and_other_rows_keep_every_bit(data: st.DataObject) -> None:
    first, slots = 4, data.draw(st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    rows = RowSlots(Tables(), SLOTS)
    added = AddedRows(rows, first)
    own: list[torch.Tensor] = []
    for slot in range(SLOTS):
        parts = [
            torch.randn(data.draw(st.integers(0, HIGH - first)), WIDE, generator=generator)
            for _ in range(data.draw(st.integers(0, 3)))
        ]
        if parts:
            added.fill(slot, parts)
        own.append(torch.zeros(0, WIDE))  # the first's, and of others what is beyond
        for part in parts:
            own[-1] = torch.cat([own[-1], part[len(own[-1]) :]])
    ids = torch.tensor([data.draw(st.integers(0, HIGH - 1)) for _ in slots])
    at = torch.tensor(slots)
    before = torch.randn(len(slots), WIDE, generator=generator)
    found = before.clone()
    added.look_up(found, ids, at)
    x = torch.randn(len(slots), WIDE, generator=generator)
    logits = torch.randn(len(slots), HIGH, generator=generator)
    made = logits.clone()
    added.multiply(made, x, at)
    for row, slot in enumerate(slots):
        have = own[slot] if slot >= 0 else torch.zeros(0, WIDE)
        place = int(ids[row]) - first
        expected = have[place] if 0 <= place < len(have) else before[row]
        assert raw_bytes(found[row]) == raw_bytes(expected)
        last = first + len(have)
        torch.testing.assert_close(made[row, first:last], have @ x[row], rtol=1e-4, atol=1e-4)
        for columns in (slice(first), slice(last, None)):
            assert raw_bytes(made[row, columns]) == raw_bytes(logits[row, columns])
    for slot in range(SLOTS):
        added.clear(slot)
    assert not added.used


def test_the_bias_of_added_rows_is_added_and_goes_with_them() -> None:
    rows = RowSlots(Tables(), SLOTS)
    site = LinearSite("head", rows, bias_width=HIGH, added=AddedRows(rows, 7))
    rows._tokens[:2] = torch.tensor([1, -1])
    values, bias = torch.ones(2, WIDE), torch.tensor([0.5, -1.0])
    # Of a mix the first adapter's rows count, whatever its weight.
    site.fill(1, ADDED_WEIGHT, 7, [Change(values, 0.25), Change(-values[:1], 2.0)])
    site.fill(1, ADDED_BIAS, 7, [Change(bias, 0.25)])
    before, x = torch.zeros(2, HIGH), torch.ones(2, WIDE)
    found = site.add(before.clone(), x)
    assert found[0].tolist() == [0] * 7 + [WIDE + 0.5, WIDE - 1, 0]
    assert not found[1].any()
    site.clear(1)
    assert not site.used


def test_logits_of_tokens_that_a_row_does_not_have_are_masked() -> None:
    class Model:
        def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.arange(6.0).repeat(len(hidden), 1)

    model, mask, tables = Model(), LogitMask(3, 6), Tables()
    mask.wrap(model)
    hidden = torch.zeros(4, 8)
    known = [0.0, 1, 2]
    never = -torch.inf
    assert model.compute_logits(hidden).tolist() == [[*known, *[never] * 3]] * 4
    mask.attach(RowSlots(tables, SLOTS))
    tables._sampler_indices[:4] = torch.tensor([-1, 2, 0, 1])
    mask.fill(2, 2)
    mask.fill(1, 3)
    assert model.compute_logits(hidden).tolist() == [
        [*known, never, never, never],
        [*known, 3, 4, never],
        [*known, never, never, never],
        [*known, 3, 4, 5],
    ]
    mask.clear(2)
    assert model.compute_logits(hidden)[1].tolist() == [*known, *[never] * 3]
