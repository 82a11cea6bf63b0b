"""What a combination keeps in memory, and what its copies share."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from tests.combine.test_api import METHODS, PARAMETER_METHODS, WEIGHTS
from tests.conftest import Pack, all_bytes
from tests.hf_combine.combined_models import Tensors, loaded, nbytes, reference


def watch_tensors() -> Callable[[], int]:
    """Tells the bytes of tensors that were made since and still are there."""
    gc.freeze()  # what is there already is not listed any more

    def total() -> int:
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor):
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    return total


def changes(deltas: Tensors) -> int:
    return sum(int((delta != 0).sum()) for delta in deltas.values())


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_kept_is_what_restores_the_base_and_nothing_more(pack: Pack, kind: str):
    model = loaded(pack)
    weights, options = WEIGHTS[kind], METHODS[kind]
    model.add_weighted_adapter(["a", "b"], weights, "m", combination_type=kind, **options)
    touched = changes(reference(pack, "ab", [1, 1], "linear", {}))
    changed = changes(reference(pack, "ab", weights, kind, options))
    patch = model._dare_live_adapters.patch
    made = watch_tensors()
    model.set_dare_adapter("m")
    assert patch.nbytes // 2 <= made() <= patch.nbytes + 4096
    if kind in PARAMETER_METHODS:
        assert patch.nbytes <= nbytes(model)
    else:  # an original and a position, of what an adapter changes
        assert 4 * changed <= patch.nbytes <= 8 * touched * 1.02
    made = watch_tensors()
    model.disable_dare_adapters()
    assert made() <= 4096
    assert patch.nbytes == 0


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("kind", METHODS)
def test_a_copy_with_an_active_combination_lives_on_its_own(
    pack: Pack, kind: str, duplicate: Callable[[PreTrainedModel], PreTrainedModel]
):
    model = loaded(pack)
    base = all_bytes(model)
    options = METHODS[kind]
    model.add_weighted_adapter(["a", "b"], WEIGHTS[kind], "m", combination_type=kind, **options)
    model.add_weighted_adapter(["m", "c"], [1.0, 0.5], "n", combination_type="ties", density=0.9)
    model.set_dare_adapter("m")
    other = duplicate(model)
    active = all_bytes(model)
    assert all_bytes(other) == active
    assert other.active_dare_adapters == ["m"]
    other.disable_dare_adapters()
    assert all_bytes(other) == base
    for name in ("n", "m"):
        other.set_dare_adapter(name)
    assert all_bytes(other) == active
    other.delete_dare_adapter("m")
    assert all_bytes(other) == base
    assert all_bytes(model) == active
    model.disable_dare_adapters()
    assert all_bytes(model) == base


def test_a_pickle_with_a_combination_is_not_much_larger_than_weights_and_originals(pack: Pack):
    model = loaded(pack)
    model.add_weighted_adapter(["a", "b"], [1, 1], "m", combination_type="slerp", t=0.5)
    model.set_dare_adapter("m")
    assert len(pickle.dumps(model)) < 2 * nbytes(model) + 100_000
