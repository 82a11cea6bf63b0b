"""The version guard: what this plugin hooks in vLLM is private, and changes without notice."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dare_adapters.errors import DareError

__all__ = ["TESTED_VERSIONS", "Hook", "UnsupportedVersionError", "check_hooks"]

TESTED_VERSIONS = ("0.32.0",)

logger = logging.getLogger("vllm.dare")


class UnsupportedVersionError(DareError, ImportError):
    """This vLLM is not one that the plugin works with."""


@dataclass(frozen=True)
class Hook:
    """Something private of vLLM that this plugin calls or replaces.

    Attributes:
        path: "module:Class.function", "module:function" or "module:Class".
        parameters: names of its parameters in their order, `self` and stars included; None: only
            that it exists.
    """

    path: str
    parameters: tuple[str, ...] | None = None


def check_hooks(hooks: Iterable[Hook]) -> None:
    """Compare hooks with what they were in the tested versions.

    A version that was not tested but whose hooks are the same is warned of once, not refused.

    Raises:
        UnsupportedVersionError: the first hook that is missing, or takes other parameters.
    """
    from vllm.version import __version__ as version

    for hook in hooks:
        found = _parameters(hook, version)
        if hook.parameters is not None and found != hook.parameters:
            raise UnsupportedVersionError(
                f"vLLM {version}: {hook.path} takes ({', '.join(found)}), not "
                f"({', '.join(hook.parameters)}); {_advice()}"
            )
    if version.split("+")[0] not in TESTED_VERSIONS and version not in _warned:
        _warned.add(version)
        logger.warning(
            "vLLM %s was not tested with dare-adapters, but all that is hooked looks the same; "
            "tested: %s",
            version,
            ", ".join(TESTED_VERSIONS),
        )


_warned: set[str] = set()
_STARS: dict[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


def _parameters(hook: Hook, version: str) -> tuple[str, ...]:
    module, _, names = hook.path.partition(":")
    try:
        found = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
        if hook.parameters is None:
            return ()
        parameters = inspect.signature(found).parameters.values()  # type: ignore[arg-type]
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UnsupportedVersionError(
            f"vLLM {version}: {hook.path} is not there ({error}); {_advice()}"
        ) from error
    return tuple(_STARS.get(parameter.kind, "") + parameter.name for parameter in parameters)


def _advice() -> str:
    return (
        "this release of dare-adapters works with vLLM "
        f"{', '.join(TESTED_VERSIONS)}: install that, or set VLLM_PLUGINS to the plugins that you "
        "want without dare"
    )
