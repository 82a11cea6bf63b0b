"""A mix is a recipe of a few hundred bytes: what it makes, and what it must never read."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.checkpoint import open_checkpoint
from dare_adapters.combine import mix as mix_module
from dare_adapters.combine.combination import Combination
from dare_adapters.combine.mix import MAX_ADAPTERS, Mix, is_mix, open_mix
from dare_adapters.delta import Delta
from dare_adapters.errors import (
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    CombinationError,
    DareError,
)
from dare_adapters.open_source import open_source
from tests.combine.test_api import (
    METHODS,
    WEIGHTS,
    dense,
    small_llama,
)
from tests.conftest import Pack, PackMaker, all_bytes

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Json = dict[str, Any]


@pytest.fixture
def pack(make_pack: PackMaker) -> Pack:
    return make_pack("combine", config=small_llama(), dtype=torch.float32)


@pytest.fixture
def home(pack: Pack, tmp_path: Path) -> Path:
    """A directory with the adapters a and b, and nothing else in it."""
    for name in "ab":
        shutil.copytree(pack.adapters[name], tmp_path / "home" / name)
    return tmp_path / "home"


def mixed(home: Path, *args: Any, names: str = "ab", out: str = "mix", **options: Any) -> Mix:
    found = dare_adapters.combine(
        [home / name for name in names], home / out, *args, as_mix=True, **options
    )
    assert isinstance(found, Mix)
    return found


def read(directory: Path) -> Json:
    found: Json = json.loads((directory / CONFIG).read_text())
    return found


def write(directory: Path, config: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    return directory


def naming(home: Path, *sources: object, **entry: object) -> Path:
    """A mix beside the adapters that names these."""
    config = read(mixed(home, out="sound", overwrite=True).path)
    config["mix"]["adapters"] = [{"source": source, **entry} for source in sources]
    return write(home / "mix", config)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids that were looked up on a hub that has nothing."""
    asked: list[str] = []

    def download(repo_id: str, revision: object = None, token: object = None) -> Path:
        asked.append(repo_id)
        raise AdapterNotFoundError(f"{repo_id} is not on the hub")

    monkeypatch.setattr(mix_module, "download_adapter", download)
    return asked


# --- what it is, and what it makes


def test_a_mix_is_one_small_file(home: Path):
    made = mixed(home, [1.0, -0.5], combination_type="ties", density=0.2, seed=3)
    assert os.listdir(home / "mix") == [CONFIG]
    assert (home / "mix" / CONFIG).stat().st_size < 1200
    config = read(home / "mix")
    assert is_mix(config)
    assert not is_mix(read(home / "a"))
    assert config["mix"]["adapters"] == [
        {"source": f"../{name}", "weight": weight, "sha256": read(home / name)["sha256"]}
        for name, weight in (("a", 1.0), ("b", -0.5))
    ]
    assert (config["mix"]["combination_type"], config["mix"]["options"]) == (
        "ties",
        {"density": 0.2},
    )
    assert made.path == home / "mix"
    assert made.label == str(home / "mix")
    assert made.base_model_name_or_path == config["base_model_name_or_path"]


@pytest.mark.parametrize("kind", METHODS)
def test_a_mix_equals_the_adapter_that_it_stands_for(home: Path, pack: Pack, kind: str):
    weights, options = WEIGHTS[kind], METHODS[kind]
    mixed(home, weights, combination_type=kind, **options)
    written = dare_adapters.combine(
        [home / "a", home / "b"],
        home / "written",
        weights,
        combination_type=kind,
        bits=32,
        progress=False,
        **options,
    )
    found = open_source(home / "mix")
    assert isinstance(found, Mix)
    base = open_checkpoint(pack.base).__getitem__
    for name, delta in dense(written).items():
        value = found.parameter(name, base)
        assert isinstance(value, Delta)
        assert torch.equal(value.dense(), delta)
    again = dare_adapters.combine([found], home / "again", bits=32, progress=False)
    assert again.config.sha256 == written.config.sha256
    one, other = pack.live(), pack.live()
    assert one.load_dare_adapter(home / "mix") == "mix"
    other.load_dare_adapter(home / "written")
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=0, atol=1e-7)
    one.disable_dare_adapters()
    assert all_bytes(one) == all_bytes(pack.live())


@pytest.mark.parametrize(
    "how",
    [
        {"seed": 11},
        {"mask": "bernoulli"},
        {"prune": "dare", "drop_rate": 0.5},
        {"prune": "magnitude", "drop_rate": 0.9, "seed": 2},
    ],
)
def test_seed_mask_and_pruning_are_kept(home: Path, how: Json):
    made = mixed(home, combination_type="dare_linear", density=0.5, **how)
    again = open_mix(home / "mix")
    adapters = [Adapter.open(home / name) for name in "ab"]
    exact = Combination(adapters, [1, 1], "dare_linear", {"density": 0.5}, **how)
    for name in exact:
        expected = exact[name].dense()
        assert torch.equal(again[name].dense(), expected)
        assert torch.equal(made[name].dense(), expected)
    assert again.identity == made.identity == exact.identity


def test_a_mix_can_be_moved_with_its_adapters(home: Path, tmp_path: Path):
    before = dense(mixed(home))
    home.rename(tmp_path / "elsewhere")
    after = dense(open_source(tmp_path / "elsewhere" / "mix"))
    assert all(torch.equal(after[name], delta) for name, delta in before.items())


def test_a_mix_may_be_opened_by_a_relative_path_and_through_a_link(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mixed(home)
    (tmp_path / "link").symlink_to(home / "mix")
    (tmp_path / "house").symlink_to(home)
    monkeypatch.chdir(home)
    for path in ("mix", Path("mix"), "../link", "../house/mix", "./mix/"):
        assert len(open_source(path)) == len(Adapter.open(home / "a"))


def test_a_copy_and_a_pickle_are_the_same_mix(home: Path):
    made = mixed(home, combination_type="ties", density=0.4, trim_scope="model")
    expected = dense(made)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.path == made.path
        assert other.identity == made.identity
        assert all(torch.equal(delta, expected[name]) for name, delta in dense(other).items())


def test_a_mix_is_combined_like_an_adapter_but_not_mixed_again(home: Path):
    mixed(home, [0.5, 0.5])
    written = dare_adapters.combine(
        [home / "mix", home / "a"], home / "written", [2.0, -1.0], bits=32, progress=False
    )
    b = dense(Adapter.open(home / "b"))
    for name, delta in dense(written).items():
        torch.testing.assert_close(delta, b[name], rtol=1e-5, atol=1e-8)
    with pytest.raises(CombinationError, match=r"mix is no adapter directory"):
        dare_adapters.combine([home / "mix", home / "a"], home / "more", as_mix=True)
    assert not (home / "more").exists()


def test_a_lora_may_be_part_of_a_mix(home: Path, pack: Pack):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    tuned = peft.get_peft_model(pack.live(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    tuned.save_pretrained(home / "lora")
    made = dare_adapters.combine([home / "a", home / "lora"], home / "mix", as_mix=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    product = open_source(home / "lora")[name].dense()
    expected = Adapter.open(home / "a")[name].dense() + product
    assert torch.equal(open_source(made.path)[name].dense(), expected)


# --- writing


def test_what_a_mix_cannot_name_is_refused(home: Path, pack: Pack, tmp_path: Path):
    with pytest.raises(CombinationError, match=r"lies outside .*copy them there"):
        dare_adapters.combine([home / "a", pack.adapters["b"]], home / "mix", as_mix=True)
    with pytest.raises(CombinationError, match="lies outside"):
        dare_adapters.combine([home / "a", home / "b"], tmp_path / "x" / "mix", as_mix=True)
    inner = Combination([Adapter.open(home / "a")], [0.5])
    with pytest.raises(CombinationError, match="no adapter directory"):
        dare_adapters.combine([inner, home / "b"], home / "mix", as_mix=True)
    assert sorted(os.listdir(home)) == ["a", "b"]
    assert sorted(os.listdir(tmp_path)) == ["home"]


def test_statistics_do_not_travel_with_a_mix(home: Path):
    with pytest.raises(CombinationError, match=r"statistics that fisher needs.*as_mix=False"):
        mixed(home, combination_type="fisher", statistics=[{}, {}])
    assert sorted(os.listdir(home)) == ["a", "b"]


def test_a_mix_replaces_what_exists_only_if_asked_and_never_its_own_adapters(home: Path):
    mixed(home)
    with pytest.raises(AdapterExistsError):
        mixed(home, [2.0, 1.0])
    assert mixed(home, [2.0, 1.0], overwrite=True).weights == (2.0, 1.0)
    for out, paths in ((home, ["a", "b"]), (home / "a", ["a", "b"])):
        with pytest.raises(CombinationError, match="lies outside"):
            dare_adapters.combine([home / name for name in paths], out, as_mix=True, overwrite=True)
    assert sorted(os.listdir(home)) == ["a", "b", "mix"]
    assert Adapter.open(home / "a")


# --- reading: what is named must be an adapter beside the mix


@pytest.mark.parametrize("kind", ["verify", "trust"])
def test_an_adapter_that_changed_is_not_the_one_that_was_mixed(home: Path, kind: str):
    mixed(home)
    dare_adapters.combine([home / "a"], home / "a", [0.5], overwrite=True, progress=False)
    with pytest.raises(AdapterFormatError, match=r"adapters\[0\]: '../a' is not the adapter that"):
        open_source(home / "mix", verify=kind == "verify")


def test_damage_to_an_adapter_is_damage_to_the_mix(home: Path, pack: Pack):
    mixed(home)
    file = home / "b" / TENSORS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(AdapterFormatError, match="SHA-256"):
        open_source(home / "mix")
    model = pack.live()
    before = all_bytes(model)
    with pytest.raises(AdapterFormatError, match="SHA-256"):
        model.load_dare_adapter(home / "mix")
    assert model.dare_adapters == []
    assert all_bytes(model) == before


def test_a_missing_adapter_is_named(home: Path):
    mixed(home)
    shutil.rmtree(home / "b")
    with pytest.raises(AdapterNotFoundError, match=r"adapters\[1\]: .*\.\./b"):
        open_source(home / "mix")
    (home / "b").mkdir()
    with pytest.raises(AdapterNotFoundError, match="not an adapter"):
        open_source(home / "mix")


def secret(pack: Pack, *places: Path) -> None:
    """An adapter where no mix may look."""
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(pack.adapters["a"], place)


@pytest.mark.parametrize(
    "source",
    [
        "../../secret",
        "../../../secret",
        "../home/../../secret",
        "a/../../../secret",
        "..",
        "../",
        ".",
        "",
        "./.",
        "../a/..",
        "../..",
        "~/secret",
        "file:../a",
        "C:\\secret",
        "..\\a",
        "../a\\..\\..\\secret",
        "\\\\server\\share",
        "../a\0",
        "\0",
        "\ud800",
        "../" * 3000 + "secret",
        "x" * 5000,
        "../" + "x" * 5000,
        "a/" * 3000,
    ],
    ids=lambda source: ascii(source[:20]),
)
def test_no_path_leads_out_of_the_directory_around_the_mix(
    home: Path, pack: Pack, tmp_path: Path, no_hub: list[str], source: str
):
    secret(pack, tmp_path / "secret", home / "mix" / "secret" / "x")
    with pytest.raises((AdapterFormatError, AdapterNotFoundError), match=r"mix\.adapters\[0\]"):
        open_source(naming(home, source))
    assert no_hub == []


def test_absolute_paths_are_not_followed(home: Path, pack: Pack, tmp_path: Path, no_hub: list[str]):
    secret(pack, tmp_path / "secret")
    for path in (tmp_path / "secret", home / "a"):
        with pytest.raises(AdapterFormatError, match="it is not followed"):
            open_source(naming(home, str(path)))
    assert no_hub == []


@pytest.mark.parametrize("link", ["../link", "../a/../link", "../inner/link", "link", "../loop"])
def test_links_that_lead_out_are_not_followed(
    home: Path, pack: Pack, tmp_path: Path, no_hub: list[str], link: str
):
    secret(pack, tmp_path / "secret")
    for place in (home / "link", home / "inner" / "link", home / "mix" / "link"):
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(tmp_path / "secret")
    (home / "loop").symlink_to(home / "loop")
    with pytest.raises((AdapterFormatError, AdapterNotFoundError), match=r"mix\.adapters\[0\]"):
        open_source(naming(home, link))
    assert no_hub == []


def test_links_that_stay_beside_the_mix_are_followed(home: Path):
    (home / "link").symlink_to(home / "a")
    assert len(open_source(naming(home, "../link"))) == len(Adapter.open(home / "a"))


@pytest.mark.parametrize("source", ["../a", "../a/", ".././a", "../b/../a", "inner", "./inner"])
def test_paths_that_stay_beside_the_mix_are_followed(home: Path, source: str):
    shutil.copytree(home / "a", home / "mix" / "inner")
    assert len(open_source(naming(home, source))) == len(Adapter.open(home / "a"))


def test_what_looks_like_a_hub_id_is_never_a_path_of_the_working_directory(
    home: Path, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: list[str]
):
    secret(pack, tmp_path / "elsewhere" / "user" / "secret")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(AdapterNotFoundError, match="user/secret is not on the hub"):
        open_source(naming(home, "user/secret"))
    assert no_hub == ["user/secret"]
    # Nor is it without the stand-in: this session is offline.
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(AdapterNotFoundError, match="user/secret"):
        open_source(naming(home, "user/secret"))


def test_a_hub_id_is_looked_up_with_its_revision(home: Path, monkeypatch: pytest.MonkeyPatch):
    def download(repo_id: str, revision: object = None, token: object = None) -> Path:
        assert (repo_id, revision, token) == ("user/adapter", "v1", "secret")
        return home / "b"

    monkeypatch.setattr(mix_module, "download_adapter", download)
    path = naming(home, "user/adapter", revision="v1", weight=2.0)
    found = open_source(path, token="secret")
    name = "lm_head.weight"
    assert torch.equal(found[name].dense(), 2 * Adapter.open(home / "b")[name].dense())


def test_a_mix_of_a_mix_is_refused(home: Path):
    mixed(home, out="inner")
    with pytest.raises(AdapterFormatError, match=r"'../inner' is itself a mix"):
        open_source(naming(home, "../inner"))
    with pytest.raises(AdapterFormatError, match=r"'../mix' is"):
        open_source(naming(home, "../mix"))  # of itself


def test_what_is_no_adapter_is_no_part_of_a_mix(home: Path, pack: Pack):
    shutil.copytree(pack.base, home / "base")
    write(home / "odd", {"peft_type": "IA3"})
    for source, error in (("../base", AdapterNotFoundError), ("../odd", AdapterFormatError)):
        with pytest.raises(error):
            open_source(naming(home, source))


# --- reading: what it says must make sense


def edited(home: Path, change: Callable[[Json], object]) -> Path:
    config = read(mixed(home, combination_type="ties", density=0.5, out="sound").path)
    change(config)
    return write(home / "mix", config)


def put(*keys: object, value: object) -> Callable[[Json], object]:
    def change(config: Json) -> None:
        place: Any = config
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    change.__name__ = ".".join(map(str, keys)) + f"={value!r:.20}"
    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (put("mix", value=None), AdapterFormatError, "mix must be an object"),
        (put("mix", value=[]), AdapterFormatError, "mix must be an object"),
        (put("mix", "extra", value=1), AdapterFormatError, "mix must be an object of adapters"),
        (put("mix", "adapters", value=[]), AdapterFormatError, "1 to 1024 adapters"),
        (put("mix", "adapters", value={}), AdapterFormatError, "1 to 1024 adapters"),
        (put("mix", "adapters", value=[{"source": "../a"}] * (MAX_ADAPTERS + 1)),
         AdapterFormatError, "1 to 1024 adapters"),
        (put("mix", "adapters", 0, value="../a"), AdapterFormatError, r"adapters\[0\] must be an"),
        (put("mix", "adapters", 1, "path", value="../a"), AdapterFormatError, r"\[1\] must be an"),
        (put("mix", "adapters", 1, "source", value=None), AdapterFormatError, "names no source"),
        (put("mix", "adapters", 1, "source", value=["../a"]), AdapterFormatError, "no source"),
        (put("mix", "adapters", 1, "weight", value="1"), AdapterFormatError, "weight is '1'"),
        (put("mix", "adapters", 1, "weight", value=True), AdapterFormatError, "weight is True"),
        (put("mix", "adapters", 1, "weight", value=None), AdapterFormatError, "weight is None"),
        (put("mix", "adapters", 1, "weight", value=math.nan), AdapterFormatError, "weight is nan"),
        (put("mix", "adapters", 1, "weight", value=math.inf), AdapterFormatError, "weight is inf"),
        (put("mix", "adapters", 1, "weight", value=10**400), AdapterFormatError, "weight is 1000"),
        (put("mix", "adapters", 1, "sha256", value="0"), AdapterFormatError, "not the adapter"),
        (put("mix", "adapters", 1, "sha256", value=7), AdapterFormatError, "not the adapter"),
        (put("mix", "combination_type", value=None), AdapterFormatError, "combination_type"),
        (put("mix", "combination_type", value="tie"), CombinationError, "'tie'; there are"),
        (put("mix", "combination_type", value="fisher"), CombinationError, "fisher has no option"),
        (put("mix", "options", value=[]), AdapterFormatError, "options as an object"),
        (put("mix", "options", "lamda", value=1), CombinationError, "no option lamda"),
        (put("mix", "seed", value="1"), AdapterFormatError, "seed is '1'"),
        (put("mix", "seed", value=True), AdapterFormatError, "seed is True"),
        (put("mix", "seed", value=1.5), AdapterFormatError, "seed is 1.5"),
        (put("mix", "mask", value="random"), CombinationError, "mask is 'random'"),
        (put("mix", "mask", value={"auto": 1}), CombinationError, "mask is"),
        (put("mix", "prune", value="dare"), CombinationError, "belong together"),
        (put("mix", "drop_rate", value=0.5), CombinationError, "belong together"),
        (put("format_version", value=2), AdapterFormatError, "format version 2.*upgrade"),
        (put("format_version", value=None), AdapterFormatError, "format version None"),
        (put("format_version", value=True), AdapterFormatError, "format version True"),
        (put("peft_type", value="IA3"), AdapterFormatError, "peft_type is 'IA3'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_what_a_mix_says_wrongly_is_named(
    home: Path, change: Callable[[Json], object], error: type[DareError], message: str
):
    with pytest.raises(error, match=message):
        open_source(edited(home, change))


@pytest.mark.parametrize("drop_rate", ["0.5", [], {}, True, 1.0, -0.1, math.nan, 10**400])
def test_a_drop_rate_that_cannot_be_is_refused(home: Path, drop_rate: object):
    def change(config: Json) -> None:
        config["mix"].update(prune="dare", drop_rate=drop_rate)

    with pytest.raises(CombinationError, match="drop_rate is"):
        open_source(edited(home, change))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"mix": ' + "[" * 5000, '{"mix": {}}', "\0"])
def test_what_is_no_json_object_is_refused(home: Path, text: str):
    with pytest.raises(AdapterFormatError):
        open_source(write(home / "mix", text))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["../a", "../b", "..", "a/b", "ties", "linear", "dare", "blocked", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FIELDS = ["mix", "peft_type", "format_version", "base_model_name_or_path"]
RECIPE = ["combination_type", "options", "seed", "mask", "prune", "drop_rate", "adapters"]
ENTRY = ["source", "weight", "sha256", "revision"]
PLACES = st.one_of(
    st.sampled_from(FIELDS).map(lambda key: (key,)),
    st.sampled_from(RECIPE).map(lambda key: ("mix", key)),
    st.tuples(st.just("mix"), st.just("adapters"), st.integers(0, 1), st.sampled_from(ENTRY)),
    st.tuples(st.just("mix"), st.just("options"), st.sampled_from(["density", "lambda_", "x"])),
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(PLACES, VALUES), min_size=1, max_size=3))
def test_no_edit_of_a_mix_raises_anything_but_a_named_error(
    home: Path, no_hub: list[str], changes: list[tuple[tuple[object, ...], object]]
):
    sound = home / "sound"
    if not sound.exists():
        mixed(home, combination_type="ties", density=0.5, out="sound")
    config = read(sound)
    for keys, value in changes:
        try:
            put(*keys, value=value)(config)
        except (KeyError, TypeError, IndexError):
            continue  # an edit before it took the place away
    write(home / "mix", config)
    try:
        found = open_source(home / "mix", verify=False)
    except DareError:
        return
    assert isinstance(found, Mix)
    assert {source.path.parent for source in found.sources} == {home / "mix" / ".."}


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 5000), byte=st.integers(0, 255), cut=st.booleans())
def test_no_damaged_byte_of_a_mix_raises_anything_but_a_named_error(
    home: Path, no_hub: list[str], place: int, byte: int, cut: bool
):
    sound = home / "sound"
    if not sound.exists():
        mixed(home, combination_type="ties", density=0.5, out="sound")
    data = bytearray((sound / CONFIG).read_bytes())
    place %= len(data)
    data[place] = byte
    (home / "mix").mkdir(exist_ok=True)
    (home / "mix" / CONFIG).write_bytes(data[:place] if cut else data)
    try:
        open_source(home / "mix", verify=False)
    except DareError:
        return
