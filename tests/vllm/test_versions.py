"""The version guard: what is hooked is what it was, or the engine does not start."""

from __future__ import annotations

import importlib
import importlib.util
import logging

import pytest

vllm = pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm

import dare_vllm  # noqa: E402 (only where vLLM is)
from dare_vllm import versions  # noqa: E402
from dare_vllm.versions import TESTED_VERSIONS, Hook, UnsupportedVersionError  # noqa: E402

LOADER = "vllm.model_executor.model_loader.default_loader:DefaultModelLoader"


def test_every_hook_of_every_way_is_what_it_was() -> None:
    hooks = [
        hook
        for way in dare_vllm.WAYS
        if importlib.util.find_spec(f"dare_vllm.{way}")
        for hook in importlib.import_module(f"dare_vllm.{way}.hooks").HOOKS
    ]
    assert len(hooks) > 20
    versions.check_hooks(hooks)
    assert vllm.__version__ in TESTED_VERSIONS


def test_another_signature_names_the_hook_and_the_versions_that_work() -> None:
    hook = Hook(f"{LOADER}.get_all_weights", ("self", "model_config", "model", "device"))
    message = r"get_all_weights takes \(self, model_config, model\).*works with vLLM 0\.32\.0"
    with pytest.raises(UnsupportedVersionError, match=message):
        versions.check_hooks([hook])


@pytest.mark.parametrize("path", [f"{LOADER}.gone", "vllm.gone:anything"])
def test_a_hook_that_is_gone_is_named(path: str) -> None:
    with pytest.raises(UnsupportedVersionError, match=rf"{path} is not there"):
        versions.check_hooks([Hook(path)])


def test_an_untested_version_with_the_same_hooks_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.version.__version__", "0.32.9")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    hook = Hook(f"{LOADER}.get_all_weights", ("self", "model_config", "model"))
    with caplog.at_level(logging.WARNING, logger="vllm.dare"):
        versions.check_hooks([hook])
        versions.check_hooks([hook])
    # One record, however many handlers other tests have left on the way to the root.
    told = {id(r) for r in caplog.records if "vLLM 0.32.9 was not tested" in r.getMessage()}
    assert len(told) == 1


def test_registering_twice_is_registering_once() -> None:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    dare_vllm.register()
    first = type(get_model_loader(LoadConfig(load_format="dare")))
    dare_vllm.register()
    assert type(get_model_loader(LoadConfig(load_format="dare"))) is first
