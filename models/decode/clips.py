"""Sound in prompts: the tokens that clips are, and their features."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from ...configs.architecture import ModelConfig
from ...configs.errors import UserError
from ..audio import Audio, encode_audio
from ..media.sound import count_tokens, log_mel, read_wav
from .fused import Reader

# What stands for a clip in a text.
PLACE = "<|audio|>"


def place_id(config: ModelConfig) -> int:
    """The id that stands for a clip in a prompt, and for each of its features in the text.

    Raises:
      UserError: the model reads no sound.
    """
    if not config.audio.num_layers:
        raise UserError("this model reads no sound: model.audio.num_layers=0")
    return config.audio.token_id


def expand(config: ModelConfig, ids: Sequence[int], clips: Sequence, longest: int):
    """Put the tokens of each clip in its place.

    Args:
      ids: with one `place_id` for each clip, as `fused.with_places` gives them.
      clips: see `media.sound.read_wav`.
      longest: most tokens of the result.

    Returns:
      ids, and the log-mel frames [S, M] of each clip, as `Engine.insert` takes both.

    Raises:
      UserError: a model that reads no sound; a clip that cannot be read, or too many.
    """
    audio, place = config.audio, place_id(config)
    if (places := sum(i == place for i in ids)) != len(clips):
        raise UserError(f"there are {places} places in the text for {len(clips)} clips")
    waiting, made, frames = iter(clips), [], []
    for i in ids:
        if i == place:
            frames.append(log_mel(audio, read_wav(next(waiting))))
            made += [i] * count_tokens(audio, len(frames[-1]))
        else:
            made.append(i)
        if len(made) > longest:
            raise UserError(f"the prompt has more than {longest} tokens with its clips")
    return made, frames


def reader(config: ModelConfig, params, ids: Sequence[int], frames, rows: int) -> Reader:
    """A `Reader` of a prompt whose clips `expand` gave.

    Raises:
      UserError: clips that do not fit the prompt.
    """
    audio = config.audio
    return Reader(
        "clips", "model.audio.token_id", audio.token_id, ids, frames,
        [count_tokens(audio, len(clip)) for clip in frames],
        functools.partial(encode_clip, config, params, rows=rows), rows,
    )  # fmt: skip


def encode_clip(config: ModelConfig, params, frames_SM, rows: int) -> np.ndarray:
    """Features [U, D] of one clip, encoded among `rows` rows, which the mesh splits.

    It is filled up to the longest that there may be, so that one shape is compiled.
    """
    audio = config.audio
    longest = audio.max_tokens * audio.frames_per_token
    frames_BISM = np.zeros((rows, 1, longest, audio.num_mels), np.float32)
    num_frames_BI = np.zeros((rows, 1), np.int32)
    frames_BISM[0, 0, : len(frames_SM)], num_frames_BI[0, 0] = frames_SM, len(frames_SM)
    return np.asarray(_encode(config, params, Audio(frames_BISM, num_frames_BI)))


@functools.partial(jax.jit, static_argnames="config")
def _encode(config, params, audio):
    return encode_audio(config, params, audio).values_BUD[0]
