"""Files of a tokenizer: reading them with one-line errors, and what the configuration files that
Hugging Face puts beside a tokenizer say about it.
"""

import json
import logging
from pathlib import Path

from ...configs.errors import UserError
from . import hub
from .kinds import HuggingFaceKind, SentencePieceKind

# Llama 4's tokenizer.json has about 30 MB; anything far beyond that is some other file.
_MAX_FILE_BYTES = 256 * 2**20

logger = logging.getLogger(__name__)


def beside(directory: Path) -> dict[str, dict]:
    """The JSON files that lie beside a tokenizer, by file name; empty where there is none."""
    names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
             "config.json", "added_tokens.json")  # fmt: skip
    paths = {name: directory / name for name in names}
    return {n: read_object(p, read_file(p)) if p.is_file() else {} for n, p in paths.items()}


def completed(kind, directory: Path, found: dict[str, dict]):
    """The vocabulary with what the files beside it change, as `transformers` reads them.

    Those are added tokens, and for the class LlamaTokenizer where a space is put before a word; a
    tokenizer.model with a tokenizer_config.json becomes the tokenizer.json that it stands for.

    Raises:
      UserError: added tokens with ids that do not follow those of the vocabulary.
    """
    config = found["tokenizer_config.json"]
    added = _added_tokens(found)
    if isinstance(kind, SentencePieceKind):
        if not added and (not config or not kind.is_bpe):
            return kind
        # What names no class is read by this one, whose files these are.
        config = found["tokenizer_config.json"] = {"tokenizer_class": "LlamaTokenizer"} | config
        made = hub.sentencepiece_json(kind)
        hub.as_llama_tokenizer(made, {"add_prefix_space": kind.strips_space} | config)
        around = {}
        for key, default in (("bos", True), ("eos", False)):
            wanted = config.get(f"add_{key}_token")
            name = _text(config.get(f"{key}_token")) or {"bos": "<s>", "eos": "</s>"}[key]
            around[key] = [name] if (default if wanted is None else wanted) else []
    elif isinstance(kind, HuggingFaceKind):
        known = set(kind.special) | set(kind.added)
        added = {name: token for name, token in added.items() if name not in known}
        llama = _is_llama(config) and not kind.byte_level
        if not added and not llama:
            return kind
        made, around = json.loads(kind.data), None
        if llama:
            hub.as_llama_tokenizer(made, config)
    else:
        return kind
    have = {token["content"]: token for token in made["added_tokens"]}
    vocab = made["model"]["vocab"]
    free = max([len(vocab) - 1, *(token["id"] for token in have.values())]) + 1
    for name, token in sorted(added.items(), key=lambda item: item[1]["id"]):
        if name in have:
            have[name] |= token | {"id": have[name]["id"]}
            continue
        if token["id"] != vocab.get(name, free):
            raise UserError(
                f"{directory}: the added token {name!r:.40} has id {token['id']}, and "
                f"{vocab.get(name, free)} is the next: a token between them is missing"
            )
        free += token["id"] == free
        have[name] = token
    made["added_tokens"] = sorted(have.values(), key=lambda token: token["id"])
    if around is not None:
        ids = vocab | {name: token["id"] for name, token in have.items()}
        made["post_processor"] = hub.post_processor(
            *([(name, ids[name]) for name in around[key] if name in ids] for key in ("bos", "eos"))
        )
    return HuggingFaceKind(json.dumps(made, ensure_ascii=False).encode())


def _added_tokens(found: dict[str, dict]) -> dict[str, dict]:
    """Added tokens by name, from tokenizer_config.json and added_tokens.json."""
    config, names = found["tokenizer_config.json"], found["special_tokens_map.json"]
    named = {_text(v) for source in (config, names) for k, v in source.items()
             if k.endswith("_token")}  # fmt: skip
    for source in (config, names):
        listed = source.get("additional_special_tokens")
        named |= {_text(v) for v in listed} if isinstance(listed, list) else set()
    added = {}
    for name, i in found["added_tokens.json"].items():
        if type(i) is int and i >= 0:
            # This file says no more; what looks like a control token must not be read from a text.
            special = name in named or (name.startswith("<") and name.endswith(">"))
            added[name] = hub.added_token(name, i, special)
    entries = config.get("added_tokens_decoder")
    for i, token in (entries if isinstance(entries, dict) else {}).items():
        name = _text(token)
        if not name or not i.isdigit():
            continue
        flags = {k: bool(v) for k, v in token.items()
                 if k in ("single_word", "lstrip", "rstrip", "normalized")}  # fmt: skip
        special = bool(token.get("special")) or name in named
        added[name] = hub.added_token(name, int(i), special, **flags)
    return added


def settings_beside(directory: Path, kind, found: dict[str, dict]) -> dict:
    """What the files around a tokenizer say about it, as arguments of `Tokenizer`."""
    config, names, generation = (
        found[name]
        for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    )
    settings: dict = {}
    if isinstance(kind, HuggingFaceKind):
        settings["begin_ids"], settings["end_ids"] = kind.wrapped()
    first, last = settings.get("begin_ids", ()), settings.get("end_ids", ())
    for key, wrapped in (("bos", first[:1]), ("eos", last[-1:]), ("pad", ())):
        ids = []
        for name in ("generation_config.json", "config.json"):
            ids += _ids(directory / name, found[name], f"{key}_token_id", len(kind.pieces))
        token = _text(config.get(f"{key}_token")) or _text(names.get(f"{key}_token"))
        # A name that the vocabulary lacks is common in published files (Llama 4's pad is one).
        candidates = (kind.find(token) if token else None, *ids[:1], *wrapped)
        settings[f"{key}_id"] = next((i for i in candidates if i is not None), None)
        if key == "eos":
            settings["stop_ids"] = ids
    settings["chat_template"] = _chat_template(directory, config)
    settings["special_names"] = _special_names(kind, config, names)
    settings["generation"] = {
        key: value
        for key, value in generation.items()
        if not key.endswith("_token_id") and not key.startswith(("transformers_version", "_from"))
    }
    return settings


def _is_llama(config: dict) -> bool:
    """Whether a tokenizer_config.json names the class LlamaTokenizer."""
    return (_text(config.get("tokenizer_class")) or "").removesuffix("Fast") == "LlamaTokenizer"


def _text(token) -> str | None:
    """The text of a token as configuration files name it: itself, or under "content"."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _special_names(kind, config: dict, names: dict) -> dict[str, str] | None:
    """The control tokens that `transformers` defines in a chat template, by name.

    Those are `*_token` keys of both files and the named ones among the extra tokens; nothing is
    guessed from the vocabulary. None where no file is there to name any.
    """
    found: dict = {}
    if isinstance(kind, SentencePieceKind) or _is_llama(config):
        found = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    elif not config and not names:
        return None
    # A config that lists its added tokens is of a time when the other file was no longer read.
    for source in (config,) if "added_tokens_decoder" in config else (config, names):
        for key in ("model_specific_special_tokens", "extra_special_tokens"):
            extra = source.get(key)
            found |= extra if isinstance(extra, dict) else {}
        found |= {key: value for key, value in source.items() if key.endswith("_token")}
    texts = {key: _text(value) for key, value in found.items()}
    return {key: text for key, text in texts.items() if text is not None}


def _ids(path: Path, config: dict, key: str, vocab_size: int) -> list[int]:
    """The ids under a key of a model's configuration: one, a list, or none; -1 means none.

    An id outside the vocabulary is common for padding and is put aside with a note.
    """
    text = config.get("text_config")
    value = config.get(key, text.get(key) if isinstance(text, dict) else None)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int for i in ids):
        raise UserError(f"{path}: {key}={value!r} must be an id or a list of ids")
    outside = [i for i in ids if i >= vocab_size]
    if key == "eos_token_id" and outside and outside == ids:
        raise UserError(
            f"{path}: {key}={value!r} must be ids below the tokenizer's {vocab_size}: no text "
            "could end"
        )
    if outside:
        logger.warning(
            "%s: %s=%s is put aside, the tokenizer has %d ids", path, key, outside[0], vocab_size
        )
    return [i for i in ids if 0 <= i < vocab_size]


def _chat_template(directory: Path, config: dict) -> str | dict[str, str] | None:
    """The template of chat_template.jinja, chat_template.json or the tokenizer's own config."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return read_file(path).decode()
        except UnicodeDecodeError:
            raise UserError(f"{path}: is not UTF-8 text") from None
    path = directory / "chat_template.json"
    template = read_object(path, read_file(path)).get("chat_template") if path.is_file() else None
    template = template or config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}
    if isinstance(template, dict) and all(isinstance(s, str) for s in template.values()):
        return template or None
    if template is None or isinstance(template, str):
        return template or None
    raise UserError(f"{directory}: chat_template must be text, or a list of name and template")


def read_file(path: Path) -> bytes:
    """Return the bytes of a file; UserError if missing, empty, not a file, or far too large."""
    try:
        if path.is_dir() or (path.exists() and not path.is_file()):
            raise UserError(f"{path}: is not a file")
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise UserError(
                f"{path}: has {size} bytes; a tokenizer has at most {_MAX_FILE_BYTES}: is it the "
                "right file?"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or directory") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not data.strip():
        raise UserError(f"{path}: is empty")
    return data


def read_object(path: Path, data: bytes) -> dict:
    """Return the JSON object in `data`; UserError naming `path` if it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is not JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value
