"""The vision tower of Llama 4: tiles of pixels -> features in the text model's width.

Patches and a class token run through the encoder with a 2-D RoPE; the class token is dropped,
2 x 2 patches are joined (pixel shuffle), and an adapter and a projector follow. `images` makes
tiles of pictures. Letters: I tiles of a row, R = B * I of the batch, Y and X rows and columns of
pixels, C colours, P patches of a tile, W values of a patch, A width of the adapter.
"""

from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ..configs.architecture import ModelConfig, VisionConfig
from ..configs.errors import UserError
from .encoder import Encoder, gelu
from .fusion import Features, check_count
from .layers import contract, normal, param
from .parallel.sharding import constrain

_ROPE_THETA = 10000.0
# Of a pixel.
COLOURS = 3


class Images(flax.struct.PyTreeNode):
    """The tiles of each row, image after image in the order of their tokens.

    tiles_BIYXC: pixels from -1 to 1. num_tiles_B: how many of a row's I tiles there are; what
    fills it up may be anything.
    """

    tiles_BIYXC: jax.Array
    num_tiles_B: jax.Array


def features_per_tile(config: VisionConfig) -> int:
    """Feature vectors of one tile: its patches, four joined into one."""
    return (config.image_size // config.patch_size // 2) ** 2


def no_images(config: VisionConfig, batch_size: int) -> Images:
    """`Images` of one tile a row, none of which is there."""
    shape = (batch_size, 1, config.image_size, config.image_size, COLOURS)
    return Images(jnp.zeros(shape, jnp.float32), jnp.zeros(batch_size, jnp.int32))


def batch_images(config: VisionConfig, rows: Sequence[Sequence], max_tiles: int = 0) -> Images:
    """Put the images of the rows of a batch into one pair of NumPy arrays.

    Args:
      config: of the vision tower.
      rows: for each row the tiles [n, Y, X, 3] of its images, as `images.tile_image` gives them.
      max_tiles: tiles to make room for in each row; 0 = as many as the fullest row has. Fix it
        where every batch must have one shape.

    Raises:
      UserError: tiles of another shape, or more than `max_tiles` in a row.
    """
    shape = (config.image_size, config.image_size, COLOURS)
    for r, row in enumerate(rows):
        for tiles in row:
            if np.ndim(tiles) != 4 or np.shape(tiles)[1:] != shape:
                raise UserError(f"row {r} has tiles of shape {np.shape(tiles)}, which must be "
                                f"(n, {', '.join(map(str, shape))})")  # fmt: skip
    counts = [sum(len(tiles) for tiles in row) for row in rows]
    room = max_tiles or max(1, *counts, 1)
    if counts and max(counts) > room:
        raise UserError(f"row {int(np.argmax(counts))} has {max(counts)} tiles, which must be at "
                        f"most max_tiles={room}")  # fmt: skip
    out = np.zeros((len(rows), room, *shape), np.float32)
    for r, row in enumerate(rows):
        if counts[r]:
            out[r, : counts[r]] = np.concatenate([np.asarray(tiles) for tiles in row])
    return Images(out, np.array(counts, np.int32))


def check_images(config: ModelConfig, tokens_BT, num_tiles_B) -> None:
    """Check on the host that every row has as many patch tokens as its tiles give features.

    Raises:
      UserError: the first row where they differ.
    """
    count_B = np.asarray(num_tiles_B) * features_per_tile(config.vision)
    check_count("tiles", "model.vision.token_id", config.vision.token_id, tokens_BT, count_B)


def encode_images(config: ModelConfig, params, images: Images) -> Features:
    """Run the tower alone, for features that are used more than once.

    `Transformer` takes the result in the place of `images`.
    """
    features = VisionEncoder(config).apply({"params": params["vision"]}, images)
    assert isinstance(features, Features)
    return features


def rope_angles(config: VisionConfig) -> np.ndarray:
    """Radians by which each pair of a head turns, float32 [1, P + 1, H / 2].

    The first half of the pairs turns with the column of the patch, the second half with its row,
    both counted from 1; the class token does not turn.
    """
    side = config.image_size // config.patch_size
    pairs = config.embed_dim // config.num_heads // 2
    frequencies = _ROPE_THETA ** (-np.arange(0, pairs, 2, dtype=np.float64) / pairs)
    row, column = np.divmod(np.arange(side * side), side)
    patches = np.concatenate(
        [np.outer(column + 1, frequencies), np.outer(row + 1, frequencies)], axis=1
    )
    return np.pad(patches, ((0, 1), (0, 0)))[None].astype(np.float32)


def cut_patches(tiles_RYXC, patch_size: int):
    """[R, Y, X, C] -> [R, P, W]: patches row by row, the values of each by colour, row, column."""
    R, Y, X, C = tiles_RYXC.shape
    p = patch_size
    cut = tiles_RYXC.reshape(R, Y // p, p, X // p, p, C).transpose(0, 1, 3, 5, 2, 4)
    return cut.reshape(R, (Y // p) * (X // p), C * p * p)


def pixel_shuffle(x_RPD):
    """[R, P, D] -> [R, P / 4, 4 D]: squares of 2 x 2 patches joined, row by row in each."""
    R, P, D = x_RPD.shape
    half = round(P**0.5) // 2
    x = x_RPD.reshape(R, half, 2, half, 2, D).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(R, half * half, 4 * D)


class Adapter(nn.Module):
    """gelu(out(gelu(in x))), without biases."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_RPF):
        c, F, A = self.config, x_RPF.shape[-1], self.config.vision.adapter_dim
        w_in_FA = param(self, "w_in_FA", (F, A), ("embed", "mlp"), normal(F**-0.5), c.param_dtype)
        w_out_AA = param(self, "w_out_AA", (A, A), ("mlp", "embed"), normal(A**-0.5),
                         c.param_dtype)  # fmt: skip
        h_RPA = contract("RPF,FA->RPA", x_RPF, w_in_FA, c.activation_dtype)
        h_RPA = gelu(constrain(h_RPA, "batch", None, "act_mlp"))
        y_RPA = contract("RPA,AZ->RPZ", h_RPA, w_out_AA, c.activation_dtype)
        return gelu(constrain(y_RPA, "batch", None, "act_embed"))


class VisionEncoder(nn.Module):
    """Tower, adapter and projector."""

    config: ModelConfig

    @nn.compact
    def __call__(self, images: Images) -> Features:
        """Encode every tile by itself.

        Raises:
          UserError: tiles of another size than the config's, or a model without vision.
        """
        c, v = self.config, self.config.vision
        B, num_tiles, *shape = images.tiles_BIYXC.shape
        _check_tiles(v, tuple(shape))
        D, P = v.embed_dim, (v.image_size // v.patch_size) ** 2
        W = COLOURS * v.patch_size**2

        valid_BI = jnp.arange(num_tiles) < jnp.asarray(images.num_tiles_B)[:, None]
        # A gradient of zero would not stop a NaN in what fills up a row.
        tiles = jnp.where(valid_BI[:, :, None, None, None], images.tiles_BIYXC, 0.0)
        tiles_RYXC = constrain(tiles.reshape(B * num_tiles, *shape), "batch", None, None, None)
        patch_WD = param(
            self, "patch_WD", (W, D), ("patches", "embed"), normal(W**-0.5), c.param_dtype
        )
        class_D = param(self, "class_D", (D,), ("norm",), normal(D**-0.5), c.param_dtype)
        names = ("patches", "embed")
        positions_PD = param(
            self, "positions_PD", (P + 1, D), names, normal(D**-0.5), c.param_dtype
        )
        patches_RPW = cut_patches(tiles_RYXC, v.patch_size)
        x_RPD = contract("RPW,WD->RPD", patches_RPW, patch_WD, c.activation_dtype)
        x_RPD = constrain(x_RPD, "batch", None, "act_embed")
        class_R1D = jnp.broadcast_to(class_D.astype(x_RPD.dtype), (len(x_RPD), 1, D))
        x_RPD = jnp.concatenate([x_RPD, class_R1D], axis=1) + positions_PD.astype(x_RPD.dtype)
        there_RP = jnp.ones(x_RPD.shape[:2], bool)
        x_RPD = Encoder(c, v, name="encoder")(x_RPD, rope_angles(v), there_RP)
        # Without a word the compiler splits the gradient in ways that the shuffle cannot follow.
        shuffled_RPF = constrain(pixel_shuffle(x_RPD[:, :-1]), "batch", None, None)
        x_RPA = Adapter(c, name="adapter")(shuffled_RPF)
        # Features start out as large as the embeddings they stand among.
        std = (v.adapter_dim * c.embed_dim) ** -0.5
        projector_AD = param(self, "projector_AD", (v.adapter_dim, c.embed_dim), ("mlp", "embed"),
                             normal(std), c.param_dtype)  # fmt: skip
        y_RPD = contract("RPA,AD->RPD", x_RPA, projector_AD, c.activation_dtype)
        y_RPD = constrain(y_RPD, "batch", None, "act_embed")
        values_BUD = constrain(y_RPD.reshape(B, -1, c.embed_dim), "batch", None, "act_embed")
        return Features(values_BUD, jnp.repeat(valid_BI, features_per_tile(v), axis=1))


def _check_tiles(v: VisionConfig, shape):
    if not v.num_layers:
        raise UserError("model.vision.num_layers=0: a model without vision takes no images")
    wanted = (v.image_size, v.image_size, COLOURS)
    if shape != wanted:
        raise UserError(f"tiles of shape {shape} must be of shape {wanted}, see "
                        f"model.vision.image_size={v.image_size}")  # fmt: skip
