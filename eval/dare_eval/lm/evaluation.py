"""One decoder on one task of the harness: its score, and what it wrote."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_eval.errors import DataNotFoundError
from dare_eval.lm.harness import TASKS_DIRECTORY
from dare_eval.lm.sandbox.run import require_sandbox

if TYPE_CHECKING:
    from lm_eval.api.model import LM

__all__ = ["PAPER_TASKS", "Evaluation", "RefusedCodeError", "check_task"]

PAPER_TASKS = {
    name: f"dare_{name}" for name in ("gsm8k", "math", "humaneval", "mbpp", "alpaca_eval")
}
"""The names of this package's tasks; any other name is one of the harness's own."""

_SEED = 1234  # the harness's own
_RUNS_CODE = ("humaneval", "mbpp")


class RefusedCodeError(ValueError):
    """A task runs generated programs, and nobody allowed it."""


@dataclass(frozen=True)
class Evaluation:
    """How a task is evaluated.

    Attributes:
        data_dir: see :mod:`dare_eval.lm.documents`.
        limit: of documents, the first ones; None: all.
        max_tokens: of a completion; None: the task's.
        allow_code_execution: run generated programs, in the sandbox.
        outputs: directory for what was written; None: nowhere.
    """

    data_dir: str | None = None
    limit: int | None = None
    max_tokens: int | None = None
    allow_code_execution: bool = False
    outputs: Path | None = None

    def config(self) -> dict[str, Any]:
        """What a result depends on."""
        return {"limit": self.limit, "max_tokens": self.max_tokens}

    def measure(self, model: LM, task: str, file: str, generator: str) -> dict[str, Any]:
        """Evaluate a model on a task.

        Args:
            model: of the harness.
            task: of PAPER_TASKS, or the harness's own.
            file: stem of what is written to `outputs`.
            generator: name of the model, in AlpacaEval's format.

        Returns:
            `score`, `metric` (its name), `scores` (of all metrics), `stderr`, `documents`,
            `task_version`, and `outputs`, the name of the file.

        Raises:
            DataNotFoundError: there is no such task, or its documents are not to be had.
            RefusedCodeError: it runs code, which is not allowed.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager
        from transformers import set_seed

        check_task(task, self.allow_code_execution)
        full_name = PAPER_TASKS.get(task, task)
        manager = TaskManager(
            include_path=str(TASKS_DIRECTORY),
            include_defaults=task not in PAPER_TASKS,
            metadata={"data_dir": self.data_dir} if self.data_dir is not None else None,
        )
        # Its `simple_evaluate` also asks pip for every package's version, which takes longer than
        # a small cell.
        try:
            loaded = manager.load([full_name])
        except KeyError as error:
            raise DataNotFoundError(
                f"there is no task {task!r}: neither one of {', '.join(PAPER_TASKS)} nor one that "
                "`dare-eval lm harness ls tasks` lists"
            ) from error
        for one in loaded["tasks"].values():
            self._set_up(one)
        set_seed(_SEED)
        found = evaluate(
            lm=model,
            task_dict=loaded,
            limit=self.limit,
            confirm_run_unsafe_code=self.allow_code_execution,
            log_samples=True,
        )
        metrics = found["results"].get(full_name)
        if metrics is None:
            raise DataNotFoundError(f"{task} has no score of its own; name one of its tasks")
        scores = {
            key.partition(",")[0]: value
            for key, value in metrics.items()
            if "," in key and "_stderr" not in key
        }
        metric = next(iter(scores))
        errors = (value for key, value in metrics.items() if key.startswith(f"{metric}_stderr,"))
        stderr = next(errors, None)
        samples = [sample for part in found["samples"].values() for sample in part]
        return {
            "score": scores[metric],
            "metric": metric,
            "scores": scores,
            "stderr": stderr if isinstance(stderr, float) else None,
            "documents": len(samples),
            "task_version": found["versions"].get(full_name),
            "outputs": self._write(task, file, generator, samples),
        }

    def _set_up(self, task: Any) -> None:
        """What the harness's command sets of a task."""
        if self.max_tokens is not None and task.get_config("output_type") == "generate_until":
            own = {"max_gen_toks": self.max_tokens}
            task.set_config(key="generation_kwargs", value=own, update=True)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)

    def _write(
        self, task: str, file: str, generator: str, samples: list[dict[str, Any]]
    ) -> str | None:
        if self.outputs is None:
            return None
        if task == "alpaca_eval":
            # https://github.com/tatsu-lab/alpaca_eval: --model_outputs
            text = json.dumps([_alpaca(sample, generator) for sample in samples], indent=1)
            path = self.outputs / f"{file}.json"
        else:
            text = "".join(json.dumps(_line(sample)) + "\n" for sample in samples)
            path = self.outputs / f"{file}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
        return path.name


def check_task(task: str, allow_code_execution: bool) -> None:
    """Refuse early what would be refused after hours.

    Raises:
        RefusedCodeError: it runs generated programs, which nobody allowed.
        SandboxUnavailableError: it does, and they cannot be contained here.
    """
    if task not in _RUNS_CODE:
        return
    if not allow_code_execution:
        raise RefusedCodeError(
            f"{task} runs programs that a model wrote; allow it with --allow-code-execution"
        )
    require_sandbox()


def _alpaca(sample: Mapping[str, Any], generator: str) -> dict[str, str]:
    document = sample["doc"]
    return {
        "dataset": document["dataset"],
        "instruction": document["instruction"],
        "output": sample["resps"][0][0].strip(),
        "generator": generator,
    }


def _line(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "document": sample["doc_id"],
        "target": sample["target"],
        "completions": [list(responses) for responses in sample["resps"]],
        **{metric: sample[metric] for metric in sample["metrics"]},
    }
