"""Speculative decoding: tokens are proposed cheaply and checked all at once by the model.

The token at each place is drawn from the model with the random key of that place, which is the
same without proposals, and a proposal is accepted if it is what was drawn. So a text is the one
without speculation, sampled or greedy, whatever is proposed. A proposal that is one certain id
is accepted with the probability that the rule of arXiv 2211.17192 gives it. A draft model draws
with the same keys: then the probability is at least (1 - d) / (1 + d) where distributions differ
by d in total variation (arXiv 2408.07978), of 1 - d by that rule, which would give other texts.
"""

import itertools

import numpy as np

from ...configs.errors import UserError

# Longest end of a text that is looked up.
_LONGEST = 3


def look_up(ids: np.ndarray, count: int) -> list[int]:
    """The `count` ids after the last earlier place where the text reads as at its end.

    The longest end of up to three ids that stands there earlier is what counts. The continuation
    may run into itself, as that of a text that repeats does. Empty where nothing is found.
    """
    if not count:
        return []
    size = len(ids)
    # Places before which the last n ids stand, too.
    found = np.zeros(0, np.int64)
    for n in range(1, min(_LONGEST, size - 1) + 1):
        places = np.flatnonzero(ids[:-1] == ids[-1]) + 1 if n == 1 else found[found >= n]
        places = places[ids[places - n] == ids[size - n]]
        if not len(places):
            break
        found = places
    if not len(found):
        return []
    start = int(found[-1])
    found = [int(ids[start + i % (size - start)]) for i in range(count)]
    # A patch of a picture is a number below 0, and nothing that a text can have.
    return list(itertools.takewhile(lambda i: i >= 0, found))


def check_draft(tokenizer, draft_tokenizer, config, draft_config, max_length: int) -> None:
    """Refuse a draft model that does not go with a model.

    Raises:
      UserError: another tokenizer; fewer positions than `max_length`; chunks of another size.
    """

    def pieces(tokenizer):
        ids = range(tokenizer.vocab_size)
        return tokenizer.special, [tokenizer.decode_bytes([i], continuation=True) for i in ids]

    if pieces(tokenizer) != pieces(draft_tokenizer):
        raise UserError(
            f"--draft has another tokenizer ({draft_tokenizer.vocab_size} ids, the model "
            f"{tokenizer.vocab_size}): take a smaller model of the same family"
        )
    if draft_config.max_positions < max_length:
        raise UserError(
            f"--draft has model.max_positions={draft_config.max_positions}, which must be at "
            f"least max_length={max_length}: lower --max_length, or take another draft"
        )
    if draft_config.chunk_size not in (0, config.chunk_size):
        raise UserError(
            f"--draft has model.chunk_size={draft_config.chunk_size}, which must be 0 or the "
            f"model's {config.chunk_size}: take another draft"
        )
