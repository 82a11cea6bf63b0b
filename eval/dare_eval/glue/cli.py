"""`dare-eval glue …`: the paper's experiments on encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from dare_eval.glue.tasks import chosen_tasks
from dare_eval.listed_options import listed, listed_rates

if TYPE_CHECKING:
    from dare_eval.glue.bench import TaskBench
    from dare_eval.glue.tasks import Task

__all__ = ["app"]

app = typer.Typer(
    help="Encoders on GLUE: train, drop, merge, fidelity.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Base = Annotated[str, typer.Argument(help="Base encoder: directory or hub id.")]
Tasks = Annotated[str, typer.Option(help="Names with commas between, or all.")]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Directory with glue/<task>/*.jsonl; default: the hub's data sets."),
]
RecordsDir = Annotated[Path, typer.Option("--records", help="Directory of records.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU if there is one.")
]
EvalRows = Annotated[int | None, typer.Option(min=1, help="Score on so many dev rows at most.")]
FineTunes = Annotated[
    list[str],
    typer.Argument(
        metavar="FINETUNED…", help="TASK=MODEL, or a directory that `glue train` filled."
    ),
]
SomeTasks = Annotated[str | None, typer.Option("--tasks", help="Only these, with commas between.")]
Seeds = Annotated[str, typer.Option(help="Of masks, with commas between.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens; longer texts are cut.")]
Value = TypeVar("Value")


@app.callback()
def _quietly() -> None:
    """Without transformers' report, at each base, of a head that a fine-tune is about to bring."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@app.command()
def train(  # noqa: PLR0917 (typer reads options from the signature)
    base: Base,
    out: Annotated[Path, typer.Option(help="Where the fine-tunes go, a folder for each task.")],
    tasks: Tasks = "all",
    data_dir: DataDir = None,
    records: RecordsDir = Path("records"),
    multi_task: Annotated[
        bool, typer.Option("--multi-task", help="One encoder for all tasks, a head for each.")
    ] = False,
    epochs: Annotated[float, typer.Option(min=0)] = 10,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens; longer texts are cut.")] = 128,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, help="Default: 1e-5, of MRPC 5e-5.")
    ] = None,
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Share of the steps.")] = 0.06,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.01,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    train_rows: Annotated[int | None, typer.Option(min=1, help="Train on so many at most.")] = None,
    held_out: Annotated[
        int, typer.Option(min=0, help="Training rows kept out, for choosing hyper-parameters.")
    ] = 256,
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="Pad less; the order is less random.")
    ] = False,
    start_from: Annotated[
        str | None,
        typer.Option(help="Fine-tune of BASE on another task whose encoder to go on with."),
    ] = None,
    eval_rows: EvalRows = None,
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace fine-tunes that exist.")] = False,
) -> None:
    """Fine-tune all parameters on GLUE; the defaults are MergeLM's."""
    chosen = chosen_tasks(tasks)
    from dare_eval.glue.train import TrainingSettings
    from dare_eval.glue.training import run_training
    from dare_eval.records import Records

    run_training(
        base,
        chosen,
        out,
        Records(records),
        TrainingSettings(
            epochs=epochs,
            batch_size=batch_size,
            max_length=max_length,
            learning_rate=learning_rate,
            warmup=warmup,
            weight_decay=weight_decay,
            seed=seed,
            train_rows=train_rows,
            held_out=held_out,
            group_by_length=group_by_length,
            start_from=start_from,
        ),
        data_dir=data_dir,
        multi_task=multi_task,
        eval_rows=eval_rows,
        device=device,
        overwrite=force,
    )


@app.command()
def drop(  # noqa: PLR0917 (typer reads options from the signature)
    base: Base,
    finetuned: FineTunes,
    tasks: SomeTasks = None,
    data_dir: DataDir = None,
    records: RecordsDir = Path("records"),
    methods: Annotated[
        str, typer.Option(help="dare, drop_only, magnitude, masked_weights (not the delta's).")
    ] = "dare,drop_only,magnitude,masked_weights",
    drop_rates: Annotated[str, typer.Option()] = "0.1,0.3,0.5,0.7,0.8,0.9,0.95,0.99",
    masks: Annotated[str, typer.Option(help="auto, blocked, bernoulli.")] = "auto",
    bits: Annotated[str, typer.Option(help="Of survivors; 32 rounds nothing.")] = "32",
    seeds: Seeds = "0,1,2",
    keep_vectors: Annotated[
        bool, typer.Option("--keep-vectors", help="Biases and norms whole, as adapters have them.")
    ] = False,
    max_length: MaxLength = 128,
    eval_rows: EvalRows = None,
    device: Device = None,
) -> None:
    """Score a task against the share of the delta that is dropped."""
    from dare_adapters.codec import BITS
    from dare_adapters.prune import MASKS
    from dare_eval.glue.drop import METHODS, DropAxes, run_drop
    from dare_eval.records import Records

    axes = DropAxes(
        methods=listed(methods, str, "--methods", METHODS),
        drop_rates=listed_rates(drop_rates),
        masks=listed(masks, str, "--masks", MASKS),
        bits=listed(bits, int, "--bits", BITS),
        seeds=listed(seeds, int, "--seeds"),
        keep_vectors=keep_vectors,
    )
    run_drop(
        _benches(base, finetuned, tasks, data_dir, eval_rows, max_length, device),
        Records(records),
        axes,
    )


@app.command()
def fidelity(
    base: Base,
    finetuned: FineTunes,
    tasks: SomeTasks = None,
    data_dir: DataDir = None,
    records: RecordsDir = Path("records"),
    points: Annotated[
        list[str] | None,
        typer.Option("--point", metavar="BITS:P,P…", help="Drop rates for a number of bits."),
    ] = None,
    lora_bits: Annotated[
        str, typer.Option(help="Sizes of low-rank extractions, bits a parameter; or none.")
    ] = "1,0.5,0.25,0.1",
    bitdelta: Annotated[bool, typer.Option(help="Sign and one scale a matrix.")] = True,
    seeds: Seeds = "0,1,2",
    max_length: MaxLength = 128,
    eval_rows: EvalRows = None,
    device: Device = None,
) -> None:
    """Score adapters by their size, beside BitDelta's rule and low-rank extractions."""
    from dare_adapters.codec import BITS
    from dare_eval.glue.fidelity import DEFAULT_POINTS, FidelityAxes, run_fidelity
    from dare_eval.records import Records

    chosen = {}
    for item in points or []:
        width, colon, rates = item.partition(":")
        if not colon:
            raise typer.BadParameter(f"{item!r} is not BITS:P,P…", param_hint="--point")
        chosen[listed(width, int, "--point", BITS)[0]] = listed_rates(rates, "--point")
    axes = FidelityAxes(
        points=chosen or DEFAULT_POINTS,
        seeds=listed(seeds, int, "--seeds"),
        lora_bits=[] if lora_bits == "none" else listed(lora_bits, float, "--lora-bits"),
        sign_and_scale=bitdelta,
    )
    run_fidelity(
        _benches(base, finetuned, tasks, data_dir, eval_rows, max_length, device),
        Records(records),
        axes,
    )


@app.command()
def merge(  # noqa: PLR0917 (typer reads options from the signature)
    base: Base,
    finetuned: FineTunes,
    tasks: SomeTasks = None,
    data_dir: DataDir = None,
    records: RecordsDir = Path("records"),
    methods: Annotated[
        str,
        typer.Option(
            help="With commas between; also breadcrumbs, breadcrumbs_ties, magnitude_prune, della, "
            "della_linear, sce, slerp, nuslerp, karcher, model_stock, widen."
        ),
    ] = "average,task_arithmetic,fisher,regmean,ties",
    sizes: Annotated[
        str, typer.Option(help="How many tasks at once: 2 is every pair; all.")
    ] = "2,all",
    dare: Annotated[str, typer.Option(help="without, with, or both.")] = "both",
    drop_rates: Annotated[str, typer.Option(help="DARE's, to choose among.")] = "0.5,0.9",
    seeds: Seeds = "0,1,2",
    selection_rows: Annotated[
        int, typer.Option(min=1, help="Training rows of each task that options are chosen on.")
    ] = 256,
    statistics_rows: Annotated[
        int, typer.Option(min=1, help="Training rows of each task for fisher and regmean.")
    ] = 256,
    max_length: MaxLength = 128,
    eval_rows: EvalRows = None,
    device: Device = None,
) -> None:
    """Merge the fine-tunes of several tasks, each with its own head, with and without DARE."""
    from dare_eval.glue.bench import find_finetuned
    from dare_eval.glue.merge import METHODS, OTHER_METHODS, MergeAxes, MergeBench, run_merge
    from dare_eval.records import Records

    both = {"without": (False,), "with": (True,), "both": (False, True)}
    if dare not in both:
        raise typer.BadParameter(f"{dare!r}; there are {', '.join(both)}", param_hint="--dare")
    chosen = _only(_usage(find_finetuned, finetuned), tasks)
    if len(chosen) < 2:
        raise typer.BadParameter("a merge needs the fine-tunes of two tasks or more")
    known = {**METHODS, **OTHER_METHODS}
    axes = MergeAxes(
        methods={name: known[name] for name in listed(methods, str, "--methods", known)},
        sizes=[None if size == "all" else _size(size) for size in listed(sizes, str, "--sizes")],
        dare=both[dare],
        drop_rates=listed_rates(drop_rates),
        seeds=listed(seeds, int, "--seeds"),
        selection_rows=selection_rows,
        statistics_rows=statistics_rows,
    )
    bench = MergeBench(
        base,
        chosen,
        data_dir=data_dir,
        eval_rows=eval_rows,
        max_length=max_length,
        device=device,
    )
    run_merge(bench, Records(records), axes)


def _benches(
    base: str,
    finetuned: list[str],
    tasks: str | None,
    data_dir: Path | None,
    eval_rows: int | None,
    max_length: int,
    device: str | None,
) -> Iterator[TaskBench]:
    """One after the other, so that only one task's models are in memory."""
    from dare_eval.glue.bench import TaskBench, find_finetuned

    for task, model in _only(_usage(find_finetuned, finetuned), tasks).items():
        yield TaskBench(
            base,
            task,
            model,
            data_dir=data_dir,
            eval_rows=eval_rows,
            max_length=max_length,
            device=device,
        )


def _only(found: dict[Task, str], tasks: str | None) -> dict[Task, str]:
    if tasks is None:
        return found
    chosen = chosen_tasks(tasks)
    for task in chosen:
        if task not in found:
            raise typer.BadParameter(f"there is no fine-tune of {task.name}", param_hint="--tasks")
    return {task: found[task] for task in chosen}


def _usage(function: Callable[[list[str]], Value], given: list[str]) -> Value:
    """A call whose ValueErrors are about the command's arguments."""
    try:
        return function(given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _size(text: str) -> int:
    size = listed(text, int, "--sizes")[0]
    if size < 2:
        raise typer.BadParameter(f"{size} tasks are no merge", param_hint="--sizes")
    return size
