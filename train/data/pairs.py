"""Pairs of a chosen and a rejected answer to one prompt, as one example of two texts.

A record has `prompt`, `chosen` and `rejected`: three texts, or three lists of messages of which the
answers are one message of the assistant each. Without `prompt` the two lists are conversations that
differ in their last message. Needs no JAX, as all that readers do.
"""

import dataclasses
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ...models.text.turns import assistant_turns
from .examples import Example, Record, RecordError, json_type, text_of

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
        """Prompt, chosen and rejected: all texts or all lists of messages."""
        if isinstance(record, str):
            raise RecordError("is plain text; pairs need prompt, chosen and rejected")
        if not any(isinstance(record.get(key), list) for key in self.fields):
            prompt, *answers = (text_of(record, key) for key in ("prompt", "chosen", "rejected"))
        else:
            prompt, *answers = _conversation(record)
        chosen, rejected = answers
        for key, answer in (("chosen", chosen), ("rejected", rejected)):
            if not answer or not isinstance(answer, str) and not answer[-1].get("content"):
                raise RecordError(f"has an empty answer under {key!r}")
        if chosen == rejected:
            raise RecordError("has the same answer under 'chosen' and 'rejected'")
        return prompt, chosen, rejected

    def encode(self, parsed) -> Example:
        prompt, *answers = parsed
        encode = self._text if isinstance(prompt, str) else self._chat
        try:
            texts = [encode(prompt, answer) for answer in answers]
        except UserError as error:
            raise RecordError(f"cannot be written: {error}") from None
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

    def _chat(self, prompt: Messages, answer: Messages) -> tuple[list[int], int]:
        date = {"date_string": self.date}
        turns = assistant_turns(self.tokenizer, [*prompt, *answer], variables=date)
        start, end = turns.spans[-1]
        # A template may write a line break behind the end of a turn, which nobody generates.
        return turns.ids[:end], start


def _conversation(record) -> tuple[Messages, Messages, Messages]:
    found = []
    for key in ("chosen", "rejected"):
        messages = record.get(key)
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise RecordError(
                f"has no list of messages under {key!r} but a JSON {json_type(messages)}; prompt, "
                "chosen and rejected must be of one kind"
            )
        found.append(messages)
    chosen, rejected = found
    prompt = record.get("prompt")
    if prompt is None:
        prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
        if prompt != found[1][:-1]:
            raise RecordError(
                "has no prompt, so its conversations must differ in their last message alone"
            )
    if not isinstance(prompt, list) or not prompt:
        raise RecordError("has no message in its prompt")
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        if [m.get("role") for m in messages] != ["assistant"]:
            raise RecordError(f"must have one message of the assistant as its answer under {key!r}")
        if not isinstance(messages[0].get("content"), str):
            raise RecordError(f"has no text as the content of its answer under {key!r}")
    if any(not isinstance(m, dict) or not isinstance(m.get("content"), str) for m in prompt):
        raise RecordError("has a message without text in its prompt; pairs are of text alone")
    return prompt, chosen, rejected
