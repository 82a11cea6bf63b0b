"""A member more for an enumeration of strings that another library has closed.

The documented way to extend an enumeration is to write it; PEFT's `PeftType` is written elsewhere
and asks to be one of its members before it takes a method. What is entered here is what
`enum.EnumType` itself enters for a member (the attributes and maps are those of Python 3.10 to
3.13, of which each has all that it looks up).
"""

from __future__ import annotations

from enum import Enum
from typing import Any

__all__ = ["add_member"]


def add_member(enumeration: type[Enum], name: str, value: str) -> Any:
    """Enter a member in an enumeration of `str`, unless it has one of that name.

    `enumeration(value)`, `enumeration[name]`, iteration, `in`, pickling, copying and JSON then
    treat it as any other.

    Returns:
        The member.
    """
    if name in enumeration.__members__:
        return enumeration[name]
    member: Any = str.__new__(enumeration, value)  # type: ignore[type-var]
    member._name_, member._value_ = name, value
    member.__objclass__ = enumeration
    member._sort_order_ = len(enumeration._member_names_)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[value] = member
    hashable = getattr(enumeration, "_hashable_values_", None)  # 3.13
    if hashable is not None:
        hashable.append(value)
    # The class itself refuses assignments to its members.
    type.__setattr__(enumeration, name, member)
    return member
