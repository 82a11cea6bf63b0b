"""What is left after dropping, against the equations written out on dense tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dare_eval.glue.encoder import GlueEncoder
from dare_eval.glue.pruned import METHODS, Pruned
from tests.conftest import read_checkpoint
from tests.eval.glue.conftest import Lab

NAME = "encoder.layer.1.intermediate.dense.weight"
BIAS = "encoder.layer.1.intermediate.dense.bias"


@pytest.fixture(scope="module")
def encoder(lab: Lab) -> GlueEncoder:
    return GlueEncoder(lab.base, lab.of("sst2"))


@pytest.fixture(scope="module")
def weights(lab: Lab) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of every encoder parameter the base's and the fine-tune's values."""
    base, tuned = read_checkpoint(Path(lab.base)), read_checkpoint(lab.finetuned / "sst2")
    return {name: (value, tuned[f"bert.{name}"]) for name, value in base.items()}


def kept(change: torch.Tensor) -> torch.Tensor:
    return change != 0


@pytest.mark.parametrize("mask", ["auto", "blocked", "bernoulli"])
def test_dare_rescales_what_a_mask_keeps_and_drop_only_does_not(
    encoder: GlueEncoder,
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]],
    mask: str,
):
    delta = encoder.deltas["sst2"]
    survivors = 0
    for name, (base, tuned) in weights.items():
        dare = Pruned(delta, "dare", 0.75, seed=3, mask=mask)[name].dense()
        plain = Pruned(delta, "drop_only", 0.75, seed=3, mask=mask)[name].dense()
        assert torch.equal(kept(dare), kept(plain)), name
        assert torch.allclose(plain, (tuned - base) * kept(plain), atol=1e-7)
        assert torch.allclose(dare, 4 * (tuned - base) * kept(plain), atol=1e-6)
        survivors += int(kept(dare).sum())
    total = sum(base.numel() for base, _ in weights.values())
    assert survivors / total == pytest.approx(0.25, abs=0.02)


def test_magnitude_keeps_the_largest_of_each_parameter(
    encoder: GlueEncoder, weights: dict[str, tuple[torch.Tensor, torch.Tensor]]
):
    base, tuned = weights[NAME]
    delta = tuned - base
    left = Pruned(encoder.deltas["sst2"], "magnitude", 0.9)[NAME].dense()
    count = int(0.1 * delta.numel())
    assert int(kept(left).sum()) == count
    assert delta.abs()[kept(left)].min() >= delta.abs().flatten().topk(count).values[-1]
    assert torch.allclose(left, delta * kept(left), atol=1e-7)


def test_masked_weights_are_the_fine_tunes_own_times_a_rescaled_mask(
    encoder: GlueEncoder, weights: dict[str, tuple[torch.Tensor, torch.Tensor]]
):
    base, tuned = weights[NAME]
    change = Pruned(encoder.deltas["sst2"], "masked_weights", 0.5, seed=1)[NAME].dense()
    merged = base + change
    lives = merged.abs() > 1e-6
    assert lives.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.allclose(merged[lives], 2 * tuned[lives], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_vectors_are_dropped_from_unless_they_are_to_be_kept(
    encoder: GlueEncoder,
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]],
    method: str,
):
    base, tuned = weights[BIAS]
    delta = encoder.deltas["sst2"]
    whole = Pruned(delta, method, 0.9, keep_vectors=True)[BIAS].dense()
    assert torch.allclose(whole, tuned - base, atol=1e-7)
    assert not torch.allclose(Pruned(delta, method, 0.9)[BIAS].dense(), tuned - base)


def test_another_seed_is_another_mask_and_the_same_seed_the_same(encoder: GlueEncoder):
    delta = encoder.deltas["sst2"]
    first, again, other = (Pruned(delta, "dare", 0.9, seed=s)[NAME].dense() for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dropping_nothing_is_the_fine_tune(encoder: GlueEncoder):
    delta = encoder.deltas["sst2"]
    for method in METHODS:
        assert torch.equal(Pruned(delta, method, 0.0)[NAME].dense(), delta[NAME].dense())


def test_an_unknown_method_is_refused(encoder: GlueEncoder):
    with pytest.raises(ValueError, match="there are dare, drop_only"):
        Pruned(encoder.deltas["sst2"], "random", 0.5)
