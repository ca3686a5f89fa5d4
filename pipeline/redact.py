"""Text that is fit to be written or shown: without secrets, and without characters that a terminal obeys.

Settings may carry passwords (a URL) and access tokens, and so may what libraries say when they
fail. Names of files, of tensors and what a folder says of itself may carry control sequences.
"""

from __future__ import annotations

import os
import re

HIDDEN = "***"
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SECRETS = (
    # user:password of a URL, also of one that was taken for a path (one slash). A password may hold
    # @ and /: with a colon before the last @, all up to that is taken for one
    re.compile(r"(:/{1,2})[^\s/@]*:\S*(?=@)"),
    re.compile(r"(:/{1,2})[^/\s@'\"]+(?=@)"),
    re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{8,}"),
    re.compile(r"(?<=[?&])((?:[\w-]*token|[\w-]*key|[\w-]*secret|password|sig(?:nature)?)=)[^&\s'\"]+", re.IGNORECASE),
    re.compile(r"(?i)(?<=bearer )[\w.~+/-]{8,}"),
)
# C0 but for the tab, DEL and C1; half surrogates (bytes of a name that is not UTF-8); the marks that turn the direction of text
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def redact(text: str) -> str:
    """The text with every secret in it replaced by ***."""
    for name in _TOKEN_VARIABLES:
        if len(value := os.environ.get(name, "")) >= 8:
            text = text.replace(value, HIDDEN)
    for pattern in _SECRETS:
        text = pattern.sub(lambda match: (match[1] if match.re.groups else "") + HIDDEN, text)
    return text


def printable(text: str) -> str:
    r"""The text in one line, with `\x1b` for an escape character and `\xe8` for a byte that is not UTF-8."""
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape
        return f"\\x{code - 0xDC00:02x}"
    return {"\n": "\\n", "\r": "\\r"}.get(match[0], f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
