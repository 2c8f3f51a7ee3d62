"""The program that renders chat templates, in a process of its own: see `template.py`.

It reads lines of JSON, the template and then one context after another, and answers each with a
line. Jinja's immutable sandbox keeps a template from the interpreter; the limits of the process
keep whatever gets past it from files, sockets, other programs and the machine's memory. It has
what `transformers` gives to templates and nothing else of this package.
"""

import contextlib
import datetime
import encodings.unicode_escape  # noqa: F401
import json
import pprint  # noqa: F401
import re
import signal
import sys
import textwrap  # noqa: F401
import time
import unicodedata  # noqa: F401

# Jinja and Python import this, and the unused ones above, when first needed: too late here, where
# no file can be opened by then.
import jinja2.debug  # noqa: F401
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SIZE = 8_000_000  # characters of a rendered template; a conversation has far fewer
_MAX_BYTES = 512 * 2**20  # of address space
_MAX_SECONDS = 60  # of a request whose sender is gone, which else ends this process long before
_PRIVATE = range(0xE000, 0xF900)  # characters without a meaning; two of them mark blocks


class _Environment(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj, attribute):
        # Jinja's own gives an undefined value, which prints as nothing.
        raise SecurityError(f"access to {attribute!r} of {type(obj).__name__} is unsafe")


class _Generation(Extension):
    """`{% generation %}` surrounds the assistant's words, for loss masks."""

    tags = {"generation"}
    marks = ("", "")

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body, lineno=line)

    def marked(self, caller):
        return self.marks[0] + caller() + self.marks[1]


class Template:
    """A compiled template."""

    def __init__(self, source: str):
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": self._now}
        self._generation = environment.extensions[_Generation.identifier]
        self._time = datetime.datetime.now()
        self._template = environment.from_string(source)
        self._has_generation = "generation" in source

    def render(self, context: dict, marks: str) -> tuple[str, list | None]:
        """Return the text and the (start, end) of each generation block in it.

        Args:
          context: names that the template sees.
          marks: two characters that occur neither in the source nor in the context.

        Returns:
          The spans are None where there are no such blocks, or where the template changes what
          they gave, so that they cannot be found in the text.
        """
        self._time = datetime.datetime.now()
        text = self._once(context, ("", ""))
        if not self._has_generation:
            return text, None
        marked = self._once(context, tuple(marks))
        plain, spans, depth = [], [], 0
        at = start = 0
        for part in re.split(f"([{marks}])", marked):
            if part == marks[0]:
                start, depth = (start if depth else at), depth + 1
            elif part == marks[1]:
                depth -= 1
                spans += [(start, at)] * (not depth)
            else:
                plain.append(part)
                at += len(part)
        return text, spans if "".join(plain) == text and not depth else None

    def _once(self, context: dict, marks) -> str:
        self._generation.marks = marks
        parts, size = [], 0
        for part in self._template.generate(context):
            size += len(part)
            if size > MAX_SIZE:
                raise SecurityError(f"writes more than {MAX_SIZE} characters")
            parts.append(part)
        return "".join(parts)

    def _now(self, form):
        return self._time.strftime(form)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own escapes HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message):
    raise TemplateError(str(message))


def limit() -> None:
    """Forbid this process new descriptors, file contents, processes, and much memory."""
    import resource  # which not every system has

    none = ("RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_NPROC", "RLIMIT_CORE")
    for name, most in (*((name, 0) for name in none), ("RLIMIT_AS", _MAX_BYTES)):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # macOS has no RLIMIT_AS
            resource.setrlimit(getattr(resource, name), (most, most))


def main() -> None:
    """Answer requests until there are no more."""
    time.localtime()  # reads the time zone while files can be opened
    limit()
    first = sys.stdin.buffer.readline()
    print("{}", flush=True)
    template = None
    for line in sys.stdin.buffer:
        signal.alarm(_MAX_SECONDS)
        free = (chr(i) for i in _PRIVATE if b"\\u%04x" % i not in first + line)
        try:
            template = template or Template(json.loads(first))
            text, spans = template.render(json.loads(line), next(free) + next(free))
            answer = {"text": text, "spans": spans}
        except Exception as error:  # a template can raise anything that an expression can
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            answer = {"error": f"{kind}{reason}"}
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
