"""What `inspect` says of sizes, errors and the histogram, compared with a count by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.inspection import Inspection, inspect_adapter, plot_histogram
from tests.checkpoints import fine_tuned, integers, write_checkpoint
from tests.reference import (
    bernoulli_row,
    bitmap_positions,
    blocked_row,
    decode_adapter,
    gap_positions,
    matrix_of,
    read_safetensors,
)

SHAPES = {
    "embed.weight": (24, 37),
    "layers.0.up.weight": (12, 64),
    "layers.1.up.weight": (12, 64),
    "thin.weight": (40, 4),  # a row is shorter than a block of ten
    "norm.weight": (37,),
}
LAYERS = ["layers.0.up.weight", "layers.1.up.weight"]
SIX_DIGITS = 1e-5
FLOAT32 = 2**-23  # an error is the small difference of float32 sums over the survivors


class Pair(NamedTuple):
    """A base, its fine-tune, and fine-tune minus base in float64 by name."""

    base: Path
    finetuned: Path
    deltas: dict[str, np.ndarray]

    def extract(self, out: Path, **options: Any) -> Adapter:
        return dare_adapters.extract(
            self.base, self.finetuned, out, progress=False, overwrite=True, **options
        )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("inspection")
    base = {name: integers(shape, 50 * n) for n, (name, shape) in enumerate(SHAPES.items())}
    finetuned = fine_tuned(base, 0.2)
    # float32, as the delta is taken: what rounding loses is compared to the last digits.
    deltas = {name: (finetuned[name] - base[name]).double().numpy() for name in base}
    write_checkpoint(root / "base", base)
    write_checkpoint(root / "finetuned", finetuned)
    return Pair(root / "base", root / "finetuned", deltas)


def support_of(adapter: Adapter, name: str) -> np.ndarray:
    """Where survivors are, as a mask of the parameter's shape, from the published rules."""
    entry, seed = adapter.config.parameters[name], adapter.config.seed
    rows, columns = matrix_of(entry.shape)
    mask = np.zeros((rows, columns), dtype=bool)
    if entry.mask in ("gaps", "bitmap"):
        key = f"base_model.model.{name.rpartition('.')[0]}.dare_weight_support"
        data = read_safetensors(adapter.path / "adapter_model.safetensors")[key].data
        gaps = entry.mask == "gaps"
        places = gap_positions(data) if gaps else bitmap_positions(data, rows, columns)
        mask.reshape(-1)[places] = True
        return mask.reshape(entry.shape)
    for row in range(rows):
        if entry.mask == "blocked":
            assert entry.block is not None
            drawn = blocked_row(seed, name, row, columns, entry.block)
            kept = [column for column in drawn if column is not None]
        else:
            assert entry.drop_rate is not None
            kept = bernoulli_row(seed, name, row, columns, entry.drop_rate)
        mask[row, kept] = True
    return mask.reshape(entry.shape)


# Sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 1, "mask": "bernoulli"},
        {"method": "magnitude", "bits": 8},
        {"drop_rate": 0.0, "bits": 32},
        {"include": ()},
    ],
    ids=str,
)
def test_the_parts_sum_to_the_directory(pair: Pair, tmp_path: Path, options: dict[str, Any]):
    adapter = pair.extract(tmp_path / "out", **options)
    (adapter.path / "tokenizer.json").write_text("{}")
    parts = inspect_adapter(adapter).bytes_by_part
    assert sum(parts.values()) == sum(file.stat().st_size for file in adapter.path.iterdir())
    assert all(size >= 0 for size in parts.values())
    assert parts["config"] == (adapter.path / "adapter_config.json").stat().st_size
    card = (adapter.path / "README.md").stat().st_size
    assert parts["other files"] == card + len("{}")


def test_each_part_is_the_bytes_of_its_tensors(pair: Pair, tmp_path: Path):
    adapter = pair.extract(tmp_path / "out", method="magnitude", drop_rate=0.9, bits=4)
    parts = inspect_adapter(adapter).bytes_by_part
    found: dict[str, int] = {}
    for key, tensor in read_safetensors(adapter.path / "adapter_model.safetensors").items():
        part = key.rsplit("_", 1)[1]
        found[part] = found.get(part, 0) + len(tensor.data)
    assert set(found) == {"values", "scales", "support", "delta"}
    assert {part: parts[part] for part in found} == found


def test_new_parameters_and_added_rows_are_parts_too(tmp_path: Path):
    base = {"embed.weight": integers((8, 20)), "up.weight": integers((6, 20), 9)}
    more = fine_tuned(base)
    more["embed.weight"] = torch.cat([more["embed.weight"], integers((3, 20), 40)])
    more["score.weight"] = integers((2, 20), 80)
    config = {"vocab_size": 8, "architectures": ["LlamaForCausalLM"]}
    write_checkpoint(tmp_path / "base", {f"model.{k}": v for k, v in base.items()}, config)
    named = {k if k == "score.weight" else f"model.{k}": v for k, v in more.items()}
    write_checkpoint(tmp_path / "finetuned", named, {**config, "vocab_size": 11})
    adapter = dare_adapters.extract(
        tmp_path / "base", tmp_path / "finetuned", tmp_path / "out", progress=False
    )
    inspection = inspect_adapter(adapter)
    assert inspection.bytes_by_part["rows"] == 3 * 20 * 4
    assert inspection.bytes_by_part["value"] == 2 * 20 * 4
    assert inspection.kinds["new"] == 1
    total = sum(file.stat().st_size for file in adapter.path.iterdir())
    assert sum(inspection.bytes_by_part.values()) == total


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        # values and a float16 scale for each row, over the entries of the parameters
        ({"drop_rate": 0.75, "bits": 8}, 8 / 4 + 16 / 64),
        ({"drop_rate": 0.75, "bits": 1}, 1 / 4 + 16 / 64),
        ({"drop_rate": 0.0, "bits": 32}, 32),
        ({"drop_rate": 0.5, "bits": 16}, 16 / 2),
    ],
)
def test_bits_per_pruned_parameter_counts_values_and_scales(
    pair: Pair, tmp_path: Path, options: dict[str, Any], bits: float
):
    adapter = pair.extract(tmp_path / "out", include=["layers.*"], **options)
    inspection = inspect_adapter(adapter)
    assert inspection.bits_per_pruned_parameter == pytest.approx(bits, abs=1e-12)
    assert inspection.kinds == {f"sparse, blocked, {options['bits']} bit": 2, "dense": 3}


def test_bits_per_pruned_parameter_counts_a_stored_support(pair: Pair, tmp_path: Path):
    adapter = pair.extract(
        tmp_path / "out", include=["layers.*"], method="magnitude", drop_rate=0.9, bits=16
    )
    kept = 2 * round(0.1 * 12 * 64)
    stored = read_safetensors(adapter.path / "adapter_model.safetensors")
    support = sum(len(t.data) for key, t in stored.items() if key.endswith("_support"))
    assert support
    found = inspect_adapter(adapter).bits_per_pruned_parameter
    assert found == pytest.approx(8 * (2 * kept + support) / (2 * 12 * 64))


def test_an_adapter_without_pruned_parameters_has_no_bits_for_them(pair: Pair, tmp_path: Path):
    inspection = inspect_adapter(pair.extract(tmp_path / "out", include=()))
    assert inspection.bits_per_pruned_parameter == 0
    assert inspection.kinds == {"dense": 5}


# Errors -------------------------------------------------------------------------------------------


def groups_of(pair: Pair) -> dict[str, list[str]]:
    singles = {name: [name] for name in pair.deltas if name not in LAYERS}
    return {**singles, "layers.*.up.weight": LAYERS}


@pytest.mark.parametrize("mask", ["blocked", "bernoulli"])
@pytest.mark.parametrize("method", ["dare", "drop_only"])
@pytest.mark.parametrize(
    ("drop_rate", "bits"), [(0.9, 1), (0.75, 2), (0.9, 4), (0.5, 8), (0.5, 16)]
)
def test_rounding_error_is_stored_minus_exact_survivors_over_the_estimated_delta(
    pair: Pair, tmp_path: Path, method: str, mask: str, drop_rate: float, bits: int
):
    adapter = pair.extract(
        tmp_path / "out", method=method, mask=mask, drop_rate=drop_rate, bits=bits, seed=3
    )
    stored, groups = decode_adapter(adapter.path), inspect_adapter(adapter).groups
    factor = 1 / (1 - drop_rate) if method == "dare" else 1.0
    for group, names in groups_of(pair).items():
        if group == "norm.weight":
            continue
        lost = signal = estimated = survivors = 0.0
        for name in names:
            kept = support_of(adapter, name)
            exact = pair.deltas[name][kept]
            lost += float(np.square(stored[name][kept] - factor * exact).sum())
            # The delta's own square from what is kept of it: its expectation over masks.
            estimated += float(np.square(exact).sum()) / (1 - drop_rate)
            signal += float(np.square(factor * exact).sum())
            survivors += kept.sum()
            assert not stored[name][~kept].any()
        entries = sum(pair.deltas[name].size for name in names)
        told = groups[group]
        assert told["parameters"] == len(names)
        assert told["entries"] == entries
        assert told["survivors"] == survivors
        noise = FLOAT32 * signal / estimated
        expected = pytest.approx(lost / estimated, rel=SIX_DIGITS, abs=noise)
        assert told["rounding_error"] == expected, group
        assert told["delta_rms"] == pytest.approx(math.sqrt(estimated / entries), rel=SIX_DIGITS)
        drop_error = drop_rate * factor
        assert told["drop_error"] == pytest.approx(drop_error, rel=SIX_DIGITS)


@pytest.mark.parametrize("mask", ["blocked", "bernoulli"])
@pytest.mark.parametrize("method", ["dare", "drop_only"])
def test_drop_error_is_what_dropping_costs_on_average(
    pair: Pair, tmp_path: Path, method: str, mask: str
):
    measured = []
    for seed in range(60):
        adapter = pair.extract(
            tmp_path / "out",
            method=method,
            mask=mask,
            drop_rate=0.75,
            bits=32,
            seed=seed,
            include=["layers.*"],
        )
        told = inspect_adapter(adapter).groups["layers.*.up.weight"]
        factor = 4 if method == "dare" else 1
        lost = delta = 0.0
        for name in LAYERS:
            kept = support_of(adapter, name)
            exact = pair.deltas[name]
            lost += float(np.square(np.where(kept, factor * exact, 0) - exact).sum())
            delta += float(np.square(exact).sum())
        measured.append(lost / delta)
    spread = np.std(measured) / math.sqrt(len(measured))
    assert told["drop_error"] == pytest.approx(0.75 * factor, rel=SIX_DIGITS)  # p/(1-p), or p
    assert np.mean(measured) == pytest.approx(told["drop_error"], abs=4 * spread)
    assert spread < 0.02 * told["drop_error"]


def test_errors_of_magnitude_pruning_are_measured(pair: Pair, tmp_path: Path):
    adapter = pair.extract(tmp_path / "out", method="magnitude", drop_rate=0.9, bits=4)
    stored, groups = decode_adapter(adapter.path), inspect_adapter(adapter).groups
    for group, names in groups_of(pair).items():
        if group == "norm.weight":
            continue
        dropped = rounded = delta = 0.0
        for name in names:
            kept, exact = support_of(adapter, name), pair.deltas[name]
            dropped += float(np.square(exact[~kept]).sum())
            rounded += float(np.square(stored[name][kept] - exact[kept]).sum())
            delta += float(np.square(exact).sum())
        assert groups[group]["drop_error"] == pytest.approx(dropped / delta, rel=1e-4), group
        expected = pytest.approx(rounded / delta, rel=SIX_DIGITS, abs=FLOAT32)
        assert groups[group]["rounding_error"] == expected, group


def test_what_is_kept_whole_has_no_error(pair: Pair, tmp_path: Path):
    adapter = pair.extract(tmp_path / "out", drop_rate=0.0, bits=32)
    for name, group in inspect_adapter(adapter).groups.items():
        assert group["drop_error"] == 0
        assert group["rounding_error"] == 0
        exact = [pair.deltas[own] for own in groups_of(pair)[name]]
        rms = math.sqrt(np.mean(np.square(np.concatenate([e.reshape(-1) for e in exact]))))
        assert group["delta_rms"] == pytest.approx(rms, rel=SIX_DIGITS)


# The histogram ------------------------------------------------------------------------------------


def counted(values: np.ndarray, inspection: Inspection) -> list[int]:
    """numpy's histogram of |values|."""
    return [int(n) for n in np.histogram(np.abs(values), np.array(inspection.edges))[0]]


def everything(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array in arrays.values()])


def test_the_histogram_of_an_unpruned_adapter_is_that_of_the_delta(pair: Pair, tmp_path: Path):
    inspection = inspect_adapter(pair.extract(tmp_path / "out", drop_rate=0.0, bits=32))
    assert inspection.counts == counted(everything(pair.deltas), inspection)
    assert sum(inspection.counts) == np.count_nonzero(everything(pair.deltas))
    assert inspection.edges[0] == pytest.approx(1e-8)
    assert inspection.edges[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("method", "mask"),
    [
        ("dare", "blocked"),
        ("dare", "bernoulli"),
        ("drop_only", "blocked"),
        ("drop_only", "bernoulli"),
        ("magnitude", "auto"),
    ],
)
def test_the_histogram_of_survivors_counts_each_once_and_before_rescaling(
    pair: Pair, tmp_path: Path, method: str, mask: str
):
    adapter = pair.extract(tmp_path / "out", method=method, mask=mask, drop_rate=0.75, bits=32)
    inspection = inspect_adapter(adapter)
    kept = {
        name: delta[support_of(adapter, name)] if delta.ndim > 1 else delta
        for name, delta in pair.deltas.items()
    }
    assert inspection.counts == counted(everything(kept), inspection)


def test_the_histogram_of_a_large_adapter_samples_every_parameter(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapter = pair.extract(tmp_path / "out", drop_rate=0.0, bits=32)
    whole = inspect_adapter(adapter)
    monkeypatch.setattr("dare_adapters.inspection._SAMPLED_ENTRIES", 40)
    some = inspect_adapter(adapter)
    assert 0 < sum(some.counts) < sum(whole.counts) / 2
    assert all(part <= total for part, total in zip(some.counts, whole.counts, strict=True))


def test_the_plot_has_a_bar_for_each_count(pair: Pair, tmp_path: Path):
    inspection = inspect_adapter(pair.extract(tmp_path / "out", drop_rate=0.0, bits=32))
    plot_histogram(inspection, tmp_path / "delta.svg", "x")
    assert "<svg" in (tmp_path / "delta.svg").read_text()
    for name in ("delta", "empty"):
        counts = inspection.counts if name == "delta" else [0] * len(inspection.counts)
        shown = Inspection(**{**inspection.to_json(), "counts": counts})
        plot_histogram(shown, tmp_path / f"{name}.png", "a/strange $name$ \\alpha$/")
        with Image.open(tmp_path / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        blue = (np.abs(pixels - (0x44, 0x77, 0xAA)).sum(axis=2) < 12).sum()
        assert (blue > 1000) == (name == "delta")


# All of it ----------------------------------------------------------------------------------------


def test_an_inspection_is_plain_json(pair: Pair, tmp_path: Path):
    inspection = inspect_adapter(pair.extract(tmp_path / "out"))
    assert json.loads(json.dumps(inspection.to_json(), allow_nan=False)) == inspection.to_json()
    assert inspection.summary["drop_rate"] == 0.9
    assert inspection.summary["base_model_name_or_path"] == str(pair.base)
