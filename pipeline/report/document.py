"""The HTML document of a report: a list of sections in one self-contained file.

A section brings its title, its HTML, and, as far as it needs them, JSON data and a script. The
document loads nothing. Its content security policy allows only the scripts and styles in it, by
their SHA-256. Texts of rows stand in the JSON data alone; scripts show them by `textContent`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from gptbatch.pipeline.system.redact import printable

# The first bytes of a report. The command replaces only files that begin with them.
MARK = "<!doctype html><!-- gptbatch report -->"
# In a script element: characters that end it, that JavaScript takes for line ends, that reorder the
# source, and surrogates, which UTF-8 cannot encode.
_ESCAPED = re.compile("[<>&\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One section of a report.

    Attributes:
        id: The anchor, unique in the document.
        title: The heading, also in the navigation.
        html: The content below the heading. Templates and `svg` escape all values in it.
        data: A value for `report.data(id)` in scripts, embedded as JSON; None for none.
        script: JavaScript that runs once, after the document is there and after the scripts of
            earlier sections. It runs as the body of a function of `report` (see report.js) and
            `section`, the element; "" for none.
        style: CSS; "" for none.
    """

    id: str
    title: str
    html: Markup
    data: Any = None
    script: str = ""
    style: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A report.

    Attributes:
        title: What ran, in the title and in the first heading.
        subtitle: One line below it.
        sections: The sections, in order.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]

    def render(self) -> str:
        """Return the HTML."""
        scripts = [template_text("report.js"), template_text("browser.js")]
        scripts += [_function(section) for section in self.sections if section.script]
        styles = [template_text("report.css")]
        # Sections of one kind may share a style.
        styles += dict.fromkeys(section.style for section in self.sections if section.style)
        html = render(
            "report.html",
            mark=Markup(MARK),
            title=self.title,
            subtitle=self.subtitle,
            sections=self.sections,
            policy=_policy(scripts, styles),
            data={
                section.id: Markup(to_json(section.data))
                for section in self.sections
                if section.data is not None
            },
            scripts=[Markup(script) for script in scripts],
            styles=[Markup(style) for style in styles],
        )
        return str(html)


def render(template: str, **values: Any) -> Markup:
    """Return a template of this package with values, which are escaped."""
    return Markup(_environment().get_template(template).render(values))


def template_text(name: str) -> str:
    """Return a file of `templates`, as it is."""
    return (files(__package__) / "templates" / name).read_text(encoding="utf-8")


def note(text: str) -> Markup:
    """Return a remark, as HTML."""
    return Markup('<p class="note">{}</p>').format(text)


def moment(seconds: float) -> str:
    """Return a time in seconds since 1970 as text: 2026-11-28 12:38:41 UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def to_json(value: Any) -> str:
    """Return JSON for a script element: it can neither end the element nor reorder its source.

    NaN and infinity become null, and integers that JavaScript would round become texts.
    """
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**53:
        return str(value)
    return value


def _function(section: Section) -> str:
    start = f'"use strict";\nreport.section({json.dumps(section.id)}, function (report, section) {{'
    return f"{start}\n{section.script}\n}});\n"


def _policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(map(_source_hash, scripts))}",
            f"style-src {' '.join(map(_source_hash, styles))}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _source_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@cache
def _environment() -> Environment:
    return Environment(
        autoescape=True,
        # `{{ text }}` shows characters that a reader cannot see, as in messages
        finalize=lambda value: printable(value) if type(value) is str else value,
        loader=FunctionLoader(template_text),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
