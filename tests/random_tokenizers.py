"""Tokenizer files with random options, in the form that tokenizers and transformers write."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from tests.tiny_checkpoints import config_json

LETTERS = "abcdehilorstw ▁.,'!0159éĠ中"
WORDS = (
    "the",
    "he",
    "th",
    "is",
    "it",
    "hello",
    "world",
    "we",
    "ad",
    "123",
    "isn",
    "'t",
    ".",
    ",",
    "中",
)
SPECIAL = ("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "[CLS]", "[SEP]")
TEXTS = (
    "",
    "hello world",
    " the  world is\tit. ",
    "hello, world! it isn 't 12 34 's",
    "Hello\r\nWORLD\n\n",
    "<s>hello</s> <user>the <user>[CLS]<|endoftext|> <extra>x<pad>",
    "café cafe\u0301 中文 \U0001f469\u200d\U0001f467 \x00\u200b",
    "▁hello Ġthe</w> ##he",
    "worldworldworld" * 20,
)


def write_random_tokenizer(folder: Path, seed: int) -> None:
    """Write config.json and the files of a tokenizer into an empty folder."""
    rng = Random(seed)
    kind = rng.choices(
        ("tokenizer.json", "gpt2", "vocab and merges", "vocab.txt", "saved"), (10, 4, 3, 1, 4)
    )[0]
    model_config = config_json(vocab_size=2000)
    if _chance(rng, 0.1):
        model_config["tokenizer_class"] = rng.choice(
            ("GPT2Tokenizer", "BertTokenizer", "PreTrainedTokenizerFast")
        )
    if _chance(rng, 0.1):
        del model_config["model_type"]
    _write(folder / "config.json", model_config)
    config = _random_config(rng)
    if kind == "tokenizer.json":
        _random_backend(rng).save(str(folder / "tokenizer.json"))
        config.setdefault(
            "tokenizer_class", rng.choice(("PreTrainedTokenizerFast", "TokenizersBackend"))
        )
    elif kind == "gpt2":
        _gpt2_backend(rng).save(str(folder / "tokenizer.json"))
        config["tokenizer_class"] = rng.choice(("GPT2Tokenizer", "GPT2TokenizerFast", None))
        if _chance(rng, 0.7):
            config.pop("bos_token", None)
    elif kind == "vocab and merges":
        vocab, merges = _bpe_vocabulary(rng, byte_level=True)
        _write(folder / "vocab.json", vocab)
        (folder / "merges.txt").write_text(
            "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8"
        )
        config["tokenizer_class"] = rng.choice(
            ("GPT2Tokenizer", "GPT2TokenizerFast", None, "PreTrainedTokenizerFast")
        )
    elif kind == "vocab.txt":
        words = [*SPECIAL, "[UNK]", "[PAD]", "[MASK]", *_wordpieces()]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": _chance(rng, 0.5),
            "clean_up_tokenization_spaces": _chance(rng, 0.5),
        }
    else:
        _save_with_transformers(rng, folder)
        return
    if _chance(rng, 0.9):
        _write(
            folder / "tokenizer_config.json",
            {key: value for key, value in config.items() if value is not None or _chance(rng, 0.1)},
        )
    if _chance(rng, 0.15):
        names = rng.sample(("bos_token", "eos_token", "unk_token", "pad_token"), 2)
        tokens = [_token(rng) for _ in names]
        special: dict[str, Any] = {
            name: rng.choice((token, {"content": token, "lstrip": _chance(rng, 0.2)}))
            for name, token in zip(names, tokens, strict=True)
        }
        if _chance(rng, 0.5):
            special["additional_special_tokens"] = [rng.choice(("<user>", "<s>", "</s>"))]
        _write(folder / "special_tokens_map.json", special)
    if _chance(rng, 0.15):
        first = rng.choice((0, 300, 500))
        _write(
            folder / "added_tokens.json",
            {
                token: first + i
                for i, token in enumerate(("<user>", "<extra>")[: rng.randint(1, 2)])
            },
        )


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _chance(rng: Random, probability: float) -> bool:
    return rng.random() < probability


def _token(rng: Random) -> str:
    return rng.choice((*SPECIAL, "<|endoftext|>", "<s>", "</s>", "<new>"))


def _random_config(rng: Random) -> dict[str, Any]:
    """Return the content of a tokenizer_config.json."""
    choices: dict[str, Any] = {
        "tokenizer_class": rng.choices(
            (
                "PreTrainedTokenizerFast",
                "TokenizersBackend",
                "GPT2Tokenizer",
                "BertTokenizer",
                "LlamaTokenizer",
                "ByT5Tokenizer",
                "OwnTokenizer",
            ),
            (6, 4, 3, 1, 1, 1, 1),
        )[0],
        "add_prefix_space": _chance(rng, 0.5),
        "add_bos_token": _chance(rng, 0.5),
        "add_eos_token": _chance(rng, 0.5),
        "bos_token": rng.choice(
            ("<s>", {"content": "<s>", "lstrip": False, "__type": "AddedToken"}, _token(rng))
        ),
        "eos_token": rng.choice(("</s>", _token(rng), None)),
        "unk_token": rng.choice(("<unk>", "<|endoftext|>", None)),
        "pad_token": rng.choice(("<pad>", "<s>", "<new>")),
        "additional_special_tokens": rng.choice((["<s>"], ["<user>"], ["<s>", "<new>"])),
        "extra_special_tokens": rng.choice((["<s>"], ["<extra>"], {"image_token": "<image>"})),
        "added_tokens_decoder": {
            str(rng.choice((0, 1, 5, 400))): {
                "content": rng.choice(("<s>", "<user>", "</s>")),
                "special": _chance(rng, 0.5),
            }
        },
        "clean_up_tokenization_spaces": _chance(rng, 0.5),
        "split_special_tokens": _chance(rng, 0.5),
        "model_max_length": 8,
        "padding_side": rng.choice(("left", "right")),
        "chat_template": "{{ messages }}",
        "errors": "replace",
        "do_lower_case": True,
        "legacy": False,
    }
    kept = {key: value for key, value in choices.items() if _chance(rng, 0.12)}
    if _chance(rng, 0.03):
        kept["auto_map"] = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    return kept


def _wordpieces() -> list[str]:
    return list(
        dict.fromkeys(
            [
                *LETTERS,
                *(f"##{letter}" for letter in LETTERS),
                *WORDS,
                *(f"##{word}" for word in WORDS),
            ]
        )
    )


def _bpe_vocabulary(
    rng: Random, *, byte_level: bool, suffix: str = ""
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else sorted(set(LETTERS))
    tokens = [*(SPECIAL if _chance(rng, 0.7) else ("<|endoftext|>", "<s>")), *letters]
    if suffix:
        tokens += [letter + suffix for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = list(word if all(letter in letters for letter in word) else "")
        if suffix and pieces:
            pieces[-1] += suffix
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            tokens.append(pieces[0])
    tokens = list(dict.fromkeys(tokens))
    return {token: i for i, token in enumerate(tokens)}, list(dict.fromkeys(merges))


def _gpt2_backend(rng: Random) -> Tokenizer:
    """Return a tokenizer.json of GPT-2 with random changes."""
    vocab, merges = _bpe_vocabulary(rng, byte_level=True)
    unknown = rng.choice(({}, {}, {"unk_token": "<s>"}))
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=_chance(rng, 0.1), **unknown)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=_chance(rng, 0.2), use_regex=not _chance(rng, 0.1)
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = _random_template(rng, vocab)
    if _chance(rng, 0.1):
        backend.normalizer = normalizers.Lowercase()
    _add_random_tokens(rng, backend)
    return backend


def _random_model(rng: Random) -> models.Model:
    kind = rng.choice(
        (
            "BPE",
            "BPE",
            "byte-level BPE",
            "BPE with suffix",
            "BPE with bytes",
            "WordLevel",
            "WordPiece",
            "Unigram",
        )
    )
    if kind == "WordLevel":
        return models.WordLevel(
            {token: i for i, token in enumerate((*SPECIAL, *WORDS))},
            unk_token=rng.choice(("<unk>", "[UNK]")),
        )
    if kind == "WordPiece":
        return models.WordPiece(
            {token: i for i, token in enumerate((*SPECIAL, *_wordpieces()))}, unk_token="<unk>"
        )
    if kind == "Unigram":
        pieces = [
            *SPECIAL,
            *(f"<0x{byte:02X}>" for byte in range(256)),
            *dict.fromkeys((*LETTERS, *WORDS, *(f"▁{word}" for word in WORDS))),
        ]
        return models.Unigram(
            [(piece, -float(i % 7) - 1) for i, piece in enumerate(pieces)],
            rng.choice((2, 2, None)),
            _chance(rng, 0.5),
        )
    suffix = "</w>" if kind == "BPE with suffix" else ""
    vocab, merges = _bpe_vocabulary(rng, byte_level=kind == "byte-level BPE", suffix=suffix)
    if kind == "BPE with bytes":
        vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    optional = {"end_of_word_suffix": suffix, "unk_token": rng.choice(("", "<s>"))}
    return models.BPE(
        vocab=vocab,
        merges=merges,
        fuse_unk=_chance(rng, 0.5),
        byte_fallback=kind == "BPE with bytes",
        ignore_merges=_chance(rng, 0.2),
        **{key: value for key, value in optional.items() if value},
    )


def _random_normalizer(rng: Random) -> Any:
    some = (
        normalizers.NFC(),
        normalizers.NFKC(),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        normalizers.Lowercase(),
        normalizers.Strip(),
        normalizers.Replace(" ", "▁"),
        normalizers.Replace(Regex("[0-9]"), ""),
        normalizers.Prepend("▁"),
        normalizers.BertNormalizer(lowercase=_chance(rng, 0.5)),
        normalizers.Nmt(),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )
    return None if _chance(rng, 0.4) else rng.choice(some)


def _random_pre_tokenizer(rng: Random) -> Any:
    some: tuple[Any, ...] = (
        pre_tokenizers.ByteLevel(add_prefix_space=_chance(rng, 0.5), use_regex=_chance(rng, 0.7)),
        pre_tokenizers.ByteLevel(add_prefix_space=_chance(rng, 0.5)),
        pre_tokenizers.Metaspace(
            prepend_scheme=rng.choice(("always", "first", "never")), split=_chance(rng, 0.5)
        ),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Whitespace(),
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.BertPreTokenizer(),
        pre_tokenizers.CharDelimiterSplit(","),
        pre_tokenizers.Split(
            Regex(r"\s+|\w"), rng.choice(("isolated", "removed", "merged_with_next"))
        ),
        pre_tokenizers.Punctuation(rng.choice(("isolated", "removed"))),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
    )
    return None if _chance(rng, 0.1) else rng.choice(some)


def _random_decoder(rng: Random) -> Any:
    some: tuple[Any, ...] = (
        decoders.ByteLevel(),
        decoders.ByteLevel(),
        decoders.Metaspace(),
        decoders.WordPiece(cleanup=_chance(rng, 0.5)),
        decoders.BPEDecoder(),
        decoders.CTC(pad_token="<pad>"),
        decoders.Fuse(),
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
    )
    return None if _chance(rng, 0.15) else rng.choice(some)


def _random_template(rng: Random, vocab: dict[str, int]) -> Any:
    if "<s>" not in vocab or "</s>" not in vocab or _chance(rng, 0.4):
        return rng.choice((None, processors.ByteLevel(trim_offsets=_chance(rng, 0.5))))
    bos, eos = ("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])
    template = rng.choice(("<s> $A", "<s> $A </s>", "$A </s>", "$A"))
    return rng.choice(
        (
            processors.TemplateProcessing(single=template, special_tokens=[bos, eos]),
            processors.BertProcessing(eos, bos),
            processors.RobertaProcessing(
                eos, bos, trim_offsets=_chance(rng, 0.5), add_prefix_space=False
            ),
        )
    )


def _add_random_tokens(rng: Random, backend: Tokenizer) -> None:
    known = [token for token in SPECIAL if backend.token_to_id(token) is not None]
    backend.add_special_tokens(
        [AddedToken(token, normalized=_chance(rng, 0.1)) for token in known if _chance(rng, 0.85)]
    )
    if _chance(rng, 0.3):
        flags = {
            flag: _chance(rng, 0.3)
            for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")
        }
        backend.add_tokens([AddedToken("<user>", **flags)])


def _random_backend(rng: Random) -> Tokenizer:
    backend = Tokenizer(_random_model(rng))
    vocab = backend.get_vocab()
    normalizer, pre_tokenizer, decoder = (
        _random_normalizer(rng),
        _random_pre_tokenizer(rng),
        _random_decoder(rng),
    )
    template = _random_template(rng, vocab)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        backend.decoder = decoder
    if template is not None:
        backend.post_processor = template
    _add_random_tokens(rng, backend)
    if _chance(rng, 0.15):
        backend.enable_truncation(5)
    if _chance(rng, 0.15):
        backend.enable_padding(
            pad_token=rng.choice(("<pad>", "[PAD]")), length=rng.choice((None, 16))
        )
    return backend


def _save_with_transformers(rng: Random, folder: Path) -> None:
    from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

    options: dict[str, Any] = {
        key: value
        for key, value in {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": rng.choice(("<pad>", "<new>")),
            "add_prefix_space": True,
            "add_bos_token": True,
            "clean_up_tokenization_spaces": True,
            "extra_special_tokens": ["<user>"],
        }.items()
        if _chance(rng, 0.4)
    }
    if _chance(rng, 0.5):
        vocab, merges = _bpe_vocabulary(rng, byte_level=True)
        options |= {"vocab": vocab, "merges": merges}
        made: Any = GPT2Tokenizer(**options)
    else:
        made = PreTrainedTokenizerFast(tokenizer_object=_random_backend(rng), **options)
    if _chance(rng, 0.3):
        made.add_tokens([AddedToken("<extra>", normalized=_chance(rng, 0.5))])
    made.save_pretrained(folder)
