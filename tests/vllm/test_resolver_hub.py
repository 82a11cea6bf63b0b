"""Names that are hub ids: a real server fetches what its patterns allow from a hub of our own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from tests.conftest import Pack
from tests.hub_server import Hub, serve
from tests.vllm.bad_adapters import BAD_ADAPTERS
from tests.vllm.dense_models import merged_densely
from tests.vllm.engines import PROMPTS, assert_says_the_same
from tests.vllm.server import Server

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.vllm


class Served(NamedTuple):
    """A server, the hub that it fetches from, and what its adapters are of."""

    server: Server
    hub: Hub
    pack: Pack


@pytest.fixture(scope="module")
def served(packs: Callable[[str], Pack], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two repositories that are allowed, more that are not, or hold no adapter that can be had."""
    pack, root = packs("llama"), tmp_path_factory.mktemp("hub")
    hub = Hub()
    hub.add("acme/math", pack.adapters["a"])
    hub.add("acme/chat", pack.adapters["b"])
    hub.add("acme/private", pack.adapters["a"])
    hub.repos["acme/private"].private = True
    hub.add("acme/cut-off", pack.adapters["c"])
    hub.broken.add("acme/cut-off")
    make, _ = BAD_ADAPTERS["another base"]
    (root / "other").mkdir()
    hub.add("acme/other-base", make(pack, root / "other"))
    hub.add("acme/model", pack.base)
    hub.add("exact/name", pack.adapters["c"])
    hub.add("evil/math", pack.adapters["a"])
    # Whatever lies at such a path on the server's machine is none of a client's business.
    shutil.copytree(pack.adapters["a"], root / "cwd" / "evil" / "local")
    shutil.copytree(pack.adapters["c"], root / "cwd" / "acme" / "math")
    with pytest.MonkeyPatch.context() as environment, serve(hub):
        environment.chdir(root / "cwd")
        for name in ("TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "http_proxy"):
            environment.delenv(name, raising=False)
        environment.setenv("NO_PROXY", "127.0.0.1")
        environment.setenv("HF_ENDPOINT", hub.endpoint)
        environment.setenv("HF_HOME", str(root / "home"))
        environment.setenv("HF_HUB_OFFLINE", "0")
        environment.setenv("DARE_VLLM_HUB", "acme/*, exact/name")
        server = Server(
            root,
            *("--load-at-run-time", pack.base, "--served-model-name", "base"),
            *("--max-model-len", 256, "--skip-tokenizer-init", "--num-gpu-blocks-override", 64),
            *("--max-loras", 4),
        )
        yield Served(server, hub, pack)
        server.close()


def test_an_allowed_name_is_fetched_once_and_served(served: Served) -> None:
    for name, kind in (("acme/math", "a"), ("exact/name", "c")):
        for _ in range(2):
            answer = served.server.greedy(name, PROMPTS[0])
            assert_says_the_same([answer], merged_densely(served.pack, {kind: 1.0}), PROMPTS[:1])
        assert served.hub.fetched(name).count("adapter_model.safetensors") == 1


def test_parts_of_a_mix_may_be_names_of_the_hub(served: Served) -> None:
    answer = served.server.greedy("acme/math*0.5+acme/chat*0.25", PROMPTS[1])
    expected = merged_densely(served.pack, {"a": 0.5, "b": 0.25})
    assert_says_the_same([answer], expected, [PROMPTS[1]])


@pytest.mark.parametrize("name", ["evil/math", "evil/local", "exact/name2", "acme/../evil/math"])
def test_a_name_that_no_pattern_allows_is_a_404_and_the_hub_is_not_asked(
    name: str, served: Served
) -> None:
    asked = len(served.hub.requests)
    with pytest.raises(openai.NotFoundError):
        served.server.greedy(name, PROMPTS[0])
    assert len(served.hub.requests) == asked


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("acme/nobody", "acme/nobody"),
        ("acme/private", "acme/private"),
        ("acme/cut-off", "acme/cut-off"),
        ("acme/other-base", "is not the base of"),
        ("acme/math+evil/math", "'evil/math', which is neither"),
    ],
)
def test_what_the_hub_cannot_give_is_a_400_with_the_reason(
    name: str, reason: str, served: Served
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        served.server.greedy(name, PROMPTS[0])
    base = served.server.greedy("base", PROMPTS[0])
    assert_says_the_same([base], served.pack.live(torch.float32), PROMPTS[:1])


def test_a_repository_that_is_no_adapter_is_a_404_and_its_weights_stay_there(
    served: Served,
) -> None:
    with pytest.raises(openai.NotFoundError):
        served.server.greedy("acme/model", PROMPTS[0])
    assert "model.safetensors" not in served.hub.fetched("acme/model")
