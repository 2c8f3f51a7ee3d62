"""What a training step carries: step count, parameters, optimizer state, each with its place."""

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from ..configs.schema import Config
from ..models.parallel import sharding
from ..models.transformer import abstract_params, init_params


class TrainState(flax.struct.PyTreeNode):
    """Updates done, the parameters after them, and the optimizer's moments."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def abstract_state(config: Config, tx: optax.GradientTransformation, mesh) -> TrainState:
    """Shape, dtype and sharding of every leaf of the state, computing nothing."""
    boxed = abstract_params(config.model)
    params, places = sharding.unbox(boxed), sharding.shardings(boxed, mesh)
    opt_state = jax.eval_shape(tx.init, params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)
    everywhere = sharding.replicated(mesh)
    state_places = TrainState(everywhere, places, _like_params(opt_state, params, places, mesh))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, state_places
    )


def _like_params(opt_state, params, places, mesh):
    """Moments lie where their parameter lies; counts and factored moments are replicated."""
    by_path: dict[str, tuple[tuple, NamedSharding]] = {
        sharding.path_name(path): (leaf.shape, place)
        for (path, leaf), place in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(places), strict=True
        )
    }

    def place(path, leaf):
        name = sharding.path_name(path)
        for start in range(len(path)):
            shape, found = by_path.get(sharding.path_name(path[start:]), (None, None))
            if shape == leaf.shape:
                return found
        assert leaf.ndim < 2 or "v_" in name, f"{name}: a whole moment without a parameter"
        return sharding.replicated(mesh)

    return jax.tree.map_with_path(place, opt_state)


def init_state(config: Config, tx: optax.GradientTransformation, mesh) -> TrainState:
    """A fresh state: random parameters from `train.seed`, the same numbers on any mesh."""
    abstract = abstract_state(config, tx, mesh)
    params = init_params(config.model, jax.random.key(config.train.seed), mesh)
    # Without explicit places optax's counters would all land on one device.
    places = jax.tree.map(lambda x: x.sharding, abstract.opt_state)
    opt_state = jax.jit(tx.init, out_shardings=places)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), sharding.replicated(mesh))
    return TrainState(step, params, opt_state)
