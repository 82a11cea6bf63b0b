"""Fine-tunes: what is trained, on what, and that nothing is trained twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from dare_adapters.errors import AdapterExistsError, CheckpointError
from dare_eval.glue.data import hold_out, read_rows
from dare_eval.glue.encoder import GlueEncoder
from dare_eval.glue.tasks import TASKS
from dare_eval.glue.train import TRAINING_FILE, SharedEncoder, TrainingSettings, train
from dare_eval.glue.training import run_training
from dare_eval.records import Records
from tests.conftest import read_checkpoint
from tests.eval.glue.conftest import SETTINGS, Lab


def test_the_defaults_are_mergelms():
    paper = TrainingSettings(held_out=0)
    assert (paper.epochs, paper.batch_size, paper.max_length) == (10, 16, 128)
    assert (paper.warmup, paper.weight_decay) == (0.06, 0.01)
    assert paper.resolved([TASKS["cola"]]).learning_rate == 1e-5
    assert paper.resolved([TASKS["mrpc"]]).learning_rate == 5e-5
    assert paper.reduced == {}
    assert TrainingSettings(epochs=2, held_out=0).reduced == {"epochs": [10, 2]}


def test_a_fine_tune_learns_what_neither_majority_nor_head_knows(lab: Lab):
    records = {r.config["task"]: r.result for r in lab.records}
    assert set(records) == {"sst2", "mrpc", "stsb"}
    for task, result in records.items():
        assert result["score"] > 0.8, task
        assert result["score"] > result["majority"]["score"] + 0.1, task
        assert result["score"] > result["base_encoder"]["score"] + 0.1, task
        assert result["reduced"]["epochs"] == [10, 6]
        assert result["train_rows"] == 120 - SETTINGS.held_out


def test_what_is_trained_is_trained_once(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("dare_eval.glue.training.train", never)
    run_training(lab.base, lab.tasks, lab.finetuned, lab.records, SETTINGS, data_dir=lab.data)
    # Killed between training and scoring: the fine-tune is there, its record is not.
    fresh = Records(lab.finetuned.parent / "fresh")
    run_training(lab.base, lab.tasks[:1], lab.finetuned, fresh, SETTINGS, data_dir=lab.data)
    (record,) = fresh
    assert record.result["score"] == next(
        r.result["score"] for r in lab.records if r.config["task"] == "sst2"
    )
    with pytest.raises(AdapterExistsError, match="other settings"):
        run_training(
            lab.base,
            lab.tasks[:1],
            lab.finetuned,
            fresh,
            TrainingSettings(epochs=1, held_out=24),
            data_dir=lab.data,
        )


def test_held_out_rows_are_not_trained_on(
    bert: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Changing held-out labels changes no weight; changing others does."""
    rows = read_rows(TASKS["sst2"], "train", data_dir)
    held_out, rest = hold_out(rows, 24)
    few = TrainingSettings(epochs=1, held_out=24, learning_rate=1e-3)

    def weights(name: str, changed: list[object]) -> dict[str, torch.Tensor]:
        flipped = [type(r)(r.texts, 1 - r.label) if r in changed else r for r in rows]
        train(bert, {TASKS["sst2"]: flipped}, tmp_path / name, few)
        return read_checkpoint(tmp_path / name / "sst2")

    plain = weights("plain", [])
    poisoned = weights("poisoned", held_out)
    assert all(torch.equal(plain[key], poisoned[key]) for key in plain)
    other = weights("other", rest[:30])
    assert not all(torch.equal(plain[key], other[key]) for key in plain)
    about = json.loads((tmp_path / "plain" / "sst2" / TRAINING_FILE).read_text())
    assert about["held_out"] == 24


def test_tasks_trained_together_share_an_encoder_and_not_a_head(
    bert: str, data_dir: Path, tmp_path: Path
):
    tasks = [TASKS["sst2"], TASKS["stsb"]]
    records = Records(tmp_path / "records")
    run_training(
        bert, tasks, tmp_path / "out", records, SETTINGS, data_dir=data_dir, multi_task=True
    )
    one, other = (read_checkpoint(tmp_path / "out" / task.name) for task in tasks)
    base = read_checkpoint(Path(bert))
    for name, value in one.items():
        if name.startswith("bert."):
            assert torch.equal(value, other[name]), name
    assert not torch.equal(one["bert.pooler.dense.weight"], base["pooler.dense.weight"])
    assert one["classifier.weight"].shape == (2, 32)
    assert other["classifier.weight"].shape == (1, 32)
    assert {r.config["task"]: r.result["score"] > 0.8 for r in records} == {
        "sst2": True,
        "stsb": True,
    }


def test_the_loss_of_a_mixed_batch_is_the_mean_over_its_rows(bert: str):
    torch.manual_seed(0)
    kinds = {"sst2": 2, "stsb": 1}
    models = {
        name: AutoModelForSequenceClassification.from_pretrained(bert, num_labels=labels).eval()
        for name, labels in kinds.items()
    }
    shared = SharedEncoder(models).eval()
    tokens = torch.randint(4, 20, (5, 6))
    tasks, labels = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([1.0, 2.5, 0.0, 4.0, 1.0])
    loss = shared(tasks, labels, {"input_ids": tokens})["loss"]
    each = []
    for row, task, label in zip(tokens, tasks, labels, strict=True):
        logits = list(models.values())[task](row[None]).logits[0]
        each.append(
            torch.nn.functional.mse_loss(logits[0], label)
            if task == 1
            else torch.nn.functional.cross_entropy(logits, label.long())
        )
    assert loss.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_a_roberta_is_trained_and_scored_like_a_bert(roberta: str, data_dir: Path, tmp_path: Path):
    records = Records(tmp_path / "records")
    run_training(roberta, [TASKS["sst2"]], tmp_path / "out", records, SETTINGS, data_dir=data_dir)
    (record,) = records
    assert record.result["score"] > 0.8
    encoder = GlueEncoder(roberta, {TASKS["sst2"]: tmp_path / "out" / "sst2"})
    names = set(encoder.deltas["sst2"])
    assert names
    assert not any("classifier" in name or "lm_head" in name for name in names)


def test_a_model_that_is_none_is_named(data_dir: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        run_training(
            str(tmp_path / "empty"),
            [TASKS["sst2"]],
            tmp_path / "out",
            Records(tmp_path / "records"),
            SETTINGS,
            data_dir=data_dir,
        )


def test_training_starts_from_another_fine_tunes_encoder(
    lab: Lab, data_dir: Path, tmp_path: Path, bert: str
):
    """With no step taken, the encoder is the other fine-tune's, and the head is not."""
    still = TrainingSettings(
        epochs=0.01, held_out=24, learning_rate=0.0, start_from=str(lab.finetuned / "mrpc")
    )
    rows = read_rows(TASKS["sst2"], "train", data_dir)
    train(bert, {TASKS["sst2"]: rows}, tmp_path, still)
    made, other = read_checkpoint(tmp_path / "sst2"), read_checkpoint(lab.finetuned / "mrpc")
    encoder = {name for name in other if name.startswith("bert.")}
    assert encoder
    assert all(torch.equal(made[name], other[name]) for name in encoder)
    assert not torch.equal(made["classifier.weight"], other["classifier.weight"])
    records = Records(tmp_path / "records")
    run_training(bert, [TASKS["sst2"]], tmp_path, records, still, data_dir=data_dir)
    (record,) = records
    assert str(lab.finetuned) not in json.dumps(record.config) + json.dumps(record.result)


def test_what_cannot_be_started_from_is_named(bert: str, data_dir: Path, tmp_path: Path):
    wider = AutoModelForSequenceClassification.from_pretrained(bert)
    config = wider.config
    config.hidden_size, config.intermediate_size = 2 * config.hidden_size, 64
    type(wider)(config).save_pretrained(tmp_path / "wider")
    settings = TrainingSettings(held_out=24, start_from=str(tmp_path / "wider"))
    rows = read_rows(TASKS["sst2"], "train", data_dir)
    with pytest.raises(CheckpointError, match=r"start from .*wider"):
        train(bert, {TASKS["sst2"]: rows}, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
