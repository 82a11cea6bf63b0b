"""Run by mergekit's interpreter, which has nothing of this repository: JOBS.json to RESULTS.json.

A job is a recipe to run, or a method to apply to tensors again and again with one seed after the
other. One process does them all, since importing mergekit takes longer than a small merge.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import merge_tensors
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

Json = dict[str, Any]


def run_recipe(job: Json) -> None:
    """What `mergekit-yaml RECIPE OUT` does, with the options of a job."""
    text = Path(job["recipe"]).read_text(encoding="utf-8")
    configuration = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions(quiet=True, write_model_card=False, **job["options"])
    run_merge(configuration, job["out"], options, config_source=text)


def draw(job: Json) -> None:
    """A method's results from seeds 0 … `seeds` - 1, stacked, of every tensor of a base."""
    models = [load_file(path) for path in (job["base"], *job["models"])]
    found: dict[str, list[torch.Tensor]] = {name: [] for name in models[0]}
    for seed in range(job["seeds"]):
        torch.manual_seed(seed)
        for name in sorted(found):
            tensors = [model[name] for model in models]
            found[name].append(
                merge_tensors(tensors, job["method"], parameters=job["parameters"], base_index=0)
            )
    save_file({name: torch.stack(drawn) for name, drawn in found.items()}, job["out"])


def main(jobs_file: Path, results_file: Path) -> None:
    results: Json = {"mergekit": importlib.metadata.version("mergekit"), "errors": {}}
    for name, job in json.loads(jobs_file.read_text(encoding="utf-8")).items():
        try:
            (draw if "method" in job else run_recipe)(job)
        except Exception as error:
            results["errors"][name] = f"{type(error).__name__}: {error}"
    results_file.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
