"""What the rows of a cache hold, so that a text which begins alike need not be computed again.

Keys and values of one adapter are none of another's: a row holds those of the one it was last
copied for, and gives nothing to the others.
"""

from collections.abc import Sequence

import numpy as np


class Prefixes:
    """By row of a cache, the ids whose keys and values it holds, from the first on."""

    def __init__(self, rows: int, max_length: int, chunk_size: int):
        """Begin with empty rows; `chunk_size` is the model's, 0 for none."""
        self._ids, self._chunk = np.zeros((rows, max_length), np.int64), chunk_size
        self.forget()

    def forget(self) -> None:
        """Empty all rows."""
        # Of its last chunk a row holds the positions from `_since` on in layers with chunks.
        self._sizes, self._since, self._adapters = np.zeros((3, len(self._ids)), np.int32)

    def ids(self, row: int) -> np.ndarray:
        """What a row holds."""
        return self._ids[row, : self._sizes[row]]

    def add(self, row: int, ids: Sequence[int] | np.ndarray) -> None:
        """Append what has been computed."""
        start = self._sizes[row]
        self._ids[row, start : start + len(ids)] = ids
        self._sizes[row] += len(ids)

    def shared(self, row: int, ids: np.ndarray, adapter: int) -> int:
        """How many of the first `ids`, read with an adapter of that number, a row can give.

        The next token attends to its own chunk and, in layers without chunks, to all before: where
        the row has left that chunk it can give the chunks before it only.
        """
        if self._adapters[row] != adapter:
            return 0
        size, chunk = int(self._sizes[row]), self._chunk
        width = min(size, len(ids))
        differs = np.flatnonzero(self._ids[row, :width] != ids[:width])
        count = int(differs[0]) if len(differs) else width
        if chunk and count % chunk:
            start = count // chunk * chunk
            if (size - 1) // chunk * chunk != start or self._since[row] > start:
                return start
        return count

    def copy(self, source: int, row: int, ids: np.ndarray, adapter: int) -> None:
        """Let a row hold these tokens, for an adapter, of their chunk what another one, or itself
        has: `source` is without meaning where a chunk begins after them."""
        count = len(ids)
        within = self._chunk and count % self._chunk
        assert not within or self._adapters[source] == adapter
        self._ids[row, :count] = ids
        self._since[row] = int(self._since[source]) if within else count
        self._sizes[row], self._adapters[row] = count, adapter
