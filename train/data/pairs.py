"""Pairs of a chosen and a rejected answer to one prompt, as one example of two texts.

A record has `prompt`, `chosen` and `rejected`: three texts, or messages in any of the forms of
`chats.py`, with `tools` and `system` beside them. The answers are one message of the assistant, or
whole conversations that differ in their last message; those begin with `prompt`, or have it among
their messages where it is a text, or need none; `conversations` may stand for `prompt`.
Needs no JAX, as all that readers do.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ...models.text.turns import assistant_turns
from . import chats
from .examples import Example, Record, RecordError, text_of

Messages = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class PairTransform:
    """The transform of records with `chosen` and `rejected`.

    The example holds the chosen text and, behind a border, the rejected one, each with its prompt.
    Answers and what ends them weigh 1, prompts 0; with `ends` a target behind each text alone, so
    that what weighs 1 among a row's tokens is the last one of each text.
    """

    tokenizer: Any
    longest: int  # ids of both texts together: a row holds pairs whole
    date: str  # for chat templates that write today's
    ends: bool = False
    fields = ("chosen", "rejected", "prompt")

    def parse(self, record: Record, folder: str = ""):
        """Prompt, chosen and rejected, all texts or all lists of messages, and tools."""
        if isinstance(record, str):
            raise RecordError("is plain text; pairs need prompt, chosen and rejected")
        if not any(isinstance(record.get(key), list | tuple | Mapping) for key in self.fields):
            prompt, *answers = (text_of(record, key) for key in ("prompt", "chosen", "rejected"))
            chats.check_plain(record, "three texts")
            tools = None
        else:
            prompt, *answers = _conversation(record)
            tools = chats.tools_of(record)
        chosen, rejected = answers
        for key, answer in (("chosen", chosen), ("rejected", rejected)):
            if not answer:
                raise RecordError(f"has an empty answer under {key!r}")
        if chosen == rejected:
            raise RecordError("has the same answer under 'chosen' and 'rejected'")
        return prompt, chosen, rejected, tools

    def encode(self, parsed) -> Example:
        prompt, *answers, tools = parsed
        try:
            if isinstance(prompt, str):
                texts = [self._text(prompt, answer) for answer in answers]
            else:
                texts = [self._chat(prompt, answer, tools) for answer in answers]
        except UserError as error:
            raise RecordError(f"cannot be written: {error}") from None
        except UnicodeEncodeError:  # "\\ud800" alone is legal JSON and no text
            raise RecordError("has half a surrogate pair in a message") from None
        for ids, read in texts:
            if max(read, 1) >= len(ids):
                raise RecordError("has an answer of no token that could be predicted")
        return self._pair([self._weighed(*text) for text in texts])

    def _weighed(self, ids: list[int], read: int) -> tuple[list[int], list[float]]:
        """The ids of a text whose first `read` are the prompt's, and their weights."""
        if self.ends:
            # A target behind the text is what its last token answers to.
            return [*ids, ids[-1]], [0.0] * len(ids) + [1.0]
        return ids, [0.0] * read + [1.0] * (len(ids) - read)

    def _pair(self, texts: list[tuple[list[int], list[float]]]) -> Example:
        (chosen, _), (rejected, _) = texts
        if len(chosen) + len(rejected) > self.longest:
            raise RecordError(
                f"has {len(chosen)} + {len(rejected)} tokens, more than data.seq_len="
                f"{self.longest}; a pair must fit in one row"
            )
        ids, weights = (np.concatenate(parts) for parts in zip(*texts, strict=True))
        return Example(
            ids.astype(np.int32), weights.astype(np.float32), whole=True, borders=(len(chosen),)
        )

    def _text(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """The ids of a prompt and an answer, and how many are the prompt's alone."""
        t = self.tokenizer
        ids = t.encode(prompt + answer)
        ends = t.spans(ids, prompt + answer)[:, 1]
        read = len(t.begin_ids) + int(np.sum(ends <= len(prompt.encode())))
        return [*t.begin_ids, *ids, *[t.eos_id] * (t.eos_id is not None)], read

    def _chat(self, prompt: Messages, answer: Messages, tools) -> tuple[list[int], int]:
        date = {"date_string": self.date}
        turns = assistant_turns(self.tokenizer, [*prompt, *answer], tools, date)
        start, end = turns.spans[-1]
        # A template may write a line break behind the end of a turn, which nobody generates.
        return turns.ids[:end], start


def _conversation(record) -> tuple[Messages, Messages, Messages]:
    chosen, rejected = (
        chats.messages_of(record.get(key), key, "assistant") for key in ("chosen", "rejected")
    )
    given = record.get("prompt")
    if given is None and len(chosen) == 1:
        given = record.get("conversations")
    prompt = [] if given is None else chats.messages_of(given, "prompt", "user")
    before = chosen[:-1]
    if before != rejected[:-1]:
        raise RecordError("has conversations that must differ in their last message alone")
    begins = prompt[0] in before if isinstance(given, str) else prompt in ([], before)
    if before and not begins:
        raise RecordError("has a prompt that is not what its conversations begin with")
    before = before or prompt
    if not before:
        raise RecordError("has no message in its prompt")
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise RecordError(f"must have a message of the assistant as its answer under {key!r}")
    before = chats.with_system(before, record)
    for message in (*before, chosen[-1], rejected[-1]):
        message.pop("weight", None)  # of fine-tuning; here the answers alone are learnt
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise RecordError("has a message without text; pairs are of text alone")
    return before, chosen[-1:], rejected[-1:]
