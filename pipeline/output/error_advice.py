"""Sentences about error rows, for the end of a run and for the dry run."""

from __future__ import annotations

from collections.abc import Mapping

_ADVICE = {
    "bad_row": "mend them in the input",
    "too_long": "context_overflow: truncate_left keeps the end of such prompts",
    "empty_prompt": "give them a prompt",
    "unknown_token": "the model lacks a token of the tokenizer",
    "unencodable": "the tokenizer has no tokens for some of their text; on_lost_text: warn runs those that only lose characters",
    "not_finite": "dtype: float32 has the widest range",
    "skipped": "named by skip_row",
}


def describe_errors(kinds: Mapping[str, int], rows: int) -> str:
    """How many of the rows are errors, by kind, and the setting that helps; "" when none is.

    Args:
        kinds: Error rows of each kind (records.ErrorKind).
        rows: Rows of the whole input.
    """
    count = sum(kinds.values())
    if count == 0:
        return ""
    described = []
    for kind, number in sorted(kinds.items()):
        if number:
            described.append(
                f"{number} {kind}" + (f" ({_ADVICE[kind]})" if kind in _ADVICE else "")
            )
    return f"{count} of {rows} {'row is an error' if count == rows == 1 else 'rows are errors'}: {', '.join(described)}"
