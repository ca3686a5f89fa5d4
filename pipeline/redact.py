"""Takes secrets out of text before it is written or shown: passwords in URLs, access tokens.

Settings may carry them (a dataset behind a URL with a password), and so may what libraries say when they fail.
"""

from __future__ import annotations

import os
import re

HIDDEN = "***"
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SECRETS = (
    re.compile(r"(:/{1,2})[^/\s@'\"]+(?=@)"),  # user:password of a URL, also of one that was taken for a path
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),
    re.compile(r"(?<=[?&])((?:[\w-]*token|[\w-]*key|[\w-]*secret|password|sig(?:nature)?)=)[^&\s'\"]+", re.IGNORECASE),
    re.compile(r"(?i)(?<=bearer )[\w.~+/-]{8,}"),
)


def redact(text: str) -> str:
    """The text with every secret in it replaced by ***."""
    for name in _TOKEN_VARIABLES:
        if len(value := os.environ.get(name, "")) >= 8:
            text = text.replace(value, HIDDEN)
    for pattern in _SECRETS:
        text = pattern.sub(lambda match: (match[1] if match.re.groups else "") + HIDDEN, text)
    return text
