"""Tokenizers in the form of Hugging Face: `tokenizer.json` for every kind, and the files around it.

Made so that `transformers` gives the ids that puna gives, control tokens included. What
`transformers` itself makes of a `tokenizer.model` is followed where one of its configuration files
stands beside it (LlamaTokenizer of version 5: a space is put before the first word only, unless
`legacy`); without one, the file is read as Meta's own code reads it.
"""

import itertools
import json
from collections.abc import Iterable, Mapping

from ...configs.errors import UserError
from .kinds import (
    ByteKind,
    HuggingFaceKind,
    SentencePieceKind,
    TiktokenKind,
    byte_alphabet_of,
)

SPACE = "\u2581"

# Texts on which a tokenizer.json must give the ids of the kind that it stands for.
PROBES = (
    "a", " ", "  ", "Hello world", " Hello  world ", "\n", "\t\ta\r\n\r\n  b\n", "12345678 3.14",
    "naïve café Straße", "Привет, мир", "你好，世界", "مرحبا بالعالم", "नमस्ते", "🦙🏔️ 👩‍👩‍👧",
    "don't I'LL we've", "x = [i ** 2 for i in range(10)]  # squares", "http://puna.example/a?b=c&d",
    "ﬁ ① Ⅳ e\u0301 \u00a0\u3000\u200b", "\x00\x7f", "aaaaaaaaaaaaaaaaaaaaaaaaa", "▁ ▁▁a", "<0x0A>",
    "<|begin", "[INST] <<SYS>>", "\ufeffa\ufffd", "a" * 200 + " " * 60 + "b",
)  # fmt: skip


def tokenizer_json(kind, begin: Iterable[int], end: Iterable[int]) -> bytes:
    """Return the `tokenizer.json` of a vocabulary of any kind.

    Args:
      begin, end: ids that begin and end every text. A file that has just these is not changed.

    Raises:
      UserError: `tokenizers` gives other ids than the kind, for some of `PROBES`.
    """
    begin, end = tuple(begin), tuple(end)
    if isinstance(kind, HuggingFaceKind):
        if kind.wrapped() == (begin, end):
            return kind.data
        made = json.loads(kind.data)
    elif isinstance(kind, SentencePieceKind):
        made = sentencepiece_json(kind)
    elif isinstance(kind, TiktokenKind):
        made = _byte_level(kind.pieces[: -len(kind.special)], kind.special, kind.pattern)
    else:
        assert isinstance(kind, ByteKind)
        made = _byte_level(kind.pieces[:256], kind.special, None)
    made["post_processor"] = post_processor(
        *([(kind.name_of(i), i) for i in ids] for ids in (begin, end))
    )
    data = json.dumps(made, ensure_ascii=False).encode()
    if not isinstance(kind, HuggingFaceKind):
        check(kind, HuggingFaceKind(data))
    return data


def with_tokens(data: bytes, names: Iterable[str]) -> HuggingFaceKind:
    """The vocabulary of a `tokenizer.json` and more control tokens, whose ids follow its own.

    Raises:
      UserError: the vocabulary has a token of such a name.
    """
    old, made = HuggingFaceKind(data), json.loads(data)
    wanted = dict(zip(names, itertools.count(len(old.pieces)), strict=False))
    for name in wanted:
        if old.find(name) is not None:
            raise UserError(f"data.new_tokens: {name!r} is a token already, of id {old.find(name)}")
    made["added_tokens"] += [added_token(name, i) for name, i in wanted.items()]
    new = HuggingFaceKind(json.dumps(made, ensure_ascii=False).encode())
    assert wanted.items() <= new.special.items(), "`tokenizers` gives other ids"
    return new


def check(kind, other) -> None:
    """Raise UserError unless two kinds give the same ids, with and without control tokens."""
    names = list(kind.special)[:12]
    mixed = [f"{a}{name} {b}{name}{c}" for name in names
             for a, b, c in (("", "x", ""), ("a ", "", " b"), ("\n", "\n", "\n"))]  # fmt: skip
    for text in (*PROBES, *mixed):
        same = kind.encode(text) == other.encode(text)
        if not same or kind.encode_special(text) != other.encode_special(text):
            raise UserError(
                f"as a tokenizer.json this {kind.name} vocabulary gives other ids for {text!r:.60}"
            )


def post_processor(begin: list[tuple[str, int]], end: list[tuple[str, int]]) -> dict | None:
    """The part of a tokenizer.json that puts control tokens, (name, id), around a text."""
    if not begin and not end:
        return None
    before = [{"SpecialToken": {"id": name, "type_id": 0}} for name, _ in begin]
    after = [{"SpecialToken": {"id": name, "type_id": 0}} for name, _ in end]
    first, second = ({"Sequence": {"id": i, "type_id": 0}} for i in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [*before, first, *after],
        "pair": [*before, first, *after, *before, second, *after],
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (*begin, *end)
        },
    }


def added_token(name: str, i: int, special: bool = True, **flags) -> dict:
    """An entry of a tokenizer.json's `added_tokens`."""
    known = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": name} | known | flags | {"special": special}


def sentencepiece_json(kind: SentencePieceKind) -> dict:
    """A SentencePiece BPE model as the object of a tokenizer.json.

    Each text gets a space in front if the model puts one there, after a control token too.

    Raises:
      UserError: a model that is not BPE.
    """
    if not kind.is_bpe:
        raise UserError("is a SentencePiece model of another type than BPE")
    vocab = {piece: i for i, piece in enumerate(kind.names)}
    # Pieces of a BPE model stand in the order in which they were learnt, which is that of merging.
    plain = [piece for i, piece in enumerate(kind.names) if kind.is_text(i)]
    merges = []
    for piece in plain:
        found = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        found = [pair for pair in found if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(found, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    added = [added_token(name, i) for name, i in kind.special.items()]
    added += [added_token(kind.names[i], i, special=False) for i in kind.user_defined]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": _prepend(kind.strips_space),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": space_decoder(kind.strips_space),
        "model": {
            "type": "BPE", "dropout": None, "unk_token": kind.unknown, "fuse_unk": True,
            "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "byte_fallback": kind.has_bytes, "ignore_merges": False, "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }  # fmt: skip


def as_llama_tokenizer(made: dict, config: Mapping) -> None:
    """Split words in `made` as `transformers` 5's LlamaTokenizer does, whatever the file says.

    That class rebuilds the tokenizer from the vocabulary and merges of its file.

    Args:
      made: the object of a SentencePiece-like tokenizer.json; changed in place.
      config: the `tokenizer_config.json`.
    """
    prefix = config.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = "never" if not prefix else "always" if config.get("legacy") else "first"
    made["normalizer"], made["pre_tokenizer"] = None, _metaspace(scheme)
    made["decoder"] = space_decoder(prefix)


def _prepend(prefix: bool) -> dict:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    return {"type": "Sequence", "normalizers": [*steps, replace]}


def _metaspace(scheme: str) -> dict:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


def space_decoder(strips: bool) -> dict:
    """The decoder of a SentencePiece-like tokenizer.json."""
    parts = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if strips else []
    return {"type": "Sequence", "decoders": parts + strip}


def _byte_level(pieces: list[bytes], special: Mapping[str, int], pattern: str | None) -> dict:
    """Byte-level BPE: pieces by rank; each pair of pieces that makes a third is a merge."""
    vocab = {byte_alphabet_of(piece): i for i, piece in enumerate(pieces)}
    merges = []
    if pattern is not None:
        ranks = {piece: i for i, piece in enumerate(pieces)}
        for piece in pieces:
            found = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
            known = [pair for pair in found if pair[0] in ranks and pair[1] in ranks]
            known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
            merges += [[byte_alphabet_of(a), byte_alphabet_of(b)] for a, b in known]
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    words: dict = plain | {"use_regex": False}
    if pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                 "invert": False}  # fmt: skip
        words = {"type": "Sequence", "pretokenizers": [split, words]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(name, i) for name, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": plain | {"use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            # tiktoken takes a word that is a piece whole, whatever its merges.
            "ignore_merges": pattern is not None, "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
