"""The same cells in vLLM; run in the environment that has it (`make test-vllm`)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.eval.lm.decoders import Decoders
from tests.eval.lm.test_experiments import EVERY, settings

pytest.importorskip("vllm", reason="vLLM is in an environment of its own")
pytest.importorskip("lm_eval")

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="module", autouse=True)
def vllm_by_its_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The harness asks for the version of a distribution called vllm; on CPUs it is vllm-cpu."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # vLLM, too, asks for it, and takes what it says for the kind of machine.
        version = f"{importlib.metadata.version('vllm-cpu').partition('+')[0]}+cpu"
        place = tmp_path_factory.mktemp("metadata")
        folder = place / f"vllm-{version}.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        (folder / "METADATA").write_text(text)
        sys.path.append(str(place))


def test_both_backends_write_the_same(decoders: Decoders, data_dir: Path, tmp_path: Path) -> None:
    """A base, an adapter, a mix and a merge on every task, greedy in float32."""
    from dare_eval.lm.cli import app

    wrote = {}
    for backend, arguments in {
        "transformers": "dtype=float32,batch_size=1",
        "vllm": "dtype=float32,max_model_len=1024,enforce_eager=true",
    }.items():
        records = tmp_path / backend
        common = settings(data_dir, records, EVERY)[:-1]
        common += [arguments, "--backend", backend, "--allow-code-execution"]
        run = ["run", decoders.base, "--adapter", decoders.adapters[0], "--adapter", decoders.mix]
        merge = ["merge", decoders.base, *decoders.adapters, "--combination-types", "ties"]
        merge += ["--option", "density=0.3", "--drop-rates", "0,0.5"]
        for command in (run, merge):
            done = CliRunner().invoke(app, [str(word) for word in (*command, *common)])
            assert done.exit_code == 0, done.exception
        for path in records.glob("lm-*/*.json"):
            record = json.loads(path.read_text())
            config = {
                name: value
                for name, value in record["config"].items()
                if name not in ("backend", "model_arguments")
            }
            output = records / "lm-outputs" / "completions" / record["result"]["outputs"]
            wrote.setdefault(json.dumps(config), []).append(output.read_text())
    assert len(wrote) == 5 * (3 + 4)
    different = [config for config, texts in wrote.items() if len(set(texts)) != 1]
    assert not different
    assert len({texts[0] for texts in wrote.values()}) > 20
