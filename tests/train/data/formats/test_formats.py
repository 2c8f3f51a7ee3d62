"""A file is what its bytes say: the same records whatever it is called and packed with."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import subprocess
import sys
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
import zstandard

from puna.configs.errors import UserError
from puna.configs.schema import DataConfig
from puna.models.text.tokenizer import byte_tokenizer
from puna.train.data import make_train_loader
from puna.train.data.files import FileRecords
from puna.train.data.formats import compression, csv_rows
from puna.train.data.quarantine import BadRecord
from puna.train.data.transforms import Text

ROWS = [{"text": t, "n": str(i)} for i, t in enumerate(
    ("one", 'a "quoted", comma; bar|\n\ttab and \\', "é ☃ 🦙", "", "[{", " last "))]  # fmt: skip
TEXTS = [row["text"] for row in ROWS]


def lines(rows=ROWS, ascii=False):
    return "".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in rows).encode()


def table():
    return pa.Table.from_pylist(ROWS)


def ipc(new, **options):
    sink = io.BytesIO()
    with new(sink, table().schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table(), max_chunksize=2)
    return sink.getvalue()


def parquet():
    sink = io.BytesIO()
    pq.write_table(table(), sink, row_group_size=2)
    return sink.getvalue()


def csv_text(delimiter=","):
    cells = [["text", "n"], *([row["text"], row["n"]] for row in ROWS)]
    quoted = [['"' + c.replace('"', '""') + '"' for c in row] for row in cells]
    return "\r\n".join(delimiter.join(row) for row in quoted).encode()


CONTENTS = {
    "lines": lines(),
    "array": json.dumps(ROWS).encode(),
    "array of lines": json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "objects": b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS),
    "csv": csv_text(),
    "tsv": csv_text("\t"),
    "semicolons": csv_text(";"),
    "parquet": parquet(),
    "arrow file": ipc(pa.ipc.new_file),
    "arrow stream": ipc(pa.ipc.new_stream),
    "feather": ipc(pa.ipc.new_file, compression="lz4"),
}
PACKERS = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data[:70]) + gzip.compress(data[70:]) + b"\0" * 9,
    ".bz2": lambda data: bz2.compress(data[:70]) + bz2.compress(data[70:]),
    ".xz": lambda data: lzma.compress(data[:70]) + lzma.compress(data[70:]),
    ".zst": lambda data: zstandard.compress(data[:70]) + zstandard.compress(data[70:]),
    ".gz.zst": lambda data: zstandard.compress(gzip.compress(data)),
}
NAMES = {
    "lines": ("a.jsonl", "a.json-lines", "a.ndjson", "a.jl", "a.json", "a", "a.txt", "A.JSON"),
    "array": ("a.json", "a.jsonl", "a"),
    "array of lines": ("a.json", "a.ndjson", "a.txt"),
    "objects": ("a.json",),
    "csv": ("a.csv", "A.CSV"),
    "tsv": ("a.tsv", "a.csv"),
    "semicolons": ("a.csv",),
    "parquet": ("a.parquet", "a", "a.jsonl", "a.txt"),
    "arrow file": ("a.arrow", "a"),
    "arrow stream": ("data-00000-of-00001.arrow", "a.json"),
    "feather": ("a.feather",),
}


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    return str(path)


def refusal(path):
    with pytest.raises(UserError) as caught:
        FileRecords([path], 1 << 20)[0]
    message = str(caught.value)
    assert path in message and message.isprintable()
    return message


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("content", CONTENTS)
def test_the_same_records_in_every_format_packed_in_every_way(tmp_path, content, suffix):
    packed = PACKERS[suffix](CONTENTS[content])
    names = NAMES[content]
    for name in [n + suffix for n in names] + ([names[0]] if suffix else []):
        records = FileRecords([write(tmp_path, name, packed)], 1 << 20)
        assert len(records) == len(ROWS)
        # At random, and by a reader process.
        copy = pickle.loads(pickle.dumps(records))
        assert [copy[i] for i in (4, 0, 2, 5, 1, 3)] == [ROWS[i] for i in (4, 0, 2, 5, 1, 3)], name


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_text_stays_one_document(tmp_path, suffix):
    texts = {
        "a.txt": "{not json}\n", "b.md": "[a link](x)\n", "c.py": "{}\n", "d": "[1, 2]\n",
        "e.txt": '{"a": 1}\nand then text', "f.txt": "Obj, ORC, PK", "g.txt": "BZh9, a name",
        "h.txt": "a,b\n1,2\n",
    }  # fmt: skip
    for name, text in texts.items():
        packed = PACKERS[suffix](text.encode())
        assert list(FileRecords([write(tmp_path, name + suffix, packed)], 1 << 20)) == [text], name


def test_a_line_longer_than_the_head_is_a_line(tmp_path):
    rows = [{"text": "x" * 200_000}, {"text": "y"}]
    for name in ("a.json", "a", "a.txt", "a.jsonl"):
        assert list(FileRecords([write(tmp_path, name, lines(rows))], 1 << 20)) == rows
    data = json.dumps(rows).encode()
    assert list(FileRecords([write(tmp_path, "b.json", data)], 1 << 20)) == rows


def test_a_value_longer_than_what_is_read_at_once(tmp_path):
    rows = [{"text": "é" * 2_000_000, "n": 12.5e-3}, {"text": "y"}, {"text": "ab" * 700_000}]
    path = write(tmp_path, "a.json", json.dumps(rows, indent=1, ensure_ascii=False).encode())
    assert list(FileRecords([path], 1 << 30)) == rows


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.ndjson", "a.jl", "a.json.zst"])
def test_json_is_never_read_as_a_text(tmp_path, name):
    """Whatever is wrong with it, a file called JSON gives its records or an error."""
    suffix = "." + name.split(".")[-1] if name.count(".") > 1 else ""
    for data in (b'"text"', b"[1, 2]", b'["a"]', b"[]", b"3", b"words", b'{"body": "x"}', b"{",
                 b'{"a": 1', b"[{", b'[{"text": "a"}', b'[{"text": "a"} {"text": "b"}]', b"{}}",
                 b'[{"text": "a"}] x', b'{\n"text": "a"\n}\n{\n', b"[\n[1]\n]"):  # fmt: skip
        path = write(tmp_path, name, PACKERS[suffix](data))
        with pytest.raises(UserError) as caught:
            make_train_loader(DataConfig(train=path), Text(byte_tokenizer()), 1)
        assert path in str(caught.value), data


def test_what_is_wrong_with_an_array_is_told(tmp_path):
    for data, reason in (
        (
            b'[{"text": "a"},\n {"text": b}]',
            "no whole JSON value at character 18: '{\"text\": b}]'",
        ),
        (b'[{"text": "a"} {"text": "b"}]', "no comma or ] at character 16"),
        (b'[{"text": "a"},', "no closing ]"),
        (b'[{"text": "a"}] 3', "no end of the file after its array at character 17"),
        (b'[{"text": "\xff"}]', "can't decode byte 0xff"),
        (b'[{"text": "\xc3', "JSON"),
    ):
        message = refusal(write(tmp_path, "a.json", data))
        assert "is not a sound JSON file" in message and reason in message
    records = FileRecords([write(tmp_path, "a.json", b'[{"text": "a"}, 3]')], 99)
    assert records[0] == {"text": "a"}
    with pytest.raises(BadRecord, match="a.json record 2 is a JSON number, not an object"):
        records[1]


def test_rows_of_csv_that_are_none(tmp_path, monkeypatch):
    data = b'text,n\na,1\n\nb\n"c\nd",2\n"\xff",3\n,4\n'
    records = FileRecords([write(tmp_path, "a.csv", data)], 1 << 20)
    assert [records[i]["text"] for i in (0, 2, 4)] == ["a", "c\nd", ""]
    with pytest.raises(BadRecord, match="a.csv row 2 has not as many fields as the header"):
        records[1]
    assert records[3]["text"] == "\udcff"  # which is found bad by whoever takes the text
    monkeypatch.setattr(csv_rows, "_LONGEST_FIELD", 3000)
    for data, reason in (
        (b"a,b,a\n1,2,3\n", "two columns have the same name"),
        (b'a,b\n"' + b"x" * 4000, "field larger than field limit"),
    ):
        assert reason in refusal(write(tmp_path, "a.csv", data))


def test_pandas_writes_an_index_without_a_name(tmp_path):
    records = FileRecords([write(tmp_path, "a.csv", b",text\n0,a\n1,b\n")], 99)
    assert [record["text"] for record in records] == ["a", "b"]


def test_tables_hold_bytes_dates_and_what_is_nested(tmp_path):
    import datetime
    import decimal

    row = {
        "text": "a", "image": {"bytes": b"\xff\0", "path": None}, "list": [1, None, 2.5],
        "day": datetime.date(2026, 1, 2), "price": decimal.Decimal("1.50"), "n": 2**60,
        "bytes": "é".encode(),
    }  # fmt: skip
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    assert FileRecords([str(path)], 999)[0] == row | {
        "image": {"bytes": "data:;base64,/wA=", "path": None}, "day": "2026-01-02", "price": "1.50",
        "bytes": "é",
    }  # fmt: skip


def damaged():
    arrow, parquet = CONTENTS["arrow file"], CONTENTS["parquet"]
    yield "Arrow", arrow[:300]
    yield "Arrow", arrow[:8] + b"\xff" * 300
    yield "Arrow", CONTENTS["arrow stream"][:200]
    yield "Parquet", parquet[:-9]
    yield "Parquet", parquet[:40] + b"\xff" * 60 + parquet[100:]


@pytest.mark.parametrize("number", range(5))
def test_a_damaged_table_is_named(tmp_path, number):
    name, data = list(damaged())[number]
    assert f"is not a sound {name} file" in refusal(write(tmp_path, "a", data))


@pytest.mark.parametrize(
    ("suffix", "name"),
    [(".gz", "gzip"), (".bz2", "bzip2"), (".xz", "xz"), (".zst", "Zstandard")],
)
def test_a_damaged_compressed_file_is_named(tmp_path, suffix, name):
    whole = PACKERS[suffix](lines() * 40)
    for cut in (len(whole) // 2, len(whole) - 12, 20):
        message = refusal(write(tmp_path, f"a.jsonl{suffix}", whole[:cut]))
        assert f"ends too early: the {name} file is truncated" in message
    end = len(whole) - 20
    for data in (whole + b"garbage", whole[:end] + b"\xff" * 8 + whole[end + 8 :]):
        message = refusal(write(tmp_path, f"a.jsonl{suffix}", data))
        assert f"is not a sound {name} file" in message or "truncated" in message


def pack(make):
    sink = io.BytesIO()
    make(sink)
    return sink.getvalue()


def zipped(sink):
    with zipfile.ZipFile(sink, "w") as file:
        file.writestr("a.jsonl", lines())


def array_record(sink):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter("a.array_record", "group_size:1")
    writer.write(b"hello")
    writer.close()
    sink.write(open("a.array_record", "rb").read())


def sqlite(sink):
    with sqlite3.connect("a.db") as database:
        database.execute("create table t (text)")
    sink.write(open("a.db", "rb").read())


def safetensors(sink):
    from safetensors.numpy import save

    sink.write(save({"a": np.zeros(3, np.float32)}))


UNREAD = {
    "a zip archive": zipped,
    "a NumPy array": lambda sink: np.save(sink, np.zeros(3)),
    "a Python pickle": lambda sink: pickle.dump(ROWS, sink),
    "an ORC file": lambda sink: pyarrow.orc.write_table(table(), sink),
    "an ArrayRecord file": array_record,
    "an SQLite database": sqlite,
    "a safetensors file": safetensors,
    "a Feather file of version 1": lambda sink: sink.write(b"FEA1\0\0\0\0"),
    "an HDF5 file": lambda sink: sink.write(b"\x89HDF\r\n\x1a\n\0\0"),
    "an Avro file": lambda sink: sink.write(b"Obj\x01\x04\x14avro.codec"),
    "a 7z archive": lambda sink: sink.write(b"7z\xbc\xaf\x27\x1c\0\4"),
    "a PDF document": lambda sink: sink.write(b"%PDF-1.7\n"),
    "a GGUF model": lambda sink: sink.write(b"GGUF\3\0\0\0"),
    "a web archive (WARC)": lambda sink: sink.write(b"WARC/1.0\r\nWARC-Type: warcinfo\r\n"),
    "a TFRecord file": lambda sink: sink.write(b"\x20\0\0\0\0\0\0\0\1\2\3\4\n\x1e\n"),
    "UTF-16 text": lambda sink: sink.write("text".encode("utf-16")),
    "a Git LFS pointer": lambda sink: sink.write(b"version https://git-lfs.github.com/spec/v1\n"),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_what_is_not_read_is_refused_by_its_name(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    data = pack(UNREAD[kind])
    for name, packed in (("x", data), ("x.jsonl", data), ("x.jsonl.gz", gzip.compress(data))):
        assert f"is {kind}" in refusal(write(tmp_path, name, packed))


@pytest.mark.parametrize(
    ("package", "content"),
    [("pyarrow", "parquet"), ("pyarrow", "arrow file"), ("zstandard", "lines")],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, content):
    monkeypatch.setitem(sys.modules, package, None)
    packed = PACKERS[".zst" if package == "zstandard" else ""](CONTENTS[content])
    with pytest.raises(UserError, match=r"pip install 'puna\[parquet\]'") as caught:
        FileRecords([write(tmp_path, "x", packed)], 99)
    assert package in str(caught.value)


def test_reading_lines_imports_no_extra():
    code = (
        "import sys, puna.train.data.files; "
        "print([n for n in ('pyarrow', 'fsspec') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_stream_is_read_in_any_pieces():
    pieces = [b"", b"ab", b"", b"cdefg", b"h"]
    assert compression.stream(pieces).read() == b"abcdefgh"
    stream = compression.stream(pieces)
    assert [stream.read(3) for _ in range(4)] == [b"abc", b"def", b"gh", b""]
