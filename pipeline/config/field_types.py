"""The types of config fields: which settings are lists, objects, or lists that take commas."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo


def value_type(annotation: Any) -> Any:
    """Return the type of a setting without None and without its validators: str, list[str]."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = [arm for arm in get_args(annotation) if arm is not types.NoneType]
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


def is_list(field: FieldInfo) -> bool:
    """Return whether a setting takes several values."""
    return get_origin(value_type(field.annotation)) is list


def has_comma_items(field: FieldInfo) -> bool:
    """Return whether a setting is a list whose items may be given as one text with commas.

    These are numbers and names. A text, such as a stop string, may hold commas itself.
    """
    if not is_list(field):
        return False
    item = value_type(get_args(value_type(field.annotation))[0])
    return item is int or get_origin(item) is Literal


def is_object(field: FieldInfo) -> bool:
    """Return whether a setting takes an object, which an option or a variable gives as JSON."""
    return get_origin(value_type(field.annotation)) is dict
