"""FieldType: the type of a field of JSON objects, inferred over all rows."""

from __future__ import annotations

import math
import shlex
from typing import Any

import pyarrow as pa

from gptbatch.pipeline.errors import InputRowsError
from gptbatch.pipeline.input.strict_json import shorten

MAX_KEYS = 1000
# every whole number up to it is a float64
_EXACT_FLOAT = 2**53
_NAMES = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a fraction",
    "string": "a string",
    "array": "an array",
    "object": "an object",
}
_SCALARS = {
    # no row has a value, or all lists are empty
    None: pa.string(),
    "boolean": pa.bool_(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "string": pa.string(),
}


class FieldType:
    """The type of a field, to which the value of each row is added.

    Nulls fit every type. Whole numbers and fractions are float64 together. Objects have all keys of
    all rows, with null where a row lacks one.

    Args:
        path: The field, for messages.
        selected: The field that was selected, of which this one is a part; None for itself.

    Attributes:
        found: Whether any value was added, null included.
    """

    def __init__(self, path: str, selected: str | None = None) -> None:
        self.path, self.selected, self.found = path, selected or path, False
        self._kind: str | None = None
        self._row = ""
        self._largest = 0
        self._items: FieldType | None = None
        self._keys: dict[str, FieldType] = {}

    def add(self, value: Any, row: str) -> None:
        """Add the value of a row.

        Args:
            value: A value of JSON.
            row: The id of the row.

        Raises:
            InputRowsError: The field has values of several types.
        """
        self.found = True
        if value is None:
            return
        kind = _kind(value)
        if self._kind is None:
            self._kind, self._row = kind, row
        elif self._kind != kind:
            if {self._kind, kind} != {"integer", "number"}:
                raise self._error(
                    f"holds {_NAMES[self._kind]} in row {shorten(self._row)} and {_NAMES[kind]} in "
                    f"row {shorten(row)}"
                )
            self._kind = "number"
        if kind == "integer":
            self._largest = max(self._largest, abs(value))
            if not -(2**63) <= value < 2**63:
                raise self._error(f"holds a number of more than 64 bits in row {shorten(row)}")
        elif kind == "number" and not math.isfinite(value):
            raise self._error(f"holds a number above all of float64 in row {shorten(row)}")
        elif kind == "array":
            self._items = self._items or FieldType(f"{self.path}[]", self.selected)
            for item in value:
                self._items.add(item, row)
        elif kind == "object":
            for key, item in value.items():
                self._key(key).add(item, row)

    def to_arrow(self) -> pa.DataType:
        """Return the Arrow type of all values.

        Raises:
            InputRowsError: There is none.
        """
        if self._kind == "array":
            return pa.list_((self._items or FieldType(self.path)).to_arrow())
        if self._kind == "object":
            if not self._keys:
                raise self._error("holds only empty objects, which make no column")
            return pa.struct([(key, value.to_arrow()) for key, value in self._keys.items()])
        if self._kind == "number" and self._largest > _EXACT_FLOAT:
            raise self._error("holds fractions, and whole numbers above 2^53, which float64 rounds")
        return _SCALARS[self._kind]

    def _key(self, key: str) -> FieldType:
        if key not in self._keys:
            if len(self._keys) == MAX_KEYS:
                raise self._error(f"holds objects of more than {MAX_KEYS} different keys")
            self._keys[key] = FieldType(f"{self.path}.{key}", self.selected)
        return self._keys[key]

    def _error(self, problem: str) -> InputRowsError:
        return InputRowsError(
            f"metadata field {self.path} {problem}; a column has one type: export the field as "
            f"JSON text with --metadata-json {shlex.quote(self.selected)}"
        )


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    kinds: dict[type, str] = {
        int: "integer",
        float: "number",
        str: "string",
        list: "array",
        dict: "object",
    }
    return kinds[type(value)]
