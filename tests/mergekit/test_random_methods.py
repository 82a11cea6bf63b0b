"""DARE and DELLA, whose masks are not mergekit's: what hundreds of seeds give, by statistics."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dare_adapters
from tests.mergekit.recipes import recipe

pytestmark = pytest.mark.mergekit

SEEDS = 200
SHAPES = {"model.layers.0.mlp.up_proj.weight": (24, 40), "model.norm.weight": (320,)}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Job:
    """A method, and what each model has of its parameters."""

    method: str
    each: tuple[dict[str, float], ...]
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Any]:
        """As `merge_tensors` takes them: a list where models have their own."""
        return {name: [own[name] for own in self.each] for name in self.each[0]} | self.shared

    @property
    def recipe(self) -> str:
        models = {f"model_{number}": own for number, own in enumerate(self.each)}
        return recipe(self.method, models, **self.shared)


def _of_one(**own: float) -> tuple[dict[str, float], ...]:
    return ({"weight": 1.0, **own},)


def _of_three(**own: tuple[float, ...]) -> tuple[dict[str, float], ...]:
    weights = (0.6, 0.3, 0.5)
    return tuple(
        {"weight": weights[number], **{name: values[number] for name, values in own.items()}}
        for number in range(3)
    )


JOBS = {
    "dare": Job("dare_linear", _of_one(density=0.3)),
    "dare_a_tenth": Job("dare_linear", _of_one(density=0.1)),
    "dare_unscaled": Job("dare_linear", _of_one(density=0.7), {"rescale": False}),
    "dare_linear": Job("dare_linear", _of_three(density=(0.5, 0.15, 0.8))),
    "dare_ties": Job("dare_ties", _of_three(density=(0.6, 0.4, 0.7))),
    "dare_ties_mean": Job(
        "dare_ties", _of_three(density=(0.6, 0.4, 0.7)), {"normalize": True, "lambda": 1.3}
    ),
    "della_linear": Job("della_linear", _of_one(density=0.4, epsilon=0.3)),
    "della_unscaled": Job("della", _of_one(density=0.6, epsilon=0.1), {"rescale": False}),
    "della": Job("della", _of_three(density=(0.6, 0.4, 0.7), epsilon=(0.3, 0.05, 0.2))),
}
ALONE = [name for name, job in JOBS.items() if len(job.each) == 1]
RESCALED = [name for name in ALONE if JOBS[name].shared.get("rescale", True)]


@dataclass(frozen=True)
class Draws:
    """Results, stacked, of both; what each model changes; and ours with masks in blocks."""

    ours: dict[str, Tensors]
    theirs: dict[str, Tensors]
    deltas: list[Tensors]
    blocked: dict[str, Tensors]

    def of(self, who: str, name: str) -> Tensors:
        return (self.ours if who == "ours" else self.theirs)[name]


@pytest.fixture(scope="module")
def draws(mergekit, tmp_path_factory) -> Draws:
    root = tmp_path_factory.mktemp("drawn")
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.01 * torch.randn(size, generator=generator) for name, size in SHAPES.items()}
    models = [
        {name: base[name] + torch.randn(size, generator=generator) for name, size in SHAPES.items()}
        for _ in range(3)
    ]
    paths = {"base": _save(root / "base", base)}
    for number, model in enumerate(models):
        paths[f"model_{number}"] = _save(root / f"model_{number}", model)
    files = [str(path / "model.safetensors") for path in paths.values()]
    mergekit.run(
        {
            name: {
                "method": job.method,
                "parameters": job.parameters,
                "seeds": SEEDS,
                "base": files[0],
                "models": files[1 : 1 + len(job.each)],
                "out": str(root / f"{name}.safetensors"),
            }
            for name, job in JOBS.items()
        }
    )

    def ours(name: str, mask: str, seeds: int) -> Tensors:
        text = Template(JOBS[name].recipe).substitute(paths)
        found = []
        for seed in range(seeds):
            out = dare_adapters.merge(
                text, root / "out", seed=seed, mask=mask, overwrite=True, progress=False
            )
            found.append(load_file(out / "model.safetensors"))
        return _changes({key: torch.stack([one[key] for one in found]) for key in SHAPES}, base)

    return Draws(
        {name: ours(name, "bernoulli", SEEDS) for name in JOBS},
        {name: _changes(load_file(root / f"{name}.safetensors"), base) for name in JOBS},
        [_changes(model, base) for model in models],
        {"dare_a_tenth": ours("dare_a_tenth", "auto", SEEDS)},
    )


def _save(path: Path, tensors: Tensors) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "vocab_size": 9}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def _changes(tensors: Tensors, base: Tensors) -> Tensors:
    return {name: tensor.double() - base[name].double() for name, tensor in tensors.items()}


def assert_same_mean(one: torch.Tensor, other: torch.Tensor) -> None:
    """Two stacks of draws of one distribution: what their means differ by is noise."""
    variance = one.var(dim=0) / len(one) + other.var(dim=0) / len(other)
    difference = one.mean(dim=0) - other.mean(dim=0)
    fixed = variance <= 1e-12
    assert (difference[fixed].abs() <= 1e-6).all()
    z = difference[~fixed] / variance[~fixed].sqrt()
    assert z.numel() > 100
    assert z.abs().max() < 5.5
    # The mean of n squares of standard normals is 1 ± √(2/n).
    assert abs(float(z.square().mean()) - 1) < 6 * math.sqrt(2 / z.numel())


@pytest.mark.parametrize("name", JOBS)
def test_the_mean_over_seeds_is_that_of_mergekit(name, draws):
    for key in SHAPES:
        assert_same_mean(draws.ours[name][key], draws.theirs[name][key])


@pytest.mark.parametrize("name", JOBS)
def test_results_spread_over_seeds_as_those_of_mergekit_do(name, draws):
    for key in SHAPES:
        ours, theirs = draws.ours[name][key].std(dim=0), draws.theirs[name][key].std(dim=0)
        assert float(ours.mean()) == pytest.approx(float(theirs.mean()), rel=0.03)


def test_masks_in_blocks_have_the_mean_of_mergekit_too(draws):
    for key in SHAPES:
        assert_same_mean(draws.blocked["dare_a_tenth"][key], draws.theirs["dare_a_tenth"][key])


@pytest.mark.parametrize("who", ["ours", "theirs"])
@pytest.mark.parametrize("name", [name for name in ALONE if "dare" in name])
def test_dare_keeps_each_entry_with_the_probability_of_the_density(name, who, draws):
    density = JOBS[name].each[0]["density"]
    for drawn in draws.of(who, name).values():
        kept = (drawn.abs() > 1e-7).double()
        spread = math.sqrt(density * (1 - density))
        assert abs(float(kept.mean()) - density) < 5 * spread / math.sqrt(kept.numel())
        assert (kept.mean(dim=0) - density).abs().max() < 5.5 * spread / math.sqrt(SEEDS)


def test_masks_in_blocks_keep_one_of_ten(draws):
    for drawn in draws.blocked["dare_a_tenth"].values():
        kept = (drawn.abs() > 1e-7).flatten(start_dim=1).sum(dim=1)
        assert (kept == drawn[0].numel() // 10).all()


@pytest.mark.parametrize("who", ["ours", "theirs"])
@pytest.mark.parametrize("name", [name for name in ALONE if "della" in name])
def test_della_keeps_each_entry_with_the_probability_of_its_rank(name, who, draws):
    own = JOBS[name].each[0]
    for key, drawn in draws.of(who, name).items():
        size = draws.deltas[0][key].abs()
        rank = size.argsort(dim=-1).argsort(dim=-1).double()
        share = rank / (size.shape[-1] - 1)
        probability = own["density"] - own["epsilon"] + 2 * own["epsilon"] * share
        kept = (drawn.abs() > 1e-7).double().mean(dim=0)
        z = (kept - probability) / (probability * (1 - probability) / SEEDS).sqrt()
        assert z.abs().max() < 5.5
        assert abs(float(z.square().mean()) - 1) < 6 * math.sqrt(2 / z.numel())


@pytest.mark.parametrize("who", ["ours", "theirs"])
@pytest.mark.parametrize("name", RESCALED)
def test_what_is_kept_is_rescaled_to_the_l1_norm_that_there_was(name, who, draws):
    for key, drawn in draws.of(who, name).items():
        before = draws.deltas[0][key].abs().sum()
        after = drawn.abs().flatten(start_dim=1).sum(dim=1)
        assert (after / before - 1).abs().max() < 1e-6
        # One factor for all of a tensor.
        for one in drawn:
            factors = (one / draws.deltas[0][key])[one.abs() > 1e-7]
            assert float(factors.max() / factors.min() - 1) < 1e-4


@pytest.mark.parametrize("who", ["ours", "theirs"])
@pytest.mark.parametrize("name", [name for name in ALONE if name not in RESCALED])
def test_without_rescaling_what_is_kept_is_as_it_was(name, who, draws):
    for key, drawn in draws.of(who, name).items():
        either = torch.minimum((drawn - draws.deltas[0][key]).abs(), drawn.abs())
        assert either.max() < 1e-6
