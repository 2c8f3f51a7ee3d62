"""Small files appear whole or not at all, with usual permissions, and as valid JSON."""

import json
import math
import os
import stat
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.configs import files


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "results.json"
    files.write_json(path, {"a": 1})
    files.write_text(str(path), "é")
    assert path.read_bytes() == "é".encode() and os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_are_those_of_any_new_file_or_of_the_old_one(umask, mode, tmp_path):
    path = tmp_path / "file"
    before = os.umask(umask)
    try:
        files.write_text(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == mode
        path.chmod(0o640)
        files.write_text(path, "newer")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_a_failure_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "\ud800")
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_what_a_killed_writer_left_is_removed_in_time(tmp_path):
    code = (
        "import os; from puna.configs import files\n"
        "os.replace = lambda *a: os.kill(os.getpid(), 9)\n"
        f"files.write_text({str(tmp_path / 'file')!r}, 'never')"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (part,) = os.listdir(tmp_path)
    files.write_text(tmp_path / "file", "1")  # another process may be writing right now
    assert sorted(os.listdir(tmp_path)) == sorted(["file", part])
    old = time.time() - 7200
    os.utime(tmp_path / part, (old, old))
    files.write_text(tmp_path / "file", "2")
    assert os.listdir(tmp_path) == ["file"]


def test_writers_at_the_same_time_give_one_of_their_texts(tmp_path):
    path = tmp_path / "file"
    texts = [str(i) * 100_000 for i in range(4)]
    writers = [
        threading.Thread(target=lambda t=t: [files.write_text(path, t) for _ in range(20)])
        for t in texts
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert not path.exists() or path.read_text() in texts
    assert os.listdir(tmp_path) == ["file"]


NUMBERS = st.floats() | st.integers() | st.none() | st.text()
VALUES = st.recursive(NUMBERS, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=9)


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@given(VALUES, st.sampled_from([None, 2]))
def test_json_is_valid_whatever_the_numbers(value, indent):
    def finite(v):
        if isinstance(v, dict):
            return {k: finite(x) for k, x in v.items()}
        if isinstance(v, list):
            return [finite(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    text = files.to_json({"value": value}, indent)
    assert json.loads(text.encode(), parse_constant=refuse) == {"value": finite(value)}
    assert indent or len(text.splitlines()) == 1


def test_json_is_written_as_text_and_survives_lone_surrogates():
    assert files.to_json({"a": "é"}, 2) == '{\n  "a": "é"\n}'
    assert json.loads(files.to_json(["\udcff", "é"], 2).encode()) == ["\udcff", "é"]
    assert files.to_json((1.5, -math.inf)) == "[1.5, null]"
