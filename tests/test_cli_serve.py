"""`dare-adapters serve`: the command that it makes of adapters; tests/vllm runs one."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from dare_adapters.cli import app
from tests.conftest import PackMaker


def call(*arguments: object) -> Result:
    """One call within this process."""
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def command(*arguments: object) -> list[str]:
    """The words of the command that is shown."""
    result = call("--show", *arguments)
    assert result.exit_code == 0, result.stderr
    return shlex.split(result.stdout)


def test_adapters_become_lora_modules_and_other_options_go_to_vllm(make_pack: PackMaker):
    pack = make_pack("plain")
    a, b = pack.adapters["a"], pack.adapters["b"]
    found = command(pack.base, f"math={a}", f"chat={b}", "--port", 8001, "--dtype", "bfloat16")
    assert found == [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(pack.base)),
        *("--enable-lora", "--lora-modules", f"math={a}", f"chat={b}", "--max-loras", "2"),
        *("--enforce-eager", "--port", "8001", "--dtype", "bfloat16"),
    ]


def test_a_lora_says_which_rank_vllm_must_hold(make_pack: PackMaker, tmp_path: Path):
    peft = pytest.importorskip("peft")
    pack = make_pack("plain")
    config = peft.LoraConfig(
        r=9, target_modules=["q_proj"], rank_pattern={"0.self_attn.q_proj": 17}
    )
    peft.get_peft_model(pack.live(), config).save_pretrained(tmp_path / "lora")
    found = command(pack.base, f"lora={tmp_path / 'lora'}")
    assert found[found.index("--max-lora-rank") + 1] == "32"
    assert "--enforce-eager" not in found


def test_a_mixture_is_added_while_the_base_loads(make_pack: PackMaker):
    pack = make_pack("plain")
    mixture = {"adapters": [str(pack.adapters["a"])], "combination_type": "ties"}
    found = command("--mixture", json.dumps(mixture), pack.base)
    assert found[found.index("--load-format") + 1] == "dare"
    assert json.loads(found[found.index("--model-loader-extra-config") + 1]) == mixture
    assert "--enable-lora" not in found


def test_room_is_made_for_the_tokens_that_adapters_add(make_pack: PackMaker):
    pack = make_pack("plain")
    grown = make_pack("grown-by-3", change=lambda model: model.resize_token_embeddings(100))
    chat, math = f"chat={grown.adapters['b']}", f"math={pack.adapters['a']}"

    def extra(*arguments: object) -> object:
        found = command(*arguments)
        if "--load-format" not in found:
            return None
        assert found[found.index("--load-format") + 1] == "dare"
        return json.loads(found[found.index("--model-loader-extra-config") + 1])

    assert extra(pack.base, math) is None
    assert extra(pack.base, math, chat) == {"spare_rows": 3}
    assert extra("--spare-rows", 8, pack.base, math) == {"spare_rows": 8}
    assert extra("--spare-rows", 0, pack.base, chat) is None
    mixture = {"adapters": [str(pack.adapters["a"])]}
    found = extra("--mixture", json.dumps(mixture), pack.base, chat)
    assert found == {**mixture, "spare_rows": 3}


def test_what_clients_may_change_is_opened_only_when_asked_for(
    make_pack: PackMaker, monkeypatch: pytest.MonkeyPatch
):
    pack = make_pack("plain")
    assert not any("VLLM" in word for word in command(pack.base)[:1])
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    found = command("--hot-swap", "--load-at-run-time", pack.base)
    assert found[:2] == ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "VLLM_PLUGINS=other,dare"]
    assert "--enable-lora" in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["math"], r"'math' is not NAME=DIR"),
        (["math=nowhere/at/all"], r"nowhere/at/all"),
        (["--mixture", "{"], r"--mixture is not JSON"),
        (["--mixture", "{}"], r"must be an object with adapters"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    make_pack: PackMaker, arguments: list[str], message: str
):
    base = make_pack("plain").base
    options = [word for word in arguments if word.startswith("--mix")]
    given = [*arguments, base] if options else [base, *arguments]
    result = call("--show", *given)
    assert result.exit_code == 1
    assert message in result.stderr


def test_two_adapters_of_one_name_are_refused(make_pack: PackMaker):
    pack = make_pack("plain")
    result = call("--show", pack.base, f"x={pack.adapters['a']}", f"x={pack.adapters['b']}")
    assert result.exit_code == 1
    assert "two adapters are called 'x'" in result.stderr


def test_without_vllm_the_message_says_how_to_get_it(make_pack: PackMaker):
    pytest.importorskip("torch")
    try:
        import vllm  # noqa: F401
    except ImportError:
        result = call(make_pack("plain").base)
        assert result.exit_code == 1
        assert "pip install 'dare-adapters[vllm]'" in result.stderr
    else:
        pytest.skip("vLLM is installed here")
