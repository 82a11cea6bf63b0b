"""Weights never change under a forward pass, whichever threads are at work."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from dare_adapters.errors import PatchedModelError
from dare_adapters.lock import WeightsLock
from tests.conftest import Pack, PackMaker, all_bytes
from tests.test_patch import EXACT

TOKENS = torch.tensor([[1, 5, 9, 30, 2, 77]])
PATIENCE = 30.0  # seconds after which a test has hung
Result = TypeVar("Result")


@pytest.fixture
def pack(make_pack: PackMaker) -> Pack:
    """Adapters that change what greedy decoding says."""
    return make_pack("loud", kinds={"a": EXACT, "b": EXACT, "c": EXACT}, spread=0.1)


@pytest.fixture
def model(pack: Pack) -> PreTrainedModel:
    return pack.loaded()


@pytest.fixture
def _busy_threads() -> Iterator[None]:
    """Threads take turns so often that they meet everywhere."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def spoken(model: PreTrainedModel) -> torch.Tensor:
    return model.generate(TOKENS, max_new_tokens=8, min_new_tokens=8, do_sample=False)


def in_thread(function: Callable[[], Result]) -> Result:
    """The function's result from another thread, which must not hang."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(function).result(timeout=PATIENCE)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.usefixtures("_busy_threads")
@pytest.mark.parametrize("work", [logits, spoken], ids=["forward", "generate"])
def test_every_output_is_of_one_adapter_while_another_thread_swaps_them(
    model: PreTrainedModel, work: Callable[[PreTrainedModel], torch.Tensor]
):
    choices = ([], ["a"], ["b"], ["a", "c"])
    expected = []
    for chosen in choices:
        model.set_dare_adapter(chosen)
        expected.append(in_thread(lambda: work(model)))
    different = {tuple(value.flatten().tolist()) for value in expected}
    assert len(different) == len(choices)
    swaps, stop = [0], threading.Event()

    def swap() -> None:
        while not stop.is_set():
            model.set_dare_adapter(choices[swaps[0] % len(choices)])
            swaps[0] += 1
            time.sleep(0.001)

    def use() -> list[int]:
        found = []
        for _ in range(40 if work is logits else 6):
            output = work(model)
            matching = [n for n, value in enumerate(expected) if torch.equal(output, value)]
            assert len(matching) == 1, "a mixture of adapters"
            found += matching
        return found

    with ThreadPoolExecutor(4) as pool:
        swapping = pool.submit(swap)
        users = [pool.submit(use) for _ in range(3)]
        try:
            seen = [n for user in users for n in user.result(timeout=4 * PATIENCE)]
        finally:
            stop.set()
        swapping.result(timeout=PATIENCE)
    assert swaps[0] > 3
    assert len(set(seen)) > 1


def test_the_first_adapter_of_a_model_waits_for_a_forward_under_way(pack: Pack):
    model = pack.live()
    base = logits(model)
    inside, go_on = threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        inside.set()
        assert go_on.wait(PATIENCE)

    handle = model.model.layers[0].register_forward_pre_hook(pause)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(logits, model)
        assert inside.wait(PATIENCE)
        loading = pool.submit(model.load_dare_adapter, pack.adapters["a"])
        time.sleep(0.2)
        assert not loading.done()
        go_on.set()
        assert torch.equal(running.result(timeout=PATIENCE), base)
        assert loading.result(timeout=PATIENCE) == "a"
    handle.remove()
    assert not torch.equal(logits(model), base)


def test_a_forward_of_the_inner_model_holds_the_weights_still_too(
    model: PreTrainedModel, pack: Pack
):
    inside, go_on = threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        inside.set()
        assert go_on.wait(PATIENCE)

    model.model.layers[0].register_forward_pre_hook(pause)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(model.model, TOKENS)
        assert inside.wait(PATIENCE)
        changing = pool.submit(model.set_dare_adapter, "a")
        time.sleep(0.2)
        assert not changing.done()
        go_on.set()
        running.result(timeout=PATIENCE)
        changing.result(timeout=PATIENCE)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, pack: model.set_dare_adapter("b"),
        lambda model, pack: model.disable_dare_adapters(),
        lambda model, pack: model.delete_dare_adapter("a"),
        lambda model, pack: model.merge_dare_adapters(),
        lambda model, pack: model.load_dare_adapter(pack.adapters["b"], "new"),
        lambda model, pack: model.to(torch.float32),
    ],
    ids=["set", "disable", "delete", "merge", "load", "to"],
)
@pytest.mark.parametrize("work", [logits, spoken], ids=["forward", "generate"])
def test_a_change_from_inside_a_forward_of_the_same_thread_raises(
    model: PreTrainedModel,
    pack: Pack,
    change: Callable[[PreTrainedModel, Pack], object],
    work: Callable[[PreTrainedModel], torch.Tensor],
):
    model.set_dare_adapter("a")
    before, names = all_bytes(model), model.dare_adapters
    handle = model.model.layers[1].register_forward_hook(lambda *_: change(model, pack))
    with pytest.raises(PatchedModelError, match="inside a forward pass"):
        work(model)
    handle.remove()
    assert all_bytes(model) == before
    assert model.dare_adapters == names
    assert model.active_dare_adapters == ["a"]
    in_thread(lambda: model.set_dare_adapter("b"))  # the lock is free again
    assert model.active_dare_adapters == ["b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_a_forward_lets_the_weights_go(
    model: PreTrainedModel, error: type[BaseException]
):
    def fail(*_: object) -> None:
        raise error

    handle = model.model.layers[0].register_forward_pre_hook(fail)
    for work in (logits, spoken):
        with pytest.raises(error):
            work(model)
    handle.remove()
    in_thread(lambda: model.set_dare_adapter("b"))
    assert model.active_dare_adapters == ["b"]


def test_an_exception_while_changing_lets_the_weights_go(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dare_adapters.patch.apply_rows", fail)
        with pytest.raises(KeyboardInterrupt):
            model.set_dare_adapter("a")
    in_thread(lambda: logits(model))
    in_thread(lambda: model.set_dare_adapter("b"))


# The lock itself


def test_readers_share():
    lock = WeightsLock()
    meeting = threading.Barrier(3)

    def read() -> int:
        with lock.reading():
            return meeting.wait(PATIENCE)

    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(read) for _ in range(3)]
        assert sorted(future.result(timeout=PATIENCE) for future in done) == [0, 1, 2]


def test_a_writer_is_alone():
    lock = WeightsLock()
    inside, most = [0], [0]

    def write() -> None:
        for _ in range(50):
            with lock.writing():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0)
                inside[0] -= 1

    def read() -> None:
        for _ in range(50):
            with lock.reading():
                assert inside[0] == 0
                time.sleep(0)

    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(work) for work in (write, write, read, read)]
        for future in done:
            future.result(timeout=PATIENCE)
    assert most == [1]


def test_a_writer_is_not_starved_by_readers_who_never_all_leave():
    lock = WeightsLock()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            with lock.reading():
                time.sleep(0.02)

    with ThreadPoolExecutor(4) as pool:
        readers = []
        for _ in range(4):
            readers.append(pool.submit(read))
            time.sleep(0.005)  # out of step: at every moment one of them is inside
        try:
            start = time.monotonic()
            for _ in range(5):
                in_thread(lambda: enter_and_leave(lock))
            assert time.monotonic() - start < PATIENCE / 3
        finally:
            stop.set()
        for reader in readers:
            reader.result(timeout=PATIENCE)


def test_a_reader_may_read_again_while_a_writer_waits():
    lock = WeightsLock()
    with ThreadPoolExecutor(1) as pool:
        with lock.reading():
            writing = pool.submit(enter_and_leave, lock)
            while not lock._waiting:
                time.sleep(0.001)
            with lock.reading():
                assert not writing.done()
        writing.result(timeout=PATIENCE)


def enter_and_leave(lock: WeightsLock) -> None:
    with lock.writing():
        pass


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["read", "write"]), max_size=6))
def test_one_thread_may_do_anything_inside_but_write_while_it_only_reads(steps: list[str]):
    lock = WeightsLock()

    def descend(rest: list[str], writing: bool, reading: bool) -> None:
        if not rest:
            return
        if rest[0] == "read":
            with lock.reading():
                descend(rest[1:], writing, True)
        elif reading and not writing:
            with pytest.raises(PatchedModelError), lock.writing():
                pass
            descend(rest[1:], writing, reading)
        else:
            with lock.writing():
                descend(rest[1:], True, reading)

    descend(steps, False, False)
    assert lock._readers == {}
    assert lock._writer is None
    assert lock._depth == lock._waiting == 0


def test_a_copy_of_a_held_lock_is_free():
    lock = WeightsLock()
    with lock.writing():
        for other in (copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):
            assert other is not lock
            in_thread(lambda other=other: enter_and_leave(other))
