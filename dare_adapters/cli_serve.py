"""`dare-adapters serve`: vLLM's OpenAI server over one base, with adapters to choose from."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Annotated

import typer
from rich.markup import escape

from dare_adapters.checkpoint import read_json
from dare_adapters.config import CONFIG_NAME
from dare_adapters.errors import AdapterExistsError, AdapterFormatError, DareError
from dare_adapters.lora import LoraAdapter
from dare_adapters.open_source import open_source
from dare_adapters.source import DeltaSource

__all__ = ["serve"]

PLUGIN = "dare"
# What vLLM takes for --max-lora-rank.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def serve(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="Base model: directory or hub id.")],
    mixture: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='Add this to the base while it loads: {"adapters": ["DIR", …], …}; fields as in '
            "docs/vllm.md.",
        ),
    ] = None,
    hot_swap: Annotated[
        bool, typer.Option(help="Let clients change the mixture: POST /v1/dare/mixture.")
    ] = False,
    load_at_run_time: Annotated[
        bool, typer.Option(help="Let clients load adapters: POST /v1/load_lora_adapter.")
    ] = False,
    spare_rows: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Vocabulary rows kept free for tokens that adapters add; as many as the adapters "
            "given here need, by default.",
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print vLLM's command and do not run it.")
    ] = False,
) -> None:
    """Serve BASE with vLLM: adapters as NAME=DIR, then vLLM's own options.

    Clients choose with model=NAME; the base answers to model=BASE. The options listed here come
    before BASE; those after the adapters go to vLLM: --port 8001 --api-key KEY --dtype bfloat16 …
    """
    from dare_adapters.cli import err, out

    try:
        modules, options = _split(context.args)
        if not show and importlib.util.find_spec("vllm") is None:
            raise DareError(
                "vLLM is not installed here: pip install 'dare-adapters[vllm]', in an environment "
                "of its own (docs/vllm.md)"
            )
        sources = {name: open_source(path, verify=False) for name, path in modules.items()}
        arguments = [
            *("--model", base),
            *_lora_options(modules, sources, load_at_run_time),
            *_loading_options(mixture, _needed_rows(sources) if spare_rows is None else spare_rows),
            *options,
        ]
    except DareError as error:
        err.print(f"[red]{type(error).__name__}[/]: {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    environment = _environment(hot_swap, load_at_run_time)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    if show:
        settings = [f"{key}={shlex.quote(value)}" for key, value in environment.items()]
        out.print(escape(" ".join([*settings, shlex.join(command)])), soft_wrap=True)
        return
    sys.stdout.flush()
    os.execve(sys.executable, command, {**os.environ, **environment})


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Adapters by name, up to the first option, and vLLM's options."""
    first = next((n for n, item in enumerate(arguments) if item.startswith("-")), len(arguments))
    modules: dict[str, str] = {}
    for item in arguments[:first]:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise DareError(f"{item!r} is not NAME=DIR: a name for clients, and an adapter")
        if name in modules:
            raise AdapterExistsError(f"two adapters are called {name!r}")
        modules[name] = path
    return modules, list(arguments[first:])


def _lora_options(
    modules: Mapping[str, str], sources: Mapping[str, DeltaSource], at_run_time: bool
) -> list[str]:
    """What vLLM needs to know of adapters, which travel as its LoRA modules."""
    if not modules and not at_run_time:
        return []
    options = ["--enable-lora"]
    if modules:
        options += ["--lora-modules", *(f"{name}={path}" for name, path in modules.items())]
        options += ["--max-loras", str(len(modules))]
    if at_run_time or any(not isinstance(source, LoraAdapter) for source in sources.values()):
        options.append(
            "--enforce-eager"
        )  # graphs hold no delta of a request: all are refused there
    ranks = [_rank(source) for source in sources.values() if isinstance(source, LoraAdapter)]
    if ranks:
        fitting = [rank for rank in _RANKS if rank >= max(ranks)]
        if not fitting:
            raise DareError(f"a LoRA has rank {max(ranks)}; vLLM serves up to {_RANKS[-1]}")
        options += ["--max-lora-rank", str(fitting[0])]
    return options


def _rank(source: LoraAdapter) -> int:
    config = read_json(source.path / CONFIG_NAME, AdapterFormatError)
    patterns = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    return max((rank for rank in ranks if isinstance(rank, int)), default=1)


def _needed_rows(sources: Mapping[str, DeltaSource]) -> int:
    """How many tokens the adapters have at most that the base does not; LoRAs add none."""
    ours = [source for source in sources.values() if not isinstance(source, LoraAdapter)]
    return max((source.added_row_count(name) for source in ours for name in source), default=0)


def _loading_options(mixture: str | None, spare_rows: int) -> list[str]:
    config: dict[str, object] = {}
    if mixture is not None:
        try:
            config = json.loads(mixture)
        except ValueError as error:
            raise DareError(f"--mixture is not JSON ({error})") from error
        if not isinstance(config, dict) or not config.get("adapters"):
            raise DareError('--mixture must be an object with adapters: {"adapters": ["DIR"]}')
    if spare_rows:
        config = {**config, "spare_rows": spare_rows}
    if not config:
        return []
    return ["--load-format", PLUGIN, "--model-loader-extra-config", json.dumps(config)]


def _environment(hot_swap: bool, load_at_run_time: bool) -> dict[str, str]:
    """Variables of vLLM that open what it keeps shut by default."""
    found: dict[str, str] = {}
    if load_at_run_time:
        found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if hot_swap:
        # Routes of plugins are there only where this names them, and then no other plugin is.
        named = os.environ.get("VLLM_PLUGINS")
        plugins = (
            [point.name for point in entry_points(group="vllm.general_plugins")]
            if named is None
            else named.split(",")
        )
        found["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*filter(None, plugins), PLUGIN]))
    return found
