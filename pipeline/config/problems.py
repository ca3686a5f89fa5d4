"""Explains what pydantic finds wrong with settings: the key, the value, what to use instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gptbatch.pipeline.config.prompt_template import TemplateError
from gptbatch.pipeline.errors import ConfigError
from gptbatch.pipeline.params.misspelling import meant_names
from gptbatch.pipeline.params.other_names import advice_for
from gptbatch.pipeline.system.paths import PathError

MAX_PROBLEMS = 20
MAX_VALUE_CHARACTERS = 200


def settings_error(
    error: ValidationError, where: str, known: Sequence[str], *, section: str | None = None
) -> ConfigError:
    """Return the error to raise for wrong settings of a Python call.

    Args:
        error: The problems.
        where: What the settings were given to, for the message: `JobConfig`.
        known: The keys that exist.
        section: A section whose settings were given by their own names.
    """
    problems = error.errors(include_url=False)
    for problem in problems:
        if problem["loc"][:1] == (section,):
            problem["loc"] = problem["loc"][1:]
    lines = []
    for problem in problems:
        text = describe_problem(problem, known)
        lines.append(f"{where}: {text}" if key_of(problem) else text)
    keys = tuple(setting_of_key(key_of(problem)) for problem in problems)
    return ConfigError(join_problems(lines), keys=keys)


def describe_problem(problem: ErrorDetails, known: Sequence[str]) -> str:
    """Return the key and what is wrong with it: `temperature: input should be ..., not -1`."""
    key = key_of(problem)
    if problem["type"] == "extra_forbidden":
        advice = advice_for(key)
        return f"there is no key {key!r}{f'; {advice}' if advice else nearest_name(key, known)}"
    if problem["type"] == "missing":
        return f"{key} is required"
    if not key:
        return problem["msg"].removeprefix("Value error, ")
    return f"{key}: {with_value(problem)}"


def join_problems(lines: Sequence[str]) -> str:
    """Return a message of the first lines, and the number of the others."""
    left = len(lines) - MAX_PROBLEMS
    return "\n".join([*lines[:MAX_PROBLEMS], *([f"and {left} more"] if left > 0 else [])])


def key_of(problem: ErrorDetails) -> str:
    """Return the location of a problem: `engine.dtype`, `skip_row.0`, "" for all together."""
    return ".".join(str(step) for step in problem["loc"])


def setting_of_key(key: str) -> str:
    """Return the config key of a location: skip_row for its item skip_row.0."""
    return re.sub(r"(\.\d+)+$", "", key)


def with_value(problem: ErrorDetails) -> str:
    """Return the problem and the value: `input should be ..., not -1`."""
    value = problem["input"]
    shown = (
        repr(value)
        if isinstance(value, str | bytes | int | float | None)
        else f"{type(value).__name__} {value!r}"
    )
    if len(shown) > MAX_VALUE_CHARACTERS:
        shown = f"{shown[:MAX_VALUE_CHARACTERS]}... ({len(shown)} characters)"
    if isinstance(problem.get("ctx", {}).get("error"), PathError | TemplateError):
        return f"{shown} {problem['ctx']['error']}"
    message = problem["msg"].removeprefix("Value error, ")
    quoted = ""
    if isinstance(value, bool) and problem["type"] in ("string_type", "literal_error"):
        words = ("on", "yes", "true") if value else ("off", "no", "false")
        fitting = [
            word for word in words if problem["type"] == "string_type" or f"'{word}'" in message
        ]
        if fitting:
            quoted = (
                f"; YAML reads {', '.join(words[:2])} and {words[2]} without quotes as a boolean; "
                f"quote the word: '{fitting[0]}'"
            )
    elif problem["type"] == "string_type" and isinstance(value, int | float | dict):
        quoted = "; quote it to make it text"
    return f"{message[0].lower()}{message[1:]}, not {shown}{quoted}"


def nearest_keys(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names that an unknown name may stand for, usually one; empty without any.

    They are those that it misspells, else the longest of those whose words it has (`output` for
    `output_dir`), else the shortest of those that have its words (`batch_size` for `batch`). A name
    in a section, such as engine.dtype, is also found by its last part.
    """
    keys = {key.rpartition(".")[2]: key for key in known} | {key: key for key in known}
    if meant := meant_names(name, keys):
        return list(dict.fromkeys(keys[key] for key in meant))
    words = _words(name)
    inside = [key for key in keys if _is_long(_words(key)) and _words(key) <= words]
    around = [key for key in keys if _is_long(words) and words <= _words(key)]
    return [keys[key] for key in (sorted(inside, key=len)[-1:] or sorted(around, key=len)[:1])]


def nearest_name(name: str, known: Sequence[str]) -> str:
    """Return advice for an unknown name: the nearest known ones, else all."""
    keys = nearest_keys(name, known)
    return f"; did you mean {' or '.join(keys)}?" if keys else f"; known are {', '.join(known)}"


def _words(name: str) -> set[str]:
    """Return the words of a name, without a plural s."""
    return {word.removesuffix("s") for word in re.split(r"[-_. ]+", name.lower())}


def _is_long(words: set[str]) -> bool:
    """Return whether one word says something, as opposed to those of `in` and `n`."""
    return max(map(len, words)) > 2
