"""Whatever the bytes and the names, reading gives batches or one line for the user."""

import contextlib
import gzip
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from puna.configs.schema import DataConfig
from puna.models.text.tokenizer import byte_tokenizer
from puna.train.data import HeldOutRows, make_train_loader, sources
from puna.train.data.packing import Room
from puna.train.data.quarantine import Quarantine
from puna.train.data.transforms import Text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
LINES = st.one_of(
    st.text(max_size=40).map(lambda text: json.dumps({"text": text}).encode()),
    VALUES.map(lambda value: json.dumps({"text": value}).encode()),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=30),
    st.sampled_from([b"", b" ", b"[" * 3000, b'{"text": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}"]),
)
# Most of the lines must be sound for any to be read.
FILES = st.lists(
    st.one_of(*[st.just(b'{"text": "sound words"}')] * 3, LINES), min_size=1, max_size=12
).map(b"\n".join)
# Where a change is, as a fraction of the data, how many bytes it takes and what it puts there.
CHANGES = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 30), st.binary(max_size=5)), max_size=3
)
POLICIES = st.sampled_from(["skip", "refuse"])

BYTES = Text(byte_tokenizer())


def changed(data, changes):
    for place, length, new in changes:
        start = int(place * len(data))
        data = data[:start] + new + data[start + length :]
    return data


def read_all(one_line, config, folder):
    """Train on some data and evaluate it."""
    with one_line():
        loader = make_train_loader(config, BYTES, 2, quarantine=Quarantine(folder))
        try:
            for batch in itertools.islice(loader, 3):
                assert batch["tokens_BT"].shape == (2, config.seq_len)
                assert np.all(batch["segment_ids_BT"] > 0)
        finally:
            loader.close()
    with one_line():
        for row in HeldOutRows(config, BYTES, config.train, Room(config.seq_len + 1)):
            assert row["tokens_BT"].shape == (config.seq_len,)
    assert Quarantine(folder).count() >= 0


@given(
    content=FILES,
    changes=CHANGES,
    zipped=st.none() | CHANGES,
    suffix=st.sampled_from([".jsonl", ".json-lines", ".txt", ""]),
    policy=POLICIES,
    max_bytes=st.sampled_from([1, 20, 1 << 20]),
)
def test_files_of_any_bytes(
    one_line, tmp_path_factory, content, changes, zipped, suffix, policy, max_bytes
):
    path = tmp_path_factory.mktemp("fuzz") / f"a{suffix}"
    data = changed(content, changes)
    if zipped is not None:
        path = path.with_name(path.name + ".gz")
        data = changed(gzip.compress(data), zipped)
    path.write_bytes(data)
    config = DataConfig(
        train=str(path), seq_len=8, bad_records=policy, max_document_bytes=max_bytes
    )
    read_all(one_line, config, path.parent)


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    sources.open_source(
        "tfds:python_source", DataConfig(data_dir=str(folder)), Text(None), Quarantine()
    )
    return next((folder / "python_source").iterdir())


@given(
    name=st.sampled_from(["data", "dataset_info.json", "features.json"]),
    changes=CHANGES,
    policy=POLICIES,
)
def test_tfds_data_of_any_bytes(one_line, tmp_path_factory, tfds_folder, name, changes, policy):
    folder = tmp_path_factory.mktemp("fuzz")
    copy = folder / "python_source" / tfds_folder.name
    shutil.copytree(tfds_folder, copy, ignore=shutil.ignore_patterns("*-train.*"))
    path = next(copy.glob("*validation*")) if name == "data" else copy / name
    path.write_bytes(changed(path.read_bytes(), changes))
    source = f"tfds:{copy}:validation"
    read_all(one_line, DataConfig(train=source, seq_len=4096, bad_records=policy), folder)
    shutil.rmtree(folder)


NAMES = st.text(max_size=12) | st.lists(
    st.sampled_from(
        [*("tfds:", "python_source", "mnist", "train", "validation", ":", "/", "1.0.0", "[", "]")]
        + [*("10%", "+", ",", "3*", ".", "..", "~", "*", "**", "?", "\0", "é", "\n", "\ud800")]
        + [*("9" * 400, "nan", "a.txt", "a.jsonl.gz", "all", "|", "shard", " ", "x" * 300)]
    ),
    max_size=7,
).map("".join)


@pytest.fixture(scope="module")
def few_files(tmp_path_factory):
    """A working folder, so that a pattern such as `**` does not read the whole disk."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "a.txt").write_text("words")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "words"}'))
    with contextlib.chdir(folder):
        yield folder


@given(name=NAMES.filter(lambda name: "/" not in name or name.startswith("tfds:")))
@example("1e9*a.txt")
@example("9" * 400 + "*a.txt")
@example(",".join(["999999999*a.txt", "." + "0" * 340 + "1*a.txt"]))
def test_source_strings_of_any_characters(one_line, few_files, tfds_folder, name):
    data_dir = str(Path(tfds_folder).parent.parent)
    read_all(one_line, DataConfig(train=name, seq_len=8, data_dir=data_dir), few_files)
