"""`dare-eval lm …`: the paper's experiments on decoders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from dare_eval.listed_options import listed, listed_rates

if TYPE_CHECKING:
    from dare_eval.lm.experiments import Laboratory

__all__ = ["app"]

app = typer.Typer(
    help="Decoders on GSM8K, MATH, HumanEval, MBPP, AlpacaEval: run, drop, merge.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Base = Annotated[str, typer.Argument(help="Base model: directory or hub id.")]
Tasks = Annotated[
    str,
    typer.Option(
        help="gsm8k, math, humaneval, mbpp, alpaca_eval, or tasks of the harness; commas between."
    ),
]
DataDir = Annotated[
    Path | None, typer.Option(help="Directory with the benchmarks' files; default: the hub.")
]
RecordsDir = Annotated[Path, typer.Option("--records", help="Directory of records.")]
Backend = Annotated[str, typer.Option(help="transformers or vllm.")]
ModelArguments = Annotated[
    str, typer.Option("--model-args", help="key=value of the harness's model, commas between.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents of each task, at most.")]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Of a completion; default: 1024 of GSM8K, else 2048.")
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code-execution", help="Run generated programs, in the sandbox."),
]
Work = Annotated[
    Path | None, typer.Option(help="Where deltas lie while they are needed; default: a temporary.")
]
Seeds = Annotated[str, typer.Option(help="Of masks, with commas between.")]


@app.command()
def run(
    base: Base,
    adapter: Annotated[
        list[str] | None, typer.Option(help="DARE or LoRA adapter, or mix; may be repeated.")
    ] = None,
    finetuned: Annotated[
        list[str] | None, typer.Option(help="Full fine-tune, as it is; may be repeated.")
    ] = None,
    tasks: Tasks = "gsm8k,math",
    data_dir: DataDir = None,
    records: RecordsDir = Path("records"),
    backend: Backend = "transformers",
    model_args: ModelArguments = "",
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    allow_code_execution: AllowCode = False,
    work: Work = None,
) -> None:
    """Score the base, adapters over it, and fine-tunes."""
    laboratory = _laboratory(**locals())
    laboratory.run(adapter or [], finetuned or [])


@app.command()
def drop(  # noqa: PLR0917
    base: Base,
    finetuned: Annotated[list[str], typer.Argument(help="Full fine-tunes of the base.")],
    tasks: Tasks = "gsm8k,math",
    methods: Annotated[
        str, typer.Option(help="dare, drop_only, magnitude, masked_weights (not the delta's).")
    ] = "dare,drop_only,magnitude",
    drop_rates: Annotated[str, typer.Option()] = "0.1,0.3,0.5,0.7,0.9,0.95,0.99",
    masks: Annotated[str, typer.Option(help="auto, blocked, bernoulli.")] = "auto",
    bits: Annotated[str, typer.Option(help="Of survivors; 32 rounds nothing.")] = "32",
    seeds: Seeds = "0",
    data_dir: DataDir = None,
    records: RecordsDir = Path("records"),
    backend: Backend = "transformers",
    model_args: ModelArguments = "",
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    allow_code_execution: AllowCode = False,
    work: Work = None,
) -> None:
    """Score fine-tunes against the share of their delta that is dropped."""
    from dare_adapters.codec import BITS
    from dare_adapters.prune import MASKS
    from dare_eval.lm.experiments import DROP_METHODS, DropAxes

    axes = DropAxes(
        methods=listed(methods, str, "--methods", DROP_METHODS),
        drop_rates=listed_rates(drop_rates),
        masks=listed(masks, str, "--masks", MASKS),
        bits=listed(bits, int, "--bits", BITS),
        seeds=listed(seeds, int, "--seeds"),
    )
    _laboratory(**locals()).drop(finetuned, axes)


@app.command()
def merge(  # noqa: PLR0917
    base: Base,
    models: Annotated[list[str], typer.Argument(help="Fine-tunes of the base, or adapters.")],
    tasks: Tasks = "gsm8k,math",
    combination_types: Annotated[
        str, typer.Option(help="Of `dare-adapters methods`, with commas between.")
    ] = "average,task_arithmetic",
    option: Annotated[
        list[str] | None,
        typer.Option(help="name=value for the types that know it, as density=0.2; repeatable."),
    ] = None,
    weight: Annotated[float, typer.Option(help="Of every model.")] = 1.0,
    drop_rates: Annotated[str, typer.Option(help="Of DARE before merging; 0: without.")] = "0,0.2",
    seeds: Seeds = "0",
    pairs: Annotated[bool, typer.Option("--pairs", help="Every pair, not all at once.")] = False,
    data_dir: DataDir = None,
    records: RecordsDir = Path("records"),
    backend: Backend = "transformers",
    model_args: ModelArguments = "",
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    allow_code_execution: AllowCode = False,
    work: Work = None,
) -> None:
    """Merge fine-tunes or adapters, with and without DARE, and score the results."""
    from dare_adapters.combine import method_names
    from dare_eval.lm.experiments import MergeAxes

    if len(models) < 2:
        raise typer.BadParameter("merging takes two models or more", param_hint="MODELS")
    axes = MergeAxes(
        combination_types=listed(combination_types, str, "--combination-types", method_names()),
        options=dict(_assignment(text, "--option") for text in option or []),
        weight=weight,
        drop_rates=listed_rates(drop_rates),
        seeds=listed(seeds, int, "--seeds"),
        pairs=pairs,
    )
    _laboratory(**locals()).merge(models, axes)


@app.command()
def check_scoring(
    tasks: Annotated[str, typer.Option()] = "gsm8k,math,humaneval,mbpp",
    data_dir: DataDir = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Problems of each.")] = None,
    allow_code_execution: AllowCode = False,
) -> None:
    """Prove the scoring: each benchmark is fed its own reference answers, then others'."""
    from rich.console import Console
    from rich.table import Table

    from dare_eval.lm.check_scoring import REFERENCES
    from dare_eval.lm.check_scoring import check_scoring as check
    from dare_eval.lm.evaluation import RefusedCodeError, check_task

    chosen = listed(tasks, str, "--tasks", list(REFERENCES))
    try:
        for task in chosen:
            check_task(task, allow_code_execution)
    except RefusedCodeError as error:
        raise typer.BadParameter(str(error)) from error
    table = Table("task", "problems", "own answer", "another's", "by chance")
    wrong = False
    for task in chosen:
        found = check(task, None if data_dir is None else str(data_dir), limit)
        shares = (f"{share:.2%}" for share in (found.own, found.others, found.chance))
        table.add_row(task, str(found.problems), *shares)
        wrong |= bool(found.failed)
    Console().print(table)
    if wrong:
        raise typer.Exit(1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def harness(context: typer.Context) -> None:
    """lm-evaluation-harness's own command line, with `--model dare` and the dare_ tasks."""
    from dare_eval.lm.harness import main

    main(context.args)


@app.command()
def hook(
    remove: Annotated[bool, typer.Option("--remove", help="Take it away again.")] = False,
) -> None:
    """Let this environment's plain `lm_eval` command know `--model dare`."""
    from dare_eval.lm.harness import TASKS_DIRECTORY, install_hook, remove_hook

    if remove:
        print("removed" if remove_hook() else "there was none")
        return
    print(
        f"{install_hook()} lets lm_eval know the models dare and dare-vllm; for the tasks give it"
    )
    print(f"--include_path {TASKS_DIRECTORY}")


def _laboratory(
    *,
    base: str,
    tasks: str,
    data_dir: Path | None,
    records: Path,
    backend: str,
    model_args: str,
    limit: int | None,
    max_tokens: int | None,
    allow_code_execution: bool,
    work: Path | None,
    **_: Any,
) -> Laboratory:
    """What every experiment has, from the options that all commands share."""
    from dare_eval.lm.decoder import BACKENDS
    from dare_eval.lm.evaluation import Evaluation, RefusedCodeError
    from dare_eval.lm.experiments import Laboratory
    from dare_eval.records import Records

    (backend,) = listed(backend, str, "--backend", list(BACKENDS))
    try:
        return Laboratory(
            base,
            listed(tasks, str, "--tasks"),
            Records(records),
            Evaluation(
                data_dir=None if data_dir is None else str(data_dir),
                limit=limit,
                max_tokens=max_tokens,
                allow_code_execution=allow_code_execution,
                outputs=records / "lm-outputs" / "completions",
            ),
            backend=backend,
            model_arguments=dict(
                _assignment(text, "--model-args") for text in model_args.split(",") if text
            ),
            work=work,
        )
    except RefusedCodeError as error:
        raise typer.BadParameter(str(error), param_hint="--tasks") from error


def _assignment(text: str, option: str) -> tuple[str, Any]:
    """name=value, the value as YAML reads it."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise typer.BadParameter(f"{text!r} is not name=value", param_hint=option)
    return name.strip(), yaml.safe_load(value)
