"""Early fusion: features of images and sound in the place of token embeddings.

An image or a clip stands in the text as a run of one token id; the k-th such token of a row is
embedded as the k-th feature of that row, so one decoder reads everything. Letter: U features of a
row.
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np

from ..configs.architecture import VisionConfig
from ..configs.errors import UserError


class Features(flax.struct.PyTreeNode):
    """Feature vectors of each row in reading order; those that are not valid do not exist."""

    values_BUD: jax.Array
    valid_BU: jax.Array

    def skip(self, count_B):
        """Leave out the first `count_B` of each row, for a row that is read in pieces.

        Give each piece what `skip` leaves for the number of feature tokens in earlier ones.
        """
        rank_BU = jnp.cumsum(self.valid_BU, axis=1, dtype=jnp.int32)
        return self.replace(valid_BU=self.valid_BU & (rank_BU > jnp.asarray(count_B)[:, None]))


def features_per_image(config: VisionConfig) -> int:
    """Features of an image to attend to: patches and class token of as many tiles as it may have.

    An image that is fused has as many as `vision.features_per_tile` says for each of its tiles.
    """
    return config.max_tiles * ((config.image_size // config.patch_size) ** 2 + 1)


def fuse(x_BTD, tokens_BT, token_id: int, features: Features):
    """Write the k-th feature of each row over the k-th token of the row that is `token_id`.

    A token beyond the last feature keeps its own embedding and a feature beyond the last token
    is dropped, because shapes cannot depend on counts; `check_count` finds both on the host.
    """
    U = features.valid_BU.shape[1]
    if not U:
        return x_BTD
    here_BT = jnp.asarray(tokens_BT) == token_id
    rank_BT = jnp.cumsum(here_BT, axis=1, dtype=jnp.int32) - 1
    here_BT &= rank_BT < jnp.sum(features.valid_BU, axis=1, keepdims=True)
    order_BU = jnp.argsort(~features.valid_BU, axis=1, stable=True)
    source_BT = jnp.take_along_axis(order_BU, jnp.clip(rank_BT, 0, U - 1), axis=1)
    picked_BTD = jnp.take_along_axis(features.values_BUD, source_BT[..., None], axis=1)
    return jnp.where(here_BT[..., None], picked_BTD.astype(x_BTD.dtype), x_BTD)


def check_count(what: str, key: str, token_id: int, tokens_BT, count_B) -> None:
    """Raise `UserError` for the first row with more or fewer feature tokens than features.

    Args:
      what: what the features come from, for the message.
      key: the configuration key that holds `token_id`.
      count_B: features of each row.
    """
    found_B = np.sum(np.asarray(tokens_BT) == token_id, axis=1)
    count_B = np.asarray(count_B)
    if len(found_B) != len(count_B):
        raise UserError(f"{len(found_B)} rows of tokens have {len(count_B)} rows of {what}")
    for row in np.flatnonzero(found_B != count_B)[:1]:
        raise UserError(
            f"row {row} has {found_B[row]} tokens of {key}={token_id}, but its {what} give "
            f"{count_B[row]} features; the two must be equal"
        )
