"""The bytes of each token's text in a byte-level vocabulary, such as GPT-2's."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer


def token_bytes(backend: Tokenizer) -> list[bytes]:
    """Return the bytes of each token's text, by token id; empty for an id without a token.

    A byte-level decoder concatenates these bytes and decodes them as UTF-8.
    """
    # Two tokens may have one name, which maps to one of their ids.
    ids = {
        *backend.get_vocab(with_added_tokens=True).values(),
        *backend.get_vocab(with_added_tokens=False).values(),
        *backend.get_added_tokens_decoder(),
    }
    names = map(backend.id_to_token, range(max(ids, default=-1) + 1))
    return [b"" if name is None else _bytes_of(name) for name in names]


def _bytes_of(name: str) -> bytes:
    """Return the bytes that a token's name stands for.

    A name with another character, as an added token may have, stands for itself.
    """
    bytes_by_character = _bytes_by_character()
    try:
        return bytes(bytes_by_character[character] for character in name)
    except KeyError:
        return name.encode()


@cache
def _bytes_by_character() -> dict[str, int]:
    """Return the byte of each character in byte-level names (Radford et al. 2019, encoder.py).

    Printable bytes of Latin-1 stand for themselves; the others for the characters from U+0100 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(0xAE, 0x100),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(0x100 + number): byte for number, byte in enumerate(others)}
