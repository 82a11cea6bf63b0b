"""Pages of a mapped file are given back to the kernel, and nothing else is touched."""

from __future__ import annotations

import gc
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dare_adapters import mapped_pages, memory_advice
from dare_adapters.mapped_pages import MappedFile

MIB = 1 << 20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux alone")


def resident_file_bytes() -> int:
    """RssFile: pages of files that are in this process's memory."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


def release_pages(tensor: torch.Tensor, file: Path) -> None:
    MappedFile(file).release_pages(tensor)


def values(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32) % 100_003


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """32 MiB in two tensors, the second of which is small."""
    path = tmp_path / "model.safetensors"
    save_file({"large": values(8 * MIB), "small": values(5)}, path)
    return path


@pytest.fixture
def mapped(file: Path) -> Iterator[torch.Tensor]:
    with safe_open(file, framework="pt") as reader:
        yield reader.get_tensor("large")


@linux
def test_released_pages_leave_memory_and_come_back_with_the_same_values(
    file: Path, mapped: torch.Tensor
):
    expected = values(8 * MIB)
    for _ in range(3):
        gc.collect()
        assert torch.equal(mapped, expected)
        before = resident_file_bytes()
        release_pages(mapped, file)
        assert before - resident_file_bytes() > 31 * MIB
    assert torch.equal(mapped, expected)
    assert int(mapped[12_345_678 % len(mapped)]) == int(expected[12_345_678 % len(mapped)])


@linux
def test_the_list_of_mappings_is_read_once_for_a_file(
    file: Path, mapped: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    known = MappedFile(file)
    known.release_pages(mapped[: MIB // 2])
    monkeypatch.setattr(mapped_pages, "_mapping_around", lambda *_: pytest.fail("read again"))
    assert torch.equal(mapped, values(8 * MIB))
    before = resident_file_bytes()
    known.release_pages(mapped)
    assert before - resident_file_bytes() > 31 * MIB
    assert torch.equal(mapped, values(8 * MIB))


@linux
def test_what_is_elsewhere_is_not_released_though_the_file_is_known(
    file: Path, mapped: torch.Tensor
):
    known = MappedFile(file)
    known.release_pages(mapped)
    memory = written(4 * MIB)
    known.release_pages(memory)
    assert torch.equal(memory, written(4 * MIB))


@linux
def test_of_a_slice_only_its_own_whole_pages_are_released(file: Path, mapped: torch.Tensor):
    assert int(mapped.sum(dtype=torch.int64)) > 0
    before = resident_file_bytes()
    part = mapped[MIB : 3 * MIB]  # 8 MiB
    release_pages(part, file)
    after = resident_file_bytes()
    assert 7 * MIB < before - after < 9 * MIB
    assert torch.equal(part, values(8 * MIB)[MIB : 3 * MIB])
    release_pages(mapped[: mmap.PAGESIZE // 8], file)  # not a whole page
    assert torch.equal(mapped, values(8 * MIB))


@linux
def test_other_views_of_the_same_values_stay_readable(file: Path, mapped: torch.Tensor):
    view = mapped.view(-1, 1024)[7:].view(torch.uint8)
    copied = view.clone()
    release_pages(mapped, file)
    release_pages(view, file)
    assert torch.equal(view, copied)


def written(count: int) -> torch.Tensor:
    """Anonymous memory; of it, released pages would come back as zeros."""
    return values(count) + 1


@pytest.mark.parametrize("of", ["nothing", "a file", "no file", "another file", "a directory"])
def test_memory_of_any_other_kind_keeps_its_contents(file: Path, tmp_path: Path, of: str):
    paths = {
        "nothing": Path(),
        "a file": file,
        "no file": tmp_path / "nowhere",
        "another file": Path(sys.executable),
        "a directory": tmp_path,
    }
    memory = written(4 * MIB)
    release_pages(memory, paths[of])
    assert torch.equal(memory, written(4 * MIB))


def test_private_changes_of_a_mapping_of_another_file_stay(file: Path, tmp_path: Path):
    other = tmp_path / "other.bin"
    other.write_bytes(bytes(4 * MIB))
    private = torch.from_file(str(other), shared=False, size=MIB, dtype=torch.int32)
    private.fill_(7)
    release_pages(private, file)
    assert bool((private == 7).all())
    assert not any(other.read_bytes())


@pytest.mark.parametrize("shape", [(0,), (0, 5), (1,), (3, 4)])
def test_what_has_no_whole_page_is_left_alone(file: Path, shape: tuple[int, ...]):
    release_pages(torch.ones(shape), file)
    with safe_open(file, framework="pt") as reader:
        small = reader.get_tensor("small")
        release_pages(small, file)
        assert torch.equal(small, values(5))


@linux
def test_the_file_is_known_by_any_of_its_names(
    file: Path, mapped: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "link").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    for name in (file, tmp_path / "link", Path("model.safetensors"), tmp_path / "." / file.name):
        assert int(mapped.sum(dtype=torch.int64)) > 0
        before = resident_file_bytes()
        release_pages(mapped, name)
        assert before - resident_file_bytes() > 31 * MIB


@linux
@pytest.mark.parametrize("name", ["a b  c", "naïve ü", "new\nline", "back\\slash", "(deleted)"])
def test_strange_names_do_no_harm(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    path = tmp_path / name / "model.safetensors"
    save_file({"w": values(MIB)}, path)
    with safe_open(path, framework="pt") as reader:
        tensor = reader.get_tensor("w")
        before = tensor.clone()
        release_pages(tensor, path)
        assert torch.equal(tensor, before)


@linux
def test_a_file_that_was_removed_or_replaced_does_no_harm(file: Path, mapped: torch.Tensor):
    expected = values(8 * MIB)
    assert torch.equal(mapped, expected)
    other = file.with_name("other")
    save_file({"large": values(8 * MIB) * 0}, other)
    os.replace(other, file)
    release_pages(mapped, file)
    assert torch.equal(mapped, expected)
    file.unlink()
    release_pages(mapped, file)
    assert torch.equal(mapped, expected)


def test_other_systems_are_left_alone(
    file: Path, mapped: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(mapped_pages.sys, "platform", "darwin")
    monkeypatch.setattr(memory_advice, "_libc", lambda: pytest.fail("it called the system"))
    release_pages(mapped, file)
    assert torch.equal(mapped, values(8 * MIB))
