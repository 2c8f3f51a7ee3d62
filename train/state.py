"""What a training step carries: step count, parameters, optimizer state, each with its place."""

import dataclasses
import pathlib

import flax
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import NamedSharding

from ..configs import patterns
from ..configs.schema import Config
from ..models import adapters, leaf
from ..models.adapters import attach
from ..models.parallel import sharding
from ..models.parallel.sharding import Param
from ..models.quantize import TYPES, quantize_tree
from ..models.transformer import abstract_params, init_params
from ..models.weights import run
from .objectives import Objective


class TrainState(flax.struct.PyTreeNode):
    """What a run is at: updates done, what trains, what does not, and the optimizer's moments.

    params: the parameters that train: the model's nested dict or a part of it, or adapters at the
      places of their weights; and what the objective adds.
    frozen: trees that do not train, by name; "base" is the rest of the model's parameters, others
      are the objective's.
    """

    step: jax.Array
    params: dict
    frozen: dict
    opt_state: optax.OptState


def split(tree: dict, trainable: str) -> tuple[dict, dict]:
    """Split a nested dict of parameters into what trains and what does not.

    Args:
      trainable: `train.trainable`: regular expressions, comma separated, one of which must be found
        in the path of a parameter that trains, such as `blocks/layer_0/attention/wq_DNH`. Empty:
        all train.

    Returns:
      Two dicts without empty parts; `join` undoes it.

    Raises:
      ConfigError: an expression is malformed, or nothing matches it.
    """
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Param))
    flat = {sharding.path_name(path): x for path, x in leaves}
    found = patterns.matching("train.trainable", trainable, list(flat))
    chosen = set(found if trainable.strip(", ") else flat)
    parts = (
        {path: x for path, x in flat.items() if (path in chosen) == trains}
        for trains in (True, False)
    )
    trains, rest = (traverse_util.unflatten_dict(part, sep="/") for part in parts)
    return trains, rest


def trained(config: Config, boxed) -> tuple[dict, dict]:
    """What trains and what does not, of boxed parameters, boxed likewise.

    Args:
      boxed: `transformer.abstract_params`.

    Raises:
      ConfigError: a pattern of `train.trainable` or `adapter.targets` matches nothing.
    """
    if config.adapter.rank:
        return adapters.box(boxed, config.adapter), adapters.box_base(boxed, config.adapter)
    return split(boxed, config.train.trainable)


def join(params: dict, frozen: dict) -> dict:
    """The model's parameters, whole: those that train and those of `frozen["base"]`."""
    return attach(params, frozen.get("base", {}))


def abstract_state(
    config: Config, tx: optax.GradientTransformation, mesh, objective: Objective | None = None
) -> TrainState:
    """Shape, dtype and sharding of every leaf of the state, computing nothing.

    Args:
      objective: may have parameters of its own beside the model's; none where left out.
    """
    boxed, trees = _boxed(config, objective)
    params, places = sharding.unbox(boxed), sharding.shardings(boxed, mesh)
    frozen = {
        n: (sharding.unbox(tree), sharding.shardings(tree, mesh)) for n, tree in trees.items()
    }
    opt_state = jax.eval_shape(tx.init, params)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        params,
        {name: tree for name, (tree, _) in frozen.items()},
        opt_state,
    )
    state_places = TrainState(
        sharding.replicated(mesh),
        places,
        {name: tree for name, (_, tree) in frozen.items()},
        _like_params(opt_state, params, places, mesh),
    )
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, state_places
    )


def _boxed(config: Config, objective: Objective | None) -> tuple[dict, dict]:
    """The parameters that train and the trees that do not, boxed."""
    boxed, base = trained(config, abstract_params(config.model))
    trees = {"base": base} if base else {}
    if objective:
        trees |= objective.abstract_frozen(config, boxed)
        boxed |= objective.added(config)
    return boxed, trees


def restore_for_evaluation(folder: pathlib.Path, config: Config, objective: Objective, mesh):
    """The parameters of a checkpoint and its frozen trees, as its run evaluates them.

    Args:
      config: of that run.

    Returns:
      (params, frozen), as of `Objective.loss`.

    Raises:
      UserError: they cannot be read.
    """
    params, frozen = (
        jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            sharding.unbox(boxed), sharding.shardings(boxed, mesh),
        )
        for boxed in _boxed(config, objective)
    )  # fmt: skip
    params = run.restore(folder, "params", params)
    frozen = frozen and run.restore_frozen(folder, frozen)
    return join(params, frozen), frozen


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


def init_state(
    config: Config, tx: optax.GradientTransformation, mesh, objective: Objective | None = None
) -> TrainState:
    """A fresh state: random parameters from `train.seed`, the same numbers on any mesh."""
    # Rounded to `param_dtype` only once the optimizer has its float32 copy.
    model = dataclasses.replace(config.model, param_dtype="float32")
    params = init_params(model, jax.random.key(config.train.seed), mesh)
    return state_of(config, tx, mesh, params, objective)


def state_of(
    config: Config, tx: optax.GradientTransformation, mesh, params,
    objective: Objective | None = None,
) -> TrainState:  # fmt: skip
    """The state before the first step.

    Adapters are new ones; those that the parameters have are merged into them first.

    Args:
      params: all parameters of the model, in any dtype; the optimizer starts from them as they
        are, before they are rounded to `model.param_dtype`. With those of the objective, or new
        ones are made.
    """
    abstract = abstract_state(config, tx, mesh, objective)
    own = objective.added(config) if objective else {}
    held = {name: params[name] for name in own if name in params}
    params = {name: tree for name, tree in params.items() if name not in own}
    if config.adapter.rank:
        boxed, kind = abstract_params(config.model), config.adapter.quantize
        base = leaf.plain(params, "float32", TYPES.get(kind, ()))
        if kind != "none":
            base = quantize_tree(base, boxed, kind)
        key = jax.random.fold_in(jax.random.key(config.train.seed), 1)
        new = adapters.init(adapters.box(boxed, config.adapter), key, mesh)
        params = leaf.with_magnitudes(new, base)
    else:
        params, base = split(leaf.plain(params, "float32"), config.train.trainable)
    frozen = {"base": base} if base else {}
    if objective:
        frozen |= objective.initial_frozen(config, mesh, params)
        out = jax.tree.map(lambda x: x.sharding, {name: abstract.params[name] for name in own})
        key = jax.random.fold_in(jax.random.key(config.train.seed), 2)
        made = jax.jit(lambda key: objective.init_added(config, key), out_shardings=out)(key)
        held = jax.tree.map(lambda x, p: jax.device_put(x.astype(jnp.float32), p), held,
                            {name: out[name] for name in held})  # fmt: skip
        params |= made | held
    # Without explicit places optax's counters would all land on one device.
    places = jax.tree.map(lambda x: x.sharding, abstract.opt_state)
    opt_state = jax.jit(tx.init, out_shardings=places)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), sharding.replicated(mesh))
    state = TrainState(step, params, frozen, opt_state)
    return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), state, abstract)
