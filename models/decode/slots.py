"""Continuous batching: requests come and go while others are answered.

A fixed number of slots share one cache. Its layers without chunks have pages, see `pages`: a
request takes as many as its tokens need, or waits where others have them. A prompt is read in
pieces of few sizes, one piece between two tokens of the others, so a long prompt delays the others
little and no request compiles anything new. A prompt that begins as another did, whose pages are
still there, shares them; of layers with chunks, it copies its last chunk from a slot that has it.
What a request gives does not depend on the requests beside or before it, beyond the rounding of
matmuls of another size; greedy ids are those of `generate`.

With `speculate`, tokens are proposed and checked several at a time, see `speculation`.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ...configs.errors import UserError
from ..parallel import sharding
from ..vision import COLOURS
from . import clips as sound
from .cached_model import BASE, EVERY, TOP, CachedModel, Place
from .engine import check_fit, check_ids, check_prompts
from .generate import begin_rows
from .grammar import Constraint, Constraints
from .pages import Pools
from .pictures import Attended, reader, without_places
from .prefixes import Prefixes
from .sampling import Sampling, check, per_row
from .speculation import look_up

# Sizes of the pieces of a prompt: each is compiled once, when first needed.
PIECES = (16, 128, 1024)


class Full(UserError):
    """There is no free slot now, or no room in the cache; a request that ends leaves some."""


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

    def __init__(self, prompt, row, max_tokens, top, constraint, pictures, clips):
        self.prompt, self.row, self.max_tokens, self.top = prompt, row, max_tokens, top
        self.constraint, self.pictures, self.clips = constraint, pictures, clips
        # What is the same in prompts that begin alike, of all tokens but the last.
        keys = np.asarray(prompt, np.int64)
        for media in filter(None, (pictures, clips)):
            media.mark(keys)
        self.keys = keys[:-1]
        self.read, self.begun = 0, False  # tokens of the prompt, and whether any have been sought
        self.shown = 0  # characters

    @property
    def to_read(self) -> int:
        # The last token of a prompt is the first input of decoding.
        return len(self.prompt) - 1


class Engine:
    """A model with `num_slots` slots; used by one thread at a time, works under `jax.set_mesh`.

    slot = engine.insert(prompt_ids, Sampling(0.7, seed=1), max_tokens=64)
    while slot in engine.requests:
        for slot, token in engine.step():
            print(token.text)

    Attributes:
      adapters: the names that a request can have one of.
      free: how many requests can be inserted now, if there is room for their tokens.
      reused: tokens of prompts that were there and not computed.
      proposed, accepted: tokens of texts that were proposed, and of those, that were right.
    """

    def __init__(self, model, params, tokenizer, num_slots: int = 8, max_length: int = 4096,
                 adapters: Sequence[str] = (), speculate: int = 0, draft=None,
                 cache_dtype: str = "", max_images: int = 1, cache_tokens: int = 0):  # fmt: skip
        """Make the cache.

        Args:
          model, params: as `puna.load` gives them.
          num_slots: requests answered at a time.
          max_length: most tokens of a request, prompt and answer together; at most
            `model.config.max_positions`, which it is cut to.
          adapters: names of those that lie side by side in `params`, in the order of
            `puna.load(path, adapter={name: folder})`.
          speculate: most tokens of a text that are proposed and checked at a time.
          draft: model and parameters that propose them, see `speculation.check_draft`; left out,
            they are looked up in the text so far.
          cache_dtype: of keys and values, see `init_cache`.
          max_images: most pictures of a request, for which every slot keeps room where layers
            attend to pictures; without meaning for other models.

        Raises:
          UserError: an impossible setting; a model that cannot generate.
        """
        for name, value, least in (
            ("num_slots", num_slots, 1), ("max_length", max_length, 1),
            ("speculate", speculate, 0 if draft is None else 1), ("max_images", max_images, 0),
        ):  # fmt: skip
            if value < least:
                raise UserError(f"{name}={value} must be at least {least}")
        mesh = jax.sharding.get_abstract_mesh()
        # Rows of one prompt, and of the cache: as many as the mesh can split.
        self._parts = 1 if mesh.empty else sharding.parts("batch", mesh)
        self._rows = num_slots + -num_slots % self._parts
        self.config, self.tokenizer = model.config, tokenizer
        self.num_slots = num_slots
        self.max_length = min(max_length, model.config.max_positions)
        self.vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
        self.adapters = tuple(adapters)
        self.requests: dict[int, _Request] = {}  # by slot
        self._reading: collections.deque[int] = collections.deque()
        self.reused = self.proposed = self.accepted = 0
        rows, length = self._rows, self.max_length
        shape = (rows, length, self.vocab_size, cache_dtype)
        self._pages = Pools(rows, length, self._parts, cache_tokens)
        # A text is then that of the text model, whatever is written beside it.
        attends = model.config.cross.interval and not model.config.cross.imageless
        self.max_images = max_images if attends else 0
        self._model = CachedModel(model, params, *shape, self.max_images, self._pages.shape)
        self._draft = draft and CachedModel(*draft, *shape, 0, self._pages.shape)
        self._speculate = speculate
        self._held = Prefixes(rows, length, model.config.chunk_size)
        # By the time they became free, the latest last.
        self._unused = list(range(num_slots))
        # Of each slot. What is not in use is greedy, which costs the least.
        self._sampling = per_row(Sampling(), 1, rows)
        self._numbers, self._last, self._tops = np.zeros((3, rows), np.int32)
        self._chosen = np.full(rows, BASE, np.int32)
        self._masks = self._no_masks(1)[:, 0]
        self.constraints = Constraints(tokenizer)

    @property
    def free(self) -> int:
        """How many requests can be inserted now."""
        return self.num_slots - len(self.requests)

    def check(self, prompt_ids: Sequence[int], sampling: Sampling, max_tokens: int,
              adapter: str = "", tiles=None) -> None:  # fmt: skip
        """Refuse what `insert` would, but for a lack of slots and its own settings."""
        if adapter and adapter not in self.adapters:
            there = ", ".join(self.adapters) or "none"
            raise UserError(f"adapter={adapter} is not loaded; there is {there}")
        check_prompts([prompt_ids])
        check(sampling, 1)
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens} must be at least 1")
        name = (
            "max_length" if self.max_length < self.config.max_positions else "model.max_positions"
        )
        if tiles is not None and self.config.cross.interval:
            reader(self.config, None, prompt_ids, tiles, 1, self.max_images)
            prompt_ids = without_places(self.config, prompt_ids)
        check_fit([prompt_ids], [max_tokens], self.max_length, self.vocab_size, name)

    def insert(self, prompt_ids: Sequence[int], sampling: Sampling | None = None,
               max_tokens: int = 64, stop=(), number: int = 0, top: int = 0,
               constraint: Constraint | None = None, adapter: str = "", tiles=None,
               clips: Sequence = ()) -> int:  # fmt: skip
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
          tiles: of the pictures whose tokens are in the prompt, see `pictures.expand`; what a draft
            proposes, it proposes without having seen them.
          clips: likewise of sound, see `clips.expand`.

        Raises:
          Full: every slot is taken, or the cache.
          UserError: an impossible setting; a prompt that is empty, too long or outside the
            vocabulary.
        """
        sampling = Sampling() if sampling is None else sampling
        self.check(prompt_ids, sampling, max_tokens, adapter, tiles)
        if not 0 <= top <= TOP:
            raise UserError(f"top={top} must lie in 0..{TOP}")
        [prompt], [row] = begin_rows(self.tokenizer, [prompt_ids], stop)
        if not self.free:
            raise Full(f"all {self.num_slots} slots are taken: step, or evict one")
        mask = EVERY
        if constraint:
            constraint = constraint.copy()
            mask = constraint.allowed(self.config.vocab_size)
            row.follows_text = True  # the grammar counts the blank of a first word
        chosen = self.adapters.index(adapter) if adapter else BASE
        pictures, heard, params = None, None, self._model.params
        if tiles is not None and len(tiles):
            pictures = reader(self.config, params, prompt, tiles, self._parts, self.max_images)
        if len(clips):
            heard = sound.reader(self.config, params, prompt, clips, self._parts)
        request = _Request(prompt, row, max_tokens, top, constraint, pictures, heard)
        slot = self._place(request, chosen)
        self.requests[slot] = request
        self._masks[slot] = mask
        self._reading.append(slot)
        self._set(slot, sampling)
        self._last[slot], self._numbers[slot], self._tops[slot] = prompt[-1], number, top
        self._chosen[slot] = chosen
        return slot

    def evict(self, slot: int) -> None:
        """Free a slot whose request is not wanted any more; does nothing if it is free."""
        if self.requests.pop(slot, None) is not None:
            self._unused.append(slot)
            self._pages.of(slot).remove(slot)
            self._set(slot, Sampling())
            self._tops[slot], self._masks[slot] = 0, EVERY
            if slot in self._reading:
                self._reading.remove(slot)

    def stream(self, *request, **settings) -> Iterator[Token]:
        """Insert the only request, see `insert`, and yield its tokens; evict it if left early."""
        slot = self.insert(*request, **settings)
        held = self.requests[slot]

        def tokens():
            try:
                while self.requests.get(slot) is held:
                    for found, token in self.step():
                        if found == slot:
                            yield token
            finally:
                if self.requests.get(slot) is held:
                    self.evict(slot)

        return tokens()

    def warm_up(self) -> None:
        """Compile all that requests will need; call it before them."""
        # One token at a time, then several.
        for size, most in [*((size, 1) for size in PIECES), (1, min(2, self.max_length - 2))]:
            length = min(size + 1, self.max_length - most)
            prompts = [([0] * length, None)]
            if self.max_images:
                vision = self.config.vision
                blank = np.zeros((vision.max_tiles, *[vision.image_size] * 2, COLOURS), np.float32)
                prompts.append(([vision.token_id, *[0] * (length - 1)], [(blank, 1)]))
            for prompt, tiles in prompts:
                for _ in self.stream(prompt, max_tokens=most, tiles=tiles):
                    pass
                self._held.forget()
                self._pages.forget()
        self.proposed = self.accepted = 0

    def step(self) -> list[tuple[int, Token]]:
        """Read one piece of the prompt that has waited longest, then write in all other slots.

        Returns:
          slots and new tokens of each request whose prompt has been read, one or, where proposals
          were accepted, several, in order. A request's slot is free once its token has a
          finish_reason.

        Raises:
          UserError: the model gives NaN; the engine cannot be used any more.
        """
        if self._reading:
            self._read_piece(self._reading[0])
        active = [slot for slot in self.requests if slot not in self._reading]
        if not active:
            return []
        proposals = self._proposals(active)
        T = 1 + (self._speculate if any(map(len, proposals.values())) else 0)
        inputs_BT, masks_BTW = np.zeros((self._rows, T), np.int32), self._no_masks(T)
        counts_B = np.zeros(self._rows, np.int32)
        for slot in active:
            found = self._allow(slot, proposals[slot], masks_BTW[slot])
            proposals[slot], counts_B[slot] = found, 1 + len(found)
            inputs_BT[slot, : 1 + len(found)] = self._last[slot], *found
        ids_BT, logprobs_BT, top_ids, top_logprobs = self._model.write(
            inputs_BT, counts_B, self._place_of_rows(), np.copy(self._tops), masks_BTW,
            self._attending(active), self._pages.table(),
        )  # fmt: skip
        made = []
        for slot in active:
            check_ids(ids_BT[slot, : counts_B[slot]])
            request, proposed, before = self.requests[slot], proposals[slot], len(made)
            for t in range(counts_B[slot]):
                pairs = zip(top_ids[slot, t].tolist(), top_logprobs[slot, t].tolist(), strict=True)
                top = list(pairs)[: request.top]
                new = int(ids_BT[slot, t])
                self._add(slot, inputs_BT[slot, t : t + 1])  # before the slot may become free
                made.append((slot, self._token(slot, new, float(logprobs_BT[slot, t]), top)))
                if made[-1][1].finish_reason or new != (proposed[t] if t < len(proposed) else None):
                    break
            count = len(made) - before
            self.proposed += len(proposed)
            self.accepted += count - 1
        return made

    def _attending(self, active) -> np.ndarray:
        """Which rows attend to pictures."""
        chosen = [s for s in active if isinstance(self.requests[s].pictures, Attended)]
        return np.isin(np.arange(self._rows), chosen)

    def _place_of_rows(self) -> Place:
        # JAX may still look at what it is given when the host goes on to change it.
        lengths, steps = np.zeros((2, self._rows), np.int32)
        for slot, request in self.requests.items():
            steps[slot] = len(request.row.ids)
            lengths[slot] = request.to_read + steps[slot]
        return Place(
            lengths, steps, *jax.tree.map(np.copy, (self._numbers, self._sampling, self._chosen))
        )

    def _proposals(self, active) -> dict[int, list[int]]:
        """Ids that may follow the last one of each slot, as many as there is use for."""
        limits = {slot: self._limit(slot) for slot in active}
        if self._draft is None:
            return {
                slot: look_up(np.append(self._held.ids(slot), self._last[slot]), limit)
                for slot, limit in limits.items()
            }
        limits_B = np.full(self._rows, -1, np.int32)
        limits_B[active] = list(limits.values())
        ids_BT = self._draft.propose(
            np.copy(self._last), limits_B, self._place_of_rows(), np.copy(self._masks),
            self._speculate, self._pages.table(),
        )  # fmt: skip
        for slot, limit in limits.items():
            check_ids(ids_BT[slot, :limit])
        return {slot: ids_BT[slot, :limit].tolist() for slot, limit in limits.items()}

    def _limit(self, slot) -> int:
        """How many proposals are of use."""
        request = self.requests[slot]
        made = len(request.row.ids)
        limit = min(self._speculate, request.max_tokens - made - 1)
        if chunk := self.config.chunk_size:
            # In layers with chunks the next one takes the place of this one, which is still needed
            # where proposals are refused.
            limit = min(limit, chunk - 1 - (request.to_read + made) % chunk)
        return limit

    def _allow(self, slot, proposed, masks_TW) -> list[int]:
        """The proposals that a request's format allows; writes the masks of them and of the next.

        The first that it forbids is never drawn, nor is there any use in what comes after it.
        """
        masks_TW[0] = self._masks[slot]
        constraint = self.requests[slot].constraint
        if not constraint:
            return proposed
        constraint = constraint.copy()
        for t, new in enumerate(proposed):
            if not masks_TW[t, new // 32] >> (new % 32) & 1:
                return proposed[:t]
            constraint.push(new)
            if constraint.done or constraint.error:
                return proposed[: t + 1]
            masks_TW[t + 1] = constraint.allowed(self.config.vocab_size)
        return proposed

    def _no_masks(self, T):
        words = -(-self.config.vocab_size // 32)
        return np.full((self._rows, T, words), EVERY, np.uint32)

    def _set(self, slot, sampling):
        for array, value in zip(self._sampling, per_row(sampling, 1, 1), strict=True):
            np.asarray(array)[slot] = np.asarray(value)[0]

    def _add(self, slot, keys):
        """Note what a slot has in its cache, from where it was on."""
        self._held.add(slot, keys)
        self._pages.of(slot).add(slot, keys)

    def _place(self, request, chosen: int) -> int:
        """Take a free slot where there is room, and pages for it.

        The one that holds the beginning of the prompt, else the longest unused.
        """
        keys = request.keys
        found = {pool: pool.match(keys, chosen).count for pool in self._pages.parts}
        shared = {
            slot: (found[self._pages.of(slot)], self._held.shared(slot, keys, chosen))
            for slot in self._unused
        }
        most = len(request.prompt) + request.max_tokens
        for slot in sorted(self._unused, key=lambda slot: shared[slot], reverse=True):
            if self._pages.of(slot).admit(slot, chosen, most):
                self._unused.remove(slot)
                return slot
        raise Full(f"there is no room now for {most} tokens: step, or evict a request")

    def _begin(self, slot, request, chosen: int) -> tuple[int, bool, tuple[int, int]]:
        """Find what there is of a prompt, only now: more may have been read since it came.

        Returns:
          the slot that has what is not in pages; whether that is all that is found, pictures too;
          and a page to copy, see `Pages.begin`.
        """
        pool = self._pages.of(slot)
        found = pool.match(request.keys, chosen)
        keys = request.keys[: found.count]
        shared = [self._held.shared(row, keys, chosen) for row in range(self.num_slots)]
        source = max(range(self.num_slots), key=lambda row: (shared[row], row == slot))
        chunk = self.config.chunk_size
        # Where a chunk begins nothing of those before is needed.
        begins = found.count // chunk * chunk if chunk else found.count
        request.begun, request.read = True, max(begins, shared[source])
        holds = shared[source] == request.read
        source = source if holds else slot
        copy = pool.begin(slot, found, request.read)
        self._held.copy(source, slot, request.keys[: request.read], chosen)
        self.reused += request.read
        return source, holds, copy

    def _read_piece(self, slot):
        request, chosen = self.requests[slot], int(self._chosen[slot])
        source, holds, copy = slot, True, (0, 0)
        if first := not request.begun:
            source, holds, copy = self._begin(slot, request, chosen)
        ids = request.prompt[request.read : request.to_read]
        size = next((size for size in PIECES if len(ids) <= size), PIECES[-1])
        ids = ids[:size]
        stop = request.read + len(ids)
        tokens_BT, segments_BT = np.zeros((2, self._parts, size), np.int32)
        tokens_BT[0, : len(ids)], segments_BT[0, : len(ids)] = ids, 1
        table_N = self._pages.table()[slot]
        place = slot, tokens_BT, segments_BT, source, request.read, chosen, table_N, copy
        known = request.read if holds else 0
        images, before_BS = self._pictures_of(request, first, known, stop, size)
        clips = request.clips and request.clips.piece(request.read, stop, size)
        self._model.read(*place, images, before_BS, clips)
        if self._draft:
            self._draft.read(*place)
        self._add(slot, request.keys[request.read : stop])
        request.read = stop
        if request.read >= request.to_read:
            self._reading.popleft()

    def _pictures_of(self, request, first: bool, known: int, stop: int, size: int):
        """`images` and `before_BS` of `CachedModel.read` for a piece up to `stop`.

        Of pictures that layers attend to those among the first `known` tokens are in the cache.
        """
        pictures = request.pictures
        if not isinstance(pictures, Attended):
            return pictures and pictures.piece(request.read, stop, size), None
        before_BS = np.zeros((self._parts, self.max_length), np.int32)
        before_BS[0, : len(request.prompt)] = request.prompt
        return pictures.whole(known) if first else None, before_BS

    def _token(self, slot, new, logprob, top) -> Token:
        request = self.requests[slot]
        row, start = request.row, len(request.row.text)
        row.push([new], [logprob])
        self._last[slot] = new
        reason = "stop" if row.done else None
        if request.constraint and not row.done:
            request.constraint.push(new)
            self._masks[slot] = request.constraint.allowed(self.config.vocab_size)
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
