"""`dare-eval glue …`: the paper's experiments on encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dare_eval.glue.tasks import chosen_tasks

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
EvalRows = Annotated[int | None, typer.Option(min=1, help="Score on so many dev rows at most.")]


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
    eval_rows: EvalRows = None,
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
        ),
        data_dir=data_dir,
        multi_task=multi_task,
        eval_rows=eval_rows,
        overwrite=force,
    )
