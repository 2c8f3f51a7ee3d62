"""Bad records: refused, or left out and written down, as `data.bad_records` says.

A record that is left out reads as an empty document, so the order of all others, and every place
in it that a checkpoint holds, stays what it is. It is noted in `quarantine.jsonl` in the run's
folder, by whichever process meets it first; readers of that file take each record once. A source
that begins with mostly bad records is refused under either policy: the records are fine then, and
`data.text_key` or the file is wrong.
"""

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...configs.errors import UserError

if TYPE_CHECKING:
    from ..resilience.mirror import Mirror

FILE = "quarantine.jsonl"
# What is read of a source when it is opened, so that a mistake in it shows before training starts.
CHECKED_DOCUMENTS = 10_000
CHECKED_CHARACTERS = 64 << 20
SHOWN_CHARACTERS = 200  # of a record, in its note


class BadRecord(UserError):
    """A record that cannot be a document; as a message, where it is and what is wrong with it.

    Args:
        where: for people: the file and the line, or the data set and the example.
        reason: completes the sentence that begins with `where`.
        source: the file or the split.
        record: the number in it: of the line or the example; 1 for a file that is one document.
        offset: of the record in the file, bytes (of what is in it, if it is zipped).
        beginning: its first bytes, at least SHOWN_CHARACTERS characters if there are so many.
    """

    def __init__(
        self,
        where: str,
        reason: str,
        source: str,
        record: int,
        offset: int | None = None,
        beginning: bytes = b"",
    ):
        super().__init__(f"{where} {reason}")
        self.where, self.reason = where, reason
        self.source, self.record, self.offset = source, record, offset
        self.beginning = beginning

    def __reduce__(self):
        # A reader process hands it to the training process.
        fields = (self.where, self.reason, self.source, self.record, self.offset, self.beginning)
        return BadRecord, fields


class Quarantine:
    """The bad records that were left out, each once.

    Args:
        folder: where they are written down; None to have them counted only.
        workdir: the run's folder, for messages, where that is another.
    """

    def __init__(self, folder: pathlib.Path | None = None, workdir: pathlib.Path | None = None):
        self._path = folder / FILE if folder else None
        self._shown = str((workdir or folder or pathlib.Path()) / FILE)
        # Then each process has its own, see `resilience/mirror.py`.
        self._is_own = workdir is not None and workdir != folder
        self._known: set[tuple[str, int]] | None = None
        self.first: BadRecord | None = None  # that was added in this process

    def __getstate__(self) -> dict:
        # A reader process finds out for itself what is known by then.
        return {**self.__dict__, "_known": None}

    def add(self, bad: BadRecord) -> None:
        """Note a record, unless that is done already, in another process or before a restart.

        Raises:
            UserError: the file cannot be written.
        """
        known = self._records()
        if (bad.source, bad.record) in known:
            return
        self.first = self.first or bad
        if self._path:
            _append(self._path, bad)
            if not known:
                print(
                    f"puna: bad record left out: {bad}; all are in {self._shown}", file=sys.stderr
                )
        known.add((bad.source, bad.record))

    def count(self) -> int:
        """Return how many records are noted, by all processes, now and before restarts."""
        return len(set(_read(self._path))) if self._path else len(self._records())

    def share(self) -> None:
        """Note what other processes noted in folders of their own; all call this together."""
        if not self._is_own:
            return
        from ...models.parallel.processes import gather  # reader processes need no JAX

        assert self._path is not None
        notes = gather(self._path.read_text() if self._path.exists() else "")
        known = set(_read(self._path))
        for line in "".join(notes).splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                note = json.loads(line)
                if (key := (note["source"], note["record"])) not in known:
                    _append_line(self._path, line)
                    known.add(key)
        self._known = known

    def _records(self) -> set[tuple[str, int]]:
        if self._known is None:
            self._known = set(_read(self._path)) if self._path else set()
        return self._known


def prepare_quarantine(mirror: "Mirror") -> Quarantine:
    """The run's quarantine: that of its checkpoints, else an empty one."""
    # Here and not above: reader processes need no JAX.
    from ...models.parallel.processes import is_first
    from ...models.weights import run

    if is_first() and not run.steps(mirror.home):
        # What an attempt on data that may have been mended since has left.
        (mirror.folder / FILE).unlink(missing_ok=True)
    return Quarantine(mirror.folder, mirror.home)


class Screened(Sequence):
    """The documents of a source, a bad one refused or skipped: noted, and None.

    Args:
        documents: raise BadRecord where a record is no document.
        name: of the source, for messages.
        policy: the value of `data.bad_records`.
        quarantine: takes what is left out.

    Raises:
        UserError: the first documents are bad, one of them or most of them as the policy has it;
            reading a bad document later raises the same under `refuse`.
    """

    def __init__(self, documents: Sequence[str], name: str, policy: str, quarantine: Quarantine):
        self._documents = documents
        self._skip = policy == "skip"
        self._quarantine = quarantine
        self._check(name)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int):
        try:
            return self._documents[index]
        except BadRecord as bad:
            self.reject(bad)
            return None

    def reject(self, bad: BadRecord) -> None:
        """Refuse a bad document, or note it: as the policy has it."""
        if not self._skip:
            raise _refusal(bad) from None
        self._quarantine.add(bad)

    def _check(self, name: str) -> None:
        # Noted only once the source is accepted: what is refused here is the user's to mend.
        bad, read, characters = [], 0, 0
        while read < min(len(self), CHECKED_DOCUMENTS) and characters < CHECKED_CHARACTERS:
            try:
                parsed = self._documents[read]
                characters += len(parsed if isinstance(parsed, str) else str(parsed))
            except BadRecord as error:
                if not self._skip:
                    raise _refusal(error) from None
                bad.append(error)
            read += 1
        if len(bad) > read / 2:
            raise UserError(
                f"{name}: {len(bad)} of the first {read} records are bad, more than half: {bad[0]}"
            )
        for error in bad:
            self._quarantine.add(error)


def _refusal(bad: BadRecord) -> UserError:
    return UserError(f"{bad}; --config.data.bad_records=skip leaves such records out")


def _append(path: pathlib.Path, bad: BadRecord) -> None:
    # All bytes are somewhere in this text, escaped where they are no characters.
    text = bad.beginning.decode("utf-8", "backslashreplace")[:SHOWN_CHARACTERS]
    note = {
        "source": bad.source,
        "record": bad.record,
        "offset": bad.offset,
        "reason": bad.reason,
        "beginning": text,
    }
    _append_line(path, json.dumps(note))


def _append_line(path: pathlib.Path, line: str) -> None:
    try:
        # One write of one line at the end of the file, so that processes do not mix theirs.
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, line.encode() + b"\n")
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(f"{path}: bad records cannot be noted ({error.strerror})") from None


def _read(path: pathlib.Path) -> Iterator[tuple[str, int]]:
    """Yield the source and number of each note; a line that a kill cut short is passed over."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: bad records cannot be noted ({error.strerror})") from None
    for line in lines:
        try:
            note = json.loads(line)
            yield note["source"], note["record"]
        except (ValueError, KeyError, TypeError):
            continue
