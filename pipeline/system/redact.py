"""Removes secrets and control characters from text that is written or shown.

Settings and errors of libraries may contain passwords (in URLs) and access tokens. Names of files
and tensors may contain control sequences. A name that looks like a secret is kept if a file of that
name exists.

The time is linear in the length of the text: patterns begin at a marker and have bounded length.
"""

from __future__ import annotations

import os
import re

HIDDEN = "***"
MAX_PATH_CHARACTERS = 4096
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

# `scheme://`, a scheme that is also written with one slash, or `//` of a network share, and the
# text up to the next slash
_AUTHORITY = re.compile(
    r"(?:(?<=[A-Za-z0-9]):[/\\]{2,3}"
    r"|(?<=http:)/|(?<=https:)/|(?<=ftp:)/|(?<=ssh:)/|(?<=s3:)/|(?<=smb:)/"
    r"|(?P<share>(?<![^\s'\"(=,])//))(?P<authority>[^\s/\\]*)",
    re.IGNORECASE,
)
_NAMES = (
    r"(?:password|passwd|passphrase|secret|signature|credentials?"
    r"|(?:api|access|account|secret|private|shared)[_-]?key"
    r"|(?:access|api|auth|hf|hub|refresh|security|session)[_-]?token)"
)
# group 1 of each pattern is kept, the rest is hidden
_SECRETS = (
    # a password with blanks, as in postgres://user:one two@host
    re.compile(r"(://[^\s/@:]{0,100}:)[^\s/@]{1,100}(?:[ \t][^\s/@]{1,100}){1,4}(?=@)"),
    # access tokens: Hugging Face, GitHub, GitLab, OpenAI, Slack, AWS, JSON Web Tokens
    re.compile(
        r"((?<![A-Za-z0-9]))(?:hf|api_org)_(?=[A-Z0-9]*[a-z])(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{30,}"
    ),
    re.compile(
        r"((?<![A-Za-z0-9]))(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,200}|glpat-[\w-]{20,200})"
    ),
    re.compile(
        r"((?<![A-Za-z0-9]))sk-(?:[A-Za-z0-9]{16,}|(?=[\w-]{0,99}[A-Z])(?=[\w-]{0,99}[0-9])[\w-]{20,200})"
    ),
    re.compile(
        r"((?<![A-Za-z0-9]))(?:xox[abeprs]-[\w-]{10,200}|A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9]))"
    ),
    re.compile(r"((?<![A-Za-z0-9]))eyJ[\w-]{10,2000}\.[\w-]{10,4000}\.[\w-]{10,2000}"),
    # a parameter of a URL
    re.compile(
        r"([?&#][\w.-]{0,60}(?:token|key|secret|password|passwd|sig|signature|credential)=)[^&\s'\"]+",
        re.IGNORECASE,
    ),
    # name=value, and 'name': 'value'
    re.compile(
        rf"((?<![\w-])[\w.-]{{0,40}}(?:{_NAMES}|token)=)(?:'[^'\n]{{1,2000}}'|\"[^\"\n]{{1,2000}}\"|[^\s&'\",;]+)",
        re.IGNORECASE,
    ),
    re.compile(
        rf"((?<![\w-])[\w.-]{{0,40}}{_NAMES}['\"]?\s{{0,4}}:\s{{0,4}}(?P<quote>['\"]))"
        r"(?:(?!(?P=quote))[^\n]){1,2000}",
        re.IGNORECASE,
    ),
    re.compile(
        r"(authorization['\"]?\s{0,4}[:=]\s{0,4}['\"]?(?:(?:basic|bearer|token|digest)\s{1,4})?)[^\s'\",]{6,}",
        re.IGNORECASE,
    ),
    re.compile(r"(\bbearer\s{1,4})[\w.~+/=-]{8,}", re.IGNORECASE),
)
# C0 but for the tab, DEL and C1; lone surrogates (bytes of a name that is not UTF-8); marks that
# change the direction of text
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_COMPONENT = re.compile(r"[^\s/'\"]{1,255}")


def redact(text: str) -> str:
    """Return the text with every secret replaced by ***."""
    for name in _TOKEN_VARIABLES:
        if len(value := os.environ.get(name, "").strip()) >= 8:
            text = text.replace(value, HIDDEN)
    if "@" in text:
        text = "".join(
            _without_userinfo(run) if "@" in run else run for run in re.split(r"(\s+)", text)
        )
    shown = text
    for pattern in _SECRETS:
        shown = pattern.sub(_hide, shown)
    return text if shown != text and _is_path(text) else shown


def _without_userinfo(run: str) -> str:
    """Hide `user:password` in the URLs of a text without blanks.

    A password may contain @ and /. If a colon precedes the first @, everything up to the last @ is
    hidden.
    """
    pieces, done, last = [], 0, run.rfind("@")
    for found in _AUTHORITY.finditer(run):
        begin, authority = found.start("authority"), found["authority"]
        if begin < done:
            continue
        user = authority.partition("@")[0]
        if ":" in user and begin < last and (found["share"] is None or user != authority):
            end = last
        elif "@" in authority and found["share"] is None:
            end = begin + authority.rfind("@")
        else:
            continue
        pieces += [run[done:begin], HIDDEN]
        done = end
    return "".join([*pieces, run[done:]])


def _hide(match: re.Match[str]) -> str:
    """Hide a match, unless it is part of the path of an existing file."""
    return match[0] if _is_in_a_path(match) else match[1] + HIDDEN


def _is_in_a_path(match: re.Match[str]) -> bool:
    """Return whether the word around a match, up to the next slash, is an existing path."""
    text, (start, end) = match.string, match.span()
    before = text[max(0, start - MAX_PATH_CHARACTERS) : start]
    before = before[max(before.rfind(blank) for blank in " \t\n'\"") + 1 :]
    component = _COMPONENT.match(text, start)
    names = [
        text[start:end],
        *([] if component is None else [component[0], component[0].rstrip(":,;.")]),
    ]
    return any(_is_path(before + name) for name in names)


def _is_path(text: str) -> bool:
    return len(text) <= MAX_PATH_CHARACTERS and os.path.lexists(text)


def printable(text: str) -> str:
    r"""Return the text in one line, with escapes for unprintable characters.

    An escape character becomes `\x1b`, and a byte that is not UTF-8 becomes `\xe8`.
    """
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    # a byte that surrogateescape decoded
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return {"\n": "\\n", "\r": "\\r"}.get(
        match[0], f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    )
