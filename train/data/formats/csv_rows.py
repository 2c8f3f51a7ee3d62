"""CSV with a header: every row a record of strings; commas, semicolons, tabs or bars between."""

import csv
import io
import itertools
import json
from collections.abc import Iterator
from typing import BinaryIO

_LONGEST_FIELD = 1 << 28  # characters; a quote that is never closed takes the rest of a file


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield each row after the header as a JSON object; one of another length as an array.

    Raises:
      ValueError: the header names a column twice; a field has no end.
    """
    # A byte that is no UTF-8 becomes half a surrogate pair, by which its record is found bad.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        first = text.readline()
        delimiter = max(",\t;|", key=first.count)
        rows = csv.reader(itertools.chain([first], text), delimiter=delimiter)
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise ValueError("its first row is not a header: two columns have the same name")
        for row in rows:
            if row:
                record = dict(zip(header, row, strict=True)) if len(row) == len(header) else row
                yield json.dumps(record).encode()
    except csv.Error as error:
        raise ValueError(str(error)) from None
    finally:
        csv.field_size_limit(limit)
        text.detach()
