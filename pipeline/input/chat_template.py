"""Checks that the chat template of a checkpoint joins messages as DialoGPT does.

A chat template is a Jinja program. It is compared as text and never run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gptbatch.pipeline.errors import ModelError
from gptbatch.pipeline.input.strict_json import shorten
from gptbatch.pipeline.input.tokenizer_errors import TOKENIZER_CONFIG
from gptbatch.pipeline.model.checkpoint import read_json, reading

_TEMPLATE_FILE = "chat_template.jinja"
# Every message, followed by the EOS token. transformers removes a line feed after a block tag.
_EVERY_MESSAGE_AND_EOS = re.compile(
    r"\{%-?\s*for\s+(?P<message>\w+)\s+in\s+messages\s*-?%\}\n?"
    r"\{\{-?\s*(?P=message)(?:\.content|\[(?P<quote>['\"])content(?P=quote)\])"
    r"\s*(?:-?\}\}\{\{-?|\+|~)\s*eos_token\s*-?\}\}"
    r"\{%-?\s*endfor\s*-?%\}\n?"
)


def check_chat_template(folder: Path) -> None:
    """Raise ModelError if a checkpoint has a chat template that joins messages in another way.

    Args:
        folder: The folder of the checkpoint.
    """
    path = folder / _TEMPLATE_FILE
    if path.is_file():
        with reading(path):
            template: Any = path.read_bytes().decode("utf-8", errors="replace")
    else:
        path = folder / TOKENIZER_CONFIG
        config = read_json(path) if path.is_file() else {}
        template = _default(config.get("chat_template"))
    if template is None or (
        isinstance(template, str) and _EVERY_MESSAGE_AND_EOS.fullmatch(template)
    ):
        return
    raise ModelError(
        f"{path}: its chat_template {shorten(template)} is not that of DialoGPT, every message "
        "followed by eos_token, which messages_field writes; write the prompts with "
        "prompt_template, or in the input"
    )


def _default(template: Any) -> Any:
    """Return the template that transformers uses unless another one is named.

    Several templates are a list of objects with `name` and `template`.
    """
    if not isinstance(template, list):
        return template
    named = {
        str(entry.get("name")): entry.get("template")
        for entry in template
        if isinstance(entry, dict)
    }
    return named.get("default", template) if template else None
