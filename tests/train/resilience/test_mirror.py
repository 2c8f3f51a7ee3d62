"""The small files of a run in a bucket; the bucket is a folder that behaves like one."""

import pathlib

import pytest

from puna.configs import files
from puna.configs.errors import MachineError
from puna.train.resilience import mirror
from puna.train.resilience.mirror import Mirror


class Bucket(type(pathlib.Path())):
    """A folder in which writing a file makes the folders above it; it counts what is put."""

    put: list[str] = []

    def write_bytes(self, data):
        self.put.append(self.name)
        self.parent.mkdir(parents=True, exist_ok=True)
        return super().write_bytes(data)


@pytest.fixture
def home(tmp_path, monkeypatch):
    Bucket.put = []
    monkeypatch.setattr(mirror.paths, "is_url", lambda path: isinstance(path, Bucket))
    monkeypatch.setattr(files, "is_url", lambda path: isinstance(path, Bucket))
    monkeypatch.setattr(files.storage, "at", lambda path: path)
    return Bucket(tmp_path / "bucket" / "run")


def test_a_folder_of_this_machine_is_written_to_directly(tmp_path):
    with Mirror(tmp_path) as there:
        assert there.folder == tmp_path and not there.remote
        (tmp_path / "a").write_text("1")
        there.pull()
        there.push()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_grows_is_put_whole_and_fetched_by_the_next_session(home):
    with Mirror(home) as first:
        assert first.folder.name == "run" and not list(first.folder.iterdir())
        (first.folder / "tokenizer").mkdir()
        (first.folder / "tokenizer" / "t.json").write_text("t")
        (first.folder / "metrics.jsonl").write_text("1\n")
        (first.folder / ".x.part").write_text("half")
        first.push()
        with open(first.folder / "metrics.jsonl", "a") as file:
            file.write("2\n")
        assert (home / "metrics.jsonl").read_text() == "1\n"
        first.push(every=1000)
        assert (home / "metrics.jsonl").read_text() == "1\n"
    assert Bucket.put == ["metrics.jsonl", "t.json", "metrics.jsonl"]
    assert not first.folder.exists() and not list(home.glob(".*"))
    (home / "checkpoints" / "3").mkdir(parents=True)
    with Mirror(home) as second:
        assert (second.folder / "metrics.jsonl").read_text() == "1\n2\n"
        assert (second.folder / "tokenizer" / "t.json").read_text() == "t"
        assert not (second.folder / "checkpoints").exists()
        (second.folder / "tokenizer" / "t.json").unlink()
    assert len(Bucket.put) == 3
    assert not (home / "tokenizer" / "t.json").exists() and (home / "checkpoints" / "3").exists()


def test_each_process_puts_its_own_log_and_the_first_all_else(home, monkeypatch):
    monkeypatch.setattr(mirror.jax, "process_index", lambda: 1)
    monkeypatch.setattr(mirror.processes, "is_first", lambda: False)
    with Mirror(home) as there:
        for name in ("background.log", "1.background.log", "2.background.log", "metrics.jsonl"):
            (there.folder / name).write_text("x")
    assert Bucket.put == ["1.background.log"]


def test_what_ended_the_run_is_told_and_not_what_comes_of_it(home, monkeypatch):
    def fail(self, data):
        raise TimeoutError

    with pytest.raises(ValueError, match="the reason"), Mirror(home) as there:
        (there.folder / "a").write_text("1")
        monkeypatch.setattr(Bucket, "write_bytes", fail)
        raise ValueError("the reason")
    with pytest.raises(MachineError), Mirror(home) as there:
        (there.folder / "a").write_text("1")
