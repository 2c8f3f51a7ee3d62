"""Continuous batching: requests come and go while others are answered.

A fixed number of slots share one cache. A prompt is read in pieces of few sizes, one piece between
two tokens of the others, so a long prompt delays the others little and no request compiles anything
new. A prompt that begins as what a slot holds, or has held and is not overwritten, takes its
keys and values from there. What a request gives does not depend on the requests beside or before
it, beyond the rounding of matmuls of another size; greedy ids are those of `generate`.

Left out on purpose: paging (a slot has room for `max_length` tokens whatever it holds, and a shared
beginning is copied), speculative decoding.
"""

import collections
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...configs.errors import UserError
from .. import bits
from ..adapters import choose
from ..cache import LayerCache, init_cache
from ..leaf import settled
from ..parallel import sharding
from .engine import (
    check_fit,
    check_ids,
    check_prompts,
    constrain_cache,
    for_decoding,
    next_ids,
    row_keys,
)
from .generate import begin_rows
from .grammar import Constraint, Constraints
from .prefixes import Prefixes
from .sampling import Sampling, check, per_row

# Sizes of the pieces of a prompt: each is compiled once, when first needed.
_PIECES = (16, 128, 1024)
# A word of a mask that forbids nothing.
_EVERY = 0xFFFFFFFF
# The number of a request's adapter where it has none.
_BASE = -1
# Likeliest ids that a request can have beside each token.
TOP = 20


class Full(UserError):
    """There is no free slot now; one becomes free when a request ends."""


class Token(NamedTuple):
    """One step of a request.

    id: the new id. logprob: of the model itself at temperature 1, see `engine.Block`; before a
      grammar's mask, as `top` is.
    top: the likeliest (id, logprob), as many as the request wants.
    text: what has become certain of the text, often nothing or more than this token.
    start: characters of text before this token.
    finish_reason: "stop" or "length" with the last token, as in `generate.Completion`, "error"
      where the text's grammar became too complex to follow, else None.
    """

    id: int
    logprob: float
    top: list[tuple[int, float]]
    text: str
    start: int
    finish_reason: str | None


class _Request:
    """What a slot holds: a prompt that is being read, then a text that is being written."""

    def __init__(self, prompt, row, max_tokens, top, constraint):
        self.prompt, self.row, self.max_tokens, self.top = prompt, row, max_tokens, top
        self.constraint = constraint
        self.read, self.begun = 0, False  # tokens of the prompt, and whether any have been sought
        self.shown = 0  # characters

    @property
    def to_read(self) -> int:
        # The last token of a prompt is the first input of decoding.
        return len(self.prompt) - 1


def _of_row(layers, change):
    """Apply `change(array, axis of rows, ...)` to the arrays of one or two trees of caches."""

    def one(*caches):
        k, v, positions = (
            [getattr(cache, name) for cache in caches] for name in
            ("k_BSKH", "v_BSKH", "positions_BS")
        )  # fmt: skip
        return caches[0].replace(
            k_BSKH=change(k[0].ndim - 4, *k), v_BSKH=change(v[0].ndim - 4, *v),
            positions_BS=change(positions[0].ndim - 2, *positions),
        )  # fmt: skip

    return jax.tree.map(one, *layers, is_leaf=lambda x: isinstance(x, LayerCache))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _read(model, kept, cache, slot, tokens_BT, segments_BT, source, keep, chosen):
    """The cache with a piece of a prompt in one slot, after the first `keep` tokens of `source`.

    Only the first of B rows counts: the others let a mesh that splits rows do so.
    """

    def take(axis, x):
        row = jax.lax.dynamic_slice_in_dim(x, source, 1, axis)
        return jnp.repeat(row, len(tokens_BT), axis)

    def put(axis, x, rows):
        row = jax.lax.slice_in_dim(rows, 0, 1, axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(x, row, slot, axis)

    def cut(layer):
        known = layer.positions_BS < keep
        return layer.replace(positions_BS=jnp.where(known, layer.positions_BS, -1))

    layers = _of_row([cache.layers], take)
    layers = jax.tree.map(cut, layers, is_leaf=lambda x: isinstance(x, LayerCache))
    lengths_B = jnp.full(len(tokens_BT), keep, cache.lengths_B.dtype)
    rows = constrain_cache(cache.replace(layers=layers, lengths_B=lengths_B))
    kept = choose(kept, jnp.full(len(tokens_BT), chosen))
    rows = model.apply(
        {"params": kept}, tokens_BT, segment_ids_BT=segments_BT, cache=rows, method="states"
    ).cache
    return constrain_cache(
        cache.replace(
            layers=_of_row([cache.layers, rows.layers], put),
            lengths_B=put(0, cache.lengths_B, rows.lengths_B),
        )
    )


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _write(model, params, kept, cache, last_B, active_B, steps_B, sampling, rows_B, tops_B,
           masks_BW, chosen_B, vocab_size):  # fmt: skip
    """One token of every active slot: the cache, ids_B, logprobs_B and the TOP likeliest."""
    params, kept = choose(params, chosen_B), choose(kept, chosen_B)
    states = model.apply(
        {"params": kept}, last_B[:, None], segment_ids_BT=active_B[:, None].astype(jnp.int32),
        cache=cache, method="states",
    )  # fmt: skip
    keys_B = jax.vmap(jax.random.fold_in)(row_keys(sampling.seed, rows_B), steps_B)
    ids_B, logprobs_B, _, logits_BV = next_ids(
        model, params, states.hidden_BTD, keys_B, sampling, vocab_size, masks_BW
    )
    width = min(TOP, logits_BV.shape[-1])

    def likeliest():
        all_BV = jax.nn.log_softmax(logits_BV)
        known_V = jnp.arange(logits_BV.shape[-1]) < vocab_size
        return tuple(jax.lax.top_k(jnp.where(known_V, all_BV, -jnp.inf), width))

    def nothing():
        shape = (len(ids_B), width)
        return jnp.zeros(shape, logits_BV.dtype), jnp.zeros(shape, jnp.int32)

    top_logprobs_BW, top_ids_BW = jax.lax.cond(jnp.any(tops_B > 0), likeliest, nothing)
    found = ids_B, logprobs_B, top_ids_BW, top_logprobs_BW
    return constrain_cache(states.cache), tuple(
        sharding.constrain(x, *[None] * x.ndim) for x in found
    )


class Engine:
    """A model with `num_slots` slots; used by one thread at a time, works under `jax.set_mesh`.

    Attributes:
      adapters: the names that a request can have one of.

    slot = engine.insert(prompt_ids, Sampling(0.7, seed=1), max_tokens=64)
    while slot in engine.requests:
        for slot, token in engine.step().items():
            print(token.text)
    """

    def __init__(self, model, params, tokenizer, num_slots: int = 8, max_length: int = 4096,
                 adapters: Sequence[str] = ()):  # fmt: skip
        """Make the cache.

        Args:
          model, params: as `puna.load` gives them.
          num_slots: requests answered at a time.
          max_length: most tokens of a request, prompt and answer together; at most
            `model.config.max_positions`, which it is cut to.
          adapters: names of those that lie side by side in `params`, in the order of
            `puna.load(path, adapter={name: folder})`.

        Raises:
          UserError: an impossible setting; a model that cannot generate.
        """
        for name, value in (("num_slots", num_slots), ("max_length", max_length)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        mesh = jax.sharding.get_abstract_mesh()
        # Rows of one prompt, and of the cache: as many as the mesh can split.
        self._parts = 1 if mesh.empty else sharding.parts("batch", mesh)
        self._rows = num_slots + -num_slots % self._parts
        params = settled(params)
        self.model, self.params, self.tokenizer = for_decoding(model), params, tokenizer
        self.num_slots = num_slots
        self.max_length = min(max_length, model.config.max_positions)
        self.vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
        self.adapters = tuple(adapters)
        self.requests: dict[int, _Request] = {}  # by slot
        self._reading: collections.deque[int] = collections.deque()
        self.reused = 0  # tokens of prompts that were copied and not computed
        self._kept = bits.view(params)
        config, rows, length = self.model.config, self._rows, self.max_length
        self._cache = jax.jit(lambda: constrain_cache(init_cache(config, rows, length)))()
        self._held = Prefixes(rows, length, config.chunk_size)
        # By the time they became free, the latest last.
        self._unused = list(range(num_slots))
        # Of each slot. What is not in use is greedy, which costs the least.
        self._sampling = per_row(Sampling(), 1, rows)
        self._numbers, self._last, self._steps, self._tops = np.zeros((4, rows), np.int32)
        self._chosen = np.full(rows, _BASE, np.int32)
        self._masks = np.full((rows, -(-model.config.vocab_size // 32)), _EVERY, np.uint32)
        self.constraints = Constraints(tokenizer)

    @property
    def free(self) -> int:
        """How many requests can be inserted now."""
        return self.num_slots - len(self.requests)

    def check(self, prompt_ids: Sequence[int], sampling: Sampling, max_tokens: int,
              adapter: str = "") -> None:  # fmt: skip
        """Refuse what `insert` would, but for a lack of slots."""
        if adapter and adapter not in self.adapters:
            there = ", ".join(self.adapters) or "none"
            raise UserError(f"adapter={adapter} is not loaded; there is {there}")
        check_prompts([prompt_ids])
        check(sampling, 1)
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens} must be at least 1")
        check_fit([prompt_ids], [max_tokens], self.max_length, self.vocab_size, "max_length")

    def insert(self, prompt_ids: Sequence[int], sampling: Sampling | None = None,
               max_tokens: int = 64, stop=(), number: int = 0, top: int = 0,
               constraint: Constraint | None = None, adapter: str = "") -> int:  # fmt: skip
        """Take a request and return its slot; `step` does the work.

        Args:
          prompt_ids: at least one id.
          sampling: `Sampling` of one value each; greedy when left out.
          max_tokens: most tokens to make.
          stop: as in `generate.complete`.
          number: requests with one seed and other numbers draw other texts: the one with number
            r draws what row r of `generate` draws with that seed.
          top: how many of the likeliest ids each `Token` has, at most `TOP`.
          constraint: what the text must match, from `self.constraints.compile`; the text ends as
            soon as it can only end.
          adapter: the name of the adapter that answers; empty for the model without any.

        Raises:
          Full: every slot is taken.
          UserError: an impossible setting; a prompt that is empty, too long or outside the
            vocabulary.
        """
        sampling = Sampling() if sampling is None else sampling
        self.check(prompt_ids, sampling, max_tokens, adapter)
        if not 0 <= top <= TOP:
            raise UserError(f"top={top} must lie in 0..{TOP}")
        [prompt], [row] = begin_rows(self.tokenizer, [prompt_ids], stop)
        if not self.free:
            raise Full(f"all {self.num_slots} slots are taken: step, or evict one")
        mask = _EVERY
        if constraint:
            constraint = constraint.copy()
            mask = constraint.allowed(self.model.config.vocab_size)
            row.follows_text = True  # the grammar counts the blank of a first word
        chosen = self.adapters.index(adapter) if adapter else _BASE
        slot = self._place(prompt, chosen)
        self.requests[slot] = _Request(prompt, row, max_tokens, top, constraint)
        self._masks[slot] = mask
        self._reading.append(slot)
        self._set(slot, sampling)
        self._last[slot], self._numbers[slot], self._tops[slot] = prompt[-1], number, top
        self._steps[slot], self._chosen[slot] = 0, chosen
        return slot

    def evict(self, slot: int) -> None:
        """Free a slot whose request is not wanted any more; does nothing if it is free."""
        if self.requests.pop(slot, None) is not None:
            self._unused.append(slot)
            self._set(slot, Sampling())
            self._tops[slot], self._masks[slot] = 0, _EVERY
            if slot in self._reading:
                self._reading.remove(slot)

    def warm_up(self) -> None:
        """Compile all that requests will need; call it before them."""
        for size in _PIECES:
            length = min(size + 1, self.max_length - 1)
            slot = self.insert([0] * length, max_tokens=1)
            while slot in self.requests:
                self.step()
            self._held.forget()

    def step(self) -> dict[int, Token]:
        """Read one piece of the prompt that has waited longest, then make one token a slot.

        Returns:
          by slot, the new token of each request whose prompt has been read. A request's slot is
          free once its token has a finish_reason.

        Raises:
          UserError: the model gives NaN; the engine cannot be used any more.
        """
        if self._reading:
            self._read_piece(self._reading[0])
        active = [slot for slot in self.requests if slot not in self._reading]
        if not active:
            return {}
        active_B = np.isin(np.arange(self._rows), active)
        # JAX may still look at what it is given when the host goes on to change it.
        host = jax.tree.map(
            np.copy, (self._last, active_B, self._steps, self._sampling, self._numbers, self._tops,
                      self._masks, self._chosen)
        )  # fmt: skip
        self._cache, found = _write(
            self.model, self.params, self._kept, self._cache, *host, self.vocab_size
        )
        for slot in active:
            self._held.add(slot, self._last[slot, None])
        ids_B, logprobs_B, top_ids_BW, top_logprobs_BW = jax.device_get(found)
        check_ids(ids_B[active_B])
        tokens = {}
        for slot in active:
            top = self.requests[slot].top
            pairs = zip(top_ids_BW[slot, :top].tolist(), top_logprobs_BW[slot, :top].tolist(),
                        strict=True)  # fmt: skip
            tokens[slot] = self._token(slot, int(ids_B[slot]), float(logprobs_B[slot]), list(pairs))
        return tokens

    def _set(self, slot, sampling):
        for array, value in zip(self._sampling, per_row(sampling, 1, 1), strict=True):
            np.asarray(array)[slot] = np.asarray(value)[0]

    def _place(self, prompt, chosen: int) -> int:
        """Take a free slot: one that holds the beginning of a prompt, else the longest unused."""
        ids = np.asarray(prompt[:-1], np.int32)
        shared = [self._held.shared(slot, ids, chosen) for slot in range(self.num_slots)]
        best = max(shared)
        found = [slot for slot in self._unused if best and shared[slot] == best]
        slot = found[0] if found else self._unused[0]
        self._unused.remove(slot)
        return slot

    def _read_piece(self, slot):
        request, chosen = self.requests[slot], int(self._chosen[slot])
        source = slot
        if not request.begun:
            # Only now: what was inserted before may have been read in the meantime.
            ids = np.asarray(request.prompt[:-1], np.int32)
            shared = [self._held.shared(row, ids, chosen) for row in range(self.num_slots)]
            source = max(range(self.num_slots), key=lambda row: (shared[row], row == slot))
            request.begun, request.read = True, shared[source]
            self._held.copy(source, slot, request.read, chosen)
            self.reused += request.read
        ids = request.prompt[request.read : request.to_read]
        size = next((size for size in _PIECES if len(ids) <= size), _PIECES[-1])
        ids = ids[:size]
        tokens_BT, segments_BT = np.zeros((2, self._parts, size), np.int32)
        tokens_BT[0, : len(ids)], segments_BT[0, : len(ids)] = ids, 1
        self._cache = _read(
            self.model, self._kept, self._cache, np.int32(slot), tokens_BT, segments_BT,
            np.int32(source), np.int32(request.read), np.int32(chosen),
        )  # fmt: skip
        self._held.add(slot, ids)
        request.read += len(ids)
        if request.read >= request.to_read:
            self._reading.popleft()

    def _token(self, slot, new, logprob, top) -> Token:
        request = self.requests[slot]
        row, start = request.row, len(request.row.text)
        row.push([new], [logprob])
        self._last[slot] = new
        self._steps[slot] += 1
        reason = "stop" if row.done else None
        if request.constraint and not row.done:
            request.constraint.push(new)
            self._masks[slot] = request.constraint.allowed(self.model.config.vocab_size)
            if request.constraint.error:
                reason = "error"
            elif request.constraint.done:
                reason = "stop"
        reason = reason or ("length" if len(row.ids) >= request.max_tokens else None)
        text = (row.text if reason else row.certain())[request.shown :]
        request.shown += len(text)
        if reason:
            self.evict(slot)
        return Token(new, logprob, top, text, start, reason)
