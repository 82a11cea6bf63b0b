"""mergekit in an environment of its own, and the models that it and we merge."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import pytest

from tests.mergekit.models import save_models

VERSION = "0.1.5"
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("in_mergekit.py")


@dataclass
class Mergekit:
    """Runs jobs of `in_mergekit.py`, many in one process.

    Attributes:
        python: mergekit's interpreter.
        root: where its output goes.
    """

    python: str
    root: Path
    _runs: int = field(default=0, init=False)

    def merge(self, recipes: dict[str, Path], **options: Any) -> dict[str, Path]:
        """Run recipe files, and say where each one's output is."""
        outs = {name: self.root / name for name in recipes}
        self.run(
            {
                name: {"recipe": str(recipe), "out": str(outs[name]), "options": options}
                for name, recipe in recipes.items()
            }
        )
        return outs

    def run(self, jobs: dict[str, dict[str, Any]]) -> None:
        """Run jobs, all of which must succeed."""
        self._runs += 1
        jobs_file = self.root / f"jobs-{self._runs}.json"
        results_file = self.root / f"results-{self._runs}.json"
        jobs_file.write_text(json.dumps(jobs), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            [self.python, SCRIPT, jobs_file, results_file],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.fail(f"mergekit's process failed:\n{done.stderr[-3000:]}", pytrace=False)
        results = json.loads(results_file.read_text(encoding="utf-8"))
        assert results["mergekit"] == VERSION, f"{self.python} has mergekit {results['mergekit']}"
        assert not results["errors"]


@pytest.fixture(scope="session")
def mergekit(tmp_path_factory: pytest.TempPathFactory) -> Mergekit:
    python = os.environ.get("MERGEKIT_PYTHON") or str(ROOT / ".venv-mergekit" / "bin" / "python")
    if not Path(python).is_file():
        pytest.fail(
            f"there is no {python}; run `make test-mergekit`, or name an interpreter that has "
            f"mergekit {VERSION} with MERGEKIT_PYTHON",
            pytrace=False,
        )
    return Mergekit(python, tmp_path_factory.mktemp("mergekit"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of the families of `models.py`."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def write_recipes(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]):
    """Writes recipe texts, in which `$name` stands for a model's directory, to files."""

    def write(texts: dict[str, str], paths: dict[str, Path] | None = None) -> dict[str, Path]:
        root = tmp_path_factory.mktemp("recipes")
        files = {}
        for name, text in texts.items():
            files[name] = root / f"{name}.yml"
            files[name].write_text(Template(text).substitute(paths or models), encoding="utf-8")
        return files

    return write
