"""Documents -> rows of a fixed length: concatenate, then split.

A row is filled from one document after another; what does not fit continues in the next row, as a
piece of its own. Pieces, and the texts of an example with `borders`, are numbered 1, 2, ... in a
row (`segment_ids`) and count their positions from 0, so that attention can keep to one; 0 marks
padding. Where a row has got to is just
(document, offset), which is why this is not Grain's packer: the state of that one holds the states
of its parents and belongs to a reader process, this one belongs to a row.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from ...configs.errors import UserError
from ...configs.schema import Config
from .examples import Example

PATIENCE = 10_000  # empty documents one after another before that is an error

# tokens, positions, segment_ids: int32 [length]; weights: float32 [length]; and media, see `Room`.
Row = dict[str, np.ndarray]
# tokens_BT targets_BT positions_BT segment_ids_BT weights_BT; tiles_BIYXC num_tiles_B or
# tiles_BMIYXC grids_BM, and frames_BISM num_frames_BI, where rows have room for pictures and clips.
Batch = dict[str, np.ndarray]
BATCH_NAMES = {
    "tiles": "tiles_BIYXC", "num_tiles": "num_tiles_B",
    "pictures": "tiles_BMIYXC", "num_pictures": "grids_BM",
    "frames": "frames_BISM", "num_frames": "num_frames_BI",
}  # fmt: skip


def media_room(config: Config) -> dict[str, tuple[int, ...]]:
    """What a row of a configuration has room for beside ids, see `Room`."""
    room, vision, audio = {}, config.model.vision, config.model.audio
    tile = (vision.image_size, vision.image_size, 3)
    if config.data.images and config.model.cross.interval:
        # A picture takes as much room as the largest.
        room["pictures"] = (config.data.images // vision.max_tiles, vision.max_tiles, *tile)
    elif config.data.images:
        room["tiles"] = (config.data.images, *tile)
    if config.data.clips:
        frames = audio.max_tokens * audio.frames_per_token
        room["frames"] = (config.data.clips, frames, audio.num_mels)
    return room


@dataclasses.dataclass(frozen=True)
class Room:
    """What a row has room for.

    Attributes:
      length: ids.
      media: name -> shape of all arrays of that name in a row: `tiles` (I, Y, X, C) of pictures,
        or `pictures` (M, I, Y, X, C) whose tiles are read together, `frames` (I, S, M) of clips.
      sources: parts of the mixture whose ids are counted, as `read` of a row; 0 counts none.
    """

    length: int
    media: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    sources: int = 0

    def empty_row(self) -> Row:
        row: Row = {
            key: np.zeros(self.length, np.int32) for key in ("tokens", "positions", "segment_ids")
        }
        row["weights"] = np.zeros(self.length, np.float32)
        for name, shape in self.media.items():
            row[name] = np.zeros(shape, np.float32)
            # A picture has whole tiles, a clip some of its frames; tiles together have a grid.
            row[f"num_{name}"] = np.zeros(() if name == "tiles" else shape[0], np.int32)
        if self.sources:
            row["read"] = np.zeros(self.sources, np.int64)
        return row


class Cursor:
    """Reads the ids of every `stride`-th document one after another, in pieces.

    Args:
        read: returns the example of an index; one without ids is skipped.
        document: the index of the document to continue with.
        offset: how many of its ids are already read.
        stride: how much later the next document is.
        stop: the index at which the documents end; None if they never do.
        start: where to begin in the first document, as a fraction of it, if `offset` is 0.

    `document` and `offset` are the whole state: a cursor made with their values reads on exactly.
    """

    def __init__(
        self,
        read: Callable[[int], Example],
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
        self._example: Example | None = None

    def take(self, room: int, media: dict[str, int] | None = None) -> Example | None:
        """Return the next 1 to `room` ids of one document; None at the end.

        Args:
            media: how many tiles and clips there is room for. A piece ends before a picture or a
                clip that does not fit as a whole, and has no ids where that comes first.

        Raises:
            UserError: too many documents one after another are empty.
        """
        if self._example is None:
            self._example = self._read_next()
            if self._example is None:
                return None
        example, start = self._example, self.offset
        stop, inside = min(start + room, len(example.ids)), []
        left = dict(media or {})
        if example.whole and stop < len(example.ids):
            stop = start
        for m in example.media:
            if m.stop <= start:
                continue
            if m.start >= stop:
                break
            if m.stop > stop or len(m.array) > left.get(m.name, 0):
                stop = m.start
                break
            left[m.name] -= len(m.array)
            inside.append(dataclasses.replace(m, start=m.start - start, stop=m.stop - start))
        borders = example.borders if example.whole else ()
        piece = Example(
            example.ids[start:stop], example.weights[start:stop], tuple(inside), borders=borders,
            source=example.source,
        )  # fmt: skip
        self.offset = stop
        if self.offset == len(example.ids):
            self.document += self._stride
            self.offset = 0
            self._example = None
        return piece

    def step_back(self) -> None:
        """Read the last id, or the picture or clip it belongs to, again.

        Nothing is read again where the document ended with it, or where a picture or clip follows,
        which is no target.
        """
        follows = self._example.media if self._example else ()
        if not any(m.start == self.offset for m in follows):
            self.offset = self._outside(max(self.offset - 1, 0))

    def _outside(self, offset: int) -> int:
        """An offset, or where what it lies in begins that is never cut."""
        if self._example and self._example.whole:
            return 0
        for m in self._example.media if self._example else ():
            if m.start < offset < m.stop:
                return m.start
        return offset

    def _read_next(self) -> Example | None:
        """Return the first example from here on that has ids."""
        for _ in range(PATIENCE):
            if self._stop is not None and self.document >= self._stop:
                return None
            example = self._example = self._read(self.document)
            if len(example.ids):
                self.offset = self._outside(self.offset + int(self._start * len(example.ids)))
                self._start = 0.0
                return example
            self.document += self._stride
        raise UserError(
            f"there is no text in {PATIENCE} consecutive documents; check the data and "
            "data.text_key"
        )


def pack_row(cursor: Cursor, room: Room) -> Row:
    """Fill a row; it ends in padding only where documents end or a picture or clip does not fit."""
    row, filled, segment = room.empty_row(), 0, 0
    used = dict.fromkeys(room.media, 0)
    while filled < room.length:
        left = {name: shape[0] - used[name] for name, shape in room.media.items()}
        piece = cursor.take(room.length - filled, left)
        if piece is None or not len(piece.ids):
            assert piece is None or filled, "a picture or clip larger than a row"
            break
        part = slice(filled, filled + len(piece.ids))
        row["tokens"][part] = piece.ids
        row["weights"][part] = piece.weights
        for start, stop in itertools.pairwise((0, *piece.borders, len(piece.ids))):
            segment += 1
            text = slice(filled + start, filled + stop)
            row["positions"][text] = np.arange(stop - start)
            row["segment_ids"][text] = segment
        for m in piece.media:
            begin, end = used[m.name], used[m.name] + len(m.array)
            if m.name == "tiles":
                row["tiles"][begin:end] = m.array
                row["num_tiles"][...] = end
            else:
                row[m.name][begin, : m.array.shape[1]] = m.array[0]
                row[f"num_{m.name}"][begin] = m.number or m.array.shape[1]
            used[m.name] = end
        filled += len(piece.ids)
        if room.sources:
            row["read"][piece.source] += len(piece.ids)
    return row


def to_batch(rows: Row) -> Batch:
    """Split rows of T+1 tokens into inputs and the tokens that follow them.

    Args:
        rows: tokens, positions and segment_ids, int32 [..., T+1], weights, float32, and media.

    Returns:
        tokens_BT, targets_BT, positions_BT and segment_ids_BT, int32 [..., T], and weights_BT,
        float32: what the example says where the target is in the segment of its token, else 0 (a
        target in another document, or padding). A row never ends inside a picture or clip, and
        one that its last id belongs to is still there for it.
    """
    segments, next_segments = rows["segment_ids"][..., :-1], rows["segment_ids"][..., 1:]
    within = (segments == next_segments) & (segments > 0)
    return {name: rows[key] for key, name in BATCH_NAMES.items() if key in rows} | {
        "tokens_BT": np.ascontiguousarray(rows["tokens"][..., :-1]),
        "targets_BT": np.ascontiguousarray(rows["tokens"][..., 1:]),
        "positions_BT": np.ascontiguousarray(rows["positions"][..., :-1]),
        "segment_ids_BT": np.ascontiguousarray(segments),
        "weights_BT": np.where(within, rows["weights"][..., 1:], np.float32(0)),
    }
