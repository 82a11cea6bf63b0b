"""Which tensors an output has, and what each is made of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from dare_adapters.checkpoint import ParameterInfo, open_checkpoint
from dare_adapters.errors import RecipeError
from dare_adapters.recipe import (
    IDENTICAL,
    PASSTHROUGH,
    Inventory,
    MergePlan,
    OutputTensor,
    RecipeWarning,
    plan_merge,
    read_recipe,
)
from tests.conftest import make_family, tiny_llama
from tests.recipe.cards import CARDS, layers_of
from tests.recipe.models import BF16, inventory, llama, opened, reference

__all__ = ["make_family"]

LAYER = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "input_layernorm")


def plan_of(text: str, **models: Inventory) -> MergePlan:
    recipe = read_recipe(text)
    return plan_merge(recipe, {reference(name): model for name, model in models.items()})


def planned(card: str) -> tuple[MergePlan, dict[str, OutputTensor]]:
    recipe = read_recipe(CARDS[card])
    plan = plan_merge(recipe, opened(recipe))
    return plan, {tensor.name: tensor for tensor in plan.tensors}


def sources(plan: MergePlan, tensor: OutputTensor) -> list[tuple[str, str]]:
    found = [*([tensor.base] if tensor.base else []), *tensor.inputs]
    return [(str(plan.models[one.model]), one.name) for one in found]


def gradient(values: Sequence[float], layer: int, layers: int) -> float:
    """Over layers 0 … layers - 1, by NumPy."""
    return float(np.interp(layer / (layers - 1), np.linspace(0, 1, len(values)), values))


@pytest.mark.parametrize("card", CARDS)
def test_every_card_gives_every_tensor_of_its_model_once(card):
    recipe = read_recipe(CARDS[card])
    plan = plan_merge(recipe, opened(recipe))
    names = [tensor.name for tensor in plan.tensors]
    if recipe.slices:
        ranges = [part.sources[0].layer_range for part in recipe.slices]
        layers = sum(end - start for start, end in ranges)
    else:
        layers = layers_of(str(recipe.donor))
    expected = ["model.embed_tokens.weight"]
    expected += [f"model.layers.{n}.{rest}.weight" for n in range(layers) for rest in LAYER]
    expected += ["model.norm.weight", "lm_head.weight"]
    assert names == expected
    for tensor in plan.tensors:
        assert len(tensor.weights) == len(tensor.inputs)
        assert tensor.vocabulary == (tensor.name in ("model.embed_tokens.weight", "lm_head.weight"))
        for one in tensor.inputs:
            assert one.name.split(".")[-2:] == tensor.name.split(".")[-2:]


def test_ties_of_two_models_over_a_base_among_them():
    plan, tensors = planned("ties")
    tensor = tensors["model.layers.31.mlp.down_proj.weight"]
    assert [name for name, _ in sources(plan, tensor)] == [
        "mistralai/Mistral-7B-v0.1",
        "OpenPipe/mistral-ft-optimized-1218",
        "mlabonne/NeuralHermes-2.5-Mistral-7B",
    ]
    assert tensor.method == "ties"
    assert tensor.weights == (0.5, 0.3)
    assert tensor.options["density"] == [0.5, 0.5]
    assert tensor.options["divisor"] == "weights"
    assert (tensor.dtype, tensor.out_dtype) == (torch.float16, torch.float16)
    assert plan.config_changes == {"dtype": "float16"}
    assert str(plan.models[plan.donor]) == "mistralai/Mistral-7B-v0.1"


def test_gradients_run_over_the_layers_and_start_outside_of_them():
    _, tensors = planned("ties_gradients")
    for layer in range(40):
        for rest in LAYER:
            tensor = tensors[f"model.layers.{layer}.{rest}.weight"]
            weight = gradient([0, 0.3, 0.7, 1], layer, 40)
            density = gradient([1, 0.7, 0.1], layer, 40)
            third = 0.5 if "mlp" in rest else 0.0
            assert tensor.weights == pytest.approx((1.0, weight, third), rel=1e-12)
            assert tensor.options["density"] == pytest.approx([density, 0.5, 0.33], rel=1e-12)
    for outside in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert tensors[outside].weights == (1.0, 0.0, 0.0)
        assert tensors[outside].options["density"] == [1.0, 0.5, 0.33]


def test_slerp_turns_from_the_base_by_a_gradient_for_each_kind_of_tensor():
    plan, tensors = planned("slerp")
    attention, mlp = [0, 0.5, 0.3, 0.7, 1], [1, 0.5, 0.7, 0.3, 0]
    for layer in range(32):
        for rest in LAYER:
            tensor = tensors[f"model.layers.{layer}.{rest}.weight"]
            values = attention if "attn" in rest else mlp if "mlp" in rest else [0.5]
            expected = values[0] if len(values) == 1 else gradient(values, layer, 32)
            assert tensor.options == {"t": pytest.approx(expected, rel=1e-12)}
            assert tensor.base is None
            assert [name for name, _ in sources(plan, tensor)] == [
                "AIDC-ai-business/Marcoroni-7B-v3",
                "EmbeddedLLM/Mistral-7B-Merge-14-v0.1",
            ]
    assert tensors["lm_head.weight"].options == {"t": 0.5}


def test_slerp_starts_at_the_base_wherever_it_is_listed():
    plan, tensors = planned("slerp_models")
    first = tensors["model.layers.0.mlp.down_proj.weight"]
    last = tensors["model.layers.27.mlp.down_proj.weight"]
    assert [name for name, _ in sources(plan, first)] == ["Qwen/Qwen2-7B", "Qwen/Qwen2-7B-Instruct"]
    assert (first.options["t"], last.options["t"]) == (0.0, 1.0)
    assert tensors["lm_head.weight"].options["t"] == 0.0  # not the last layer's


def test_a_frankenmerge_renumbers_layers():
    plan, tensors = planned("passthrough")
    first, second = "OpenPipe/mistral-ft-optimized-1218", "mlabonne/NeuralHermes-2.5-Mistral-7B"
    for layer in range(48):
        tensor = tensors[f"model.layers.{layer}.self_attn.q_proj.weight"]
        model, own = (first, layer) if layer < 24 else (second, layer - 24 + 8)
        assert sources(plan, tensor) == [(model, f"model.layers.{own}.self_attn.q_proj.weight")]
        assert tensor.method == PASSTHROUGH
        assert tensor.passthrough_of == tensor.inputs[0]
        assert tensor.options == {}
    # Embeddings of the first slice's model; what is behind the layers of the last's.
    assert sources(plan, tensors["model.embed_tokens.weight"])[0][0] == first
    assert sources(plan, tensors["model.norm.weight"])[0][0] == second
    assert sources(plan, tensors["lm_head.weight"])[0][0] == second
    assert plan.config_changes == {"num_hidden_layers": 48, "dtype": "bfloat16"}


def test_a_filter_of_a_model_sees_the_name_in_the_model():
    text = """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 4]}]
- sources:
  - model: a
    layer_range: [2, 4]
    parameters: {scale: [{filter: layers.3.self_attn, value: 0}, {value: 1}]}
"""
    tensors = {tensor.name: tensor for tensor in plan_of(text, a=llama(4)).tensors}
    scaled = [name for name, tensor in tensors.items() if tensor.options]
    assert scaled == [f"model.layers.5.{rest}.weight" for rest in LAYER[:2]]
    assert tensors[scaled[0]].options == {"scale": 0.0}


def test_a_shared_filter_sees_the_name_in_the_output():
    text = """
merge_method: slerp
base_model: a
slices:
- sources: [{model: a, layer_range: [1, 3]}, {model: b, layer_range: [2, 4]}]
parameters: {t: [{filter: layers.0., value: 0.1}, {filter: layers.1., value: 0.2}, {value: 0.9}]}
"""
    tensors = {tensor.name: tensor for tensor in plan_of(text, a=llama(4), b=llama(4)).tensors}
    assert tensors["model.layers.0.mlp.down_proj.weight"].options == {"t": 0.1}
    assert tensors["model.layers.1.mlp.down_proj.weight"].options == {"t": 0.2}
    assert tensors["model.norm.weight"].options == {"t": 0.9}


def test_a_models_own_parameters_precede_its_slices_and_those_the_recipes():
    plan, tensors = planned("linear_slices")
    for layer in range(20):
        tensor = tensors[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert tensor.weights == pytest.approx((1 - layer / 19, layer / 19))
        assert tensor.options["normalize"] is True
    for layer in range(20, 40):
        attention = tensors[f"model.layers.{layer}.self_attn.q_proj.weight"]
        assert attention.weights == (0.5, 0.75)
        assert sources(plan, attention)[0][1] == (
            f"model.layers.{layer - 10}.self_attn.q_proj.weight"
        )
        assert tensors[f"model.layers.{layer}.mlp.down_proj.weight"].weights == (0.5, 0.5)
        assert attention.options["normalize"] is False
    assert tensors["model.embed_tokens.weight"].weights == (1.0, 0.0)
    assert tensors["lm_head.weight"].weights == (0.5, 0.5)


def test_module_parameters_come_before_the_recipes():
    tensor = planned("modules")[1]["model.layers.5.mlp.down_proj.weight"]
    assert tensor.options["density"] == [0.25, 0.75]
    assert (tensor.options["lambda_"], tensor.options["divisor"]) == (0.7, "none")


@pytest.mark.parametrize(
    ("card", "method", "options", "weights"),
    [
        (
            "dare_linear",
            "dare_linear",
            {"density": [0.9, 0.35], "rescale": "l1", "normalize": False, "lambda_": 1.0},
            (0.6, 0.4),
        ),
        (
            "dare_ties_union",
            "dare_ties",
            {
                "density": [0.6, 0.4],
                "rescale": "none",
                "majority_sign_method": "total",
                "vote": "weighted",
                "divisor": "weights",
                "lambda_": 0.9,
            },
            (0.45, 0.35),
        ),
        ("task_arithmetic", "linear", {"normalize": False, "lambda_": 1.0}, (1.0, 0.8)),
        ("linear", "linear", {"normalize": True, "lambda_": 1.0}, (1.0, 0.3, 0.5)),
        ("model_stock", "model_stock", {"filter_wise": False, "eps": 1e-6}, (1.0, 1.0, 1.0)),
        (
            "breadcrumbs",
            "breadcrumbs",
            {
                "density": [0.9, 0.7],
                "gamma": [0.02, 0.01],
                "rescale": "none",
                "normalize": True,
                "lambda_": 1.0,
            },
            (0.5, 0.5),
        ),
        ("karcher", "karcher", {"max_iter": 1000, "tol": 1e-9}, (1.0, 1.0)),
        ("nearswap", "nearswap", {"t": 0.0001}, (1.0,)),
        ("arcee_fusion", "arcee_fusion", {}, (1.0,)),
        ("ramplus", "ramplus_tl", {"r": 0.3, "alpha": 0.1, "epsilon": 1e-5}, (1.0, 1.0)),
        (
            "multislerp",
            "multislerp",
            {"normalize_weights": True, "eps": 1e-8, "on_deltas": True},
            (0.4, 0.3, 0.3),
        ),
    ],
)
def test_our_method_and_options_for_mergekits(card, method, options, weights):
    tensor = planned(card)[1]["model.layers.7.mlp.down_proj.weight"]
    assert (tensor.method, tensor.options, tensor.weights) == (method, options, weights)


def test_without_dtypes_the_output_is_what_holds_all_inputs():
    text = "merge_method: karcher\nmodels: [{model: a}, {model: b}]\n"
    half = llama(dtype=torch.float16)
    for a, b, expected in [
        (llama(), llama(), BF16),
        (llama(), half, torch.float32),
        (half, half, torch.float16),
    ]:
        plan = plan_of(text, a=a, b=b)
        assert {tensor.out_dtype for tensor in plan.tensors} == {expected}
        assert {tensor.dtype for tensor in plan.tensors} == {None}
        assert plan.config_changes == {}
    both = planned("dare_linear")[0].tensors[0]
    assert (both.dtype, both.out_dtype) == (torch.float32, torch.bfloat16)
    old = plan_of(text + "dtype: float16", a=llama(torch_dtype="bfloat16"), b=llama())
    assert old.config_changes == {"torch_dtype": "float16"}


# --- heads, vocabularies, tables

SUM = """
merge_method: task_arithmetic
base_model: base
models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.25}}]
"""


def test_a_tied_head_is_the_embedding_where_another_model_has_one():
    plan = plan_of(SUM, base=llama(), a=llama(head=False), b=llama())
    head = plan.tensors[-1]
    assert sources(plan, head) == [
        ("base", "lm_head.weight"),
        ("a", "model.embed_tokens.weight"),
        ("b", "lm_head.weight"),
    ]
    assert head.vocabulary
    assert plan.config_changes == {}


def test_a_head_of_its_own_unties_the_output():
    for text in (None, {"tie_word_embeddings": True}):
        base = llama(head=False) if text is None else llama(head=False, text_config=text)
        plan = plan_of(SUM, base=base, a=llama(), b=llama(head=False))
        assert sources(plan, plan.tensors[-1])[0] == ("base", "model.embed_tokens.weight")
        assert plan.tensors[-1].name == "lm_head.weight"
        changes = {"tie_word_embeddings": False}
        if text is not None:
            changes["text_config.tie_word_embeddings"] = False
        assert plan.config_changes == changes


def test_where_all_models_are_tied_there_is_no_head():
    plan = plan_of(SUM, **dict.fromkeys(("base", "a", "b"), llama(head=False)))
    assert plan.tensors[-1].name == "model.norm.weight"


def test_a_frankenmerge_of_an_untied_and_a_tied_model_has_a_head():
    text = """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 1]}]
- sources: [{model: b, layer_range: [1, 2]}]
"""
    plan = plan_of(text, a=llama(), b=llama(head=False))
    assert sources(plan, plan.tensors[-1]) == [("b", "model.embed_tokens.weight")]
    assert plan.tensors[-1].name == "lm_head.weight"


def test_a_classifier_is_not_taken_for_a_tied_head():
    classifier = llama(head=False, extra={"score.weight": (2, 8)})
    classifier.config["architectures"] = ["LlamaForSequenceClassification"]
    del classifier.config["tie_word_embeddings"]
    with pytest.warns(RecipeWarning) as caught:
        plan = plan_of(SUM, base=llama(), a=classifier, b=llama())
    assert sources(plan, plan.tensors[-1]) == [("base", "lm_head.weight"), ("b", "lm_head.weight")]
    assert plan.tensors[-1].weights == (0.25,)
    told = " ".join(str(warning.message) for warning in caught)
    assert "merged without the models that lack it: lm_head.weight" in told
    assert "score.weight of a" in told
    assert "score.weight" not in [tensor.name for tensor in plan.tensors]


def test_heads_of_other_sizes_stay_as_the_base_has_them():
    heads = [llama(head=False, extra={"score.weight": (labels, 8)}) for labels in (2, 3, 2)]
    with pytest.warns(RecipeWarning, match=r"score.weight \(base \[2, 8\], a \[3, 8\]"):
        plan = plan_of(SUM, **dict(zip(("base", "a", "b"), heads, strict=True)))
    head = plan.tensors[-1]
    assert (head.name, head.method) == ("score.weight", PASSTHROUGH)
    assert sources(plan, head) == [("base", "score.weight")]


def test_vocabularies_of_other_sizes_are_marked():
    plan = plan_of(SUM, base=llama(), a=llama(vocab=103), b=llama(vocab=100))
    marked = [tensor.name for tensor in plan.tensors if tensor.vocabulary]
    assert marked == ["model.embed_tokens.weight", "lm_head.weight"]
    assert all(len(tensor.inputs) == 2 for tensor in plan.tensors)


def test_a_vector_as_long_as_the_vocabulary_is_none():
    plan = plan_of(SUM, **dict.fromkeys(("base", "a", "b"), llama(vocab=8)))
    marked = [tensor.name for tensor in plan.tensors if tensor.vocabulary]
    assert marked == ["model.embed_tokens.weight", "lm_head.weight"]


def test_layers_of_other_sizes_are_refused_by_name():
    with pytest.raises(RecipeError, match=r"self_attn.q_proj.weight \(base \[8, 8\], a \[16, 16\]"):
        plan_of(SUM, base=llama(), a=llama(width=16), b=llama())


def test_a_missing_layer_tensor_is_refused_by_name():
    broken = llama()
    del broken.info["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(RecipeError, match=r"a lacks .*layers.1.mlp.down_proj.weight"):
        plan_of(SUM, base=llama(), a=broken, b=llama())
    biased = llama(extra={"model.layers.0.self_attn.q_proj.bias": (8,)})
    with pytest.raises(RecipeError, match=r"base lacks .*q_proj.bias"):
        plan_of(SUM, base=llama(), a=biased, b=llama())


def test_tables_of_integers_are_copied_if_equal_and_never_cast():
    def bert() -> Inventory:
        model = llama()
        model.info["embeddings.position_ids"] = ParameterInfo((1, 512), torch.int64)
        return model

    plan = plan_of(SUM + "dtype: float16", base=bert(), a=bert(), b=llama())
    table = next(tensor for tensor in plan.tensors if tensor.name == "embeddings.position_ids")
    assert (table.method, table.out_dtype, table.dtype) == (IDENTICAL, torch.int64, None)
    assert sources(plan, table) == [("base", table.name), ("a", table.name)]
    assert table.passthrough_of == table.inputs[0]
    longer = bert()
    longer.info["embeddings.position_ids"] = ParameterInfo((1, 514), torch.int64)
    with pytest.raises(RecipeError, match=r"embeddings.position_ids.*\[1, 514\]"):
        plan_of(SUM, base=bert(), a=longer, b=llama())


def test_tables_that_no_release_reads_are_left_out():
    old = llama(
        extra={
            "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
            "model.layers.0.attn.masked_bias": (),
            "model.layers.0.attn.bias": (1, 1, 16, 16),
        }
    )
    plan = plan_of(SUM, base=llama(), a=old, b=llama())
    assert len(plan.tensors) == 2 * 4 + 3


STOCK = "merge_method: model_stock\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"


def test_what_too_few_models_have_is_the_bases():
    lone = llama(extra={"pooler.weight": (8, 8)})
    with pytest.warns(RecipeWarning) as caught:
        plan = plan_of(STOCK, base=lone, a=lone, b=llama())
    assert sources(plan, plan.tensors[-1]) == [("base", "pooler.weight")]
    assert plan.tensors[-1].method == PASSTHROUGH
    assert any("too few models have it for model_stock" in str(w.message) for w in caught)
    with pytest.warns(RecipeWarning, match="merged without the models that lack it"):
        plan = plan_of(SUM, base=lone, a=llama(), b=llama())
    assert plan.tensors[-1].passthrough_of == (plan.donor, "pooler.weight")


def test_what_only_one_of_two_has_is_copied_by_slerp():
    text = "merge_method: slerp\nbase_model: base\nmodels: [{model: a}]\nparameters: {t: 0.5}\n"
    with pytest.warns(RecipeWarning, match="pooler.weight"):
        plan = plan_of(text, base=llama(extra={"pooler.weight": (8, 8)}), a=llama())
    assert plan.tensors[-1].passthrough_of == (1, "pooler.weight")
    assert str(plan.models[1]) == "base"


# --- names and structures of other architectures


def bert(prefix: str = "bert.", layers: int = 2, weight: str = "weight") -> Inventory:
    shapes = {f"{prefix}embeddings.word_embeddings.weight": (50, 8)}
    shapes[f"{prefix}embeddings.LayerNorm.{weight}"] = (8,)
    for number in range(layers):
        shapes[f"{prefix}encoder.layer.{number}.output.dense.weight"] = (8, 8)
    shapes[f"{prefix}pooler.dense.weight"] = (8, 8)
    return inventory(shapes, vocab_size=50, num_hidden_layers=layers)


def test_names_with_and_without_the_models_prefix_are_the_same_tensors():
    for base_prefix, own_prefix in [("", "bert."), ("bert.", "")]:
        plan = plan_of(SUM, base=bert(base_prefix), a=bert(own_prefix), b=bert(weight="gamma"))
        for tensor in plan.tensors:
            bare = tensor.name.removeprefix("bert.")
            assert tensor.name == base_prefix + bare
            assert sources(plan, tensor)[:2] == [
                ("base", base_prefix + bare),
                ("a", own_prefix + bare),
            ]
        norm = next(t for t in plan.tensors if "LayerNorm" in t.name)
        assert sources(plan, norm)[2] == ("b", "bert.embeddings.LayerNorm.gamma")
        assert [t.name for t in plan.tensors if t.vocabulary] == [plan.tensors[0].name]


@pytest.mark.parametrize(
    ("prefix", "key"),
    [("transformer.h.", "n_layer"), ("h.", "n_layer"), ("gpt_neox.layers.", "num_hidden_layers")],
)
def test_layers_are_found_under_any_name(prefix, key):
    shapes = {"wte.weight": (50, 8), "classifier.0.weight": (8, 8), "classifier.2.weight": (2, 8)}
    for number in range(12):
        shapes |= {f"{prefix}{number}.mlp.experts.{e}.w1": (8, 8) for e in range(3)}
    model = inventory(shapes, vocab_size=50, **{key: 12})
    text = """
merge_method: linear
slices:
- sources: [{model: a, layer_range: [3, 5], parameters: {weight: [1, 3]}}]
- sources: [{model: a, layer_range: [0, 11], parameters: {weight: [5, 15]}}]
"""
    plan = plan_of(text, a=model)
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    assert plan.config_changes == {key: 13}
    assert len(plan.tensors) == 3 + 13 * 3
    assert tensors[f"{prefix}1.mlp.experts.2.w1"].inputs[0].name == f"{prefix}4.mlp.experts.2.w1"
    assert [tensors[f"{prefix}{n}.mlp.experts.0.w1"].weights[0] for n in (0, 1, 2, 3, 12)] == [
        1, 3, 5, 6, 15,
    ]  # fmt: skip
    # Heads are numbered too, and are no layers.
    assert tensors["classifier.0.weight"].weights == (5.0,)
    assert tensors["wte.weight"].weights == (1.0,)


def t5(encoder: int = 2, decoder: int = 3) -> Inventory:
    shapes = {"shared.weight": (50, 8)}
    for stack, count in (("encoder", encoder), ("decoder", decoder)):
        for number in range(count):
            shapes[f"{stack}.block.{number}.layer.0.SelfAttention.q.weight"] = (8, 8)
    return inventory(shapes, vocab_size=50, num_layers=encoder, num_decoder_layers=decoder)


def test_each_stack_of_layers_has_a_gradient_of_its_own():
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: [1, 2]}}]\n"
    plan = plan_of(text, a=t5())
    found = {tensor.name: tensor.weights[0] for tensor in plan.tensors}
    names = "encoder.block.{}.layer.0.SelfAttention.q.weight"
    assert [found[names.format(n)] for n in range(2)] == [1.0, 2.0]
    names = names.replace("encoder", "decoder")
    assert [found[names.format(n)] for n in range(3)] == [1.0, 1.5, 2.0]
    with pytest.raises(RecipeError, match=r"one stack of layers.*decoder.block.N, encoder.block.N"):
        plan_of(
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
            a=t5(),
        )


def test_layers_behind_the_last_are_no_part_of_the_stack():
    deep = llama(3, num_hidden_layers=2)  # predicts further tokens
    text = SUM.replace("weight: 0.5", "weight: [1, 3]")
    with pytest.warns(RecipeWarning, match="merged without the models that lack it"):
        plan = plan_of(text, base=deep, a=deep, b=llama(2))
    found = {tensor.name: tensor.weights[0] for tensor in plan.tensors}
    assert [found[f"model.layers.{n}.input_layernorm.weight"] for n in range(3)] == [1, 3, 1]


def test_a_single_layer_is_at_the_end_of_a_gradient():
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: [1, 2]}}]\n"
    plan = plan_of(text, a=llama(1))
    assert plan.tensors[1].weights == (2.0,)
    assert plan.tensors[0].weights == (1.0,)


def test_models_of_other_depth_and_layers_that_are_not_there_are_refused():
    with pytest.raises(RecipeError, match=r"b has 3 layers model.layers.N and base has 2"):
        plan_of(SUM, base=llama(), a=llama(), b=llama(3))
    text = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [1, 4]}]}]\n"
    with pytest.raises(RecipeError, match=r"slices\[0\]: the layers \[1, 4\) of a, which has 3"):
        plan_of(text, a=llama(3))
    with pytest.raises(RecipeError, match="a is not given"):
        plan_of(text)


def test_lists_with_an_item_for_each_layer_follow_the_slices():
    kinds = ["full", "sliding", "full"]
    model = llama(3, layer_types=kinds, eos_token_id=[1, 2, 3])
    text = """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources: [{model: a, layer_range: [1, 3]}]
"""
    assert plan_of(text, a=model).config_changes == {
        "num_hidden_layers": 4,
        "layer_types": ["full", "sliding", "sliding", "full"],
    }
    nested = Inventory(model.info, {"text_config": dict(model.config)})
    assert plan_of(text, a=nested).config_changes == {
        "text_config.num_hidden_layers": 4,
        "text_config.layer_types": ["full", "sliding", "sliding", "full"],
    }
    silent = llama(3)
    del silent.config["num_hidden_layers"]
    with pytest.warns(RecipeWarning, match="does not say that it has 3 layers"):
        plan_of(text, a=silent)


def test_a_filter_that_fits_nothing_is_named():
    text = SUM.replace("weight: 0.25", "weight: [{filter: slef_attn, value: 9}, {value: 1}]")
    with pytest.warns(RecipeWarning, match=r"line 4, models\[1\].*'slef_attn' is in no tensor"):
        plan_of(text, **dict.fromkeys(("base", "a", "b"), llama()))


def test_a_tensor_that_no_filter_fits_is_named():
    text = SUM.replace("weight: 0.25", "weight: {filter: mlp, value: 9}")
    with pytest.raises(RecipeError, match=r"model.embed_tokens.weight of b has no weight"):
        plan_of(text, **dict.fromkeys(("base", "a", "b"), llama()))


def test_weights_that_cancel_in_one_layer_are_named():
    text = """
merge_method: linear
models: [{model: a, parameters: {weight: [1, -1]}}, {model: b, parameters: {weight: 1}}]
"""
    with pytest.raises(RecipeError, match=r"layers.1.self_attn.q_proj.weight.*sum of the weights"):
        plan_of(text, a=llama(), b=llama())


def test_a_base_that_a_method_ignores_takes_part_only_where_mergekit_could_run_it():
    models = dict.fromkeys(("base", "a"), llama())
    karcher = plan_of("merge_method: karcher\nbase_model: base\nmodels: [{model: a}]\n", **models)
    assert [name for name, _ in sources(karcher, karcher.tensors[0])] == ["a", "base"]
    text = "base_model: base\nmodels: [{model: a, parameters: {weight: 1}}]\nmerge_method: linear\n"
    linear = plan_of(text, **models)
    assert [name for name, _ in sources(linear, linear.tensors[0])] == ["a"]
    assert str(linear.models[linear.donor]) == "base"
    copied = plan_of(text.replace("linear", "passthrough"), **models)
    assert sources(copied, copied.tensors[0]) == [("a", "model.embed_tokens.weight")]


def test_opened_checkpoints_serve_as_they_are(make_family):
    family = make_family(config=tiny_llama())
    text = f"""
merge_method: ties
base_model: {family.base}
models: [{{model: {family.finetuned}, parameters: {{weight: 1, density: 0.5}}}}]
"""
    recipe = read_recipe(text)
    models = {model: open_checkpoint(model.model.path) for model in recipe.inputs}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RecipeWarning)
        plan = plan_merge(recipe, models)
    assert {tensor.name for tensor in plan.tensors} == set(models[recipe.donor].info)
    assert sorted(tensor.name for tensor in plan.tensors if tensor.vocabulary) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
    ]
