"""Rows for evaluation: every document once, in order, and every token a target once."""

import bisect
import itertools
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from ...configs.errors import UserError
from ...configs.schema import DataConfig
from ...models.text.tokenizer import Tokenizer
from .documents import TokenizedDocuments
from .packing import Batch, Cursor, pack_row, to_batch
from .quarantine import Quarantine
from .sources import open_source, parse_sources


def make_eval_rows(
    config: DataConfig,
    tokenizer: Tokenizer,
    sources: str,
    seq_len: int,
    quarantine: Quarantine | None = None,
) -> Iterator[Batch]:
    """Yield packed rows of one pass over the sources, part after part, not shuffled.

    Where a document goes on in the next row, that row begins with the last token of the one before:
    so each token of a document but its first is a target exactly once, whatever `seq_len` is, and
    sums over targets are sums over the text. The last row ends in padding, segment 0.

    Args:
        config: all of it but what is about training.
        tokenizer: turns the documents into ids.
        sources: a source string without weights, which mean nothing in one pass.
        seq_len: tokens of a row, T.
        quarantine: takes the bad records if `config.bad_records` is `skip`; without one they are
            counted, and told on standard error at the end.

    Returns:
        An iterator of rows, the arrays of a batch (see `to_batch`) without their first axis.

    Raises:
        UserError: the data cannot be read, holds no text, or has weights; the first and the last
            as soon as this is called.
    """
    parts = parse_sources(sources)
    for part in parts:
        if part.weight is not None:
            raise UserError(
                f"evaluation data {sources!r}: every document is read once, so {part.name} cannot "
                "have a weight"
            )
    told = quarantine is None
    quarantine = Quarantine() if quarantine is None else quarantine
    opened = [open_source(part.name, config, quarantine) for part in parts]
    rows = _rows([TokenizedDocuments(part, tokenizer) for part in opened], sources, seq_len + 1)
    return _telling(rows, quarantine, sources) if told else rows


def batches(rows: Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    """Stack rows to batches [batch_size, T]; rows of zeros fill up the last one."""
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, batch_size)):
        zeros = {key: np.zeros_like(value) for key, value in chunk[0].items()}
        chunk += [zeros] * (batch_size - len(chunk))
        yield {key: np.stack([row[key] for row in chunk]) for key in zeros}


def _telling(rows: Iterator[Batch], quarantine: Quarantine, sources: str) -> Iterator[Batch]:
    """Tell what was left out once no more rows are asked for, be it before the end."""
    try:
        yield from rows
    finally:
        if quarantine.first:
            print(
                f"puna: evaluation data {sources!r}: {quarantine.count()} bad records are left "
                f"out, the first: {quarantine.first}",
                file=sys.stderr,
            )


def _rows(parts: list[TokenizedDocuments], sources: str, length: int) -> Iterator[Batch]:
    starts = list(itertools.accumulate(map(len, parts), initial=0))

    def read(index: int) -> np.ndarray:
        part = bisect.bisect_right(starts, index) - 1
        return parts[part][index - starts[part]]

    cursor = Cursor(read, document=0, stop=starts[-1])
    count = 0
    while (row := pack_row(cursor, length))["segment_ids"][0]:
        cursor.step_back()
        count += 1
        yield to_batch(row)
    if not count:
        raise UserError(f"evaluation data {sources!r}: there is no text in its documents")
