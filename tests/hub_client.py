"""What tests/test_hub.py does with a hub, in a process of its own: HF_ENDPOINT is read at import.

    HF_ENDPOINT=http://… HF_HOME=… python -m tests.hub_client WORK TOKEN

prints one JSON object: step -> what came of it. WORK holds `base`, a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import LlamaForCausalLM

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.checkpoint import Checkpoint, open_checkpoint
from tests.conftest import all_bytes

results: dict[str, Any] = {}


def step(name: str, action: Callable[[], Any]) -> Any:
    """Note what an action returns, or which error it raises."""
    try:
        value = action()
    except Exception as error:
        results[name] = {"error": type(error).__name__, "message": str(error)}
        return None
    results[name] = {"value": value}
    return value


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.iterdir())
        if file.is_file()
    }


def opened(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which files came, and the sum of one tensor."""
    first = checkpoint[min(checkpoint)]
    return {
        "files": sorted(
            p.relative_to(checkpoint.path).as_posix() for p in checkpoint.path.rglob("*")
        ),
        "names": sorted(checkpoint),
        "sum": float(first.to(torch.float64).sum()),
    }


def weights(model: LlamaForCausalLM) -> str:
    """SHA-256 of every bit of a live model."""
    digest = hashlib.sha256()
    for name, data in sorted(all_bytes(model).items()):
        digest.update(name.encode() + data)
    return digest.hexdigest()


def main(work: Path, token: str) -> None:
    """Every step in turn."""
    for name in ("both", "pickled", "sharded", "missing", "weightless", "foreign"):
        step(name, lambda name=name: opened(open_checkpoint(f"org/{name}")))
    step("main", lambda: opened(open_checkpoint("org/base")))
    step("v1", lambda: opened(open_checkpoint("org/base", "v1")))
    step("no revision", lambda: opened(open_checkpoint("org/base", "v9")))
    step("no adapter", lambda: str(Adapter.from_pretrained("org/missing")))
    step("no adapter revision", lambda: str(Adapter.from_pretrained("org/base", revision="v9")))
    step("a model as an adapter", lambda: str(Adapter.from_pretrained("org/both-again")))

    def extracted() -> dict[str, Any]:
        adapter = dare_adapters.extract(
            "org/base",
            "org/finetuned",
            work / "adapter",
            revision="v1",
            finetuned_revision="main",
            progress=False,
        )
        config = adapter.config
        return {
            "base": [config.base_model_name_or_path, config.revision],
            "finetuned": config.finetuned_model,
            "files": digests(work / "adapter"),
        }

    step("extract", extracted)
    adapter = Adapter.open(work / "adapter")
    step("push", lambda: adapter.push_to_hub("org/adapter", private=True, token=token))
    step("push, no token", lambda: adapter.push_to_hub("org/adapter", token=False))
    step("pull, no token", lambda: str(Adapter.from_pretrained("org/adapter", token=False)))
    step("pull", lambda: digests(Adapter.from_pretrained("org/adapter", token=token).path))

    live = LlamaForCausalLM.from_pretrained(work / "base", dtype="auto")
    step("base weights", lambda: weights(live))
    live.load_dare_adapter(work / "adapter", "local")
    step("local weights", lambda: weights(live))
    live.delete_dare_adapter("local")
    step("load", lambda: live.load_dare_adapter("org/adapter", revision="main", token=token))
    step("hub weights", lambda: weights(live))
    step(
        "save",
        lambda: live.save_dare_adapter(
            work / "saved",
            push_to_hub=True,
            repo_id="org/second",
            token=token,
            commit_message="From a live model",
        ),
    )
    step("second", lambda: digests(Adapter.from_pretrained("org/second").path))
    time.sleep = lambda _: None  # the client waits between its attempts
    step("broken checkpoint", lambda: opened(open_checkpoint("org/broken")))
    step("broken adapter", lambda: str(Adapter.from_pretrained("org/broken-adapter")))

    constants.HF_HUB_OFFLINE = True  # from here on only what is there already
    for name in ("both", "pickled", "never"):
        step(f"offline {name}", lambda name=name: opened(open_checkpoint(f"org/{name}")))
    step("offline adapter", lambda: digests(Adapter.from_pretrained("org/second").path))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    print(json.dumps(results))
