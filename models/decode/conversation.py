"""Conversations with pictures and sound to what `Engine.insert` takes.

No chat format says where sound goes: a clip stands where a picture in its place would.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...configs.architecture import ModelConfig
from ...configs.errors import UserError
from . import clips, pictures


class Prompt(NamedTuple):
    """ids; tiles and clips (log-mel frames) as `Engine.insert` takes them."""

    ids: list[int]
    tiles: Sequence | np.ndarray | None = None
    clips: Sequence[np.ndarray] = ()


def check_place(config: ModelConfig, tokenizer, kind: str) -> int:
    """The id that a picture ("image") or a clip ("audio") has in what `Tokenizer.chat` gives.

    Raises:
      UserError: there is none, or the model reads no sound.
    """
    if kind == "audio":
        clips.place_id(config)
        if pictures.PLACE not in tokenizer.special:
            raise UserError(f"sound stands where a picture would, and the tokenizer has no "
                            f"{pictures.PLACE}; use that of Llama 3.2 Vision or 4")  # fmt: skip
    return pictures.place_id(tokenizer)


def with_media(config: ModelConfig, tokenizer, ids: Sequence[int],
               media: Sequence[tuple[str, str | bytes]], longest: int) -> Prompt:  # fmt: skip
    """Put the tokens of pictures and clips in their places.

    Args:
      ids: from `Tokenizer.chat`, of messages with {"type": "image"} for each of `media`.
      media: "image" or "audio" with a path or the bytes of a file, in the order of these parts.
      longest: most tokens of the result, where there are any.

    Raises:
      UserError: see `pictures.expand` and `clips.expand`.
    """
    seen, heard = ([x for kind, x in media if kind == k] for k in ("image", "audio"))
    made, tiles, frames = list(ids), None, []
    if heard:
        place, sound = check_place(config, tokenizer, "audio"), clips.place_id(config)
        places = [t for t, i in enumerate(ids) if i == place]
        if len(places) != len(media):
            raise UserError(f"the chat format has {len(places)} places for {len(media)} pictures "
                            "and clips")  # fmt: skip
        for t, (kind, _) in zip(places, media, strict=True):
            made[t] = sound if kind == "audio" else place
        made, frames = clips.expand(config, made, heard, longest)
    if seen:
        made, tiles = pictures.expand(config, tokenizer, made, seen, longest)
    return Prompt(made, tiles, frames)
