"""An adapter directory as a source of deltas: open, verify, copy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dare_adapters.config import (
    CONFIG_NAME,
    FLOATS,
    WEIGHTS_NAME,
    AdapterConfig,
    ParameterEntry,
    tensor_key,
)
from dare_adapters.delta import Delta, DenseDelta, NewParameter
from dare_adapters.errors import AdapterFormatError, AdapterNotFoundError
from dare_adapters.finite import first_non_finite
from dare_adapters.mask import BernoulliSupport, BlockedSupport, Support, matrix_shape
from dare_adapters.output import complete_directory
from dare_adapters.source import WHOLE, DeltaSource
from dare_adapters.sparse_delta import SparseDelta
from dare_adapters.stored_support import SupportEncoding, decode_support
from dare_adapters.tensor_file import file_sha256

__all__ = ["Adapter", "download_adapter", "resolve_adapter"]


class Adapter(DeltaSource):
    """One adapter; a parameter is read when it is asked for.

    Open one with :meth:`open` or :meth:`from_pretrained`.

    Attributes:
        path: the directory.
        config: its adapter_config.json.
    """

    def __init__(self, path: Path, config: AdapterConfig, reader: Any) -> None:
        self.path, self.config = path, config
        self._reader = reader
        self._mapped: dict[str, torch.Tensor] = {}
        self.label = str(path)
        self.base_model_name_or_path, self.revision = (
            config.base_model_name_or_path,
            config.revision,
        )
        self.base_architectures = config.base_architectures
        self.base_parameter_count = config.base_parameter_count
        self.witness = config.witness

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Adapter:
        """Open an adapter directory.

        Every tensor's name, dtype and shape is compared with the config before any is read.

        Args:
            path: the directory.
            verify: also compare the SHA-256 of the tensors file, and look at every number in it.

        Raises:
            AdapterNotFoundError: there is no adapter.
            AdapterFormatError: it is damaged or contradicts itself.
        """
        with cls.opening(path, verify=verify) as adapter:
            return adapter

    @classmethod
    @contextmanager
    def opening(cls, path: str | Path, *, verify: bool = True) -> Iterator[Adapter]:
        """:meth:`open` for the work of a block, at whose end the file is known to be sound.

        Hashing it takes longer than all else: meanwhile the block may look at what there is, and
        must not change anything by it that it cannot take back.
        """
        path = Path(path)
        if not (path / CONFIG_NAME).is_file():
            raise AdapterNotFoundError(f"{path}: no {CONFIG_NAME}; this is not an adapter")
        config = AdapterConfig.load(path)
        weights = path / WEIGHTS_NAME
        if not weights.is_file():
            raise AdapterNotFoundError(f"{path}: {CONFIG_NAME} is there, {WEIGHTS_NAME} is not")
        with ThreadPoolExecutor(1) as beside:  # hashing holds no Python lock
            digest = beside.submit(file_sha256, weights) if verify else None
            try:
                yield cls._open(path, config, verify)
            finally:  # whatever else is wrong, a damaged file is the reason
                if digest is not None and digest.result() != config.sha256:
                    raise AdapterFormatError(
                        f"{weights}: its SHA-256 is not the one in {CONFIG_NAME}; the file is "
                        "truncated, damaged or of another adapter: get it again"
                    )

    @classmethod
    def _open(cls, path: Path, config: AdapterConfig, verify: bool) -> Adapter:
        weights = path / WEIGHTS_NAME
        try:
            reader: Any = safe_open(weights, framework="pt")
            found = {key: _describe(reader, key) for key in reader.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterFormatError(f"{weights}: not a safetensors file ({error})") from error
        _compare(weights, config.tensors(), found)
        adapter = cls(path, config, reader)
        if verify:
            for name in adapter:
                adapter.check(name)
        return adapter

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        verify: bool = True,
    ) -> Adapter:
        """Open a local adapter directory, or download one from the Hugging Face hub."""
        return cls.open(resolve_adapter(source, revision, token), verify=verify)

    def __getitem__(self, name: str) -> Delta | NewParameter:
        entry = self.config.parameters[name]
        if entry.kind == "new":
            return NewParameter(self._part(name, "value"))
        added = self._part(name, "rows") if entry.added_rows else None
        if entry.kind == "dense":
            return DenseDelta(self._part(name, "delta"), added)
        return self._sparse(name, entry, added)

    def __contains__(self, name: object) -> bool:
        return name in self.config.parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self.config.parameters)

    def __len__(self) -> int:
        return len(self.config.parameters)

    def __deepcopy__(self, memo: dict[int, object]) -> Adapter:
        return self  # nothing changes it

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path,)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Adapter({str(self.path)!r}, base={c.base_model_name_or_path!r}, method={c.method!r}, "
            f"drop_rate={c.drop_rate}, bits={c.bits}, parameters={len(self)})"
        )

    def is_new(self, name: str) -> bool:
        return self.config.parameters[name].kind == "new"

    def stored_bits(self, name: str) -> int:
        entry = self.config.parameters[name]
        return entry.bits if entry.kind == "sparse" and entry.bits is not None else WHOLE

    def added_row_count(self, name: str) -> int:
        return self.config.parameters[name].added_rows

    @property
    def identity(self) -> str:
        return self.config.sha256

    def deltas(self) -> Iterator[tuple[str, Delta]]:
        """The parameters that the base has too."""
        for name, entry in self.config.parameters.items():
            if entry.kind != "new":
                delta = self[name]
                assert isinstance(delta, Delta)
                yield name, delta

    @property
    def nbytes(self) -> int:
        """Bytes of config and tensors on disk."""
        return sum((self.path / name).stat().st_size for name in (CONFIG_NAME, WEIGHTS_NAME))

    def check(self, name: str) -> None:
        """Look at every stored number of one parameter.

        Raises:
            AdapterFormatError: NaN or infinity, a negative scale, a support outside the parameter
                or of another size than its values.
        """
        entry = self.config.parameters[name]
        for key, (dtype, _) in entry.tensors(name).items():
            if dtype not in FLOATS:
                continue  # every pattern of a whole number's bits is one
            tensor = self._tensor(key)
            if first_non_finite(tensor.view(-1)) is not None:
                raise AdapterFormatError(f"{self.path}: {key} holds NaN or infinity")
            if key.endswith("_scales") and bool((tensor < 0).any()):
                raise AdapterFormatError(f"{self.path}: {key} holds a negative scale")
        if entry.kind == "sparse":
            delta = self[name]
            assert isinstance(delta, SparseDelta)
            if entry.slots is not None and delta.support.slot_count != entry.slots:
                raise AdapterFormatError(
                    f"{self.path}: the support of {name} has {delta.support.slot_count} entries, "
                    f"the config says {entry.slots}"
                )
            delta.check_sizes(name)

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Copy the adapter, with its companions and model card, to another directory."""
        out = Path(out)
        with complete_directory(out, overwrite) as directory:
            # The config last: a directory without it is not an adapter.
            files = sorted(self.path.iterdir(), key=lambda file: file.name == CONFIG_NAME)
            for file in files:
                if file.is_file():
                    shutil.copyfile(file, directory / file.name)
        return out

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload DARE adapter",
    ) -> str:
        """Upload the adapter to the Hugging Face hub; the address of the commit."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=self.path,
            revision=revision,
            commit_message=commit_message,
        )
        return str(done.commit_url)

    def _part(self, name: str, part: str) -> torch.Tensor:
        return self._tensor(tensor_key(name, part))

    def _tensor(self, key: str) -> torch.Tensor:
        """A tensor of the file, mapped; asking the reader again costs more than remembering it."""
        if key not in self._mapped:
            self._mapped[key] = self._reader.get_tensor(key)
        return self._mapped[key]

    def _sparse(self, name: str, entry: ParameterEntry, added: torch.Tensor | None) -> SparseDelta:
        assert entry.bits is not None
        return SparseDelta(
            entry.shape,
            self._support(name, entry),
            entry.bits,
            self._part(name, "values").view(-1),
            self._part(name, "scales") if entry.bits < 16 else None,
            entry.exponent,
            added,
        )

    def _support(self, name: str, entry: ParameterEntry) -> Support:
        rows, columns = matrix_shape(entry.shape)
        seed = self.config.seed
        if entry.mask == "blocked":
            assert entry.block is not None
            return BlockedSupport(seed, name, rows, columns, entry.block)
        if entry.mask == "bernoulli":
            assert entry.drop_rate is not None
            return BernoulliSupport(seed, name, rows, columns, entry.drop_rate)
        data = self._part(name, "support").numpy()
        encoding: SupportEncoding = "bitmap" if entry.mask == "bitmap" else "gaps"
        return decode_support(encoding, data, rows, columns, name)


def _reopen(path: Path) -> Adapter:
    """An adapter that was pickled, from its directory: it does not travel with the model."""
    return Adapter.open(path, verify=False)


def resolve_adapter(
    source: str | Path, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The local directory of an adapter, downloaded where `source` is a hub id.

    Raises:
        AdapterNotFoundError: it is neither a directory nor on the hub.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise AdapterNotFoundError(f"{source} is a file; an adapter is a directory")
    return download_adapter(str(source), revision, token)


def download_adapter(
    repo_id: str, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The local directory of an adapter of the hub, whatever is at that path on this machine.

    Raises:
        AdapterNotFoundError: it is not on the hub.
    """
    from huggingface_hub import snapshot_download

    # Of a repository that is a whole model by mistake, not its weights.
    wanted = [WEIGHTS_NAME, "*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*"]
    try:
        found = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            allow_patterns=wanted,
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # of the hub's client, its HTTP library, or the disk
        raise AdapterNotFoundError(
            f"{repo_id!r} is neither a directory nor an adapter that the hub can give: {error}"
        ) from error
    return Path(found)


def _describe(reader: Any, key: str) -> tuple[str, tuple[int, ...]]:
    view = reader.get_slice(key)
    return view.get_dtype(), tuple(view.get_shape())


def _compare(
    file: Path,
    expected: dict[str, tuple[str, tuple[int, ...]]],
    found: dict[str, tuple[str, tuple[int, ...]]],
) -> None:
    """Refuse a tensors file that is not what its config says.

    Raises:
        AdapterFormatError: the first tensor that is missing, unknown, or of another kind.
    """
    for key in expected.keys() | found.keys():
        if expected.get(key) != found.get(key):
            raise AdapterFormatError(
                f"{file}: {key} is {_tell(found.get(key))}, the config says "
                f"{_tell(expected.get(key))}"
            )


def _tell(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} {list(tensor[1])}"
