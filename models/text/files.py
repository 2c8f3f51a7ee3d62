"""Files of a tokenizer: reading them with one-line errors, and what the configuration files that
Hugging Face puts beside a tokenizer say about it.
"""

import json
from pathlib import Path

from ...configs.errors import UserError
from .kinds import HuggingFaceKind, SentencePieceKind

# Llama 4's tokenizer.json has about 30 MB; anything far beyond that is some other file.
_MAX_FILE_BYTES = 256 * 2**20


def settings_beside(directory: Path, kind) -> dict:
    """What the files around a tokenizer say about it, as arguments of `Tokenizer`."""
    config, names, generation = (
        read_object(path, read_file(path)) if (path := directory / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    )
    first, last = kind.wrapped() if isinstance(kind, HuggingFaceKind) else (None, None)
    settings = {}
    for key, wrapped in (("bos", first), ("eos", last), ("pad", None)):
        ids = _ids(directory, generation, f"{key}_token_id", len(kind.pieces))
        token = config.get(f"{key}_token") or names.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        # A name that the vocabulary lacks is common in published files (Llama 4's pad is one).
        named = kind.find(token) if isinstance(token, str) else None
        candidates = (named, *ids[:1], wrapped)
        settings[f"{key}_id"] = next((i for i in candidates if i is not None), None)
        if key == "eos":
            settings["stop_ids"] = ids
    settings["chat_template"] = _chat_template(directory, config)
    settings["special_names"] = _special_names(kind, config, names)
    return settings


def _special_names(kind, config: dict, names: dict) -> dict[str, str] | None:
    """The control tokens that `transformers` defines in a chat template, by name.

    Those are `*_token` keys of both files and the named ones among the extra tokens; nothing is
    guessed from the vocabulary. None where no file is there to name any.
    """
    found: dict = {}
    if isinstance(kind, SentencePieceKind):  # the defaults of LlamaTokenizer
        found = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    elif not config and not names:
        return None
    # A config that lists its added tokens is of a time when the other file was no longer read.
    for source in (config,) if "added_tokens_decoder" in config else (config, names):
        for key in ("model_specific_special_tokens", "extra_special_tokens"):
            extra = source.get(key)
            found |= extra if isinstance(extra, dict) else {}
        found |= {key: value for key, value in source.items() if key.endswith("_token")}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in found.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _ids(directory: Path, generation: dict, key: str, vocab_size: int) -> list[int]:
    """The ids under a key of generation_config.json: one, a list, or none; -1 means none."""
    value = generation.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int or i >= vocab_size for i in ids):
        raise UserError(
            f"{directory / 'generation_config.json'}: {key}={value!r} must be ids below the "
            f"tokenizer's {vocab_size}"
        )
    return [i for i in ids if i >= 0]


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
