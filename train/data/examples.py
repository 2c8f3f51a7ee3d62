"""What a document becomes: ids, what each weighs as a target, and pictures and clips among them.

Sources give records, a transform makes examples of them, packing makes rows. Everything here runs
in reader processes and needs no JAX.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

# A plain text file is a text; a line of JSONL or an example of TFDS has fields.
Record = str | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Media:
    """A picture or a clip: the ids from `start` to `stop` stand for it and are never cut apart.

    name: of the array in a row, `tiles` [n, Y, X, C], `pictures` [1, I, Y, X, C] or `frames`
    [1, S, M]; see `packing.Room`. number: what else the row has of it, see `media.images.grids`.
    """

    name: str
    start: int
    stop: int
    array: np.ndarray
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Example:
    """ids: int32 [n]. weights: float32 [n], of each id as a target; 0 = read, not learnt. media: in
    the order of their ids. whole: it is never cut; a row in which it does not fit ends before it.
    cut: ids that were left out because no row would hold them.
    borders: of a whole one, where among its ids texts begin that do not see those before them.
    source: of a mixture, the number of its part.
    """

    ids: np.ndarray
    weights: np.ndarray
    media: tuple[Media, ...] = ()
    whole: bool = False
    cut: int = 0
    borders: tuple[int, ...] = ()
    source: int = 0


OTHER_KEY = "; set data.text_key"


class RecordError(ValueError):
    """A record that cannot be an example; the message says why, not where."""


class Transform(Protocol):
    """Records -> examples, in two halves: only the second is costly. Picklable."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a record that it reads; the first must be there."""
        ...

    def parse(self, record: Record, folder: str, /) -> Any:
        """Take from a record what is needed.

        Args:
          folder: of the file that holds the record, which paths in it are relative to.

        Raises:
          RecordError: the record cannot be an example.
        """
        ...

    def encode(self, parsed: Any, /) -> Example:
        """The example of what `parse` returned; without ids it is passed over."""
        ...


def text_of(record: Record, key: str, hint: str = "") -> str:
    """The text under a key of a record; a plain text is its own.

    Args:
      hint: what to do where there is no such key.

    Raises:
      RecordError: there is none.
    """
    if isinstance(record, str):
        return record
    if key not in record:
        raise RecordError(f"has no key {key!r} (its keys: {shown_keys(record)}){hint}")
    value = record[key]
    if not isinstance(value, str):
        raise RecordError(f"has no string under {key!r} but a JSON {json_type(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # "\ud800" alone is legal JSON and no text
        raise RecordError(f"has half a surrogate pair under {key!r}") from None
    return value


def shown_keys(record: Mapping) -> str:
    """The keys of a record for a message, not all of them where there are many."""
    return ", ".join(repr(str(name)[:40]) for name in list(record)[:8]) or "none"


def json_type(value) -> str:
    """What JSON calls a value."""
    names = {bool: "boolean", dict: "object", list: "array", str: "string", type(None): "null"}
    return names.get(type(value), "number")
