"""The four kinds of vocabulary behind `tokenizer.Tokenizer`, each built from the bytes of one file.

A kind knows how plain text becomes ids (`encode`; with `continuation` behind a control token),
which bytes of text each id stands for (`pieces`, empty for control tokens), and the names of its
control tokens (`special`). Decoding, counting bytes and saving need nothing else and live in
`tokenizer.py`. The libraries are imported where they are used, so a byte-level run needs none.
"""

import base64
import binascii
import copy
import functools
import json
import re
from collections.abc import Iterator
from typing import Any

from ...configs.errors import UserError

# cl100k-style: contractions, words with one leading sign, at most three digits, signs, blanks.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# o200k: the same, but a word is upper case then lower case, and keeps its contraction.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD, _SUFFIX = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
LLAMA4_PATTERN = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_SUFFIX}|{_WORD}{_UPPER}+{_LOWER}*{_SUFFIX}|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tiktoken's regular expression engine fails on very long inputs and runs; Meta's tokenizer cuts
# there, so ids agree with it only if the cuts fall on the same characters.
_MAX_BLOCK, _MAX_RUN = 400_000, 25_000
_LONG_RUN = re.compile(rf"\s{{{_MAX_RUN + 1},}}|\S{{{_MAX_RUN + 1},}}")

_LONG = 50_000  # characters that take a tenth of a second

_JSON_START = re.compile(rb'\s*\{\s*["}]')
_RANK_LINE = re.compile(rb"\s*[A-Za-z0-9+/]+={0,2} \d+\s*(\n|$)")


class ByteKind:
    """Ids 0..255 are the bytes of UTF-8; three control tokens follow."""

    name, filename = "bytes", None
    strips_space = False

    def __init__(self, data: bytes = b""):
        self.data = data
        self.special = {"<|begin_of_text|>": 256, "<|end_of_text|>": 257, "<|pad|>": 258}
        self.pieces = [bytes([i]) for i in range(256)] + [b""] * len(self.special)

    def encode(self, text: str, continuation: bool = False) -> list[int]:
        return list(text.encode())

    def encode_special(self, text: str) -> list[int]:
        return encode_by_names(self, text)

    def find(self, name: str) -> int | None:
        return self.special.get(name)

    def name_of(self, i: int) -> str:
        return next(name for name, special in self.special.items() if special == i)


class HuggingFaceKind:
    """A `tokenizer.json` of BPE: byte-level (Llama 3, 4) or SentencePiece-like (Llama 1, 2)."""

    name, filename = "huggingface", "tokenizer.json"

    def __init__(self, data: bytes):
        self.data = data
        try:
            self._plain = self._build()
        except Exception as error:  # the library raises bare Exception for a bad file
            raise UserError(
                f"is not a tokenizer.json that `tokenizers` can read ({error})"
            ) from None
        # Without this, "<|eot_id|>" typed by a user would become the control token.
        self._plain.encode_special_tokens = True
        self._parsing = None
        self._continuing = _continuing(self._plain)
        model = self._plain.model
        if type(model).__name__ != "BPE":
            raise UserError(f"has a {type(model).__name__} model; Llama tokenizers are BPE")
        added = self._plain.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self.added = {token.content: i for i, token in added.items() if not token.special}
        self._special_ids = frozenset(self.special.values())
        self._cut = names_pattern(tuple(self.special))
        vocab = self._plain.get_vocab(with_added_tokens=True)
        if not vocab:
            raise UserError("has an empty vocabulary")
        to_bytes, self.strips_space = self._piece_reader(model.byte_fallback)
        self.byte_level = to_bytes is _from_byte_alphabet
        self.pieces = [b""] * (max(vocab.values()) + 1)
        for piece, i in vocab.items():
            if i not in added:
                self.pieces[i] = to_bytes(piece)
            elif not added[i].special:
                self.pieces[i] = piece.encode()  # matched as written, before any byte mapping

    def _build(self):
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_buffer(self.data)
        # A file may ask for these; either would quietly change the data.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        return tokenizer

    def _piece_reader(self, byte_fallback: bool):
        """Returns (piece -> bytes, whether decoding drops a leading space), from the decoder."""
        decoder = self._plain.decoder
        parts = json.loads(decoder.__getstate__()) if decoder is not None else {}
        parts = {part.get("type"): part for part in parts.get("decoders", [parts])}
        if "ByteLevel" in parts:
            return _from_byte_alphabet, False
        space = None
        if "Metaspace" in parts:
            space = parts["Metaspace"]["replacement"]
            strips = parts["Metaspace"].get("prepend_scheme") != "never"
        elif "Replace" in parts:
            space = parts["Replace"]["pattern"].get("String")
            strips = "Strip" in parts and parts["Strip"]["start"] > 0
        if not space:
            raise UserError(
                f"has a decoder of kind {'+'.join(map(str, parts))}; "
                "byte-level and SentencePiece-like tokenizers are supported"
            )

        def to_bytes(piece: str) -> bytes:
            byte = _fallback_byte(piece) if byte_fallback else None
            return piece.replace(space, " ").encode() if byte is None else byte

        return to_bytes, strips

    def encode(self, text: str, continuation: bool = False) -> list[int]:
        ids = self._encode_part(text, continuation)
        if self._special_ids.isdisjoint(ids):
            return ids
        # A vocabulary that lists a control token among its pieces can still produce it: cut the
        # name after its first character, which no piece can span.
        parts, start = [], 0
        for match in self._cut.finditer(text):
            parts.append(text[start : match.start() + 1])
            start = match.start() + 1
        parts.append(text[start:])
        return [i for n, part in enumerate(parts)
                for i in self._encode_part(part, continuation or n > 0)]  # fmt: skip

    def _encode_part(self, text: str, continuation: bool) -> list[int]:
        tokenizer = self._continuing if continuation else self._plain
        return _ids(tokenizer, text)

    def encode_special(self, text: str) -> list[int]:
        # A second object, because the switch is a property of the first and threads share it.
        if self._parsing is None:
            self._parsing = self._build()
        return _ids(self._parsing, text)

    def find(self, name: str) -> int | None:
        return self._plain.token_to_id(name)

    def name_of(self, i: int) -> str:
        name = self._plain.id_to_token(i)
        assert name is not None, i
        return name

    def wrapped(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the file's post-processor puts before and after a text."""
        plain = self._plain.encode("a", add_special_tokens=False).ids
        ids = self._plain.encode("a", add_special_tokens=True).ids
        for start in range(len(ids) - len(plain) + 1):
            if ids[start : start + len(plain)] == plain:
                return tuple(ids[:start]), tuple(ids[start + len(plain) :])
        raise UserError("has a post-processor that changes the ids of the text itself")


def _continuing(tokenizer):
    """The tokenizer of text behind a control token, where a space is put before the first word of a
    whole text only."""
    words = tokenizer.pre_tokenizer
    if getattr(words, "prepend_scheme", None) != "first":
        return tokenizer
    made = copy.deepcopy(tokenizer)
    made.encode_special_tokens = True
    words = made.pre_tokenizer
    words.prepend_scheme = "never"
    made.pre_tokenizer = words
    return made


class SentencePieceKind:
    """A SentencePiece `tokenizer.model` (Llama 1 and 2): BPE with byte fallback."""

    name, filename = "sentencepiece", "tokenizer.model"

    def __init__(self, data: bytes):
        try:
            import sentencepiece
        except ImportError:
            raise UserError("needs the package sentencepiece: pip install sentencepiece") from None
        self.data = data
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
        except RuntimeError:
            raise UserError("is neither a SentencePiece model nor tiktoken ranks") from None
        self.special, self.pieces = {}, []
        self.names = [self._model.IdToPiece(i) for i in range(self._model.GetPieceSize())]
        for i, piece in enumerate(self.names):
            if self._model.IsControl(i) or self._model.IsUnknown(i):
                self.special[piece] = i
                self.pieces.append(b"")
            elif self._model.IsByte(i):
                self.pieces.append(_fallback_byte(piece))
            else:
                self.pieces.append(piece.replace("\u2581", " ").encode())
        self.types, self.is_bpe = _sentencepiece_types(data)
        # The model writes a space before the first word, and takes it away again when decoding.
        self.strips_space = self._model.EncodeAsPieces("a")[0].startswith("\u2581")

    @property
    def unknown(self) -> str | None:
        return next((self.names[i] for i, t in enumerate(self.types) if t == _UNKNOWN), None)

    @property
    def has_bytes(self) -> bool:
        return _BYTE in self.types

    def is_text(self, i: int) -> bool:
        """Whether a piece can come of merging others."""
        return self.types[i] == _NORMAL

    @property
    def user_defined(self) -> list[int]:
        """Pieces that are found in a text before anything is merged."""
        return [i for i, t in enumerate(self.types) if t == _USER_DEFINED]

    def encode(self, text: str, continuation: bool = False) -> list[int]:
        return self._model.EncodeAsIds(text)

    def encode_special(self, text: str) -> list[int]:
        return encode_by_names(self, text)

    def find(self, name: str) -> int | None:
        i = self._model.PieceToId(name)
        return i if self._model.IdToPiece(i) == name else None

    def name_of(self, i: int) -> str:
        return self.names[i]


class TiktokenKind:
    """Meta's tiktoken `tokenizer.model`: lines of "base64 rank" (Llama 3 and 4)."""

    name, filename = "tiktoken", "tokenizer.model"
    strips_space = False

    def __init__(self, data: bytes):
        try:
            import tiktoken
        except ImportError:
            raise UserError("needs the package tiktoken: pip install tiktoken") from None
        self.data = data
        ranks = _read_ranks(data)
        if len(ranks) == 128_000:
            pattern, names = LLAMA3_PATTERN, llama3_special_names()
        elif len(ranks) == 200_000:
            pattern, names = LLAMA4_PATTERN, llama4_special_names()
        else:
            raise UserError(
                f"has {len(ranks)} tiktoken ranks; Llama 3 has 128000 and Llama 4 has 200000"
            )
        self.pattern = pattern
        self.special = {name: len(ranks) + i for i, name in enumerate(names)}
        self.pieces = [*ranks, *[b""] * len(names)]
        self._model = tiktoken.Encoding(
            name="llama", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special
        )

    def encode(self, text: str, continuation: bool = False) -> list[int]:
        return [i for part in _tiktoken_parts(text) for i in self._model.encode_ordinary(part)]

    def encode_special(self, text: str) -> list[int]:
        return encode_by_names(self, text)

    def find(self, name: str) -> int | None:
        return self.special.get(name)

    def name_of(self, i: int) -> str:
        return next(name for name, special in self.special.items() if special == i)


def kind_of(data: bytes) -> type:
    """The kind of a tokenizer file, from its content alone.

    Raises:
      UserError: the content is a known wrong thing (a Git LFS pointer, a GGUF file, nothing).
    """
    if not data.strip():
        raise UserError("is empty")
    if data.startswith(b"version https://git-lfs"):
        raise UserError("is a Git LFS pointer, not the file itself: run `git lfs pull`")
    if data.startswith(b"GGUF"):
        raise UserError("is a GGUF file, not a tokenizer file")
    if _JSON_START.match(data):
        return HuggingFaceKind
    return TiktokenKind if _RANK_LINE.match(data) else SentencePieceKind


def _ids(tokenizer, text: str) -> list[int]:
    """Ids of a text. Only `encode_batch` releases the interpreter's lock, so long ones go there."""
    if len(text) < _LONG:
        return tokenizer.encode(text, add_special_tokens=False).ids
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def encode_by_names(kind, text: str) -> list[int]:
    """Ids of a text in which the exact name of a control token stands for that token."""
    ids, start = [], 0
    for match in names_pattern(tuple(kind.special)).finditer(text):
        ids += kind.encode(text[start : match.start()])
        ids.append(kind.special[match.group()])
        start = match.end()
    return ids + kind.encode(text[start:])


def llama3_special_names() -> list[str]:
    """The 256 control tokens of Llama 3.x in id order (llama_models/llama3/tokenizer.py)."""
    names = [
        *("<|begin_of_text|>", "<|end_of_text|>"),
        *("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
        *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
    ]
    return names + [f"<|reserved_special_token_{i}|>" for i in range(2, 258 - len(names))]


def llama4_special_names() -> list[str]:
    """The 2048 control tokens of Llama 4 in id order (llama_models/llama4/tokenizer.py)."""

    def reserved(family: str, start: int, stop: int) -> list[str]:
        return [f"<|{family}reserved_special_token_{i}|>" for i in range(start, stop)]

    names = [
        *("<|begin_of_text|>", "<|end_of_text|>"),
        *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
        *("<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>"),
        *reserved("text_post_train_", 0, 6),
        *("<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"),
        *reserved("text_post_train_", 8, 69),  # 6 and 7 do not exist
        *("<|image_start|>", "<|image_end|>"),
        *reserved("vision_", 0, 2),
        *("<|tile_x_separator|>", "<|tile_y_separator|>"),
        *reserved("vision_", 2, 6),
        "<|image|>",
        *reserved("vision_", 6, 7),
        "<|patch|>",
        *reserved("vision_", 7, 1048),
        *reserved("reasoning_", 0, 8),
        *("<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"),
    ]
    return names + reserved("", 0, 2048 - len(names))


@functools.lru_cache(maxsize=16)
def names_pattern(names: tuple[str, ...]) -> re.Pattern:
    """Return the pattern of any of `names`, the longest where several fit."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _read_ranks(data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"line {number} is not `base64 rank`") from None
        if rank != len(ranks) or token in ranks:
            raise UserError(f"line {number} has rank {rank} or its token twice or out of order")
        ranks[token] = rank
    if any(bytes([i]) not in ranks for i in range(256)):
        raise UserError("lacks some of the 256 single bytes: the file is cut short")
    return ranks


def _tiktoken_parts(text: str) -> Iterator[str]:
    if len(text) <= _MAX_RUN:
        yield text
        return
    for start in range(0, len(text), _MAX_BLOCK):
        block, done = text[start : start + _MAX_BLOCK], 0
        for run in _LONG_RUN.finditer(block):
            for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield block[done:cut]
                done = cut
        yield block[done:]


_NORMAL, _UNKNOWN, _USER_DEFINED, _BYTE = 1, 2, 4, 6  # SentencePiece's types of pieces


def _sentencepiece_types(data: bytes) -> tuple[list[int], bool]:
    """The type of each piece and whether the model is BPE; its library tells neither.

    From the fields of sentencepiece_model.proto: pieces (1) with a type (3), trainer_spec (2) with
    a model_type (3; 2 is BPE).
    """
    types, model_type = [], 1
    for field, value in _protobuf(data):
        if field == 1:
            types.append(dict(_protobuf(value)).get(3, _NORMAL))
        elif field == 2:
            model_type = dict(_protobuf(value)).get(3, 1)
    return types, model_type == 2


def _protobuf(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message in protobuf's wire format."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        field, wire = key >> 3, key & 7
        if wire == 0:
            yield field, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        yield field, data[at : at + size]
        at += size


def _fallback_byte(piece: str) -> bytes | None:
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes([int(match[1], 16)]) if match else None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [i for i in range(256) if i not in printable]
    return {chr(i): i for i in printable} | {chr(256 + n): i for n, i in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()
_CHARACTERS = {i: char for char, i in _BYTE_ALPHABET.items()}


def byte_alphabet_of(piece: bytes) -> str:
    """A piece of bytes as byte-level tokenizer files write it."""
    return "".join(_CHARACTERS[byte] for byte in piece)


def _from_byte_alphabet(piece: str) -> bytes:
    try:
        return bytes([_BYTE_ALPHABET[char] for char in piece])
    except KeyError:
        return piece.encode()  # what the library's decoder does with a foreign character
