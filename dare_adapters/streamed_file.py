"""A file written once, from its start to its end, beside the work that makes its contents.

What is written has to be on disk before a directory is complete, so it goes there directly where
the system allows (O_DIRECT): as copies in the page cache, gigabytes of output would push out the
checkpoints that are still being read, and copying them costs more than most merges compute.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

__all__ = ["StreamedFile"]

# Bytes of each of two buffers: one is filled while the other is written.
BUFFER_BYTES = 1 << 23
# Smaller files are not worth going past the cache for.
DIRECT_BYTES = 1 << 26
_BLOCK = 4096  # what direct writing is aligned to, on every disk of today


class StreamedFile:
    """A new file, open for writing from its start to its end.

    Args:
        path: where nothing is yet.
        nbytes: about how many bytes are to come.

    Raises:
        OSError: it exists, or cannot be written; a later failure of writing is raised by the
            next call.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._direct = getattr(os, "O_DIRECT", 0) if nbytes >= DIRECT_BYTES else 0
        try:
            self._file = os.open(path, flags | self._direct, 0o666)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some systems make the file before they refuse
            self._direct = 0
            self._file = os.open(path, flags, 0o666)
        size = min(BUFFER_BYTES, -(-max(nbytes, 1) // _BLOCK) * _BLOCK)
        self._buffers = [mmap.mmap(-1, size), mmap.mmap(-1, size)]  # aligned to pages
        self._filled = 0
        self._written = 0
        self._writing: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="dare-write")

    def __enter__(self) -> StreamedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._flush()
                self._wait()
        finally:
            self._writer.shutdown(wait=True)
            os.close(self._file)
            for buffer in self._buffers:
                buffer.close()

    def tell(self) -> int:
        """Bytes that were given so far."""
        return self._written + self._filled

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        rest = memoryview(data).cast("B")
        while len(rest):
            buffer = self._buffers[0]
            count = min(len(rest), len(buffer) - self._filled)
            buffer[self._filled : self._filled + count] = rest[:count]
            self._filled += count
            rest = rest[count:]
            if self._filled == len(buffer):
                self._flush()

    def _flush(self) -> None:
        """Have the first buffer written, and go on with the second."""
        self._wait()
        self._writing = self._writer.submit(self._write_out, self._buffers[0], self._filled)
        self._written += self._filled
        self._filled = 0
        self._buffers.reverse()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write_out(self, buffer: mmap.mmap, count: int) -> None:
        with memoryview(buffer) as whole:
            done = 0
            while done < count:
                if self._direct and (count - done) % _BLOCK:
                    stop = (count - done) // _BLOCK * _BLOCK + done
                    if stop == done:  # the end of the file
                        self._leave_direct()
                        stop = count
                else:
                    stop = count
                try:
                    with whole[done:stop] as part:
                        done += os.write(self._file, part)
                except OSError as error:
                    if not self._direct or error.errno != errno.EINVAL:
                        raise
                    self._leave_direct()  # blocks of another size

    def _leave_direct(self) -> None:
        if sys.platform != "win32":
            import fcntl

            flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~self._direct)
        self._direct = 0
