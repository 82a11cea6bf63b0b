"""Where a model has the entries of a checkpoint parameter, beside what its loader copies there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm

from dare_vllm.hot_swap.windows import find_windows  # noqa: E402 (only where vLLM is)

Load = Callable[[torch.Tensor, torch.Tensor], None]


class Model(torch.nn.Module):
    """One parameter, and a loader as vLLM's are: slices, narrowings, a transposition."""

    def __init__(self, shape: tuple[int, ...], load: Load) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape))
        self._load = load

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> set[str]:
        for _, tensor in weights:
            self._load(self.weight.data, tensor)
        return {"weight"}


def fused(live: torch.Tensor, tensor: torch.Tensor) -> None:
    live[3 : 3 + tensor.shape[0]].copy_(tensor)


def row_parallel(live: torch.Tensor, tensor: torch.Tensor) -> None:
    live.copy_(tensor.narrow(1, 4, 5))


def vocabulary(live: torch.Tensor, tensor: torch.Tensor) -> None:
    live[:2].copy_(tensor.narrow(0, 5, 2))
    live[2:].fill_(0)


def transposed(live: torch.Tensor, tensor: torch.Tensor) -> None:
    live.copy_(tensor.t())


def transposed_part(live: torch.Tensor, tensor: torch.Tensor) -> None:
    live.copy_(tensor.t().narrow(0, 2, 6))


def twice(live: torch.Tensor, tensor: torch.Tensor) -> None:
    live[:7].copy_(tensor)
    live[7:].copy_(tensor)


def strided(live: torch.Tensor, tensor: torch.Tensor) -> None:
    live[:, 1:].copy_(tensor)


def nowhere(live: torch.Tensor, tensor: torch.Tensor) -> None:
    """Another rank's."""


def vector(live: torch.Tensor, tensor: torch.Tensor) -> None:
    live.copy_(tensor[2:6])


LOADERS: dict[str, tuple[Load, tuple[int, ...], tuple[int, ...]]] = {
    "fused": (fused, (12, 9), (7, 9)),
    "row parallel": (row_parallel, (7, 5), (7, 9)),
    "vocabulary": (vocabulary, (4, 9), (7, 9)),
    "transposed": (transposed, (9, 7), (7, 9)),
    "a transposed part": (transposed_part, (6, 7), (7, 9)),
    "in two places": (twice, (14, 9), (7, 9)),
    "strided": (strided, (7, 10), (7, 9)),
    "nowhere": (nowhere, (3, 3), (7, 9)),
    "a vector": (vector, (4,), (7,)),
    "one row": (fused, (4, 9), (1, 9)),
    "one column": (fused, (12, 1), (7, 1)),
}


@pytest.mark.parametrize("kind", list(LOADERS))
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_entries_are_written_where_the_loader_would_put_them(
    kind: str, data: st.DataObject
) -> None:
    load, shape, whole = LOADERS[kind]
    size = torch.Size(whole).numel()
    model = Model(shape, load)
    windows = find_windows(model, [("weight", torch.ones(whole))])["weight"]
    assert windows is not None
    assert not model.weight.any()  # looking changes nothing
    chosen = sorted(data.draw(st.sets(st.integers(0, size - 1))))
    values = torch.arange(1.0, len(chosen) + 1)
    tensor = torch.zeros(size)
    tensor[chosen] = values
    for window in windows:
        window.write(torch.tensor(chosen, dtype=torch.int64), values)
    expected = torch.zeros(shape)
    load(expected, tensor.view(whole))
    assert torch.equal(model.weight.data, expected)


def computed(live: torch.Tensor, tensor: torch.Tensor) -> None:
    live.copy_(tensor + 1)


def shuffled(live: torch.Tensor, tensor: torch.Tensor) -> None:
    live.copy_(tensor.view(3, 3, 9).transpose(0, 1).reshape(9, 9))


def every_other(live: torch.Tensor, tensor: torch.Tensor) -> None:
    live[:5].copy_(tensor[::2])


def elsewhere(live: torch.Tensor, tensor: torch.Tensor) -> None:
    torch.empty_like(tensor).copy_(tensor)


@pytest.mark.parametrize("load", [computed, shuffled, every_other, elsewhere])
def test_a_loader_that_does_more_than_cut_has_no_windows(load: Load) -> None:
    model = Model((9, 9), load)
    assert find_windows(model, [("weight", torch.ones(9, 9))]) == {"weight": None}


def test_a_parameter_that_a_loader_makes_anew_is_put_back() -> None:
    model = Model((9, 9), fused)

    def anew(live: torch.Tensor, tensor: torch.Tensor) -> None:
        model.weight = torch.nn.Parameter(torch.empty(9, 9))
        model.weight.data.copy_(tensor)

    model._load, own = anew, model.weight
    assert find_windows(model, [("weight", torch.ones(9, 9))]) == {}
    assert model.weight is own
