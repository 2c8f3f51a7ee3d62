"""Text from a model: prefill, cached decoding and sampling.

`sample` and `decode` are for arrays and ids (reinforcement learning calls them), `generate` and
`stream` for text. Nothing a row gives depends on the rows beside it, beyond the rounding of
matmuls of another size. Beam search and speculative decoding are left out on purpose.
"""

import codecs
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..configs.errors import UserError
from . import sharding
from .cache import LayerCache, init_cache

# Tokens a device makes before the host looks at them.
_BLOCK = 16
# Longest piece of a prompt at once; bounds the activations, not the prompt.
_PIECE = 2048


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
        # The largest becomes 0 first: a tiny temperature may then overflow to -inf only.
        scaled_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(keys_B)

        def cut():
            ids_BV = jnp.broadcast_to(jnp.arange(V), scaled_BV.shape)
            negative_BV, ids_BV = jax.lax.sort((-scaled_BV, ids_BV), num_keys=2)
            sorted_BV = -negative_BV
            keep_BV = (jnp.arange(V) < top_k) | (top_k == 0)
            p_BV = jax.nn.softmax(jnp.where(keep_BV, sorted_BV, -jnp.inf))
            before_BV = jnp.pad(jnp.cumsum(p_BV, -1)[:, :-1], ((0, 0), (1, 0)))
            # Rounding may bring the sum of some ids to 1 before the last.
            keep_BV &= (before_BV < top_p) | (top_p >= 1.0)
            keep_BV &= jnp.exp(sorted_BV) >= min_p
            noisy_BV = sorted_BV + jnp.take_along_axis(noise_BV, ids_BV, -1)
            best_B = jnp.argmax(jnp.where(keep_BV, noisy_BV, -jnp.inf), -1, keepdims=True)
            return jnp.take_along_axis(ids_BV, best_B, -1)[:, 0]

        # Sorting a large vocabulary is slow; without filters nothing is sorted.
        filters = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
        return jax.lax.cond(filters, cut, lambda: jnp.argmax(scaled_BV + noise_BV, -1))

    greedy = functools.partial(jnp.argmax, logits_BV, -1)
    return jax.lax.cond(temperature == 0, greedy, draw).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "batch_size", "max_length"))
def _empty_cache(config, batch_size, max_length):
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


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _prefill(model, params, cache, tokens_BT, segments_BT):
    return model.apply(
        {"params": params}, tokens_BT, segment_ids_BT=segments_BT, cache=cache
    ).cache


@functools.partial(jax.jit, static_argnames=("model", "block"), donate_argnames="cache")
def _decode(model, block, params, cache, tokens_B, done_B, step, num_steps, rows_B, key,
            sampling, stop_ids, vocab_size):  # fmt: skip
    """Make up to `num_steps` <= `block` tokens, fewer once every row is done.

    Returns:
      the cache, the last token and whether it is done of each row, and the tokens
      [B, block], -1 where there is none.
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
        made_BT = made_BT.at[:, i].set(jnp.where(done_B, -1, new_B))
        done_B |= jnp.any(new_B[:, None] == stop_ids, axis=-1)
        return i + 1, out.cache, new_B, done_B, made_BT

    def more(carry):
        return (carry[0] < num_steps) & ~jnp.all(carry[3])

    made_BT = jnp.full((len(tokens_B), block), -1, jnp.int32)
    start = (0, cache, tokens_B, done_B, made_BT)
    _, cache, tokens_B, done_B, made_BT = jax.lax.while_loop(more, body, start)
    # Every process of a run on several hosts reads them.
    return cache, tokens_B, done_B, sharding.constrain(made_BT, None, None)


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
      block: tokens made at a time.

    Yields:
      int32 [B, <= block], -1 after a row's end.

    Raises:
      UserError: an impossible setting, or a prompt that is empty, too long or outside the
        vocabulary.
    """
    sampling = Sampling() if sampling is None else sampling
    config = model.config
    vocab_size = min(vocab_size or config.vocab_size, config.vocab_size)
    _check_settings(config, max_tokens, sampling)
    _check_prompts(prompts, max_tokens, config.max_positions, vocab_size)
    if config.capacity_factor:
        # Full experts would turn tokens away because of the rows beside them.
        config = dataclasses.replace(config, capacity_factor=0.0)
        model = model.clone(config=config)

    mesh = jax.sharding.get_abstract_mesh()
    B = len(prompts)
    rows = B if mesh.empty else B + -B % sharding.batch_parts(mesh)
    longest = max(map(len, prompts))
    # The last token of a prompt is the first input of the decoding loop.
    T = longest - 1
    T = _round_up(T) if T <= _PIECE else T + -T % _PIECE
    tokens_BT = np.zeros((rows, T), np.int32)
    segments_BT = np.zeros((rows, T), np.int32)
    last_B = np.zeros(rows, np.int32)
    done_B = np.ones(rows, bool)
    finished_B = np.zeros(B, bool) if finished_B is None else finished_B
    for r, prompt in enumerate(prompts):
        tokens_BT[r, : len(prompt) - 1] = prompt[:-1]
        segments_BT[r, : len(prompt) - 1] = 1
        last_B[r] = prompt[-1]
        done_B[r] = finished_B[r]

    cache = _empty_cache(config, rows, _round_up(longest + max_tokens))
    for start in range(0, T, _PIECE):
        piece = np.s_[:, start : start + _PIECE]
        cache = _prefill(model, params, cache, tokens_BT[piece], segments_BT[piece])

    key = jax.random.key(seed)
    rows_B = first_row + np.arange(rows, dtype=np.int32)
    stop_ids = np.array(sorted(stop_ids), np.int32)
    made = 0
    while made < max_tokens and not done_B.all():
        steps = min(block, max_tokens - made)
        cache, last_B, done_B, made_BT = _decode(
            model, block, params, cache, last_B, done_B, made, steps, rows_B, key, sampling,
            stop_ids, vocab_size,
        )  # fmt: skip
        yield np.asarray(made_BT)[:B, :steps]
        made += steps
        done_B = np.array(done_B)
        done_B[:B] |= finished_B


def _round_up(length: int) -> int:
    """The next of 0, 16, 24, 32, 48, 64, 96, ...: few lengths to compile, at most half unused."""
    if length <= 16:
        return 16 if length else 0
    power = 1 << (length - 1).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 else power


def _check_settings(config, max_tokens, sampling):
    rules = (
        ("max_tokens", max_tokens, "be at least 1", max_tokens >= 1),
        ("temperature", sampling.temperature, "be 0 (greedy) or more", sampling.temperature >= 0),
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
        elif not isinstance(prompt, Sequence | np.ndarray):
            raise UserError(f"a prompt must be a text or a list of ids, not {prompt!r:.60}")
        ids.append(prompt)
        size = tokenizer.vocab_size
        follows_text = any(tokenizer.token_bytes[i] for i in prompt if 0 <= i < size)
        rows.append(_Row(tokenizer, stop, stop_ids, follows_text))
    return ids, rows


def _run(model, params, tokenizer, ids, rows, max_tokens, sampling, **options):
    """Run `decode` into the rows, handing back control after each block."""
    finished_B = np.zeros(len(rows), bool)
    blocks = decode(
        model, params, ids, max_tokens, sampling, vocab_size=tokenizer.vocab_size,
        stop_ids=rows[0].stop_ids if rows else (), finished_B=finished_B, **options,
    )  # fmt: skip
    for new_BT in blocks:
        for row, new_T in zip(rows, new_BT.tolist(), strict=True):
            row.push(new_T)
        finished_B[:] = [row.done for row in rows]
        yield


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
    shown = 0
    for _ in _run(model, params, tokenizer, ids, rows, max_tokens, sampling, seed=seed, block=1):
        text = rows[0].certain()
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
    if len(rows[0].text) > shown:
        yield rows[0].text[shown:]
