"""Rows of ids through a model: prefill, then one token of every row at a time.

Nothing that a row gives depends on the rows beside it, beyond the rounding of matmuls of another
size. Beam search is left out on purpose.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...configs.errors import UserError
from .. import bits
from ..cache import KINDS, init_cache
from ..fusion import check_count
from ..leaf import settled
from ..parallel import sharding
from ..tiled_vision import TiledImages
from .sampling import Sampling, check, per_row, sample

# Tokens a device makes before the host looks at them.
_BLOCK = 16
# Longest piece of a prompt at once; bounds the activations, not the prompt.
_PIECE = 2048
# What stands for a token after the end of a row, and where the model has failed.
_NONE, _NAN = -1, -2


class Block(NamedTuple):
    """New tokens of B rows.

    ids_BT: int32, -1 after a row's end.
    logprobs_BT: log softmax(logits)[id] of the model itself, whatever the sampling: what a forward
      pass over the whole row gives. NaN after a row's end.
    drawn_logprobs_BT: of the distribution that was drawn from, see `sample`.
    """

    ids_BT: np.ndarray
    logprobs_BT: np.ndarray
    drawn_logprobs_BT: np.ndarray


def cache_specs(cache):
    """The cache with the `PartitionSpec` of each array on the current mesh in its place."""

    def of_rows(x):
        return sharding.activation(x.shape, ("batch",) + (None,) * (x.ndim - 1))

    layers = jax.tree.map(lambda x: x.specs(), cache.layers, is_leaf=lambda x: isinstance(x, KINDS))
    lengths_B, seen = jax.tree.map(of_rows, (cache.lengths_B, cache.seen))
    return cache.replace(layers=layers, lengths_B=lengths_B, seen=seen)


def constrain_cache(cache):
    """The cache, lying on the current mesh as keys and values do."""
    if not sharding.split_axes():
        return cache
    return jax.tree.map(jax.lax.with_sharding_constraint, cache, cache_specs(cache))


@functools.partial(jax.jit, static_argnames=("model", "max_length"), donate_argnames="cache")
def _prefill(model, max_length, kept, cache, tokens_BT, segments_BT, images):
    """The cache with these tokens added; the first piece makes it, and has the images."""
    if cache is None:
        count = 0 if images is None else images.grids_BM.shape[1]
        cache = init_cache(model.config, len(tokens_BT), max_length, images=count)
        cache = constrain_cache(cache)
    states = model.apply(
        {"params": kept}, tokens_BT, segment_ids_BT=segments_BT, cache=cache, images=images,
        method="states",
    )  # fmt: skip
    return states.cache


def next_ids(model, params, hidden_BTD, keys_B, sampling, vocab_size, masks_BW=None):
    """Draw the id that follows the first token of each row.

    Args:
      hidden_BTD: `States.hidden_BTD`, T = 1.
      sampling: `Sampling` of arrays [B]; the seed is not used.
      masks_BW: bits of the ids that each row may make, see `grammar.Constraint.allowed`.

    Returns:
      ids_B, logprobs_B and drawn_logprobs_B as in `Block`, with ids of _NAN where the model has
      failed, and logits_BV.
    """
    # What the layers read they have elsewhere: here it would be another argument of the program.
    table = "embed" if model.config.tie_embeddings else "unembed"
    params = {table: params[table]}
    # XLA for CPUs would convert the table to float32, whole, before a loop over tokens: now the
    # table may be another one at each of them.
    params, hidden_BTD = jax.lax.optimization_barrier((params, hidden_BTD))
    logits_BV = model.apply({"params": params}, hidden_BTD, method="logits")[:, 0]
    allowed_BV = (jnp.arange(logits_BV.shape[-1]) < vocab_size)[None]
    if masks_BW is not None:
        bits_BW32 = (masks_BW[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        allowed_BV &= bits_BW32.reshape(len(masks_BW), -1)[:, : logits_BV.shape[-1]] == 1
    ids_B, drawn_B = sample(jnp.where(allowed_BV, logits_BV, -jnp.inf), keys_B, *sampling[:4])
    chosen_B = jnp.take_along_axis(logits_BV, ids_B[:, None], -1)[:, 0]
    logprobs_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
    ids_B = jnp.where(jnp.isnan(logits_BV).any(-1), _NAN, ids_B)
    return ids_B, logprobs_B, drawn_B, logits_BV


def row_keys(seeds_B, rows_B):
    """The random key of each row; folding in t gives the key of its t-th token."""
    return jax.vmap(lambda s, r: jax.random.fold_in(jax.random.key(s), r))(seeds_B, rows_B)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _decode(model, params, kept, cache, tokens_B, done_B, step, num_steps, rows_B, most_B,
            sampling, stop_ids, vocab_size):  # fmt: skip
    """Make up to `num_steps` <= _BLOCK tokens, fewer once every row is done.

    Args:
      kept: `bits.view(params)`: the layers read it, the logits read `params`.
      most_B: tokens that each row may have, those before `step` included.

    Returns:
      the cache, and a `Block` of _BLOCK tokens with _NONE and _NAN among them.
    """
    keys_B = row_keys(sampling.seed, rows_B)

    def body(carry):
        i, cache, tokens_B, done_B, made = carry
        segments_BT = jnp.where(done_B, 0, 1)[:, None]
        states = model.apply(
            {"params": kept}, tokens_B[:, None], segment_ids_BT=segments_BT, cache=cache,
            method="states",
        )  # fmt: skip
        step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step + i)
        new_B, logprobs_B, drawn_B, _ = next_ids(
            model, params, states.hidden_BTD, step_keys_B, sampling, vocab_size
        )
        found = (
            jnp.where(done_B, nothing, x)
            for nothing, x in ((_NONE, new_B), (jnp.nan, logprobs_B), (jnp.nan, drawn_B))
        )
        made = Block(*(x_BT.at[:, i].set(x_B) for x_BT, x_B in zip(made, found, strict=True)))
        done_B |= jnp.any(new_B[:, None] == stop_ids, axis=-1) | (step + i + 1 >= most_B)
        return i + 1, states.cache, new_B, done_B, made

    def more(carry):
        return (carry[0] < num_steps) & ~jnp.all(carry[3])

    shape = (len(tokens_B), _BLOCK)
    made = Block(jnp.full(shape, _NONE, jnp.int32), *(jnp.full(shape, jnp.nan) for _ in range(2)))
    start = (0, cache, tokens_B, done_B, made)
    _, cache, _, _, made = jax.lax.while_loop(more, body, start)
    # Every process of a run on several hosts reads them.
    return cache, Block(*(sharding.constrain(x_BT, None, None) for x_BT in made))


def decode(model, params, prompts: Sequence[Sequence[int]], max_tokens, sampling=None, *,
           first_row=0, stop_ids=(), vocab_size=None, finished_B=None,
           block=_BLOCK, images: TiledImages | None = None) -> Iterator[Block]:  # fmt: skip
    """Continue rows of ids, yielding new tokens some at a time.

    Args:
      model, params: a `Transformer` and its parameters; works under `jax.set_mesh`.
      prompts: B rows of at least one id each, of any lengths.
      max_tokens: most tokens to make for a row: one number, or [B].
      sampling: `Sampling`; greedy when left out.
      first_row: number of the first row, where a long list is generated in parts.
      stop_ids: a row ends with the first of these that it makes.
      vocab_size: ids from here on are never made; the model's own size when left out.
      finished_B: bool array that the caller may set between blocks to end rows.
      block: tokens made at a time, at most 16.
      images: of the prompts, one for each of their tokens `model.vision.token_id`, for a model
        whose layers attend to images. They are encoded once.

    Returns:
      An iterator of `Block`s of up to `block` tokens.

    Raises:
      UserError: an impossible setting; a prompt that is empty, too long or outside the
        vocabulary, or has more or fewer images than tokens of them; a model that gives NaN.
    """
    sampling = Sampling() if sampling is None else sampling
    config = model.config
    vocab_size = min(vocab_size or config.vocab_size, config.vocab_size)
    check_prompts(prompts)
    most_B = np.asarray(max_tokens)
    if most_B.shape not in ((), (len(prompts),)) or most_B.min() < 1:
        raise UserError(
            f"max_tokens={max_tokens} must be at least 1, one number or one for each of "
            f"{len(prompts)} rows"
        )
    most_B = np.broadcast_to(most_B, len(prompts))
    check(sampling, len(prompts))
    texts = prompts if images is None else _without_images(config, prompts, images)
    check_fit(texts, most_B, config.max_positions, vocab_size, "model.max_positions")
    return _blocks(
        for_decoding(model), params, prompts, most_B, sampling, first_row, stop_ids, vocab_size,
        finished_B, min(block, _BLOCK), images,
    )  # fmt: skip


def _without_images(config, prompts, images: TiledImages):
    """The prompts with another id for the tokens of images, whose number is checked."""
    if not config.cross.interval:
        raise UserError(
            "images are generated from by models whose layers attend to them: "
            f"model.cross.interval={config.cross.interval}"
        )
    token, longest = config.vision.token_id, max(map(len, prompts))
    tokens_BT = np.full((len(prompts), longest), -1)
    for r, prompt in enumerate(prompts):
        tokens_BT[r, : len(prompt)] = prompt
    count_B = np.sum(np.asarray(images.grids_BM) > 0, axis=1)
    check_count("images", "model.vision.token_id", token, tokens_BT, count_B)
    return [[0 if i == token else i for i in prompt] for prompt in prompts]


def _blocks(model, params, prompts, most_B, sampling, first_row, stop_ids, vocab_size, finished_B,
            block, images):  # fmt: skip
    mesh = jax.sharding.get_abstract_mesh()
    params = settled(params)
    kept = bits.view(params)
    B = len(prompts)
    rows = B if mesh.empty else B + -B % sharding.parts("batch", mesh)
    longest = max(map(len, prompts))
    # The last token of a prompt is the first input of the decoding loop.
    T = max(1, longest - 1)
    T = round_up(T) if T <= _PIECE else T + -T % _PIECE
    tokens_BT = np.zeros((rows, T), np.int32)
    segments_BT = np.zeros((rows, T), np.int32)
    last_B = np.zeros(rows, np.int32)
    for r, prompt in enumerate(prompts):
        tokens_BT[r, : len(prompt) - 1] = prompt[:-1]
        segments_BT[r, : len(prompt) - 1] = 1
        last_B[r] = prompt[-1]

    max_tokens = int(most_B.max())
    cache, max_length = None, round_up(longest + max_tokens)
    if images is not None:
        images = jax.tree.map(
            lambda x: np.pad(x, [(0, rows - B)] + [(0, 0)] * (np.ndim(x) - 1)), images
        )
    for start in range(0, T, _PIECE):
        piece = np.s_[:, start : start + _PIECE]
        given = images if start == 0 else None
        cache = _prefill(
            model, max_length, kept, cache, tokens_BT[piece], segments_BT[piece], given
        )

    # Everything the loop takes has one dtype and shape, so that it compiles once.
    numbered = np.arange(rows, dtype=np.int32) * (np.ndim(sampling.seed) == 0)
    sampling = per_row(sampling, B, rows)
    most_B = np.pad(most_B.astype(np.int32), (0, rows - B))
    ends = np.full(8 + len(stop_ids) // 8 * 8, _NONE, np.int32)
    ends[: len(stop_ids)] = list(stop_ids)
    done_B = np.arange(rows) >= B
    for step in range(0, max_tokens, block):
        if finished_B is not None:
            done_B[:B] |= finished_B
        if done_B.all():
            return
        steps = min(block, max_tokens - step)
        cache, made = _decode(
            model, params, kept, cache, last_B, done_B, step, steps, first_row + numbered, most_B,
            sampling, ends, vocab_size,
        )  # fmt: skip
        made = Block(*(np.asarray(x_BT)[:, :steps] for x_BT in made))
        check_ids(made.ids_BT)
        yield Block(*(x_BT[:B] for x_BT in made))
        # _NONE is one of the ends.
        done_B |= np.isin(made.ids_BT[:, -1], ends) | (step + steps >= most_B)
        last_B = np.maximum(made.ids_BT[:, -1], 0)


def for_decoding(model):
    """The model as generation runs it.

    Raises:
      UserError: it cannot generate.
    """
    config = model.config
    if config.moe_interval and config.router == "expert_choice":
        raise UserError(
            "model.router=expert_choice cannot generate: its experts choose among later tokens "
            "too; train with sigmoid or softmax"
        )
    if config.capacity_factor:
        # The room of an expert counts the tokens of one call, here a piece of a text or one token.
        model = model.clone(config=dataclasses.replace(config, capacity_factor=0.0))
    return model


def check_ids(ids) -> None:
    """Raise UserError where `next_ids` has found that the model fails."""
    if np.any(ids == _NAN):
        raise UserError("the model gives NaN: its parameters are damaged or have diverged")


def round_up(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few lengths to compile, a third unused at most."""
    if length <= 16:
        return 16
    power = 1 << (length - 1).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 else power


def check_prompts(prompts) -> None:
    """Refuse prompts that are empty.

    Raises:
      UserError: the first that is, or that there are none.
    """
    if not len(prompts):
        raise UserError("prompts is empty: give at least one")
    for r, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {r} is empty and the tokenizer has no bos: give some text")


def check_fit(prompts, most_B, longest, vocab_size, name) -> None:
    """Refuse ids outside the vocabulary and rows longer than `longest`, a setting called `name`.

    Raises:
      UserError: the first that is.
    """
    for r, (prompt, most) in enumerate(zip(prompts, most_B, strict=True)):
        bad = [i for i in prompt if not 0 <= i < vocab_size]
        if bad:
            raise UserError(f"prompt {r} has id {bad[0]}, which must lie in 0..{vocab_size - 1}")
        if len(prompt) + most > longest:
            raise UserError(
                f"prompt {r} has {len(prompt)} tokens: with max_tokens={most} that is more "
                f"than {name}={longest}"
            )
