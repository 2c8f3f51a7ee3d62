"""Pictures in prompts: the tokens they are, their features, and what tells them apart.

Those of Llama 4 are patches in the place of tokens; to those of Llama 3.2 Vision, one token each,
layers of their own attend.
"""

import functools
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ...configs.architecture import ModelConfig
from ...configs.errors import UserError
from ..fusion import Features, check_count, features_per_image
from ..media.images import image_ids, image_tokens, tile_image, tile_together
from ..tiled_vision import TiledImages
from ..tiled_vision import encode_images as encode_together
from ..vision import Images, encode_images, features_per_tile
from .fused import Reader

# What stands for a picture in a text.
PLACE = "<|image|>"


def place_id(tokenizer) -> int:
    """The id of `<|image|>`.

    Raises:
      UserError: the tokenizer has none.
    """
    if PLACE not in tokenizer.special:
        raise UserError(f"the tokenizer has no {PLACE}, which stands for a picture; use that of "
                        "Llama 3.2 Vision or 4")  # fmt: skip
    return tokenizer.special[PLACE]


def reads(config: ModelConfig) -> bool:
    """Whether `expand` takes pictures for this model."""
    return config.vision.num_layers > 0 and not config.cross.imageless


def longest(config: ModelConfig) -> int:
    """At least as many tokens as a picture has.

    Of Llama 4 those of its tiles, a separator each, and three around them.
    """
    vision = config.vision
    if config.cross.interval:
        return 1
    return (vision.max_tiles + 1) * (features_per_tile(vision) + 2) + 3


def expand(config: ModelConfig, tokenizer, ids: Sequence[int], pictures: Sequence, longest: int):
    """Put the tokens of each picture in its place.

    Args:
      ids: with one `<|image|>` for each picture, as `Tokenizer.chat` gives them.
      pictures: paths or the bytes of files.
      longest: most tokens of the result.

    Returns:
      ids, and the tiles of the pictures, as `Engine.insert` takes both: [n, Y, X, 3] of all, or
      with `model.cross` what `tile_together` gives for each.

    Raises:
      UserError: a model that reads no pictures; one that cannot be read; too many.
    """
    if not config.vision.num_layers:
        raise UserError("this model reads no pictures: model.vision.num_layers=0")
    if config.cross.imageless:
        raise UserError(
            "model.cross.imageless=True lets a text depend on the texts beside it: set it to False "
            "to read pictures"
        )
    place, attends = place_id(tokenizer), config.cross.interval > 0
    control = None if attends else image_ids(tokenizer)
    places = sum(i == place for i in ids)
    if places != len(pictures):
        raise UserError(f"there are {places} places in the text for {len(pictures)} pictures")
    waiting, made, tiles = iter(pictures), [], []
    for i in ids:
        if i != place:
            made.append(i)
        elif control is None:
            tiles.append(tile_together(config.vision, next(waiting)))
            made.append(config.vision.token_id)
        else:
            found, grid = tile_image(config.vision, next(waiting))
            made += image_tokens(config.vision, grid, control)
            tiles.append(found)
        # Before more of them are read: each tile takes memory.
        if len(made) > longest:
            raise UserError(f"the prompt has more than {longest} tokens with its pictures")
    return made, tiles if attends else np.concatenate(tiles)


def without_places(config: ModelConfig, ids: Sequence[int]) -> list[int]:
    """The ids with another one for pictures that layers attend to, which no text may have."""
    return [0 if i == config.vision.token_id else i for i in ids]


def reader(config: ModelConfig, params, ids: Sequence[int], tiles, rows: int, room: int):
    """A `Reader` or `Attended` of a prompt whose pictures `expand` gave.

    Args:
      params: of the model; `rows`: at a time, as many as the mesh splits a batch into.
      room: pictures that a slot has room for, where layers attend to them.

    Raises:
      UserError: pictures that do not fit the prompt or the slot.
    """
    if config.cross.interval:
        return Attended(config, params, ids, tiles, rows, room)
    size = features_per_tile(config.vision)
    return Reader(
        "tiles", "model.vision.token_id", config.vision.token_id, ids, tiles, [size] * len(tiles),
        functools.partial(encode_tile, config, params, rows=rows), rows,
    )  # fmt: skip


class Attended:
    """Features of the pictures of one prompt that layers attend to."""

    def __init__(self, config: ModelConfig, params, ids: Sequence[int], pictures, rows: int,
                 room: int):  # fmt: skip
        """Check that they fit; see `reader`."""
        self._config, self._params, self._pictures = config, params, pictures
        self._rows, self._room = rows, room
        token_id = config.vision.token_id
        check_count("pictures", "model.vision.token_id", token_id, [ids], [len(pictures)])
        if len(pictures) > room:
            raise UserError(
                f"there are {len(pictures)} pictures, more than max_images={room}: give fewer, or "
                "begin with a larger max_images, which takes memory in every slot"
            )
        self._is_place = np.asarray(ids) == token_id

    def mark(self, keys: np.ndarray) -> None:
        """As `Reader.mark`, a number for each picture."""
        keys[self._is_place] = [-1 - picture_key(picture) for picture in self._pictures]

    def whole(self, known: int) -> Features | None:
        """What `Transformer` takes; None if all are among the first `known` tokens.

        Of `rows` rows, the first of which counts, and of `room` pictures.
        """
        if not self._is_place[known:].any():
            return None
        size = features_per_image(self._config.vision)
        valid_BU = np.zeros((self._rows, self._room * size), bool)
        values_BUD = np.zeros((*valid_BU.shape, self._config.embed_dim), np.float32)
        for i, picture in enumerate(self._pictures):
            here = np.s_[0, i * size : (i + 1) * size]
            values_BUD[here], valid_BU[here] = encode_picture(
                self._config, self._params, picture, self._rows
            )
        return Features(values_BUD, valid_BU)


def picture_key(picture) -> int:
    """A number below 2^62 of a picture from `tile_together`, the same for the same picture."""
    tiles, grid = picture
    digest = hashlib.blake2b(np.ascontiguousarray(tiles).tobytes(), digest_size=8)
    digest.update(bytes([grid]))
    return int.from_bytes(digest.digest()) >> 2


def encode_picture(config: ModelConfig, params, picture, rows: int):
    """Features [U, D] of one picture, and which exist [U], encoded among `rows` rows."""
    tiles, grid = picture
    tiles_BMIYXC = np.zeros((rows, 1, *np.shape(tiles)), np.float32)
    grids_BM = np.zeros((rows, 1), np.int32)
    tiles_BMIYXC[0, 0], grids_BM[0, 0] = tiles, grid
    found = _encode_together(config, params, TiledImages(tiles_BMIYXC, grids_BM))
    return jax.tree.map(lambda x: np.asarray(x)[0], (found.values_BUD, found.valid_BU))


def encode_tile(config: ModelConfig, params, tile_YXC, rows: int) -> np.ndarray:
    """Features [U, D] of one tile, encoded among `rows` rows, which the mesh splits."""
    tiles_BIYXC = np.zeros((rows, 1, *tile_YXC.shape), np.float32)
    tiles_BIYXC[0, 0] = tile_YXC
    return np.asarray(_encode(config, params, tiles_BIYXC))


@functools.partial(jax.jit, static_argnames="config")
def _encode(config, params, tiles_BIYXC):
    images = Images(tiles_BIYXC, jnp.ones(len(tiles_BIYXC), jnp.int32))
    return encode_images(config, params, images).values_BUD[0]


@functools.partial(jax.jit, static_argnames="config")
def _encode_together(config, params, images):
    return encode_together(config, params, images)
