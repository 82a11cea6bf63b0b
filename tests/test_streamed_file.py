"""A file that is written past the page cache holds what it was given, to the last byte."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters import streamed_file
from dare_adapters.streamed_file import StreamedFile

SIZES = st.lists(st.integers(0, 20_000), max_size=12)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of two blocks, and direct writing from the first byte."""
    monkeypatch.setattr(streamed_file, "BUFFER_BYTES", 8192)
    monkeypatch.setattr(streamed_file, "DIRECT_BYTES", 0)


@pytest.mark.usefixtures("small")
@given(sizes=SIZES, announced=st.integers(0, 100_000))
@settings(max_examples=60, deadline=None)
def test_it_holds_what_it_was_given(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], announced: int
):
    path = tmp_path_factory.mktemp("streamed") / "file"
    pieces = [os.urandom(size) for size in sizes]
    with StreamedFile(path, announced) as file:
        for piece in pieces:
            file.write(piece)
        assert file.tell() == sum(sizes)
    assert path.read_bytes() == b"".join(pieces)


@pytest.mark.usefixtures("small")
def test_a_system_that_refuses_direct_writing_gets_plain_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened, written = [], []

    def refuse_to_open(path: Path, flags: int, mode: int = 0o777) -> int:
        opened.append(bool(flags & os.O_DIRECT))
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct writing here")
        return plain_open(path, flags, mode)

    def refuse_to_write(file: int, data: bytes) -> int:
        import fcntl

        direct = bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)
        written.append(direct)
        if direct:
            raise OSError(errno.EINVAL, "blocks of another size")
        return plain_write(file, data)

    plain_open, plain_write = os.open, os.write
    data = os.urandom(30_001)
    for name, replaced in (("open", refuse_to_open), ("write", refuse_to_write)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, replaced)
            with StreamedFile(tmp_path / name, len(data)) as file:
                file.write(data)
        assert (tmp_path / name).read_bytes() == data
    assert opened == [True, False]
    assert not written[-1]


@pytest.mark.usefixtures("small")
def test_a_full_disk_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with (
        pytest.raises(OSError, match="No space") as caught,
        StreamedFile(tmp_path / "file", 9 * 8192) as file,
    ):
        file.write(bytes(9 * 8192))
    assert caught.value.errno == errno.ENOSPC


def test_what_exists_is_not_overwritten(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"mine")
    for nbytes in (1, 1 << 40):
        with pytest.raises(FileExistsError):
            StreamedFile(tmp_path / "file", nbytes)
    assert (tmp_path / "file").read_bytes() == b"mine"
