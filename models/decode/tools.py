"""Calls of functions in what a model writes, and the grammar that makes it write one.

Llamas write calls in one of these forms; all are read, whatever the model:

    {"name": "f", "parameters": {"a": 1}}       Llama 3; several with semicolons between
    [f(a=1), g()]                               Llama 3.2 and 4
    <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>    ChatML: Hermes, SmolLM2, Qwen
    <function=f>{"a": 1}</function>             Llama 3.1, for functions of the user

The first two are calls only where the answer begins with them. What names no function that was
offered, or is not well formed, stays text. Left out on purpose: Llama 3.1's own tools.
"""

import ast
import json
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from ...configs.errors import UserError
from .grammar import json_rule, quoted

# Control tokens that surround calls and leave no text.
MARKS = ("<|python_tag|>", "<|python_start|>", "<|python_end|>", "<tool_call>", "</tool_call>")
_TAGS = MARKS[3:]
_LEAD = re.compile(r"\s*(?:<\|python_(?:tag|start)\|>\s*)?")
_BETWEEN = re.compile(r"(?:\s|[;,]|<\|python_(?:tag|start|end)\|>)*")
_OPEN = re.compile(r"<(?:tool_call|function=([^<>]{1,64}))>")
_MAY_OPEN = re.compile(r"<(?:t|to|too|tool|tool_|tool_c|tool_ca|tool_cal|tool_call)?$"
                       r"|<(?:f|fu|fun|func|funct|functi|functio|function)$"
                       r"|<function=[^<>]{0,64}$")  # fmt: skip
_LIST = re.compile(r"\[\s*(?:(\w[\w.]*)(\s*\()?)?")

_QUOTES = ("'", '"')
_BRACKET = re.compile(r"""[\[\](){}]|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|["']""", re.DOTALL)


class Call(NamedTuple):
    """A call of a function. arguments: an object in JSON."""

    name: str
    arguments: str


class Calls:
    """Parts a text, as it comes, into what is said and what is called."""

    def __init__(self, names: Sequence[str]):
        self._names = frozenset(names)
        self._held = ""  # not known yet to be text or call
        self._said = False
        self.found = 0

    def add(self, text: str, final: bool = False) -> list[str | Call]:
        """Take more of the text and give what is certain; all of it once it is final."""
        self._held += text
        made: list[str | Call] = []
        while self._held:
            read = self._later if self._said else self._first
            size, parts = read(self._held, final)
            if not size:
                break
            self._held = self._held[size:]
            self.found += sum(isinstance(part, Call) for part in parts)
            made += filter(None, parts)
        return made

    # Each gives how many characters have been read, 0 for more to come, and what they are.

    def _first(self, held, final):
        """Nothing has been said so far."""
        found = (_BETWEEN if self.found else _LEAD).match(held)
        assert found is not None  # both match nothing, too
        lead = found.group()
        rest = held[len(lead) :]
        # Blanks before a text belong to it.
        skipped = len(lead) if self.found or "<" in lead else 0
        if not rest or any(mark.startswith(rest) for mark in MARKS[:3]):
            return (len(held), [held[skipped:]]) if final else (0, [])
        reads = {"{": self._json, "[": self._list, "<": self._tags}.get(rest[0])
        size, calls = reads(rest, final) if reads else (len(rest), None)
        if calls is not None:
            return (size and len(lead) + size), calls
        self._said = True
        return (skipped, []) if skipped else self._later(held, final)

    def _later(self, held, final):
        """Text has been said: only tags are calls."""
        found = _OPEN.search(held)
        if found and not found.start():
            size, calls = self._tags(held, final)
            return size, [held[:size]] if calls is None else calls
        may = None if final or found else _MAY_OPEN.search(held)
        end = found.start() if found else may.start() if may else len(held)
        return end, [held[:end]]

    # These give None in place of calls for what is no call.

    def _json(self, text, final):
        end = _closed(text)
        if not end:
            return (len(text), None) if final else (0, [])
        try:
            value = _DECODER.decode(text[:end])
        except (ValueError, RecursionError):
            return end, None
        calls = [self._call(item) for item in (value if isinstance(value, list) else [value])]
        return end, calls if calls and all(calls) else None

    def _list(self, text, final):
        begun = _LIST.match(text)
        assert begun is not None  # "[" is what led here
        if text[begun.end() :].startswith("{"):
            return self._json(text, final)
        name, opened = begun.groups()
        if begun.end() < len(text) and not opened or opened and name not in self._names:
            return len(text), None
        end = _closed(text)
        if not end:
            return (len(text), None) if final else (0, [])
        return end, self._python(text[:end])

    def _tags(self, text, final):
        opened = _OPEN.match(text)
        if not opened:
            return (0, []) if _MAY_OPEN.match(text) and not final else (len(text), None)
        close = "</function>" if opened[1] else "</tool_call>"
        end = text.find(close)
        if end < 0 and not final:
            return 0, []
        inside = text[opened.end() : end if end >= 0 else len(text)]
        try:
            value = _DECODER.decode(inside.strip())
        except (ValueError, RecursionError):
            value = None
        call = self._call({"name": opened[1], "arguments": value} if opened[1] else value)
        return (end + len(close) if end >= 0 else len(text)), [call] if call else None

    def _call(self, value) -> Call | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        try:
            if isinstance(arguments, str):
                arguments = _DECODER.decode(arguments)
            if isinstance(arguments, dict):
                written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
                return Call(value["name"], written)
        except (ValueError, RecursionError):
            pass
        return None

    def _python(self, text) -> list[Call | None] | None:
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes in strings
                tree = ast.parse(text, mode="eval").body
            nodes = tree.elts if isinstance(tree, ast.List) else []
            calls = [
                self._call({
                    "name": ast.unparse(node.func),
                    "arguments": {k.arg: _value(k.value) for k in node.keywords},
                })
                for node in nodes
                if isinstance(node, ast.Call) and not node.args
                and all(keyword.arg for keyword in node.keywords)
            ]  # fmt: skip
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return None
        return calls if len(calls) == len(nodes) > 0 and all(calls) else None


def _closed(text) -> int:
    """Where the bracket that `text` begins with is closed, 0 where it is not yet."""
    depth = 0
    for match in _BRACKET.finditer(text):
        found = match.group()
        if found in _QUOTES:  # of a string that has not ended
            return 0
        if found[0] not in _QUOTES:
            depth += 1 if found in "([{" else -1
            if depth <= 0:
                return match.end()
    return 0


def _refuse(name):
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
_WORDS = {"true": True, "false": False, "null": None}


def _value(node):
    """The JSON value that a literal of Python, or of JSON, writes."""
    match node:
        case ast.Constant(value=str() as value):
            return _joined(value)
        case ast.Constant(value=int() | float() | None as value):
            return value
        case ast.Name(id=name) if name in _WORDS:
            return _WORDS[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_value(element) for element in elements]
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return {_key(key): _value(value) for key, value in pairs}
    raise ValueError("not a value of JSON")


def _key(node) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        raise ValueError("not a key of JSON")
    return _joined(node.value)


def _joined(text) -> str:
    """With the two halves that JSON escapes a character into as that character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


# The grammar of calls


def form(tokenizer) -> str:
    """How the model writes a call, as its chat format tells it to: "json", "python" or "tags"."""
    template = tokenizer.chat_template or ""
    if "<tool_call>" in ("".join(template.values()) if isinstance(template, dict) else template):
        return "tags"
    return "python" if not template and "<|header_start|>" in tokenizer.special else "json"


def grammar(tokenizer, functions: Sequence[dict], several: bool, free: bool,
            answer: str = "") -> str:  # fmt: skip
    """The grammar of calls of functions in the model's own form.

    Args:
      functions: {"name": ..., "parameters": JSON schema} each.
      several: more than one call; Llama 3's form has one.
      free: a text that does not begin as a call does is allowed instead; where calls have tags it
        may also stand before and after.
      answer: the grammar (`lark`) of a text that is allowed instead of calls, and then no other is,
        whatever `free` says; empty for none.

    Raises:
      UserError: a name that cannot be written in that form.
    """
    kind = form(tokenizer)
    calls = " | ".join(f"call_{i}" for i in range(len(functions)))
    rules = [f"call: {calls}"]
    for i, function in enumerate(functions):
        schema = function.get("parameters") or {"properties": {}, "additionalProperties": False}
        if kind == "python":
            rules += _python_rules(i, function["name"], schema)
            continue
        # Meta's own prompt shows a type, the templates of releases do not.
        type_ = "" if tokenizer.chat_template else '"type": "function", '
        key = "arguments" if kind == "tags" else "parameters"
        head = f'{{{type_}"name": {json.dumps(function["name"])}, "{key}": '
        rules.append(f'call_{i}: {quoted(head)} args_{i} "}}"')
        rules.append(f"args_{i}: {json_rule({'type': 'object', **schema})}")
    if answer:
        free = False
        rules.append(answer.replace("start:", "answer:", 1))
    instead = " | answer" if answer else ""
    if kind == "tags":
        first, *more = _tag_rules(tokenizer, several, free)
        return "\n".join([first + instead, *more, *rules])
    start = "call" if kind == "json" else '"[" call (", " call)* "]"' if several else '"[" call "]"'
    if free:
        start += " | TEXT"
        first = r"\[" if kind == "python" else "{"
        rules.append(rf"TEXT: /\s*([^\s{first}](.|\n)*)?/")
    return "\n".join([f"start: {start}{instead}", *rules])


def _tag_rules(tokenizer, several, free) -> list[str]:
    """`<tool_call>` and what belongs to it; the tags may be control tokens."""
    special = all(mark in tokenizer.special for mark in _TAGS)
    opened, closed = _TAGS if special else map(quoted, _TAGS)
    tagged = rf'tagged: "\n" call "\n" {closed}'
    if not free:
        more = rf' ("\n" {opened} tagged)*' if several else ""
        return [f"start: {opened} tagged{more}", tagged]
    before = f"before: TEXT {opened}" if special else "before[lazy]: /(.|\\n)*<tool_call>/"
    times = "*" if several else "?"
    return [f"start: (before tagged){times} TEXT", before, tagged, r"TEXT: /(.|\n)*/"]


def _python_rules(i, name, schema) -> list[str]:
    """`call_i: name(a=..., b=...)`, keys in the schema's order; not all are required."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    objects = schema.get("type", "object") == "object" and isinstance(properties, dict)
    if not objects or not isinstance(required, list):
        raise UserError(f"the parameters of {name} must be the schema of an object")
    for word in (name, *properties):
        if not word.isidentifier():
            raise UserError(f"tools: {word!r} is no name in the form of calls that the model knows")
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rules = [f'call_{i}: {quoted(name + "(")} args_{i}_0_0 ")"']
    for j, (key, value) in enumerate(properties.items()):
        value = {**value, **shared} if isinstance(value, dict) else value
        rules.append(f"value_{i}_{j}: {json_rule(value)}")
        for some in (0, 1):  # arguments before this one
            comma = ", " if some else ""
            given = f"{quoted(f'{comma}{key}=')} value_{i}_{j} args_{i}_{j + 1}_1"
            absent = "" if key in required else f" | args_{i}_{j + 1}_{some}"
            rules.append(f"args_{i}_{j}_{some}: {given}{absent}")
    return [*rules, *(f'args_{i}_{len(properties)}_{some}: ""' for some in (0, 1))]
