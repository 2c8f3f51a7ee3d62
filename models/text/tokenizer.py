"""Text to ids and back: every tokenizer a Llama has had, a byte-level one, and our own BPE.

`load_tokenizer` reads a directory or file, `train_bpe` makes a vocabulary, `byte_tokenizer` needs
neither. All give the same `Tokenizer`. Text is data: nothing in it becomes a control token unless
`encode(..., allow_special=True)` asks for that. Left out on purpose: padding, truncation and
`transformers`' clean-up of spaces when decoding, which loses text.
"""

import codecs
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ...configs import paths, storage
from ...configs.errors import UserError
from ...configs.files import write_bytes, write_json
from . import bpe, files, hub
from . import chat as chat_formats
from .bpe import BPE_SPECIAL
from .files import read_file, read_object
from .kinds import (
    ByteKind,
    HuggingFaceKind,
    SentencePieceKind,
    TiktokenKind,
    kind_of,
)

# Names that published Llama-like tokenizers use, most specific first.
_BOS_NAMES = ("<|begin_of_text|>", "<s>")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<|endoftext|>")
_PAD_NAMES = ("<|finetune_right_pad|>", "<|finetune_right_pad_id|>", "<|pad|>", "<pad>")
# Generation ends at any of these: end of text, of turn, or of a message that awaits a tool.
_STOP_NAMES = (*_EOS_NAMES, "<|eom_id|>", "<|eot_id|>", "<|eom|>", "<|eot|>", "<|im_end|>")

_SAVED = "puna_tokenizer.json"
_SETTINGS = (
    "bos_id", "eos_id", "pad_id", "begin_ids", "end_ids", "stop_ids", "chat_template",
    "special_names", "generation",
)  # fmt: skip
# Ids that a file may hold: one, or several.
_ID_SETTINGS, _IDS_SETTINGS = ("bos_id", "eos_id", "pad_id"), ("begin_ids", "end_ids", "stop_ids")
_KINDS = (ByteKind, HuggingFaceKind, SentencePieceKind, TiktokenKind)

logger = logging.getLogger(__name__)


class Tokenizer:
    """Text <-> ids. Immutable, picklable, and safe to share between threads.

    Attributes:
      vocab_size: ids are 0..vocab_size-1; a few may be unused.
      bos_id, eos_id, pad_id: control tokens that begin and end a text and fill a batch, or None.
      begin_ids, end_ids: what stands before and after each text by this tokenizer's own rule: a
        prompt begins with `begin_ids`, a document of training or evaluation ends with `end_ids`,
        too. Having a `bos_id` does not mean that texts begin with it.
      stop_ids: ids at which generation ends.
      special: name -> id of every control token.
      token_bytes: int32 [vocab_size], bytes of UTF-8 text that each id stands for; 0 for control
        tokens. For byte-level kinds they sum to the length of the encoded text.
      chat_template: Jinja source, {name: source}, or None for the built-in chat formats.
      special_names: what a chat template may call control tokens by: {"bos_token": "<s>", ...}.
      generation: what generation_config.json says of sampling: {"do_sample": True, ...}.
    """

    def __init__(
        self,
        kind,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        begin_ids: Iterable[int] | None = None,
        end_ids: Iterable[int] | None = None,
        stop_ids: Iterable[int] = (),
        chat_template: str | dict[str, str] | None = None,
        special_names: Mapping[str, str] | None = None,
        generation: Mapping | None = None,
    ):
        """Wrap a vocabulary; ids left None are found by name in it.

        Args:
          kind: one of the classes of `kinds`.
          begin_ids, end_ids: None for what a tokenizer.json says; for `bos_id` and nothing where
            the vocabulary has no such rule.
          stop_ids: ids to stop at beside `eos_id` and the end tokens known by name.
          special_names: None for the tokens of `bos_id`, `eos_id` and `pad_id`.
        """
        self._kind = kind
        self.special: dict[str, int] = kind.special
        self.vocab_size = len(kind.pieces)
        self.bos_id = self._first(_BOS_NAMES) if bos_id is None else bos_id
        self.eos_id = self._first(_EOS_NAMES) if eos_id is None else eos_id
        self.pad_id = self._first(_PAD_NAMES) if pad_id is None else pad_id
        ruled = isinstance(kind, HuggingFaceKind)
        begin, end = kind.wrapped() if ruled else ((self.bos_id,), ())
        if begin == (None,):
            begin = ()
        self.begin_ids: tuple[int, ...] = begin if begin_ids is None else tuple(begin_ids)
        self.end_ids: tuple[int, ...] = end if end_ids is None else tuple(end_ids)
        known = {self.special[name] for name in _STOP_NAMES if name in self.special}
        known |= set(stop_ids) | ({self.eos_id} - {None})
        self.stop_ids: tuple[int, ...] = tuple(sorted(known))
        self.chat_template = chat_template
        self.special_names = self._named() if special_names is None else dict(special_names)
        self.generation = dict(generation or {})
        self.token_bytes = np.array([len(piece) for piece in kind.pieces], np.int32)
        self.token_bytes.setflags(write=False)

    @classmethod
    def from_tokenizers(cls, tokenizer, **settings) -> "Tokenizer":
        """Wrap a `tokenizers.Tokenizer` object; `settings` are those of the constructor."""
        return cls(HuggingFaceKind(tokenizer.to_str().encode()), **settings)

    def _first(self, names: Iterable[str]) -> int | None:
        return next((self.special[name] for name in names if name in self.special), None)

    def _named(self) -> dict[str, str]:
        names = {i: name for name, i in self.special.items()}
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        return {key: names[i] for key, i in ids.items() if i in names}

    def __repr__(self) -> str:
        return f"Tokenizer({self._kind.name}, vocab_size={self.vocab_size})"

    def __reduce__(self):
        return _rebuild, (type(self._kind), self._kind.data, self._settings())

    @property
    def fingerprint(self) -> str:
        """A hash that tokenizers share which have the same vocabulary and settings."""
        settings = json.dumps(self._settings(), sort_keys=True)
        return hashlib.sha256(self._kind.data + settings.encode()).hexdigest()[:32]

    def _settings(self) -> dict:
        return {key: getattr(self, key) for key in _SETTINGS}

    def with_ends(self, bos: bool | None, eos: bool | None) -> "Tokenizer":
        """Return this tokenizer with another rule for the ids that begin and end a text.

        Args:
          bos, eos: whether texts begin with `bos_id` and end with `eos_id`; None leaves the rule.

        Raises:
          UserError: a token is asked for that the tokenizer lacks.
        """
        settings = self._settings()
        for wanted, name, key in ((bos, "bos_id", "begin_ids"), (eos, "eos_id", "end_ids")):
            if wanted and settings[name] is None:
                raise UserError(f"data.add_{name[:3]}=always: this tokenizer has no {name}")
            if wanted is not None:
                settings[key] = (settings[name],) if wanted else ()
        return Tokenizer(self._kind, **settings)

    def with_tokens(self, names: Iterable[str]) -> "Tokenizer":
        """Return this tokenizer with more control tokens; see `hub.with_tokens`."""
        names = tuple(names)
        if not names:
            return self
        return Tokenizer(hub.with_tokens(self.tokenizer_json(), names), **self._settings())

    def encode(
        self,
        text: str,
        bos: bool = False,
        eos: bool = False,
        allow_special: bool = False,
        continuation: bool = False,
    ) -> list[int]:
        """Return the ids of `text`.

        Args:
          text: any string. A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD.
          bos, eos: put `bos_id` before, `eos_id` after.
          allow_special: read the names of control tokens in `text` as those tokens. For text that
            this program wrote, never for a user's.
          continuation: the text follows a control token; a tokenizer that puts a space before the
            first word of a whole text then puts none.

        Raises:
          UserError: `text` is not a string, or the tokenizer has no such id.
        """
        if not isinstance(text, str):
            raise UserError(f"encode takes a string, not {type(text).__name__}")
        text = _well_formed(text)
        ids = (
            self._kind.encode_special(text)
            if allow_special
            else self._kind.encode(text, continuation)
        )
        for wanted, name in ((bos, "bos_id"), (eos, "eos_id")):
            if wanted and getattr(self, name) is None:
                raise UserError(f"this tokenizer has no {name}: encode with {name[:3]}=False")
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids, continuation: bool = False, show_special: bool = False) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Arguments and errors are those of `decode_bytes`.
        """
        return self.decode_bytes(ids, continuation, show_special).decode(errors="replace")

    def decode_bytes(self, ids, continuation: bool = False, show_special: bool = False) -> bytes:
        """Return the bytes that `ids` stand for, which may end inside a character.

        Args:
          ids: integers, in a list, an array [T] or any iterable.
          continuation: `ids` follow other text. SentencePiece tokenizers then keep the space
            before the first word, which they otherwise drop as their own addition.
          show_special: write control tokens by name instead of leaving them out.

        Raises:
          UserError: an id is not an integer in 0..vocab_size-1.
        """
        ids = self._checked(ids)
        pieces = self._kind.pieces
        if show_special:
            names = {i: name.encode() for name, i in self.special.items()}
            data = b"".join(names.get(i, pieces[i]) for i in ids)
        else:
            data = b"".join([pieces[i] for i in ids])
        if self._kind.strips_space and not continuation and data.startswith(b" "):
            return data[1:]
        return data

    def spans(self, ids: Iterable[int], text: str) -> np.ndarray:
        """Return where each id lies in the UTF-8 bytes of `text`: (start, end), int [n, 2].

        Args:
          ids: as `encode` gives them for `text`; control tokens stand there by name.

        Raises:
          UserError: the ids do not spell the text, because the tokenizer normalizes it.
        """
        data, at, found = text.encode(errors="replace"), 0, []
        names = {i: name.encode() for name, i in self.special.items()}
        for i in ids:
            piece: bytes = names.get(i) or self._kind.pieces[i]
            if not data.startswith(piece, at):
                # A space that SentencePiece puts before a word, or blanks that a token swallows.
                blank = len(data) - at - len(data[at:].lstrip())
                if piece[:1] == b" " and data.startswith(piece[1:], at):
                    piece = piece[1:]
                elif data.startswith(piece, at + blank):
                    at += blank
                else:
                    raise UserError(
                        f"the tokenizer changes the text near {text.encode()[at : at + 20]!r}, so "
                        "its tokens cannot be found in it"
                    )
            found.append((at, at + len(piece)))
            at += len(piece)
        return np.array(found, np.int64).reshape(-1, 2)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text as ids arrive, holding back a character until all its bytes are there.

        The pieces join to `decode(ids, continuation=True)`.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            if text := decoder.decode(self.decode_bytes([i], continuation=True)):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def chat(
        self,
        messages: list[dict],
        tools: list | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping | None = None,
    ) -> list[int]:
        """Return the ids of a conversation; see `chat.encode_messages`."""
        return chat_formats.encode_messages(self, messages, tools, add_generation_prompt, variables)

    def save(self, directory: str | os.PathLike) -> None:
        """Write what `load_tokenizer(directory)` needs to give this tokenizer again.

        That is the original file, byte for byte, and `puna_tokenizer.json`. A tokenizer.json is
        joined by a tokenizer_config.json for other programs. Each file appears whole or not at all.
        """
        kind = self._kind
        record = {"version": 1, "kind": kind.name, "file": kind.filename, **self._settings()}
        record["sha256"] = hashlib.sha256(kind.data).hexdigest()
        written = {kind.filename: kind.data} if kind.filename else {}
        if isinstance(kind, HuggingFaceKind):
            written["tokenizer_config.json"] = self._hub_config()
        # The record comes last, because it vouches for the others.
        _write(paths.local(directory, "directory"), written | {_SAVED: record})

    def save_for_hub(self, directory: str | os.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json, for `transformers` to give these ids.

        Texts begin with `begin_ids` there. They end as the file itself says: what ends a document
        of training would end a prompt, too.

        Raises:
          UserError: the vocabulary cannot be written so; nothing is written then.
        """
        written = {
            "tokenizer.json": self.tokenizer_json(),
            "tokenizer_config.json": self._hub_config(),
        }
        _write(paths.local(directory, "directory"), written)

    def tokenizer_json(self) -> bytes:
        """Return the tokenizer.json that `save_for_hub` writes."""
        return hub.tokenizer_json(self._kind, self.begin_ids, self._prompt_end)

    @property
    def _prompt_end(self) -> tuple[int, ...]:
        return self._kind.wrapped()[1] if isinstance(self._kind, HuggingFaceKind) else ()

    def _hub_config(self) -> dict:
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": bool(self.begin_ids),
            "add_eos_token": bool(self._prompt_end),
            **self.special_names,
        }
        if isinstance(self.chat_template, dict):
            templates = self.chat_template.items()
            config["chat_template"] = [{"name": n, "template": t} for n, t in templates]
        elif self.chat_template:
            config["chat_template"] = self.chat_template
        return config

    def _checked(self, ids) -> list[int]:
        try:
            array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
        except (TypeError, ValueError):
            array = np.zeros((1, 1))
        if array.ndim == 1 and array.size == 0:
            return []
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise UserError(_one_line(f"decode takes a flat list of ids, not {ids!r:.60}"))
        bad = array[(array < 0) | (array >= self.vocab_size)]
        if bad.size:
            raise UserError(f"decode: id {bad[0]} is outside 0..{self.vocab_size - 1}")
        return [int(i) for i in array]


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose ids 0..255 are bytes; 256 begins, 257 ends, 258 pads a text."""
    kind = ByteKind()
    return Tokenizer(kind, end_ids=[kind.special["<|end_of_text|>"]])


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE with Llama 3's splitting into words; lossless for any text.

    The same texts give the same vocabulary. Ids are the 256 bytes, then merges by frequency, then
    `BPE_SPECIAL`. A corpus too small for `vocab_size` gives fewer ids, and a warning in the log.

    Args:
      texts: the corpus, read once.
      vocab_size: ids in all, control tokens included.

    Raises:
      UserError: no text at all, an item that is not a string, or no room for bytes and control
        tokens.
    """
    model = bpe.train(map(_checked_text, texts), vocab_size)
    trained = Tokenizer.from_tokenizers(model, end_ids=[model.token_to_id(BPE_SPECIAL[1])])
    if trained.vocab_size < vocab_size:
        logger.warning(
            "the corpus has pairs for a vocabulary of %d, not %d", trained.vocab_size, vocab_size
        )
    return trained


def _checked_text(text) -> str:
    if not isinstance(text, str):
        raise UserError(f"a corpus is made of strings, not {type(text).__name__}")
    return _well_formed(text)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Read a tokenizer from a run of ours, a file, or the first of these in a directory.

    `puna_tokenizer.json` (written by `save`), `tokenizer.json`, `tokenizer.model`, a single
    `.gguf`. What a file is follows from its content. tokenizer_config.json, added_tokens.json,
    special_tokens_map.json, generation_config.json, config.json and chat_template.jinja beside it
    name control tokens, what begins and ends a text, stops, sampling and the chat template.

    Raises:
      UserError: missing, empty, huge, corrupt or of another kind; the line names the file.
    """
    from . import gguf

    path = storage.anywhere(path, "path")
    with storage.explained(path):
        if not path.exists():
            raise paths.missing(path)
        if (path / "checkpoints").is_dir() or (path / "meta").is_dir():
            return _load_from_run(path)
    if paths.is_url(path):
        raise UserError(f"{path} is no run of puna; copy a tokenizer to this machine first")
    if path.is_dir():
        names = (_SAVED, "tokenizer.json", "tokenizer.model")
        found = [path / name for name in names if (path / name).is_file()]
        found = found or gguf.models(path)
        if not found or (found[0].suffix == ".gguf" and len(found) > 1):
            raise UserError(f"{path}: holds none of {', '.join(names)}, nor one .gguf file")
        path = found[0]
    if path.is_file() and gguf.is_gguf(path):
        vocabulary, settings = gguf.read(path)
        return Tokenizer.from_tokenizers(vocabulary, **settings)
    data = read_file(path)
    if path.name == _SAVED:
        return _load_saved(path, read_object(path, data))
    try:
        kind = kind_of(data)(data)
    except UserError as error:
        raise UserError(_one_line(f"{path}: {error}")) from None
    found = files.beside(path.parent)
    kind = files.completed(kind, path.parent, found)
    return Tokenizer(kind, **files.settings_beside(path.parent, kind, found))


def _load_from_run(path: Path) -> Tokenizer:
    from ..weights import run

    with tempfile.TemporaryDirectory() as folder:
        for name, data in run.tokenizer_files(run.find(path)).items():
            write_bytes(Path(folder) / Path(name).name, data)
        return load_tokenizer(folder)


def _load_saved(path: Path, record: dict) -> Tokenizer:
    kind = next((kind for kind in _KINDS if kind.name == record.get("kind")), None)
    if kind is None or record.get("version") != 1:
        raise UserError(f"{path}: is not version 1 of a tokenizer saved by puna")
    file = path.parent / kind.filename if kind.filename else path
    data = read_file(file) if kind.filename else b""
    if hashlib.sha256(data).hexdigest() != record.get("sha256"):
        raise UserError(f"{file}: is not the file that {path.name} was saved with (sha256 differs)")
    try:
        # What older versions saved had no special_names, and both tokens around each text.
        record.setdefault("special_names", None)
        for key, i in (("begin_ids", record["bos_id"]), ("end_ids", record["eos_id"])):
            record.setdefault(key, [] if i is None else [i])
        record.setdefault("generation", {})
        tokenizer = _rebuild(kind, data, {key: record[key] for key in _SETTINGS})
    except UserError as error:
        raise UserError(_one_line(f"{file}: {error}")) from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: is damaged") from None
    ids = [getattr(tokenizer, name) for name in _ID_SETTINGS]
    ids += [i for name in _IDS_SETTINGS for i in getattr(tokenizer, name)]
    if not all(i is None or (type(i) is int and 0 <= i < tokenizer.vocab_size) for i in ids):
        raise UserError(f"{path}: names ids outside 0..{tokenizer.vocab_size - 1}")
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise UserError(f"{path}: chat_template must be text or names with text")
    if not all(isinstance(text, str) for text in tokenizer.special_names.values()):
        raise UserError(f"{path}: special_names must be names with text")
    return tokenizer


def _write(directory: Path, contents: dict) -> None:
    """Write bytes, and JSON objects, by file name."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (write_bytes if isinstance(content, bytes) else write_json)(directory / name, content)
    except OSError as error:
        raise UserError(f"{directory}: cannot save the tokenizer: {error.strerror}") from None


def _rebuild(kind: type, data: bytes, settings: dict) -> Tokenizer:
    return Tokenizer(kind(data), **settings)


def _well_formed(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates, which broken JSON brings in."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _one_line(message: str) -> str:
    return re.sub(r"\s+", " ", message)[:300]
