"""Data files behind URLs, with fsspec's own backends in place of a server."""

import contextlib
import errno
import gzip
import http.server
import io
import json
import sys
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from puna.configs.errors import MachineError, UserError, status
from puna.configs.schema import DataConfig
from puna.train.data import files, iter_text, remote

ROWS = [{"text": f"document {i}"} for i in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/a.jsonl", LINES)
    system.pipe("/bucket/in/b.jsonl.gz", gzip.compress(LINES))
    system.pipe("/bucket/c.txt", b"a text")
    yield system
    system.store.clear()


def read(pattern):
    return list(files.FileRecords(files.find_files(pattern), 1 << 20))


def test_a_url_and_a_glob_of_urls(memory):
    assert read("memory://bucket/a.jsonl") == ROWS
    assert read("MEMORY://bucket/c.txt") == ["a text"]
    assert read("memory://bucket/**/*.jsonl*") == ROWS + ROWS
    assert files.find_files("memory://bucket/*") == [
        "memory:///bucket/a.jsonl",
        "memory:///bucket/c.txt",
    ]
    names = "2*memory://bucket/a.jsonl,1*memory://bucket/c.txt"
    assert list(iter_text(DataConfig(), names))[-2:] == ["document 19", "a text"]


@pytest.fixture
def server():
    """A web server that gives no parts of files."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(LINES)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(LINES)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def test_a_file_of_a_web_server(server):
    pytest.importorskip("aiohttp")
    assert read(f"{server}/a.jsonl?token=x") == ROWS


def test_a_table_behind_a_url(memory):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    memory.pipe("/bucket/a.parquet", sink.getvalue())
    memory.pipe("/bucket/b.parquet.gz", gzip.compress(sink.getvalue()))
    assert read("memory://bucket/?.parquet*") == ROWS + ROWS


def test_urls_of_this_machine_are_its_paths(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    for url in (f"file://{path}", f"local://{path}", f"file://{tmp_path}/*.jsonl"):
        assert files.find_files(url) == [str(path)] and read(url) == ROWS


def test_a_file_is_fetched_once(memory, monkeypatch):
    opened = []
    whole = MemoryFileSystem._open
    monkeypatch.setattr(
        MemoryFileSystem, "_open", lambda self, path, *a, **k: opened.append(path) or whole(
            self, path, *a, **k)
    )  # fmt: skip
    for _ in range(2):
        assert read("memory://bucket/a.jsonl") == ROWS
    assert opened == ["/bucket/a.jsonl"]
    memory.store.clear()
    memory.pipe("/bucket/a.jsonl", LINES.replace(b"document", b"something"))
    del opened[:]
    assert read("memory://bucket/a.jsonl")[0] == {"text": "something 0"}
    assert opened


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("memory://bucket/none.jsonl", "no such file"),
        ("memory://bucket/*.csv", "no such file"),
        ("memory://bucket", "is a folder: name its files"),
        ("nowhere://bucket/a.jsonl", "Protocol not known: nowhere"),
    ],
)
def test_what_is_not_there(memory, url, reason):
    with pytest.raises(UserError, match=reason) as caught:
        read(url)
    assert url in str(caught.value)


@pytest.mark.parametrize(
    ("url", "module", "package"),
    [("gs://b/a.jsonl", "gcsfs", "gcsfs"), ("s3://b/*.jsonl", "s3fs", "s3fs"),
     ("az://b/a", "adlfs", "adlfs"), ("memory://b/a", "fsspec", r"puna\[remote\]")],
)  # fmt: skip
def test_a_missing_package_is_named(monkeypatch, url, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"{url.replace('*', '.')}.*{package}"):
        read(url)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (RuntimeError("503 Service Unavailable"), MachineError, 74),
        (OSError(errno.EIO, "Input/output error"), MachineError, 74),
        (PermissionError(errno.EACCES, "Forbidden"), UserError, 2),
        (FileNotFoundError("a"), UserError, 2),
    ],
)
@pytest.mark.parametrize("when", ["_open", "info"])
def test_what_a_server_says_is_one_line(memory, monkeypatch, error, kind, code, when):
    paths = files.find_files("memory://bucket/a.jsonl")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(MemoryFileSystem, when, fail)
    with pytest.raises(kind, match="memory:///bucket/a.jsonl") as caught:
        files.FileRecords(paths, 99)
    assert status(caught.value) == code and str(caught.value).isprintable()


def test_a_connection_that_breaks_is_not_a_damaged_file(memory, monkeypatch):
    whole = remote.opened

    class Breaks:
        def __init__(self, file):
            self.file = file

        def seekable(self):
            return False

        def read(self, size):
            if data := self.file.read(10):
                return data
            raise RuntimeError("connection reset")

    @contextlib.contextmanager
    def opened(url):
        with whole(url) as file:
            yield Breaks(file)

    monkeypatch.setattr(remote, "opened", opened)
    with pytest.raises(MachineError, match="connection reset"):
        read("memory://bucket/a.jsonl")


@pytest.mark.slow
def test_a_bucket_of_s3(monkeypatch):
    """Behind a server that speaks S3's protocol on this machine."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    try:
        system.mkdir("bucket")
        system.pipe("bucket/a.jsonl", LINES)
        system.pipe("bucket/in/b.jsonl.gz", gzip.compress(LINES))
        assert read("s3://bucket/a.jsonl") == ROWS
        assert read("s3://bucket/**/*.jsonl*") == ROWS + ROWS
        system.pipe("bucket/a.jsonl", LINES.replace(b"document", b"another"))
        fsspec.filesystem("s3").invalidate_cache()
        assert read("s3://bucket/a.jsonl")[0] == {"text": "another 0"}
        for url in ("s3://bucket/none.jsonl", "s3://nowhere/a.jsonl"):
            with pytest.raises(UserError, match=f"^{url}: no such file"):
                read(url)
    finally:
        server.stop()
