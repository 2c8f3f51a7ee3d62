"""Conversations as people keep them, and what is learnt of each.

A record holds one of these:

    messages                        [{"role": "user", "content": ...}, ...], as OpenAI writes it
    conversations                   [{"from": "human", "value": ...}, ...], as ShareGPT does
    prompt, completion              both text, or both lists of messages: the second is learnt
    instruction, input, output      Alpaca's fields, `input` may be missing and `history` may hold
                                    earlier turns in pairs; or Dolly's, with context and response

and beside them `tools` or `functions` (a list or its JSON), `system` (a system prompt), and `image`
or `images` for the pictures of {"type": "image"} parts. An assistant's message of "weight": 0 is
read and not learnt. `models/text/turns.py` says which tokens are the assistant's.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ...configs.schema import Config, ModelConfig
from ...models.text.turns import assistant_turns
from .examples import Example, Record, RecordError, json_type, shown_keys, text_of
from .transforms import MediaReader

# ShareGPT's names of roles, and others that stand in public data sets.
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "system": "system", "developer": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "ipython": "tool", "function": "tool",
}  # fmt: skip
# After what an assistant, a user and a tool may speak; "" is the beginning.
_BEFORE = {
    "assistant": ("user", "tool"),
    "user": ("", "system", "assistant"),
    "tool": ("assistant", "tool"),
    "system": ("",),
}


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation: messages as `chat.render` takes them.

    given: so many messages at its beginning are not learnt. muted: numbers of those of weight 0.
    """

    messages: list[dict]
    tools: list | None = None
    given: int = 0
    muted: frozenset[int] = frozenset()
    media: dict[str, list] = dataclasses.field(default_factory=dict)


def chat_of(record: Record) -> Chat:
    """The conversation that a record holds, in whichever of the formats above.

    Raises:
      RecordError: it holds none, or its roles are out of order.
    """
    if isinstance(record, str):
        raise RecordError("is plain text; a conversation is a record with messages")
    # A table that was joined from several has nulls where a format is another row's.
    record = {key: value for key, value in record.items() if value is not None}
    given = 0
    for key in ("messages", "conversations"):
        if key in record:
            messages = messages_of(record[key], key)
            break
    else:
        if "instruction" in record:
            messages = _instruction(record)
        elif "prompt" in record and "completion" in record:
            messages = messages_of(record["prompt"], "prompt", "user")
            given = len(messages)
            messages += messages_of(record["completion"], "completion", "assistant")
        else:
            raise RecordError(
                "has none of messages, conversations, prompt and completion, instruction (its "
                f"keys: {shown_keys(record)})"
            )
    begun = with_system(messages, record)
    given += (len(begun) - len(messages)) * bool(given)
    muted = frozenset(i for i, message in enumerate(begun) if not message.pop("weight", 1))
    check_roles(begun)
    said = {i for i, message in enumerate(begun) if message["role"] == "assistant"}
    if said <= muted:
        raise RecordError("has nothing to learn: every assistant turn has weight 0")
    return Chat(begun, tools_of(record), given, muted & said)


def _instruction(record: Mapping) -> list[dict]:
    """The messages of Alpaca's or Dolly's fields."""
    turns = record.get("history") or []
    if not isinstance(turns, list | tuple) or not all(
        isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns
    ):
        raise RecordError("must have a list of pairs under 'history'")
    asked = text_of(record, "instruction")
    for key in ("input", "context"):
        if key in record and (more := text_of(record, key).strip()):
            asked = f"{asked}\n\n{more}"
    answer = next((key for key in ("output", "response") if key in record), None)
    if answer is None:
        raise RecordError(
            f"has an instruction and no output or response (its keys: {shown_keys(record)})"
        )
    spoken = [text for turn in turns for text in turn] + [asked, text_of(record, answer)]
    return messages_of(
        [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(spoken)],
        "turns",
    )


def with_system(messages: list[dict], record: Mapping) -> list[dict]:
    """Messages with the system prompt that a record has beside them in front.

    Raises:
      RecordError: they begin with another one.
    """
    system = record.get("system")
    if not isinstance(system, str) or not system.strip():
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0].get("content") != system:
        raise RecordError("has two system prompts, under 'system' and in its messages")
    return messages


def check_plain(record: Mapping, what: str) -> None:
    """Refuse what a text without a chat format has no place for.

    Raises:
      RecordError: a system prompt or tools.
    """
    if with_system([{"role": "user"}], record)[1:] or tools_of(record):
        raise RecordError(
            f"has a system prompt or tools beside {what}, which have no chat format: make them "
            "lists of messages"
        )


def check_roles(messages: list[dict]) -> None:
    """Raise RecordError unless the roles follow one another as in a conversation that teaches."""
    before = ""
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in _BEFORE:
            known = ", ".join(_BEFORE)
            raise RecordError(f"messages[{i}] has the role {role!r}, not one of {known}")
        if before not in _BEFORE[role]:
            where = f"after {before!r}" if before else "first"
            raise RecordError(f"has roles out of order: messages[{i}] is {role!r}, {where}")
        before = role
    if all(message["role"] != "assistant" for message in messages):
        raise RecordError("has no assistant turn: there is nothing to learn from it")


def messages_of(value, key: str, role: str = "") -> list[dict]:
    """The messages under a key of a record, with the names of roles that templates know.

    Args:
      value: messages, their JSON, or where `role` is given one message or its text.
      key: for messages of errors.
      role: who says a text.

    Raises:
      RecordError: they are not such.
    """
    if isinstance(value, str) and role:
        value = [{"role": role, "content": value}]
    elif isinstance(value, str):  # a table has columns of text
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass
    elif isinstance(value, Mapping) and role:
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        kind = "n empty" * (value == []) + " " + json_type(value)
        raise RecordError(f"must have a list of messages under {key!r}, not a{kind}")
    return [_message(message, f"{key}[{i}]") for i, message in enumerate(value)]


def _message(message, where: str) -> dict:
    if not isinstance(message, Mapping):
        raise RecordError(f"{where} must be a message, not a JSON {json_type(message)}")
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str):
        raise RecordError(f"{where} has no role")
    if role in ("function_call", "tool_call"):  # ShareGPT: the call itself, as JSON
        return {"role": "assistant", "tool_calls": _calls(content, where)}
    own = ("role", "from", "content", "value", "weight", "function_call")
    made = {"role": _ROLES.get(role, role), "content": content}
    made |= {key: value for key, value in message.items() if key not in own}
    if "function_call" in message and not made.get("tool_calls"):  # as OpenAI wrote it at first
        made["tool_calls"] = _calls(message["function_call"], where)
    if content is None and not made.get("tool_calls"):
        raise RecordError(f"{where} has no content")
    if made["role"] == "assistant":
        if not made.get("tool_calls") and not _says_something(content):
            raise RecordError(f"{where} is an assistant turn without text")
        if (weight := message.get("weight", 1)) not in (0, 1):
            raise RecordError(f"{where} has weight={weight!r:.40}, which must be 0 or 1")
        if not weight:
            made["weight"] = 0
    return made


def _says_something(content) -> bool:
    parts = content if isinstance(content, list | tuple) else [content]
    texts = [part.get("text", part) if isinstance(part, Mapping) else part for part in parts]
    return any(not isinstance(text, str) or text.strip() for text in texts)


def _calls(value, where: str) -> list[dict]:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
        return [
            {"function": {"name": call["name"], "arguments": call.get("arguments", {})}}
            for call in (calls if isinstance(calls, list) and calls else [calls])
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RecordError(f"{where} is not a tool call with a name and arguments") from None


def tools_of(record: Mapping) -> list | None:
    """The tools that a record offers, None without any.

    Raises:
      RecordError: they are not a list, nor the JSON of one.
    """
    value = record.get("tools") or record.get("functions")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError:
            raise RecordError("has tools that are not JSON") from None
    if not value:
        return None
    if not isinstance(value, list | tuple):
        raise RecordError(f"must have a list under 'tools', not a {json_type(value)}")
    return list(value)


@dataclasses.dataclass(frozen=True)
class Conversations:
    """The transform of supervised fine-tuning; see the top of this file.

    A prompt and completion that are text are one text, without a chat format: the completion and
    the end of text behind it are learnt. A conversation that is longer than a row ends after the
    last assistant turn that a row holds; one whose first does not fit is a bad record.
    """

    tokenizer: Any
    longest: int  # ids of an example
    learn_all: bool
    date: str
    model: ModelConfig
    media: MediaReader | None
    fields = ("messages", "conversations", "prompt", "completion", "instruction")

    def parse(self, record: Record, folder: str = "") -> tuple[str, str] | Chat:
        if isinstance(record, Mapping) and all(
            isinstance(record.get(key), str) for key in ("prompt", "completion")
        ):
            prompt, completion = (text_of(record, key) for key in ("prompt", "completion"))
            check_plain(record, "a prompt and completion of text")
            if not completion:
                raise RecordError("has an empty completion: there is nothing to learn from it")
            return prompt, completion
        chat = chat_of(record)
        pictures = sum(
            isinstance(part, Mapping) and part.get("type") in ("image", "image_url")
            for message in chat.messages
            if isinstance(message.get("content"), list | tuple)
            for part in message["content"]
        )
        if not pictures:
            return chat
        if not self.model.vision.num_layers:
            raise RecordError("has images, and the model reads none: model.vision.num_layers=0")
        if self.media is None:
            raise RecordError("has images, and rows have no room for them: data.images=0")
        found = self.media.find(record, folder)["image"]
        if len(found) != pictures:
            raise RecordError(f"has {pictures} image parts and {len(found)} image records")
        return dataclasses.replace(chat, media={"image": found})

    def encode(self, parsed: tuple[str, str] | Chat) -> Example:
        """Tokenize, weigh and cut.

        Raises:
          RecordError: the tokenizer or its template cannot express it, or nothing of it fits a row.
        """
        try:
            return self._text(*parsed) if isinstance(parsed, tuple) else self._chat(parsed)
        except UserError as error:
            raise RecordError(f"cannot be written: {error}") from None
        except UnicodeEncodeError:  # "\\ud800" alone is legal JSON and no text
            raise RecordError("has half a surrogate pair in a message") from None

    def _text(self, prompt: str, completion: str) -> Example:
        t = self.tokenizer
        ids = t.encode(prompt + completion)
        whole = [*t.begin_ids, *ids, *[t.eos_id] * (t.eos_id is not None)]
        if len(whole) > self.longest:
            raise RecordError(
                f"has {len(whole)} tokens, more than data.seq_len={self.longest}; it would be cut"
            )
        learnt = np.ones(len(whole), np.float32)
        if not self.learn_all:
            # An id that spans the border belongs to the completion.
            ends = t.spans(ids, prompt + completion)[:, 1]
            learnt[: len(t.begin_ids) + int(np.sum(ends <= len(prompt.encode())))] = 0.0
        return Example(np.asarray(whole, np.int32), learnt, whole=True)

    def _chat(self, chat: Chat) -> Example:
        turns = assistant_turns(
            self.tokenizer, chat.messages, chat.tools, {"date_string": self.date}, self.longest
        )
        spans, muted = turns.spans, []
        if turns.messages:
            each = list(zip(spans, turns.messages, strict=True))
            spans = [span for span, i in each if i >= chat.given and i not in chat.muted]
            muted = [span for span, i in each if i in chat.muted]
        elif chat.given or chat.muted:
            raise RecordError(
                "has turns that are not learnt, and the chat template does not mark one part a turn"
            )
        ids, weights, media, ends = self._expanded(chat, turns.ids, spans, muted)
        if len(ids) <= self.longest:
            stop = len(ids)
        else:
            stop = max((end for end in ends if end <= self.longest), default=0)
            if not stop:
                raise RecordError(
                    f"has {len(ids)} tokens, and its first assistant turn ends behind "
                    f"data.seq_len={self.longest}"
                )
        media = tuple(m for m in media if m.stop <= stop)
        return Example(
            np.asarray(ids[:stop], np.int32), np.asarray(weights[:stop], np.float32), media,
            whole=True, cut=len(ids) - stop,
        )  # fmt: skip

    def _expanded(self, chat: Chat, read: list[int], spans: list, muted: list):
        """ids, weights, media and the ends of turns; a picture is the tokens that stand for it."""
        learnt = np.full(len(read), float(self.learn_all))
        for start, end in spans:
            learnt[start:end] = 1.0
        for start, end in muted:
            learnt[start:end] = 0.0
        ends = {end for _, end in spans}
        if not chat.media:
            return read, learnt, [], sorted(ends)
        assert self.media is not None
        place, waiting = self.tokenizer.special["<|image|>"], list(chat.media["image"])
        ids: list[int] = []
        weights: list[float] = []
        media: list = []
        moved = []
        for at, (i, weight) in enumerate(zip(read, learnt.tolist(), strict=True)):
            if i == place:
                self.media.add("image", waiting.pop(0), ids, media)
                weights += [0.0] * (len(ids) - len(weights))
            else:
                ids.append(i)
                weights.append(weight)
            if at + 1 in ends:
                moved.append(len(ids))
        return ids, weights, media, moved


def of_conversations(config: Config, tokenizer) -> Conversations:
    """The transform that a configuration asks for."""
    data = config.data
    media = MediaReader(tokenizer, config.model, data.seq_len - 1, data.images)
    return Conversations(
        tokenizer, data.seq_len, config.sft.learn == "all", config.sft.date, config.model,
        media if data.images else None,
    )  # fmt: skip
