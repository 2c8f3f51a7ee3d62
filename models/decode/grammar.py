"""What a text must match: a JSON schema, a regular expression, one of several texts, a grammar.

https://github.com/guidance-ai/llguidance says after each token which ids may come next, as bits;
the engine masks the logits with them, so what is sampled always matches. It is only imported when
something is compiled (`pip install 'puna[grammar]'`).
"""

import functools
import json
import re
import threading
from collections.abc import Sequence

import numpy as np

from ...configs.errors import UserError

# Between two tokens of JSON: without a bound, a model can write blanks for ever. Escapes: without
# the needless one of a slash, the same as Python's.
_JSON = {"whitespace_pattern": r"( |\n[ ]{0,32})?", "json_allowed_escapes": '"\\bfnrtu'}
# Formats of the standard. To a validator others are notes: pydantic writes "path" and "binary".
_FORMATS = {
    *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname"),
    *("ipv4", "ipv6", "uri", "uri-reference", "iri", "iri-reference", "uri-template", "uuid"),
    *("json-pointer", "relative-json-pointer", "regex"),
}
_LONGEST_MESSAGE = 300
# The compiler recurses as deep as definitions refer to each other, and an overflow of the stack
# would end the process. Bytes: of a grammar, and of a stack that suffices for one of that size.
_LONGEST, _STACK = 1 << 18, 1 << 29


def json_schema(schema: dict | bool) -> str:
    """The grammar of JSON that the schema (draft 2020-12) allows, keys in the schema's order.

    Blanks between its tokens: at most one, or a line break with an indent.
    """
    return f"start: {json_rule(schema)}"


def json_rule(schema: dict | bool) -> str:
    """The same inside a rule of `lark`."""
    try:
        schema = _simplified(schema)
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": _JSON}
        return f"%json {json.dumps(schema)}"
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the schema is not JSON: {error}") from None


def _simplified(schema):
    """A schema without what constrains nothing, which the compiler would refuse."""
    if isinstance(schema, list):
        return [_simplified(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, value in schema.items():
        idle = value is False if key == "uniqueItems" else key == "format" and (
            isinstance(value, str) and value not in _FORMATS
        )  # fmt: skip
        if not idle:
            made[key] = value if key in ("enum", "const") else _simplified(value)
    return made


def regex(pattern: str) -> str:
    """The grammar of texts that the whole pattern matches (Rust's syntax, no look-around)."""
    return _llguidance().LLMatcher.grammar_from_regex(pattern)


def choices(texts: Sequence[str]) -> str:
    """The grammar of these texts."""
    return "start: " + " | ".join(map(quoted, texts))


def quoted(text: str) -> str:
    """A text as a literal of `lark`."""
    return json.dumps(text, ensure_ascii=False)


class Constraint:
    """Which ids may continue one text; `Constraints.compile` makes it."""

    def __init__(self, matcher):
        self._matcher = matcher

    def copy(self) -> "Constraint":
        """The same state for another text."""
        return Constraint(self._matcher.deep_copy())

    @property
    def done(self) -> bool:
        """Whether nothing can be added any more but the end."""
        return self._matcher.is_stopped() and not self.error

    @property
    def error(self) -> str:
        """Why the text cannot be continued, empty where it can: the grammar is too complex."""
        return _one_line(self._matcher.get_error())

    def allowed(self, width: int) -> np.ndarray:
        """Bits uint32 [width // 32 rounded up]: i of word w is 1 where id 32 w + i may be next.

        None is where the text cannot be continued, see `error`.
        """
        words = np.zeros(-(-width // 32), np.uint32)
        if self.error:
            return words
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        words[: len(bits)] = bits[: len(words)]
        return words

    def push(self, new: int) -> None:
        """Take the id that has been chosen among those allowed."""
        self._matcher.consume_token(new)


class Constraints:
    """Compiles grammars for one tokenizer; safe to use from any thread."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    @functools.cached_property
    def _vocabulary(self):
        tokenizer, llguidance = self._tokenizer, _llguidance()
        if not tokenizer.stop_ids:
            raise UserError("this tokenizer has no end token, which structured output needs")
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer)), eos_token=list(tokenizer.stop_ids)
        )

    def compile(self, source: str) -> Constraint:
        """A constraint at the beginning of a text.

        Args:
          source: what a function of this module gives, or a grammar in llguidance's Lark syntax.

        Raises:
          UserError: the grammar makes no sense, allows no text, uses what is not supported, or is
            too complex; llguidance is not installed.
        """
        if len(source) > _LONGEST:
            raise UserError(f"the grammar has {len(source):,} characters: at most {_LONGEST:,}")
        made: list[Constraint | Exception] = []

        def work():
            try:
                made.append(self._compile(source))
            except Exception as error:
                made.append(error)

        with self._lock:
            before = threading.stack_size(_STACK)
            try:
                thread = threading.Thread(target=work)
                thread.start()
            finally:
                threading.stack_size(before)
            thread.join()
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]

    def _compile(self, source):
        vocabulary = self._vocabulary
        try:
            found = Constraint(_llguidance().LLMatcher(vocabulary, source, log_level=0))
            if not found.error:
                found.copy().allowed(self._tokenizer.vocab_size)
        except (ValueError, RuntimeError) as error:
            raise UserError(_one_line(str(error))) from None
        if found.error:
            raise UserError(found.error)
        return found


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer):
        names = {i: name.encode() for name, i in tokenizer.special.items()}
        # Its mark of a control token: a byte that begins no text.
        self.tokens = [
            b"\xff" + names[i] if i in names else tokenizer.decode_bytes([i], continuation=True)
            for i in range(tokenizer.vocab_size)
        ]
        self.special_token_ids = sorted(names)
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.stop_ids[0]
        self._encode = tokenizer.encode

    def __call__(self, text) -> list[int]:
        return self._encode(text.decode() if isinstance(text, bytes) else text, continuation=True)


def _llguidance():
    try:
        import llguidance
    except ImportError:
        raise UserError(
            "structured output needs the package llguidance: pip install 'puna[grammar]'"
        ) from None
    return llguidance


def _one_line(message: str) -> str:
    """The message without the lines of grammar and the state that llguidance prints with it."""
    message = re.sub(r"<(state|backtrace)>.*", "", message, flags=re.DOTALL)
    message = re.sub(r"^ *(\d+ \|.*|\^ *)$", "", message, flags=re.MULTILINE)
    return " ".join(message.split())[:_LONGEST_MESSAGE]
