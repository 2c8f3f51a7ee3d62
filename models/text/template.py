"""Chat templates: the Jinja programs that Hugging Face puts beside a tokenizer.

A template is code from a stranger, so it is rendered in another process (`sandbox.py`), which can
open nothing, sees JSON only, and is ended when it takes too long or writes too much. A template
still decides every word that the model reads: take it from where you would take weights.

A rendered template is one string, so a control token can only be recognised by its name. Names
that stand in messages are therefore broken by a private-use character while the template runs
(even a name begun in one string and ended in the next) and encoded as plain text. A template that
looks for such a name inside a message will not find it, and one that rewrites strings character by
character could undo the protection; the built-in formats of `chat.py` have no such gap.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping

import numpy as np

from ...configs.errors import UserError
from .kinds import names_pattern

_MAX_SECONDS = 10.0  # of one rendering; a conversation takes milliseconds
_START_SECONDS = 120.0  # a cold disk on a busy machine
_MAX_ANSWER = 96 * 2**20  # bytes; JSON may take twelve for each character of what is rendered
# Run, not imported: Jinja would be a twelfth of what importing puna takes.
_SANDBOX = pathlib.Path(__file__).with_name("sandbox.py")
_BOOT = "import runpy, sys; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], None, '__main__')"
# Everything else of the environment, tokens and keys too, is no business of a template.
_ENVIRONMENT = ("TZ", "TZDIR", "PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as a model reads it.

    text: what its ids are made of. spans: (start, end) in the text of what a template's generation
      blocks gave; None where it has none. encode: gives the ids.
    """

    text: str
    spans: list[tuple[int, int]] | None
    encode: Callable[[], list[int]]

    @functools.cached_property
    def ids(self) -> list[int]:
        """Of the tokens, made when they are first asked for."""
        return self.encode()


def encode(tokenizer, source: str, context: Mapping) -> Rendered:
    """Render a template and encode it, control tokens recognised outside messages only.

    Args:
      tokenizer: its `special_names` are defined in the template; gives the names of control tokens
        and encodes the text.
      source: the Jinja template.
      context: what else the template sees: "messages", "tools" and so on; these names win.

    Raises:
      UserError: the template fails, is refused by the sandbox, or exceeds its limits.
    """
    try:
        mark = _Mark(tokenizer.special, source, context)
        context = {**tokenizer.special_names, **mark(context)}
    except RecursionError:
        raise UserError("chat_template: its messages or tools are nested too deeply") from None
    text, spans = render(source, context)
    if not mark.used:
        return Rendered(text, spans, lambda: tokenizer.encode(text, allow_special=True))
    if spans is not None:
        spans = [tuple(at - text.count(mark.character, 0, at) for at in span) for span in spans]
    return Rendered(
        text.replace(mark.character, ""), spans, lambda: _ids_of_marked(tokenizer, mark, text)
    )


def _ids_of_marked(tokenizer, mark: "_Mark", text: str) -> list[int]:
    ids, start = [], 0
    for match in mark.names.finditer(text):
        part = text[start : match.start()].replace(mark.character, "")
        ids += tokenizer.encode(part, continuation=start > 0)
        ids.append(tokenizer.special[match.group()])
        start = match.end()
    ids += tokenizer.encode(text[start:].replace(mark.character, ""), continuation=start > 0)
    return ids


def render(source: str, context: Mapping) -> tuple[str, list[tuple[int, int]] | None]:
    """Return the text of a template and the (start, end) of its generation blocks in it.

    The spans are None where the template has no such blocks, or changes what they gave so that
    they cannot be found. Errors as in `encode`.
    """
    answer = _renderer(source).ask(_json(context))
    if "error" in answer:
        raise UserError(f"chat_template: {answer['error']}")
    spans = answer["spans"]
    return answer["text"], None if spans is None else [tuple(span) for span in spans]


class _Mark:
    """Breaks the names of control tokens in strings, so that they no longer match."""

    def __init__(self, special: Mapping[str, int], source: str, context: Mapping):
        self.names = names_pattern(tuple(special))
        self._special = tuple(special)
        self._firsts = {name[0] for name in special}
        self._longest = max(map(len, special), default=0)
        taken = {*source, *_json(context, ensure_ascii=False)}
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


def _json(context: Mapping, **options) -> str:
    try:
        return json.dumps(context, default=_plain, **options)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"chat_template: messages, tools and variables: {error}") from None


def _plain(value):
    """What JSON has for other types; of an image, say, a template only asks whether it is there."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.item() if isinstance(value, np.generic) else f"<{type(value).__name__}>"


class _Renderer:
    """The process of one template; no other template shares it, nor the messages of another."""

    def __init__(self, source: str):
        self._source = json.dumps(source)
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def ask(self, context: str) -> dict:
        """Return `text` and `spans`, or `error`.

        Raises:
          UserError: no answer, or not in time.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = _start()
                self._end = weakref.finalize(self, _end, self._process, os.getpid())
                self._exchange(self._source, _START_SECONDS)
            return self._exchange(context, _MAX_SECONDS)

    def _exchange(self, line: str, seconds: float) -> dict:
        process, began, answer = self._process, time.monotonic(), b""
        assert process and process.stdin and process.stdout
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line.encode() + b"\n")
                process.stdin.flush()
            answer = process.stdout.readline(_MAX_ANSWER)
        finally:
            timer.cancel()
            late = time.monotonic() - began >= seconds
            if late or not answer.endswith(b"\n"):
                self._end()
        if late:
            raise UserError(f"chat_template: takes more than {seconds:g} seconds")
        if process.returncode is not None:
            raise UserError("chat_template: its process ended, or wrote without end")
        return json.loads(answer)


def _start() -> subprocess.Popen:
    found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    homes = [str(pathlib.Path(str(spec.origin)).parent.parent) for spec in found if spec]
    try:
        # A session of its own: signals of the terminal are for this process alone.
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BOOT, str(_SANDBOX), *homes],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={k: v for k, v in os.environ.items() if k in _ENVIRONMENT},
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"chat_template: cannot start {sys.executable} ({error})") from None


def _end(process: subprocess.Popen, owner: int) -> None:
    """End the process of a template and leave nothing of it."""
    if os.getpid() == owner:
        process.kill()
        process.wait()
    else:
        process.returncode = 0  # after a fork: the process, and the pipes' content, is the parent's
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.raw.close()  # type: ignore[union-attr]


@functools.lru_cache(maxsize=4)
def _renderer(source: str) -> _Renderer:
    return _Renderer(source)


os.register_at_fork(after_in_child=_renderer.cache_clear)
