"""The training step: gradient of the objective, accumulated over microbatches, and the update."""

import jax
import jax.numpy as jnp
import optax

from ..configs.schema import Config
from ..models.transformer import Transformer
from .objectives import next_token
from .state import TrainState


def make_train_step(config: Config, model: Transformer, tx, token_bytes_V, places):
    """Compile-ready step: (state, batch) -> (state, metrics), the state donated.

    Args:
      config: reads `train`.
      model: what the objective evaluates.
      tx: the optimizer of `make_optimizer`.
      token_bytes_V: bytes of text that each token id stands for.
      places: the state's shapes and shardings, from `abstract_state`.
    """
    def step(state: TrainState, batch):
        weight = jnp.maximum(jnp.sum(batch["weights_BT"]), 1.0)

        def mean_loss(params, part):
            total, sums = next_token.loss(
                model, params, part, config.train.z_loss, config.train.loss_chunk
            )
            # Divided by the weight of the whole batch, so that parts add up to its mean.
            return total / weight, sums

        gradient = jax.grad(mean_loss, has_aux=True)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(state.params, part)), None

        cut = split(batch, config.train.microbatches)
        shapes = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], cut))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, sums), _ = jax.lax.scan(add, zeros, cut)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        bytes_ = jnp.sum(jnp.asarray(token_bytes_V)[batch["targets_BT"]] * batch["weights_BT"])
        metrics = {
            "loss": sums["nll"] / weight,
            "bits_per_byte": sums["nll"] / jnp.log(2.0) / jnp.maximum(bytes_, 1.0),
            "grad_norm": optax.global_norm(grads),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    out = jax.tree.map(lambda x: x.sharding, places)
    return jax.jit(step, donate_argnums=0, out_shardings=(out, None))


def split(batch, parts: int):
    """[B, ...] -> [parts, B / parts, ...], every part spread evenly over the devices."""

    def cut(x):
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(cut, batch)
