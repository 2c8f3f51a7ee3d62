"""Text from a model: prefill, cached decoding and sampling.

`sample` and `decode` are for arrays and ids (reinforcement learning calls them), `generate` and
`stream` for text. Nothing a row gives depends on the rows beside it, beyond the rounding of
matmuls of another size. Beam search and speculative decoding are left out on purpose.
"""

import codecs
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...configs.errors import UserError
from ..cache import LayerCache, init_cache
from ..parallel import sharding

# Tokens a device makes before the host looks at them.
_BLOCK = 16
# Ids ranked where filters are likely to keep fewer; ranking a whole vocabulary is slow.
_NARROW = 1024
# Longest piece of a prompt at once; bounds the activations, not the prompt.
_PIECE = 2048
# What stands for a token after the end of a row, and where the model has failed.
_NONE, _NAN = -1, -2


class Sampling(NamedTuple):
    """How the next token is drawn, see `sample`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def sample(logits_BV, keys_B, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Draw one id a row from softmax(logits / temperature), cut down by the filters.

    The filters apply in this order, each to what the one before it has left; equal logits rank
    by id, lower first. All four settings may be traced, so changing one compiles nothing.

    Args:
      logits_BV: float32; -inf is never drawn.
      keys_B: one random key a row. The same key draws the same id whichever filters apply,
        unless they forbid it.
      temperature: 0 takes the largest logit.
      top_k: keeps the k likeliest; 0 = all.
      top_p: keeps the smallest set of likeliest ids whose probability, renormalised after top-k,
        reaches p, and at least one (arXiv 1904.09751); 1 = all.
      min_p: keeps ids at least min_p times as probable as the likeliest (arXiv 2407.01082).

    Returns:
      int32 [B].
    """
    V = logits_BV.shape[-1]

    def draw():
        # The largest becomes 0 first: a tiny temperature can then overflow to -inf only.
        scaled_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(keys_B)

        def cut(width):
            """Draw among the likeliest `width` ids, and whether the filters reach no further."""
            top_BW, ids_BW = jax.lax.top_k(scaled_BV, width)
            allowed_W = (jnp.arange(width) < top_k) | (top_k == 0)
            mass_BW = jnp.where(allowed_W, jnp.exp(top_BW), 0.0)
            all_B, allowed_B = jnp.exp(scaled_BV).sum(-1), mass_BW.sum(-1)
            total_B = jnp.where(top_k == 0, all_B, allowed_B)
            before_BW = jnp.pad(jnp.cumsum(mass_BW, -1)[:, :-1], ((0, 0), (1, 0)))
            # Rounding can bring the sum to its total before the last id.
            reached_BW = (before_BW >= top_p * total_B[:, None]) & (top_p < 1.0)
            keep_BW = allowed_W & ~reached_BW & (jnp.exp(top_BW) >= min_p)
            noisy_BW = top_BW + jnp.take_along_axis(noise_BV, ids_BW, -1)
            best_B = _argmax(jnp.where(keep_BW, noisy_BW, -jnp.inf))
            complete = ~jnp.any(keep_BW[:, -1]) & (top_k <= width)
            return jnp.take_along_axis(ids_BW, best_B[:, None], -1)[:, 0], complete

        def filtered():
            # What is kept is a beginning of the ranking: sorting all of it is rarely needed.
            ids_B, complete = cut(min(_NARROW, V))
            return jax.lax.cond(complete, lambda: ids_B, lambda: cut(V)[0])

        filters = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
        return jax.lax.cond(filters, filtered, lambda: _argmax(scaled_BV + noise_BV))

    return jax.lax.cond(temperature == 0, lambda: _argmax(logits_BV), draw)


def _argmax(x):
    return jax.lax.argmax(x, 1, jnp.int32)


def _empty_cache(config, batch_size, max_length):
    """A cache that lies on the mesh as keys and values do."""

    def split(layer):
        names = (None,) * (layer.k_BSKH.ndim - 4) + ("batch", None, "act_kv_heads", None)
        return layer.replace(
            k_BSKH=sharding.constrain(layer.k_BSKH, *names),
            v_BSKH=sharding.constrain(layer.v_BSKH, *names),
            positions_BS=sharding.constrain(layer.positions_BS, *names[:-2]),
        )

    cache = init_cache(config, batch_size, max_length)
    layers = jax.tree.map(split, cache.layers, is_leaf=lambda x: isinstance(x, LayerCache))
    return cache.replace(layers=layers, lengths_B=sharding.constrain(cache.lengths_B, "batch"))


@functools.partial(jax.jit, static_argnames=("model", "max_length"), donate_argnames="cache")
def _prefill(model, max_length, params, cache, tokens_BT, segments_BT):
    """The cache with these tokens added; the first piece makes it."""
    if cache is None:
        cache = _empty_cache(model.config, len(tokens_BT), max_length)
    states = model.apply(
        {"params": params}, tokens_BT, segment_ids_BT=segments_BT, cache=cache, method="states"
    )
    return states.cache


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _decode(model, params, cache, tokens_B, done_B, step, num_steps, rows_B, key, sampling,
            stop_ids, vocab_size):  # fmt: skip
    """Make up to `num_steps` <= _BLOCK tokens, fewer once every row is done.

    Returns:
      the cache, and the tokens [B, _BLOCK] with _NONE and _NAN among them.
    """
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(rows_B)

    def body(carry):
        i, cache, tokens_B, done_B, made_BT = carry
        segments_BT = jnp.where(done_B, 0, 1)[:, None]
        out = model.apply(
            {"params": params}, tokens_B[:, None], segment_ids_BT=segments_BT, cache=cache
        )
        logits_BV = out.logits_BTV[:, 0]
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, -jnp.inf)
        step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step + i)
        new_B = sample(logits_BV, step_keys_B, *sampling)
        new_B = jnp.where(jnp.isnan(logits_BV).any(-1), _NAN, new_B)
        made_BT = made_BT.at[:, i].set(jnp.where(done_B, _NONE, new_B))
        done_B |= jnp.any(new_B[:, None] == stop_ids, axis=-1)
        return i + 1, out.cache, new_B, done_B, made_BT

    def more(carry):
        return (carry[0] < num_steps) & ~jnp.all(carry[3])

    made_BT = jnp.full((len(tokens_B), _BLOCK), _NONE, jnp.int32)
    start = (0, cache, tokens_B, done_B, made_BT)
    _, cache, _, _, made_BT = jax.lax.while_loop(more, body, start)
    # Every process of a run on several hosts reads them.
    return cache, sharding.constrain(made_BT, None, None)


def decode(model, params, prompts: Sequence[Sequence[int]], max_tokens: int, sampling=None, *,
           seed=0, first_row=0, stop_ids=(), vocab_size=None, finished_B=None,
           block=_BLOCK) -> Iterator[np.ndarray]:  # fmt: skip
    """Continue rows of ids, yielding new tokens some at a time.

    Args:
      model, params: a `Transformer` and its parameters; works under `jax.set_mesh`.
      prompts: B rows of at least one id each, of any lengths.
      max_tokens: most tokens to make for a row.
      sampling: `Sampling`; greedy when left out.
      seed: the token that row r makes as its t-th is drawn with a key of (seed, first_row + r, t).
      first_row: number of the first row, where a long list is generated in parts.
      stop_ids: a row ends with the first of these that it makes.
      vocab_size: ids from here on are never made; the model's own size when left out.
      finished_B: bool array that the caller may set between blocks to end rows.
      block: tokens made at a time, at most 16.

    Returns:
      An iterator of int32 [B, up to block], -1 after a row's end.

    Raises:
      UserError: an impossible setting; a prompt that is empty, too long or outside the
        vocabulary; a model that gives NaN.
    """
    sampling = Sampling() if sampling is None else sampling
    config = model.config
    vocab_size = min(vocab_size or config.vocab_size, config.vocab_size)
    _check_settings(config, max_tokens, sampling)
    _check_prompts(prompts, max_tokens, config.max_positions, vocab_size)
    if config.capacity_factor:
        # The room of an expert counts the tokens of one call, here a piece of a text or one token.
        model = model.clone(config=dataclasses.replace(config, capacity_factor=0.0))
    return _blocks(
        model, params, prompts, max_tokens, sampling, seed, first_row, stop_ids, vocab_size,
        finished_B, min(block, _BLOCK),
    )  # fmt: skip


def _blocks(model, params, prompts, max_tokens, sampling, seed, first_row, stop_ids, vocab_size,
            finished_B, block):  # fmt: skip
    mesh = jax.sharding.get_abstract_mesh()
    B = len(prompts)
    rows = B if mesh.empty else B + -B % sharding.parts("batch", mesh)
    longest = max(map(len, prompts))
    # The last token of a prompt is the first input of the decoding loop.
    T = max(1, longest - 1)
    T = _round_up(T) if T <= _PIECE else T + -T % _PIECE
    tokens_BT = np.zeros((rows, T), np.int32)
    segments_BT = np.zeros((rows, T), np.int32)
    last_B = np.zeros(rows, np.int32)
    for r, prompt in enumerate(prompts):
        tokens_BT[r, : len(prompt) - 1] = prompt[:-1]
        segments_BT[r, : len(prompt) - 1] = 1
        last_B[r] = prompt[-1]

    cache, max_length = None, _round_up(longest + max_tokens)
    for start in range(0, T, _PIECE):
        piece = np.s_[:, start : start + _PIECE]
        cache = _prefill(model, max_length, params, cache, tokens_BT[piece], segments_BT[piece])

    # Everything the loop takes has one dtype and shape, so that it compiles once.
    sampling = Sampling(*map(np.asarray, sampling, (np.float32, np.int32, np.float32, np.float32)))
    ends = np.full(8 + len(stop_ids) // 8 * 8, _NONE, np.int32)
    ends[: len(stop_ids)] = list(stop_ids)
    rows_B = first_row + np.arange(rows, dtype=np.int32)
    key = jax.random.key(seed)
    done_B = np.arange(rows) >= B
    for step in range(0, max_tokens, block):
        if finished_B is not None:
            done_B[:B] |= finished_B
        if done_B.all():
            return
        steps = min(block, max_tokens - step)
        cache, made_BT = _decode(
            model, params, cache, last_B, done_B, step, steps, rows_B, key, sampling, ends,
            vocab_size,
        )  # fmt: skip
        made_BT = np.asarray(made_BT)[:, :steps]
        if np.any(made_BT == _NAN):
            raise UserError("the model gives NaN: its parameters are damaged or have diverged")
        yield made_BT[:B]
        done_B |= np.isin(made_BT[:, -1], ends)  # _NONE is one of them
        last_B = np.maximum(made_BT[:, -1], 0)


def _round_up(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few lengths to compile, a third unused at most."""
    if length <= 16:
        return 16
    power = 1 << (length - 1).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 else power


def _check_settings(config, max_tokens, sampling):
    heat = sampling.temperature
    rules = (
        ("max_tokens", max_tokens, "be at least 1", max_tokens >= 1),
        ("temperature", heat, "be 0 (greedy) or more, and finite", 0 <= heat < math.inf),
        ("top_k", sampling.top_k, "be 0 (off) or more", sampling.top_k >= 0),
        ("top_p", sampling.top_p, "be more than 0 and at most 1 (off)", 0 < sampling.top_p <= 1),
        ("min_p", sampling.min_p, "lie between 0 (off) and 1", 0 <= sampling.min_p <= 1),
    )
    for name, value, rule, holds in rules:
        if not holds:
            raise UserError(f"{name}={value} must {rule}")
    if config.moe_interval and config.router == "expert_choice":
        raise UserError(
            "model.router=expert_choice cannot generate: its experts choose among later tokens "
            "too; train with sigmoid or softmax"
        )


def _check_prompts(prompts, max_tokens, max_positions, vocab_size):
    if not len(prompts):
        raise UserError("prompts is empty: give at least one")
    for r, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {r} is empty and the tokenizer has no bos: give some text")
        bad = [i for i in prompt if not 0 <= i < vocab_size]
        if bad:
            raise UserError(f"prompt {r} has id {bad[0]}, which must lie in 0..{vocab_size - 1}")
        if len(prompt) + max_tokens > max_positions:
            raise UserError(
                f"prompt {r} has {len(prompt)} tokens: with max_tokens={max_tokens} that is more "
                f"than model.max_positions={max_positions}"
            )


class _Row:
    """The text of one row as its ids arrive, up to a stop id or stop string."""

    def __init__(self, tokenizer, stop, stop_ids, follows_text):
        self.tokenizer, self.stop, self.stop_ids = tokenizer, stop, stop_ids
        self.follows_text = follows_text
        self.characters = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""
        self.done = False

    def push(self, ids):
        """Add ids; a character whose bytes have not all come yet stays out of the text."""
        for i in ids:
            if self.done or i < 0:
                return
            if i in self.stop_ids:
                self.done = True
                return
            data = self.tokenizer.decode_bytes([i], continuation=self.follows_text)
            self.follows_text = True
            old = len(self.text)
            self.text += self.characters.decode(data)
            self._cut(old)

    def _cut(self, old):
        """Cut before the stop string that ends first, then starts first."""
        found = []
        for s in self.stop:
            at = self.text.find(s, max(0, old - len(s) + 1))
            if at >= 0:
                found.append((at + len(s), at))
        if found:
            self.text = self.text[: min(found)[1]]
            self.done = True

    def certain(self) -> str:
        """The text without an end that may turn out to begin a stop string."""
        if self.done:
            return self.text
        begun = (n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n]))
        return self.text[: len(self.text) - max(begun, default=0)]


def _rows(tokenizer, prompts, stop):
    """Prompts as ids and a `_Row` for each."""
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stop):
        raise UserError("stop has an empty string: leave it out")
    # Control tokens leave no text in which a stop string could be found.
    named = {tokenizer.special[s] for s in stop if s in tokenizer.special}
    stop_ids = named.union(tokenizer.stop_ids, {tokenizer.eos_id} - {None})
    ids, rows = [], []
    for prompt in prompts:
        if isinstance(prompt, str):
            prompt = tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)
        elif not _is_ids(prompt):
            raise UserError(f"a prompt must be a text or a list of ids, not {prompt!r:.60}")
        ids.append(prompt)
        size = tokenizer.vocab_size
        follows_text = any(tokenizer.token_bytes[i] for i in prompt if 0 <= i < size)
        rows.append(_Row(tokenizer, stop, stop_ids, follows_text))
    return ids, rows


def _is_ids(prompt) -> bool:
    return isinstance(prompt, Sequence | np.ndarray) and all(
        isinstance(i, int | np.integer) for i in prompt
    )


def _run(model, params, tokenizer, ids, rows, max_tokens, sampling, **options):
    """An iterator that runs `decode` into the rows, a block a step."""
    finished_B = np.zeros(len(rows), bool)
    blocks = decode(
        model, params, ids, max_tokens, sampling, vocab_size=tokenizer.vocab_size,
        stop_ids=rows[0].stop_ids if rows else (), finished_B=finished_B, **options,
    )  # fmt: skip

    def run():
        for new_BT in blocks:
            for row, new_T in zip(rows, new_BT.tolist(), strict=True):
                row.push(new_T)
            finished_B[:] = [row.done for row in rows]
            yield

    return run()


def generate(model, params, tokenizer, prompts, max_tokens=64, temperature=0.0, top_k=0,
             top_p=1.0, min_p=0.0, seed=0, stop=(), first_row=0):  # fmt: skip
    """Continue texts.

    Args:
      model, params: as `puna.load` gives them; works under `jax.set_mesh`.
      tokenizer: a `Tokenizer`; its bos is put before each text.
      prompts: a text, a list of texts, or a list of lists of ids (taken as they are).
      max_tokens: most tokens to make; with the prompt at most `model.config.max_positions`.
      temperature, top_k, top_p, min_p: see `sample`; temperature 0 is greedy.
      seed, first_row: see `decode`.
      stop: a string or several; the text ends before the first that appears. The tokenizer's
        stop ids always end it.

    Returns:
      The new text alone, without a character that the end has cut in half: a string for a
      string, else a list.

    Raises:
      UserError: see `decode`.
    """
    single = isinstance(prompts, str)
    ids, rows = _rows(tokenizer, [prompts] if single else prompts, stop)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    for _ in _run(model, params, tokenizer, ids, rows, max_tokens, sampling, seed=seed,
                  first_row=first_row):  # fmt: skip
        pass
    texts = [row.text for row in rows]
    return texts[0] if single else texts


def stream(model, params, tokenizer, prompt, max_tokens=64, temperature=0.0, top_k=0, top_p=1.0,
           min_p=0.0, seed=0, stop=()) -> Iterator[str]:  # fmt: skip
    """Yield what `generate` would return for one prompt, each piece as soon as it is certain."""
    ids, rows = _rows(tokenizer, [prompt], stop)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    steps = _run(model, params, tokenizer, ids, rows, max_tokens, sampling, seed=seed, block=1)

    def pieces():
        shown = 0
        for _ in steps:
            text = rows[0].certain()
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
        if len(rows[0].text) > shown:
            yield rows[0].text[shown:]

    return pieces()
