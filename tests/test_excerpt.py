"""Excerpts of two values that differ."""

from __future__ import annotations

import pytest

from gptbatch.pipeline.output.part_plan import describe_differences, differing_keys
from gptbatch.pipeline.system.excerpt import excerpts, value_excerpts


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("king", "queen", ("king", "queen")),
        ("", "queen", ("", "queen")),
        ("0123456789abcdef", "0123456789abcDEF", ("...bcdef", "...bcDEF")),
        ("0123456789abcdef", "0123", ("0123456...", "0123")),
        ("0123456789abcdef", "X123456789", ("0123456...", "X123456789")),
        ("0123456789abcdefghijklm", "0123456789abcdeXghijklm", ("...defg...", "...deXg...")),
    ],
)
def test_texts_from_where_they_first_differ(a: str, b: str, expected: tuple[str, str]) -> None:
    assert max(map(len, expected)) <= 10
    assert excerpts(a, b, length=10) == expected
    assert excerpts(b, a, length=10) == expected[::-1]


def test_values_are_shown_as_json() -> None:
    assert value_excerpts(None, ["the end"]) == ("none", '["the end"]')
    assert value_excerpts(0.9, 1.0) == ("0.9", "1.0")
    long = "Question: {question} Answer:"
    assert value_excerpts(long, f"{long} ") == ('...nswer:"', '...nswer: "')


def test_many_differences_are_counted() -> None:
    keys = [f"key{index}" for index in range(10)]
    text = describe_differences(keys, dict.fromkeys(keys, 1), dict.fromkeys(keys, 2))
    assert text.startswith("key0: 1 there, 2 here; key1: ")
    assert text.endswith("; key7: 1 there, 2 here; 2 more differ")


def test_the_config_hash_is_named_only_where_nothing_else_explains_it() -> None:
    job = {"config_hash": "a", "seed": 0, "record_logits_digest": False}
    other = {"config_hash": "b", "seed": 1, "record_logits_digest": False}
    assert differing_keys(job, other) == ["seed"]
    unexplained = {"config_hash": "b", "seed": 0, "record_logits_digest": True}
    assert differing_keys(job, unexplained) == ["config_hash", "record_logits_digest"]
