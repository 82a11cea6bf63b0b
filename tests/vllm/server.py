"""`dare-adapters serve` in a process of its own, and an OpenAI client of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from tests.vllm.engines import Answer

__all__ = ["Completion", "Server"]

START_SECONDS = 600


@dataclass(frozen=True)
class Completion(Answer):
    """An answer over HTTP.

    Attributes:
        text: the tokens as text, empty where the server has no tokenizer.
        ended: why it ended there, as OpenAI's API names it.
    """

    text: str
    ended: str


class Server:
    """One server; everything it logs goes to a file.

    Args:
        root: where the log goes.
        arguments: of `dare-adapters serve`.
        api_key: what every request must bring, and those made here do.

    Attributes:
        address: http://127.0.0.1:PORT
    """

    def __init__(self, root: Path, *arguments: object, api_key: str | None = None) -> None:
        self._key = api_key
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.log = root / "server.log"
        call = "from dare_adapters.cli import main; main()"
        fixed = ["--host", "127.0.0.1", "--port", port, "--enforce-eager", "--dtype", "float32"]
        fixed += [] if api_key is None else ["--api-key", api_key]
        words = [sys.executable, "-c", call, "serve", *arguments, *fixed]
        environment = {name: value for name, value in os.environ.items() if "MULTIPROC" not in name}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [str(word) for word in words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # so that its engine ends with it
            )
        self._wait()

    def _wait(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            assert self._process.poll() is None, self.log.read_text()[-4000:]
            try:
                if requests.get(f"{self.address}/health", timeout=5).status_code == 200:
                    return
            except requests.RequestException:
                time.sleep(0.5)
        self.close()
        raise AssertionError(f"no server after {START_SECONDS} s: {self.log.read_text()[-4000:]}")

    def post(self, path: str, body: dict[str, Any]) -> requests.Response:
        """POST JSON."""
        return requests.post(f"{self.address}{path}", json=body, headers=self._headers, timeout=120)

    def get(self, path: str) -> requests.Response:
        """GET."""
        return requests.get(f"{self.address}{path}", headers=self._headers, timeout=60)

    def greedy(self, model: str, prompt: str | Sequence[int], tokens: int = 8) -> Completion:
        """Continue text or token ids by the model of a name."""
        response = self.client.completions.create(
            model=model,
            prompt=prompt if isinstance(prompt, str) else list(prompt),
            max_tokens=tokens,
            temperature=0,
            logprobs=5,
            extra_body={
                "ignore_eos": True,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                "skip_special_tokens": False,
            },
            timeout=120,
        )
        choice = response.choices[0]
        steps = choice.logprobs.top_logprobs if choice.logprobs is not None else []
        return Completion(
            list(choice.token_ids or []),
            [{int(t.removeprefix("token_id:")): v for t, v in step.items()} for step in steps],
            choice.text,
            str(choice.finish_reason),
        )

    @property
    def _headers(self) -> dict[str, str]:
        return {} if self._key is None else {"Authorization": f"Bearer {self._key}"}

    @property
    def client(self) -> Any:
        """An OpenAI client."""
        import openai

        key = self._key or "none"
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0)

    def close(self) -> None:
        """End the server and its engine."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
