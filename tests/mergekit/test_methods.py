"""Every method without random choices: one recipe file, run by mergekit and by us."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import dare_adapters
from tests.conftest import read_checkpoint
from tests.mergekit.models import FAR, llama, save_family
from tests.mergekit.recipes import ADVERTISED, HALF_PRECISION, METHODS, STRUCTURES
from tests.recipe.cards import layers_of

pytestmark = [
    pytest.mark.mergekit,
    pytest.mark.filterwarnings("ignore::dare_adapters.recipe.RecipeWarning"),
]

IN_FLOAT64 = "\ndtype: float64\nout_dtype: float32\n"

# A difference, relative to the tensor's largest magnitude.
FLOAT32 = 1e-5
FLOAT64 = 1e-6  # mergekit's is then float64, rounded once, and ours as ever
# What mergekit loses in float32 on long vectors that nearly coincide: a cosine that is off by ε
# makes an angle Θ that is off by ε / sin Θ, and at most √(2ε), which karcher does in every step.
# (It has to be long vectors: model_stock's cosines are not near 1.) In float64 all agree.
LIMITED = {"wide_slerp": 1e-4, "wide_nuslerp": 1e-3, "wide_karcher": 1e-2}
# It keeps an entry or not by sums of p log(p/q) in which float32 has few digits left: see below.
CHOOSES = ("arcee_fusion", "arcee_fusion_near")

EXACT = {**METHODS, **STRUCTURES}
MODEL = re.compile(r"(?<=model: )[\w-]+/[\w.-]+")

SUMS_IN_HALF_PRECISION = {
    name: HALF_PRECISION[name].split("dtype")[0]
    for name in ("task_arithmetic", "multislerp", "karcher", "model_stock")
}

TIED_LAST_SLICE = """
merge_method: passthrough
base_model: $base
slices:
- sources: [{model: $base, layer_range: [0, 2]}]
- sources: [{model: $tied_a, layer_range: [2, 4]}]
"""


class Both:
    """Recipe files, and mergekit's output of each; ours is made when it is asked for."""

    def __init__(self, files: dict[str, Path], theirs: dict[str, Path], root: Path) -> None:
        self.files, self.outs, self.root = files, theirs, root

    def ours(self, name: str) -> dict[str, torch.Tensor]:
        out = self.root / name
        if not out.exists():
            dare_adapters.merge(self.files[name], out, progress=False)
        return read_checkpoint(out)

    def theirs(self, name: str) -> dict[str, torch.Tensor]:
        return read_checkpoint(self.outs[name])


@pytest.fixture(scope="session")
def both(mergekit, models, write_recipes, tmp_path_factory) -> Both:
    texts = EXACT | {f"{name}-float64": text + IN_FLOAT64 for name, text in EXACT.items()}
    texts |= {f"half-{name}": text for name, text in HALF_PRECISION.items()}
    for name, text in SUMS_IN_HALF_PRECISION.items():
        texts |= {f"half-sum-{name}": text, f"half-sum-{name}-float64": text + IN_FLOAT64}
    texts["tied_last_slice"] = TIED_LAST_SLICE
    files = write_recipes(texts) | _advertised(tmp_path_factory.mktemp("advertised"))
    return Both(files, mergekit.merge(files), tmp_path_factory.mktemp("ours"))


def _advertised(root: Path) -> dict[str, Path]:
    """The recipes of cards, with a small Llama of as many layers for every model they name."""
    names = {name for text in ADVERTISED.values() for name in MODEL.findall(text)}
    paths: dict[str, Path] = {}
    for depth in {layers_of(name) for name in names}:
        spreads = {name: FAR for name in sorted(names) if layers_of(name) == depth}
        slugs = {name.replace("/", "--"): spread for name, spread in spreads.items()}
        family = save_family(root / str(depth), "", llama(num_hidden_layers=depth), slugs)
        paths |= {name: family[name.replace("/", "--")] for name in spreads}
    files = {}
    for card, text in ADVERTISED.items():
        files[f"card-{card}"] = root / f"{card}.yml"
        local = MODEL.sub(lambda found: str(paths[found[0]]), text)
        files[f"card-{card}"].write_text(local + IN_FLOAT64, encoding="utf-8")
    return files


def assert_same(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float
) -> None:
    """The same tensors, up to a difference relative to each one's largest magnitude."""
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {
        name: (t.shape, t.dtype) for name, t in theirs.items()
    }
    assert theirs
    for name, expected in theirs.items():
        difference = (ours[name].double() - expected.double()).abs().max()
        assert difference <= tolerance * expected.double().abs().max(), name


@pytest.mark.parametrize("name", [name for name in EXACT if name not in CHOOSES])
def test_a_recipe_gives_what_mergekit_makes_of_it(name, both):
    assert_same(both.ours(name), both.theirs(name), LIMITED.get(name, FLOAT32))


@pytest.mark.parametrize("name", EXACT)
def test_a_recipe_gives_what_mergekit_makes_of_it_in_float64(name, both):
    name += "-float64"
    assert_same(both.ours(name), both.theirs(name), FLOAT64)


@pytest.mark.parametrize("card", ADVERTISED)
def test_a_recipe_of_a_model_card_gives_what_mergekit_makes_of_it(card, both):
    assert_same(both.ours(f"card-{card}"), both.theirs(f"card-{card}"), FLOAT64)


def test_arcee_fusion_chooses_as_mergekit_does_but_where_that_rounds(both, models):
    ours, theirs = both.ours("arcee_fusion"), both.theirs("arcee_fusion")
    base, tuned = read_checkpoint(models["base"]), read_checkpoint(models["a"])
    assert set(ours) == set(theirs)
    other = total = 0
    for name in theirs:
        either = torch.stack([base[name], tuned[name]])
        for found in (ours[name], theirs[name]):
            assert ((found - either).abs().amin(dim=0) <= 1e-6).all(), name
        other += int(((ours[name] - theirs[name]).abs() > 1e-6).sum())
        total += theirs[name].numel()
    assert other <= 0.02 * total


@pytest.mark.parametrize("name", HALF_PRECISION)
def test_models_in_bfloat16_are_merged_and_rounded_once(name, both):
    ours, theirs = both.ours(f"half-{name}"), both.theirs(f"half-{name}")
    assert set(ours) == set(theirs)
    other = total = 0
    for key, expected in theirs.items():
        assert (ours[key].dtype, expected.dtype) == (torch.bfloat16, torch.bfloat16)
        found, wanted = ours[key].double(), expected.double()
        step = 2.0**-7 * torch.maximum(
            found.abs(), wanted.abs()
        )  # of bfloat16, from one to the next
        lost = FLOAT32 * wanted.abs().max()  # where inputs cancel
        assert ((found - wanted).abs() <= step + lost).all(), key
        other += int((found != wanted).sum())
        total += found.numel()
    assert other <= (0 if name in ("passthrough", "stacked") else 0.005 * total)


@pytest.mark.parametrize("name", SUMS_IN_HALF_PRECISION)
def test_what_mergekit_computes_in_bfloat16_is_computed_in_float32(name, both):
    ours, theirs = both.ours(f"half-sum-{name}"), both.theirs(f"half-sum-{name}")
    exact = both.theirs(f"half-sum-{name}-float64")
    assert set(ours) == set(theirs) == set(exact)
    error = {"ours": 0.0, "theirs": 0.0}
    for key, expected in exact.items():
        assert ours[key].dtype == theirs[key].dtype == torch.bfloat16
        for who, found in (("ours", ours[key]), ("theirs", theirs[key])):
            error[who] += float((found.double() - expected.double()).square().sum())
    assert error["ours"] < 0.8 * error["theirs"]


def test_a_head_that_the_last_slice_ties_is_written_where_mergekit_leaves_it_out(both, models):
    ours, theirs = both.ours("tied_last_slice"), both.theirs("tied_last_slice")
    head = ours.pop("lm_head.weight")
    assert_same(ours, theirs, 0.0)
    # The config is that of a model with a head of its own, which would be drawn at random.
    tied = read_checkpoint(models["tied_a"])["model.embed_tokens.weight"]
    assert torch.equal(head, tied)
