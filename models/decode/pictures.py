"""Pictures in prompts (Llama 4): the tokens they are, their features, and what tells them apart."""

import functools
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ...configs.architecture import ModelConfig, VisionConfig
from ...configs.errors import UserError
from ..fusion import Features, check_count
from ..media.images import image_ids, image_tokens, tile_image
from ..vision import Images, encode_images, features_per_tile

# What stands for a picture in a text.
PLACE = "<|image|>"
_ATTENDED_TO = (
    "pictures of Llama 3.2 Vision, whose layers attend to them, are read by puna.generate(..., "
    "images=...) in Python alone so far"
)


def with_places(tokenizer, text: str, count: int) -> list[int]:
    """A prompt for `count` pictures, as in training: each takes the next `<|image|>` of the text.

    Those without a place come first.

    Raises:
      UserError: more places than pictures; a tokenizer without such a token.
    """
    if PLACE in tokenizer.special and "<|image_start|>" not in tokenizer.special:
        raise UserError(_ATTENDED_TO)
    place, parts = image_ids(tokenizer).image, text.split(PLACE)
    first = count - (len(parts) - 1)
    if first < 0:
        raise UserError(f"the prompt has {len(parts) - 1} {PLACE} and there are {count} pictures")
    ids = [*tokenizer.begin_ids, *[place] * first, *tokenizer.encode(parts[0])]
    for part in parts[1:]:
        ids += [place, *tokenizer.encode(part)]
    return ids


def reads(config: ModelConfig) -> bool:
    """Whether `expand` takes pictures for this model."""
    return config.vision.num_layers > 0 and not config.cross.interval


def longest(config: VisionConfig) -> int:
    """More tokens than a picture has: of its tiles, a separator each, and three around them."""
    return (config.max_tiles + 1) * (features_per_tile(config) + 2) + 3


def expand(config: ModelConfig, tokenizer, ids: Sequence[int], pictures: Sequence, longest: int):
    """Put the tokens of each picture in its place.

    Args:
      ids: with one `<|image|>` for each picture, as `Tokenizer.chat` gives them.
      pictures: paths or the bytes of files.
      longest: most tokens of the result.

    Returns:
      ids, and the tiles of all pictures [n, Y, X, 3], as `Engine.insert` takes both.

    Raises:
      UserError: a model that reads no pictures; one that cannot be read; too many.
    """
    if not config.vision.num_layers:
        raise UserError("this model reads no pictures: model.vision.num_layers=0")
    if config.cross.interval:
        raise UserError(_ATTENDED_TO)
    control = image_ids(tokenizer)
    places = sum(i == control.image for i in ids)
    if places != len(pictures):
        raise UserError(f"there are {places} places in the text for {len(pictures)} pictures")
    waiting, made, tiles = iter(pictures), [], []
    for i in ids:
        if i == control.image:
            found, grid = tile_image(config.vision, next(waiting))
            made += image_tokens(config.vision, grid, control)
            tiles.append(found)
        else:
            made.append(i)
        # Before more of them are read: each tile takes memory.
        if len(made) > longest:
            raise UserError(f"the prompt has more than {longest} tokens with its pictures")
    return made, np.concatenate(tiles)


class Reader:
    """Features of the tiles of one prompt, computed where they are needed."""

    def __init__(self, config: ModelConfig, params, ids: Sequence[int], tiles, rows: int):
        """Check that they fit.

        Args:
          params: of the model; `rows`: tiles at a time, as many as the mesh splits a batch into.

        Raises:
          UserError: not as many patch tokens as the tiles give features; one at the end.
        """
        self._config, self._params, self._tiles, self._rows = config, params, tiles, rows
        self._size = features_per_tile(config.vision)
        token_id = config.vision.token_id
        check_count("tiles", "model.vision.token_id", token_id, [ids], [len(tiles) * self._size])
        if ids[-1] == token_id:
            raise UserError("a prompt must not end within a picture")
        self._is_patch = np.asarray(ids) == token_id
        self._tile = functools.lru_cache(2)(self._encoded)

    def keys(self, ids: Sequence[int]) -> np.ndarray:
        """The ids, with a number below 0 for each patch that only the same one has, int64 [T]."""
        keys, made = np.asarray(ids, np.int64), []
        for tile in self._tiles:
            digest = hashlib.blake2b(np.ascontiguousarray(tile).tobytes(), digest_size=8).digest()
            made.append((int.from_bytes(digest) >> 2) + np.arange(self._size))
        keys[self._is_patch] = -1 - np.concatenate(made)
        return keys

    def piece(self, start: int, stop: int, size: int) -> Features | None:
        """What `Transformer` takes for the tokens from `start` to `stop`; None for text alone.

        Of `rows` rows, the first of which counts, and `size` features, so that few are compiled.
        """
        first, count = int(self._is_patch[:start].sum()), int(self._is_patch[start:stop].sum())
        if not count:
            return None
        patches = [divmod(k, self._size) for k in range(first, first + count)]
        values_UD = np.stack([self._tile(tile)[patch] for tile, patch in patches])
        values_BUD = np.zeros((self._rows, size, values_UD.shape[-1]), values_UD.dtype)
        valid_BU = np.zeros((self._rows, size), bool)
        values_BUD[0, :count], valid_BU[0, :count] = values_UD, True
        return Features(values_BUD, valid_BU)

    def _encoded(self, number: int) -> np.ndarray:
        return encode_tile(self._config, self._params, self._tiles[number], self._rows)


def encode_tile(config: ModelConfig, params, tile_YXC, rows: int) -> np.ndarray:
    """Features [U, D] of one tile, encoded among `rows` rows, which the mesh splits."""
    tiles_BIYXC = np.zeros((rows, 1, *tile_YXC.shape), np.float32)
    tiles_BIYXC[0, 0] = tile_YXC
    return np.asarray(_encode(config, params, tiles_BIYXC))


@functools.partial(jax.jit, static_argnames="config")
def _encode(config, params, tiles_BIYXC):
    images = Images(tiles_BIYXC, jnp.ones(len(tiles_BIYXC), jnp.int32))
    return encode_images(config, params, images).values_BUD[0]
