"""Batches for training: an endless, shuffled, mixed stream of documents, packed row by row.

Row r of a batch of B rows reads documents r, r + B, r + 2B, ... of the stream and nothing else. So
a row depends on the configuration, the seed and r, never on how rows are spread over processes,
and where it has got to is (document, offset). Every packed row carries the place behind it; a
loader that starts there, with whichever rows, continues with the exact next batch at the cost of
reading one document a row.
"""

import atexit
import functools
import math
import multiprocessing
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from ...configs.errors import UserError
from ...configs.schema import DataConfig
from .examples import Transform
from .packing import Batch, Cursor, Room, pack_row, to_batch
from .quarantine import Quarantine
from .shuffle import ShuffledMapDataset
from .sources import open_source, parse_sources

PREFETCHED_BATCHES = 4


def make_train_loader(
    config: DataConfig,
    transform: Transform,
    batch_size: int,
    rows: Sequence[int] | None = None,
    seed: int = 0,
    quarantine: Quarantine | None = None,
    media: dict[str, tuple[int, ...]] | None = None,
) -> "TrainLoader":
    """Make the endless iterator over the training batches of this process.

    Args:
        config: what is read; `train` is a source string (see `sources`).
        transform: makes examples of records; picklable if `config.workers` is not 0.
        batch_size: rows of the global batch, B.
        rows: the rows of the global batch that this process owns, in the order it wants them; all
            where left out.
        seed: of the order of the documents.
        quarantine: takes the bad records if `config.bad_records` is `skip`.
        media: room of a row for pictures and clips, see `packing.Room`.

    Returns:
        An iterator of batches of numpy arrays [len(rows), config.seq_len], see `to_batch`.

    Raises:
        UserError: the data cannot be read; also while iterating.
    """
    parts = parse_sources(config.train)
    if config.licences and config.licences.count(",") + 1 != len(parts):
        raise UserError(
            f"data.licences={config.licences} names {config.licences.count(',') + 1} licences and "
            f"data.train={config.train} has {len(parts)} parts: name one for each, in their order"
        )
    quarantine = Quarantine() if quarantine is None else quarantine
    opened = [open_source(part.name, config, transform, quarantine) for part in parts]
    streams = []
    for index, documents in enumerate(opened):
        documents.number = index
        stream = grain.MapDataset.source(documents)
        if config.shuffle:
            # One seed a part: parts of one size would otherwise be shuffled alike.
            stream = ShuffledMapDataset(stream, seed=(seed, index))
        streams.append(stream.repeat())
    weights = [1.0 if part.weight is None else part.weight for part in parts]
    return TrainLoader(
        grain.MapDataset.mix(streams, weights) if len(streams) > 1 else streams[0],
        num_documents=sum(map(len, opened)),
        room=Room(config.seq_len + 1, media or {}, len(parts)),
        batch_size=batch_size,
        rows=range(batch_size) if rows is None else rows,
        workers=config.workers,
    )


class TrainLoader(Iterator[Batch]):
    """The training batches of some rows; made by `make_train_loader`.

    Reading starts with the first `next`, ahead of the caller: in a thread, or in reader processes
    that share the rows among them.
    """

    def __init__(
        self,
        stream: grain.MapDataset,
        num_documents: int,
        room: Room,
        batch_size: int,
        rows: Sequence[int],
        workers: int,
    ):
        self._reader: grain.DatasetIterator | None = None
        self._at_exit = functools.partial(_close, weakref.ref(self))
        self._stream = stream
        self._num_documents = num_documents
        self._room = room
        self._batch_size = batch_size
        self._rows = list(rows)
        self._workers = min(workers, len(self._rows))
        self._places = [(row, 0) for row in self._rows]
        self._read = np.zeros((len(self._rows), room.sources), np.int64)

    def __next__(self) -> Batch:
        if self._reader is None:
            self._reader = self._start()
            # Readers that still read when Python exits hold it up for many seconds.
            atexit.register(self._at_exit)
        try:
            groups = [next(self._reader) for _ in range(self._workers or 1)]
        except BaseException:
            # An interrupt may come between two groups: a resumed run reads this batch again.
            self.close()
            raise
        rows = {key: _interleave([group[key] for group in groups]) for key in groups[0]}
        self._places = [tuple(place) for place in rows.pop("places").tolist()]
        self._read = self._read + rows.pop("read")
        return to_batch(rows)

    def get_state(self) -> dict[str, dict[str, Any]]:
        """Return where each row continues after the last batch, keyed by its number in the batch,
        and how many ids of each source it has read.

        The states of all processes together, as one dict, are the state of the global batch.
        """
        return {
            str(row): {
                "document": document,
                "offset": offset,
                "stride": self._batch_size,
                "read": read,
            }
            for row, (document, offset), read in zip(
                self._rows, self._places, self._read.tolist(), strict=True
            )
        }

    def set_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Go on from a state, of which only the rows of this process are used.

        Raises:
            UserError: the state is of another batch size.
        """
        places, read = [], np.zeros_like(self._read)
        for i, row in enumerate(self._rows):
            place = state.get(str(row))
            if place is None or place["stride"] != self._batch_size:
                saved = len(state) if place is None else place["stride"]
                raise UserError(
                    f"train.batch_size={self._batch_size}, but the saved data position is of "
                    f"{saved} rows: data can be resumed only with the same batch size"
                )
            places.append((place["document"], place["offset"]))
            # Not there in checkpoints of before they were counted; parts may have come or gone.
            if len(place.get("read", ())) == read.shape[1]:
                read[i] = place["read"]
        self.close()
        self._places, self._read = places, read

    def close(self) -> None:
        """Stop reading ahead; the next batch starts it again."""
        if self._reader is not None:
            atexit.unregister(self._at_exit)
            self._reader.close()
            self._reader = None

    def __del__(self):
        self.close()

    def _start(self) -> grain.DatasetIterator:
        places = [
            {
                "document": document,
                "offset": offset,
                "stride": self._batch_size,
                "start": self._first_fraction(row) if (document, offset) == (row, 0) else 0.0,
            }
            for row, (document, offset) in zip(self._rows, self._places, strict=True)
        ]
        dataset = _PackedRows(self._stream, places, self._room)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # in a notebook; Grain's workers read flags of Grain
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
            return iter(dataset.mp_prefetch(options, worker_init_fn=_end_with_parent))
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(
                dataset, prefetch_buffer_size=PREFETCHED_BATCHES
            )
        )

    def _first_fraction(self, row: int) -> float:
        """Return where a row begins in its first document.

        At its start, unless there are fewer documents than rows: rows that share a document would
        be copies of each other, so they begin in equal distances.
        """
        readers = math.ceil(self._batch_size / self._num_documents)
        return row // self._num_documents / readers


class _PackedRows(grain.IterDataset):
    """Packs one row from each place at a time: arrays [places, ...], and the places after."""

    def __init__(self, stream: grain.MapDataset, places: list[dict], room: Room):
        super().__init__()
        self._stream = stream
        self._places = places
        self._room = room

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedRowsIterator(self._stream, self._places, self._room)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keep the rows of one reader process; Grain calls this there."""
        self._places = self._places[sl]


class _PackedRowsIterator(grain.DatasetIterator):
    def __init__(self, stream: grain.MapDataset, places: list[dict], room: Room):
        super().__init__()
        self._stream = stream
        self._room = room
        self._cursors = [Cursor(stream.__getitem__, **place) for place in places]

    def __next__(self) -> dict[str, np.ndarray]:
        rows = [pack_row(cursor, self._room) for cursor in self._cursors]
        group = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        group["places"] = np.array([(c.document, c.offset) for c in self._cursors], np.int64)
        return group

    def get_state(self) -> dict:
        # TrainLoader keeps the state; Grain asks for one after every element.
        return {}

    def set_state(self, state: dict) -> None:
        raise NotImplementedError("the state is the places that the data set is made with")


def provenance(config: DataConfig, state: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What training has read: of each source its licence, and how many tokens.

    Args:
        state: of all rows of the global batch, see `TrainLoader.get_state`.
    """
    told = [part.strip() for part in config.licences.split(",")] if config.licences else []
    parts = parse_sources(config.train)
    return [
        {
            "source": part.name,
            "licence": (told[i] if told else "") or "unknown",
            "tokens": sum(place["read"][i] for place in state.values()),
        }
        for i, part in enumerate(parts)
    ]


def _interleave(groups: list[np.ndarray]) -> np.ndarray:
    """Undo the slices [i::n] that n readers took of the rows."""
    rows = np.empty((sum(map(len, groups)), *groups[0].shape[1:]), groups[0].dtype)
    for index, group in enumerate(groups):
        rows[index :: len(groups)] = group
    return rows


def _close(loader: "weakref.ref[TrainLoader]") -> None:
    if (found := loader()) is not None:
        found.close()


def _end_with_parent(index: int, count: int) -> None:
    """End a reader process when the training process is killed, which cannot end it itself."""
    del index, count

    def wait():
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
