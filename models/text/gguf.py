"""The tokenizer inside a GGUF file, as a `tokenizers.Tokenizer` and what the file says about it.

`tokenizer.ggml.model` is gpt2 (byte-level BPE: Llama 3 and 4, SmolLM) or llama (SentencePiece BPE
with scores: Llama 1 and 2). How gpt2 text is cut into words stands there as a name only,
`tokenizer.ggml.pre`, whose meaning is in llama.cpp's llama-vocab.cpp.
"""

import json
import pathlib

from ...configs.errors import UserError
from ..weights.gguf_files import first_part, is_gguf, models, read_header
from . import hub
from .kinds import LLAMA3_PATTERN, LLAMA4_PATTERN

__all__ = ["is_gguf", "models", "read"]

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_IDS = {"bos_id": "bos_token_id", "eos_id": "eos_token_id", "pad_id": "padding_token_id"}
_NAMED = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id", "sep_token": "seperator_token_id",
    "cls_token": "cls_token_id", "mask_token": "mask_token_id",
}  # fmt: skip
_STOPS = ("eot_token_id", "eom_token_id")
_PATTERNS = {
    "llama-bpe": LLAMA3_PATTERN, "llama3": LLAMA3_PATTERN, "llama-v3": LLAMA3_PATTERN,
    "llama4": LLAMA4_PATTERN,
}  # fmt: skip
_GPT2 = ("default", "gpt-2", "smollm")


def read(path: pathlib.Path):
    """Return (`tokenizers.Tokenizer`, keyword arguments of `Tokenizer.from_tokenizers`).

    Raises:
      UserError: the file is damaged, or its tokenizer is of a kind that is not read.
    """
    _, metadata, _ = read_header(first_part(path))
    own = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items()
           if k.startswith("tokenizer.ggml.")}  # fmt: skip
    tokens = own.get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise UserError(f"{path}: holds no tokenizer (tokenizer.ggml.tokens)")
    types = [int(t) for t in own.get("token_type", [1] * len(tokens))]
    if len(types) != len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.token_type has {len(types)} entries, not "
                        f"{len(tokens)}")  # fmt: skip
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.tokens has a token twice")
    kind = own.get("model")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{path}: tokenizer.ggml.model={kind!r} must be gpt2 or llama")
    try:
        if kind == "gpt2":
            made = _byte_level(path, own, vocab)
        else:
            made = _sentencepiece(path, own, tokens, types, vocab)
        _add(made, tokens, types)
        _wrap(made, own, tokens, kind)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{path}: its tokenizer is damaged ({str(error).splitlines()[0][:100]})"
        ) from None
    return made, _settings(path, own, metadata, tokens)


def _byte_level(path, own, vocab):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    name = own.get("pre", "default")
    if name in _PATTERNS:
        words = [
            pre_tokenizers.Split(tokenizers.Regex(_PATTERNS[name]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    elif name in _GPT2:
        words = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        if name == "smollm":
            words.insert(0, pre_tokenizers.Digits(individual_digits=True))
    else:
        raise UserError(
            f"{path}: tokenizer.ggml.pre={name!r} must be one of {', '.join([*_PATTERNS, *_GPT2])}"
        )
    merges = [tuple(merge.split(" ")) for merge in own.get("merges", ())]
    if any(len(merge) != 2 for merge in merges):
        raise UserError(f"{path}: tokenizer.ggml.merges must be pairs of tokens")
    # Llama 3's tiktoken takes a word that is a token whole, whatever its merges.
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=name in _PATTERNS))
    made.pre_tokenizer = pre_tokenizers.Sequence(words)
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(path, own, tokens, types, vocab):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    scores = own.get("scores")
    if scores is None or len(scores) != len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.scores must have one entry a token")
    # SentencePiece joins the neighbours whose union scores best; as merges: best union first.
    merges = []
    for i, token in enumerate(tokens):
        if types[i] == 1:
            pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            found = [(vocab[a], vocab[b], a, b) for a, b in pairs if a in vocab and b in vocab]
            merges += [(-float(scores[i]), i, *pair) for pair in found]
    merges.sort()
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == _UNKNOWN), None)
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab, [(a, b) for *_, a, b in merges], unk_token=unknown, fuse_unk=True,
            byte_fallback=True,
        )
    )  # fmt: skip
    # As `transformers` reads it; llama.cpp puts a space before a text that begins with one, too.
    scheme = "first" if own.get("add_space_prefix", True) else "never"
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if scheme == "first" else []
    made.decoder = decoders.Sequence(parts + strip)
    return made


def _add(made, tokens, types) -> None:
    import tokenizers

    for kinds, special in (((_UNKNOWN, _CONTROL), True), ((_USER_DEFINED,), False)):
        made.add_tokens(
            [
                tokenizers.AddedToken(token, special=special, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind in kinds
            ]
        )


def _wrap(made, own, tokens, kind) -> None:
    """Put around a text what the file says, or what llama.cpp does where it says nothing."""
    import tokenizers

    begins = kind == "llama" or own.get("pre") in ("llama-bpe", "llama3", "llama-v3")
    parts = []
    for key, default in (("bos", begins), ("eos", False)):
        i = own.get(f"{key}_token_id")
        wanted = own.get(f"add_{key}_token", default)
        there = wanted and type(i) is int and 0 <= i < len(tokens)
        parts.append([(tokens[i], i)] if there else [])
    if wrapped := hub.post_processor(*parts):
        whole = json.loads(made.to_str()) | {"post_processor": wrapped}
        made.post_processor = tokenizers.Tokenizer.from_str(json.dumps(whole)).post_processor


def _settings(path, own, metadata, tokens) -> dict:
    count = len(tokens)
    settings: dict = {name: own.get(key) for name, key in _IDS.items()}
    stops = [own[key] for key in _STOPS if key in own]
    for value in [*settings.values(), *stops]:
        if value is not None and not (type(value) is int and 0 <= value < count):
            raise UserError(f"{path}: names token {value!r} of a vocabulary of {count}")
    template = metadata.get("tokenizer.chat_template")
    return settings | {
        "stop_ids": stops,
        "special_names": {
            name: tokens[own[key]] for name, key in _NAMED.items() if own.get(key) in range(count)
        },
        "chat_template": template if isinstance(template, str) and template else None,
    }
