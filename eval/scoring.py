"""Log-probabilities of given tokens: few compiled shapes, numbers that no batch size changes.

Texts are sorted by length and padded to one of a few lengths, a batch is always full, padding is
masked, and the log-probabilities of a text are summed on the host in float64.
"""

import collections
import functools
import math
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..configs.errors import UserError
from ..models.parallel import sharding

# Continuations of one text that share its forward pass where they differ in the last token only,
# as the letters of a multiple-choice question do.
_CANDIDATES = 8
# Tokens whose logits exist at one time.
_CHUNK = 1024
_SHORTEST = 16


class Score(NamedTuple):
    """Of a continuation: log p(continuation | context) in nats, and whether greedy decoding gives
    it, the first of equal logits winning."""

    logprob: float
    greedy: bool


def padded(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: a third of a row is padding at most."""
    power = 1 << max(length - 1, _SHORTEST - 1).bit_length()
    return power * 3 // 4 if _SHORTEST < length <= power * 3 // 4 else power


def score(model, params, texts: Sequence[tuple[Sequence[int], Sequence[int]]],
          batch_size: int, known: Container[int] = ()) -> Iterator[tuple[int, Score]]:  # fmt: skip
    """Score continuations, the longest texts first, yielding the number of each and its score.

    Args:
      model, params: a `Transformer` and its parameters; works under `jax.set_mesh`.
      texts: (context, continuation) as ids, neither empty.
      batch_size: rows of a forward pass; rounded up to what the mesh splits them into.
      known: numbers of texts whose scores are there already. A batch of such texts alone is passed
        over; the others are as they would be otherwise, so that each score is the same to the bit.

    Raises:
      UserError: an id outside the vocabulary, or a model that gives NaN.
    """
    rows = _rows(texts, model.config.vocab_size)
    parts = sharding.parts("batch")
    batch_size += -batch_size % parts
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        if all(n in known for _, members in batch for found in members.values() for n in found):
            continue
        T = padded(len(batch[0][0]))
        tokens_BT = np.zeros((batch_size, T), np.int32)
        lengths_B = np.ones(batch_size, np.int32)
        lasts_BK = np.zeros((batch_size, _CANDIDATES), np.int32)
        for row, (ids, members) in enumerate(batch):
            tokens_BT[row, : len(ids)] = ids
            lengths_B[row] = len(ids)
            lasts_BK[row, : len(members)] = list(members)
        found = _forward(model, params, tokens_BT, lengths_B, lasts_BK)
        logprobs_BT, greedy_BT, logprobs_BK, greedy_BK = map(np.asarray, found)
        for row, (ids, members) in enumerate(batch):
            for k, numbers in enumerate(members.values()):
                for number in numbers:
                    # The tokens before the last one of the continuation.
                    inner = np.s_[row, len(ids) - len(texts[number][1]) : len(ids) - 1]
                    logprob = float(np.sum(logprobs_BT[inner], dtype=np.float64))
                    logprob += float(logprobs_BK[row, k])
                    if not math.isfinite(logprob):
                        raise UserError(
                            f"the model gives a log-probability of {logprob}: its parameters are "
                            "damaged or have diverged"
                        )
                    greedy = bool(greedy_BT[inner].all() and greedy_BK[row, k])
                    yield number, Score(logprob, greedy)


def _rows(texts, vocab_size: int) -> list[tuple[tuple[int, ...], dict[int, list[int]]]]:
    """What goes through the model: ids but the last, and {last id: numbers of texts}."""
    found: dict[tuple[int, ...], dict[int, list[int]]] = collections.defaultdict(dict)
    for number, (context, continuation) in enumerate(texts):
        ids = (*context, *continuation)
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise UserError(
                f"the tokenizer gives id {max(ids)} and the model has ids 0..{vocab_size - 1}: it "
                "is that of another model"
            )
        found[ids[:-1]].setdefault(ids[-1], []).append(number)
    rows = []
    for ids in sorted(found, key=lambda ids: (-len(ids), ids)):
        members = list(found[ids].items())
        for first in range(0, len(members), _CANDIDATES):
            rows.append((ids, dict(members[first : first + _CANDIDATES])))
    return rows


@functools.partial(jax.jit, static_argnames="model")
def _forward(model, params, tokens_BT, lengths_B, lasts_BK):
    """Log-probability of, and whether the largest logit is at, each next token of the rows, [B, T],
    and each candidate for the token after the row, [B, K]."""
    B, T = tokens_BT.shape
    segments_BT = (jnp.arange(T) < lengths_B[:, None]).astype(jnp.int32)
    hidden_BTD = model.apply(
        {"params": params}, tokens_BT, segment_ids_BT=segments_BT, method="states"
    ).hidden_BTD

    def of(args):
        hidden_BtD, targets_BtK = args
        logits_BtV = model.apply({"params": params}, hidden_BtD, method="logits")
        chosen_BtK = jnp.take_along_axis(logits_BtV, targets_BtK, axis=-1)
        logprobs_BtK = chosen_BtK - jax.nn.logsumexp(logits_BtV, axis=-1, keepdims=True)
        return logprobs_BtK, jnp.argmax(logits_BtV, axis=-1, keepdims=True) == targets_BtK

    slices = math.ceil(B * T / _CHUNK)
    t = math.ceil(T / slices)

    def cut(x_BT):
        """[B, T, ...] -> [slices, B, t, ...]"""
        x_BT = jnp.pad(x_BT, [(0, 0), (0, slices * t - T)] + [(0, 0)] * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(B, slices, t, *x_BT.shape[2:]), 1, 0)

    next_BT1 = jnp.roll(tokens_BT, -1, axis=1)[..., None]
    inner = jax.lax.map(of, (cut(hidden_BTD), cut(next_BT1)))
    inner_BT = (jnp.moveaxis(x, 0, 1).reshape(B, slices * t)[:, :T] for x in inner)
    end_B1D = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
    end_BK = (x[:, 0] for x in of((end_B1D, lasts_BK[:, None])))
    # Every process of a run on several hosts reads them.
    return tuple(sharding.constrain(x, None, None) for x in (*inner_BT, *end_BK))
