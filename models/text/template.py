"""Chat templates: the Jinja programs that Hugging Face puts beside a tokenizer.

A template is code from a stranger. It runs in Jinja's sandbox without files or imports, sees plain
JSON values only, and has a budget of steps and sizes, so that an endless loop or a giant string
ends in one line. That is care, not a wall: it runs in this process, and it decides every word that
the model reads, so take templates from where you would take weights.

A rendered template is one string, so a control token can only be recognised by its name. Names
that stand in messages are therefore broken by a private-use character while the template runs
(even a name begun in one string and ended in the next) and encoded as plain text. A template that
looks for such a name inside a message will not find it, and one that rewrites strings character by
character could undo the protection; the built-in formats of `chat.py` have no such gap.
"""

import datetime
import functools
import json
import re
import time
from collections.abc import Mapping

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ...configs.errors import UserError
from .kinds import names_pattern

# Far above any conversation, far below what hurts: seconds, and a few hundred megabytes.
_MAX_STEPS = 1_000_000  # iterations, calls and operations of one rendering
_MAX_SIZE = 8_000_000  # characters or elements of one value
_MAX_MADE = 32 * _MAX_SIZE  # of all values together
_MAX_SECONDS = 10.0
_WIDE_FORMAT = re.compile(r"\d{6}")


def encode(tokenizer, source: str, context: Mapping) -> list[int]:
    """Return the ids of a rendered template, control tokens recognised outside messages only.

    Args:
      tokenizer: gives the names of control tokens and encodes the text.
      source: the Jinja template.
      context: what the template sees: "messages", "tools", "bos_token" and so on.

    Raises:
      UserError: the template fails, is refused by the sandbox, or exceeds its budget.
    """
    mark = _Mark(tokenizer.special, source, context)
    names = ("bos_token", "eos_token")  # these are meant to be control tokens
    text = render(source, {k: v if k in names else mark(v) for k, v in context.items()})
    if not mark.used:
        return tokenizer.encode(text, allow_special=True)
    ids, start = [], 0
    for match in mark.names.finditer(text):
        ids += tokenizer.encode(text[start : match.start()].replace(mark.character, ""))
        ids.append(tokenizer.special[match.group()])
        start = match.end()
    return ids + tokenizer.encode(text[start:].replace(mark.character, ""))


def render(source: str, context: Mapping) -> str:
    """Return the text of a template; errors as in `encode`."""
    try:
        code = _compiled(source)
        environment = _Environment()
        template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        parts, size = [], 0
        for part in template.generate(_plain(context)):
            size += len(part)
            if size > _MAX_SIZE:
                raise SecurityError(f"writes more than {_MAX_SIZE} characters")
            parts.append(part)
        return "".join(parts)
    except Exception as error:  # a template can raise anything that an expression can
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise UserError(f"chat_template: {kind}{reason}") from None


class _Mark:
    """Breaks the names of control tokens in strings, so that they no longer match."""

    def __init__(self, special: Mapping[str, int], source: str, context: Mapping):
        self.names = names_pattern(tuple(special))
        self._special = tuple(special)
        self._firsts = {name[0] for name in special}
        self._longest = max(map(len, special), default=0)
        taken = {*source, *json.dumps(_plain(context), ensure_ascii=False)}
        free = (chr(i) for i in range(0xE000, 0xF900) if chr(i) not in taken)
        self.character = next(free, "\U0010ffff")
        self.used = False

    def __call__(self, value):
        if isinstance(value, str):
            broken = self.names.sub(lambda m: m.group()[0] + self.character + m.group()[1:], value)
            # A template may join strings, and may strip them first.
            end = broken.rstrip()
            tail = end[max(0, len(end) - self._longest) :]
            starts = [tail[i:] for i, char in enumerate(tail) if char in self._firsts]
            if any(name.startswith(start) for start in starts for name in self._special):
                broken = end + self.character + broken[len(end) :]
            self.used |= broken != value
            return broken
        if isinstance(value, Mapping):
            return {self(k): self(v) for k, v in value.items()}
        return [self(v) for v in value] if isinstance(value, list | tuple) else value


def _plain(value):
    """A copy in JSON's own types: an object's methods would be open to the template."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else None


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for loss masks; it changes no text."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metered(NodeTransformer):
    """Sends what the sandbox does not see through it: loops, `~`, and captured blocks."""

    def _filter(self, node, name: str):
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno if node else 1)

    def visit_For(self, node):
        node = self.generic_visit(node)
        node.iter = self._filter(node.iter, "metered")
        return node

    def visit_Concat(self, node):
        node = self.generic_visit(node)
        return self._filter(nodes.List(node.nodes, lineno=node.lineno), "concatenated")

    def visit_AssignBlock(self, node):
        node = self.generic_visit(node)
        if node.filter is None:
            node.filter = self._filter(None, "string")
        return node


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a budget, and the helpers that `transformers` gives to templates."""

    # Read by Jinja's compiler: these operators go through `call_binop`.
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _Generation],
        )
        self._steps = self._made = 0
        self._deadline = time.monotonic() + _MAX_SECONDS
        self.filters["tojson"] = _to_json
        self.filters = {name: self._guarded(f) for name, f in self.filters.items()}
        self.filters["metered"] = self._metered
        self.filters["concatenated"] = self._concatenated
        del self.globals["lipsum"]  # random words, slowly
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _spend(self):
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise SecurityError(f"takes more than {_MAX_STEPS} steps")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"takes more than {_MAX_SECONDS:.0f} seconds")

    def _make(self, size: int):
        if size > _MAX_SIZE:
            raise SecurityError(f"makes a value of more than {_MAX_SIZE} elements")
        self._made += size
        if self._made > _MAX_MADE:
            raise SecurityError(f"makes more than {_MAX_MADE} characters in all")

    def _metered(self, values):
        for value in values:
            self._spend()
            yield value

    def _concatenated(self, values):
        parts = [str(value) for value in values]
        self._make(sum(map(len, parts)))
        return "".join(parts)

    def _guarded(self, function):
        # Some filters are given the environment before the value.
        at = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def guarded(*args, **kwargs):
            others = (*args[at + 1 :], *kwargs.values())
            self._expect(function.__name__, args[at] if len(args) > at else None, others)
            return self._measured(function(*args, **kwargs))

        return guarded

    def call(__self, __context, __obj, *args, **kwargs):  # noqa: N805, B902 as Jinja names them
        # The sandbox wraps str.format, which hides the string that it is a method of.
        method = getattr(__obj, "__wrapped__", __obj)
        subject = getattr(method, "__self__", None)
        __self._expect(getattr(method, "__name__", ""), subject, (*args, *kwargs.values()))
        return __self._measured(super().call(__context, __obj, *args, **kwargs))

    def _expect(self, name, subject, others):
        """Refuse a call whose result could be huge: size of the value times size of arguments."""
        self._spend()
        bound = 1 if isinstance(subject, int) else _weight(subject)
        for value in others:
            bound *= _weight(value)
        # The largest that is let through is still checked, and thrown away, once it is made.
        if bound > _MAX_MADE:
            raise SecurityError(f"{name or 'a call'} with arguments this large")
        if "format" in str(name):
            for text in (subject, *others):
                if isinstance(text, str) and _WIDE_FORMAT.search(text):
                    raise SecurityError("formats to an enormous width")

    def _measured(self, result):
        if isinstance(result, str | list | tuple | dict):
            self._make(len(result))
        return result

    def call_binop(self, context, operator, left, right):
        self._spend()
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "+" and not numbers:
            self._make(_weight(left) + _weight(right))
        elif operator == "*" and not numbers:
            self._make(_weight(left) * _weight(right))
        elif numbers and operator in ("*", "**"):
            bits = left.bit_length()
            self._make(bits * abs(right) if operator == "**" else bits + right.bit_length())
        elif isinstance(left, str) and operator == "%" and _WIDE_FORMAT.search(left):
            raise SecurityError("formats to an enormous width")
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj, attribute):
        # Jinja's own gives an undefined value, which prints as nothing.
        raise SecurityError(f"access to {attribute!r} of {type(obj).__name__} is unsafe")


def _weight(value) -> int:
    """How large a result may grow with this value: its characters, elements or magnitude."""
    if isinstance(value, list | tuple):
        return max(1, sum(len(item) if isinstance(item, str) else 1 for item in value))
    if isinstance(value, str):
        return max(1, len(value))
    return max(1, abs(value)) if isinstance(value, int) else 1


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own escapes HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message):
    raise TemplateError(str(message))


def _strftime_now(form):
    return datetime.datetime.now().strftime(form)


@functools.lru_cache(maxsize=32)
def _compiled(source: str):
    environment = _Environment()
    tree = _Metered().visit(environment.parse(source))
    tree.set_environment(environment)
    return environment.compile(tree)
