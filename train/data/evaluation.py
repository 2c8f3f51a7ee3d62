"""Rows for evaluation: every document once, in order, and every token a target once."""

import bisect
import itertools
import sys
from collections.abc import Iterator

import numpy as np

from ...configs.errors import UserError
from ...configs.schema import DataConfig
from .examples import Example, Transform
from .packing import Batch, Cursor, Room, pack_row, to_batch
from .quarantine import Quarantine
from .sources import open_source, parse_sources

# Rows that were asked for stay in memory up to this; others are packed again from their place.
KEPT_BYTES = 256 << 20


class HeldOutRows:
    """Packed rows of one pass over the sources, part after part, not shuffled; read once.

    Where a document continues in the next row, that row begins with the last token of the previous:
    so each token of a document but its first is a target exactly once, whatever `seq_len` is, and
    sums over targets are sums over the text. The last row ends in padding, segment 0.

    Args:
        config: all of it but what is about training.
        transform: makes examples of records.
        sources: a source string without weights, which mean nothing in one pass.
        room: of a row, see `packing.Room`; a row has one id more than it has targets.
        most: rows after which to stop; None for all.
        quarantine: takes the bad records if `config.bad_records` is `skip`; without one they are
            counted, and told on standard error at the end.

    Raises:
        UserError: the data cannot be read, hold no text, or have weights.
    """

    def __init__(
        self,
        config: DataConfig,
        transform: Transform,
        sources: str,
        room: Room,
        most: int | None = None,
        quarantine: Quarantine | None = None,
    ):
        parts = parse_sources(sources)
        for part in parts:
            if part.weight is not None:
                raise UserError(
                    f"evaluation data {sources!r}: every document is read once, so {part.name} "
                    "cannot have a weight"
                )
        self._sources, self._room, self._most = sources, room, most
        self._tells = quarantine is None
        self._quarantine = Quarantine() if quarantine is None else quarantine
        opened = [open_source(part.name, config, transform, self._quarantine) for part in parts]
        starts = list(itertools.accumulate(map(len, opened), initial=0))

        def read(index: int) -> Example:
            part = bisect.bisect_right(starts, index) - 1
            return opened[part][index - starts[part]]

        self._read, self._stop = read, starts[-1]
        self._cursor: Cursor | None = Cursor(read, document=0, stop=self._stop)
        self._places: list[tuple[int, int]] = []  # where each row begins that is known by now
        self._kept: dict[int, Batch] = {}
        self._bytes = 0
        first = self.row(0)
        if first is None:
            raise UserError(f"evaluation data {sources!r}: there is no text in its documents")
        self._zeros = {key: np.zeros_like(value) for key, value in first.items()}

    def row(self, number: int) -> Batch | None:
        """The arrays of a batch (see `to_batch`) without their first axis; None past the end."""
        if number in self._kept:
            return self._kept[number]
        row = None
        if number < len(self._places):
            document, offset = self._places[number]
            row = self._next(Cursor(self._read, document, offset, stop=self._stop))
        while self._cursor and len(self._places) <= number:
            place = self._cursor.document, self._cursor.offset
            row = None if len(self._places) == self._most else self._next(self._cursor)
            if row is None:
                self._end()
                return None
            self._places.append(place)
        if row is not None and self._bytes < KEPT_BYTES:
            self._kept[number] = row
            self._bytes += sum(array.nbytes for array in row.values())
        return row

    def batch(self, first: int, numbers: list[int]) -> Batch | None:
        """These rows, stacked, with zeros past the end; None if row `first` is past it."""
        if first >= len(self._places) and self.row(first) is None:
            return None
        rows = [self.row(number) or self._zeros for number in numbers]
        return {key: np.stack([row[key] for row in rows]) for key in self._zeros}

    def __iter__(self) -> Iterator[Batch]:
        for number in itertools.count():
            row = self.row(number)
            if row is None:
                return
            yield row

    def _next(self, cursor: Cursor) -> Batch | None:
        row = pack_row(cursor, self._room)
        if not row["segment_ids"][0]:
            return None
        cursor.step_back()
        return to_batch(row)

    def _end(self) -> None:
        """The first pass is over: tell what was skipped."""
        self._cursor = None
        if self._tells and self._quarantine.first:
            print(
                f"puna: evaluation data {self._sources!r}: {self._quarantine.count()} bad records "
                f"are skipped, the first: {self._quarantine.first}",
                file=sys.stderr,
            )
