"""A conversation in the terminal: `puna chat`.

Ctrl-C stops an answer, never the program. What has been said so far is read again at every turn.
A model that is given tools may call them; each call and its result are one line of the answer.
"""

import contextlib
import json
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import NamedTuple

from ...configs.errors import UserError
from .conversation import Prompt, check_place, with_media
from .profile import Profile
from .sampling import Sampling
from .slots import Engine
from .toolbox import Tool
from .tools import MARKS, Call, Calls

HELP = (
    "/reset forgets the conversation, /image FILE sends a picture with the next message, /audio "
    "FILE a clip, /speed tells how fast the last answer was, /think shows or hides "
    "what is thought, /exit or Ctrl-D ends; Ctrl-C stops an answer"
)
PROFILE_HELP = (
    "/profile shows what you told about yourself, /profile TEXT adds to it, /forget clears it"
)
_ABOUT = "What the user has told about themselves:"
# What reasoning models put around what they think before they answer.
_OPEN, _CLOSE = "<think>", "</think>"

# Longest answer where nothing is told, see `room`.
_MAX_TOKENS = 1024
# Answers with calls in a turn, characters of a result, and of what is shown of it.
_ROUNDS, _RESULT, _SHOWN = 8, 8000, 200


class Speed(NamedTuple):
    """Of one answer. read: tokens of the prompt. made: of the answer. first, whole: seconds."""

    read: int
    made: int
    first: float
    whole: float

    def __str__(self):
        rest = self.whole - self.first
        rate = f", then {(self.made - 1) / rest:.1f} a second" if self.made > 1 and rest else ""
        return (
            f"{self.read} tokens read and the first written in {self.first:.2f} s{rate}; "
            f"{self.made} in {self.whole:.2f} s"
        )


class Thought:
    """Leaves out of an answer, as it comes, what the model thinks."""

    def __init__(self, begun: bool = False):
        """Begin.

        Args:
          begun: the prompt has ended inside a thought, as some templates have it.
        """
        self._inside, self._blank, self._held = begun, begun, ""

    def rest(self, piece: str, final: bool = False) -> str:
        """What has become certain to be no thought; all that is none where it is final."""
        self._held += piece
        made = ""
        while True:
            tag = _CLOSE if self._inside else _OPEN
            text, found, after = self._held.partition(tag)
            if not found and not final:
                # The tag may have begun.
                sizes = range(len(tag) - 1, 0, -1)
                kept = next((n for n in sizes if text.endswith(tag[:n])), 0)
                text, after = text[: len(text) - kept], text[len(text) - kept :]
            if not self._inside:
                # Without the blank lines between a thought and the answer.
                text = text.lstrip() if self._blank else text
                self._blank = self._blank and not text
                made += text
            self._held = after
            if not found:
                return made
            self._blank = self._blank or self._inside
            self._inside = not self._inside


class Chat:
    """A conversation with one engine, of which it takes one slot at a time.

    Attributes:
      messages: what has been said, as `Tokenizer.chat` takes it; without the system message. A clip
        is a part of type image in it, too.
      adapter: the name of the engine's adapter that answers next; empty for none.
      profile: what the user has told about themselves, which follows the system message; or None.
      thinking: whether what a reasoning model thinks is shown.
      speed: of the last answer; None before it.
    """

    def __init__(self, engine: Engine, sampling: Sampling | None = None, system: str = "",
                 max_tokens: int = 0, profile: Profile | None = None,
                 thinking: bool = True,
                 tools: Mapping[str, Tool] | None = None):  # fmt: skip
        """Begin with nothing said.

        Args:
          sampling: with the seed of the first answer; each answer takes the next one.
          system: the system message; none where empty.
          max_tokens: longest answer; 0 for 1,024, or what there is room for.
          tools: functions that the model may call, by name.

        Raises:
          UserError: the tokenizer has no chat format, or none for tools, or an impossible setting.
        """
        self.engine, self.sampling = engine, sampling or Sampling()
        self.max_tokens, self.adapter = max_tokens, ""
        self.profile, self.thinking = profile, thinking
        self.speed: Speed | None = None
        self._system, self._tools = system, tools or {}
        self._functions = [
            {"name": name, "description": tool.description, "parameters": tool.parameters}
            for name, tool in self._tools.items()
        ]
        special = engine.tokenizer.special
        self._marks = {special[mark]: mark for mark in MARKS if mark in special}
        self.reset()
        hello = [{"role": "user", "content": "a"}]
        self._prompt(hello, [])
        chat = engine.tokenizer.chat
        if self._functions and chat(hello, self._functions) == chat(hello):
            raise UserError("tools: this model's chat template knows none; begin without")

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages: list[dict] = []
        self._media, self._attached, self._turn = [], [], 0

    def attach(self, path: str, kind: str = "image") -> None:
        """Let the next message have a picture, or a clip where `kind` is "audio".

        Raises:
          UserError: it cannot be read, or the model reads none.
        """
        config, tokenizer = self.engine.config, self.engine.tokenizer
        path = str(pathlib.Path(path).expanduser())
        place = check_place(config, tokenizer, kind)
        with_media(config, tokenizer, [place], [(kind, path)], self.engine.max_length)
        # The file may be another one at the next turn.
        self._attached.append((kind, pathlib.Path(path).read_bytes()))

    def say(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Yield the answer as it is written; it is remembered as far as it was, thoughts included.

        Args:
          stopped: is asked after each token whether to stop.

        Raises:
          UserError: no room for the message, which is dropped; the chat can continue.
        """
        begun, media = len(self.messages), self._media
        parts = [{"type": "image"}] * len(self._attached)
        content = [*parts, {"type": "text", "text": text}] if parts else text
        self.messages.append({"role": "user", "content": content})
        self._media, self._attached = [*media, *self._attached], []
        try:
            for _ in range(_ROUNDS):
                said, calls = yield from self._answer(stopped)
                if not calls or stopped():
                    return
                # It comes again with its calls: one to a message, since some templates refuse more.
                self.messages.pop()
                for call in calls:
                    if stopped():
                        break
                    line = self._call(said, call)
                    yield line if not said or said.endswith("\n") else f"\n{line}"
                    said = ""
            self.messages.append({"role": "assistant", "content": ""})
            yield f"[no answer after {_ROUNDS} rounds of calls]"
        except UserError:
            del self.messages[begun:]
            self._media = media
            raise

    def _answer(self, stopped) -> Generator[str, None, tuple[str, list[Call]]]:
        """Yield what the model says next, remember it, and give it with the calls in it."""
        (ids, tiles, clips), max_tokens = self._prompt(self.messages, self._media)
        sampling = self.sampling._replace(seed=self.sampling.seed + self._turn)
        tail = self.engine.tokenizer.decode(ids[-8:]).rstrip()
        thought = Thought(begun=tail.endswith(_OPEN))
        found, said, calls, times = Calls(list(self._tools)), "", [], []

        def shown(parts, final=False):
            nonlocal said
            calls.extend(part for part in parts if isinstance(part, Call))
            text = "".join(part for part in parts if isinstance(part, str))
            said += text
            return text if self.thinking else thought.rest(text, final)

        slot = self.engine.insert(
            ids, sampling, max_tokens, adapter=self.adapter, tiles=tiles, clips=clips
        )
        began = time.perf_counter()
        try:
            while slot in self.engine.requests and not stopped():
                for _, token in self.engine.step():
                    times.append(time.perf_counter() - began)
                    parts = [token.text]
                    if self._tools:
                        parts = found.add(token.text + self._marks.get(token.id, ""))
                    if piece := shown(parts):
                        yield piece
            if piece := shown(found.add("", final=True), final=True):
                yield piece
        finally:
            self.engine.evict(slot)
            if times:
                self.speed = Speed(len(ids), len(times), times[0], times[-1])
            self.messages.append({"role": "assistant", "content": said})
            self._turn += 1
        return said, calls

    def _call(self, said, call) -> str:
        """Run a call, remember it with what was said before it and its result; a line of both."""
        try:
            result = str(self._tools[call.name].run(**json.loads(call.arguments)))
        except Exception as error:  # any error is given to the model; it does not end the chat
            result = f"error: {error or type(error).__name__}"
        if len(result) > _RESULT:
            result = f"{result[:_RESULT]}\n[cut]"
        # Half a surrogate pair is no text that can be read again.
        result, arguments = (
            text.encode(errors="replace").decode() for text in (result, call.arguments)
        )
        name = f"call{len(self.messages):05}"  # nine letters and digits, as Mistral's templates ask
        function = {"name": call.name, "arguments": arguments}
        made = [{"id": name, "type": "function", "function": function}]
        self.messages += [
            {"role": "assistant", "content": said, "tool_calls": made},
            {"role": "tool", "tool_call_id": name, "name": call.name, "content": result},
        ]
        return f"[{call.name} {_line(arguments)} -> {_line(result)}]\n"

    def _prompt(self, messages, media) -> tuple[Prompt, int]:
        """What the engine takes of a conversation, and the answer's most tokens."""
        engine = self.engine
        about = self.profile.text() if self.profile else ""
        system = "\n\n".join(filter(None, [self._system, about and f"{_ABOUT}\n{about}"]))
        first = [{"role": "system", "content": system}] if system else []
        ids = engine.tokenizer.chat([*first, *messages], self._functions or None)
        prompt = with_media(engine.config, engine.tokenizer, ids, media, engine.max_length)
        room = engine.max_length - len(prompt.ids)
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt.ids)} tokens, which leaves no room for an "
                f"answer in max_length={engine.max_length}: /reset, or begin with a larger "
                "--max_length"
            )
        max_tokens = min(self.max_tokens or _MAX_TOKENS, room)
        engine.check(prompt.ids, self.sampling, max_tokens, tiles=prompt.tiles)
        return prompt, max_tokens


def _line(text):
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


def run(chat: Chat) -> None:
    """Talk with who types, or with what a pipe says: a message a line, until it ends."""
    typed = sys.stdin.isatty()
    names = chat.engine.adapters
    help_text = HELP + (f"; /adapter NAME: {', '.join(names)}, or none of them" if names else "")
    help_text += f"; {PROFILE_HELP}" if chat.profile else ""
    if typed:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  # input() then edits lines and remembers them
        print(help_text)
    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except KeyboardInterrupt:
            print(f"\n{help_text}")
            continue
        except EOFError:
            print()
            return
        if not typed and not line:
            return
        line = line.strip()
        if line == "/exit":
            return
        if line == "/reset":
            chat.reset()
        elif line == "/speed":
            print(chat.speed or "nothing has been answered yet")
        elif line == "/think":
            chat.thinking = not chat.thinking
            print(f"what is thought is {'shown' if chat.thinking else 'hidden'}")
        elif chat.profile and line.split()[:1] in (["/profile"], ["/forget"]):
            _tell(chat.profile, line)
        elif line.split()[:1] == ["/adapter"]:
            _choose(chat, line.removeprefix("/adapter").strip())
        elif line.split()[:1] in (["/image"], ["/audio"]):
            _attach(chat, line)
        elif line.startswith("/"):
            print(f"{line.split()[0]} is not a command: {help_text}")
        elif line:
            _answer(chat, line)


def _tell(profile, line):
    command, _, text = line.partition(" ")
    try:
        if command == "/forget":
            profile.clear()
            print(f"{profile.path} is empty now")
        elif text.strip():
            profile.add(text.strip())
        else:
            nothing = f"{profile.path} says nothing: /profile TEXT adds to it"
            print(_shown(profile.text()) or nothing)
    except UserError as error:
        print(error, flush=True)


def _choose(chat, name):
    if name and name not in chat.engine.adapters:
        there = ", ".join(chat.engine.adapters) or "none"
        print(f"no adapter is called {name}; there is {there} (--adapter=NAME=DIR)")
        return
    chat.adapter = name
    print(f"{name or 'the model without an adapter'} answers from here on")


def _attach(chat, line):
    command, path = [*line.split(maxsplit=1), ""][:2]
    try:
        chat.attach(path, command.removeprefix("/"))
        print(f"the next message has {path} with it")
    except UserError as error:
        print(error)


def _answer(chat, line):
    # An interrupt may not come inside the engine, whose cache would be lost: it is only noted. One
    # more ends the program, since the first step may be compiling for long.
    noted = []

    def note(number, frame):
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        for piece in chat.say(line, stopped=lambda: bool(noted)):
            print(_shown(piece), end="", flush=True)
        print(" [stopped]" if noted else "", flush=True)
    except UserError as error:
        print(error, flush=True)
    finally:
        signal.signal(signal.SIGINT, before)


def _shown(text: str) -> str:
    """Without the control characters that steer a terminal."""
    return "".join(c for c in text if c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f"))
