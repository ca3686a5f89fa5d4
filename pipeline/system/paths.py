"""Expands `~` in paths of settings, and rejects URLs and unexpanded variables.

An existing file is always accepted under its literal name.
"""

from __future__ import annotations

import os
import re

STORES = ("s3", "gs", "az", "abfs", "abfss")
# group 1: the bucket, group 2: the name in it
OBJECT_URL = re.compile(rf"((?:{'|'.join(STORES)})://[^/]+)(?:/(.*))?", re.DOTALL)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# schemes that are also written with one slash; other names with a colon are file names
_ONE_SLASH = re.compile(
    r"(s3[an]?|gs|gcs|r2|oss|az|adl|abfss?|wasbs?|hdfs|webhdfs|dbfs|file|hf|https?|s?ftp|ssh|github|memory):/",
    re.IGNORECASE,
)
_NOT_IN_BUCKETS = re.compile(r"[^A-Za-z0-9._@-]")
_NAMED_STORES = ", ".join(f"{scheme}://" for scheme in STORES)
_HUB = re.compile(
    r"(?:https?://(?:huggingface\.co|hf\.co)|hf:/)/(?:(datasets|models)/)?([\w.-]+(?:/[\w.-]+)?)/?$"
)
_VARIABLE = re.compile(
    r"\$\{[^}]*\}?|\$\([^)]*\)?|`[^`]*`|\$[A-Za-z_]\w*|\$[0-9@*]|\{\{.*?(?:\}\}|$)"
    r"|\{%.*?(?:%\}|$)|%[A-Z][A-Z0-9_]*%"
)


class PathError(ValueError):
    """The text is not a path. The message does not repeat the path."""


def expand_path(text: str, *, writes: bool = False, stores: bool = False) -> str:
    """Expand `~` and `~user` in the path of a setting.

    Args:
        text: The value of the setting.
        stores: URLs of object stores are accepted.
        writes: The path is an output, which need not exist. `~` is then the home folder even if a
            file named `~` exists.

    Raises:
        PathError: The text is a URL, contains an unexpanded variable, or is not a valid file name.
    """
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise PathError(
            "is no name that a file can have: it holds half of a surrogate pair"
        ) from None
    if "\0" in text:
        raise PathError("is no name that a file can have: it holds a zero byte")
    if stores and (match := OBJECT_URL.fullmatch(text)) is not None:
        _check_bucket(match[1])
        _check_key((match[2] or "").rstrip("/"))
        _reject_variable(text)
        return text.rstrip("/")
    exists = os.path.lexists(text)
    if not exists and text.isspace():
        raise PathError("is blank; name a file or folder")
    if text.startswith("~"):
        return _expand_home(text, exists=exists, writes=writes)
    if not exists:
        _reject_url(text, writes=writes, stores=stores)
        _reject_variable(text)
    return text


def _check_bucket(url: str) -> None:
    bucket = url.partition("://")[2]
    if found := _NOT_IN_BUCKETS.search(bucket):
        raise PathError(f"has {found[0]!r} in the name of the bucket; write SCHEME://BUCKET/NAME")


def _check_key(key: str) -> None:
    """Check the name in a bucket. Stores keep names as they are, and do not resolve dots."""
    if any(ord(character) < 32 for character in key):
        raise PathError("holds a control character")
    if key and any(part in ("", ".", "..") for part in key.split("/")):
        raise PathError("holds //, /./ or /../, which object stores do not resolve; remove them")


def _expand_home(text: str, *, exists: bool, writes: bool) -> str:
    expanded = os.path.expanduser(text)
    user = text[1:].partition("/")[0]
    if expanded == text:
        if exists:
            return text
        why = f"there is no user {user!r}" if user else "HOME is not set"
        raise PathError(
            f"begins with {text.partition('/')[0]}, but {why}; write ./~ for a name that begins so"
        )
    _reject_variable(expanded)
    return text if exists and not (writes or os.path.lexists(expanded)) else expanded


def _reject_url(text: str, *, writes: bool, stores: bool) -> None:
    found = _URL.match(text) or _ONE_SLASH.match(text)
    if found is None:
        return
    scheme = found[1].lower()
    if (hub := _HUB.match(text)) is not None:
        option = "--dataset" if hub[1] == "datasets" else "--model"
        advice = f"name it as the hub does: {option} {hub[2]}"
    elif scheme == "file":
        advice = f"give the path: {text[len('file:') :].replace('//', '', 1) or '/'}"
    elif scheme == "dbfs":
        advice = "give the path under which it is mounted: /dbfs/..."
    elif scheme in STORES and stores:
        advice = f"write {scheme}://BUCKET/NAME"
    elif stores and writes:
        advice = f"an output is a local folder, or a URL of {_NAMED_STORES}"
    elif stores:
        advice = f"fetch it and give the local path; object stores are {_NAMED_STORES}"
    elif writes:
        advice = "write to a local folder and copy it there when the run is complete"
    else:
        advice = "fetch it, and give the local path"
    raise PathError(f"is a URL ({scheme}:), which is not supported; {advice}")


def _reject_variable(text: str) -> None:
    for found in _VARIABLE.finditer(text):
        if os.path.lexists(_through_component(text, found.end())):
            continue
        raise PathError(
            f"holds {found[0][:80]}, which nothing has expanded (a shell does so outside single "
            "quotes, a YAML file never does); give the real path, or create the folder first where "
            "it is really called so"
        )


def _through_component(text: str, position: int) -> str:
    """Return the path up to the end of the component at a position."""
    end = text.find("/", position)
    return text if end < 0 else text[:end]
