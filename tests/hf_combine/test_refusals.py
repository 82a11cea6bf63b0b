"""Combinations that fail or make no sense leave what was active."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dare_adapters.combine import registry
from dare_adapters.combine.registry import parameter_method
from dare_adapters.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    BaseMismatchError,
    CombinationError,
)
from tests.combine.test_api import METHODS, small_llama
from tests.conftest import Pack, PackMaker, all_bytes
from tests.hf_combine.combined_models import loaded
from tests.test_patch import EXACT


@pytest.fixture
def brittle() -> Iterator[list[str]]:
    """A method that fails at the third parameter, for the length of a test."""
    registry.method_names()
    before, seen = dict(registry._methods), []

    @parameter_method("brittle")
    def brittle(
        parameters: Sequence[torch.Tensor], weights: Sequence[float], *, name: str
    ) -> torch.Tensor:
        seen.append(name)
        if len(seen) == 3:
            raise MemoryError(f"at {name}")
        return parameters[0]

    yield seen
    registry._methods.clear()
    registry._methods.update(before)


@pytest.mark.parametrize("active", [{}, {"c": 0.5}, {"m": 1.0}, {"m": 1.0, "a": -1.0}], ids=str)
def test_a_failed_activation_leaves_what_was_active(
    pack: Pack, brittle: list[str], active: dict[str, float]
):
    model = loaded(pack)
    base = all_bytes(model)
    model.add_weighted_adapter(["a", "b"], [1, 1], "m", combination_type="slerp", t=0.5)
    model.add_weighted_adapter(["a", "b"], [1, 1], "broken", combination_type="brittle")
    model.set_dare_adapter(active)
    before = all_bytes(model)
    with pytest.raises(MemoryError):
        model.set_dare_adapter({"broken": 1.0, "c": 1.0})
    assert len(brittle) >= 3
    assert model.active_dare_adapters == list(active)
    assert all_bytes(model) == before
    brittle.clear()
    paths = [pack.adapters["a"], pack.adapters["b"]]
    with pytest.raises(MemoryError):
        model.load_dare_adapter(paths, "new", combination_type="brittle")
    assert "new" not in model.dare_adapters
    assert model.active_dare_adapters == list(active)
    assert all_bytes(model) == before
    model.set_dare_adapter("broken")  # this time it works
    model.disable_dare_adapters()
    assert all_bytes(model) == base


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combination_type": "slerp", "t": "half"}, "t is 'half'"),
        ({"combination_type": "karcher", "max_iter": 0.5}, "max_iter is 0.5"),
        ({"combination_type": "model_stock", "filter_wise": 1}, "filter_wise is 1"),
    ],
)
def test_an_option_that_is_only_seen_when_it_is_computed_leaves_what_was_active(
    pack: Pack, options: dict[str, Any], message: str
):
    model = loaded(pack)
    model.set_dare_adapter({"c": 0.5})
    before = all_bytes(model)
    with pytest.raises(CombinationError, match=message):
        model.load_dare_adapter([pack.adapters["a"], pack.adapters["b"]], "new", **options)
    assert model.dare_adapters == ["a", "b", "c"]
    assert model.active_dare_adapters == ["c"]
    assert all_bytes(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combination_type": "dare_tie"}, "'dare_tie'; there are .*dare_ties"),
        ({"combination_type": "linear", "density": 0.5}, "linear has no option density"),
        ({"combination_type": "ties"}, "density is needed"),
        ({"combination_type": "ties", "density": 1.5}, "density is 1.5"),
        ({"combination_type": "ties", "density": [0.5] * 3}, "3 values for 2 adapters"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"}, "'x'; there"),
        ({"combination_type": "dare_linear", "density": 0.3, "mask": "blocked"}, "blocked mask"),
        ({"combination_type": "breadcrumbs", "density": 0.5, "gamma": 2}, "gamma is 2"),
        ({"combination_type": "sce", "select_topk": -1}, "select_topk is -1"),
        ({"combination_type": "nearswap"}, "nearswap needs t"),
        ({"mask": "random"}, "mask is 'random'"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"prune": "dare"}, "belong together"),
        ({"prune": "dare", "drop_rate": "x"}, "drop_rate is 'x'"),
        ({"normalize": True, "weights": [1.0, -1.0]}, "sum to zero"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_changes(
    pack: Pack, options: dict[str, Any], message: str
):
    model = loaded(pack)
    model.set_dare_adapter({"c": 0.5})
    before = all_bytes(model)
    options = dict(options)
    weights, paths = options.pop("weights", [1.0, 1.0]), [pack.adapters["a"], pack.adapters["b"]]
    with pytest.raises(CombinationError, match=message):
        model.add_weighted_adapter(["a", "b"], weights, "m", **options)
    with pytest.raises(CombinationError, match=message):
        model.load_dare_adapter(paths, "m", weight=weights, **options)
    assert model.dare_adapters == ["a", "b", "c"]
    assert model.active_dare_adapters == ["c"]
    assert all_bytes(model) == before


def test_unknown_options_are_refused_before_anything_is_opened(pack: Pack, tmp_path: Path):
    model = pack.live()
    for how in ({"combination_type": "tie"}, {"lamda": 1.0}, {"combination_type": "nearswap"}):
        with pytest.raises(CombinationError):
            model.load_dare_adapter([tmp_path / "nowhere"] * 2, "m", **how)
    with pytest.raises(AdapterNotFoundError):
        model.load_dare_adapter([tmp_path / "nowhere"] * 2, "m", combination_type="average")


def test_a_taken_name_and_an_unknown_one_are_refused(pack: Pack):
    model = loaded(pack)
    with pytest.raises(AdapterExistsError):
        model.add_weighted_adapter(["a", "b"], [1, 1], "c", combination_type="slerp")
    with pytest.raises(AdapterNotFoundError, match="no adapter 'z'"):
        model.add_weighted_adapter(["a", "z"], [1, 1], "m", combination_type="slerp")
    with pytest.raises(ValueError, match="1 weights for 2"):
        model.add_weighted_adapter(["a", "b"], [1], "m", combination_type="slerp")
    for weight in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            model.add_weighted_adapter(["a", "b"], [1, weight], "m", combination_type="slerp")
    assert model.dare_adapters == ["a", "b", "c"]


def test_adapters_of_different_bases_are_refused(make_pack: PackMaker, pack: Pack):
    # The same architecture and sizes, other weights.
    config = small_llama()
    config.initializer_range = 0.5
    other = make_pack("combine-elsewhere", config=config, dtype=torch.float32, kinds={"z": EXACT})
    model = loaded(pack)
    before = all_bytes(model)
    sources = [pack.adapters["a"], other.adapters["z"]]
    for kind in ("linear", "ties", "slerp"):
        how = {"combination_type": kind, **METHODS[kind]}
        with pytest.raises(BaseMismatchError):
            model.load_dare_adapter(sources, "m", **how)
        assert all_bytes(model) == before
        # Whoever knows better says so.
        assert model.load_dare_adapter(sources, kind, check_base=False, **how) == kind
        model.disable_dare_adapters()
    model.load_dare_adapter(other.adapters["z"], "z", check_base=False, activate=False)
    with pytest.raises(BaseMismatchError, match="different bases"):
        model.add_weighted_adapter(["a", "z"], [1, 1], "m", combination_type="ties", density=0.5)
    assert "m" not in model.dare_adapters
    assert all_bytes(model) == before
