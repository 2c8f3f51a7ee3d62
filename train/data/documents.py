"""Documents as examples: the records of a source through a transform."""

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ...configs.errors import UserError
from .examples import Example, Record, RecordError, Transform
from .quarantine import BadRecord, Screened

# What is made of a source when it is opened: few, since a document may be a book.
CHECKED_EXAMPLES = 8
CHECKED_CHARACTERS = 1 << 20

EMPTY = Example(np.zeros(0, np.int32), np.zeros(0, np.float32))


class Records(Protocol):
    """What a source is: records at random; `BadRecord` where one is malformed."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def folder(self, index: int) -> str:
        """Of the file that holds a record; paths in the record are relative to it."""
        ...

    def bad(self, index: int, reason: str) -> BadRecord:
        """The error that says where a record is and what is wrong with it."""
        ...


class Parsed(Sequence):
    """What a transform takes from each record of a source; `BadRecord` where there is no such."""

    def __init__(self, records: Records, transform: Transform):
        self.records, self._transform = records, transform

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        record = self.records[index]
        try:
            return self._transform.parse(record, self.records.folder(index))
        except RecordError as error:
            raise self.records.bad(index, str(error)) from None


class Examples(Sequence[Example]):
    """The examples of a source; one that is skipped or has no ids is empty."""

    def __init__(self, parsed: Parsed, screened: Screened, transform: Transform):
        self._parsed, self._screened, self._transform = parsed, screened, transform
        # Where documents are few, many rows read the same one at once: a book in one file is
        # tokenized and held once, and not once a row.
        self._in_use: weakref.WeakValueDictionary[int, Example] = weakref.WeakValueDictionary()
        self.number = 0  # of this part of a mixture

    def __len__(self) -> int:
        return len(self._screened)

    def __getitem__(self, index: int) -> Example:
        example = self._in_use.get(index)
        if example is None:
            made = dataclasses.replace(self._make(index), source=self.number)
            example = self._in_use[index] = made
        return example

    def check(self, name: str) -> None:
        """Make the first examples, so that a template or a row that suits none shows at once.

        Raises:
          UserError: most of them cannot be made; the line has the first reason.
        """
        bad, made = [], 0
        for i in range(min(len(self), CHECKED_EXAMPLES)):
            try:
                parsed = self._parsed[i]
            except BadRecord:  # is refused or noted where it is read
                continue
            if len(str(parsed)) > CHECKED_CHARACTERS // CHECKED_EXAMPLES:
                continue
            made += 1
            try:
                self._transform.encode(parsed)
            except RecordError as error:
                bad.append(self._parsed.records.bad(i, str(error)))
        if len(bad) > made / 2:
            raise UserError(
                f"{name}: {len(bad)} of the first {made} records are bad, more than half: {bad[0]}"
            )

    def parsed(self):
        """Yield what the transform takes from each record, in order; "" where one is skipped."""
        for i in range(len(self)):
            parsed = self._screened[i]
            yield "" if parsed is None else parsed

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_in_use"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _in_use=weakref.WeakValueDictionary())

    def _make(self, index: int) -> Example:
        parsed = self._screened[index]
        if parsed is None:
            return EMPTY
        try:
            return self._transform.encode(parsed)
        except RecordError as error:
            self._screened.reject(self._parsed.records.bad(index, str(error)))
            return EMPTY
