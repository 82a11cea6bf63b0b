"""Each token gets the product of its slot's delta, whatever computes it."""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.delta import Delta
from dare_adapters.kernels import PackedDelta, sparse_delta_linear
from dare_adapters.kernels.compiled_product import available
from tests.kernels.deltas import DTYPES, bernoulli, blocked, deltas
from tests.kernels.usable import usable_backends

BACKENDS = usable_backends()
# Of the largest sum of magnitudes; one rounding to the dtype, and float32's own.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8 + 2e-6, torch.float16: 2**-11 + 2e-6}
quickly = settings(max_examples=60, deadline=None)


def expected_product(
    x: torch.Tensor,
    dense: Sequence[torch.Tensor | None],
    token_slot: torch.Tensor,
    y: torch.Tensor,
    transposed: bool,
    weights: Sequence[float] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outcome in float64, by a loop over tokens; and the sum of magnitudes of its terms."""
    made, size = y.double().clone(), y.double().abs()
    for token, slot in enumerate(token_slot.tolist()):
        if not 0 <= slot < len(dense) or dense[slot] is None:
            continue
        matrix = dense[slot].double() * (1.0 if weights is None else weights[slot])
        matrix = matrix.T if transposed else matrix
        made[token] += matrix @ x[token].double()
        size[token] += matrix.abs() @ x[token].double().abs()
    return made, size


@pytest.mark.parametrize("backend", BACKENDS)
@quickly
@given(data=st.data())
def test_every_back_end_gives_the_dense_sum(backend: str, data: st.DataObject):
    inputs, outputs = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 40))
    tokens = data.draw(st.integers(0, 9) | st.integers(10, 70))
    transposed = data.draw(st.booleans())
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    sources: list[Delta | None] = data.draw(
        st.lists(st.none() | deltas(*shape), min_size=1, max_size=4)
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    token_slot = torch.randint(-1, len(sources), (tokens,), generator=generator)
    token_slot = token_slot.to(data.draw(st.sampled_from([torch.int64, torch.int32])))
    x_dtype, y_dtype = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    weights = None
    if data.draw(st.booleans()):
        weights = torch.randn(len(sources), generator=generator).tolist()
    x = torch.randn(tokens, inputs, generator=generator).to(x_dtype)
    y = torch.randn(tokens, outputs, generator=generator).to(y_dtype)

    dense = [None if delta is None else delta.dense() for delta in sources]
    expected, size = expected_product(x, dense, token_slot, y, transposed, weights)
    packed = [None if delta is None else PackedDelta.from_delta(delta) for delta in sources]
    found = y.clone()
    returned = sparse_delta_linear(
        x, packed, token_slot, found, transposed=transposed, weights=weights, backend=backend
    )
    assert returned is found
    assert ((found.double() - expected).abs() <= size * TOLERANCE[y_dtype]).all()
    untouched = [slot < 0 or sources[slot] is None for slot in token_slot.tolist()]
    assert torch.equal(found[untouched], y[untouched])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_element_is_written_and_no_other(backend: str, transposed: bool):
    rows, columns, tokens, margin = 33, 50, 21, 4
    delta = PackedDelta.from_delta(blocked(rows, columns, 10, 4))
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    poison = torch.full((tokens + 2, outputs + 2 * margin), float("nan"))
    inner = poison[1:-1, margin:-margin]
    token_slot = torch.arange(tokens) % 3 - 1  # no slot, the delta's, and a slot of None
    inner[token_slot == 0] = 0
    sparse_delta_linear(
        torch.ones(tokens, inputs), [delta, None], token_slot, inner,
        transposed=transposed, backend=backend,
    )  # fmt: skip
    sums = delta.dense().sum(0 if transposed else 1)
    torch.testing.assert_close(inner[token_slot == 0], sums.expand(7, -1))
    inner[token_slot == 0] = float("nan")
    assert poison.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("make", [blocked, bernoulli])
def test_shards_of_rows_and_columns_add_up_to_the_whole(backend: str, degree: int, make):
    rows, columns, tokens = 44, 93, 5
    packed = PackedDelta.from_delta(make(rows, columns, 10 if make is blocked else 0.9, 4))
    x, zeros = torch.randn(tokens, columns), torch.zeros(tokens, rows)
    slot = torch.zeros(tokens, dtype=torch.int64)
    whole = sparse_delta_linear(x, [packed], slot, zeros.clone(), backend="reference")
    cuts = [columns * rank // degree for rank in range(degree + 1)]
    summed = zeros.clone()
    for start, stop in itertools.pairwise(cuts):
        part = packed.slice_columns(start, stop)
        sparse_delta_linear(x[:, start:stop], [part], slot, summed, backend=backend)
    torch.testing.assert_close(summed, whole)
    cuts = [rows * rank // degree for rank in range(degree + 1)]
    side_by_side = zeros.clone()
    for start, stop in itertools.pairwise(cuts):
        part = packed.slice_rows(start, stop)
        sparse_delta_linear(x, [part], slot, side_by_side[:, start:stop], backend=backend)
    torch.testing.assert_close(side_by_side, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matrix_of_many_tiles_gives_the_dense_product(backend: str):
    # The interpreter needs a millisecond for an operation.
    rows, columns = (70, 611) if backend == "triton-interpreted" else (1100, 2051)
    packed = PackedDelta.from_delta(blocked(rows, columns, 20, 1))
    x, slot = torch.randn(3, columns), torch.zeros(3, dtype=torch.int64)
    found = sparse_delta_linear(x, [packed], slot, torch.zeros(3, rows), backend=backend)
    torch.testing.assert_close(found, x @ packed.dense().T, rtol=1e-4, atol=1e-4)
    x = torch.randn(3, rows)
    found = torch.zeros(3, columns)
    sparse_delta_linear(x, [packed], slot, found, transposed=True, backend=backend)
    torch.testing.assert_close(found, x @ packed.dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not available(), reason="the loops were not compiled")
@pytest.mark.parametrize("make", [blocked, bernoulli])
@pytest.mark.parametrize("tokens", [1, 4, 8, 17, 24, 30, 40, 47, 56, 64, 130])
def test_any_number_of_tokens_gives_the_dense_product_of_wide_rows(make, tokens: int):
    rows, columns = 70, 3001  # wider than what is multiplied at once
    packed = PackedDelta.from_delta(make(rows, columns, 10 if make is blocked else 0.9, 4))
    x, slot = torch.randn(tokens, columns), torch.zeros(tokens, dtype=torch.int64)
    y = torch.zeros(tokens, rows)
    sparse_delta_linear(x, [packed], slot, y, backend="compiled")
    torch.testing.assert_close(y, x @ packed.dense().T, rtol=1e-4, atol=1e-4)
    x, y = torch.randn(tokens, rows), torch.zeros(tokens, columns)
    sparse_delta_linear(x, [packed], slot, y, transposed=True, backend="compiled")
    torch.testing.assert_close(y, x @ packed.dense(), rtol=1e-4, atol=1e-4)


def test_a_copy_is_read_from_tensors_of_its_own():
    packed = PackedDelta.from_delta(blocked(30, 50, 10, 4))
    x, slot = torch.randn(3, 50), torch.zeros(3, dtype=torch.int64)
    expected = sparse_delta_linear(x, [packed], slot, torch.zeros(3, 30))
    copied = copy.deepcopy(packed)
    for tensor in packed.tensors().values():
        tensor.zero_()
    found = sparse_delta_linear(x, [copied], slot, torch.zeros(3, 30))
    assert torch.equal(found, expected)
    assert not torch.equal(found, torch.zeros(3, 30))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("make", [blocked, bernoulli])
def test_sums_do_not_depend_on_the_number_of_threads(transposed: bool, make):
    packed = PackedDelta.from_delta(make(1030, 1020, 10 if make is blocked else 0.9, 4))
    inputs, outputs = (1030, 1020) if transposed else (1020, 1030)
    x, slot = torch.randn(41, inputs), torch.arange(41) % 2 - 1
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y = torch.zeros(41, outputs)
            found.append(sparse_delta_linear(x, [packed], slot, y, transposed=transposed))
    finally:
        torch.set_num_threads(before)
    dense = packed.dense() if transposed else packed.dense().T
    expected = torch.where(slot[:, None] == 0, x @ dense, 0)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    if available():
        assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.skipif(not available(), reason="the loops were not compiled")
def test_several_threads_may_multiply_at_once():
    packed = PackedDelta.from_delta(blocked(600, 1020, 10, 4))
    x, slot = torch.randn(9, 1020), torch.zeros(9, dtype=torch.int64)
    expected = sparse_delta_linear(x, [packed], slot, torch.zeros(9, 600))
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(
            lambda _: sparse_delta_linear(x, [packed], slot, torch.zeros(9, 600)), range(40)
        )
        assert all(torch.equal(one, expected) for one in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.skipif(not available(), reason="the loops were not compiled")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_multiplies_too():
    packed = PackedDelta.from_delta(blocked(1030, 1020, 10, 4))
    x, slot = torch.randn(40, 1020), torch.zeros(40, dtype=torch.int64)
    y, again = torch.zeros(40, 1030), torch.zeros(40, 1030)  # PyTorch's own loops do not survive
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sparse_delta_linear(x, [packed], slot, y)
        child = os.fork()
        if not child:
            signal.alarm(60)
            sparse_delta_linear(x, [packed], slot, again)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_x_gets_the_gradient_of_the_dense_product(backend: str, transposed: bool):
    shape, tokens = (23, 37), 6
    sources = [blocked(*shape, 5, 4), bernoulli(*shape, 0.5, 16)]
    packed: list[PackedDelta | None] = [PackedDelta.from_delta(delta) for delta in sources]
    token_slot = torch.tensor([1, -1, 0, 1, 0, 2])
    inputs, outputs = shape if transposed else shape[::-1]
    x, head = torch.randn(tokens, inputs, requires_grad=True), torch.randn(tokens, outputs)
    base = torch.randn(inputs, outputs)
    weights = [0.5, -2.0, 1.0]
    y = x @ base
    sparse_delta_linear(
        x, [*packed, None], token_slot, y, transposed=transposed, weights=weights, backend=backend
    )
    (y * head).sum().backward()
    expected = torch.stack(
        [
            base @ head[token]
            + (
                0
                if slot not in (0, 1)
                else (sources[slot].dense() if transposed else sources[slot].dense().T)
                @ head[token]
                * weights[slot]
            )
            for token, slot in enumerate(token_slot.tolist())
        ]
    )
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_half_precision_are_rounded_once():
    packed = PackedDelta.from_delta(blocked(23, 37, 5, 4))
    x = torch.randn(4, 37, dtype=torch.bfloat16, requires_grad=True)
    y = torch.zeros(4, 23, dtype=torch.bfloat16)
    slot = torch.zeros(4, dtype=torch.int64)
    made = sparse_delta_linear(x, [packed], slot, y)
    assert made.dtype == torch.bfloat16
    made.float().sum().backward()
    expected = packed.dense().sum(0).expand(4, -1).to(torch.bfloat16)
    torch.testing.assert_close(x.grad, expected, rtol=2**-8, atol=0)


def test_autocast_does_not_lower_the_precision():
    packed = PackedDelta.from_delta(blocked(64, 200, 2, 16))
    x, slot = torch.randn(40, 200), torch.zeros(40, dtype=torch.int64)
    expected = x @ packed.dense().T
    for backend in BACKENDS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = sparse_delta_linear(x, [packed], slot, torch.zeros(40, 64), backend=backend)
        torch.testing.assert_close(found, expected)


def test_operators_pass_pytorchs_own_checks():
    packed = PackedDelta.from_delta(blocked(8, 24, 5, 4))
    other = PackedDelta.from_delta(bernoulli(8, 24, 0.5, 2))
    tensors = [*packed.tensors().values(), *other.tensors().values()]
    words = [*packed.layout.words(), *[0] * 8, *other.layout.words()]
    slot, weights = torch.tensor([0, 2, 1, -1, 0]), torch.tensor([1.0, 0.5, 2.0])
    x = torch.randn(5, 24)
    operators = torch.ops.dare_adapters
    torch.library.opcheck(
        operators.add_delta_product,
        (x, tensors, words, slot, weights, torch.zeros(5, 8), False, "auto"),
    )
    for asks in (False, True):
        arguments = (x.clone().requires_grad_(asks), tensors, words, slot, weights, False, "auto")
        torch.library.opcheck(operators.delta_product, arguments)


@pytest.mark.parametrize("gradients", [False, True])
def test_compiled_models_hold_the_operator_without_a_break_and_switch_without_recompiling(
    gradients: bool,
):
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = torch.nn.Linear(24, 8)
            self.deltas: list[PackedDelta | None] = []

        def forward(self, x: torch.Tensor, token_slot: torch.Tensor) -> torch.Tensor:
            return sparse_delta_linear(x, self.deltas, token_slot, self.base(x)) * 2

    layer = Layer()
    packed = [PackedDelta.from_delta(blocked(8, 24, 5, 4, seed)) for seed in range(3)]
    x, slot = torch.randn(6, 24), torch.tensor([0, 1, -1, 1, 0, 0])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(gradients):
        for step, pair in enumerate(([0, 1], [1, 2], [2, 0])):
            layer.deltas = [packed[place] for place in pair]
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                found = compiled(x, slot)
            torch.testing.assert_close(found, layer(x, slot))


def test_what_does_not_fit_is_refused_with_the_sizes():
    packed = PackedDelta.from_delta(blocked(8, 24, 5, 4))
    x, y, slot = torch.zeros(3, 24), torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"slot 1 is a matrix \(8, 24\).* need \(24, 8\)"):
        sparse_delta_linear(x, [None, packed], slot, y, transposed=True)
    with pytest.raises(ValueError, match="3 rows of x, 3 of y and 2 token slots"):
        sparse_delta_linear(x, [packed], slot[:2], y)
    with pytest.raises(ValueError, match="no back end 'fastest'; there are auto, "):
        sparse_delta_linear(x, [packed], slot, y, backend="fastest")
    with pytest.raises(ValueError, match=r"weights are \(2,\) for 1 deltas"):
        sparse_delta_linear(x, [packed], slot, y, weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="flatten batch and sequence"):
        sparse_delta_linear(x[None], [packed], slot, y)
    with pytest.raises(ValueError, match=r"must be floats, not torch.int64"):
        sparse_delta_linear(x.long(), [packed], slot, y)


def test_the_loops_are_compiled_where_a_compiler_is():
    if os.environ.get("DARE_ADAPTERS_COMPILED") == "0" or shutil.which("cc") is None:
        pytest.skip("switched off, or no C compiler on this machine")
    assert available(), "reinstall the project: `pip install -e .`"


@pytest.mark.skipif(not available(), reason="the loops were not compiled")
def test_broken_offsets_and_columns_never_reach_outside():
    for made in (blocked(50, 95, 10, 4), blocked(50, 95, 300, 4), bernoulli(50, 95, 0.5, 4)):
        packed = PackedDelta.from_delta(made)
        broken = {
            name: torch.ones_like(one).neg_() if name in ("offsets", "column_index") else one
            for name, one in packed.tensors().items()
        }
        delta = PackedDelta.from_tensors(packed.layout, broken)
        x, slot = torch.ones(5, 95), torch.zeros(5, dtype=torch.int64)
        found = sparse_delta_linear(x, [delta], slot, torch.zeros(5, 50), backend="compiled")
        assert found.isfinite().all()


def test_no_deltas_change_nothing():
    x, y, slot = torch.zeros(3, 24), torch.ones(3, 8), torch.zeros(3, dtype=torch.int64)
    assert torch.equal(sparse_delta_linear(x, [], slot, y.clone()), y)
    assert torch.equal(sparse_delta_linear(x, [None], slot, y.clone()), y)
