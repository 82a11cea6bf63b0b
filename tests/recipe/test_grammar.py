"""What is a recipe and what is not, and what is said of the latter."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dare_adapters.errors import RecipeError
from dare_adapters.recipe import (
    MERGE_METHODS,
    ModelPath,
    ModelReference,
    RecipeWarning,
    TokenRule,
    TokenSource,
    check_recipe,
    read_recipe,
    with_adapter_bases,
)
from tests.recipe.cards import CARDS
from tests.recipe.models import reference

PLAIN = "models: [{model: a}]\nmerge_method: passthrough\n"


def refused(source: object, *pieces: str) -> None:
    """A source is refused, before any model, and the message has all of the pieces."""
    with pytest.raises(RecipeError) as caught:
        check_recipe(read_recipe(source))
    for piece in pieces:
        assert piece in str(caught.value)


@pytest.mark.parametrize("card", CARDS)
def test_recipes_of_model_cards_are_read_and_checked(card):
    recipe = read_recipe(CARDS[card])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecipeWarning)
        check_recipe(recipe)
    plain = yaml.safe_load(CARDS[card])
    assert recipe.merge_method == plain["merge_method"]
    assert recipe.text == CARDS[card]
    named = set(re.findall(r"^(?!.*source:).*model: ([\w-]+/[\w.-]+)", CARDS[card], re.M))
    assert {str(model) for model in recipe.inputs} == named


def test_path_text_and_mapping_give_the_same_recipe(tmp_path):
    text = CARDS["dare_ties_union"]
    file = tmp_path / "recipe.yml"
    file.write_text(text, encoding="utf-8")
    from_text = read_recipe(text)
    assert read_recipe(file) == read_recipe(str(file)) == from_text
    assert read_recipe(yaml.safe_load(text)) == from_text
    assert read_recipe(yaml.safe_load(text)).text  # for the output's model card


def test_a_whole_recipe_is_what_was_written():
    recipe = read_recipe(CARDS["linear_slices"])
    second = recipe.slices[1]
    assert [source.layer_range for source in second.sources] == [(10, 30), (20, 40)]
    (condition,) = second.sources[1].parameters["weight"]
    assert (condition.filter, condition.values) == ("self_attn", (0.75,))
    assert second.parameters["normalize"][0].values == (False,)
    assert recipe.slices[0].sources[0].parameters["weight"][0].values == (1, 0)
    assert recipe.dtype == torch.float16
    assert recipe.out_dtype is None
    assert recipe.donor == reference("psmathur/orca_mini_v3_13b")


def test_tokenizer_section():
    tokenizer = read_recipe(CARDS["tokens"]).tokenizer
    hermes = reference("teknium/OpenHermes-2.5-Mistral-7B")
    assert (tokenizer.source, tokenizer.pad_to_multiple_of) == ("union", 64)
    assert tokenizer.tokens == {
        "<|im_start|>": TokenRule(TokenSource("model", hermes)),
        "<|im_end|>": TokenRule(TokenSource("model", hermes), force=True),
        "<|pad|>": TokenRule(TokenSource("zero")),
        "<|user|>": TokenRule(
            TokenSource("model_token", reference("mistralai/Mistral-7B-v0.1"), token="[INST]")
        ),
    }
    assert read_recipe(PLAIN + "tokenizer_source: base").tokenizer.source == "base"
    assert read_recipe(PLAIN + "tokenizer_source: org/x").tokenizer.source == reference("org/x")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("org/model", ModelReference(ModelPath("org/model"))),
        ("./base/", ModelReference(ModelPath("./base"))),
        ("org/m@main", ModelReference(ModelPath("org/m", "main"))),
        ("org/m@v1+org/l@v2", ModelReference(ModelPath("org/m", "v1"), ModelPath("org/l", "v2"))),
        ("{model: /a+b@c}", ModelReference(ModelPath("/a+b", "c"))),
        ("{model: {path: /a+b@c}}", ModelReference(ModelPath("/a+b@c"))),
        (
            "{model: org/m@r, lora: {path: l, revision: x}, override_architecture: A}",
            ModelReference(ModelPath("org/m", "r"), ModelPath("l", "x"), "A"),
        ),
    ],
)
def test_model_references(written, read):
    text = f"merge_method: passthrough\nmodels:\n- model: {written}\n"
    assert read_recipe(text).inputs == (read,)


@pytest.mark.parametrize("name", ["a+b+c", "a@b@c", "a+", "a@", "+l", "'@r'", "''", "' '"])
def test_what_names_no_model_is_refused_with_its_line(name):
    text = f"merge_method: passthrough\nmodels:\n- model: b\n- model: {name}\n"
    refused(text, "line 4, models[1].model")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (PLAIN + "base_modle: b", ["line 3", "'base_modle'", "did you mean 'base_model'"]),
        (PLAIN + "normalize: true", ["line 3", "under the key 'parameters'"]),
        (PLAIN + "name: first", ["mergekit-multi"]),
        (PLAIN + "---\n" + PLAIN, ["second YAML document", "a file of its own"]),
        (PLAIN + "merge_method: ties", ["line 3", "comes twice"]),
        (PLAIN + "dtype: bf16", ["'bf16'", "bfloat16, float16, float32, float64"]),
        (PLAIN + "dtype: int64", ["'int64'"]),
        (PLAIN + "parameters: 3", ["expected parameters, found 3"]),
        (PLAIN + "parameters: {scale: null}", ["found nothing"]),
        (PLAIN + "parameters: {scale: [[1]]}", ["found a list of 1"]),
        (PLAIN + "parameters: {scale: [{value: 1}, 2]}", ["do not go into one list"]),
        (PLAIN + "parameters: {scale: [{filter: x}]}", ["needs the key 'value'"]),
        (PLAIN + "parameters: {scale: [{value: 1, fliter: x}]}", ["did you mean 'filter'"]),
        (PLAIN + "slices: [{sources: []}]", ["both models and slices"]),
        ("merge_method: linear\nmodels: []", ["exactly one of", "none of them"]),
        ("models: [{model: a}]\n", ["needs the key merge_method"]),
        ("merge_method: linear\nmodels: [a]", ["models[0]", "expected an entry of models"]),
        ("merge_method: linear\nmodels: [{model: 7}]", ["put quotes around it"]),
        ("merge_method: linear\nmodels: [{path: a}]", ["'path' is no key"]),
        (PLAIN + "tokenizer_source: base\ntokenizer: {}", ["exclude each other"]),
        (PLAIN + "tokenizer: {tokens: {x: {force: true}}}", ["force needs a source"]),
        (PLAIN + "tokenizer: {tokens: {x: {source: {kind: one}}}}", ["'zero' or 'model_token'"]),
        (
            PLAIN + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
            ["either 'token' or 'token_id'"],
        ),
        (PLAIN + "tokenizer: {pad_to_multiple_of: 0}", ["at least 1"]),
        (PLAIN + "chat_template: vicuna", ["chatml", "'vicuna'"]),
        ("merge_method: ties\nmodules: {text: {models: [{model: a}]}}", ["'text'", "'default'"]),
        ("merge_method: ties\nmodules: {default: {}}", ["exactly one of models and slices"]),
        ("- a\n- b\n", ["expected a recipe, found a list of 2"]),
        ("\n", ["is empty"]),
        ("a: [\n", ["line 2", "not YAML"]),
        ("a: !!python/object/apply:os.system [ls]\n", ["tag"]),
        ("a: 2020-13-45\n", ["not YAML"]),
        ("a: 2020-01-05\n", ["not date", "quotes"]),
        ("? [a]\n: b\n", ["a key that is"]),
        ("yes: b\n", ["a key that is True"]),
        ("a: " + "[" * 1200 + "\n", ["not YAML"]),
        ("a: " + "9" * 30 + "\n", ["63 bits"]),
        ({1: 2}, ["a key that is int"]),
        ({"models": {"a"}}, ["not set"]),
        ({"dtype": datetime.date(2020, 1, 1)}, ["not date"]),
        (7, ["not int"]),
    ],
)
def test_what_is_no_recipe_is_refused_by_name(text, pieces):
    refused(text, *pieces)


@pytest.mark.parametrize(
    ("source", "pieces"),
    [
        ("{model: a, layer_range: [0, 4, 8]}", ["found 3 numbers"]),
        ("{model: a, layer_range: [4, 4]}", ["[4, 4) are none"]),
        ("{model: a, layer_range: [4, 2]}", ["[4, 2) are none"]),
        ("{model: a, layer_range: [-1, 2]}", ["at least 0, found -1"]),
        ("{model: a, layer_range: [0, 1.5]}", ["found 1.5"]),
        ("{model: a}", ["needs the key 'layer_range'"]),
        ("{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 5]}", ["[4, 5]"]),
        ("", ["at least one source"]),
    ],
)
def test_slices_that_are_none(source, pieces):
    refused(f"merge_method: linear\nslices:\n- sources: [{source}]\n", "line 3", *pieces)


def test_files_that_cannot_be_read(tmp_path):
    refused(tmp_path / "none.yml", "none.yml", "cannot be read")
    refused("none.yml", "none.yml", "cannot be read")
    refused(tmp_path, "cannot be read")
    (tmp_path / "latin.yml").write_bytes(b"a: \xff\n")
    refused(tmp_path / "latin.yml", "latin.yml")
    (tmp_path / "big.yml").write_bytes(b"#" * ((1 << 20) + 1))
    refused(tmp_path / "big.yml", "more than the 1048576")
    (tmp_path / "bad.yml").write_text("merge_method: linear\nmodel: []\n", encoding="utf-8")
    refused(tmp_path / "bad.yml", "bad.yml, line 2", "'model'")
    refused("a\0b", "cannot be read")


def test_anchors_and_merge_keys_are_yaml_and_serve():
    text = """
models:
  - {model: a, parameters: &p {weight: 0.5, density: 0.2}}
  - {model: b, parameters: {<<: *p, weight: 0.1}}
merge_method: ties
base_model: c
"""
    second = read_recipe(text).models[1].parameters
    assert (second["weight"][0].values, second["density"][0].values) == ((0.1,), (0.2,))
    assert "line 3" in second["density"][0].place


def nested(pattern: str) -> str:
    """Anchors a, b, c …, each made of the one before it."""
    letters = "abcdefghijklmnop"
    return "".join(
        f"{name}: &{name} {pattern.replace('?', f'*{before}')}\n"
        for before, name in itertools.pairwise(letters)
    )


@pytest.mark.parametrize(
    "bomb",
    [
        "a: &a [x, x]\n" + nested("[?, ?, ?]"),
        "a: &a {k: 1}\n" + nested("{<<: [?, ?, ?, ?, ?]}"),
        "a: &a [*a]\n",
        "a: &a {<<: *a}\n",
    ],
)
def test_a_short_text_cannot_stand_for_endless_values(bomb):
    refused(bomb, "a recipe of more than")


# --- methods and parameters, still without any model


def two(method: str, parameters: str = "", more: str = "") -> str:
    return (
        f"merge_method: {method}\nmodels:\n- model: a\n  parameters: {{{parameters}}}\n"
        f"- model: b\n  parameters: {{{parameters}}}\n{more}"
    )


BASE = "base_model: c\n"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (two("tise"), ["'tise'", "did you mean 'ties'", "passthrough"]),
        (two("ties", "weight: 1"), ["models", "name it with base_model"]),
        (two("ties", "density: 0.5", BASE), ["needs the parameter weight", "for a"]),
        (two("ties", "weight: 1, densty: 1", BASE), ["line 4", "did you mean 'density'"]),
        (two("ties", "weight: 1, density: 53", BASE), ["density is 53", "a number in 0 … 1"]),
        (two("ties", "weight: one", BASE), ["weight is 'one'", "a number"]),
        (two("ties", "weight: .nan", BASE), ["weight is nan"]),
        (two("ties", "weight: true", BASE), ["weight is True"]),
        (two("ties", "weight: [1, {value: 1}]", BASE), ["one list"]),
        (two("ties", "weight: 1", BASE + "parameters: {normalize: 2}"), ["true or false"]),
        (two("slerp"), ["base_model"]),
        (two("slerp", "", "base_model: a\n"), ["needs the parameter t", "under 'parameters'"]),
        (two("slerp", "", BASE + "parameters: {t: 0.5}"), ["merges 1 model besides", "are 2"]),
        (two("model_stock", "", "base_model: a\n"), ["at least 2 models besides", "are 1"]),
        (two("passthrough"), ["merges 1 model, here are 2"]),
        (two("nuslerp", "weight: 1", "base_model: a\n"), ["merges 2 models besides"]),
        (two("nearswap", "", "base_model: a\nparameters: {t: -1}"), ["at least 0"]),
        (two("karcher", "", "parameters: {max_iter: 1.5}"), ["a whole number of at least 0"]),
        (two("della", "weight: 1, density: 0.9", BASE), ["density is 0.9, epsilon 0.15"]),
        (two("linear", "weight: 0"), ["sum of the weights [0.0, 0.0], zero"]),
        (two("linear").replace("model: b", "model: a"), ["comes twice"]),
        (
            "merge_method: ties\nbase_model: c\nslices: [{sources: [{model: a, layer_range: [0, 2],"
            " parameters: {weight: 1}}]}]\n",
            ["slices[0]", "list it among the sources"],
        ),
        (
            two("linear", "weight: 1", "tokenizer: {tokens: {x: {source: z}}}"),
            ["'x' is to come from z, which is not merged", "a, b"],
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_model_is_opened(text, pieces):
    refused(text, *pieces)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (two("task_arithmetic", "weight: 1, density: 0.5", BASE), ["density (task_arithmetic"]),
        (two("ties", "weight: 1", BASE + "parameters: {int8_mask: true}"), ["int8_mask (ties"]),
        (
            two("slerp", "weight: 1", "base_model: a\nparameters: {t: 1}"),
            ["weight (slerp has none"],
        ),
        (two("ties", "weight: 1", "base_model: a\n"), ["weight of the base_model", "line 4"]),
        (
            two("ties", "weight: 1, normalize: true", BASE),
            ["normalize of a single model", "line 4"],
        ),
    ],
)
def test_parameters_without_effect_are_accepted_with_a_warning(text, pieces):
    with pytest.warns(RecipeWarning) as caught:
        check_recipe(read_recipe(text))
    assert len(caught) == 1
    for piece in ["without effect", *pieces]:
        assert piece in str(caught[0].message)


def test_a_base_that_a_method_has_no_use_for_is_an_input_only_where_mergekit_makes_it_one():
    with pytest.warns(RecipeWarning, match="base_model c is merged as one more input"):
        check_recipe(read_recipe(two("karcher", "", BASE)))
    with pytest.warns(RecipeWarning, match="base_model c is not merged"):
        check_recipe(read_recipe(two("linear", "weight: 1", BASE)))
    with pytest.warns(RecipeWarning, match="base_model c is merged"):
        check_recipe(read_recipe(two("linear", "", BASE + "parameters: {weight: 1}")))
    with pytest.warns(RecipeWarning, match="base_model c is not merged"):
        check_recipe(read_recipe(PLAIN + BASE))


def test_adapters_bring_the_base_that_a_recipe_does_not_name():
    recipe = read_recipe(two("ties", "weight: 1"))
    a, b, base, other = map(reference, ("a", "b", "org/base", "org/other"))
    complete = with_adapter_bases(recipe, {a: base, b: base})
    check_recipe(complete)
    assert complete.base_model == base
    with pytest.raises(RecipeError, match=r"b over org/other.*a over org/base"):
        with_adapter_bases(recipe, {a: base, b: other})
    assert with_adapter_bases(complete, {a: other}).base_model == base
    assert with_adapter_bases(recipe, {}) == recipe


def test_no_file_is_touched_before_a_recipe_is_checked(monkeypatch):
    recipe_text = CARDS["della"]

    def fail(*args: object, **more: object) -> None:
        raise AssertionError("a file was looked at")

    for name in ("stat", "open", "is_file", "is_dir", "exists", "read_text"):
        monkeypatch.setattr(Path, name, fail)
    check_recipe(read_recipe(recipe_text))


# --- nothing but RecipeError, whatever comes

WORDS = re.findall(
    r"\S+",
    """models slices modules merge_method base_model dtype out_dtype parameters default path model
    tokenizer tokenizer_source chat_template sources layer_range value filter revision lora source
    tokens kind token token_id force weight t density normalize lambda scale pad_to_multiple_of
    union base zero model_token <<""",
) + list(MERGE_METHODS)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(WORDS),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(WORDS), st.text(max_size=4)), inner, max_size=5),
    ),
    max_leaves=20,
)
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


def run(source: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecipeWarning)
        with contextlib.suppress(RecipeError):
            check_recipe(read_recipe(source))


@FUZZ
@given(VALUES)
def test_no_value_raises_anything_but_a_recipe_error(value):
    run(value if isinstance(value, dict) else {"models": value})


@FUZZ
@given(st.sampled_from(sorted(CARDS)), st.data())
def test_no_change_to_a_recipe_raises_anything_but_a_recipe_error(card, data):
    recipe = yaml.safe_load(CARDS[card])
    for _ in range(data.draw(st.integers(1, 2))):
        place = recipe
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and data.draw(st.booleans()):
                place = place[key]
                continue
            place[key] = data.draw(VALUES)
            break
    run(recipe)


@FUZZ
@given(
    st.one_of(
        st.text(max_size=60).map(lambda text: text + "\n"),
        VALUES.map(lambda value: yaml.safe_dump(value, allow_unicode=True) + "\n"),
        st.text("abc:-[]{}!&*<,\n '\"#%@?|>0", max_size=40).map(lambda text: f"a: {text}\n"),
    )
)
def test_no_text_raises_anything_but_a_recipe_error(text):
    run(text)
