"""The cache of data files: made once, whole or not at all, and never believed when it is wrong."""

import array
import gzip
import io
import json
import multiprocessing
import os
import pickle
import tracemalloc

import pytest

from puna.configs.errors import UserError
from puna.train.data import files, store

ROWS = [{"text": f"document {i} " + "x" * (i % 50)} for i in range(3000)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "puna" / "data"


@pytest.fixture(params=["a.jsonl", "a.jsonl.gz", "a.csv"])
def path(request, tmp_path):
    data = "".join(json.dumps(row) + "\n\n" for row in ROWS).encode()
    if request.param.endswith(".csv"):
        data = "\n".join(["text", *(row["text"] for row in ROWS)]).encode()
    path = tmp_path / request.param
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path):
    return list(files.FileRecords([str(path)], 1 << 20))


def entries(cache):
    return sorted(p for p in cache.iterdir() if p.is_dir())


@pytest.fixture
def count_makes(monkeypatch):
    """The paths that entries were made of, in this process."""
    made = []
    make = files._make_entry

    def counted(file, maker):
        made.append(file.path)
        return make(file, maker)

    monkeypatch.setattr(files, "_make_entry", counted)
    return made


def test_what_is_found_is_kept(path, cache, count_makes):
    for _ in range(3):
        assert read(path) == ROWS
    assert len(count_makes) == 1 == len(entries(cache))
    names = {p.name for p in entries(cache)[0].iterdir()}
    assert names - {"data"} == {"entry.json", "offsets", "blanks"}
    assert ("data" in names) == (path.suffix != ".jsonl")  # which is read where it is


def test_small_lines_and_texts_are_not_in_the_cache(tmp_path, cache):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "a.txt").write_text("a" * 200_000)
    files.FileRecords([str(tmp_path / "a.jsonl"), str(tmp_path / "a.txt")], 99)
    assert not cache.exists()


@pytest.mark.parametrize("name", ["entry.json", "offsets", "blanks", "data"])
@pytest.mark.parametrize("damage", ["cut", "changed", "removed", "longer"])
def test_a_damaged_entry_is_made_again(path, cache, count_makes, name, damage):
    read(path)
    target = entries(cache)[0] / name
    if not target.exists() or not (data := target.read_bytes()):
        pytest.skip("no such file in this entry")
    if damage == "removed":
        target.unlink()
    else:
        middle = len(data) // 2
        changed = bytes([data[0] ^ 1]) + data[1:]
        target.write_bytes(
            {"cut": data[:middle], "changed": changed, "longer": data + b"xy"}[damage]
        )
    assert read(path) == ROWS == read(path)
    assert len(count_makes) == 2 and len(entries(cache)) == 1


def test_a_file_that_changed_is_read_anew(path, cache, count_makes):
    read(path)
    status = path.stat()
    data = path.read_bytes()
    os.utime(path, ns=(0, 0))
    assert read(path) == ROWS and len(count_makes) == 2
    # Another content of the same size, with the old time: known by its bytes.
    if path.suffix != ".gz":
        path.write_bytes(data.replace(b"document 0 ", b"document X "))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert read(path)[0] == {"text": "document X "} and len(count_makes) == 3


def test_a_cache_that_is_emptied_while_it_is_read(path, cache, count_makes):
    records = pickle.loads(pickle.dumps(files.FileRecords([str(path)], 1 << 20)))
    for entry in entries(cache):
        for file in entry.iterdir():
            file.unlink()
        entry.rmdir()
    assert [records[i] for i in (7, 2999)] == [ROWS[7], ROWS[2999]]
    assert len(count_makes) == 2


def _in_a_process(path, start, made):
    start.wait()
    rows = read(path)
    made.put((len(rows), rows[5]))


@pytest.mark.parametrize("path", ["a.jsonl.gz"], indirect=True)
def test_processes_that_start_together_find_the_same(path, cache):
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_in_a_process, args=(path, start, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [(3000, ROWS[5])] * 3
    for process in processes:
        process.join()
    assert len(entries(cache)) == 1


def test_without_locks_one_of_two_entries_is_kept(path, cache, monkeypatch, count_makes):
    def no_locks(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(store.fcntl, "flock", no_locks)
    make = files._make_entry

    def slow(file, maker):
        about = make(file, maker)
        # Another process makes the same meanwhile.
        if len(count_makes) == 1:
            assert read(path) == ROWS
        return about

    monkeypatch.setattr(files, "_make_entry", slow)
    assert read(path) == ROWS
    assert len(count_makes) == 2 and len(entries(cache)) == 1


def test_what_fails_leaves_nothing(tmp_path, cache):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    with pytest.raises(UserError, match="truncated"):
        read(tmp_path / "a.jsonl.gz")
    assert not entries(cache)


def test_a_cache_that_cannot_be_written_is_named(path, cache, monkeypatch):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file")
    with pytest.raises(UserError, match=f"{cache}: Not a directory.* set XDG_CACHE_HOME") as caught:
        read(path)
    assert str(caught.value).isprintable()


def test_a_disk_that_is_full_is_told(tmp_path, cache, monkeypatch):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"x" * 99))

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    opened = open
    monkeypatch.setattr(
        files, "open", lambda p, *a, **k: Full() if "w" in str(a) else opened(p, *a, **k),
        raising=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="No space left .*a.txt.gz: set XDG_CACHE_HOME"):
        read(path)
    assert not entries(cache)


def test_what_nobody_opened_for_a_month_is_removed(path, cache, tmp_path):
    read(path)
    old = entries(cache)[0]
    for item in cache.iterdir():
        os.utime(item, (0, 0))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x"))
    read(tmp_path / "b.txt.gz")
    assert len(entries(cache)) == 1 and not old.exists()


def test_an_entry_that_is_opened_is_in_use(path, cache):
    read(path)
    os.utime(entries(cache)[0], (0, 0))
    read(path)
    assert entries(cache)[0].stat().st_mtime > 1e9


def test_memory_does_not_grow_with_the_records(tmp_path, monkeypatch):
    """Many short lines: neither the first start nor the second holds a number for each."""
    monkeypatch.setattr(store, "_FLUSHED", 1 << 10)
    monkeypatch.setattr(store, "_PIECE_BYTES", 1 << 14)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": ""}\n\n' * 60_000)
    for _ in range(2):
        tracemalloc.start()
        records = files.FileRecords([str(path)], 99)
        assert len(records) == 60_000 and records[59_999] == {"text": ""}
        assert tracemalloc.get_traced_memory()[1] < 400_000
        tracemalloc.stop()


def test_lines_are_found_as_an_array_has_them():
    offsets, blanks = array.array("q"), array.array("q")
    store.find_lines(io.BytesIO(b"\n{}\n \n[]"), offsets, blanks)
    assert (offsets.tolist(), blanks.tolist()) == ([1, 6, 8], [0, 1])
