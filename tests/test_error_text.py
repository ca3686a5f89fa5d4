"""The text of a library's error in a message of one line: whole sentences."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from gptbatch.pipeline.errors import ModelError
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.system.error_text import MAX_CHARACTERS, first_line, shortened

SENTENCE = f"The {'long ' * 20}sentence has 'a quotation, of words'."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "ValueError"),
        ("  \n", "ValueError"),
        ("one line\nand another", "one line"),
        (f"{SENTENCE} {SENTENCE}", f"{SENTENCE} {SENTENCE}"),
        (f"{SENTENCE} {SENTENCE} {SENTENCE}", f"{SENTENCE} {SENTENCE}"),
        ("x" * MAX_CHARACTERS, "x" * MAX_CHARACTERS),
        (f"{'x' * (MAX_CHARACTERS - 1)}. More.", f"{'x' * (MAX_CHARACTERS - 1)}."),
        ("version 1.2 " * 30, f"{'version 1.2 ' * 24}version ..."),
        (f"Error no. {'5 of a disk ' * 30}", f"Error no. {'5 of a disk ' * 23}5 of a ..."),
        (f"Short. {'Long words ' * 40}", f"Short. {'Long words ' * 26}..."),
        (f"{'Long words ' * 20}e.g. {'more ' * 40}", f"{'Long words ' * 20}e.g. {'more ' * 14}..."),
        ("x" * 400, f"{'x' * (MAX_CHARACTERS - 4)} ..."),
    ],
)
def test_the_first_line_is_whole_sentences(text: str, expected: str) -> None:
    found = first_line(ValueError(text))
    assert found == expected
    assert len(found) <= MAX_CHARACTERS


def test_a_text_without_an_end_of_a_sentence_ends_in_a_word() -> None:
    assert shortened("word " * 100) == f"{'word ' * 59}..."


def test_the_hub_that_must_not_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its message ends in a quotation, and was cut in the middle of it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        find_checkpoint("owner/missing")
    message = str(caught.value)
    assert message.endswith("); correct the name, or without a network name a local folder")
    assert message.count("'") % 2 == 0
    assert "HF_HUB_OFFLINE=0" in message
