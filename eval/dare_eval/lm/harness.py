"""The harness with the models and tasks of this package: `dare-eval lm harness run …`.

lm-evaluation-harness 0.4 finds tasks in directories that it is told of, but has no entry point for
models. So they are registered by whoever imports this module and calls :func:`register`: this
package's own commands do, `python -m dare_eval.lm` is the harness's command with it, and after
:func:`install_hook` the plain `lm_eval` command does too.
"""

from __future__ import annotations

import site
import sys
import sysconfig
from pathlib import Path

__all__ = ["MODELS", "TASKS_DIRECTORY", "install_hook", "main", "register", "remove_hook"]

TASKS_DIRECTORY = Path(__file__).with_name("tasks")
MODELS = {
    "dare": "dare_eval.lm.transformers_model:DareLM",
    "dare-vllm": "dare_eval.lm.vllm_model:DareVLLM",
}

_HOOK = "dare_eval_lm_harness.pth"
# Runs when Python starts: for any other program than the harness it compares a word.
_HOOK_LINE = (
    "import sys; any(word.endswith(('lm_eval', 'lm-eval')) for word in sys.orig_argv) "
    "and __import__('dare_eval.lm.harness').lm.harness.register_when_imported()\n"
)


def register() -> None:
    """Give the harness the models `dare` and `dare-vllm`; calling it again does nothing."""
    import lm_eval.models  # noqa: F401 (its own come first)
    from lm_eval.api.registry import model_registry

    for name, target in MODELS.items():
        if name not in model_registry:
            model_registry.register(name, target=target)


def register_when_imported() -> None:
    """Call :func:`register` as soon as the harness has its own models."""
    from dare_adapters.on_import import after_import

    after_import("lm_eval.models", register)


def install_hook(directory: Path | None = None) -> Path:
    """Let the plain `lm_eval` command of this environment know the models, until it is removed.

    Args:
        directory: of site-packages; default: this environment's.

    Returns:
        The file that does it, which Python's `site` reads.
    """
    path = _hook(directory)
    partial = path.with_suffix(".partial")
    partial.write_text(_HOOK_LINE, encoding="utf-8")
    partial.replace(path)
    return path


def remove_hook(directory: Path | None = None) -> bool:
    """Undo :func:`install_hook`; False if there was nothing to undo."""
    path = _hook(directory)
    if not path.exists():
        return False
    path.unlink()
    return True


def main(arguments: list[str] | None = None) -> None:
    """The harness's own command line, with these models and tasks.

    Args:
        arguments: default: those of the process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in ("run", "ls", "validate"):
        command, rest = given[0], given[1:]
    else:
        command, rest = ("run", given) if given else ("", [])
    if command and not any(word.startswith("--include_path") for word in rest):
        rest = [*rest, "--include_path", str(TASKS_DIRECTORY)]
    sys.argv = ["lm-eval", *([command] if command else []), *rest]
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def _hook(directory: Path | None) -> Path:
    if directory is None:
        directory = Path(sysconfig.get_path("purelib"))
        if sys.prefix == sys.base_prefix and not directory.is_dir():
            directory = Path(site.getusersitepackages())
    return directory / _HOOK
