"""Methods by name: options from signatures, refusals that list what there is, other packages."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dare_adapters.combine import (
    Combination,
    delta_method,
    get_method,
    method_names,
    parameter_method,
    registry,
)
from dare_adapters.combine.linear import linear
from dare_adapters.delta import Delta, DenseDelta
from dare_adapters.errors import CombinationError
from tests.combine.sources import MemorySource, distinct

PEFT_NAMES = ["cat", "dare_linear", "dare_ties", "linear", "magnitude_prune", "ties"]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What a test registers is gone after it."""
    method_names()
    before = dict(registry._methods)
    yield
    registry._methods.clear()
    registry._methods.update(before)


def register(name: str = "toy", **how: object) -> object:
    @delta_method(name, **how)
    def toy(deltas: Sequence[Delta], weights: Sequence[float], *, flip: bool = False) -> Delta:
        return deltas[-1 if flip else 0]

    return toy


def test_the_names_are_those_of_peft_and_more():
    assert set(PEFT_NAMES) <= set(method_names())
    assert method_names() == sorted(method_names())


@pytest.mark.parametrize("name", PEFT_NAMES)
def test_options_and_defaults_are_those_of_the_signature(name):
    method = get_method(name)
    given = {"masks", "cutoffs", "base", "statistics"}
    parameters = list(inspect.signature(method.function).parameters.values())[2:]
    assert dict(method.options) == {p.name: p.default for p in parameters if p.name not in given}
    assert method.given == {p.name for p in parameters} & given
    assert not method.on_parameters


def test_an_unknown_method_is_answered_with_those_there_are():
    with pytest.raises(CombinationError) as caught:
        get_method("tise")
    assert "combination_type is 'tise'; there are" in str(caught.value)
    assert all(name in str(caught.value) for name in method_names())


def test_an_unknown_option_is_answered_with_those_there_are():
    with pytest.raises(CombinationError, match="toy has no option flop; its options are: flip"):
        register() and get_method("toy").check({"flip": True, "flop": 1}, 1)


def test_an_option_without_a_default_must_be_given():
    @parameter_method("toy")
    def toy(parameters: object, weights: object, *, t: float, base: object) -> None: ...

    get_method("toy").check({"t": 1}, 1)
    with pytest.raises(CombinationError, match=r"toy needs t$"):
        get_method("toy").check({}, 1)
    with pytest.raises(CombinationError, match="toy has no option base; its options are: t"):
        get_method("toy").check({"t": 1, "base": 2}, 1)


@pytest.mark.parametrize(
    ("how", "count", "wanted"),
    [
        ({}, 0, "at least 1"),
        ({"least": 3}, 2, "at least 3"),
        ({"least": 2, "most": 2}, 3, "2"),
        ({"least": 2, "most": 4}, 5, "2 to 4"),
    ],
)
def test_a_number_of_adapters_that_it_cannot_take_is_refused(how, count, wanted):
    register(**how)
    message = f"toy combines {wanted} adapters, {count} are given"
    with pytest.raises(CombinationError, match=message):
        get_method("toy").check({}, count)
    get_method("toy").check({}, how.get("least", 1))


def test_what_a_user_registers_is_found_and_works():
    function = register()
    assert get_method("toy").function is function
    assert "toy" in method_names()
    sources = [MemorySource({"w": DenseDelta(distinct((2, 3), n))}, f"{n}") for n in range(2)]
    assert Combination(sources, [1, 1], "toy")["w"] is sources[0]["w"]
    assert Combination(sources, [1, 1], "toy", {"flip": True})["w"] is sources[1]["w"]


def test_a_name_that_is_taken_is_refused_unless_it_is_the_same_function():
    delta_method("linear")(linear)
    with pytest.raises(ValueError, match="a combination type 'linear' is registered already"):
        register("linear")
    assert get_method("linear").function is linear


def test_an_option_that_could_be_given_by_place_is_refused():
    with pytest.raises(TypeError, match="toy: density must be a keyword-only argument"):

        @delta_method("toy")
        def toy(deltas: object, weights: object, density: float = 0.5) -> None: ...

    with pytest.raises(TypeError, match="toy: options must be a keyword-only argument"):

        @delta_method("toy")
        def other(deltas: object, weights: object, **options: object) -> None: ...

    assert "toy" not in method_names()


# --- other packages


def install(site: Path, module: str, code: str, *entries: str) -> None:
    """A distribution as an installer leaves it: a module and its metadata."""
    (site / f"{module}.py").write_text(code)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    name = module.replace("_", "-")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"entry{number} = {entry}\n" for number, entry in enumerate(entries)]
    (info / "entry_points.txt").write_text("[dare_adapters.methods]\n" + "".join(lines))


THEIRS = """
from dare_adapters.combine import delta_method

@delta_method("theirs", least=2)
def theirs(deltas, weights, *, strength: float = 0.5):
    return deltas[0]
"""


def test_methods_of_another_package_are_found_by_its_entry_points(tmp_path):
    install(tmp_path, "their_methods", THEIRS, "their_methods", "their_methods:theirs")
    code = """
import sys
from dare_adapters.combine import get_method, method_names
assert "their_methods" not in sys.modules
method = get_method("theirs")
print(method.least, dict(method.options), "ties" in method_names())
"""
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "2 {'strength': 0.5} True\n", done.stderr


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('no such device')", "no such device"),
        (THEIRS.replace('"theirs"', '"ties"'), "'ties' is registered already"),
    ],
    ids=["raises", "takes a name"],
)
def test_a_package_whose_methods_cannot_be_imported_spoils_no_others_and_is_named(
    code, reason, tmp_path, monkeypatch
):
    install(tmp_path, "broken_methods", code, "broken_methods")
    monkeypatch.syspath_prepend(tmp_path)
    registry._load_all.cache_clear()
    try:
        assert get_method("linear").name == "linear"
        with pytest.raises(CombinationError, match=reason) as caught:
            get_method("theirs")
        assert "broken-methods offers methods in broken_methods" in str(caught.value)
    finally:
        registry._load_all.cache_clear()


def test_a_method_is_refused_what_its_kind_is_not_given():
    with pytest.raises(TypeError, match="a method on deltas is not given base"):

        @delta_method("asks for a base")
        def asks(deltas, weights, *, base):
            return deltas[0]
