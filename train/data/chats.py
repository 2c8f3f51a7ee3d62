"""Conversations as people keep them, and what is learnt of each.

A record holds one of these:

    messages                        [{"role": "user", "content": ...}, ...], as OpenAI writes it
    conversations                   [{"from": "human", "value": ...}, ...], as ShareGPT does
    prompt, completion              both text, or both lists of messages: the second is learnt
    instruction, input, output      Alpaca's fields; `input` may be missing

and beside them `tools` (functions, or their JSON), `system` (a system prompt), and `image` or
`images` for the pictures of {"type": "image"} parts. `models/text/turns.py` says which tokens are
the assistant's.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ...configs.schema import Config, ModelConfig
from ...models.text.turns import Turns, assistant_turns
from .examples import Example, Record, RecordError, json_type, text_of
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
    """A conversation: messages as `chat.render` takes them; the first `given` are not learnt."""

    messages: list[dict]
    tools: list | None = None
    given: int = 0
    media: dict[str, list] = dataclasses.field(default_factory=dict)


def chat_of(record: Record) -> Chat:
    """The conversation that a record holds, in whichever of the formats above.

    Raises:
      RecordError: it holds none, or its roles are out of order.
    """
    if isinstance(record, str):
        raise RecordError("is plain text; a conversation is a record with messages")
    given = 0
    if "messages" in record:
        messages = _messages(record["messages"], "messages")
    elif "conversations" in record:
        messages = _messages(record["conversations"], "conversations")
    elif "instruction" in record:
        more = record.get("input")
        asked = text_of(record, "instruction")
        if more is not None and (more := text_of(record, "input").strip()):
            asked = f"{asked}\n\n{more}"
        messages = [{"role": "user", "content": asked},
                    {"role": "assistant", "content": text_of(record, "output")}]  # fmt: skip
    elif "prompt" in record and "completion" in record:
        messages = _messages(record["prompt"], "prompt")
        given = len(messages)
        messages += _messages(record["completion"], "completion")
    else:
        keys = ", ".join(repr(str(name)[:40]) for name in list(record)[:8]) or "none"
        raise RecordError(
            f"has none of messages, conversations, prompt and completion, instruction (its keys: "
            f"{keys})"
        )
    system = record.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
        given += bool(given)
    check_roles(messages)
    return Chat(messages, _tools(record.get("tools")), given)


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


def _messages(value, key: str) -> list[dict]:
    if isinstance(value, str):
        role = "assistant" if key == "completion" else "user"
        return [{"role": role, "content": value}]
    if not isinstance(value, list | tuple) or not value:
        raise RecordError(f"must have a list of messages under {key!r}, not a {json_type(value)}")
    made = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise RecordError(f"{key}[{i}] must be a message, not a JSON {json_type(message)}")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str):
            raise RecordError(f"{key}[{i}] has no role")
        if role in ("function_call", "tool_call"):  # ShareGPT: the call itself, as JSON
            made.append({"role": "assistant", "tool_calls": [_call(content, f"{key}[{i}]")]})
            continue
        own = ("role", "from", "content", "value", "weight")
        rest = {k: v for k, v in message.items() if k not in own and v is not None}
        made.append({"role": _ROLES.get(role, role), "content": content} | rest)
        if content is None and not rest.get("tool_calls"):
            raise RecordError(f"{key}[{i}] has no content")
        if role in ("assistant", "gpt") and content == "" and not rest.get("tool_calls"):
            raise RecordError(f"{key}[{i}] is an assistant turn without text")
    return made


def _call(value, where: str) -> dict:
    try:
        call = json.loads(value) if isinstance(value, str) else value
        return {"function": {"name": call["name"], "arguments": call.get("arguments", {})}}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RecordError(f"{where} is not a tool call with a name and arguments") from None


def _tools(value) -> list | None:
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
            self.tokenizer, chat.messages, chat.tools, {"date_string": self.date}
        )
        said = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        spans = turns.spans
        if len(spans) == len(said):
            spans = [span for span, i in zip(spans, said, strict=True) if i >= chat.given]
        ids, weights, media, ends = self._expanded(chat, Turns(turns.ids, spans))
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

    def _expanded(self, chat: Chat, turns: Turns):
        """ids, weights, media and the ends of turns; a picture is the tokens that stand for it."""
        learnt = np.full(len(turns.ids), float(self.learn_all))
        for start, end in turns.spans:
            learnt[start:end] = 1.0
        ends = {end for _, end in turns.spans}
        if not chat.media:
            return turns.ids, learnt, [], sorted(ends)
        assert self.media is not None
        place, waiting = self.tokenizer.special["<|image|>"], list(chat.media["image"])
        ids: list[int] = []
        weights: list[float] = []
        media: list = []
        moved = []
        for at, (i, weight) in enumerate(zip(turns.ids, learnt.tolist(), strict=True)):
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
