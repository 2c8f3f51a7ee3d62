"""Pictures in questions, for Llama 4 and Llama 3.2 Vision.

A request names its pictures by a hash of their files, which the workdir keeps: a record replays
without the data it was made from. For log-likelihoods each patch of Llama 4, and each picture that
layers attend to, becomes an id below 0 that only the same one has, so that texts share what they
begin with, pictures included.
"""

import base64
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...configs import files
from ...configs.errors import UserError
from ...configs.schema import ModelConfig
from ...models.decode.pictures import encode_picture, encode_tile, expand
from ...models.fusion import check_count
from ...models.media.images import tile_image, tile_together
from ...models.parallel import processes, sharding
from ...models.vision import features_per_tile


def file_of(picture) -> str | bytes:
    """A picture of a record as the path or the bytes of a file.

    Raises:
      UserError: there is no such file, or it is an array that is no picture.
    """
    if isinstance(picture, np.ndarray):  # of TFDS
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] not in (1, 3):
            raise UserError(
                f"must be uint8 pixels of 1 or 3 colours, not {picture.dtype} of {picture.shape}"
            )
        height, width, colours = picture.shape
        kind = b"P6" if colours == 3 else b"P5"
        return kind + b" %d %d 255\n" % (width, height) + picture.tobytes()
    if isinstance(picture, str) and not os.path.isfile(picture):
        raise UserError(f"{picture}: there is no such file")
    return picture


def name(file: str | bytes) -> str:
    """A hash of what the file holds.

    Raises:
      UserError: it cannot be read.
    """
    return hashlib.sha256(_data(file)).hexdigest()[:32]


def _data(file: str | bytes) -> bytes:
    try:
        return file if isinstance(file, bytes) else pathlib.Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None


def _digest(part) -> bytes:
    """A hash of a tile, or of a picture's tiles with their grid."""
    tiles, grid = part if isinstance(part, tuple) else (part, 0)
    found = hashlib.sha256(np.ascontiguousarray(tiles).tobytes())
    found.update(bytes([grid]))
    return found.digest()


class Pictures:
    """The pictures of an evaluation by name.

    Args:
      config, tokenizer: of the model.
      folder: where those of a finished evaluation lie.
    """

    def __init__(self, config: ModelConfig, tokenizer, folder: pathlib.Path | None = None):
        self.config, self.tokenizer, self._folder = config, tokenizer, folder
        self._files: dict[str, str | bytes] = {}
        # The numbers of a picture's tiles, or of the picture, equal ones having one, and where each
        # was found first.
        self._numbers: dict[str, list[int]] = {}
        self._places: dict[bytes, int] = {}
        self._found: list[tuple[str, int]] = []
        self._cut = functools.lru_cache(2)(self._tiles_of)
        # The choices of a question have one context.
        self.expand = functools.lru_cache(1)(self._expand)

    def add(self, found: Sequence[str | bytes]) -> tuple[str, ...]:
        """Note pictures and return their names."""
        names = tuple(map(name, found))
        self._files.update(zip(names, found, strict=True))
        return names

    def share(self) -> None:
        """Let every process have the pictures of all, which its requests name."""
        for one, (file, data) in processes.merge(self.told()).items():
            self._files.setdefault(one, file or base64.b64decode(data))

    def told(self) -> dict[str, tuple[str, str]]:
        """Each picture's path, or else its bytes in base64, by name."""
        return {
            one: (file, "") if isinstance(file, str) else ("", base64.b64encode(file).decode())
            for one, file in self._files.items()
        }

    def save(self, folder: pathlib.Path) -> None:
        """Write the files of all pictures, each under its name."""
        for one, file in self._files.items():
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / one).exists():
                files.write_bytes(folder / one, _data(file))

    def _expand(self, ids: tuple[int, ...], names: tuple[str, ...], most: int) -> tuple[int, ...]:
        """Ids with those of each picture in its place, see `decode.pictures.expand`."""
        found = [self._file(one) for one in names]
        return tuple(expand(self.config, self.tokenizer, ids, found, most)[0])

    def tiles(self, names: Sequence[str]):
        """Tiles of pictures in order, as `Engine.insert` takes them."""
        found = [self._cut(one) for one in names]
        return found if self._attends else np.concatenate(found)

    def keyed(self, ids: Sequence[int], names: Sequence[str]) -> tuple[int, ...]:
        """Ids with one below 0 for each patch, or picture attended to, which `features` takes.

        Raises:
          UserError: not as many of them as the pictures have.
        """
        numbers = [number for one in names for number in self._numbered(one)]
        token_id = self.config.vision.token_id
        check_count(
            "pictures", "model.vision.token_id", token_id, [list(ids)], [len(numbers) * self._size]
        )
        keys = iter(-1 - n * self._size - part for n in numbers for part in range(self._size))
        return tuple(next(keys) if i == token_id else i for i in ids)

    def features(self, params) -> Callable[[Sequence[int]], Any]:
        """What `scoring.score` takes of such ids; works under `jax.set_mesh`."""

        @functools.lru_cache(64)
        def encoded(number: int):
            one, index = self._found[number]
            rows = sharding.parts("batch")
            if self._attends:
                return encode_picture(self.config, params, self._cut(one), rows)
            return encode_tile(self.config, params, self._cut(one)[index], rows)

        def pictures(keys):
            values, valid = zip(*(encoded(-1 - key) for key in keys), strict=True)
            return np.stack(values), np.stack(valid)

        def patches(keys):
            where = [divmod(-1 - key, self._size) for key in keys]
            return np.stack([encoded(number)[patch] for number, patch in where])

        return pictures if self._attends else patches

    def _numbered(self, one: str) -> list[int]:
        if one not in self._numbers:
            found, parts = [], self._cut(one)
            for index, part in enumerate([parts] if self._attends else parts):
                digest = _digest(part)
                found.append(self._places.setdefault(digest, len(self._found)))
                if found[-1] == len(self._found):
                    self._found.append((one, index))
            self._numbers[one] = found
        return self._numbers[one]

    @property
    def _attends(self) -> bool:
        return self.config.cross.interval > 0

    @property
    def _size(self) -> int:
        """Ids of what is numbered."""
        return 1 if self._attends else features_per_tile(self.config.vision)

    def _tiles_of(self, one: str):
        if self._attends:
            return tile_together(self.config.vision, self._file(one))
        return tile_image(self.config.vision, self._file(one))[0]

    def _file(self, one: str) -> str | bytes:
        if one not in self._files:
            assert self._folder is not None, one
            path = str(self._folder / one)
            if not os.path.isfile(path) or name(path) != one:
                raise UserError(f"{path} is missing or not the picture that was asked about")
            self._files[one] = path
        return self._files[one]
