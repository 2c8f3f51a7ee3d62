"""Text and JSONL files: what is read, and the one line that each broken file gives."""

import gzip
import json
import os
import pickle
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.configs.errors import UserError
from puna.train.data import files
from puna.train.data.documents import Parsed
from puna.train.data.quarantine import BadRecord
from puna.train.data.transforms import Text

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=8)
NEWLINES = st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"])


def write(path, data):
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def opened(*paths, max_bytes=1 << 20):
    return Parsed(files.FileRecords(paths, max_bytes), Text(None))


def documents(*paths, **kwargs):
    return list(opened(*paths, **kwargs))


def refusal(path, **kwargs):
    with pytest.raises(UserError) as caught:
        documents(str(path), **kwargs)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@given(texts=TEXTS, newline=NEWLINES, suffix=st.sampled_from(["", ".gz"]), ascii=st.booleans())
def test_lines_of_jsonl_are_its_documents(tmp_path_factory, texts, newline, suffix, ascii):
    lines = [json.dumps({"n": 1, "text": text}, ensure_ascii=ascii) for text in texts]
    path = tmp_path_factory.mktemp("jsonl") / f"a.jsonl{suffix}"
    write(path, newline.join(lines))
    assert documents(str(path)) == texts


def test_other_files_are_one_document_each_in_the_order_of_the_paths(tmp_path):
    text = "line\nanother é\r\n\n{}"
    paths = [write(tmp_path / name, text + name) for name in ("b.py", "c.txt.gz", "a.md")]
    assert documents(*paths) == [text + "b.py", text + "c.txt.gz", text + "a.md"]


def test_files_of_all_kinds_are_read_at_random(tmp_path):
    lines = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(5))
    paths = [
        write(tmp_path / "a.txt", "first"),
        write(tmp_path / "empty.txt", ""),
        write(tmp_path / "b.json-lines", lines),
        write(tmp_path / "empty.jsonl", "\n\n"),
        write(tmp_path / "c.jsonl.gz", lines),
        write(tmp_path / "d.txt.gz", "last"),
    ]
    expected = ["first", *(f"line {i}" for i in range(5)), *(f"line {i}" for i in range(5)), "last"]
    found = opened(*paths)
    assert len(found) == 12
    assert [found[i] for i in reversed(range(12))] == expected[::-1]
    copy = pickle.loads(pickle.dumps(found))
    assert list(copy) == expected
    for index in (-1, 12):
        with pytest.raises(IndexError):
            found[index]


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    paths = [
        write(tmp_path / "a.txt", mark + b"one"),
        write(tmp_path / "b.jsonl", mark + b'{"text": "two"}\n'),
    ]
    assert documents(*paths) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "line 3 is not JSON"),
        (b'{"text": "a"} {}', "line 3 is not JSON"),
        (b"[" * 100_000, "line 3 is not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "line 3 is not JSON"),
        (b'["text"]', "line 3 is a JSON array, not an object"),
        (b'{"body": "a"}', "line 3 has no key 'text' (its keys: 'body'); set data.text_key"),
        (b"{}", "line 3 has no key 'text' (its keys: none)"),
        (b'{"text": 3}', "line 3 has no string under 'text' but a JSON number"),
        (b'{"text": null}', "line 3 has no string under 'text' but a JSON null"),
        (b'{"text": "\xff"}', "line 3 is not UTF-8 text (byte 0xff at offset 10)"),
        (b'{"text": "a\0"}', "line 3 holds a NUL byte"),
        (b'{"text": "\\ud800"}', "line 3 has half a surrogate pair"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_bad_line_is_named(tmp_path, line, reason, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    write(path, b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    assert reason in refusal(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"ab\0c", "holds a NUL byte: it is binary"), (b"caf\xe9", "is not UTF-8 text (byte 0xe9")],
)
def test_a_binary_file_is_named(tmp_path, data, reason):
    path = tmp_path / "a.txt"
    write(path, data)
    assert reason in refusal(path)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_a_damaged_gzip_file_is_named(tmp_path, name):
    path = tmp_path / name
    whole = gzip.compress(b'{"text": "some words, and more of them"}\n' * 50)
    path.write_bytes(whole[:-12])
    assert "truncated" in refusal(path)
    path.write_bytes(whole[:30] + b"\xff\xff\xff\xff" + whole[34:])
    assert "not a sound gzip file" in refusal(path)


def test_what_would_not_fit_in_memory_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    write(path, "x" * 100)
    assert "a document of 100 bytes, more than data.max_document_bytes=99: split" in refusal(
        path, max_bytes=99
    )


def test_a_long_line_is_never_in_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    size = 200 << 20
    with open(path, "wb") as file:  # with holes: no disk space, and NUL bytes
        file.write(b'{"text": "good"}\n\n{"text": "')
        file.seek(size)
        file.write(b'"}\n{"text": "also"}\n')
    tracemalloc.start()
    found = opened(str(path), max_bytes=1 << 20)
    assert [found[0], found[2]] == ["good", "also"]
    with pytest.raises(BadRecord, match="a.jsonl line 3 is a document of 209,715,[0-9]+ bytes"):
        found[1]
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_lines_count_blank_ones_and_offsets_are_of_bytes(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n\n{"text": "é"}\n \n{}\n\x0b\n3\n')
    found = opened(path)
    assert found[0] == "é"
    for index, line, offset in ((1, 5, 19), (2, 7, 24)):
        with pytest.raises(BadRecord, match=f"a.jsonl line {line} ") as caught:
            found[index]
        assert (caught.value.record, caught.value.offset) == (line, offset)
        copy = pickle.loads(pickle.dumps(caught.value))
        assert vars(copy) == vars(caught.value) and str(copy) == str(caught.value)


def test_a_file_that_vanishes_is_named(tmp_path):
    path = tmp_path / "a.txt"
    found = opened(write(path, "text"))
    path.unlink()
    with pytest.raises(UserError, match="a.txt: No such file"):
        found[0]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("change", ["shorter", "longer", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, name, change):
    path = tmp_path / name
    data = b'{"text": "some words"}\n'
    found = pickle.loads(pickle.dumps(opened(write(path, data))))
    if change == "rewritten":
        os.utime(path, ns=(0, 0))
    else:
        write(path, data[:9] if change == "shorter" else data * 2)
    with pytest.raises(UserError, match=f"{name} has changed since it was opened") as caught:
        found[0]
    assert not isinstance(caught.value, BadRecord)


def test_a_pipe_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    assert "not a regular file, which random access needs" in refusal(path)


def test_find_files(tmp_path):
    for name in ("b.txt", "a.txt", "in/c.txt", "in/deep/d.txt", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(pattern):
        return [p.removeprefix(f"{tmp_path}/") for p in files.find_files(f"{tmp_path}/{pattern}")]

    assert names("a.txt") == ["a.txt"]
    assert names("?.txt") == ["a.txt", "b.txt"]
    assert names("**/[bcd].txt") == ["b.txt", "in/c.txt", "in/deep/d.txt"]
    assert names("odd[1].txt") == ["odd[1].txt"]
    for pattern, reason in (
        ("none.txt", "no such file"),
        ("*.md", "no file matches this pattern"),
        ("in", "is a folder"),
        ("i*", "no file matches this pattern"),
    ):
        with pytest.raises(UserError, match=reason):
            names(pattern)
