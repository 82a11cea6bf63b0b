"""Checkpoints and adapters come from a hub and go to one: the real client, a hub of our own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from tests.checkpoints import fine_tuned, integers, write_checkpoint
from tests.conftest import tiny_llama
from tests.hub_server import Hub, serve

ROOT = Path(__file__).resolve().parents[1]
ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


class Session(NamedTuple):
    """What one client process did with the hub."""

    hub: Hub
    steps: dict[str, dict[str, Any]]
    work: Path

    def value(self, step: str) -> Any:
        assert "value" in self.steps[step], self.steps[step]
        return self.steps[step]["value"]

    def error(self, step: str) -> tuple[str, str]:
        assert "error" in self.steps[step], self.steps[step]
        return self.steps[step]["error"], self.steps[step]["message"]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The hub filled, and the client run once: it takes seconds to start."""
    work = tmp_path_factory.mktemp("hub")
    hub = Hub()
    fill(hub, work)
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    for name in ("TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
        environment.pop(name, None)
    with serve(hub):
        done = subprocess.run(
            [sys.executable, "-m", "tests.hub_client", str(work), hub.token],
            cwd=ROOT,
            env={
                **environment,
                "HF_ENDPOINT": hub.endpoint,
                "HF_HOME": str(work / "home"),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return Session(hub, json.loads(done.stdout.splitlines()[-1]), work)


def fill(hub: Hub, work: Path) -> None:
    """The repositories of the tests."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama()).to(torch.bfloat16)
    model.save_pretrained(work / "base")
    hub.add("org/base", work / "base", "v1")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.002)
    model.save_pretrained(work / "finetuned")
    hub.add("org/finetuned", work / "finetuned")
    hub.add("org/base", work / "finetuned", "main")  # the base moved on after v1

    tensors = {"a.weight": integers((6, 20)), "b.weight": integers((5, 8), 7)}
    small = write_checkpoint(work / "small", tensors, {"architectures": ["X"]})
    torch.save(tensors, small / "pytorch_model.bin")
    (small / "tokenizer.json").write_text("{}")
    (small / "LICENSE").write_text("free")
    (small / "training_args.pt").write_bytes(b"a pickle")
    (small / "onnx").mkdir()
    (small / "onnx" / "config.json").write_text("{}")
    shutil.copyfile(small / "model.safetensors", small / "onnx" / "model.safetensors")
    shutil.copyfile(small / "model.safetensors", small / "consolidated.safetensors")
    hub.add("org/both", small)
    hub.add("org/both-again", small)

    pickled = work / "pickled"
    pickled.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copyfile(small / name, pickled / name)
    # A safetensors file, but none of the model's weights.
    shutil.copyfile(small / "model.safetensors", pickled / "projection.safetensors")
    hub.add("org/pickled", pickled)

    hub.add(
        "org/sharded", write_checkpoint(work / "shards", tensors, {}, [*([n] for n in tensors)])
    )
    hub.repos["org/sharded"].commit({"model.gguf": b"another format"})
    weightless = work / "weightless"
    weightless.mkdir()
    (weightless / "config.json").write_text("{}")
    hub.add("org/weightless", weightless)
    (weightless / "flax_model.msgpack").write_bytes(b"weights of another library")
    hub.add("org/foreign", weightless)

    hub.add("org/broken", write_checkpoint(work / "broken", fine_tuned(tensors), {}))
    broken = work / "broken-adapter"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{}")
    hub.add("org/broken-adapter", broken)
    hub.broken |= {"org/broken", "org/broken-adapter"}


# Download -----------------------------------------------------------------------------------------


def test_of_two_formats_only_safetensors_are_fetched_and_no_sub_folder(session: Session):
    wanted = ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"]
    assert session.value("both")["files"] == wanted
    assert session.hub.fetched("org/both") == wanted


def test_pickled_weights_are_fetched_where_there_are_no_others(session: Session):
    assert session.value("pickled")["names"] == ["a.weight", "b.weight"]
    assert "pytorch_model.bin" in session.hub.fetched("org/pickled")
    assert session.value("pickled")["sum"] == session.value("both")["sum"]


def test_shards_come_with_their_index(session: Session):
    assert session.value("sharded")["names"] == ["a.weight", "b.weight"]
    assert session.hub.fetched("org/sharded") == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


@pytest.mark.parametrize("kind", ["weightless", "foreign"])
def test_a_repository_without_weights_is_named(session: Session, kind: str):
    error, message = session.error(kind)
    assert error == "CheckpointError"
    assert f"'org/{kind}' has neither safetensors nor pytorch_model.bin" in message


def test_a_missing_checkpoint_is_named(session: Session):
    error, message = session.error("missing")
    assert error == "CheckpointError"
    assert "'org/missing'" in message


def test_a_missing_adapter_is_named(session: Session):
    error, message = session.error("no adapter")
    assert error == "AdapterNotFoundError"
    assert "'org/missing'" in message


def test_a_revision_is_honoured(session: Session):
    first, moved = session.value("v1"), session.value("main")
    assert first["names"] == moved["names"]
    assert first["sum"] != moved["sum"]


@pytest.mark.parametrize(
    ("step", "kind"),
    [("no revision", "CheckpointError"), ("no adapter revision", "AdapterNotFoundError")],
)
def test_a_missing_revision_is_an_error_and_never_another_revision(
    session: Session, step: str, kind: str
):
    error, message = session.error(step)
    assert error == kind
    assert "org/base" in message
    assert "v9" in message


def test_a_whole_model_named_as_an_adapter_is_refused_without_its_weights(session: Session):
    error, message = session.error("a model as an adapter")
    assert error == "AdapterNotFoundError"
    assert "no adapter_config.json" in message
    assert not [f for f in session.hub.fetched("org/both-again") if f.endswith((".bin", ".pt"))]
    assert "model.safetensors" not in session.hub.fetched("org/both-again")


@pytest.mark.parametrize(
    ("step", "kind", "name"),
    [
        ("broken checkpoint", "CheckpointError", "org/broken"),
        ("broken adapter", "AdapterNotFoundError", "org/broken-adapter"),
    ],
)
def test_a_download_that_breaks_off_is_an_error_of_this_library(
    session: Session, step: str, kind: str, name: str
):
    error, message = session.error(step)
    assert error == kind
    assert repr(name) in message


def test_what_was_downloaded_opens_without_a_network(session: Session):
    for name in ("both", "pickled"):
        assert session.value(f"offline {name}") == session.value(name)
    assert session.value("offline adapter") == session.value("second")
    error, message = session.error("offline never")
    assert error == "CheckpointError"
    assert "'org/never'" in message
    assert not [request for request in session.hub.requests if "never" in request.path]


def test_extraction_takes_both_checkpoints_from_the_hub_and_notes_the_revisions(session: Session):
    made = session.value("extract")
    assert made["base"] == ["org/base", "v1"]
    assert made["finetuned"]["name_or_path"] == "org/finetuned"
    assert made["finetuned"]["revision"] == "main"
    assert set(made["files"]) >= ADAPTER_FILES


# Upload -------------------------------------------------------------------------------------------


def test_a_pushed_adapter_comes_back_byte_for_byte(session: Session):
    pulled = session.value("pull")
    sent = session.value("extract")["files"]
    assert {name: pulled[name] for name in sent} == sent
    assert set(pulled) == set(sent)


def test_push_returns_the_address_of_its_commit(session: Session):
    repo = session.hub.repos["org/adapter"]
    commit = repo.branches["main"]
    assert session.value("push") == f"{session.hub.endpoint}/org/adapter/commit/{commit}"
    assert repo.messages[-1] == "Upload DARE adapter"


def test_a_private_repository_is_made_private_and_opens_with_its_token_only(session: Session):
    assert session.hub.repos["org/adapter"].private
    error, message = session.error("pull, no token")
    assert error == "AdapterNotFoundError"
    assert "'org/adapter'" in message
    assert "error" in session.steps["push, no token"]
    files = [
        request
        for request in session.hub.requests
        if request.path.startswith("/org/adapter/resolve/") and request.method == "GET"
    ]
    assert files
    assert {request.token for request in files} == {session.hub.token}


def test_no_token_is_sent_where_none_was_given(session: Session):
    public = [r for r in session.hub.requests if r.path.startswith(("/org/both", "/org/second"))]
    assert public
    assert {request.token for request in public} == {None}


def test_an_adapter_loaded_from_the_hub_patches_as_the_local_one_does(session: Session):
    assert session.value("load") == "adapter"
    assert session.value("hub weights") == session.value("local weights")
    assert session.value("hub weights") != session.value("base weights")


def test_saving_a_live_adapter_can_push_it_too(session: Session):
    assert session.value("save") is None
    repo = session.hub.repos["org/second"]
    assert not repo.private
    assert repo.messages[-1] == "From a live model"
    sent = session.value("extract")["files"]
    second = session.value("second")
    assert {name: second[name] for name in sent} == sent


def test_the_model_card_says_what_the_hub_needs_to_know(session: Session):
    assert session.hub.validated  # the client has the card checked before it uploads
    for card in session.hub.validated:
        _, front, text = card.split("---\n", 2)
        told = yaml.safe_load(front)
        assert told["base_model"] == "org/base"
        assert told["base_model_relation"] == "adapter"
        assert told["library_name"] == "dare-adapters"
        assert "dare" in told["tags"]
        assert 'AutoModelForCausalLM.from_pretrained("org/base")' in text
