"""An extraction that fails, is killed or runs out of disk leaves what was there before."""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    CheckpointError,
    DareError,
)
from tests.checkpoints import fine_tuned, integers, write_checkpoint
from tests.forged_adapters import DOWN, TENSORS
from tests.golden.make_golden import golden_checkpoints
from tests.killed_process import kill_while_writing


def extract(base: Path, finetuned: Path, out: Path, **options: Any) -> Adapter:
    return dare_adapters.extract(base, finetuned, out, progress=False, **options)


def test_an_existing_path_is_not_overwritten_unless_asked(tmp_path, golden_pair):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    with pytest.raises(AdapterExistsError, match="exists; choose another path"):
        extract(*golden_pair, out)
    assert os.listdir(out) == ["precious"]
    extract(*golden_pair, out, overwrite=True)
    assert not (out / "precious").exists()
    Adapter.open(out)
    assert sorted(os.listdir(tmp_path)) == ["base", "finetuned", "out"]


def test_a_failed_overwrite_leaves_the_old_adapter(tmp_path, golden_pair):
    before = extract(*golden_pair, tmp_path / "out", bits=8).config.sha256
    _, broken = golden_checkpoints()
    broken[DOWN] = torch.full_like(broken[DOWN], math.nan)
    write_checkpoint(tmp_path / "broken", broken)
    with pytest.raises(CheckpointError):
        extract(golden_pair[0], tmp_path / "broken", tmp_path / "out", overwrite=True)
    assert Adapter.open(tmp_path / "out").config.sha256 == before
    assert sorted(os.listdir(tmp_path)) == ["base", "broken", "finetuned", "out"]


def test_abandoned_work_is_removed_and_work_of_the_living_is_not(tmp_path, golden_pair):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    host = socket.gethostname()
    names = {pid: f".out[1].partial-{host}-{pid}-0123abcd" for pid in (done.pid, os.getpid())}
    for name in names.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / TENSORS).write_bytes(b"half")
    extract(*golden_pair, tmp_path / "out[1]")
    assert not (tmp_path / names[done.pid]).exists()
    assert (tmp_path / names[os.getpid()] / TENSORS).exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system to fill")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mount is not allowed here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def large_pair(tmp_path: Path, count: int = 4) -> tuple[Path, Path]:
    base = {f"layers.{i}.weight": integers((300, 400), i) for i in range(count)}
    return (
        write_checkpoint(tmp_path / "base", base),
        write_checkpoint(tmp_path / "finetuned", fine_tuned(base)),
    )


def test_what_does_not_fit_is_refused_before_the_work(tmp_path, small_disk):
    with pytest.raises(DareError, match=r"MB are needed and .* MB are free"):
        extract(*large_pair(tmp_path), small_disk / "out")
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize(
    "options", [{"bits": 32}, {"bits": 4, "drop_rate": 0.0}, {"drop_rate": 0.5}]
)
def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, small_disk, monkeypatch, options):
    module = sys.modules["dare_adapters.extract"]
    monkeypatch.setattr(module, "require_space", lambda *_: None)  # as if others filled it
    with pytest.raises(DareError, match="No space left on device; nothing was left"):
        extract(*large_pair(tmp_path), small_disk / "out", **options)
    assert os.listdir(small_disk) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_killed_extraction_leaves_nothing_that_loads(tmp_path):
    base, finetuned = large_pair(tmp_path, 40)
    out = tmp_path / "out"
    left = kill_while_writing(lambda: extract(base, finetuned, out, seed=1), out)
    for place in (out, left):
        with pytest.raises(AdapterNotFoundError):
            Adapter.open(place)
    extract(base, finetuned, out, seed=1)
    Adapter.open(out)
    assert sorted(os.listdir(tmp_path)) == ["base", "finetuned", "out"]
