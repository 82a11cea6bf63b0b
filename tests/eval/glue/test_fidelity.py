"""Adapters by size, beside signs and low rank, each against its definition."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import dare_adapters
from dare_adapters.delta import DenseDelta
from dare_adapters.source import DeltaSource
from dare_eval.glue.bench import TaskBench
from dare_eval.glue.compressed import LowRank, SignAndScale, factorise, rank_of_size
from dare_eval.glue.data import read_rows
from dare_eval.glue.fidelity import FidelityAxes, run_fidelity
from dare_eval.glue.tasks import TASKS
from dare_eval.records import Records
from tests.eval.glue.conftest import Lab


class Given(DeltaSource):
    """Deltas from a dictionary."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.base_architectures, self.witness = tensors, [], {}

    def __getitem__(self, name: str) -> DenseDelta:
        return DenseDelta(self.tensors[name])

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def identity(self) -> str:
        return "0"


def deltas(seed: int, *shapes: tuple[int, ...]) -> Given:
    generator = torch.Generator().manual_seed(seed)
    return Given({f"p{n}": torch.randn(s, generator=generator) for n, s in enumerate(shapes)})


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 9))
def test_signs_have_the_mean_magnitude(seed: int, rows: int, columns: int):
    source = deltas(seed, (rows, columns), (columns,))
    kept = SignAndScale(source)["p0"].dense().numpy()
    delta = source.tensors["p0"].numpy()
    assert np.array_equal(kept > 0, delta > 0)
    assert np.allclose(np.abs(kept), np.abs(delta).mean(), rtol=1e-3)
    assert torch.equal(SignAndScale(source)["p1"].dense(), source.tensors["p1"])
    assert SignAndScale(source).bits_per_parameter == 1 + 16 / (rows * columns)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_low_rank_leaves_the_smallest_error_of_its_rank(seed: int, rank: int):
    source = deltas(seed, (12, 7))
    kept = LowRank(source, factorise(source, 7), rank)["p0"].dense()
    sigma = np.linalg.svd(source.tensors["p0"].numpy(), compute_uv=False)
    error = float((kept - source.tensors["p0"]).square().sum())
    # Eckart and Young: what is left are the squares of the other singular values.
    assert error == pytest.approx(float((sigma[rank:] ** 2).sum()), rel=0.02)
    assert int(torch.linalg.matrix_rank(kept.double(), rtol=1e-4)) == rank


def test_the_rank_of_a_size_has_about_that_size():
    source = deltas(0, (300, 40), (60, 80), (80,))
    factors = factorise(source, 40)
    for bits in (0.5, 1.0, 2.0):
        rank = rank_of_size(source, bits)
        step = 16 * (300 + 40 + 60 + 80) / (300 * 40 + 60 * 80)
        assert LowRank(source, factors, rank).bits_per_parameter == pytest.approx(rank * step)
        assert abs(rank * step - bits) <= step / 2
    assert rank_of_size(source, 1e-6) == 1


def test_sizes_and_errors_are_those_of_real_adapters(lab: Lab, tmp_path: Path):
    records = Records(tmp_path / "records")
    finetuned = str(lab.finetuned / "sst2")
    bench = TaskBench(lab.base, TASKS["sst2"], finetuned, data_dir=lab.data)
    axes = FidelityAxes(points={4: (0.5,), 1: (0.0,)}, seeds=(0, 1), lora_bits=(4.0, 1.0))
    run_fidelity([bench], records, axes)
    found = {
        (c["method"], c.get("bits"), c.get("drop_rate"), c.get("seed"), c.get("size")): r.result
        for r in records
        for c in [r.config]
    }
    assert len(found) == 2 + 2 + 1 + 1 + 2
    adapter = dare_adapters.extract(
        lab.base,
        finetuned,
        tmp_path / "a",
        drop_rate=0.5,
        bits=4,
        seed=1,
        progress=False,
        on_large_delta="ignore",
    )
    own = found["dare", 4, 0.5, 1, None]
    assert own["adapter_bytes"] == adapter.nbytes
    size = dare_adapters.inspect_adapter(adapter).bits_per_pruned_parameter
    assert own["bits_per_parameter"] == size
    assert found["dare", 1, 0.0, None, None]["bits_per_parameter"] < size
    low, high = (found["lora", None, None, None, s] for s in (1.0, 4.0))
    assert low["rank"] < high["rank"]
    assert all(math.isfinite(result["error"]) for result in found.values())


def test_the_error_is_the_change_of_the_logits_over_fine_tunings(lab: Lab, tmp_path: Path):
    """Against checkpoints that are exported and loaded as anyone would."""
    finetuned = lab.finetuned / "sst2"
    bench = TaskBench(lab.base, TASKS["sst2"], str(finetuned), data_dir=lab.data)
    run_fidelity(
        [bench], Records(tmp_path), FidelityAxes({1: (0.5,)}, (0,), (), sign_and_scale=False)
    )
    (recorded,) = (r.result for r in Records(tmp_path) if r.config["method"] == "dare")
    adapter = dare_adapters.extract(
        lab.base,
        finetuned,
        tmp_path / "a",
        drop_rate=0.5,
        bits=1,
        seed=0,
        progress=False,
        on_large_delta="ignore",
    )
    dare_adapters.export(lab.base, adapter, tmp_path / "full", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(lab.base)
    rows = read_rows(TASKS["sst2"], "dev", lab.data)
    tokens = tokenizer([row.texts[0] for row in rows], padding=True, return_tensors="pt")
    models = [
        AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).eval()
        for path in (tmp_path / "full", finetuned, finetuned)
    ]
    models[2].bert = AutoModel.from_pretrained(lab.base).eval()
    with torch.no_grad():
        left, tuned, base = (model(**tokens).logits.double() for model in models)
    expected = (left - tuned).square().sum() / (base - tuned).square().sum()
    assert recorded["error"] == pytest.approx(float(expected), rel=1e-3)
