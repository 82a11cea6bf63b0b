"""mergekit's recipes: read, checked, and planned tensor by tensor, with mergekit's numbers.

recipe = read_recipe("recipe.yml")       # the grammar
check_recipe(recipe)                     # the method and its parameters; still no model opened
plan = plan_merge(recipe, {model: open_checkpoint(…) for model in recipe.inputs})
"""

from dare_adapters.recipe.check import check_recipe
from dare_adapters.recipe.document import RecipeWarning
from dare_adapters.recipe.grammar import (
    InputModel,
    InputSlice,
    OutputSlice,
    Recipe,
    TokenizerSettings,
    TokenRule,
    TokenSource,
    read_recipe,
)
from dare_adapters.recipe.groups import with_adapter_bases
from dare_adapters.recipe.methods import MERGE_METHODS, MergeMethod, get_merge_method
from dare_adapters.recipe.plan import (
    IDENTICAL,
    PASSTHROUGH,
    MergePlan,
    OutputTensor,
    TensorOf,
    plan_merge,
)
from dare_adapters.recipe.reference import ModelPath, ModelReference
from dare_adapters.recipe.structure import Inventory

__all__ = [
    "IDENTICAL",
    "MERGE_METHODS",
    "PASSTHROUGH",
    "InputModel",
    "InputSlice",
    "Inventory",
    "MergeMethod",
    "MergePlan",
    "ModelPath",
    "ModelReference",
    "OutputSlice",
    "OutputTensor",
    "Recipe",
    "RecipeWarning",
    "TensorOf",
    "TokenRule",
    "TokenSource",
    "TokenizerSettings",
    "check_recipe",
    "get_merge_method",
    "plan_merge",
    "read_recipe",
    "with_adapter_bases",
]
