"""`dare-adapters combine`, `merge` and `methods`: what they write, print and refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.cli import app
from tests.conftest import Pack, PackMaker, read_checkpoint


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def pack(make_pack: PackMaker) -> Pack:
    return make_pack("plain")


def dense(path: Path) -> dict[str, torch.Tensor]:
    return {name: delta.dense() for name, delta in Adapter.open(path).deltas()}


def test_weights_are_given_in_a_row_or_one_by_one(pack: Pack, tmp_path: Path):
    a, b = pack.adapters["a"], pack.adapters["b"]
    row = run("combine", a, b, "--weights", 1.0, -0.5, "--bits", 32, tmp_path / "row")
    assert row.exit_code == 0, row.output
    run("combine", a, b, tmp_path / "single", "-w", "1.0", "--weights=-0.5", "--bits", 32)
    one, other = dense(a), dense(b)
    for name, found in dense(tmp_path / "row").items():
        torch.testing.assert_close(found, one[name] - 0.5 * other[name], rtol=1e-6, atol=1e-9)
    same = [(tmp_path / name / "adapter_model.safetensors") for name in ("row", "single")]
    assert same[0].read_bytes() == same[1].read_bytes()


def test_options_of_the_method_are_read_as_yaml(pack: Pack, tmp_path: Path):
    paths = [pack.adapters["a"], pack.adapters["b"]]
    done = run(
        "combine", *paths, tmp_path / "out", "--combination-type", "ties", "--density", 0.5,
        "--majority-sign-method", "frequency", "-o", "vote=weighted", "-o", "lambda=0.5",
        "--bits", 32, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["adapter"] == str(tmp_path / "out")
    options = {"density": 0.5, "majority_sign_method": "frequency", "vote": "weighted"}
    dare_adapters.combine(
        paths, tmp_path / "same", combination_type="ties", lambda_=0.5, bits=32, progress=False,
        **options,
    )  # fmt: skip
    found, expected = dense(tmp_path / "out"), dense(tmp_path / "same")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_mix_is_written_on_request(pack: Pack, tmp_path: Path):
    for name in "ab":
        Adapter.open(pack.adapters[name]).save(tmp_path / name)
    done = run("combine", tmp_path / "a", tmp_path / "b", tmp_path / "mix", "--mix")
    assert done.exit_code == 0, done.output
    assert [file.name for file in (tmp_path / "mix").iterdir()] == ["adapter_config.json"]
    model = pack.live()
    model.load_dare_adapter(tmp_path / "mix")
    both = pack.live()
    both.load_dare_adapter([tmp_path / "a", tmp_path / "b"])
    state = {name: value.clone() for name, value in model.named_parameters()}
    assert all(torch.equal(state[name], value) for name, value in both.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--combination-type", "tie"], 1, "there are .*ties"),
        (["--combination-type", "ties"], 1, "density is needed"),
        (["-o", "densty=0.5"], 1, "no option densty; its options are: normalize, lambda_"),
        (["-o", "density"], 2, "NAME=VALUE"),
        (["--densty", "0.5"], 2, "no such option: --densty"),
        (["--weights", "1.0"], 1, "1 weights for 2 adapters"),
        (["--bits", "3"], 1, "bits is 3"),
        (["--prune", "dare"], 1, "prune and drop_rate belong together"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    pack: Pack, tmp_path: Path, arguments: list[str], code: int, message: str
):
    paths = [pack.adapters["a"], pack.adapters["b"], tmp_path / "out"]
    done = run("combine", *paths, *arguments)
    assert done.exit_code == code, done.output
    assert re.search(message, " ".join(done.output.split())), done.output
    assert not (tmp_path / "out").exists()


def test_a_recipe_gives_a_checkpoint_or_an_adapter(pack: Pack, tmp_path: Path):
    recipe = tmp_path / "recipe.yml"
    models = [
        {"model": str(pack.finetuned[name]), "parameters": {"weight": weight}}
        for name, weight in (("a", 1.0), ("b", 0.5))
    ]
    recipe.write_text(
        yaml.safe_dump(
            {
                "merge_method": "task_arithmetic",
                "base_model": str(pack.base),
                "models": models,
                "dtype": "float32",
            }
        )
    )
    full = run("merge", recipe, tmp_path / "full")
    assert full.exit_code == 0, full.output
    base, a, b = (
        read_checkpoint(path) for path in (pack.base, pack.finetuned["a"], pack.finetuned["b"])
    )
    for name, found in read_checkpoint(tmp_path / "full").items():
        one, two, three = (tensors[name].double() for tensors in (base, a, b))
        expected = one + (two - one) + 0.5 * (three - one)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-8)
    small = run("merge", recipe, tmp_path / "adapter", "--as-adapter", "--bits", 32, "--json")
    assert json.loads(small.stdout) == {"adapter": str(tmp_path / "adapter")}
    for name, delta in dense(tmp_path / "adapter").items():
        one, two, three = (tensors[name].double() for tensors in (base, a, b))
        expected = (two - one) + 0.5 * (three - one)
        torch.testing.assert_close(delta.double(), expected, rtol=1e-5, atol=1e-8)


def test_a_recipe_that_cannot_be_run_is_refused(tmp_path: Path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("merge_method: tie\nmodels:\n- model: a\n")
    done = run("merge", recipe, tmp_path / "out")
    assert done.exit_code == 1
    assert "merge_method is 'tie'" in " ".join(done.output.split())
    missing = run("merge", tmp_path / "nothing.yml", tmp_path / "out")
    assert missing.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_every_method_is_listed_with_its_options():
    listed = json.loads(run("methods", "--json").stdout)
    assert set(listed) == set(dare_adapters.method_names())
    assert "majority_sign_method" in listed["ties"]
    assert "breadcrumbs_ties" in run("methods").output
