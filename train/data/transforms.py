"""Transforms of pretraining: text, and text with pictures and sound among it."""

import base64
import binascii
import dataclasses
import os
import re
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ...configs.schema import Config, ModelConfig
from ...models.media import images, sound
from .examples import OTHER_KEY, Example, Media, Record, RecordError, text_of


@dataclasses.dataclass(frozen=True)
class Text:
    """A document: its text between what the tokenizer puts around one."""

    tokenizer: Any
    key: str = "text"

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.key,)

    def parse(self, record: Record, folder: str = "") -> str:
        return text_of(record, self.key, OTHER_KEY)

    def encode(self, text: str) -> Example:
        ids = np.asarray(document_ids(self.tokenizer, self.tokenizer.encode(text)), np.int32)
        return Example(ids, np.ones(len(ids), np.float32))


def document_ids(tokenizer, ids: list[int]) -> list[int]:
    """The ids of a whole document: none where its text has none."""
    if not ids:
        return []
    return [*tokenizer.begin_ids, *ids, *tokenizer.end_ids]


# What stands for a picture or a clip in a text.
PLACES = {"image": "<|image|>", "audio": "<|audio|>"}


@dataclasses.dataclass(frozen=True)
class MediaReader:
    """Pictures and clips of a record, and the tokens that stand for them."""

    tokenizer: Any
    model: ModelConfig
    longest: int  # tokens of one picture or clip, such that a row holds it
    tiles: int  # of a row

    def find(self, record: Record, folder: str) -> dict[str, list]:
        """What a record has under `image`, `images`, `audio` and `audios`, as its readers take it.

        Raises:
          RecordError: a value that is none, or one that the model cannot read.
        """
        found: dict[str, list] = {"image": [], "audio": []}
        if not isinstance(record, str):
            for name, values in found.items():
                for key in (name, f"{name}s"):
                    value = record.get(key)
                    listed = value if isinstance(value, list | tuple) else [value]
                    values += [readable(v, key, folder) for v in listed if v is not None]
        for name in found:
            encoder = self.model.vision if name == "image" else self.model.audio
            if found[name] and not encoder.num_layers:
                section = "vision" if name == "image" else "audio"
                raise RecordError(
                    f"has {name} records, and the model reads none: model.{section}.num_layers=0"
                )
        return found

    def add(self, name: str, value, ids: list[int], media: list[Media]) -> None:
        """Read a picture or clip and append its tokens and itself.

        Raises:
          RecordError: it cannot be read, or is larger than a row.
        """
        start, array_name, number = len(ids), "tiles" if name == "image" else "frames", 0
        vision = self.model.vision
        try:
            if name == "image" and self.model.cross.interval:
                tiles, number = images.tile_together(vision, value)
                array, array_name = tiles[None], "pictures"
                ids.append(vision.token_id)
            elif name == "image":
                control = images.image_ids(self.tokenizer)
                array, grid = images.tile_image(vision, value)
                ids += images.image_tokens(vision, grid, control)
            else:
                audio = self.model.audio
                array = sound.log_mel(audio, sound.read_wav(value))[None]
                ids += [audio.token_id] * sound.count_tokens(audio, array.shape[1])
        except UserError as error:
            raise RecordError(f"has an {name} that cannot be read: {error}") from None
        if len(ids) - start > self.longest:
            raise RecordError(
                f"has an {name} of {len(ids) - start} tokens, and data.seq_len leaves room for "
                f"{self.longest}"
            )
        if name == "image" and len(array) > self.tiles:
            raise RecordError(
                f"has an image of {len(array)} tiles, more than data.images={self.tiles}; or lower "
                "model.vision.max_tiles"
            )
        media.append(Media(array_name, start, len(ids), array, number))


@dataclasses.dataclass(frozen=True)
class TextWithMedia:
    """A document with pictures and clips.

    A record has its text under `key`, and `image` or `images`, `audio` or `audios`: a path relative
    to the record's file, `data:...;base64,...`, {"bytes": ..., "path": ...}, or an array. Each
    takes the next `<|image|>` or `<|audio|>` of the text; those without a place come first. What
    stands for them weighs nothing as a target.
    """

    tokenizer: Any
    key: str
    media: MediaReader

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.key, "image", "images", "audio", "audios")

    def parse(self, record: Record, folder: str = "") -> tuple[str, dict[str, list]]:
        text = text_of(record, self.key, OTHER_KEY)
        found = self.media.find(record, folder)
        for name, place in PLACES.items():
            if (places := text.count(place)) > len(found[name]):
                raise RecordError(f"has {places} {place} and {len(found[name])} {name} records")
        return text, found

    def encode(self, parsed: tuple[str, dict[str, list]]) -> Example:
        """Read the pictures and clips, and put their tokens among those of the text.

        Raises:
          RecordError: one cannot be read, or is larger than a row.
        """
        text, found = parsed
        waiting = {name: list(values) for name, values in found.items()}
        ids: list[int] = []
        media: list[Media] = []
        ids += (begin := self.tokenizer.begin_ids)
        for name, place in PLACES.items():
            for _ in range(len(waiting[name]) - text.count(place)):
                self.media.add(name, waiting[name].pop(0), ids, media)
        for part in re.split("|".join(f"({re.escape(p)})" for p in PLACES.values()), text):
            name = next((n for n, place in PLACES.items() if part == place), None)
            if name:
                self.media.add(name, waiting[name].pop(0), ids, media)
            elif part:
                ids += self.tokenizer.encode(part)
        if len(ids) == len(begin):
            return Example(np.zeros(0, np.int32), np.zeros(0, np.float32))
        ids += self.tokenizer.end_ids
        weights = np.ones(len(ids), np.float32)
        for m in media:
            weights[m.start : m.stop] = 0.0
        return Example(np.asarray(ids, np.int32), weights, tuple(media))


def readable(value, key: str, folder: str):
    """A picture or a clip of a record as its reader takes it: a path, bytes, or an array.

    Args:
      value: a path, `data:...;base64,...`, {"bytes": ..., "path": ...}, bytes or an array.
      key: where it stands. folder: what a path is relative to.

    Raises:
      RecordError: a value that is none of these.
    """
    if isinstance(value, dict):  # as the datasets library writes it
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.startswith("data:"):
        head, comma, data = value.partition(",")
        try:
            if not comma or not head.endswith(";base64"):
                raise ValueError
            return base64.b64decode(data, validate=True)
        except (ValueError, binascii.Error):
            raise RecordError(f"has no base64 data under {key!r}") from None
    if isinstance(value, str):
        return os.path.join(folder, os.path.expanduser(value))
    if isinstance(value, bytes | np.ndarray):
        return value
    raise RecordError(f"must have a path, bytes or base64 data under {key!r}")


def of_text(config: Config, tokenizer) -> Text | TextWithMedia:
    """The transform of pretraining: with pictures and clips if rows have room for them."""
    data = config.data
    if not data.images and not data.clips:
        return Text(tokenizer, data.text_key)
    media = MediaReader(tokenizer, config.model, data.seq_len - 1, data.images)
    return TextWithMedia(tokenizer, data.text_key, media)
