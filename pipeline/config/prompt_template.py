"""Parses a prompt template: text with names of fields in braces, such as `Q: {question}`."""

from __future__ import annotations

import re
from string import Formatter

# The part before a field, and the field. The last part may have no field.
TemplatePart = tuple[str, str | None]

_PYTHON_NAME = re.compile(r"__\w*__")
_INDEX = re.compile(r"\[['\"]?([^\]'\"]*)['\"]?\]")


class TemplateError(ValueError):
    """A template is malformed. The message does not repeat it, and begins with a verb."""


def parse_template(template: str) -> list[TemplatePart]:
    """Return the literal texts of a template, each with the name of the field after it.

    A name is a key or a dotted path, as in `prompt_field`. `{{` and `}}` are braces.

    Raises:
        TemplateError: Braces are unbalanced, there is no field, or braces hold more than a name.
    """
    if any("\ud800" <= character <= "\udfff" for character in template):
        raise TemplateError("is not UTF-8 text")
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise TemplateError(
            f"has malformed braces ({error}); write {{{{ and }}}} for braces that are text"
        ) from None
    parts = [
        (literal, None if name is None else _field(name, spec or "", conversion))
        for literal, name, spec, conversion in parsed
    ]
    names = [name for _, name in parts if name is not None]
    if not names:
        raise TemplateError("names no field; write the name of a field in braces: {question}")
    # `{x:}` is parsed like `{x}`
    if _rebuilt(parts) != template:
        raise TemplateError("holds a field with an empty format; remove its colon")
    return parts


def template_fields(parts: list[TemplatePart]) -> list[str]:
    """Return the names of the fields of a parsed template, each once."""
    return list(dict.fromkeys(name for _, name in parts if name is not None))


def _field(name: str, spec: str, conversion: str | None) -> str:
    """Return the name between braces if nothing else stands there."""
    whole = f"{{{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}}}"
    if not name:
        raise TemplateError(f"holds {whole}, which names no field; write {{question}}")
    if conversion:
        raise TemplateError(f"holds {whole}; conversions are not supported, write {{{name}}}")
    if spec:
        raise TemplateError(f"holds {whole}; formats are not supported, write {{{name}}}")
    if "[" in name or "]" in name:
        dotted = _INDEX.sub(r".\1", name)
        raise TemplateError(f"holds {whole}; write {{{dotted}}} for what is inside of a field")
    for step in name.split(".")[1:]:
        if _PYTHON_NAME.fullmatch(step):
            raise TemplateError(
                f"holds {whole}; {step} is an attribute of Python objects, and only fields of rows "
                "can be named"
            )
    return name


def _rebuilt(parts: list[TemplatePart]) -> str:
    return "".join(
        literal.replace("{", "{{").replace("}", "}}") + ("" if name is None else f"{{{name}}}")
        for literal, name in parts
    )
