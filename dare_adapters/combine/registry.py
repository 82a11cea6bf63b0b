"""Methods that make one delta of several, by the name users know.

A method is a function; its signature is its configuration and its docstring its formula:

    @delta_method("linear")
    def linear(deltas: Sequence[Delta], weights: Sequence[float], *, lambda_: float = 1.0) -> Delta:

    @parameter_method("slerp")
    def slerp(parameters: Sequence[Tensor], weights: Sequence[float], *, t: float) -> Tensor:

The first kind works on deltas, lazily; the second on whole float32 parameters. Keyword arguments
of these names are not options but given by the caller:

    name        the parameter's checkpoint name
    base        float32 tensor of the base's parameter (parameter methods)
    statistics  one tensor or None for each parameter (parameter methods); see `Method.statistics`
    norms       root of the sum of squares of each adapter's statistics, over the whole model
    masks       :class:`RandomMasks`, for every random choice (delta methods)
    cutoffs     one :class:`Threshold` for each delta, of the whole model, or None (delta methods)

Packages add methods through the entry-point group `dare_adapters.methods`: the entry's value is a
module, or a function that was registered by its decorator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from dare_adapters.errors import CombinationError

__all__ = ["Method", "delta_method", "get_method", "method_names", "parameter_method"]

ENTRY_POINTS = "dare_adapters.methods"
GIVEN = ("name", "base", "statistics", "norms", "masks", "cutoffs")
_GIVEN_TO = {False: ("name", "masks", "cutoffs"), True: ("name", "base", "statistics", "norms")}
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: of the combination type.
        function: what computes it.
        on_parameters: whether it works on whole parameters and not on deltas.
        options: name -> default of what a user may set; `inspect.Parameter.empty`: must be set.
        given: names of what the caller gives it.
        least: how many adapters it takes at least.
        most: and at most, or None.
        statistics: which statistics it needs, "fisher" or "gram", or None.
    """

    name: str
    function: Callable[..., Any]
    on_parameters: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    least: int = 1
    most: int | None = None
    statistics: str | None = None

    def check(self, options: Mapping[str, Any], count: int) -> None:
        """Refuse options that it does not have or needs, and a count that it cannot take.

        Raises:
            CombinationError: naming the option and those there are.
        """
        unknown = [name for name in options if name not in self.options]
        if unknown:
            valid = ", ".join(self.options) or "none"
            raise CombinationError(
                f"{self.name} has no option {', '.join(unknown)}; its options are: {valid}"
            )
        empty = inspect.Parameter.empty
        needed = [n for n, default in self.options.items() if default is empty and n not in options]
        if needed:
            raise CombinationError(f"{self.name} needs {', '.join(needed)}")
        if count < self.least or (self.most is not None and count > self.most):
            wanted = f"at least {self.least}" if self.most is None else f"{self.least}"
            if self.most not in (None, self.least):
                wanted += f" to {self.most}"
            raise CombinationError(f"{self.name} combines {wanted} adapters, {count} are given")


_methods: dict[str, Method] = {}


def delta_method(
    name: str, *aliases: str, least: int = 1, most: int | None = None
) -> Callable[[Function], Function]:
    """Register a function of aligned deltas and weights that returns a delta."""
    return _registering((name, *aliases), False, least, most, None)


def parameter_method(
    name: str,
    *aliases: str,
    least: int = 1,
    most: int | None = None,
    statistics: str | None = None,
) -> Callable[[Function], Function]:
    """Register a function of whole parameters and weights that returns the merged parameter."""
    return _registering((name, *aliases), True, least, most, statistics)


def get_method(name: str) -> Method:
    """The method of a name.

    Raises:
        CombinationError: there is none; the message lists those there are.
    """
    _load_all()
    if name not in _methods:
        raise CombinationError(
            f"combination_type is {name!r}; there are {', '.join(sorted(_methods))}"
            + "".join(f". {failure}" for failure in _load_all())
        )
    return _methods[name]


def method_names() -> list[str]:
    """Every registered name, sorted."""
    _load_all()
    return sorted(_methods)


def _registering(
    names: tuple[str, ...],
    on_parameters: bool,
    least: int,
    most: int | None,
    statistics: str | None,
) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        given, options = set(), {}
        for parameter in list(inspect.signature(function).parameters.values())[2:]:
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                raise TypeError(f"{names[0]}: {parameter.name} must be a keyword-only argument")
            if parameter.name in GIVEN and parameter.name not in _GIVEN_TO[on_parameters]:
                kind = "parameters" if on_parameters else "deltas"
                raise TypeError(f"{names[0]}: a method on {kind} is not given {parameter.name}")
            if parameter.name in GIVEN:
                given.add(parameter.name)
            else:
                options[parameter.name] = parameter.default
        for name in names:
            known = _methods.get(name)
            if known is not None and known.function is not function:
                raise ValueError(f"a combination type {name!r} is registered already")
            _methods[name] = Method(
                name, function, on_parameters, options, frozenset(given), least, most, statistics
            )
        return function

    return register


@lru_cache(maxsize=1)
def _load_all() -> tuple[str, ...]:
    """Import what registers: the methods of this package, then those of others.

    Returns:
        What is wrong with others; it spoils their own methods only.
    """
    from dare_adapters.combine import load_methods

    load_methods()
    failures = []
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist else "a package"
            failures.append(
                f"{package} offers methods in {entry.value}, which cannot be imported: {error}"
            )
    return tuple(failures)
