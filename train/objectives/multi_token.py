"""Multi-token prediction: the loss of pretraining, and that of the token after the next one.

DeepSeek-V3 (arXiv 2412.19437, section 2.2) with one depth: `train.mtp_weight` times the
cross-entropy of the second token, divided by the same number of targets as the first. The module
that predicts it (`models/multi_token.py`) trains whatever `train.trainable` says and is saved with
the parameters as `mtp/...`; the model is evaluated, loaded and exported without it.

    puna train --config=tiny --config.train.objective=multi_token --workdir=runs/multi_token
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ...configs.schema import Config
from ...models.layers import look_up
from ...models.multi_token import MultiToken as Module
from ...models.parallel import sharding
from ...models.transformer import unembed_table
from . import Loss
from .next_token import NextToken, cross_entropy


@dataclasses.dataclass(frozen=True, eq=False)
class MultiToken(NextToken):
    """The mean cross-entropy of the next token and, with a weight, of the one after it.

    Attributes:
      weight: of the second loss.
    """

    weight: float = 0.3

    def added(self, config: Config) -> dict[str, Any]:
        # On no mesh, as in `transformer.abstract_params`.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return {"mtp": jax.eval_shape(lambda key: _init(config, key), jax.random.key(0))}

    def init_added(self, config: Config, key) -> dict[str, Any]:
        return {"mtp": sharding.unbox(_init(config, key))}

    def loss(self, model, params, frozen, batch) -> Loss:
        """Summed losses of a batch, see `NextToken.loss`; of the next token alone where `params`
        have no module.
        """
        out = self.states(model, params, batch)
        found = self.of_states(model, params, out, batch)
        if "mtp" not in params:
            return found
        c = model.config
        targets_BT = batch["targets_BT"]
        next_BTD = look_up(params["embed"]["table_VD"], targets_BT, c.activation_dtype)
        hidden_BTD, router = Module(c).apply(
            {"params": params["mtp"]}, out.hidden_BTD, next_BTD, batch["positions_BT"],
            batch["segment_ids_BT"],
        )  # fmt: skip
        seconds_BT, weights_BT = second_targets(batch)
        total, nll_BT = cross_entropy(
            hidden_BTD, unembed_table(c, params), seconds_BT, weights_BT, c.activation_dtype,
            self.z_loss, self.loss_chunk,
        )  # fmt: skip
        rows_B = found.rows_B | {
            "second_nll": jnp.sum(nll_BT * weights_BT, axis=1),
            "second_tokens": jnp.sum(weights_BT, axis=1),
        }
        routers = found.router | ({"mtp": router} if router else {})
        return Loss(found.total + self.weight * total, rows_B, routers)

    def summary(self, sums):
        """That of the next token, and `second_loss` in nats a target."""
        return super().summary(sums) | _second(sums)

    def report(self, sums):
        """Likewise."""
        numbers = super().report(sums)
        return numbers and numbers | _second(sums)


def make(config: Config, token_bytes_V) -> MultiToken:
    """The objective of pretraining with multi-token prediction."""
    t = config.train
    return MultiToken(t.z_loss, t.loss_chunk, token_bytes_V, t.mtp_weight)


def second_targets(batch):
    """The token after the next one [B, T], and what it weighs: nothing beyond the document."""
    segments_BT = batch["segment_ids_BT"]
    last = [(0, 0), (0, 1)]
    inside_BT = jnp.pad(segments_BT[:, 1:], last) == segments_BT
    targets_BT = jnp.pad(batch["targets_BT"][:, 1:], last)
    return targets_BT, jnp.where(inside_BT, jnp.pad(batch["weights_BT"][:, 1:], last), 0.0)


def _second(sums):
    if "second_nll" not in sums:
        return {}
    return {"second_loss": sums["second_nll"] / (sums["second_tokens"] + 1e-30)}


def _init(config: Config, key):
    n = max(1, jax.sharding.get_abstract_mesh().size)  # any shape that splits evenly would do
    ids_BT = jnp.zeros((n, n), jnp.int32)
    x_BTD = jnp.zeros((n, n, config.model.embed_dim))
    return Module(config.model).init(key, x_BTD, x_BTD, ids_BT, ids_BT)["params"]
