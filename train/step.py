"""The training step: gradient of the objective, accumulated over microbatches, and the update."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ..configs.errors import ConfigError
from ..configs.schema import Config
from ..models.moe import RouterStats
from ..models.parallel import sharding
from ..models.transformer import Transformer
from . import compiler
from .master_weights import apply_updates
from .objectives import Objective
from .optimizer import learning_rate
from .state import TrainState, join


def make_train_step(config: Config, model: Transformer, tx, objective: Objective, places):
    """Compile-ready step: (state, batch) -> (state, metrics), the state donated.

    Args:
      config: reads `train` and `model.bias_update_rate`.
      model: what the objective evaluates.
      tx: the optimizer of `make_optimizer`, whose state counts bad steps.
      objective: the loss.
      places: the state's shapes and shardings, from `abstract_state`.
    """
    parts = config.train.microbatches

    def step(state: TrainState, batch):
        weight = jnp.maximum(jnp.sum(objective.weight_B(batch)), 1.0)

        def part_loss(params, part):
            """This part's share of the mean loss over the batch."""
            part = part | {"step": state.step}
            found = objective.loss(model, join(params, state.frozen), state.frozen, part)
            router = jax.tree.map(lambda x: x / parts, found.router)
            # Targets are weighed over the whole batch; routers balance each part for itself.
            auxiliary = sum(jnp.sum(layer.loss) for _, layer in router_layers(router))
            sums = {name: jnp.sum(x_B) for name, x_B in found.rows_B.items()}
            return found.total / weight + auxiliary, {"rows": sums, "router": router}

        def gradient(part):
            """In float32, whatever the parameters are stored in: parts are summed, and squared."""
            grads, sums = jax.grad(part_loss, has_aux=True)(state.params, part)
            return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(part)), None

        if parts == 1:  # without a second tree of gradients
            grads, sums = gradient(batch)
        else:
            cut = split(batch, parts)
            shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], cut))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, sums), _ = jax.lax.scan(add, zeros, cut)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        bad = opt_state.bad > state.opt_state.bad
        if config.model.bias_update_rate:
            rate = config.model.bias_update_rate
            updates = balance_routers(updates, sums["router"], rate, bad)
        params, opt_state = apply_updates(state.params, updates, opt_state)
        metrics = {
            **objective.summary(sums["rows"]),
            "learning_rate": learning_rate(config, state.opt_state),
            "grad_norm": optax.tree.norm(grads),
            "bad_steps": opt_state.bad,
            **router_metrics(sums["router"]),
        }
        return TrainState(state.step + 1, params, state.frozen, opt_state), metrics

    out = jax.tree.map(lambda x: x.sharding, places)
    # Metrics are whole everywhere: every process of several can read them.
    whole = NamedSharding(out.step.mesh, PartitionSpec())
    options = compiler.options(config.train.compiler_options, out.step.mesh)
    return jax.jit(
        step, donate_argnums=0, out_shardings=(out, whole), compiler_options=options or None
    )


def check_batch(c: Config, mesh) -> None:
    """Every microbatch must split evenly over the devices, and every row too."""
    rows, axes = c.train.batch_size // c.train.microbatches, sharding.product("batch", mesh)
    if rows % (parts := sharding.parts("batch", mesh)):
        raise ConfigError(
            f"train.batch_size={c.train.batch_size} / train.microbatches={c.train.microbatches} = "
            f"{rows} must be a multiple of {axes}"
        )
    stages = sharding.parts("layers", mesh)
    turns = c.model.pipeline_microbatches or stages
    if stages > 1 and rows // parts % turns:
        raise ConfigError(
            f"train.batch_size={c.train.batch_size} / train.microbatches={c.train.microbatches} = "
            f"{rows} must be a multiple of {turns} microbatches in the pipeline times {axes}"
        )
    devices = sharding.parts("length", mesh)
    if devices > 1 and c.data.seq_len % (2 * devices):
        raise ConfigError(
            f"data.seq_len={c.data.seq_len} must be a multiple of 2 * "
            f"{sharding.product('length', mesh)}: each device has two blocks of a row"
        )


def split(batch, parts: int):
    """[B, ...] -> [parts, B / parts, ...], every part spread evenly over the devices."""

    def cut(x):
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(cut, batch)


def router_layers(router) -> list[tuple[tuple[str, str], RouterStats]]:
    """The statistics of each MoE layer of a period with their place in the parameter tree."""
    return [((b, name), stats) for b, layers in router.items() for name, stats in layers.items()]


def router_metrics(router) -> dict[str, jax.Array]:
    """Means over the MoE layers; `router_load` is per expert, 1 / E where even."""
    layers = [stats for _, stats in router_layers(router)]
    if not layers:
        return {}

    def mean(values):
        return jnp.mean(jnp.concatenate([jnp.atleast_1d(v) for v in values]), axis=0)

    load_E = mean([jnp.atleast_2d(s.load_E) for s in layers])
    return {
        "router_entropy": mean([s.entropy for s in layers]),
        "router_dropped": mean([s.dropped for s in layers]),
        "router_loss": sum((jnp.sum(s.loss) for s in layers), jnp.zeros(())),
        "router_load": load_E,
    }


def balance_routers(updates, router, rate: float, bad):
    """Add one step of each router's bias toward an even load (DeepSeek-V3, arXiv 2412.19437).

    Nothing moves in a bad step, whose statistics may be of no use. The bias takes part in the
    choice of experts only and has no gradient; this is its update.
    """
    updates = jax.tree.map(lambda x: x, updates)  # new dicts, to be changed
    for (block, name), stats in router_layers(router):
        moe = updates.get(block, {}).get(name, {}).get("moe", {})
        if "router_bias_E" not in moe:  # it does not train
            continue
        even = jnp.mean(stats.load_E, axis=-1, keepdims=True)
        moe["router_bias_E"] += jnp.where(bad, 0.0, rate * jnp.sign(even - stats.load_E))
    return updates
