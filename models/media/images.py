"""Pictures to tiles and tokens, the way Llama 4 and 3.2 were trained; host code, no JAX.

A picture is fitted into a canvas of whole tiles and cut into them; for Llama 4 a view of the whole,
squeezed into one tile, follows. Pictures are turned as their EXIF orientation says, transparency
is laid over white, of an animation the first frame counts, and 16-bit greys are scaled to 8.
Resizing is Pillow's bilinear filter, values are exact in float32; the reference rounds to bfloat16.
"""

import contextlib
import io
import math
import os
import warnings
from typing import NamedTuple

import numpy as np

from ...configs.architecture import VisionConfig
from ...configs.errors import UserError

# Of the colours, in units of their range: those of CLIP, in the files of Llama 3.2.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageIds(NamedTuple):
    """Ids of the tokens around the patches; the defaults are those of Llama 4."""

    image_start: int = 200080
    image_end: int = 200081
    tile_x_separator: int = 200084
    tile_y_separator: int = 200085
    image: int = 200090


def image_ids(tokenizer) -> ImageIds:
    """Read the ids from a tokenizer's special tokens, such as `<|image_start|>`.

    Raises:
      UserError: it lacks one.
    """
    found = []
    for name in ImageIds._fields:
        if f"<|{name}|>" not in tokenizer.special:
            raise UserError(f"the tokenizer has no <|{name}|>, so it cannot describe images; use "
                            "that of Llama 4")  # fmt: skip
        found.append(tokenizer.special[f"<|{name}|>"])
    return ImageIds(*found)


def image_tokens(config: VisionConfig, grid: tuple[int, int], ids: ImageIds) -> list[int]:
    """Ids that stand for one image in the text.

    The tiles of each row, `tile_x_separator` between them and `tile_y_separator` after each row,
    then `image` and the global tile, which is all there is of an image of one tile. Each tile is
    a run of `config.token_id`, one for every feature.

    Args:
      config: of the vision tower.
      grid: rows and columns of tiles, as `tile_image` returns them.
    """
    tile = [config.token_id] * (config.image_size // config.patch_size // 2) ** 2
    rows, columns = grid
    out = [ids.image_start]
    if rows * columns > 1:
        for _ in range(rows):
            out += tile + ([ids.tile_x_separator] + tile) * (columns - 1) + [ids.tile_y_separator]
    return out + [ids.image, *tile, ids.image_end]


def grids(max_tiles: int) -> list[tuple[int, int]]:
    """Rows and columns of the grids of at most so many tiles, in the order of Llama 3.2's."""
    return [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)]


def best_grid(size: tuple[int, int], side: int, max_tiles: int) -> tuple[int, int]:
    """Choose the rows and columns of tiles for a picture of (height, width).

    Of all grids of at most `max_tiles` tiles: the one that the picture need be enlarged for the
    least, if there is one that it need not be shrunk for, else the one that it is shrunk for the
    least; among equals the one of fewest tiles.
    """
    height, width = size

    def cost(grid):
        rows, columns = grid
        # The scale is a fraction: compared exactly, both sides times height * width / side.
        scale = min(rows * width, columns * height)
        enlarges = scale * side >= height * width
        return (not enlarges, scale if enlarges else -scale, rows * columns)

    return min(grids(max_tiles), key=cost)


def fitted_size(size: tuple[int, int], grid: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width that a picture is resized to inside its canvas, keeping its shape.

    No side is enlarged beyond the larger of its own length and one tile.
    """
    (height, width), (rows, columns) = size, grid
    most_height = min(max(height, side), rows * side)
    most_width = min(max(width, side), columns * side)
    scale_x, scale_y = most_width / width, most_height / height
    # Rounding down in floating point is the reference's.
    if scale_x < scale_y:
        return max(1, min(math.floor(height * scale_x), most_height)), most_width
    return most_height, max(1, min(math.floor(width * scale_y), most_width))


def tile_image(config: VisionConfig, image) -> tuple[np.ndarray, tuple[int, int]]:
    """Cut a picture into tiles.

    Args:
      config: of the vision tower.
      image: a path, the bytes of a file, or a `PIL.Image.Image`.

    Returns:
      float32 tiles [n, side, side, 3] from -1 (black, also beyond the picture) to 1, and the
      (rows, columns) of the grid. Tiles go row by row; the global tile, where the grid has more
      than one, comes last.

    Raises:
      UserError: a file that is missing, broken, too large, or no picture.
    """
    picture, side = read_image(image), config.image_size
    tiles, grid = _cut(config, picture)
    if len(tiles) > 1:
        tiles = np.concatenate([tiles, _resized(picture, side, side)[None]])
    return (tiles / np.float32(127.5) - np.float32(1)).astype(np.float32), grid


def tile_together(config: VisionConfig, image) -> tuple[np.ndarray, int]:
    """Cut a picture into tiles for Llama 3.2's tower, which reads them together.

    Args:
      config, image: see `tile_image`.

    Returns:
      float32 tiles [max_tiles, side, side, 3], normalised with CLIP's mean and deviation after the
      canvas was filled up with black, and 0 where there is no tile; and the number of their grid
      among `grids`, counted from 1.

    Raises:
      UserError: see `tile_image`.
    """
    tiles, grid = _cut(config, read_image(image))
    out = np.zeros((config.max_tiles, *tiles.shape[1:]), np.float32)
    out[: len(tiles)] = (tiles / np.float32(255) - np.float32(_MEAN)) / np.float32(_STD)
    return out, grids(config.max_tiles).index(grid) + 1


def _cut(config, picture):
    """A picture in its canvas, as tiles [n, side, side, 3] of bytes, and the grid of these."""
    side, size = config.image_size, (picture.height, picture.width)
    rows, columns = best_grid(size, side, config.max_tiles)
    height, width = fitted_size(size, (rows, columns), side)
    canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
    canvas[:height, :width] = _resized(picture, width, height)
    tiles = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    return tiles, (rows, columns)


def _resized(picture, width, height):
    from PIL import Image

    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def image_size(image) -> tuple[int, int]:
    """Width and height of a picture, of which only the beginning is read; see `tile_image`."""
    return _opened(image, lambda name, opened, *_: opened.size)


def read_image(image):
    """Open a picture and return it as an RGB `PIL.Image.Image`; see `tile_image`."""
    return _opened(image, _rgb)


def _opened(image, use):
    """`use(name, picture, PIL.Image, PIL.ImageOps)`; what goes wrong in one line."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("pictures need Pillow: pip install 'puna[images]'") from None
    if isinstance(image, Image.Image):
        name, source = "the image", None
    elif isinstance(image, bytes | bytearray):
        name, source = "the image given as bytes", io.BytesIO(image)
    elif isinstance(image, str | os.PathLike):
        name, source = str(image), image
    else:
        kind = type(image).__name__
        raise UserError(f"an image must be a path, bytes or a PIL image, not {kind}")
    # Decoders raise whatever they trip over: struct.error, SyntaxError, zlib.error, ...
    try:
        if source is None:
            return use(name, image, Image, ImageOps)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(source)
        with opened:
            return use(name, opened, Image, ImageOps)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such file") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is not an image that Pillow can read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{name} {_too_large(Image.MAX_IMAGE_PIXELS)}") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} cannot be read as an image: {reason}") from None


def _too_large(limit):
    return f"has more than {limit} pixels (PIL.Image.MAX_IMAGE_PIXELS); make it smaller first"


def _check_pixels(name, size, limit):
    width, height = size
    if not width or not height:
        raise UserError(f"{name} has no pixels: it is {width} x {height}")
    if limit is not None and width * height > limit:
        raise UserError(f"{name} {_too_large(limit)}")


def _rgb(name, image, pillow, ops):
    _check_pixels(name, image.size, pillow.MAX_IMAGE_PIXELS)
    image.load()
    # A broken orientation is no orientation, not a broken picture.
    with contextlib.suppress(Exception):
        image = ops.exif_transpose(image)
    if image.mode.startswith("I"):  # greys of 16 bits, whatever the mode has room for
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = pillow.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise UserError(f"{name} has floating-point pixels, whose range is not known; save it with "
                        "8 or 16 bits")  # fmt: skip
    if {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        image = image.convert("RGBA")
        white = pillow.new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow.alpha_composite(white, image)
    return image.convert("RGB")
