"""Supervised fine-tuning: the cross-entropy of what the assistant said, or of all (`sft.learn`).

`train/data/chats.py` says what records may look like and what is learnt of each.
"""

import dataclasses

from ...configs.schema import Config
from ..data.chats import Conversations, of_conversations
from . import next_token


@dataclasses.dataclass(frozen=True, eq=False)
class Sft(next_token.NextToken):
    """Cross-entropy of the tokens that are learnt; all else is that of pretraining."""

    def transform(self, config: Config, tokenizer) -> Conversations:
        return of_conversations(config, tokenizer)


def make(config: Config, token_bytes_V) -> Sft:
    """The objective of supervised fine-tuning."""
    return Sft(config.train.z_loss, config.train.loss_chunk, token_bytes_V)
