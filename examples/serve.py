"""Two full fine-tunes of one base on one vLLM server, and what an OpenAI client asks of it.

    python examples/serve.py [--port 8000]

Runs in vLLM's environment (docs/vllm.md; here `.venv-vllm/bin/python`), with or without a GPU. It
makes two adapters of the tiny family beside this file, starts `dare-adapters serve`, asks the base
and each adapter the same, then swaps the base's own weights for a mixture while the server runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
import requests
from rich.console import Console
from rich.table import Table

import dare_adapters

FAMILY = Path(__file__).resolve().parent / "tiny_family"
SKILLS = ("reverse", "sort")
WORDS = ("cab", "bird", "lemon")
console = Console()


def make_adapters(work: Path) -> dict[str, Path]:
    """An adapter of each fine-tune, half of its delta dropped: these models are tiny."""
    for skill in SKILLS:
        dare_adapters.extract(
            FAMILY / "base", FAMILY / skill, work / skill, drop_rate=0.5, progress=False
        )
    return {skill: work / skill for skill in SKILLS}


def start_server(adapters: dict[str, Path], port: int, log: Path) -> subprocess.Popen[bytes]:
    """`dare-adapters serve`, once it answers; what it logs goes to a file."""
    call = [sys.executable, "-c", "from dare_adapters.cli import main; main()", "serve"]
    modules = [f"{name}={path}" for name, path in adapters.items()]
    options = ["--port", str(port), "--served-model-name", "base", "--max-model-len", "64"]
    options += ["--enforce-eager", "--load-format", "dare"]
    with log.open("wb") as file:
        server = subprocess.Popen(
            [*call, "--hot-swap", str(FAMILY / "base"), *modules, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ},
        )
    with console.status("vLLM starts (a minute or so, more on a busy machine)"):
        while server.poll() is None:
            try:
                if requests.get(f"http://localhost:{port}/health", timeout=5).ok:
                    return server
            except requests.RequestException:
                time.sleep(1)
    raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


def ask(client: openai.OpenAI, model: str, prompt: str) -> str:
    """What a model of the server says."""
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=16, temperature=0)
    return answer.choices[0].text.strip()


def show(client: openai.OpenAI, title: str, models: tuple[str, ...]) -> None:
    """Answers to both skills' prompts, a column for each model."""
    table = Table("prompt", *models, title=title)
    for skill in SKILLS:
        for word in WORDS:
            prompt = f"User: {skill}({word})\nBot:"
            table.add_row(f"{skill}({word})", *(ask(client, model, prompt) for model in models))
    console.print(table)


def main() -> None:
    """Serve, ask, swap, ask again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--port", type=int, default=8000)
    port = parser.parse_args().port
    with tempfile.TemporaryDirectory() as temporary:
        adapters = make_adapters(Path(temporary))
        server = start_server(adapters, port, Path(temporary) / "server.log")
        try:
            client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none")
            show(client, "one server, three models", ("base", *SKILLS))
            mixture = {"adapters": [{"path": str(p), "weight": 0.7} for p in adapters.values()]}
            done = requests.post(
                f"http://localhost:{port}/v1/dare/mixture", json=mixture, timeout=120
            )
            done.raise_for_status()
            console.print(f"swapped by the {done.json()['route']} route")
            show(client, "the base with both adapters, 0.7 of each", ("base",))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
