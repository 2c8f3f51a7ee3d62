"""The vision tower of Llama 3.2: the tiles of an image together -> features to attend to.

Patches and a class token of all tiles run through one encoder, with tables of positions in the
place of RoPE and one entry for each shape of the grid of tiles; gated layers over all tiles follow,
and the projector reads their output beside the input of some layers before, as in Meta's code
(transformers 5.23 takes the outputs of those layers, one further). Letters: M images of a row,
R = B * M of the batch, I tiles of an image, Y and X rows and columns of pixels, C colours, P
patches and class token of a tile, W values of a patch, G shapes of a grid and none, T = I * P.
"""

from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ..configs.architecture import ModelConfig, VisionConfig
from ..configs.errors import UserError
from .encoder import EncoderLayer, LayerNorm
from .fusion import Features
from .layers import add_bias, contract, gate, normal, param, zeros
from .masks import Tokens
from .media.images import grids
from .parallel.sharding import constrain
from .remat import rematerialized
from .vision import COLOURS, cut_patches

# Patches of a tile are filled up with zeros to a multiple of this, which real ones attend to.
_MULTIPLE = 8


class TiledImages(flax.struct.PyTreeNode):
    """The images of each row in the order of their tokens.

    tiles_BMIYXC: normalised pixels; what fills up an image may be anything. grids_BM: which of
    `media.images.grids` the tiles of each image are laid out in, counted from 1; 0 for no image.
    """

    tiles_BMIYXC: jax.Array
    grids_BM: jax.Array


def no_images(config: VisionConfig, batch_size: int) -> TiledImages:
    """`TiledImages` of one image a row, which is not there."""
    side = config.image_size
    shape = (batch_size, 1, config.max_tiles, side, side, COLOURS)
    return TiledImages(jnp.zeros(shape, jnp.float32), jnp.zeros((batch_size, 1), jnp.int32))


def batch_images(config: VisionConfig, rows: Sequence[Sequence], max_images: int = 0):
    """Put the images of the rows of a batch into the NumPy arrays of a `TiledImages`.

    Args:
      config: of the vision tower.
      rows: for each row its images, as `media.images.tile_together` gives them.
      max_images: images to make room for in each row; 0 = as many as the fullest row has.

    Raises:
      UserError: tiles of another shape, or more than `max_images` in a row.
    """
    most = max((len(row) for row in rows), default=0)
    if max_images and most > max_images:
        raise UserError(f"max_images={max_images} must be at least {most} for these rows")
    shape = (config.max_tiles, config.image_size, config.image_size, COLOURS)
    tiles = np.zeros((len(rows), max_images or max(1, most), *shape), np.float32)
    numbers = np.zeros(tiles.shape[:2], np.int32)
    for r, row in enumerate(rows):
        for i, (image, number) in enumerate(row):
            _check_tiles(config, np.shape(image))
            tiles[r, i], numbers[r, i] = image, number
    return TiledImages(tiles, numbers)


class TileEncoder(nn.Module):
    """Tower and projector."""

    config: ModelConfig

    @nn.compact
    def __call__(self, images: TiledImages) -> Features:
        """Encode every image by itself; features are those of image after image, tile after tile.

        Raises:
          UserError: tiles of another size or number than the config's, or a model without vision.
        """
        c, v = self.config, self.config.vision
        B, M, num_tiles, *shape = images.tiles_BMIYXC.shape
        _check_tiles(v, (num_tiles, *shape))
        R, D, P = B * M, v.embed_dim, (v.image_size // v.patch_size) ** 2 + 1
        grids_R = jnp.asarray(images.grids_BM).reshape(R)
        counts_G = np.array([0] + [rows * columns for rows, columns in grids(num_tiles)], np.int32)
        valid_RI = jnp.arange(num_tiles) < jnp.asarray(counts_G)[grids_R][:, None]

        # A gradient of zero would not stop a NaN in what fills up a row.
        tiles = images.tiles_BMIYXC.reshape(R, num_tiles, *shape)
        tiles = jnp.where(valid_RI[:, :, None, None, None], tiles, 0.0)
        tiles = constrain(tiles, "batch", None, None, None, None).reshape(-1, *shape)
        W = COLOURS * v.patch_size**2
        patch_WD = param(
            self, "patch_WD", (W, D), ("patches", "embed"), normal(W**-0.5), c.param_dtype
        )
        patches_RTW = cut_patches(tiles, v.patch_size).reshape(R, -1, W)
        x_RTD = contract("RTW,WD->RTD", patches_RTW, patch_WD, c.activation_dtype)
        x_RTD = constrain(x_RTD, "batch", None, "act_embed")
        x_RIPD = self._add_to_tiles("pre_tile", x_RTD.reshape(R, num_tiles, P - 1, D), grids_R)
        class_D = param(self, "class_D", (D,), ("norm",), normal(D**-0.5), c.param_dtype)
        class_RI1D = jnp.broadcast_to(class_D.astype(x_RIPD.dtype), (R, num_tiles, 1, D))
        x_RIPD = jnp.concatenate([class_RI1D, x_RIPD], axis=2)
        x_RIPD = self._add_positions(x_RIPD, grids_R)
        x_RIPD = LayerNorm(c, name="norm_in")(x_RIPD)

        extra = -P % _MULTIPLE
        x_RTD = jnp.pad(x_RIPD, ((0, 0), (0, 0), (0, extra), (0, 0))).reshape(R, -1, D)
        # The tower takes an image that is not there for one of one tile.
        there_RI1 = (valid_RI | (jnp.arange(num_tiles) == 0))[:, :, None]
        there_RT = (there_RI1 & (jnp.arange(P + extra) < P)).reshape(R, -1)
        # All is attended to, only what is not there does not see what is not there either.
        one_RT = jnp.ones(there_RT.shape, jnp.int32)
        queries = Tokens(there_RT.astype(jnp.int32), one_RT)
        keys = Tokens(1 - there_RT.astype(jnp.int32), one_RT)
        x_RTD, kept_ORTD = self._layers(x_RTD, queries, keys)
        x_RTD = LayerNorm(c, name="norm_out")(x_RTD)
        x_RIPD = self._add_to_tiles("post_tile", x_RTD.reshape(R, num_tiles, -1, D), grids_R)
        x_RTD = constrain(x_RIPD.reshape(R, -1, D), "batch", None, "act_embed")
        scan = _scan(rematerialized(EncoderLayer, c), v.global_layers, nn.broadcast)
        x_RTD, _ = scan(c, v, True, name="global_blocks")(x_RTD, None, queries, keys)

        # The states lie side by side for each number, as they are published.
        kept_RTDO = jnp.moveaxis(kept_ORTD, 0, -1)
        x_RTF = jnp.concatenate([x_RTD, kept_RTDO.reshape(*x_RTD.shape[:2], -1)], axis=-1)
        x_RTF = x_RTF.reshape(R, num_tiles, P + extra, -1)[:, :, :P].reshape(R, num_tiles * P, -1)
        x_RTF = constrain(x_RTF, "batch", None, None)
        F = x_RTF.shape[-1]
        projector_FD = param(self, "projector_FD", (F, c.embed_dim), ("mlp", "embed"),
                             normal(F**-0.5), c.param_dtype)  # fmt: skip
        bias_D = param(self, "projector_bias_D", (c.embed_dim,), ("norm",), zeros, c.param_dtype)
        y_RTD = contract("RTF,FD->RTD", x_RTF, projector_FD, c.activation_dtype)
        y_RTD = add_bias(constrain(y_RTD, "batch", None, "act_embed"), bias_D)
        values_BUD = constrain(y_RTD.reshape(B, -1, c.embed_dim), "batch", None, "act_embed")
        return Features(values_BUD, jnp.repeat(valid_RI, P, axis=1).reshape(B, -1))

    def _layers(self, x_RTD, queries, keys):
        """The output of the layers, and the inputs of those whose inputs are features too."""
        c, v = self.config, self.config.vision
        chosen = [int(layer) for layer in filter(None, v.intermediate_layers.split(","))]
        slots_L = np.full(v.num_layers, len(chosen), np.int32)
        slots_L[chosen] = np.arange(len(chosen))
        kept_ORTD = jnp.zeros((len(chosen), *x_RTD.shape), x_RTD.dtype)
        scan = _scan(_Block, v.num_layers, (nn.broadcast, nn.broadcast, 0))
        (x_RTD, kept_ORTD), _ = scan(c, name="blocks")(
            (constrain(x_RTD, "batch", None, "act_embed"), kept_ORTD), queries, keys,
            jnp.asarray(slots_L),
        )  # fmt: skip
        return x_RTD, kept_ORTD

    def _add_to_tiles(self, name: str, x_RIPD, grids_R):
        """x plus a vector of each tile, by its place in the grid, behind a gate."""
        c, v = self.config, self.config.vision
        shape = (len(grids(v.max_tiles)) + 1, v.max_tiles, v.embed_dim)
        table_GID = param(self, f"{name}_GID", shape, ("patches", "patches", "embed"),
                          normal(v.embed_dim**-0.5), c.param_dtype)  # fmt: skip
        added_RID = gate(
            self,
            f"{name}_gate_1",
            jnp.take(table_GID, grids_R, axis=0).astype(x_RIPD.dtype),
            zeros,
            c,
        )
        return x_RIPD + added_RID[:, :, None]

    def _add_positions(self, x_RIPD, grids_R):
        """x plus a vector of each place in a tile, mixed by a gate with one of tile and place."""
        c, v, P = self.config, self.config.vision, x_RIPD.shape[2]
        std = normal(v.embed_dim**-0.5)
        positions_PD = param(
            self, "positions_PD", (P, v.embed_dim), ("patches", "embed"), std, c.param_dtype
        )
        shape = (len(grids(v.max_tiles)) + 1, v.max_tiles, P, v.embed_dim)
        names = ("patches", "patches", "patches", "embed")
        table_GIPD = param(self, "tile_positions_GIPD", shape, names, std, c.param_dtype)
        g_1 = jnp.tanh(
            param(self, "positions_gate_1", (1,), ("norm",), zeros, c.param_dtype)
            .astype(jnp.float32)
        )  # fmt: skip
        x_RIPD += ((1 - g_1) * positions_PD.astype(jnp.float32)).astype(x_RIPD.dtype)
        return x_RIPD + (g_1 * jnp.take(table_GIPD, grids_R, axis=0).astype(jnp.float32)).astype(
            x_RIPD.dtype
        )


class _Block(nn.Module):
    """A layer in a scan; its input is kept in a slot of its own, if there is such a slot."""

    config: ModelConfig

    @nn.compact
    def __call__(self, carry, queries, keys, slot):
        x_RTD, kept_ORTD = carry
        kept_ORTD = kept_ORTD.at[slot].set(x_RTD, mode="drop")
        layer = rematerialized(EncoderLayer, self.config)
        x_RTD, _ = layer(self.config, self.config.vision, name="layer")(x_RTD, None, queries, keys)
        return (x_RTD, kept_ORTD), None


def _scan(layer, length, in_axes):
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        metadata_params={nn.meta.PARTITION_NAME: "encoder_layers"},
    )


def encode_images(config: ModelConfig, params, images: TiledImages) -> Features:
    """Run the tower alone, for features that are used more than once.

    `Transformer` takes the result in the place of `images`.
    """
    features = TileEncoder(config).apply({"params": params["vision"]}, images)
    assert isinstance(features, Features)
    return features


def _check_tiles(v: VisionConfig, shape):
    wanted = (v.max_tiles, v.image_size, v.image_size, COLOURS)
    if shape != wanted:
        raise UserError(f"images of tiles of shape {shape} must be of shape {wanted}, see "
                        "model.vision.max_tiles and image_size")  # fmt: skip
