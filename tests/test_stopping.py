"""Ends of rows: stop strings on bytes, stop tokens, min_new_tokens.

Faults of other engines are among the cases, with the threads that report them.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptbatch.pipeline.engine import reference
from gptbatch.pipeline.engine.stopping import StopCheck, StopRule
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import StopReason, WindowFull

EOS = 0


def check(
    tokens: Sequence[str | bytes],
    *,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    min_new_tokens: int = 0,
    max_new_tokens: int = 100,
    include: bool = False,
    eos_token_ids: tuple[int, ...] = (EOS,),
    window_full: WindowFull = "stop",
) -> tuple[StopReason | None, str | None, bytes, int]:
    """Generate tokens 1, 2, ... of these texts; return reason, stop string, text, token count."""
    data = [text.encode() if isinstance(text, str) else text for text in tokens]
    rule = StopRule(
        eos_token_ids=eos_token_ids,
        n_positions=1000,
        window_full=window_full,
        token_bytes=[b"<eos>", *data],
    )
    params = SamplingParams(
        seed=0,
        temperature=1.0,
        top_k=0,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(stop_token_ids),
        include_stop_str_in_output=include,
    )
    row = StopCheck(rule=rule, params=params, n_prompt_tokens=1)
    reason, count = None, 0
    for count in range(1, len(data) + 1):
        if (reason := row.add(count)) is not None:
            break
    whole = b"".join(data[:count])
    return reason, row.stop_string, whole[: row.text_bytes], count


@pytest.mark.parametrize(
    ("tokens", "stop", "found", "text", "count"),
    [
        # inside of a token, with text after it (vllm#3572)
        (["ab", "cDEFg", "h"], ["DE"], "DE", b"abc", 2),
        # across tokens, whatever the division (openvino.genai match_stop_string)
        (["a", "\n", "\n", "b"], ["\n\n"], "\n\n", b"a", 3),
        (["a\n", "\nb"], ["\n\n"], "\n\n", b"a", 2),
        (["x", "S", "TO", "P", "y"], ["STOP"], "STOP", b"x", 4),
        # the first to be complete counts (vllm#49391): "ell" ends before "lo"
        (["hello"], ["lo", "ell"], "ell", b"h", 1),
        # at the same byte, the first that is listed
        (["a", "xyz"], ["z", "yz"], "z", b"axy", 2),
        (["a", "xyz"], ["yz", "z"], "yz", b"ax", 2),
        # across the bytes of characters
        ([b"\xe2\x82", b"\xac!"], ["€"], "€", b"", 2),
        ([b"\xf0\x9f\x98", b"\x80"], ["😀"], "😀", b"", 2),
        # bytes that are no UTF-8 before it
        ([b"\xff\xfe", b"\xc3", "END"], ["END"], "END", b"\xff\xfe\xc3", 3),
        # a match that begins again inside of a failed one
        (["aa", "ab"], ["aab"], "aab", b"a", 2),
        (["aab", "aac"], ["aac"], "aac", b"aab", 2),
        # tokens without text do not separate
        (["ab", "", "c"], ["bc"], "bc", b"a", 3),
    ],
)
def test_stop_strings(
    tokens: list[str | bytes], stop: list[str], found: str, text: bytes, count: int
) -> None:
    assert check(tokens, stop=stop) == ("stop_string", found, text, count)
    _, _, included, _ = check(tokens, stop=stop, include=True)
    assert included == text + found.encode()


def test_a_stop_string_in_the_prompt_does_not_count() -> None:
    assert check(["op", " go"], stop=["stop", "Stop"])[0] is None


def test_a_stop_string_that_begins_in_a_match_too_early() -> None:
    """min_new_tokens counts the token of the last byte (vllm#21987)."""
    assert check(["a", "b", "c", "ab"], stop=["ab"], min_new_tokens=3)[1:] == ("ab", b"abc", 4)
    assert check(["a", "b"], stop=["ab"], min_new_tokens=2)[1:] == ("ab", b"", 2)
    assert check(["ab", "c"], stop=["ab", "bc"], min_new_tokens=2)[1:] == ("bc", b"a", 2)


def test_min_new_tokens_with_several_ends() -> None:
    """All kinds of ends at once (vllm#5849, vllm#23938)."""
    rule = StopRule(
        eos_token_ids=(1, 2), n_positions=100, window_full="stop", token_bytes=[b"x"] * 5
    )
    params = SamplingParams(
        seed=0,
        temperature=1,
        top_k=0,
        max_new_tokens=9,
        min_new_tokens=4,
        stop=("xx",),
        stop_token_ids=(3,),
    )
    for last, reason in (
        (1, "end_of_text"),
        (2, "end_of_text"),
        (3, "stop_token"),
        (4, "stop_string"),
    ):
        row = StopCheck(rule=rule, params=params, n_prompt_tokens=1)
        assert [row.add(token) for token in (1, 2, 3)] == [None] * 3
        assert row.add(last) == reason


def test_precedence_at_one_token() -> None:
    assert check(["ab"], stop=["ab"], stop_token_ids=[1], eos_token_ids=(1,))[0] == "end_of_text"
    assert check(["ab"], stop=["ab"], stop_token_ids=[1])[0] == "stop_token"
    assert check(["ab"], stop=["ab"], max_new_tokens=1)[0] == "stop_string"
    assert check(["ab"], stop=["x"], max_new_tokens=1)[0] == "max_new_tokens"


def test_a_stop_token_needs_no_stop_string_and_no_eos() -> None:
    reason, stop_string, text, count = check(["a", "b", "c"], stop_token_ids=[2], eos_token_ids=())
    assert (reason, stop_string, text, count) == ("stop_token", None, b"ab", 2)


TEXT = st.text("abé", max_size=4)


@given(
    tokens=st.lists(st.one_of(st.binary(max_size=3), TEXT.map(str.encode)), max_size=12),
    stop=st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3),
    min_new_tokens=st.integers(0, 4),
)
def test_any_division_into_tokens(
    tokens: list[bytes], stop: list[str], min_new_tokens: int
) -> None:
    """The row ends at the first byte at which a stop string is complete, and at no other."""
    reason, found, text, count = check(tokens, stop=stop, min_new_tokens=min_new_tokens)
    data, ends = b"", set()
    for number, token in enumerate(tokens, start=1):
        for byte in token:
            data += bytes([byte])
            if number >= min_new_tokens:
                ends |= {
                    (len(data), place, number)
                    for place, some in enumerate(stop)
                    if data.endswith(some.encode())
                }
    if not ends:
        assert reason is None
        return
    end, place, number = min(ends)
    assert (reason, found, count) == ("stop_string", stop[place], number)
    assert text == data[: end - len(stop[place].encode())]
    params = SamplingParams(seed=0, temperature=1, top_k=0, max_new_tokens=99, stop=tuple(stop))
    assert reference.ends_in_stop(list(range(number)), params, tokens)
