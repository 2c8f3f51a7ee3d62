"""WebDataset archives: samples become records, in order; damage is told and nothing is lost."""

import base64
import gzip
import io
import json
import tarfile

import numpy as np
import pytest

from puna.configs.errors import UserError
from puna.train.data.files import FileRecords


def pack(members, form=tarfile.PAX_FORMAT):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
                continue
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def write(folder, data, name="shard.tar"):
    (folder / name).write_bytes(data)
    return str(folder / name)


def url(data):
    return f"data:;base64,{base64.b64encode(data).decode()}"


MEMBERS = [
    ("a/", None),
    ("./a/000.jpg", b"\xff\xd8 one"), ("./a/000.txt", "a llama ✓".encode()),
    ("./a/001.left.png", b"left"), ("./a/001.right.PNG", b"right"),
    ("./a/001.json", json.dumps({"text": "two", "n": [1]}).encode()), ("./a/001.npy", b"\0\1"),
    ("./b/001.wav", b"RIFF"), ("./b/001.txt", b"sound"),
    ("./a/001.txt", b"the same name again is another sample"), ("./README", b"none"),
]  # fmt: skip
RECORDS = [
    {"images": [url(b"\xff\xd8 one")], "text": "a llama ✓"},
    {"images": [url(b"left"), url(b"right")], "text": "two", "n": [1]},
    {"audios": [url(b"RIFF")], "text": "sound"},
    {"text": "the same name again is another sample"},
]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_records(tmp_path, form):
    data = pack(MEMBERS, form)
    for name, packed in (("x.tar", data), ("x", data), ("x.tar.gz", gzip.compress(data))):
        assert list(FileRecords([write(tmp_path, packed, name)], 1 << 20)) == RECORDS


@pytest.mark.parametrize("seed", range(20))
def test_damage_is_told_or_harmless(tmp_path, seed):
    """A flip inside a member is in what it holds; one in a header ends nothing early in silence."""
    data, rng = bytearray(pack(MEMBERS)), np.random.default_rng(seed)
    start = 512 * int(rng.integers(len(data) // 512 - 20))  # the end marks apart
    data[start + int(rng.integers(512))] ^= 1 << int(rng.integers(8))
    try:
        found = list(FileRecords([write(tmp_path, bytes(data))], 1 << 20))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert len(found) == len(RECORDS)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pack(MEMBERS)[:1600], "damaged"),
        (pack(MEMBERS[1:3])[: 4 * 512], "cut short at byte 2048"),
        (pack([("a.txt", b"\xff\xfe")]), "a.txt is not UTF-8 text"),
        (pack([("a.json", b"{")]), "a.json is not JSON"),
        (pack([("a.json", b"[1]")]), "a.json must hold a JSON object"),
        (pack([("a.txt", b"1"), ("a.txt", b"2")]), "a.txt: its sample has 'text' already"),
        (pack([("data.jsonl", b"{}"), ("x.bin", b"1")]), "without samples .*: unpack it"),
    ],
)  # fmt: skip
def test_what_is_no_sample_is_one_line(tmp_path, data, words):
    with pytest.raises(UserError, match=words) as caught:
        list(FileRecords([write(tmp_path, data)], 1 << 20))
    assert "\n" not in str(caught.value)
