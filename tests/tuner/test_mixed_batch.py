"""Rows of one batch under different adapters answer as they do under their own adapter alone."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from dare_adapters.errors import UnsupportedParameterError
from tests.conftest import Pack, PackMaker
from tests.tuner.architectures import ARCHITECTURES, logits

NAMES = ["a", "__base__", "b", "c", "b", "a"]
GENERATE = ("llama", "llama tied", "gpt2", "t5", "mixtral")


def loaded(pack: Pack) -> PeftModel:
    model = PeftModel.from_pretrained(pack.live(), pack.adapters["a"], adapter_name="a")
    for name in ("b", "c"):
        model.load_adapter(pack.adapters[name], name)
    return model.eval()


def alone(model: PeftModel, name: str, run) -> object:
    if name == "__base__":
        with model.disable_adapter():
            return run()
    model.set_adapter(name)
    return run()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_row_answers_as_under_its_adapter_alone(name: str, make_pack: PackMaker) -> None:
    architecture = ARCHITECTURES[name]
    model = loaded(architecture.pack(make_pack, name))
    inputs = {
        key: torch.cat([value, value.flip(0)]) for key, value in architecture.inputs().items()
    }
    own = {one: alone(model, one, lambda: logits(model, inputs)) for one in set(NAMES)}
    expected = torch.stack([own[one][row] for row, one in enumerate(NAMES)])
    found = logits(model, {**inputs, "adapter_names": NAMES})
    assert (found - expected).abs().max() < 1e-5
    assert (own["a"] - own["b"]).abs().max() > 1e-2


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", GENERATE)
def test_rows_generate_what_they_do_alone(name: str, beams: int, make_pack: PackMaker) -> None:
    architecture = ARCHITECTURES[name]
    model = loaded(architecture.pack(make_pack, name))
    prompt = torch.cat([architecture.inputs()["input_ids"]] * 2)
    how = {"do_sample": False, "num_beams": beams, "max_new_tokens": 5}

    def answers(**more: object) -> list[list[int]]:
        with torch.no_grad():
            return model.generate(input_ids=prompt, **how, **more).tolist()

    own = {one: alone(model, one, answers) for one in set(NAMES)}
    for row, found in enumerate(answers(adapter_names=NAMES)):
        expected = own[NAMES[row]][row]
        length = min(len(found), len(expected))
        assert found[:length] == expected[:length], row


def test_wrong_names_and_numbers_are_refused_as_by_peft(make_pack: PackMaker) -> None:
    architecture = ARCHITECTURES["llama"]
    model = loaded(architecture.pack(make_pack, "llama"))
    inputs = architecture.inputs()
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(**inputs, adapter_names=["a", "nobody", "b"])
    with pytest.raises(ValueError, match="same as the number of inputs"):
        model(**inputs, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**inputs, adapter_names=["a", "b", "c"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(**inputs, adapter_names=["a", "b", "c"])


def test_layers_forget_the_rows_after_an_error(make_pack: PackMaker) -> None:
    architecture = ARCHITECTURES["llama"]
    model = loaded(architecture.pack(make_pack, "llama"))
    model.set_adapter("a")
    before = logits(model, architecture.inputs())
    with pytest.raises(ValueError, match="exactly one of"):
        model(**architecture.inputs(), adapter_names=["a", "b", "c"], inputs_embeds=torch.ones(1))
    assert torch.equal(logits(model, architecture.inputs()), before)


def test_what_is_computed_once_for_all_rows_is_refused_by_name() -> None:
    from peft import get_peft_model

    from dare_adapters import DareConfig

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.scale = torch.nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.scale

    model = get_peft_model(Scaled(), DareConfig(drop_rate=0.5, init_weights=False), "a").eval()
    model.add_adapter("b", DareConfig(drop_rate=0.5, init_weights=False))
    with pytest.raises(UnsupportedParameterError, match="scale of the whole Scaled"):
        model(torch.randn(2, 4), adapter_names=["a", "b"])
