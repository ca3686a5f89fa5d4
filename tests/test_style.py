"""The vocabulary: words that the field's terms replaced do not come back.

Each pattern stands beside what to write instead. Exceptions name a file and what it may hold: a
library's own name, or a word in another sense.
"""

from __future__ import annotations

import re

import pytest

from tests.paths import REPOSITORY

# pattern (case counts, whole words) -> what to write instead
REPLACED = {
    r"slots?(?!=True)": "sequence, seq_index",
    r"(?<!huge |huge_)pages?(?! checksum|_checksum)|PagePool|page_size|n_pages": (
        "block, BlockPool, block table"
    ),
    r"admit(s|ted|ting)?|retire[sd]?": "schedule, allocate, free, finished",
    r"promised|idle": "reserved, evictable",
    r"[Ll]ookahead|LOOKAHEAD": "max_waiting; prefetch distance",
    r"wanted": "logits_indices; requested",
    r"[Ss]creen(s|ed|ing)?": "two-pass LM head",
    r"rough(ly)?|settle[sd]?|slack|missed": "approximate logits, rescore, tolerance, fallback",
    r"RowPlan|row plan|as they come": "PaddingPlan, as_is",
    r"[Ee]ndings?": "epilogue; line end",
    r"asks? for|asked for": "prefetch; request; is set",
    r"pace|LEAD|LISTED": "prefetch rate, prefetch distance",
    r"MOST_\w+|LEAST_\w+|FEW|FEW_\w+|GRACE\w*": "MAX_, MIN_, GRAIN_",
    r"numerics|exactness": "batch invariance",
    r"[Ff]ingerprints?": "config hash",
    r"(?<!profiler\.)profiles?": "environment",
    r"attempts?|deaths?|suspects?": "crash journal, crashes, suspect parts",
    r"reopened|brought back to life": "loaded run",
    r"ours|of ours": "gptbatch's; this project's; name it",
    r"so many|other bits|the same bits": "a count; batch-invariant; bit for bit",
    r"[Ww]hoever|[Nn]obody": "name who",
    r"Knows:|Does not know": "what the module is for",
    r"house|rooms?|floors?": "package, layer",
    r"die[sd]?|died": "ends, is killed, crashes",
    r"a (prompt|token|row|byte|part|second|step|thread|core) (a|each) \w+": "per",
}

FILES = [
    path
    for root in ("pipeline", "jobs", "docs")
    for path in sorted((REPOSITORY / root).rglob("*"))
    # old_formats.py translates the words of earlier outputs
    if path.suffix in (".py", ".cpp", ".h", ".md") and path.name != "old_formats.py"
] + [REPOSITORY / "README.md"]


@pytest.mark.parametrize("pattern", REPLACED)
def test_replaced_words_do_not_come_back(pattern: str) -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(rf"(?<![A-Za-z0-9_])({pattern})(?![A-Za-z0-9_])", line)
    ]
    assert not found, f"write {REPLACED[pattern]} instead:\n" + "\n".join(found)
