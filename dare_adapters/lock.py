"""Many forward passes at once, or one change of weights: a re-entrant readers-writer lock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dare_adapters.errors import PatchedModelError

__all__ = ["WeightsLock"]


class WeightsLock:
    """Forward passes share the weights; whoever changes them waits for all and holds all off.

    A waiting writer goes before new readers. A thread that reads may read again (a forward inside
    generate); a thread that writes may read and write again; a thread that reads may not write.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers: dict[int, int] = {}
        self._writer: int | None = None
        self._depth = 0
        self._waiting = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the weights still."""
        me = threading.get_ident()
        with self._changed:
            inside = me in self._readers or self._writer == me
            while not inside and (self._writer is not None or self._waiting):
                self._changed.wait()
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                    self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be alone with the weights.

        Raises:
            PatchedModelError: this thread is inside a forward pass or `generate`.
        """
        me = threading.get_ident()
        with self._changed:
            if self._writer != me:
                if me in self._readers:
                    raise PatchedModelError(
                        "adapters cannot be changed from inside a forward pass or generate() of "
                        "the same thread; change them between calls"
                    )
                self._waiting += 1
                try:
                    while self._writer is not None or self._readers:
                        self._changed.wait()
                finally:
                    self._waiting -= 1
                    self._changed.notify_all()
                self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    self._changed.notify_all()

    def __deepcopy__(self, memo: dict[int, object]) -> WeightsLock:
        return WeightsLock()

    def __reduce__(self) -> tuple[type[WeightsLock], tuple[()]]:
        return WeightsLock, ()
