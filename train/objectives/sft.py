"""Supervised fine-tuning on prompt and completion: the cross-entropy of the completion alone.

A record has `prompt` and `completion`, both text. The prompt is read and weighs nothing; the
completion and the end of text behind it are learnt.
"""

import dataclasses
from typing import Any

import numpy as np

from ...configs.schema import Config
from ..data.examples import Example, Record, RecordError, text_of
from . import next_token


@dataclasses.dataclass(frozen=True)
class PromptCompletion:
    """The transform of records with `prompt` and `completion`.

    Both are tokenized as one text, so that the ids are those of the conversation as it is read
    later; the first id that holds a character of the completion is the first that is learnt.
    """

    tokenizer: Any
    longest: int  # ids of an example: a longer one could not be learnt as a whole
    fields = ("prompt", "completion")

    def parse(self, record: Record, folder: str = "") -> tuple[str, str]:
        if isinstance(record, str):
            raise RecordError("is plain text; train.objective=sft needs prompt and completion")
        prompt, completion = (text_of(record, key) for key in self.fields)
        if not completion:
            raise RecordError("has an empty completion: there is nothing to learn from it")
        return prompt, completion

    def encode(self, parsed: tuple[str, str]) -> Example:
        prompt, completion = parsed
        t = self.tokenizer
        begin = t.begin_ids
        ids = t.encode(prompt + completion)
        whole = [*begin, *ids, *[t.eos_id] * (t.eos_id is not None)]
        if len(whole) > self.longest:
            raise RecordError(
                f"has {len(whole)} tokens, more than data.seq_len={self.longest}; it would be cut"
            )
        learnt = np.zeros(len(whole), np.float32)
        learnt[len(begin) + _ids_of(t, ids, len(prompt.encode())) :] = 1.0
        return Example(np.asarray(whole, np.int32), learnt, whole=True)


def _ids_of(tokenizer, ids: list[int], num_bytes: int) -> int:
    """How many of the first ids stand for the first `num_bytes` bytes of a text, and no more."""
    # SentencePiece may put a space of its own before the first word.
    added = sum(tokenizer.token_bytes[i] for i in ids) - len(tokenizer.decode_bytes(ids))
    ends = np.cumsum([tokenizer.token_bytes[i] for i in ids]) - added
    return int(np.searchsorted(ends, num_bytes, side="right"))


@dataclasses.dataclass(frozen=True, eq=False)
class Sft(next_token.NextToken):
    """Cross-entropy of completions; all else is that of pretraining."""

    def transform(self, config: Config, tokenizer) -> PromptCompletion:
        return PromptCompletion(tokenizer, config.data.seq_len)


def make(config: Config, token_bytes_V) -> Sft:
    """The objective of supervised fine-tuning."""
    return Sft(config.train.z_loss, config.train.loss_chunk, token_bytes_V)
