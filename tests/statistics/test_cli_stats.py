"""`dare-adapters stats` end to end: base, adapter and texts to a file of the right numbers."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.cli_stats import stats
from dare_adapters.errors import DareError
from dare_adapters.statistics import (
    compute_statistics,
    diagonal_fisher,
    gram_matrices,
    open_statistics,
)
from dare_adapters.statistics.data import Batches, read_rows
from tests.conftest import all_bytes, tiny_llama
from tests.statistics import SMALL, bert_config, lively, save_tokenizer, texts
from tests.statistics.test_fisher import assert_alike, mergelm_loop

datasets = pytest.importorskip("datasets")

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(stats)
app.callback()(lambda: None)  # so that the command keeps its name


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["stats", *(str(argument) for argument in arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def succeed(*arguments: object) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refuse(*arguments: object, code: int = 1) -> str:
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.stderr.count("\n") == 1, result.stderr
    return " ".join(result.stderr.split())


def extracted(base: Path, finetuned: Path, out: Path) -> Path:
    """An adapter that makes the base the fine-tune, to the bit."""
    dare_adapters.extract(
        base, finetuned, out, drop_rate=0.0, bits=32, on_large_delta="ignore", progress=False
    )
    return out


def moved(model: Any) -> Any:
    """A fine-tune: every parameter of a model a little elsewhere."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare encoder, a classifier of three labels and a regressor made from it, and data."""
    root = tmp_path_factory.mktemp("task")
    lively(BertModel(bert_config(vocab_size=22))).save_pretrained(root / "base")
    save_tokenizer(root / "base")
    for name, labels in (("classifier", 3), ("regressor", 1)):
        tuned = BertForSequenceClassification.from_pretrained(root / "base", num_labels=labels)
        moved(lively(tuned)).save_pretrained(root / f"{name}-tuned")
        save_tokenizer(root / f"{name}-tuned")
        extracted(root / "base", root / f"{name}-tuned", root / name)
    (root / "data").mkdir()
    for file, count in (("train", 12), ("dev", 5)):
        rows = zip(texts(count, 1), texts(count, 2), strict=True)
        lines = [
            json.dumps({"idx": i, "sentence1": a, "sentence2": b, "label": i % 3})
            for i, (a, b) in enumerate(rows)
        ]
        (root / "data" / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    return root


PAIR = ("--text-column", "sentence1", "--second-text-column", "sentence2")


def tokenised(root: Path, split: str, column: str | None = "sentence2") -> list[dict[str, Any]]:
    """The data one row a batch, by hand."""
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    found = []
    for line in (root / "data" / f"{split}.jsonl").read_text().splitlines():
        row = json.loads(line)
        pair = [[row["sentence1"]], *([[row[column]]] if column else [])]
        tokens = dict(tokenizer(*pair, return_tensors="pt", truncation=True, max_length=12))
        found.append({**tokens, "labels": torch.tensor([float(row["label"])])})
    return found


def bare(statistics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the base's names, without the head that the base has not."""
    return {
        name.removeprefix("bert."): value
        for name, value in statistics.items()
        if name.startswith("bert.")
    }


@pytest.mark.parametrize("kind", ["classifier", "regressor"])
def test_fisher_of_base_and_adapter_is_that_of_the_fine_tune(task: Path, kind: str, tmp_path: Path):
    result = succeed(
        task / "base", task / kind, "--data", task / "data", *PAIR, "--batch-size", 1,
        "--max-length", 12, "--out", tmp_path / "out",
    )  # fmt: skip
    file = tmp_path / "out" / "fisher.safetensors"
    assert result == {
        "file": str(file),
        "kind": "fisher",
        "bytes": file.stat().st_size,
        "parameters": 23,
        "examples": 12,
        "dataset": str(task / "data"),
    }
    tuned = AutoModelForSequenceClassification.from_pretrained(task / f"{kind}-tuned").eval()
    expected = bare(mergelm_loop(tuned, tokenised(task, "train")))
    assert_alike(dict(open_statistics(task / kind, "fisher", tmp_path / "out")), expected)


def test_gram_matrices_of_base_and_adapter_are_those_of_the_fine_tune(task: Path, tmp_path: Path):
    succeed(
        task / "base", task / "classifier", "--data", task / "data", *PAIR, "--kind", "gram",
        "--split", "validation", "--max-length", 12, "--batch-size", 1, "--out", tmp_path,
    )  # fmt: skip
    tuned = AutoModelForSequenceClassification.from_pretrained(task / "classifier-tuned").eval()
    expected = bare(gram_matrices(tuned, tokenised(task, "dev")))
    found = open_statistics(task / "classifier", "gram", tmp_path)
    assert len(found) == 7
    assert found.info.examples == 5
    assert found.info.settings["split"] == "validation"
    assert_alike(dict(found), expected)


def test_statistics_go_into_the_adapter_which_still_loads(task: Path, tmp_path: Path):
    adapter = Adapter.open(task / "classifier").save(tmp_path / "mine")
    call_ = (task / "base", adapter, "--data", task / "data", "--text-column", "sentence1")
    result = call(*call_, "--examples", 4)
    assert result.exit_code == 0, result.output
    assert "fisher.safetensors: " in result.stdout
    assert "23 parameters, from 4 examples" in " ".join(result.stdout.split())
    assert "exists" in refuse(*call_)
    succeed(*call_, "--examples", 3, "--force", "--dtype", "bfloat16")
    found = open_statistics(adapter, "fisher")
    assert (found.info.examples, found.info.dtype) == (3, "BF16")
    assert found.info.settings["estimate"] == "mergelm"
    model = BertForSequenceClassification.from_pretrained(task / "base", num_labels=3)
    assert model.load_dare_adapter(adapter) == "mine"


def test_the_choice_of_examples_depends_on_the_seed_alone(task: Path):
    tokenizer = AutoTokenizer.from_pretrained(task / "base")
    rows = read_rows(task / "data" / "train.jsonl")

    def chosen(seed: int) -> list[list[int]]:
        batches = Batches(
            rows, tokenizer, text_column="sentence1", examples=7, batch_size=3, seed=seed
        )
        assert len(batches) == 3
        assert batches.examples == 7
        found = list(batches)
        assert [len(batch["input_ids"]) for batch in found] == [3, 3, 1]
        assert list(batches)[2]["input_ids"].tolist() == found[2]["input_ids"].tolist()
        return [row for batch in found for row in batch["input_ids"].tolist()]

    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)


def test_a_live_model_keeps_its_weights_and_its_active_adapter(task: Path, tmp_path: Path):
    model = BertForSequenceClassification.from_pretrained(task / "base", num_labels=3)
    model.load_dare_adapter(task / "classifier", "mine")
    before = all_bytes(model)
    rows = [{"words": text} for text in texts(4)]
    found = compute_statistics(
        model, task / "classifier", rows, text_column="words", out=tmp_path, progress=False
    )
    assert found.info.dataset == "list"
    assert model.dare_adapters == model.active_dare_adapters == ["mine"]
    assert all_bytes(model) == before
    assert_tokenised_fisher(task, rows, found)


def assert_tokenised_fisher(task: Path, rows: list[dict[str, str]], found: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(task / "base")
    tuned = AutoModelForSequenceClassification.from_pretrained(task / "classifier-tuned").eval()
    batch = dict(tokenizer([row["words"] for row in rows], padding=True, return_tensors="pt"))
    assert_alike(dict(found), bare(diagonal_fisher(tuned, [batch])))


# A language model, its vocabulary grown by the fine-tune ------------------------------------------


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("language")
    config = tiny_llama(**{**SMALL, "vocab_size": 22, "intermediate_size": 24})
    model = lively(LlamaForCausalLM(config))
    model.save_pretrained(root / "base")
    save_tokenizer(root / "base")
    model.resize_token_embeddings(26, mean_resizing=False)
    moved(model).save_pretrained(root / "tuned")
    save_tokenizer(root / "tuned")
    extracted(root / "base", root / "tuned", root / "adapter")
    return root


def test_statistics_of_a_grown_vocabulary_have_the_bases_shapes(language: Path, tmp_path: Path):
    data = tmp_path / "words.txt"
    data.write_text("\n".join(texts(6)) + "\n")
    call_ = (language / "base", language / "adapter", "--data", data, "--out", tmp_path)
    succeed(*call_, "--estimate", "labels", "--batch-size", 1)
    tokenizer = AutoTokenizer.from_pretrained(language / "base")
    tuned = LlamaForCausalLM.from_pretrained(language / "tuned").eval()
    batches = [dict(tokenizer(text, return_tensors="pt")) for text in texts(6)]
    inputs = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in batches]
    expected = diagonal_fisher(tuned, inputs, estimate="labels")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert expected[name].shape == (26, 16)
        expected[name] = expected[name][:22]
    found = open_statistics(language / "adapter", "fisher", tmp_path)
    assert_alike(dict(found), expected)
    assert found.info.settings["estimate"] == "labels"
    succeed(*call_, "--kind", "gram", "--include", "*.q_proj.*")
    assert list(open_statistics(language / "adapter", "gram", tmp_path)) == [
        "model.layers.0.self_attn.q_proj.weight"
    ]


# Data ---------------------------------------------------------------------------------------------

ROWS = [{"text": text, "label": number} for number, text in enumerate(texts(3))]


def written(path: Path, delimiter: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda p: p.write_text("\n".join(json.dumps(row) for row in ROWS)),
    "rows.json": lambda p: p.write_text(json.dumps(ROWS)),
    "rows.csv": lambda p: written(p, ","),
    "rows.tsv": lambda p: written(p, "\t"),
    "rows.parquet": lambda p: datasets.Dataset.from_list(ROWS).to_parquet(p),
    "saved": lambda p: datasets.Dataset.from_list(ROWS).save_to_disk(p),
    "splits": lambda p: datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1])
    ).save_to_disk(p),
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_read_from_every_kind_of_file(name: str, tmp_path: Path):
    WRITERS[name](tmp_path / name)
    shown = datasets.are_progress_bars_disabled()
    rows = read_rows(tmp_path / name)
    assert [dict(rows[number]) for number in range(len(rows))] == ROWS
    assert datasets.are_progress_bars_disabled() is shown


def test_a_directory_has_splits_and_folders_for_configs(task: Path, tmp_path: Path):
    (tmp_path / "glue").mkdir()
    (tmp_path / "glue" / "words").symlink_to(task / "data")
    assert len(read_rows(tmp_path / "glue", "words")) == 12
    assert len(read_rows(str(tmp_path / "glue"), "words", "validation")) == 5


@pytest.mark.parametrize(
    ("source", "config", "split", "message"),
    [
        ("data", None, "test", "split 'test'.*train"),
        ("data", "cola", "train", "cola"),
        ("data/rows.xyz", None, "train", "ending is '.xyz'"),
        ("nowhere/at-all", None, "train", "nowhere/at-all"),
        ("splits", None, "dev", "there are train, test"),
    ],
)
def test_data_that_is_not_there_is_refused_by_name(
    source: str, config: str | None, split: str, message: str, task: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for file in (task / "data").iterdir():
        (tmp_path / "data" / file.name).write_bytes(file.read_bytes())
    if source.endswith(".xyz"):
        (tmp_path / source).touch()
    if source == "splits":
        WRITERS["splits"](tmp_path / "splits")
    with pytest.raises(DareError, match=message):
        read_rows(source, config, split)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 1, "no column 'text'; it has idx, sentence1, sentence2, label"),
        (("--text-column", "label"), 1, "label is"),
        (("--text-column", "sentence1", "--label-column", "score"), 1, "no column 'score'"),
        (("--text-column", "sentence1", "--kind", "gram", "--dtype", "bfloat16"), 2, "inverted"),
        (("--text-column", "sentence1", "--include", "nothing.*"), 2, "leave no parameter"),
        (("--text-column", "sentence1", "--examples", "0"), 2, "--examples"),
        (("--text-column", "sentence1", "--kind", "hessian"), 2, "hessian"),
        (("--text-column", "sentence1", "--device", "nowhere"), 2, "--device"),
        (("--text-column", "sentence1", "--split", "nope"), 1, "'nope'"),
    ],
)
def test_a_call_that_makes_no_sense_is_answered_in_a_sentence(
    task: Path, tmp_path: Path, options: tuple[str, ...], code: int, message: str
):
    base, adapter = task / "base", task / "classifier"
    given = ("--data", task / "data", *options, "--out", tmp_path / "out")
    assert message in refuse(base, adapter, *given, code=code)
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(task: Path, language: Path, tmp_path: Path):
    lively(BertModel(bert_config(vocab_size=22))).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    model = BertModel.from_pretrained(tmp_path / "base")
    moved(model).save_pretrained(tmp_path / "base")
    given = ("--data", task / "data", "--text-column", "sentence1", "--out", tmp_path)
    assert "BaseMismatchError" in refuse(tmp_path / "base", task / "classifier", *given)
    assert "does not load" in refuse(tmp_path / "none", task / "classifier", *given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(architectures=["os"]), "no class of transformers"),
        (lambda raw: raw.update(architectures=["pipeline"]), "no class of transformers"),
        (lambda raw: raw.update(architectures=["AutoTokenizer"]), "no class of transformers"),
        (lambda raw: raw.update(architectures=[["BertModel"]]), "no class of transformers"),
        (lambda raw: raw.update(architectures=None), "architectures is None"),
        (lambda raw: raw.update(architectures=["BertForPreTraining"]), "neither"),
        (lambda raw: raw.update(model_type="nothing"), "no model config"),
        (lambda raw: raw.update(hidden_size="wide"), "no model config"),
    ],
)
def test_a_task_that_cannot_be_told_from_the_adapter_is_refused(
    task: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
):
    adapter = Adapter.open(task / "classifier").save(tmp_path / "mine")
    file = adapter / "finetuned_config.json"
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))
    given = ("--data", task / "data", "--text-column", "sentence1")
    assert message in refuse(task / "base", adapter, *given)
    assert not (adapter / "fisher.safetensors").exists()


def test_an_adapter_without_a_task_needs_a_live_model(task: Path, tmp_path: Path):
    adapter = Adapter.open(task / "classifier").save(tmp_path / "mine")
    (adapter / "finetuned_config.json").unlink()
    given = ("--data", task / "data", "--text-column", "sentence1")
    assert "pass it as the base" in refuse(task / "base", adapter, *given)


def test_without_datasets_the_message_says_what_to_install(
    task: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DareError, match=r"pip install 'dare-adapters\[stats\]'"):
        read_rows(task / "data")
