"""Pictures and sound in the place of tokens of a prompt: which features its pieces need."""

import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ...configs.errors import UserError
from ..fusion import Features, check_count


def with_places(tokenizer, text: str, places: Mapping[str, tuple[int, int]]) -> list[int]:
    """A prompt for pictures and clips, as in training: each takes the next place of its kind.

    Those without a place come first.

    Args:
      places: what stands for one in the text, such as `<|image|>`: its id and how many there are.

    Raises:
      UserError: more places than there are pictures or clips.
    """
    parts = re.split(f"({'|'.join(map(re.escape, places))})", text)
    ids = list(tokenizer.begin_ids)
    for place, (number, count) in places.items():
        if (first := count - parts[1::2].count(place)) < 0:
            raise UserError(
                f"the prompt has {count - first} {place}, which is more than the {count} given"
            )
        ids += [number] * first
    for i, part in enumerate(parts):
        ids += [places[part][0]] if i % 2 else tokenizer.encode(part)
    return ids


class Reader:
    """Features of the tiles or clips of one prompt, computed where they are needed."""

    def __init__(self, what: str, key: str, token_id: int, ids: Sequence[int],
                 units: Sequence[np.ndarray], sizes: Sequence[int],
                 encode: Callable[[np.ndarray], np.ndarray], rows: int):  # fmt: skip
        """Check that they fit.

        Args:
          what: tiles or clips, for messages; `key` is the configuration key of `token_id`, which
            stands for a feature in `ids`.
          units: what `encode` gives the features [U, D] of, `sizes[i]` of them for `units[i]`.
          rows: in a batch, as many as the mesh splits one into.

        Raises:
          UserError: not as many tokens as there are features; one at the end.
        """
        check_count(what, key, token_id, [ids], [sum(sizes)])
        if ids[-1] == token_id:
            raise UserError("a prompt must not end within a picture or a clip")
        self._units, self._sizes, self._rows = units, sizes, rows
        self._is_feature = np.asarray(ids) == token_id
        # Of each feature: its unit, and its number there.
        self._places = [(i, u) for i, size in enumerate(sizes) for u in range(size)]
        self._unit = functools.lru_cache(2)(lambda number: encode(units[number]))

    def mark(self, keys: np.ndarray) -> None:
        """Give each feature a number below 0 in `keys` [T] that only the same one has."""
        made = []
        for unit, size in zip(self._units, self._sizes, strict=True):
            digest = hashlib.blake2b(np.ascontiguousarray(unit).tobytes(), digest_size=8).digest()
            made.append((int.from_bytes(digest) >> 2) + np.arange(size))
        keys[self._is_feature] = -1 - np.concatenate(made)

    def piece(self, start: int, stop: int, size: int) -> Features | None:
        """What `Transformer` takes for the tokens from `start` to `stop`; None where it has none.

        Of `rows` rows, the first of which counts, and `size` features, so that few are compiled.
        """
        first, count = int(self._is_feature[:start].sum()), int(self._is_feature[start:stop].sum())
        if not count:
            return None
        values_UD = np.stack(
            [self._unit(number)[u] for number, u in self._places[first : first + count]]
        )
        values_BUD = np.zeros((self._rows, size, values_UD.shape[-1]), values_UD.dtype)
        valid_BU = np.zeros((self._rows, size), bool)
        values_BUD[0, :count], valid_BU[0, :count] = values_UD, True
        return Features(values_BUD, valid_BU)
