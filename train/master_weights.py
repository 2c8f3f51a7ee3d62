"""Float32 master weights of parameters that are stored in bfloat16 (arXiv 1710.03740).

A bfloat16 has 8 bits of mantissa, so an update below 1/512 of its parameter is rounded away. The
optimizer therefore keeps a float32 copy of every parameter beside its float32 moments; updates are
added to the copy, and the parameters are the copy, rounded. Parameters, copy and AdamW's moments
take 2 + 4 + 8 bytes a parameter, against 4 + 8 where parameters are float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class MasterWeights(NamedTuple):
    """State of `with_master_weights`: of the rule inside, and the float32 parameters."""

    inner: optax.OptState
    master: optax.Params


def with_master_weights(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same rule on float32 copies of the parameters.

    Gradients and updates are float32 too. `apply_updates` adds the updates to the copies, which
    optax's function of that name would not do.
    """

    def init(params):
        master = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return MasterWeights(tx.init(master), master)

    def update(grads, state, params=None):
        del params  # the copies are what they are rounded from
        updates, inner = tx.update(grads, state.inner, state.master)
        return updates, MasterWeights(inner, state.master)

    return optax.GradientTransformation(init, update)


def apply_updates(params, updates, opt_state):
    """Add updates to the parameters, or to their master weights if the optimizer keeps any.

    Args:
      params: the parameters that train, in their stored dtype.
      updates: float32, from the optimizer.
      opt_state: the optimizer's state after its update.

    Returns:
      The new parameters and optimizer state; with master weights the former are the latter,
      rounded.
    """
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_master) if _is_master(x)]
    if not found:
        return optax.apply_updates(params, updates), opt_state
    (state,) = found
    master = optax.apply_updates(state.master, updates)
    opt_state = jax.tree.map(
        lambda x: x._replace(master=master) if _is_master(x) else x, opt_state, is_leaf=_is_master
    )
    return jax.tree.map(lambda m, p: m.astype(p.dtype), master, params), opt_state


def _is_master(x) -> bool:
    return isinstance(x, MasterWeights)
