"""One run at a time in a folder: who is refused, who may take over, and who notices."""

import contextlib
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import tensorstore

from puna.configs.errors import UserError
from puna.train.resilience import lock
from puna.train.resilience.lock import FILE, BucketLock, Lock

HOLDER = """
import pathlib, sys, time
from puna.train.resilience.lock import FILE, Lock
with Lock(pathlib.Path(sys.argv[1]) / FILE):
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def held(folder, **changed):
    """Leave a lock as another run would, with these fields."""
    with Lock(folder / FILE):
        found = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(found | {"token": "other"} | changed))


def test_the_second_is_refused_and_the_first_is_named(tmp_path):
    with Lock(tmp_path / FILE) as first:
        with pytest.raises(UserError) as caught, Lock(tmp_path / FILE):
            pass
        assert f"{tmp_path} is in use by process {os.getpid()} on " in str(caught.value)
        assert " since 2" in str(caught.value)
        first.check()
    assert not list(tmp_path.iterdir())
    with Lock(tmp_path / FILE):
        pass


def test_a_killed_run_leaves_no_lock_behind(tmp_path, holder):
    with pytest.raises(UserError, match=f"process {holder.pid} on "), Lock(tmp_path / FILE):
        pass
    holder.send_signal(signal.SIGSTOP)  # it can still wake up
    with pytest.raises(UserError, match=f"process {holder.pid} on "), Lock(tmp_path / FILE):
        pass
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and yet to be reaped
    began = time.monotonic()
    with Lock(tmp_path / FILE) as mine:
        mine.check()
    assert time.monotonic() - began < lock.PATIENCE_SECONDS  # it was not watched


def test_a_process_number_that_is_used_again(tmp_path):
    held(tmp_path, started="1")
    with Lock(tmp_path / FILE) as mine:
        mine.check()


@pytest.mark.parametrize("place", ["another host", None])
def test_a_run_on_another_machine(tmp_path, place, capsys):
    """Or in another container, whose processes cannot be seen from here."""
    held(tmp_path, place=place, host="far", pid=1)
    ended = threading.Event()

    def beat():
        said = json.loads((tmp_path / FILE).read_text())
        while not ended.wait(0.05):
            (tmp_path / FILE).write_text(json.dumps(said | {"beat": time.monotonic()}))

    thread = threading.Thread(target=beat)
    thread.start()
    with (
        pytest.raises(UserError, match="process 1 on far since"),
        Lock(tmp_path / FILE, patience=20),
    ):
        pass
    ended.set()
    thread.join()
    with Lock(tmp_path / FILE, patience=1.2) as mine:
        mine.check()
    assert "takes up to 1.2 s" in capsys.readouterr().err


def test_locks_that_were_cut_short_on_locks_that_were(tmp_path):
    (tmp_path / FILE).write_bytes(b"")
    (tmp_path / f".{FILE}.{digest(tmp_path / FILE)}").write_bytes(b"")
    with Lock(tmp_path / FILE, patience=0.2) as mine:
        mine.check()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"place": 1}', b"\xff"])
def test_a_lock_that_was_cut_short(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with Lock(tmp_path / FILE, patience=0.2) as mine:
        mine.check()


def test_a_beat_goes_on(tmp_path):
    with Lock(tmp_path / FILE, beat=0.01):
        before = (tmp_path / FILE).read_bytes()
        deadline = time.monotonic() + 60
        while (tmp_path / FILE).read_bytes() == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / FILE).read_bytes() != before


def test_a_run_that_was_taken_for_dead_notices(tmp_path):
    """As one whose machine slept; it neither saves nor removes the lock of the other."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Lock(tmp_path / FILE, beat=0.01))
        (tmp_path / FILE).rename(tmp_path / "aside")
        with Lock(tmp_path / FILE) as second:
            with pytest.raises(UserError, match=f"now in use by process {os.getpid()}"):
                first.check()
            stack.close()
            second.check()


def test_a_lock_that_someone_has_tidied_up(tmp_path):
    with Lock(tmp_path / FILE) as mine:
        (tmp_path / FILE).unlink()
        mine.check()
        with pytest.raises(UserError, match="in use by"), Lock(tmp_path / FILE):
            pass


def digest(path):
    return hashlib.sha256(path.name.encode() + path.read_bytes()).hexdigest()[:16]


def holders(lock):
    """How many of eight threads that come at the same moment hold a lock."""
    start, results = threading.Barrier(8), []

    def come():
        start.wait()
        try:
            with lock() as mine:
                results.append(True)
                while len(results) < 8:
                    time.sleep(0.001)
                mine.check()
        except UserError:
            results.append(False)

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(results)


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_of_many_newcomers_one_takes_over(tmp_path, killed):
    """Also where some before them were killed while they took over."""
    for _ in range(20):
        name, left = tmp_path / FILE, []
        for _ in range(killed + 1):
            with Lock(name):
                content = json.loads(name.read_text()) | {"token": "other", "started": "1"}
            name.write_text(json.dumps(content))
            left.append(name)
            name = name.with_name(f".{FILE}.{digest(name)}")
        assert holders(lambda: Lock(tmp_path / FILE, patience=60)) == 1
        assert not list(tmp_path.iterdir())


@pytest.fixture
def bucket(monkeypatch):
    """The path of a lock in object storage, which here is TensorStore's in memory."""
    store = tensorstore.KvStore.open("memory://").result()
    monkeypatch.setattr(BucketLock, "_store", store)
    return pathlib.PurePosixPath("gs://bucket/run") / FILE, store


def left(store, **changed):
    """Leave a lock there as another run would, with these fields."""
    holder = {"token": "other", "host": "far", "pid": 1, "since": "then"}
    store[FILE] = json.dumps(holder | changed)


def test_in_a_bucket_the_second_is_refused(bucket):
    path, store = bucket
    with BucketLock(path, beat=0.01) as first:
        with pytest.raises(UserError, match=f"run is in use by process {os.getpid()} on "):
            BucketLock(path).__enter__()
        before, deadline = store[FILE], time.monotonic() + 60
        while store[FILE] == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert store[FILE] != before
        first.check()
    assert store.list().result() == []
    with BucketLock(path):
        pass


def test_in_a_bucket_a_lock_without_a_beat_is_taken_over(bucket):
    path, store = bucket
    for content in (b"", b"{", b"[]"):
        store[FILE] = content
        with BucketLock(path, patience=0.2) as mine:
            mine.check()
    left(store, place="another host", beat="1")
    with BucketLock(path, patience=0.2) as mine:
        mine.check()


def test_in_a_bucket_a_run_that_was_taken_for_dead_notices(bucket):
    path, store = bucket
    with BucketLock(path, beat=0.01) as first:
        left(store, beat="1")  # by now it has not renewed its own
        theirs = store[FILE]
        with pytest.raises(UserError, match="now in use by process 1 on far since then"):
            first.check()
        time.sleep(0.1)
        assert store[FILE] == theirs
    assert store[FILE] == theirs


def test_in_a_bucket_a_beat_whose_answer_was_lost(bucket):
    path, store = bucket
    with BucketLock(path, beat=1000) as mine:
        store[FILE] = store[FILE]  # ours, of another generation
        mine._write(7)  # is not written, but finds the new generation
        mine._write(8)
        assert json.loads(store[FILE])["beat"] == "000000000008"
        del store[FILE]  # someone has tidied up
        mine.check()
        assert json.loads(store[FILE])["token"]


def test_in_a_bucket_one_of_many_newcomers_takes_over(bucket):
    path, store = bucket
    for _ in range(10):
        with BucketLock(path):
            content = json.loads(store[FILE])
        store[FILE] = json.dumps(content | {"token": "other", "started": "1"})
        assert holders(lambda: BucketLock(path, patience=60)) == 1
        assert store.list().result() == []
