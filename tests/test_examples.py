"""The examples run, and show what they promise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.development_data import absent

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


def rows_of(printed: str, part: int) -> list[list[str]]:
    """The cells of the rows of the demo's table number `part`."""
    text = printed.split(f"\n{part}. " if part > 1 else "1. ", 1)[1]
    lines = text.split("┘", 1)[0].splitlines()
    return [[c.strip() for c in line.strip("│").split("│")] for line in lines if line[:1] == "│"]


def test_the_demo_shows_sizes_skills_drop_rates_and_a_restored_base(tmp_path: Path):
    out = tmp_path / "demo"
    printed = run("demo.py", "--count", 12, "--seeds", 1, "--out", out, cwd=tmp_path)
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
