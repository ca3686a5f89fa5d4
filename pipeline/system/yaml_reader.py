"""Reads mappings of settings from YAML, with limits on size, depth and numbers, without aliases.

Nested aliases can expand a short text to gigabytes, so aliases are rejected. Errors of PyYAML's
constructors, such as IndexError for `!!int ""`, become YamlError. Dates are text, and so is 1:30,
which YAML 1.1 reads as 90. 010 is 8 in YAML 1.1 and 10 in YAML 1.2, and is rejected.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

# a config of a user
MAX_CONFIG_BYTES = 2**20
# a config that a run recorded; skip_row may be long
MAX_RECORDED_BYTES = 2**23
MAX_DEPTH = 16
MAX_NUMBER_CHARACTERS = 100

_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class YamlError(ValueError):
    """The text is not YAML, or not a mapping of settings. The message names reason and line."""


def read_yaml_mapping(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> dict[Any, Any]:
    """Read a YAML file that holds a mapping. An empty file is an empty mapping.

    Args:
        path: The file.
        max_bytes: Larger files are rejected.

    Raises:
        YamlError: The file is too large, or is not a YAML mapping.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise YamlError(
            f"more than {max_bytes // 1024} KiB, which is too large for a mapping of settings"
        )
    return parse_yaml_mapping(content)


def parse_yaml_mapping(content: bytes) -> dict[Any, Any]:
    """Parse YAML that holds a mapping. Raises YamlError."""
    # libyaml is 20 times faster, but rejects the escapes of a name that is not UTF-8
    fast = yaml.__with_libyaml__ and not _SURROGATE.search(content)
    try:
        _check_events(content, yaml.CSafeLoader if fast else yaml.SafeLoader)
        value = yaml.load(content, _FastLoader if fast else _Loader)
    except YamlError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise YamlError(
            f"not readable as YAML ({error.problem or error.context}{where})"
        ) from error
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise YamlError(f"not readable as YAML ({' '.join(str(error).split())[:200]})") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise YamlError("a mapping of keys to values is needed")
    return value


def _check_events(content: bytes, loader: Any) -> None:
    """Reject aliases and deep nesting before values are built. Parsing events builds none."""
    depth = 0
    for event in yaml.parse(content, loader):
        if isinstance(event, yaml.AliasEvent):
            alias = str(event.anchor)[:40]
            raise YamlError(
                f"not readable as YAML here: the alias *{alias}{_line(event)} is not supported; "
                "write the value out"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise YamlError(
                    f"not readable as YAML here: nested deeper than {MAX_DEPTH} levels"
                    f"{_line(event)}"
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _line(event: yaml.Event) -> str:
    return "" if event.start_mark is None else f" in line {event.start_mark.line + 1}"


class _Settings(yaml.constructor.SafeConstructor):
    """A constructor that rejects repeated keys and long numbers. PyYAML takes the last key."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            shown = repr(node.value[:80]) if isinstance(node, yaml.ScalarNode) else "this"
            problem = f"{shown} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be text", key_node.start_mark
                )
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {str(key)[:80]!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        try:
            mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        except yaml.constructor.ConstructorError as error:
            for key_node, value_node in node.value:
                if value_node.start_mark is error.problem_mark:
                    error.problem = f"{key_node.value[:80]}: {error.problem}"
            raise
        return mapping

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        is_number = node.tag.endswith((":int", ":float"))
        if is_number and not 0 < len(node.value) <= MAX_NUMBER_CHARACTERS:
            problem = f"a number has 1 to {MAX_NUMBER_CHARACTERS} characters, not {len(node.value)}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        if node.tag.endswith(":int") and _OCTAL.fullmatch(node.value):
            decimal = int(node.value, 10)
            problem = (
                f"{node.value} is octal in YAML 1.1 and decimal in YAML 1.2; write {decimal}, or "
                "quote it to make it text"
            )
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_scalar(node)


def _without_base_60(tag: str, pattern: re.Pattern[str]) -> re.Pattern[str]:
    return (
        re.compile(rf"(?!.*:)(?:{pattern.pattern})", re.VERBOSE)
        if tag.endswith((":int", ":float"))
        else pattern
    )


# `2026-11-27`, `<<` and `1:30` resolve to text
_RESOLVERS = {
    first: [
        (tag, _without_base_60(tag, pattern))
        for tag, pattern in resolvers
        if not tag.endswith((":timestamp", ":merge"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Loader(_Settings, yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS


if yaml.__with_libyaml__:

    class _FastLoader(_Settings, yaml.CSafeLoader):
        yaml_implicit_resolvers = _RESOLVERS
