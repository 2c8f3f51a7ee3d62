"""What a file holds, told from its first bytes, and how each kind of it becomes JSON lines.

A format is one file of this folder. Text and JSON lines are read where they are; every other format
is rewritten once as JSON lines, in a cache (see `..store`), so that there is one way to read a
record at random and it needs no library. The name of a file decides only where its bytes do not:
a CSV file is known by its suffix, and JSON that is damaged is JSON still if it is called so.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

from ....configs.errors import UserError
from . import arrow, compression, csv_rows, json_values, parquet, unread, webdataset

HEAD_BYTES = 1 << 16  # of a file, by which its format is told


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to write records.

    name: for messages. record: what one is called there; empty where the file is a single one.
    not_object: what is wrong with a record that is JSON and no object; `{}` is what it is.
    lines: yields each record as one line of JSON; raises ValueError where the file is not of this
    format. None if the file is JSON lines, or text, already. seeks: whether `lines` must seek.
    """

    name: str
    record: str
    lines: Callable[[BinaryIO], Iterator[bytes]] | None = None
    seeks: bool = False
    not_object: str = "is a JSON {}, not an object like {{...}}"


TEXT = Format("text", "")
JSON_LINES = Format("JSON lines", "line")
JSON_VALUES = Format("JSON", "record", json_values.lines)
CSV = Format("CSV", "row", csv_rows.lines, not_object="has not as many fields as the header")
PARQUET = Format("Parquet", "row", parquet.lines, seeks=True)
ARROW = Format("Arrow", "row", arrow.lines, seeks=True)
WEBDATASET = Format("WebDataset", "sample", webdataset.lines, seeks=True)
READ = (TEXT, JSON_LINES, JSON_VALUES, CSV, PARQUET, ARROW, WEBDATASET)

LINES_SUFFIXES = (".jsonl", ".json-lines", ".jsonlines", ".ndjson", ".jl", ".ldjson")
CSV_SUFFIXES = (".csv", ".tsv")
_OBJECT = re.compile(rb'\{[ \t]*"(?:[^"\\\n]|\\.)*"[ \t]*:')  # the beginning of one, on one line
_ARRAY = re.compile(rb"\[\s*\{")  # the beginning of one of objects


def detect(head: bytes, path: str) -> Format:
    """Tell the format of a file.

    Args:
      head: its first HEAD_BYTES, or all of it if that is less; uncompressed.
      path: its name, for messages and where the bytes leave it open.

    Raises:
      UserError: it is a table or an archive that is not read.
    """
    if head.startswith(parquet.MAGIC):
        return PARQUET
    if head.startswith(arrow.MAGIC):
        return ARROW
    if webdataset.is_tar(head):
        return WEBDATASET
    if found := unread.name_and_fix(head):
        raise UserError(f"{path} is {found[0]}, which is not read as data: {found[1]}")
    name = compression.bare_name(path)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if name.endswith(LINES_SUFFIXES):
        return JSON_VALUES if _is_array(text) else JSON_LINES
    if name.endswith(".json"):
        spread = text.startswith(b"{") and not _has_object_line(text)
        return JSON_VALUES if spread or _is_array(text) else JSON_LINES
    if _is_array(text):
        return JSON_VALUES
    if _are_objects(text):
        return JSON_LINES
    return CSV if name.endswith(CSV_SUFFIXES) else TEXT


def _lines(text: bytes) -> list[bytes]:
    """The first two lines that are not blank; the last may be cut short by the head's end."""
    return [line for line in text[:HEAD_BYTES].splitlines() if line.strip()][:2]


def _is_array(text: bytes) -> bool:
    """Whether this begins one array of objects, and not a line of each of several."""
    return bool(_ARRAY.match(text)) and not any(x.startswith(b"[") for x in _lines(text)[1:])


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _has_object_line(text: bytes) -> bool:
    """Whether one of the first two lines is an object, or begins one longer than the head."""
    return any(map(_is_object, _lines(text))) or _one_long_line(text)


def _are_objects(text: bytes) -> bool:
    """Whether the first two lines, if there are two, are objects and the first has a field."""
    if _one_long_line(text):
        return True
    lines = _lines(text)
    complete = lines[:1] if len(text) >= HEAD_BYTES // 2 else lines
    return bool(_OBJECT.match(text)) and all(map(_is_object, complete or [b""]))


def _one_long_line(text: bytes) -> bool:
    return bool(_OBJECT.match(text)) and len(text) >= HEAD_BYTES // 2 and b"\n" not in text
