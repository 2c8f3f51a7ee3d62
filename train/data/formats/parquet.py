"""Parquet, read through pyarrow a few rows at a time."""

from collections.abc import Iterator
from typing import BinaryIO

from .arrow import missing, rows

MAGIC = b"PAR1"


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield each row as a JSON object, in the order of the file; see `arrow.rows`.

    Raises:
      ValueError: it is not Parquet, damaged, or encrypted.
      UserError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise missing() from None
    try:
        # With a buffer, columns are read page by page; without it, a whole row group at once.
        opened = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        for batch in opened.iter_batches(batch_size=64, use_threads=False):
            yield from rows(batch)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(str(error)) from None
