"""The optax chain of a configuration: schedule, clipping, update rule, weight decay."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..configs.schema import Config
from ..models.parallel.sharding import Param, own_dims, row_dims
from .master_weights import with_master_weights
from .state import trained

# Steps after which the usual norm of the gradient is known well enough.
_KNOWN = 20


def schedule(config: Config) -> optax.Schedule:
    """Learning rate of each step: linear warm-up, then the named shape.

    `wsd` (warm-up, stable, decay: arXiv 2404.06395) stays at the peak and decays linearly over
    the last `decay_fraction` of the steps. All but `constant` end at `final_fraction` of it.
    """
    o, steps = config.optimizer, config.train.steps
    after = max(1, steps - o.warmup_steps)
    final = o.learning_rate * o.final_fraction
    match o.schedule:
        case "cosine":
            shapes = [optax.cosine_decay_schedule(o.learning_rate, after, o.final_fraction)]
            borders = []
        case "linear":
            shapes, borders = [optax.linear_schedule(o.learning_rate, final, after)], []
        case "wsd":
            decay = max(1, round(o.decay_fraction * steps))
            shapes = [
                optax.constant_schedule(o.learning_rate),
                optax.linear_schedule(o.learning_rate, final, decay),
            ]
            borders = [max(o.warmup_steps, steps - decay)]
        case _:
            shapes, borders = [optax.constant_schedule(o.learning_rate)], []
    if not o.warmup_steps:
        return optax.join_schedules(shapes, borders) if borders else shapes[0]
    # The first step already moves: it is 1 / (warmup + 1) of the way up.
    first = o.learning_rate / (o.warmup_steps + 1)
    warmup = optax.linear_schedule(first, o.learning_rate, o.warmup_steps)
    return optax.join_schedules([warmup, *shapes], [o.warmup_steps, *borders])


def learning_rate(config: Config, opt_state) -> jax.Array:
    """The rate of the next update: the schedule at the optimizer's own count of steps."""
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_schedule)
    (count,) = (x.count for x in leaves if _is_schedule(x))
    return jnp.asarray(schedule(config)(count), jnp.float32)


def make_optimizer(config: Config, boxed, added=None) -> optax.GradientTransformation:
    """The gradient transformation of a configuration.

    Args:
      config: reads `optimizer`, `adapter`, `train`, and `model.param_dtype`: the state holds
        float32 master weights of parameters that are less, which adapters never are.
      boxed: `transformer.abstract_params`, whose logical names tell matrices from norms.
      added: parameters beside them that train too, see `Objective.added`.
    """
    boxed, _ = trained(config, boxed)
    boxed |= added or {}
    o, rate = config.optimizer, schedule(config)
    decays = _per_parameter(boxed, _is_matrix)
    match o.name:
        case "adafactor":
            rule = optax.chain(optax.adafactor(multiply_by_parameter_scale=False), optax.scale(-1))
        case "muon":
            # consistent_rms gives updates the size of Adam's, so one learning rate serves both
            # (arXiv 2502.16982).
            muon = optax.contrib.muon(
                1.0, beta=o.b1, eps=o.eps, adam_b1=o.b1, adam_b2=o.b2, consistent_rms=0.2,
                muon_weight_dimension_numbers=_per_parameter(boxed, _muon_dims),
            )  # fmt: skip
            rule = optax.chain(muon, optax.scale(-1))
        case _:
            rule = optax.scale_by_adam(o.b1, o.b2, o.eps)
    # Optax's own rules decay each in a way of its own; here it is rate * decay * parameter for all.
    chain = optax.chain(
        optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity(),
        rule,
        optax.add_decayed_weights(o.weight_decay, decays),
        optax.scale_by_learning_rate(rate),
    )
    if config.model.param_dtype != "float32" and not config.adapter.rank:
        chain = with_master_weights(chain)
    return guarded(chain, config.train.spike_factor)


class Guard(NamedTuple):
    """State of `guarded`: of the rule inside, the usual gradient norm and from how many steps it
    is known, and how many steps were bad."""

    inner: optax.OptState
    usual_norm: jax.Array
    seen: jax.Array
    bad: jax.Array


def guarded(tx: optax.GradientTransformation, spike_factor: float):
    """The same rule, but a bad gradient changes nothing: neither parameters nor moments.

    Only the schedule moves on, so that the rate depends on the number of the step alone. Bad is one
    that is not finite or, where `spike_factor` is not 0, whose global norm is more than that many
    times the usual one, a running mean over about the last 50 steps.
    """

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return Guard(tx.init(params), jnp.zeros(()), zero, zero)

    def update(grads, state, params=None):
        norm = optax.tree.norm(grads).astype(jnp.float32)
        bad = ~jnp.isfinite(norm)
        if spike_factor:
            bad |= (state.seen >= _KNOWN) & (norm > spike_factor * state.usual_norm)
        updates, inner = tx.update(grads, state.inner, params)
        updates = jax.tree.map(lambda u: jnp.where(bad, jnp.zeros_like(u), u), updates)
        inner = jax.tree.map(
            lambda new, old: new if _is_schedule(new) else jnp.where(bad, old, new),
            inner, state.inner, is_leaf=_is_schedule,
        )  # fmt: skip
        share = 1.0 / jnp.minimum(state.seen + 1, 50)
        usual_norm = state.usual_norm + share * (norm - state.usual_norm)
        return updates, Guard(
            inner,
            jnp.where(bad, state.usual_norm, usual_norm),
            state.seen + ~bad,
            state.bad + bad,
        )

    return optax.GradientTransformation(init, update)


def _is_schedule(x) -> bool:
    return isinstance(x, optax.ScaleByScheduleState)


def _per_parameter(boxed, f):
    return jax.tree.map(lambda p: f(p.names), boxed, is_leaf=lambda x: isinstance(x, Param))


def _is_matrix(names) -> bool:
    """Not norms, nor the lengths that DoRA trains, whose dims of size 1 have no name."""
    return len(own_dims(names)) > 1 and None not in names


def _muon_dims(names):
    """Which dims are a matrix's rows and columns; None for what Adam updates.

    Muon is for matrices between hidden states, so not for embeddings of tokens or patches, the
    router and norms.
    """
    own = own_dims(names)
    if not _is_matrix(names) or {"vocab", "patches", "router"} & set(names):
        return None
    rows = row_dims(names)
    columns = tuple(i for i in own if i not in rows)
    return optax.contrib.MuonDimensionNumbers(rows, columns)
