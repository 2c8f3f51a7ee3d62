"""Documents -> rows of a fixed length: concatenate, then split.

A row is filled from one document after another; what does not fit goes on in the next row, as a
piece of its own. Pieces are numbered 1, 2, ... in a row (`segment_ids`) and count their positions
from 0, so that attention can keep to one piece; 0 marks padding. Where a row has got to is just
(document, offset), which is why this is not Grain's packer: the state of that one holds the states
of its parents and belongs to a reader process, this one belongs to a row.
"""

from collections.abc import Callable

import numpy as np

from ...configs.errors import UserError

PATIENCE = 10_000  # empty documents one after another before that is an error

Row = dict[str, np.ndarray]  # tokens, positions, segment_ids: int32 [length]
Batch = dict[str, np.ndarray]  # tokens_BT targets_BT positions_BT segment_ids_BT weights_BT


class Cursor:
    """Reads the ids of every `stride`-th document one after another, in pieces.

    Args:
        read: returns the ids of the document of an index, int32; empty to have it skipped.
        document: the index of the document to go on with.
        offset: how many of its ids are already read.
        stride: how much later the next document is.
        stop: the index at which the documents end; None if they never do.
        start: where to begin in the first document, as a fraction of it, if `offset` is 0.

    `document` and `offset` are the whole state: a cursor made with their values reads on exactly.
    """

    def __init__(
        self,
        read: Callable[[int], np.ndarray],
        document: int,
        offset: int = 0,
        stride: int = 1,
        stop: int | None = None,
        start: float = 0.0,
    ):
        self.document = document
        self.offset = offset
        self._read = read
        self._stride = stride
        self._stop = stop
        self._start = start if offset == 0 else 0.0
        self._ids: np.ndarray | None = None

    def take(self, room: int) -> np.ndarray | None:
        """Return the next 1 to `room` ids of one document; None at the end.

        Raises:
            UserError: too many documents one after another are empty.
        """
        if self._ids is None:
            self._ids = self._read_next()
            if self._ids is None:
                return None
        piece = self._ids[self.offset : self.offset + room]
        self.offset += len(piece)
        if self.offset == len(self._ids):
            self.document += self._stride
            self.offset = 0
            self._ids = None
        return piece

    def step_back(self) -> None:
        """Read the last id again, unless its document ended with it."""
        self.offset = max(self.offset - 1, 0)

    def _read_next(self) -> np.ndarray | None:
        """Return the ids of the first document from here on that has any."""
        for _ in range(PATIENCE):
            if self._stop is not None and self.document >= self._stop:
                return None
            ids = self._read(self.document)
            if len(ids):
                self.offset += int(self._start * len(ids))
                self._start = 0.0
                return ids
            self.document += self._stride
        raise UserError(
            f"there is no text in {PATIENCE} documents one after another; check the data and "
            "data.text_key"
        )


def pack_row(cursor: Cursor, length: int) -> Row:
    """Fill a row of `length` tokens; it ends in padding only where the documents end."""
    row = {key: np.zeros(length, np.int32) for key in ("tokens", "positions", "segment_ids")}
    filled = segment = 0
    while filled < length:
        piece = cursor.take(length - filled)
        if piece is None:
            break
        segment += 1
        part = slice(filled, filled + len(piece))
        row["tokens"][part] = piece
        row["positions"][part] = np.arange(len(piece))
        row["segment_ids"][part] = segment
        filled += len(piece)
    return row


def to_batch(rows: Row) -> Batch:
    """Split rows of T+1 tokens into inputs and the tokens that follow them.

    Args:
        rows: tokens, positions and segment_ids, int32 [..., T+1].

    Returns:
        tokens_BT, targets_BT, positions_BT and segment_ids_BT, int32 [..., T], and weights_BT,
        float32: 1 where the target is in the segment of its token, else 0 (a target in another
        document, or padding).
    """
    segments, next_segments = rows["segment_ids"][..., :-1], rows["segment_ids"][..., 1:]
    return {
        "tokens_BT": np.ascontiguousarray(rows["tokens"][..., :-1]),
        "targets_BT": np.ascontiguousarray(rows["tokens"][..., 1:]),
        "positions_BT": np.ascontiguousarray(rows["positions"][..., :-1]),
        "segment_ids_BT": np.ascontiguousarray(segments),
        "weights_BT": ((segments == next_segments) & (segments > 0)).astype(np.float32),
    }
