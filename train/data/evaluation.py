"""Rows for evaluation: every document once, in order, and every token a target once."""

import bisect
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from ...configs.errors import UserError
from ...configs.schema import DataConfig
from ...models.tokenizer import Tokenizer
from .documents import TokenizedDocuments
from .packing import Batch, Cursor, pack_row, to_batch
from .sources import open_source, parse_sources


def make_eval_rows(
    config: DataConfig, tokenizer: Tokenizer, sources: str, seq_len: int
) -> Iterator[Batch]:
    """Yield packed rows of one pass over the sources, part after part, not shuffled.

    Where a document goes on in the next row, that row begins with the last token of the one before:
    so each token of a document but its first is a target exactly once, whatever `seq_len` is, and
    sums over targets are sums over the text. The last row ends in padding, segment 0.

    Args:
        config: `text_key` and `data_dir` are used.
        tokenizer: turns the documents into ids.
        sources: a source string without weights, which mean nothing in one pass.
        seq_len: tokens of a row, T.

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
    opened = [open_source(part.name, config.text_key, config.data_dir) for part in parts]
    return _rows([TokenizedDocuments(part, tokenizer) for part in opened], sources, seq_len + 1)


def batches(rows: Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    """Stack rows to batches [batch_size, T]; rows of zeros fill up the last one."""
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, batch_size)):
        zeros = {key: np.zeros_like(value) for key, value in chunk[0].items()}
        chunk += [zeros] * (batch_size - len(chunk))
        yield {key: np.stack([row[key] for row in chunk]) for key in zeros}


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
