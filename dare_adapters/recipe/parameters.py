"""What a parameter is worth for one tensor: scalars, gradients and filters, level by level."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dare_adapters.errors import RecipeError
from dare_adapters.recipe.document import Entry, Scalar

__all__ = [
    "REQUIRED",
    "Condition",
    "Parameter",
    "Setting",
    "Settings",
    "check_setting",
    "evaluate",
    "read_parameters",
    "resolve",
]

REQUIRED: Any = object()
YES = ("true", "yes", "y", "on", "t", "1")
NO = ("false", "no", "n", "off", "f", "0")


@dataclass(frozen=True)
class Condition:
    """A value, for the tensors that it is meant for.

    Attributes:
        values: one, or a gradient from the first layer to the last; none: says nothing.
        filter: a piece of the tensor's name; None or "*": every tensor.
        place: where the recipe says it.
    """

    values: tuple[Scalar, ...]
    filter: str | None = None
    place: str = field(default="", compare=False)

    def fits(self, tensor: str) -> bool:
        """Whether it is for a tensor of that name."""
        return self.filter is None or self.filter == "*" or self.filter in tensor


Setting = tuple[Condition, ...]
Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a merge method.

    Attributes:
        name: in recipes.
        kind: float, int or bool.
        default: where no level says anything; REQUIRED: there is none.
        scope: "shared" by all inputs of a tensor, or each "input" its own, or each input that is
            not the base ("non_base").
        low, high: of numbers.
        used: False: recipes carry it, and it changes nothing.
    """

    name: str
    kind: type[float] | type[int] | type[bool] = float
    default: Any = REQUIRED
    scope: str = "shared"
    low: float = -math.inf
    high: float = math.inf
    used: bool = True

    @property
    def wanted(self) -> str:
        """What values it takes, in words."""
        if self.kind is bool:
            return "true or false"
        kind = "a whole number" if self.kind is int else "a number"
        if self.low > -math.inf and self.high < math.inf:
            return f"{kind} in {self.low:g} … {self.high:g}"
        return f"{kind} of at least {self.low:g}" if self.low > -math.inf else kind

    def read(self, value: Scalar, place: str) -> Scalar:
        """A value of its kind; numbers may be written as text, as YAML reads 1e-5.

        Raises:
            RecipeError: it is of another kind or out of range.
        """
        found = _as_bool(value) if self.kind is bool else _as_number(value)
        if self.kind is int and isinstance(found, float):
            found = int(found) if found.is_integer() else None
        if self.kind is float and found is not None:
            found = float(found)
        if found is None or (self.kind is not bool and not self.low <= found <= self.high):
            shown = repr(value)[:40]
            raise RecipeError(f"{place}: {self.name} is {shown}; it must be {self.wanted}")
        return found


def read_parameters(entry: Entry | None) -> Settings:
    """A mapping `parameters` of a recipe, whatever the names in it.

    Raises:
        RecipeError: a setting is neither a scalar, nor a gradient, nor conditional.
    """
    if entry is None:
        return {}
    return {name: _read_setting(own) for name, own in entry.mapping("parameters").items()}


def check_setting(parameter: Parameter, setting: Setting) -> None:
    """Refuse a setting in which any value is not the parameter's.

    Raises:
        RecipeError: naming the value and where it is.
    """
    for condition in setting:
        for value in condition.values:
            parameter.read(value, condition.place)


def resolve(
    parameter: Parameter,
    levels: Iterable[Settings],
    tensor: str,
    t: float,
    whose: str = "",
) -> Any:
    """The value for one tensor: of the first level that has one, or the default.

    Args:
        parameter: which.
        levels: from the highest precedence to the lowest.
        tensor: the name that filters see.
        t: how deep it is, 0 (the first layer, and all that is in none) to 1 (the last).
        whose: of which model, for the message.

    Raises:
        RecipeError: no level has one and it is required.
    """
    for settings in levels:
        if parameter.name in settings:
            value = evaluate(parameter, settings[parameter.name], tensor, t)
            if value is not None:
                return value
    if parameter.default is REQUIRED:
        of_model = f" of {whose}" if whose else ""
        raise RecipeError(
            f"{tensor}{of_model} has no {parameter.name}, which is required: no filter fits it; "
            f"end the list with a value that has no filter"
        )
    return parameter.default


def evaluate(parameter: Parameter, setting: Setting, tensor: str, t: float) -> Scalar | None:
    """The value that one level gives, or None; arguments as of `resolve`.

    The first condition that fits decides, even where it says nothing.
    """
    for condition in setting:
        if condition.fits(tensor):
            return _at(parameter, condition, t)
    return None


def _read_setting(entry: Entry) -> Setting:
    """A scalar, a gradient, a mapping {value, filter}, or a list of those."""
    if isinstance(entry.value, dict):
        return (_read_condition(entry),)
    if isinstance(entry.value, list) and any(isinstance(i.value, dict) for i in entry.value):
        for item in entry.value:
            if not isinstance(item.value, dict):
                item.fail("numbers and mappings {value, filter} do not go into one list")
        return tuple(_read_condition(item) for item in entry.value)
    return (Condition(_read_values(entry), None, entry.place),)


def _read_condition(entry: Entry) -> Condition:
    own = entry.mapping("a conditional value", ("value", "filter"))
    if "value" not in own:
        entry.fail("a mapping {value, filter} needs the key 'value'")
    wanted = None if "filter" not in own else own["filter"].text("a piece of a tensor's name")
    return Condition(_read_values(own["value"]), wanted, own["value"].place)


def _read_values(entry: Entry) -> tuple[Scalar, ...]:
    items = entry.value if isinstance(entry.value, list) else [entry]
    values = []
    for item in items:
        if item.value is None or isinstance(item.value, (dict, list)):
            item.expected("a value, or a list of values from the first layer to the last")
        values.append(item.value)
    return tuple(values)


def _at(parameter: Parameter, condition: Condition, t: float) -> Scalar | None:
    values = [parameter.read(value, condition.place) for value in condition.values]
    if not values:
        return None
    position = t * (len(values) - 1)
    first = int(position)
    if parameter.kind is bool:
        return values[first]
    second, share = min(first + 1, len(values) - 1), position - first
    if len(values) == 1 or share == 0:
        return values[first]
    between = (1 - share) * float(values[first]) + share * float(values[second])
    return parameter.read(between, f"{condition.place} ({share:g} of the way between two values)")


def _as_number(value: Scalar) -> float | int | None:
    """None where it is no finite number; true and false are none."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not math.isfinite(value):
        return None
    return value


def _as_bool(value: Scalar) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return bool(value) if value in (0, 1) else None
    lowered = value.lower()
    return True if lowered in YES else False if lowered in NO else None
