"""The facts of a run as text: each value, with its parts where parts differ."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

from gptbatch.pipeline.audit.run_reader import RunReader

MAX_VALUES = 8
MAX_RANGES = 3


def describe_facts(run: RunReader) -> dict[str, str]:
    """Return the facts of a run as text.

    Keys in a group have its name in front: `environment.torch`, `versions.numpy`. A fact in which
    parts differ names all values: `2 different: node-1 (parts 0 to 3); node-2 (parts 4, 6)`.
    A run without parts has the facts of its manifest.
    """
    parts_of: dict[str, dict[str, list[int]]] = {}
    recorded = [(_flat(facts), parts) for facts, parts in run.facts_of_parts or [(run.facts, [])]]
    for name in dict.fromkeys(name for facts, _ in recorded for name in facts):
        values = parts_of.setdefault(name, {})
        for facts, parts in recorded:
            values.setdefault(facts.get(name, ""), []).extend(parts)
    return {name: text for name, values in parts_of.items() if (text := _describe(values))}


def value_text(value: Any) -> str:
    """Return a setting as it stands in a config."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _flat(facts: dict[str, Any]) -> dict[str, str]:
    """Return facts by flat names, as text; "" for null."""
    flat: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": item for key, item in _flat(value).items()})
        else:
            flat[name] = "" if value is None else value_text(value)
    return flat


def _describe(values: dict[str, list[int]]) -> str:
    """Return the values of a fact, each with its parts if there are several."""
    if len(values) == 1:
        return next(iter(values))
    named = [
        f"{value or 'not recorded'} ({_describe_parts(sorted(parts))})"
        for value, parts in list(values.items())[:MAX_VALUES]
    ]
    if len(values) > MAX_VALUES:
        named.append(f"and {len(values) - MAX_VALUES} more")
    return f"{len(values)} different: {'; '.join(named)}"


def _describe_parts(numbers: list[int]) -> str:
    """Return increasing part numbers as ranges: `part 3`, `parts 0 to 3, 7`."""
    ranges = []
    # Neighbours have one difference to their places.
    for _, group in groupby(enumerate(numbers), lambda entry: entry[1] - entry[0]):
        found = [number for _, number in group]
        ranges.append((f"{found[0]} to {found[-1]}" if len(found) > 1 else f"{found[0]}", found))
    shown = ", ".join(text for text, _ in ranges[:MAX_RANGES])
    left = sum(len(found) for _, found in ranges[MAX_RANGES:])
    noun = "part" if len(numbers) == 1 else "parts"
    return f"{noun} {shown}{f' and {left} more' if left else ''}"
