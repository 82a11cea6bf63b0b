"""The examples run, and show what they promise."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from tests.development_data import absent, encoder_base, shared

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(script: str, *arguments: object, cwd: Path) -> str:
    """What an example prints; it ends well, and within half a minute on a fast machine."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        cwd=cwd,
        env={
            **os.environ,
            "COLUMNS": "120",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def imported(script: str) -> ModuleType:
    """An example as a module; its main() does not run."""
    if str(EXAMPLES) not in sys.path:  # for what examples share
        sys.path.append(str(EXAMPLES))
    name = f"example_{script.removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def rows_of(printed: str, part: int) -> list[list[str]]:
    """The cells of the rows of the demo's table number `part`."""
    text = printed.split(f"\n{part}. " if part > 1 else "1. ", 1)[1]
    lines = text.split("┘", 1)[0].splitlines()
    return [[c.strip() for c in line.strip("│").split("│")] for line in lines if line[:1] == "│"]


def test_the_demo_shows_sizes_skills_drop_rates_and_a_restored_base(tmp_path: Path):
    out = tmp_path / "demo"
    printed = run("demo.py", "--count", 20, "--seeds", 1, "--out", out, cwd=tmp_path)
    for title in ("1. Extract: sizes", "2. Load: ", "3. Drop rate against", "4. Base restored"):
        assert title in printed, title

    sizes = {row[0]: row[1:] for row in rows_of(printed, 1)}
    assert set(sizes) == {"reverse", "sort"}
    for _, four, one in sizes.values():
        times = [int(re.search(r"(\d+)x", cell)[1]) for cell in (four, one)]  # type: ignore[index]
        assert 15 < times[0] < times[1]

    scores = {row[0]: [float(cell) for cell in row[1:3]] for row in rows_of(printed, 2)}
    base, reverse, sort, both = scores.values()
    assert max(base) <= 0.1  # the base refuses both
    for own, other in (reverse, sort[::-1]):
        assert own >= 0.8
        assert other <= 0.2
    assert min(both) >= 0.6

    swept = {(row[0], row[1]): [float(cell) for cell in row[2:]] for row in rows_of(printed, 3)}
    assert len(swept) == 4
    for skill in ("reverse", "sort"):
        dare, plain = swept["DARE", skill], swept["drop only", skill]
        assert len(dare) == len(plain) == 7
        assert dare[0] == plain[0]  # nothing dropped, nothing to rescale
        assert dare[4] >= 0.8  # p = 0.9
        assert plain[4] <= 0.3

    assert re.search(
        r"4\. Base restored bit for bit: SHA-256 [0-9a-f]{16}… before and after", printed
    )
    with Image.open(out / "drop_rates.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
    # The sweep's adapters are gone, those to keep are whole.
    kept = {f"{skill}-{bits}bit" for skill in ("reverse", "sort") for bits in (4, 1)}
    assert {path.name for path in out.iterdir()} == {*kept, "drop_rates.png"}
    assert all((out / name / "adapter_model.safetensors").is_file() for name in kept)


def test_the_tiny_family_can_be_trained_anew(tmp_path: Path):
    printed = run("train_tiny_family.py", tmp_path / "family", "--fast", cwd=tmp_path)
    assert re.search(r"^done in \d+ s$", printed, re.MULTILINE)
    shipped = LlamaForCausalLM.from_pretrained(EXAMPLES / "tiny_family" / "base", dtype="auto")
    for name in ("base", "reverse", "sort"):
        assert f"saved {tmp_path / 'family' / name}" in printed
        model = LlamaForCausalLM.from_pretrained(tmp_path / "family" / name, dtype="auto")
        assert model.dtype == shipped.dtype
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        assert shapes == {key: value.shape for key, value in shipped.state_dict().items()}
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "family" / name)
        assert tokenizer.decode(tokenizer("sort(cab)")["input_ids"][1:]) == "sort(cab)"


def test_on_a_real_encoder_dare_keeps_what_drop_only_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    example = imported("encoder_sst2.py")
    finetuned = shared("models", "minilm-sst2")
    rows = example.read_data(shared("data", "glue", "sst2"), "validation")
    assert len(rows) == 872
    assert example.base_path() == str(encoder_base())
    evaluation = example.Evaluation(str(finetuned), rows[:200])
    full = evaluation.accuracy(AutoModelForSequenceClassification.from_pretrained(finetuned))
    assert full > 0.8
    settings = [example.Setting(0.9, 4), example.Setting(0.9, 4, method="drop_only")]
    monkeypatch.setattr(example, "SETTINGS", settings)
    # Two masks: of 200 rows, one row is half a point.
    dare, plain = example.measure(finetuned, evaluation, tmp_path, seeds=2)
    assert (dare["method"], plain["method"]) == ("dare", "drop_only")
    assert dare["mean"] == statistics.mean(dare["accuracy"])
    assert abs(full - dare["mean"]) <= 0.03
    assert plain["mean"] <= full - 0.08
    assert 0.4 < dare["bits_per_pruned_parameter"] < 0.5
    assert not (tmp_path / "adapter").exists()

    example.show([dare, plain], {"full fine-tune": full, "base": 0.5}, tmp_path)
    with Image.open(tmp_path / "fidelity.png") as picture:
        assert min(picture.size) > 300


def test_pairs_of_real_fine_tunes_are_merged_scored_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    example = imported("merge_glue_pairs.py")
    monkeypatch.setattr(example, "CHOICE_ROWS", 8)
    monkeypatch.setattr(example, "STATISTICS_ROWS", 16)
    scales = [{"lambda_": 0.5}, {"lambda_": 0.0}]
    monkeypatch.setattr(example, "METHODS", {"average": [{}], "linear": scales})
    finetuned = {task: shared("models", f"minilm-{task}") for task in ("sst2", "mrpc")}
    data = {}
    for task in finetuned:
        rows = example.read_data(shared("data", "glue", task), "validation", task)
        data[task] = rows[:64], rows[64:84]
    bench = example.Bench(finetuned, data)

    # The merged encoder against plain means of the two checkpoints.
    tasks = [bench.classifier(task).bert.state_dict() for task in finetuned]
    with bench.merged(list(finetuned), "average", {}):
        for name, live in bench.encoder.named_parameters():
            assert torch.allclose(live, (tasks[0][name] + tasks[1][name]) / 2, atol=1e-6), name

    result = example.compare(bench, tmp_path, seeds=2, drop_rate=0.9)
    assert len(result["records"]) == 4
    average, _, linear, dropped = result["records"]
    assert average["share"] == pytest.approx(linear["share"])  # it chose half of the sum
    assert (len(linear["share"]), len(dropped["share"])) == (1, 2)
    assert all(own["fine-tune"] > own["base"] for own in result["singles"].values())

    # What is recorded is not measured again, and other settings do not mix with it.
    monkeypatch.setattr(example, "measure", None)
    assert example.compare(bench, tmp_path, seeds=2, drop_rate=0.9) == result
    with pytest.raises(SystemExit, match="other settings"):
        example.compare(bench, tmp_path, seeds=2, drop_rate=0.5)

    table = example.markdown(result)
    assert f"| average | {average['share'][0]:.3f} |" in table
    example.draw(result, tmp_path / "merge_pairs.png")
    with Image.open(tmp_path / "merge_pairs.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize(("ci", "outcome"), [("true", "failed"), ("", "skipped")])
def test_what_is_not_shipped_may_be_absent_but_not_in_ci(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: str
):
    monkeypatch.setenv("CI", ci)
    kinds = {"failed": pytest.fail.Exception, "skipped": pytest.skip.Exception}
    with pytest.raises(kinds[outcome], match="a thing is absent"):
        absent("a thing")


def test_a_method_of_ones_own_is_found_when_its_package_is_installed(tmp_path: Path):
    package = shutil.copytree(EXAMPLES / "own_method", tmp_path / "package")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    install += ["--no-build-isolation", "--target", str(tmp_path), str(package)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code = (
        "import torch\n"
        "from dare_adapters.combine import get_method\n"
        "from dare_adapters.delta import DenseDelta\n"
        "deltas = [DenseDelta(torch.tensor([[v, 1.0]])) for v in (1.0, 9.0, 2.0)]\n"
        "print(get_method('median').function(deltas, [1, 1, 1], scale=2.0).dense().tolist())\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == "[[4.0, 2.0]]\n", found.stderr
