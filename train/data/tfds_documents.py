"""TFDS data sets as a random-access sequence of records, read without TensorFlow.

Only data that TFDS stores in a random-access format (array_record, parquet) can be read this way.
`python_source`, the corpus of the quickstart, is built when it is first asked for; every other data
set has to be prepared beforehand.
"""

import os
import re
from collections.abc import Sequence

from ...configs import paths
from ...configs.errors import UserError
from .examples import Record
from .quarantine import SHOWN_CHARACTERS, BadRecord

_DATASET = re.compile(r"(?P<name>\w+)(?:/(?P<config>[^/:]+?))??(?:/(?P<version>\d+\.\d+\.\d+))?")


class TfdsRecords(Sequence[Record]):
    """The examples of one split of a TFDS data set, in stored order, their texts as strings.

    Args:
        spec: `DATASET[/CONFIG][/VERSION][:SPLIT]`, or the folder of a prepared version in place
            of the name (it starts with `/`, `.` or `~`). SPLIT may be a sub-split, `train[:10%]`.
        text_key: the feature that holds the text; None where none has to be there.
        data_dir: where TFDS keeps its data sets; empty for its default.
        max_bytes: what a document may have.

    Raises:
        UserError: the data set, the split or the feature is not there, it is stored as tfrecord, or
            the feature is not a text.
        BadRecord: an example is damaged or no document, when it is read.
    """

    def __init__(self, spec: str, text_key: str | None, data_dir: str | None, max_bytes: int):
        self._name, _, split = spec.partition(":")
        self._split = split or "train"
        self._max_bytes = max_bytes
        builder = _find_builder(self._name, data_dir)
        try:
            self._examples = builder.as_data_source(split=self._split)
        except NotImplementedError:
            stored = builder.info.file_format
            raise UserError(
                f"tfds:{self._name} is stored as {stored and stored.value}, which only "
                "TensorFlow reads: prepare it again in another data_dir with `tfds build "
                f"--file_format=array_record {builder.name}`"
            ) from None
        except (ValueError, KeyError, AssertionError):
            splits = ", ".join(builder.info.splits) or "none"
            raise UserError(
                f"tfds:{spec}: {self._split!r} names no examples (its splits: {splits}; "
                "a part of one is written train[:10%])"
            ) from None
        assert builder.info.features is not None
        features = dict(builder.info.features.items())
        if text_key is not None and text_key not in features:
            raise UserError(
                f"tfds:{self._name} has no feature {text_key!r} (its features: "
                f"{', '.join(features)}); set data.text_key"
            )
        if text_key is not None and not _is_text(features[text_key]):
            raise UserError(
                f"tfds:{self._name}: the feature {text_key!r} is not a text but "
                f"{' '.join(repr(features[text_key]).split())[:80]}; set data.text_key"
            )
        self._texts = [name for name, feature in features.items() if _is_text(feature)]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            record = dict(self._examples[index])
        except Exception as error:  # of array_record, protobuf or TFDS, each with its own
            raise self.bad(index, f"cannot be read ({_first_line(error)})") from error
        for name in self._texts:
            text = record[name]
            if not isinstance(text, bytes):
                raise self.bad(index, f"has no text under {name!r}")
            if len(text) > self._max_bytes:
                size = f"{len(text):,} bytes, more than data.max_document_bytes={self._max_bytes}"
                raise self.bad(index, f"has {size}", text)
            try:
                record[name] = text.decode()
            except UnicodeDecodeError:
                raise self.bad(index, "is not UTF-8 text", text) from None
        return record

    def folder(self, index: int) -> str:
        """Nothing is relative to a data set's folder."""
        del index
        return ""

    def bad(self, index: int, reason: str, text: bytes = b"") -> BadRecord:
        """The error for an example that is not a document; it says where the example is."""
        source = f"tfds:{self._name}:{self._split}"
        beginning = text[: 4 * SHOWN_CHARACTERS]
        return BadRecord(f"{source} example {index}", reason, source, index, None, beginning)


def _is_text(feature) -> bool:
    return feature.shape == () and feature.np_dtype in (object, bytes, str)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _find_builder(name: str, data_dir: str | None):
    # Here and not above: whoever reads only files need not have or wait for TFDS.
    import tensorflow_datasets as tfds

    from . import python_source

    if name.startswith(("/", ".", "~")):
        try:
            return tfds.builder_from_directory(os.path.expanduser(name))
        except Exception as error:
            raise UserError(f"tfds:{name}: no TFDS data set is in this folder") from error
    match = _DATASET.fullmatch(name)
    if not match:
        raise UserError(f"tfds:{name}: write tfds:DATASET[/CONFIG][/VERSION][:SPLIT]")
    full_name = match["name"] + (f"/{match['config']}" if match["config"] else "")
    full_name += f":{match['version']}" if match["version"] else ""
    root = str(paths.local(data_dir, "data.data_dir")) if data_dir else None
    try:
        builder = tfds.builder(full_name, data_dir=root)
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"tfds:{name}: no data set of this name is known or prepared under "
            f"{data_dir or tfds.core.constants.DATA_DIR}; check the name, or set data.data_dir"
        ) from None
    except (ValueError, AssertionError, ImportError) as error:
        raise UserError(f"tfds:{name} cannot be opened: {_first_line(error)}") from error
    if builder.data_path.exists():
        if builder.is_prepared():
            return builder
        raise UserError(f"tfds:{name}: {builder.data_dir} is not a complete data set; delete it")
    if not isinstance(builder, python_source.PythonSource):
        where = f"--data_dir={data_dir} " if data_dir else ""
        raise UserError(
            f"tfds:{name} is not prepared in {builder.data_dir}: first run `tfds build "
            f"--file_format=array_record {where}{match['name']}`"
        )
    python_source.prepare(builder)
    return tfds.builder(full_name, data_dir=root)
