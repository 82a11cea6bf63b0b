"""The command line: what it prints where, which exit code it returns, and what its options do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from dare_adapters._version import __version__
from dare_adapters.adapter import Adapter
from dare_adapters.cli import app
from tests.checkpoints import fine_tuned, integers, write_checkpoint
from tests.conftest import FamilyMaker, all_bytes
from tests.reference import decode_adapter

CONSOLE_SCRIPT = Path(sys.executable).parent / "dare-adapters"
NAMES = ["embed.weight", "layers.0.up.weight", "layers.1.up.weight", "norm.weight"]


def tensors() -> dict[str, torch.Tensor]:
    """Three matrices whose widths are no multiples of ten, and a vector."""
    shapes = [(24, 37), (12, 64), (12, 64), (37,)]
    return {
        name: integers(shape, 50 * n)
        for n, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, with the fine-tunes "near" (within the paper's range) and "far" beside it."""
    root = tmp_path_factory.mktemp("cli")
    config = {"architectures": ["LlamaForCausalLM"]}
    write_checkpoint(root / "near", fine_tuned(tensors()), config)
    write_checkpoint(root / "far", fine_tuned(tensors(), 2.0), config)
    return write_checkpoint(root / "base", tensors(), config)


def call(*arguments: object) -> Result:
    """One call within this process. Nothing that escapes as an exception is an answer."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def succeed(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def refuse(code: int, *arguments: object) -> str:
    """The sentence on stderr of a call that fails, with nothing on stdout."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.stderr.count("\n") == 1, "a message is one line, however long"
    return " ".join(result.stderr.split())


def as_json(*arguments: object) -> dict[str, Any]:
    """What a successful call prints with --json: JSON alone."""
    result = succeed(*arguments, "--json")
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def extracted(base: Path, out: Path, *options: object, finetuned: str = "near") -> Adapter:
    succeed("extract", base, base.parent / finetuned, out, *options)
    return Adapter.open(out)


# The console script itself ------------------------------------------------------------------------


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(CONSOLE_SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_console_script_extracts_with_code_0_and_a_quiet_stderr(base: Path, tmp_path: Path):
    done = script("extract", base, base.parent / "near", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out'}: ")
    assert "times smaller" in done.stdout
    assert done.stderr == ""
    assert len(Adapter.open(tmp_path / "out")) == 4


def test_the_console_script_fails_with_code_1_and_a_sentence_on_stderr(tmp_path: Path):
    done = script("verify", tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"AdapterNotFoundError: {tmp_path}: no adapter_config.json; " + (
        "this is not an adapter\n"
    )


def test_the_console_script_fails_with_code_2_for_an_unknown_option(tmp_path: Path):
    done = script("inspect", tmp_path, "--colour", "red")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "No such option" in done.stderr
    assert "Traceback" not in done.stderr


# Usage --------------------------------------------------------------------------------------------


def test_version_and_help_are_on_stdout():
    assert succeed("--version").stdout.strip() == __version__
    for command in ("extract", "inspect", "verify", "export"):
        assert command in succeed("--help").stdout
        assert "Usage" in succeed(command, "--help").stdout


@pytest.mark.parametrize(
    "options",
    [
        ("--nonsense",),
        ("--drop-rate", "most"),
        ("--bits", "four"),
        ("--method", "guess"),
        ("--mask", "stored"),
        ("--workers", "0"),
        ("--on-large-delta", "cry"),
        ("--drop-rate-for", "embed*=half"),
        ("--drop-rate-for", "0.5"),
        ("--drop-rate-for", "=0.5"),
        ("--device", "abacus"),
        ("--device", "meta"),
    ],
    ids=" ".join,
)
def test_a_wrong_call_is_code_2_and_writes_nothing(
    base: Path, tmp_path: Path, options: tuple[str, ...]
):
    refuse(2, "extract", base, base.parent / "near", tmp_path / "out", *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so --device cuda is right")
def test_a_device_that_is_not_there_is_code_2(base: Path, tmp_path: Path):
    said = refuse(2, "extract", base, base.parent / "near", tmp_path / "out", "--device", "cuda")
    assert "--device" in said


@pytest.mark.parametrize("arguments", [("extract", "one"), ("export", "one", "two"), ("merge",)])
def test_missing_arguments_and_unknown_commands_are_code_2(arguments: tuple[str, ...]):
    refuse(2, *arguments)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--bits", "3"), "bits is 3"),
        (("--drop-rate", "1"), "drop_rate is 1.0"),
        (("--drop-rate", "-0.5"), "drop_rate is -0.5"),
        (("--drop-rate-for", "embed*=1.5"), "drop_rate is 1.5"),
        (("--drop-rate", "0.85", "--mask", "blocked"), "mask='bernoulli'"),
        (("--seed", "-1"), "seed is -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_value_out_of_range_is_named(
    base: Path, tmp_path: Path, options: tuple[str, ...], named: str
):
    assert named in refuse(2, "extract", base, base.parent / "near", tmp_path / "out", *options)
    assert not list(tmp_path.iterdir())


# extract ------------------------------------------------------------------------------------------


def test_extract_prints_its_result_as_json(base: Path, tmp_path: Path):
    told = as_json("extract", base, base.parent / "near", tmp_path / "out", "--seed", 7)
    adapter = Adapter.open(tmp_path / "out")
    full = sum(value.nbytes for value in tensors().values())
    assert told == {
        "adapter": str(tmp_path / "out"),
        "bytes": adapter.nbytes,
        "finetuned_bytes": full,
        "times_smaller": full / adapter.nbytes,
        "seed": 7,
    }
    assert adapter.config.seed == 7


def test_the_defaults_are_dare_at_nine_tenths_and_four_bits(base: Path, tmp_path: Path):
    config = extracted(base, tmp_path / "out").config
    assert (config.method, config.drop_rate, config.bits, config.mask) == ("dare", 0.9, 4, "auto")
    assert {e.mask for e in config.parameters.values()} == {"blocked", None}


@pytest.mark.parametrize("method", ["dare", "drop_only", "magnitude"])
def test_method_chooses_how_to_prune(base: Path, tmp_path: Path, method: str):
    adapter = extracted(base, tmp_path / "out", "--method", method, "--bits", 32)
    assert adapter.config.method == method
    found = decode_adapter(tmp_path / "out")[NAMES[0]]
    near = load_file(base.parent / "near" / "model.safetensors")
    delta = (near[NAMES[0]] - tensors()[NAMES[0]]).double().numpy()
    kept = found != 0
    factor = 10 if method == "dare" else 1
    assert np.allclose(found[kept], delta[kept] * factor, rtol=1e-6)
    if method == "magnitude":
        assert np.abs(delta[kept]).min() >= np.abs(delta[~kept]).max()


def test_without_rescaling_dare_is_drop_only(base: Path, tmp_path: Path):
    plain = extracted(base, tmp_path / "plain", "--no-rescale")
    dropped = extracted(base, tmp_path / "dropped", "--method", "drop_only")
    assert not plain.config.rescale
    assert plain.config.sha256 == dropped.config.sha256


@pytest.mark.parametrize("mask", ["blocked", "bernoulli"])
def test_mask_chooses_the_support(base: Path, tmp_path: Path, mask: str):
    config = extracted(base, tmp_path / "out", "--mask", mask).config
    assert {e.mask for e in config.parameters.values() if e.kind == "sparse"} == {mask}


@pytest.mark.parametrize("bits", [32, 16, 8, 4, 2, 1])
def test_bits_choose_the_width_of_survivors(base: Path, tmp_path: Path, bits: int):
    config = extracted(base, tmp_path / "out", "--bits", bits).config
    assert {e.bits for e in config.parameters.values() if e.kind == "sparse"} == {bits}


def test_include_and_exclude_choose_what_is_pruned(base: Path, tmp_path: Path):
    options = ("--include", "layers.*", "--include", "embed*", "--exclude", "layers.1.*")
    config = extracted(base, tmp_path / "out", *options).config
    sparse = [name for name, entry in config.parameters.items() if entry.kind == "sparse"]
    assert sparse == ["embed.weight", "layers.0.up.weight"]
    assert config.parameters["layers.1.up.weight"].kind == "dense"


def test_drop_rate_for_gives_some_parameters_another_rate(base: Path, tmp_path: Path):
    options = ("--drop-rate-for", "embed*=0.5", "--drop-rate-for", "*.1.*=0.75")
    config = extracted(base, tmp_path / "out", *options).config
    rates = {name: entry.drop_rate for name, entry in config.parameters.items()}
    assert rates == dict(zip(NAMES, (0.5, 0.9, 0.75, None), strict=True))


def test_a_glob_may_hold_the_equals_sign(base: Path, tmp_path: Path):
    config = extracted(base, tmp_path / "out", "--drop-rate-for", "a=b=0.5").config
    assert {e.drop_rate for e in config.parameters.values()} == {0.9, None}


def test_missing_parameters_are_ignored_only_where_asked(base: Path, tmp_path: Path):
    less = fine_tuned(tensors())
    del less["norm.weight"]
    write_checkpoint(tmp_path / "less", less)
    out = tmp_path / "out"
    assert "norm.weight" in refuse(1, "extract", base, tmp_path / "less", out)
    succeed("extract", base, tmp_path / "less", out, "--ignore-missing", "norm*")
    assert Adapter.open(out).config.ignored_base_parameters == ["norm.weight"]


def test_a_large_delta_is_a_warning_on_stderr(base: Path, tmp_path: Path):
    result = succeed("extract", base, base.parent / "far", tmp_path / "out")
    assert result.stderr.startswith("warning: |delta| has median")
    assert result.stderr.count("\n") == 1
    assert "warning" not in result.stdout
    told = succeed("extract", base, base.parent / "far", tmp_path / "json", "--json")
    assert told.stderr.startswith("warning: ")
    assert json.loads(told.stdout)["adapter"] == str(tmp_path / "json")


def test_a_large_delta_is_an_error_or_nothing_where_asked(base: Path, tmp_path: Path):
    far = base.parent / "far"
    said = refuse(1, "extract", base, far, tmp_path / "out", "--on-large-delta", "error")
    assert said.startswith("DeltaTooLargeError: |delta| has median")
    assert not (tmp_path / "out").exists()
    result = succeed("extract", base, far, tmp_path / "out", "--on-large-delta", "ignore")
    assert result.stderr == ""


def test_an_existing_output_is_kept_unless_forced(base: Path, tmp_path: Path):
    out = tmp_path / "out"
    extracted(base, out, "--seed", 1)
    before = (out / "adapter_config.json").read_bytes()
    said = refuse(1, "extract", base, base.parent / "near", out, "--seed", 2)
    assert said.startswith("AdapterExistsError: ")
    assert "--force" in said
    assert (out / "adapter_config.json").read_bytes() == before
    assert extracted(base, out, "--seed", 2, "--force").config.seed == 2


def test_workers_never_change_an_adapter(base: Path, tmp_path: Path):
    for workers in (1, 3):
        extracted(base, tmp_path / str(workers), "--workers", workers)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_what_is_no_checkpoint_is_named(base: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    said = refuse(1, "extract", base, tmp_path / "empty", tmp_path / "out")
    assert said.startswith("CheckpointError: ")
    assert str(tmp_path / "empty") in said
    nowhere = tmp_path / "nowhere"
    said = refuse(1, "extract", nowhere, base, tmp_path / "out")
    assert said.startswith("CheckpointError: ")
    assert repr(str(nowhere)) in said


def test_errors_are_json_on_stdout_where_json_was_asked_for(base: Path, tmp_path: Path):
    result = call("extract", base, tmp_path, tmp_path / "out", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["error"] == "CheckpointError"
    assert str(tmp_path) in told["message"]
    assert result.stderr == ""


@pytest.mark.parametrize("name", ["out[1]", "[bold]", "[/red]", "a b", "ü"])
def test_any_directory_name_is_printed_as_it_is(base: Path, tmp_path: Path, name: str):
    out = tmp_path / name
    out.mkdir(parents=True)
    result = succeed("extract", base, base.parent / "near", out, "--force")
    assert result.stdout.startswith(f"{out}: ")
    assert succeed("verify", out).stdout.startswith(f"{out}: sound")
    succeed("inspect", out)
    full = succeed("export", base, out, tmp_path / f"full{name}")
    assert full.stdout.startswith(f"{tmp_path}/full{name}: written")


# inspect ------------------------------------------------------------------------------------------


def test_inspect_shows_every_part(base: Path, tmp_path: Path):
    extracted(base, tmp_path / "out")
    shown = succeed("inspect", tmp_path / "out").stdout
    for text in ("drop_rate", "values", "layers.*.up.weight", "parameters: dense", "|delta| up to"):
        assert text in shown, text


def test_inspect_prints_every_field_as_json(base: Path, tmp_path: Path):
    adapter = extracted(base, tmp_path / "out")
    told = as_json("inspect", tmp_path / "out")
    assert set(told) == {
        "summary",
        "bytes_by_part",
        "bits_per_pruned_parameter",
        "kinds",
        "groups",
        "edges",
        "counts",
    }
    assert told["summary"]["base_model_name_or_path"] == str(base)
    assert told["summary"]["seed"] == adapter.config.seed
    assert told["kinds"] == {"sparse, blocked, 4 bit": 3, "dense": 1}
    assert set(told["groups"]) == {"embed.weight", "layers.*.up.weight", "norm.weight"}
    assert len(told["edges"]) == len(told["counts"]) + 1


def test_inspect_shows_what_others_wrote_into_a_config(base: Path, tmp_path: Path):
    extracted(base, tmp_path / "out")
    file = tmp_path / "out" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = "[/red] [bold]"
    config["fidelity"] = {"a": {}, "b": 3, "[/c]": {"entries": "many"}}
    file.write_text(json.dumps(config))
    shown = succeed("inspect", tmp_path / "out").stdout
    assert "[/red] [bold]" in shown
    assert "[/c]" in shown


def test_plot_writes_a_picture(base: Path, tmp_path: Path):
    extracted(base, tmp_path / "out")
    succeed("inspect", tmp_path / "out", "--plot", tmp_path / "delta.png")
    with Image.open(tmp_path / "delta.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert (0x44, 0x77, 0xAA) in colours  # of the bars


def test_a_plot_of_an_unknown_kind_or_place_is_a_sentence(base: Path, tmp_path: Path):
    extracted(base, tmp_path / "out")
    assert "xyz" in refuse(2, "inspect", tmp_path / "out", "--plot", tmp_path / "delta.xyz")
    nowhere = tmp_path / "nowhere" / "delta.png"
    assert str(nowhere) in refuse(1, "inspect", tmp_path / "out", "--plot", nowhere)


def test_a_plot_without_matplotlib_says_what_to_install(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    extracted(base, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = refuse(1, "inspect", tmp_path / "out", "--plot", tmp_path / "delta.png")
    assert "dare-adapters[plot]" in said


# verify -------------------------------------------------------------------------------------------


def test_verify_says_that_an_adapter_is_sound(base: Path, tmp_path: Path):
    out = tmp_path / "out"
    extracted(base, out)
    assert succeed("verify", out).stdout == f"{out}: sound, 4 parameters\n"
    assert succeed("verify", out, "--base", base).stdout.endswith(f"and {base} is its base\n")
    assert as_json("verify", out, "--base", base) == {
        "adapter": str(out),
        "valid": True,
        "parameters": 4,
        "base": str(base),
    }


@pytest.mark.parametrize("damage", ["a flipped bit", "cut off", "edited config", "no tensors"])
def test_verify_refuses_a_damaged_adapter(base: Path, tmp_path: Path, damage: str):
    out = tmp_path / "out"
    extracted(base, out)
    weights, config = out / "adapter_model.safetensors", out / "adapter_config.json"
    data = bytearray(weights.read_bytes())
    if damage == "a flipped bit":
        data[-5] ^= 1
        weights.write_bytes(data)
    elif damage == "cut off":
        weights.write_bytes(data[:-40])
    elif damage == "edited config":
        config.write_text(json.dumps({**json.loads(config.read_text()), "seed": 1}))
    else:
        weights.unlink()
    said = refuse(1, "verify", out)
    assert said.startswith(("AdapterFormatError: ", "AdapterNotFoundError: "))
    assert str(out) in said


def test_verify_refuses_a_wrong_base(base: Path, tmp_path: Path):
    extracted(base, tmp_path / "out")
    said = refuse(1, "verify", tmp_path / "out", "--base", base.parent / "near")
    assert said.startswith("BaseMismatchError: ")
    assert f"extracted over {str(base)!r}" in said
    assert "4 of 4" in said


# export -------------------------------------------------------------------------------------------


def test_extract_then_export_makes_the_live_model(make_family: FamilyMaker, tmp_path: Path):
    family = make_family()
    adapter, full = tmp_path / "adapter", tmp_path / "full"
    succeed("extract", family.base, family.finetuned, adapter)
    assert as_json("export", family.base, adapter, full) == {"checkpoint": str(full)}
    live = family.live()
    live.load_dare_adapter(adapter)
    exported = LlamaForCausalLM.from_pretrained(full, dtype="auto")
    assert all_bytes(exported) == all_bytes(live)


def test_weight_scales_what_is_exported(base: Path, tmp_path: Path):
    extracted(base, tmp_path / "out", "--drop-rate", 0, "--bits", 32)
    succeed("export", base, tmp_path / "out", tmp_path / "full", "--weight", -0.5)
    full = load_file(tmp_path / "full" / "model.safetensors")
    near = load_file(base.parent / "near" / "model.safetensors")
    for name, value in tensors().items():
        assert torch.equal(full[name], value + (near[name] - value) * -0.5), name
    said = refuse(2, "export", base, tmp_path / "out", tmp_path / "more", "--weight", "nan")
    assert "weight is nan" in said


def test_export_refuses_a_wrong_base_unless_told_not_to_look(base: Path, tmp_path: Path):
    extracted(base, tmp_path / "out")
    near, full = base.parent / "near", tmp_path / "full"
    assert refuse(1, "export", near, tmp_path / "out", full).startswith("BaseMismatchError: ")
    assert not full.exists()
    succeed("export", near, tmp_path / "out", full, "--no-check-base")
    assert (full / "model.safetensors").is_file()


def test_an_existing_checkpoint_is_kept_unless_forced(base: Path, tmp_path: Path):
    extracted(base, tmp_path / "out")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    said = refuse(1, "export", base, tmp_path / "out", full)
    assert said.startswith("AdapterExistsError: ")
    assert [file.name for file in full.iterdir()] == ["mine.txt"]
    succeed("export", base, tmp_path / "out", full, "--force")
    assert (full / "model.safetensors").is_file()
