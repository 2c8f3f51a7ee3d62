"""The module that predicts the token after the next one (DeepSeek-V3, arXiv 2412.19437, 2.2).

One depth: what the model knows at a token and the embedding of the next token, both normed, are
mixed and pass one more layer; embedding and output are those of the model. Further depths are left
out, and using it to draft tokens in generation.
"""

import jax.numpy as jnp
from flax import linen as nn

from ..configs.schema import ModelConfig
from .layers import RMSNorm, contract, normal, param
from .masks import Tokens
from .moe import router_stats
from .parallel import context
from .parallel.sharding import constrain
from .remat import rematerialized
from .transformer import Layer


class MultiToken(nn.Module):
    """The states that logits of the token after the next come from.

    `layer` is of the kind of the last that attends to the text.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, hidden_BTD, next_BTD, positions_BT, segment_ids_BT):
        """Returns states [B, T, D], and `RouterStats` by layer if it is a mixture.

        Args:
          hidden_BTD: `transformer.States.hidden_BTD`.
          next_BTD: embeddings of the token after each.
        """
        c = self.config
        shape, names, init = (
            (c.embed_dim,) * 2,
            ("embed", "norm"),
            normal((2 * c.embed_dim) ** -0.5),
        )
        x_BTD = 0.0
        for name, y_BTD in (("hidden", hidden_BTD), ("next", next_BTD)):
            w_DE = param(self, f"w_{name}_DE", shape, names, init, c.param_dtype)
            y_BTD = RMSNorm(c, name=f"{name}_norm")(y_BTD)
            x_BTD += contract("BTD,DE->BTE", y_BTD, w_DE, c.activation_dtype, "float32")
        x_BTD = constrain(jnp.asarray(x_BTD, c.activation_dtype), "batch", "length", "act_embed")
        tokens = Tokens(positions_BT, segment_ids_BT)
        zigzag = context.devices(x_BTD.shape[1]) > 1
        if zigzag:
            x_BTD = context.to_zigzag(x_BTD)
            tokens = Tokens(*map(context.to_zigzag, (positions_BT, segment_ids_BT)), zigzag)
        x_BTD = constrain(x_BTD, "batch", "residual_length", "act_embed")
        last = max(i for i in range(c.num_layers) if not c.is_cross(i))
        layer = rematerialized(Layer, c)(c, last, name="layer")
        x_BTD, _, sums = layer(x_BTD, tokens, None, None)
        if zigzag:
            x_BTD = context.from_zigzag(x_BTD)
        router = {} if sums is None else {"layer": router_stats(sums, c)}
        return RMSNorm(c, name="norm")(x_BTD), router
