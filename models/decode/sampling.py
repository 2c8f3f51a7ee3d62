"""How the next token is drawn: temperature, top-k, top-p and min-p, each of one row or of all."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...configs.errors import UserError

# Ids ranked where filters are likely to keep fewer; ranking a whole vocabulary is slow.
_NARROW = 1024


class Sampling(NamedTuple):
    """How the next token is drawn, see `sample`: one value for all rows, or an array [B].

    The token that a row makes as its t-th is drawn with a key of (seed, row number, t). With one
    seed for all, rows are numbered from the first; with a seed for each row no number is added, and
    the row makes what it makes alone with that seed.
    """

    temperature: float | np.ndarray = 0.0
    top_k: int | np.ndarray = 0
    top_p: float | np.ndarray = 1.0
    min_p: float | np.ndarray = 0.0
    seed: int | np.ndarray = 0


def sample(logits_BV, keys_B, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Draw one id a row from softmax(logits / temperature), cut down by the filters.

    The filters apply in this order, each to what the one before it has left; equal logits rank
    by id, lower first. Settings are scalars or [B] and may be traced, so changing one compiles
    nothing. What a row draws does not depend on the settings of the others.

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
      ids int32 [B], and the log-probability with which each was drawn: after temperature and
      filters, 0 at temperature 0.
    """
    B, V = logits_BV.shape
    temperature_B, top_k_B, top_p_B, min_p_B = (
        jnp.broadcast_to(x, (B,)) for x in (temperature, top_k, top_p, min_p)
    )
    greedy_B = temperature_B == 0
    filters_B = ~greedy_B & ((top_k_B > 0) | (top_p_B < 1.0) | (min_p_B > 0.0))
    largest = _argmax(logits_BV), jnp.zeros((B,))

    def draw():
        # The largest becomes 0 first: a tiny temperature can then overflow to -inf only.
        heat_B1 = jnp.where(greedy_B, 1.0, temperature_B)[:, None]
        scaled_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / heat_B1
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(keys_B)
        all_B = jnp.exp(scaled_BV).sum(-1)
        free_B = _argmax(scaled_BV + noise_BV)
        free = free_B, _take(scaled_BV, free_B) - jnp.log(all_B)

        def cut(width):
            """Draw among the likeliest `width` ids, and whether the filters reach no further."""
            top_BW, ids_BW = jax.lax.top_k(scaled_BV, width)
            allowed_BW = (jnp.arange(width) < top_k_B[:, None]) | (top_k_B == 0)[:, None]
            mass_BW = jnp.where(allowed_BW, jnp.exp(top_BW), 0.0)
            total_B = jnp.where(top_k_B == 0, all_B, mass_BW.sum(-1))
            before_BW = jnp.pad(jnp.cumsum(mass_BW, -1)[:, :-1], ((0, 0), (1, 0)))
            # Rounding can bring the sum to its total before the last id.
            reached_BW = (before_BW >= (top_p_B * total_B)[:, None]) & (top_p_B < 1.0)[:, None]
            keep_BW = allowed_BW & ~reached_BW & (jnp.exp(top_BW) >= min_p_B[:, None])
            noisy_BW = top_BW + jnp.take_along_axis(noise_BV, ids_BW, -1)
            best_B = _argmax(jnp.where(keep_BW, noisy_BW, -jnp.inf))
            kept_B = jnp.where(keep_BW, jnp.exp(top_BW), 0.0).sum(-1)
            drawn = _take(ids_BW, best_B), _take(top_BW, best_B) - jnp.log(kept_B)
            return drawn, ~keep_BW[:, -1] & (top_k_B <= width)

        def filtered():
            # What is kept is a beginning of the ranking: sorting all of it is rarely needed.
            narrow, complete_B = cut(min(_NARROW, V))
            complete_B |= ~filters_B
            wide = jax.lax.cond(complete_B.all(), lambda: narrow, lambda: cut(V)[0])
            return _where(complete_B, narrow, wide)

        cut_down = jax.lax.cond(filters_B.any(), filtered, lambda: free)
        return _where(greedy_B, largest, _where(filters_B, cut_down, free))

    return jax.lax.cond(greedy_B.all(), lambda: largest, draw)


def check(sampling: Sampling, num_rows: int) -> None:
    """Refuse settings that are impossible, or arrays that are not one value a row.

    Raises:
      UserError: the first that is.
    """
    heat, top_k, top_p, min_p, seed = map(np.asarray, sampling)
    rules = (
        ("temperature", heat, "be 0 (greedy) or more, and finite", (heat >= 0) & (heat < math.inf)),
        ("top_k", top_k, "be 0 (off) or more", top_k >= 0),
        ("top_p", top_p, "be more than 0 and at most 1 (off)", (top_p > 0) & (top_p <= 1)),
        ("min_p", min_p, "lie between 0 (off) and 1", (min_p >= 0) & (min_p <= 1)),
        ("seed", seed, "be an integer", np.issubdtype(seed.dtype, np.integer)),
    )
    for name, values, rule, holds in rules:
        if values.shape not in ((), (num_rows,)):
            raise UserError(
                f"{name} has shape {values.shape}: give one value, or one for each of "
                f"{num_rows} rows"
            )
        if not np.all(holds):
            holds = np.broadcast_to(holds, values.shape)
            wrong = values if not values.ndim else values[~holds][0]
            where = "" if not values.ndim else f" of row {int(np.argmin(holds))}"
            raise UserError(f"{name}={wrong}{where} must {rule}")


def per_row(sampling: Sampling, num_rows: int, padded: int) -> Sampling:
    """All settings as arrays [padded] of one dtype each, so that they compile once."""
    dtypes = (np.float32, np.int32, np.float32, np.float32, np.int64)

    def spread(value, dtype):
        row = np.broadcast_to(np.asarray(value, dtype), (num_rows,))
        return np.pad(row, (0, padded - num_rows), mode="edge")

    made = Sampling(*map(spread, sampling, dtypes))
    return made._replace(seed=(made.seed & 0xFFFFFFFF).astype(np.uint32))


def _argmax(x):
    return jax.lax.argmax(x, 1, jnp.int32)


def _take(x_BW, at_B):
    return jnp.take_along_axis(x_BW, at_B[:, None], -1)[:, 0]


def _where(which_B, a, b):
    return jax.tree.map(lambda a, b: jnp.where(which_B, a, b), a, b)
