"""Log-probabilities of given tokens: few compiled shapes, numbers that no batch size changes.

What several texts begin with is computed once: the choices of a question go through the model after
the keys and values of their question, questions after those of the examples that stand before all
of them. Logits are made of the continuations only. Rows are sorted by length and padded to one of a
few lengths, a batch is always full, padding is masked, and the log-probabilities of a text are
summed on the host in float64.
"""

import collections
import functools
import math
import os
from collections.abc import Callable, Container, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..configs.errors import UserError
from ..models.cache import Cache, init_cache
from ..models.decode.engine import constrain_cache
from ..models.fusion import Features
from ..models.parallel import sharding
from ..train.objectives import reward

Ids = tuple[int, ...]

# Continuations of one text that share its forward pass where they differ in the last token only,
# as the letters of a multiple-choice question do.
_CANDIDATES = 8
# Tokens whose logits exist at one time.
_CHUNK = 1024
_SHORTEST, _SHORTEST_TAIL = 16, 4
# A beginning of so many tokens, and of a fourth of the longest text, that so many prefixes share is
# worth a pass of its own, and a cache for every row.
_STEM, _SHARE, _SHARERS = 64, 4, 4


class Score(NamedTuple):
    """Of a continuation: log p(continuation | context) in nats, and whether greedy decoding gives
    it, the first of equal logits winning."""

    logprob: float
    greedy: bool


class _Row(NamedTuple):
    """What a row of the last pass reads, and of which texts.

    tail: ids after which something is predicted: the last one of the context and all but the last
    of the continuation. ends: numbers of the texts by the last id of their continuation.
    """

    tail: Ids
    ends: dict[int, list[int]]


class _Group(NamedTuple):
    """Rows after a prefix, of which the first `stem` ids are those of other groups too."""

    prefix: Ids
    rows: list[_Row]
    stem: int = 0

    @property
    def rest(self) -> Ids:
        return self.prefix[self.stem :]

    @property
    def length(self) -> int:
        return len(self.prefix) + max(len(row.tail) for row in self.rows)

    @property
    def pictures(self) -> int:
        """Most ids below 0 of a row."""
        return max(sum(i < 0 for i in (*self.prefix, *row.tail)) for row in self.rows)

    @property
    def shares(self) -> bool:
        """Whether the prefix has a pass of its own, for several rows after it."""
        return len(self.rows) > 1 and len(self.rest) >= _SHORTEST

    @property
    def numbers(self) -> list[int]:
        return [n for row in self.rows for found in row.ends.values() for n in found]


class _Room(NamedTuple):
    """What a row of a cache has room for: tokens, and pictures that layers attend to."""

    tokens: int
    pictures: int


class _Kept(NamedTuple):
    """A cache, and the ids below 0 of each of its rows."""

    cache: Cache
    keys: list[Ids]


def padded(length: int, shortest: int = _SHORTEST) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: a third of a row is padding at most."""
    power = 1 << max(length - 1, shortest - 1).bit_length()
    return power * 3 // 4 if shortest < length <= power * 3 // 4 else power


def score(model, params, texts: Sequence[tuple[Sequence[int], Sequence[int]]],
          batch_size: int, known: Container[int] = (),
          features: Callable[[Ids], np.ndarray] | None = None,
          ) -> Iterator[tuple[int, Score]]:  # fmt: skip
    """Score continuations, yielding the number of each and its score; of each kind of batch the
    longest texts first.

    Args:
      model, params: a `Transformer` and its parameters; works under `jax.set_mesh`.
      texts: (context, continuation) as ids, neither empty.
      batch_size: rows of a forward pass; rounded up to what the mesh splits them into.
      known: numbers of texts whose scores are there already. A batch of such texts alone is passed
        over; the others are as they would be otherwise, so that each score is the same to the bit.
      features: of ids below 0, which may stand in contexts for patches of pictures, the same id for
        the same patch: their features [number of ids, D]. Of a model whose layers attend to
        pictures an id stands for a whole one: [number of ids, U, D], and which exist [.., U].

    Raises:
      UserError: an id outside the vocabulary, or a model that gives NaN.
    """
    groups = _groups(texts, model.config.vocab_size, features is not None)
    parts = sharding.parts("batch")
    batch_size += -batch_size % parts
    run = functools.partial(_pass, model, params, features)
    by_stem: dict[Ids, list[_Group]] = collections.defaultdict(list)
    for group in groups:
        by_stem[group.prefix[: group.stem]].append(group)
    for stem, of_stem in sorted(by_stem.items(), key=lambda item: (-len(item[0]), item[0])):
        room, cache = _room(model.config, of_stem), None
        for batch in _batches(of_stem, batch_size):
            if all(n in known for group in batch for n in group.numbers):
                continue
            if stem and cache is None:
                cache, _ = run(room, None, [0] * parts, [stem] * parts, None)
            yield from _scored(run, batch, cache, room, batch_size)


def _room(config, groups: list[_Group]) -> _Room:
    most = max(group.pictures for group in groups) if config.cross.interval else 0
    return _Room(padded(max(g.length for g in groups)), padded(most, 1) if most else 0)


def _groups(texts, vocab_size: int, patches: bool = False) -> list[_Group]:
    """The texts by what they share."""
    found: dict[Ids, dict[Ids, dict[int, list[int]]]] = collections.defaultdict(dict)
    for number, (context, continuation) in enumerate(texts):
        ids = (*context, *continuation)
        if max(ids) >= vocab_size or min(continuation if patches else ids) < 0:
            raise UserError(
                f"the tokenizer gives id {max(ids)} and the model has ids 0..{vocab_size - 1}: it "
                "is that of another model"
            )
        at = len(context) - 1
        ends = found[ids[:at]].setdefault(ids[at:-1], {})
        ends.setdefault(ids[-1], []).append(number)
    groups = []
    for prefix, tails in found.items():
        rows = []
        for tail, ends in tails.items():
            members = list(ends.items())
            for first in range(0, len(members), _CANDIDATES):
                rows.append(_Row(tail, dict(members[first : first + _CANDIDATES])))
        rows.sort(key=lambda row: (-len(row.tail), row.tail))
        groups.append(_Group(prefix, rows))
    return _stemmed(groups)


def _stemmed(groups: list[_Group]) -> list[_Group]:
    """The groups with the stems that they share with others."""
    groups = sorted(groups, key=lambda group: group.prefix)
    made: list[_Group] = []
    first = 0
    while first < len(groups):
        stem, last = groups[first].prefix, first + 1
        while last < len(groups):
            common = os.path.commonprefix([stem, groups[last].prefix])
            # The first two may share more than the others, but not much more.
            if len(common) < max(_STEM, len(stem) * 3 // 4 if last > first + 1 else 0):
                break
            stem, last = common, last + 1
        longest = max(group.length for group in groups[first:last])
        worth = last - first >= _SHARERS and _SHARE * len(stem) >= longest
        size = len(stem) if worth else 0
        made += [group._replace(stem=size) for group in groups[first:last]]
        first = last
    return made


def _batches(groups: list[_Group], batch_size: int) -> Iterator[list[_Group]]:
    """Groups of one stem in batches: those whose prefix is shared, then single rows."""
    shared = [group for group in groups if group.shares]
    alone = [
        group._replace(rows=[row]) for group in groups if not group.shares for row in group.rows
    ]
    for several in (shared, alone):
        several.sort(key=lambda group: (-group.length, group.prefix, group.rows[0].tail))
        for first in range(0, len(several), batch_size):
            yield several[first : first + batch_size]


def _scored(run, batch: list[_Group], cache, room: _Room, batch_size: int):
    """Score a batch; `cache` holds its stem, if it has one."""
    zeros = [0] * batch_size
    if batch[0].shares:
        cache, _ = run(room, cache, zeros, _filled([g.rest for g in batch], batch_size), None)
        rows = [(i, row) for i, group in enumerate(batch) for row in group.rows]
        rows.sort(key=lambda item: -len(item[1].tail))
        reads = [row.tail for _, row in rows]
    else:
        rows = [(0, group.rows[0]) for group in batch]
        reads = [group.rest + group.rows[0].tail for group in batch]
    for first in range(0, len(rows), batch_size):
        some = rows[first : first + batch_size]
        places = [place for place, _ in some] + zeros[len(some) :]
        ids = _filled(reads[first : first + batch_size], batch_size)
        _, found = run(room, cache, places, ids, [row for _, row in some])
        yield from _read(found, [row for _, row in some])


def _filled(rows: list[Ids], count: int) -> list[Ids]:
    return rows + [(0,)] * (count - len(rows))


def _read(found, rows: list[_Row]) -> Iterator[tuple[int, Score]]:
    logprobs_Rt, greedy_Rt, logprobs_RK, greedy_RK = map(np.asarray, found)
    for r, row in enumerate(rows):
        inner = np.s_[r, : len(row.tail) - 1]
        before = float(np.sum(logprobs_Rt[inner], dtype=np.float64))
        for k, numbers in enumerate(row.ends.values()):
            logprob = before + float(logprobs_RK[r, k])
            if not math.isfinite(logprob):
                raise UserError(
                    f"the model gives a log-probability of {logprob}: its parameters are damaged "
                    "or have diverged"
                )
            greedy = bool(greedy_Rt[inner].all() and greedy_RK[r, k])
            yield from ((number, Score(logprob, greedy)) for number in numbers)


def _pass(model, params, features, room: _Room, kept: _Kept | None, places, ids: list[Ids],
          rows: list[_Row] | None):  # fmt: skip
    """Rows of ids through the model, each after a row of the cache if there is one.

    Args:
      features: see `score`.
      room: what a cache has room for.
      places: of each row, the row of the cache.
      rows: what is predicted at the end of each row; None to make a cache instead.

    Returns:
      (the new cache, None), or (None, what `_predict` gives).
    """
    shortest = _SHORTEST if rows is None or kept is None else _SHORTEST_TAIL
    R, T = len(ids), padded(max(map(len, ids)), shortest)
    tokens_RT = np.zeros((R, T), np.int32)
    lengths_R = np.array([len(row) for row in ids], np.int32)
    for r, row in enumerate(ids):
        tokens_RT[r, : len(row)] = row
    places_R = np.array(places, np.int32)
    before = [kept.keys[place] if kept else () for place in places]
    keys = [first + tuple(i for i in row if i < 0) for first, row in zip(before, ids, strict=True)]
    cache = kept and kept.cache
    if room.pictures:
        images = _whole(features, keys, room.pictures) if (tokens_RT < 0).any() else None
    else:
        images = _patches(features, tokens_RT)
    tokens_RT[tokens_RT < 0] = model.config.vision.token_id
    if rows is None:
        cache = _extend(model, room, params, cache, places_R, tokens_RT, lengths_R, images)
        return _Kept(cache, keys), None
    t = min(padded(max(len(row.tail) for row in rows), _SHORTEST_TAIL), T)
    nexts_Rt = np.zeros((R, t), np.int32)
    tails_R = np.ones(R, np.int32)
    lasts_RK = np.zeros((R, _CANDIDATES), np.int32)
    for r, row in enumerate(rows):
        nexts_Rt[r, : len(row.tail) - 1] = row.tail[1:]
        tails_R[r] = len(row.tail)
        lasts_RK[r, : len(row.ends)] = list(row.ends)
    return None, _predict(
        model, params, cache, places_R, tokens_RT, lengths_R, images, tails_R, nexts_Rt, lasts_RK
    )


def _patches(features, tokens_RT) -> Features | None:
    """The features of ids below 0; None for text alone."""
    here_RT = tokens_RT < 0
    if not here_RT.any():
        return None
    found = [features(tuple(row[here].tolist())) if here.any() else None
             for row, here in zip(tokens_RT, here_RT, strict=True)]  # fmt: skip
    D = next(values_UD.shape[-1] for values_UD in found if values_UD is not None)
    counts_R = here_RT.sum(axis=1)
    U = padded(int(counts_R.max()))
    values_RUD = np.zeros((len(found), U, D), np.float32)
    for r, values_UD in enumerate(found):
        if values_UD is not None:
            values_RUD[r, : len(values_UD)] = values_UD
    return Features(values_RUD, np.arange(U) < counts_R[:, None])


def _whole(features, keys: list[Ids], room: int) -> Features:
    """The features of all pictures of each row, those that a cache knows too."""
    found = {key: [x[0] for x in features((key,))] for key in {k for row in keys for k in row}}
    values_UD, _ = next(iter(found.values()))
    U, D = values_UD.shape
    values_RMUD = np.zeros((len(keys), room, U, D), np.float32)
    valid_RMU = np.zeros((len(keys), room, U), bool)
    for r, row in enumerate(keys):
        for m, key in enumerate(row):
            values_RMUD[r, m], valid_RMU[r, m] = found[key]
    return Features(values_RMUD.reshape(len(keys), -1, D), valid_RMU.reshape(len(keys), -1))


def _states(model, params, cache, tokens_RT, lengths_R, images):
    segments_RT = (jnp.arange(tokens_RT.shape[1]) < lengths_R[:, None]).astype(jnp.int32)
    return model.apply(
        {"params": params}, tokens_RT, segment_ids_BT=segments_RT, cache=cache, images=images,
        method="states",
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("model", "room"))
def _extend(model, room: _Room, params, cache, places_R, tokens_RT, lengths_R, images):
    """The cache of rows that continue rows of another cache, or of empty ones."""
    if cache is None:
        cache = init_cache(model.config, len(tokens_RT), room.tokens, images=room.pictures)
    else:
        cache = cache.take(places_R)
    return _states(model, params, constrain_cache(cache), tokens_RT, lengths_R, images).cache


@functools.partial(jax.jit, static_argnames="model")
def _predict(model, params, cache, places_R, tokens_RT, lengths_R, images, tails_R, nexts_Rt,
             lasts_RK):  # fmt: skip
    """Log-probability of, and whether the largest logit is at, each token inside the continuations,
    [R, t], and each candidate for the token at their ends, [R, K]."""
    R, t = nexts_Rt.shape
    if cache is not None:
        cache = constrain_cache(cache.take(places_R))
    hidden_RTD = _states(model, params, cache, tokens_RT, lengths_R, images).hidden_BTD
    # The last `tails_R` tokens of each row, from index 0 on.
    at_Rt = jnp.clip((lengths_R - tails_R)[:, None] + jnp.arange(t), 0, tokens_RT.shape[1] - 1)
    hidden_RtD = jnp.take_along_axis(hidden_RTD, at_Rt[..., None], axis=1)

    def of(args):
        hidden_RtD, targets_RtK = args
        logits_RtV = model.apply({"params": params}, hidden_RtD, method="logits")
        chosen_RtK = jnp.take_along_axis(logits_RtV, targets_RtK, axis=-1)
        logprobs_RtK = chosen_RtK - jax.nn.logsumexp(logits_RtV, axis=-1, keepdims=True)
        return logprobs_RtK, jnp.argmax(logits_RtV, axis=-1, keepdims=True) == targets_RtK

    slices = math.ceil(R * t / _CHUNK)
    size = math.ceil(t / slices)

    def cut(x_Rt):
        """[R, t, ...] -> [slices, R, size, ...]"""
        x_Rt = jnp.pad(x_Rt, [(0, 0), (0, slices * size - t)] + [(0, 0)] * (x_Rt.ndim - 2))
        return jnp.moveaxis(x_Rt.reshape(R, slices, size, *x_Rt.shape[2:]), 1, 0)

    inner = jax.lax.map(of, (cut(hidden_RtD), cut(nexts_Rt[..., None])))
    inner_Rt = (jnp.moveaxis(x, 0, 1).reshape(R, slices * size)[:, :t] for x in inner)
    end_R1D = jnp.take_along_axis(hidden_RtD, (tails_R - 1)[:, None, None], axis=1)
    end_RK = (x[:, 0] for x in of((end_R1D, lasts_RK[:, None])))
    # Every process of a run on several hosts reads them.
    return tuple(sharding.constrain(x, None, None) for x in (*inner_Rt, *end_RK))


def rewards(model, params, texts: Sequence[Sequence[int]], batch_size: int,
            known: Container[int] = ()) -> Iterator[tuple[int, float]]:  # fmt: skip
    """The value that a reward model gives each text at its last token, the longest texts first.

    Args:
      params: with the vector, see `train.objectives.reward`.
      texts: ids, none empty; the other arguments are as of `score`.

    Raises:
      UserError: a model that gives NaN.
    """
    batch_size += -batch_size % sharding.parts("batch")
    order = sorted(range(len(texts)), key=lambda n: (-len(texts[n]), tuple(texts[n])))
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        if all(n in known for n in some):
            continue
        tokens_BT = np.zeros((batch_size, padded(len(texts[some[0]]))), np.int32)
        lengths_B = np.ones(batch_size, np.int32)
        for row, n in enumerate(some):
            tokens_BT[row, : len(texts[n])] = texts[n]
            lengths_B[row] = len(texts[n])
        values_B = np.asarray(_reward(model, params, tokens_BT, lengths_B))
        if not np.isfinite(values_B[: len(some)]).all():
            raise UserError("the reward model gives NaN: its parameters are damaged")
        yield from zip(some, map(float, values_B), strict=False)


@functools.partial(jax.jit, static_argnames="model")
def _reward(model, params, tokens_BT, lengths_B):
    B, T = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    batch = {
        "tokens_BT": tokens_BT, "positions_BT": positions_BT,
        "segment_ids_BT": (positions_BT < lengths_B[:, None]).astype(jnp.int32),
    }  # fmt: skip
    values_BT, _ = reward.rewards(model, params, batch)
    values_B = jnp.take_along_axis(values_BT, (lengths_B - 1)[:, None], axis=1)[:, 0]
    return sharding.constrain(values_B, None)
