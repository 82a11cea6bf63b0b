"""How far a fine-tune moved, against NumPy on the whole delta."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dare_eval.delta_stats import QUANTILES, delta_statistics, run_delta_stats
from dare_eval.records import Records
from tests.conftest import FamilyMaker, read_checkpoint


def whole(base: Path, finetuned: Path) -> np.ndarray:
    one, other = read_checkpoint(base), read_checkpoint(finetuned)
    parts = [(other[n].float() - one[n].float()).flatten().numpy() for n in sorted(one)]
    return np.concatenate(parts)


@pytest.mark.parametrize(
    ("spread", "verdict"), [(0.002, "applies"), (0.008, "doubtful"), (0.05, "fails")]
)
def test_ranges_are_those_of_the_whole_delta_and_the_verdict_is_the_papers(
    make_family: FamilyMaker, spread: float, verdict: str
):
    family = make_family(spread=spread)
    found = delta_statistics(str(family.base), str(family.finetuned))
    delta = whole(family.base, family.finetuned)
    assert found["verdict"] == verdict
    assert found["entries"] == found["sampled"] == len(delta)
    assert found["quantiles"] == pytest.approx(np.quantile(delta, QUANTILES).tolist(), abs=1e-7)
    magnitudes = np.quantile(np.abs(delta), QUANTILES)
    assert found["magnitudes"] == pytest.approx(magnitudes.tolist(), abs=1e-7)
    assert found["changed"] == pytest.approx(np.mean(delta != 0))
    assert found["rms"] == pytest.approx(np.sqrt(np.mean(delta.astype(np.float64) ** 2)), rel=1e-5)
    for bound, share in found["within"].items():
        assert share == pytest.approx(np.mean(np.abs(delta) <= float(bound)))


@pytest.mark.parametrize("sample", [1000, 12345])
def test_of_a_large_model_every_nth_entry_counts(make_family: FamilyMaker, sample: int):
    family = make_family()
    delta = whole(family.base, family.finetuned)
    step = -(-len(delta) // sample)
    found = delta_statistics(str(family.base), str(family.finetuned), sample)
    expected = np.quantile(np.abs(delta[::step]), QUANTILES)
    assert found["sampled"] == len(delta[::step])
    assert found["magnitudes"] == pytest.approx(expected.tolist(), abs=1e-7)


def test_each_fine_tune_has_one_record(make_family: FamilyMaker, tmp_path: Path):
    families = [make_family(name="a", seed=1), make_family(name="b", seed=2)]
    records = Records(tmp_path / "records")
    for _ in range(
        2
    ):  # the bases are one: the seed of both fine-tunes' base differs, so each its own
        for family in families:
            run_delta_stats(str(family.base), [str(family.finetuned)], records)
    assert len(list(records)) == 2
