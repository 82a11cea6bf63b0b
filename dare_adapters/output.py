"""Directories that appear complete or not at all."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dare_adapters.errors import AdapterExistsError, DareError

__all__ = ["complete_directory", "require_space"]


@contextmanager
def complete_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory to fill, renamed to `target` when the block ends and removed if it fails.

    Raises:
        AdapterExistsError: `target` exists and `overwrite` is not set.
        DareError: the disk is full or not writable.
    """
    target = Path(os.path.abspath(target))
    host = socket.gethostname()
    if target.parent.is_dir():
        _remove_abandoned(target, host)
    if target.exists() and not overwrite:
        raise AdapterExistsError(f"{target} exists; choose another path, or overwrite it (--force)")
    partial = target.with_name(
        f".{target.name}.partial-{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            _sync(file)
        if target.exists():
            old = partial.with_name(partial.name + "-old")
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(target)
        _sync(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise DareError(
                f"cannot write {target}: {error.strerror}; nothing was left there"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_space(directory: Path, nbytes: int) -> None:
    """Refuse before the work what the disk could not hold after it.

    Raises:
        DareError: fewer than `nbytes` bytes are free where `directory` is or will be.
    """
    place = Path(os.path.abspath(directory))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise DareError(
            f"{directory}: about {nbytes / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free"
        )


def _remove_abandoned(target: Path, host: str) -> None:
    """What a killed process left: partial directories of this host's dead processes."""
    for left in target.parent.glob(glob.escape(f".{target.name}.partial-{host}-") + "*"):
        pid = left.name.removeprefix(f".{target.name}.partial-{host}-").split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            if left.name.endswith("-old") and not target.exists():
                left.rename(target)  # killed between the two renames of an overwrite
            else:
                shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
