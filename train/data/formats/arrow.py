"""Arrow IPC: files, such as Feather, and streams, such as the `datasets` library saves."""

import base64
import contextlib
import json
from collections.abc import Iterator
from typing import BinaryIO

from ....configs.errors import UserError

_FILE = b"ARROW1\0\0"
MAGIC = (_FILE, b"\xff\xff\xff\xff")  # a stream begins with the mark of its first message


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield each row as a JSON object; see `rows`.

    Raises:
      ValueError: it is not Arrow IPC, or damaged.
      UserError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise missing() from None
    try:
        is_file = file.read(len(_FILE)) == _FILE
        file.seek(0)
        if is_file:
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                yield from rows(reader.get_batch(number))
        else:
            for batch in pa.ipc.open_stream(file):
                yield from rows(batch)
    except (pa.ArrowException, EOFError) as error:
        raise ValueError(str(error)) from None


def rows(batch) -> Iterator[bytes]:
    """The rows of a `pyarrow.RecordBatch`, of which few are Python objects at one time.

    Bytes are text where they are UTF-8, as writers without types of text keep it, and otherwise
    `data:;base64,...`, as transforms read pictures and clips; what JSON has no word for (dates,
    decimals) is written as text.
    """
    for start in range(0, batch.num_rows, 64):
        for row in batch.slice(start, 64).to_pylist():
            yield json.dumps(row, ensure_ascii=False, default=_as_text).encode()


def missing() -> UserError:
    """The error that pyarrow is not installed."""
    return UserError("Parquet and Arrow need the package pyarrow: pip install 'puna[parquet]'")


def _as_text(value) -> str:
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            if b"\0" not in value:
                return value.decode()
        return f"data:;base64,{base64.b64encode(value).decode()}"
    return str(value)
