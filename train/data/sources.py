"""What a source string such as `3*tfds:python_source:train,1*notes/*.jsonl` names.

    SOURCES = PART[,PART...]      PART = [WEIGHT*]NAME
    NAME    = tfds:DATASET[/CONFIG][/VERSION][:SPLIT], or a path, a URL, or a glob of either

A weight is the part's share of the documents that training reads (1 where it is left out). A path
that starts with digits and a `*` is written `./3*`. A name with a comma in it cannot be written.
"""

import dataclasses
import re
from collections.abc import Iterator

from ...configs import paths
from ...configs.errors import UserError
from ...configs.schema import DataConfig
from . import files, tfds_documents
from .documents import Examples, Parsed
from .examples import Record, Transform
from .quarantine import Quarantine, Screened
from .transforms import Text

MAX_WEIGHT = 1e9  # sums and ratios of weights stay numbers
_WEIGHT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\*(.*)")


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a source string; the weight is None where none was written."""

    name: str
    weight: float | None = None


def parse_sources(sources: str) -> list[Part]:
    """Split a source string into its parts.

    Raises:
        UserError: a part is empty, or its weight is zero or far too large.
    """
    parts = []
    for item in sources.split(","):
        match = _WEIGHT.fullmatch(item.strip())
        name = match[2].strip() if match else item.strip()
        weight = float(match[1]) if match else None
        if not name:
            raise UserError(f"data source {sources!r}: a part between the commas names no data")
        if weight == 0:
            raise UserError(f"data source {sources!r}: the weight of {name} is 0; leave it out")
        if weight and weight > MAX_WEIGHT:
            raise UserError(
                f"data source {sources!r}: the weight of {name} must be at most {MAX_WEIGHT:g}"
            )
        parts.append(Part(name, weight))
    return parts


def meaning(sources: str) -> list[Part]:
    """The parts of a source string, the same for any spelling of their paths and weights."""
    return [
        Part(p.name if p.name.startswith("tfds:") else paths.real(p.name), p.weight or 1.0)
        for p in parse_sources(sources)
    ]


def open_source(
    name: str, config: DataConfig, transform: Transform, quarantine: Quarantine
) -> Examples:
    """Open one part of a source string as a random-access sequence of examples.

    Args:
        name: `tfds:...`, a path, a URL or a glob.
        config: `data_dir`, `max_document_bytes` and `bad_records` are used.
        transform: makes examples of records.
        quarantine: takes the bad records, which are empty examples then, if they are skipped.

    Raises:
        UserError: the data is missing, empty or not what its name says, or its first records are
            bad (see `Screened` and `Examples.check`).
    """
    examples = _open(name, config, transform, quarantine)
    if not isinstance(transform, Text):  # which any text suits
        examples.check(name)
    return examples


def _open(name: str, config: DataConfig, transform: Transform, quarantine: Quarantine) -> Examples:
    if name.startswith("tfds:"):
        records = tfds_documents.TfdsRecords(
            name.removeprefix("tfds:"), transform.fields[0], config.data_dir,
            config.max_document_bytes,
        )  # fmt: skip
    else:
        records = files.FileRecords(files.find_files(name), config.max_document_bytes)
    if not len(records):
        raise UserError(f"{name} holds no document: it is empty")
    parsed = Parsed(records, transform)
    screened = Screened(parsed, name, config.bad_records, quarantine)
    return Examples(parsed, screened, transform)


def iter_records(sources: str, max_bytes: int = 64 << 20) -> Iterator[Record]:
    """Yield each record of each part once, in order, as it stands; weights change nothing.

    Raises:
        UserError: the data is missing or empty, or a record is malformed.
    """
    for part in parse_sources(sources):
        if part.name.startswith("tfds:"):
            spec = part.name.removeprefix("tfds:")
            records = tfds_documents.TfdsRecords(spec, None, None, max_bytes)
        else:
            records = files.FileRecords(files.find_files(part.name), max_bytes)
        if not len(records):
            raise UserError(f"{part.name} holds no document: it is empty")
        yield from (records[i] for i in range(len(records)))


def iter_text(
    config: DataConfig, sources: str, quarantine: Quarantine | None = None
) -> Iterator[str]:
    """Yield the text of each document of each part once, in order; weights change nothing."""
    quarantine = Quarantine() if quarantine is None else quarantine
    for part in parse_sources(sources):
        yield from _open(part.name, config, Text(None, config.text_key), quarantine).parsed()
