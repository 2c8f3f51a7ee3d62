"""Bad records: refused in one line, or left out so that nothing else moves, and noted once."""

import itertools
import json

import numpy as np
import pytest

from puna.configs.errors import UserError
from puna.configs.schema import DataConfig
from puna.models.text.tokenizer import byte_tokenizer
from puna.train.data import HeldOutRows, iter_text, make_train_loader
from puna.train.data.packing import Room
from puna.train.data.quarantine import BadRecord, Quarantine, prepare_quarantine
from puna.train.data.transforms import Text
from puna.train.resilience.mirror import Mirror

BYTES = Text(byte_tokenizer())
BAD = [
    (b'{"text": "cut short', "is not JSON"),
    (b'{"text": "caf\xe9"}', "is not UTF-8 text"),
    (b'{"text": "' + b"x" * 500 + b'"}', "is a document of 513 bytes"),
    (b'{"body": "renamed"}', "has no key 'text' (its keys: 'body')"),
    (b'{"text": 3}', "no string under 'text' but a JSON number"),
    (b'{"text": ["a"]}', "no string under 'text' but a JSON array"),
    (b'{"text": null}', "no string under 'text' but a JSON null"),
    (b"[1, 2]", "is a JSON array, not an object"),
    (b"\0" * 20, "holds a NUL byte"),
]


def config(path, **kwargs):
    return DataConfig(train=str(path), seq_len=16, max_document_bytes=400, **kwargs)


@pytest.fixture
def mixed(tmp_path):
    """A file whose line 2 + 3n is the n-th bad one; and the same with empty texts there."""
    good = ({"text": f"document {i} " * (i % 3 + 1)} for i in itertools.count())
    lines = []
    for bad, _ in BAD:
        lines += [json.dumps(next(good)).encode(), bad, json.dumps(next(good)).encode()]
    path, empty = tmp_path / "mixed.jsonl", tmp_path / "empty.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    lines[1::3] = [b'{"text": ""}'] * len(BAD)
    empty.write_bytes(b"\n".join(lines) + b"\n")
    return path, empty


def take(loader, steps):
    batches = [next(loader) for _ in range(steps)]
    state = loader.get_state()
    loader.close()
    return batches, state


def notes(folder):
    lines = (folder / "quarantine.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda note: note["record"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_record_reads_as_an_empty_document(mixed, tmp_path, workers):
    path, empty = mixed
    quarantine = Quarantine(tmp_path)
    loader = make_train_loader(config(path, workers=workers), BYTES, 4, quarantine=quarantine)
    found, state = take(loader, 12)
    expected, places = take(make_train_loader(config(empty), BYTES, 4), 12)
    assert state == places
    for one, other in zip(found, expected, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    assert quarantine.count() == len(BAD)
    # From the middle, in the rows of two processes.
    _, state = take(make_train_loader(config(path), BYTES, 4), 7)
    for rows in ([0, 1], [2, 3]):
        loader = make_train_loader(config(path), BYTES, 4, rows, quarantine=Quarantine(tmp_path))
        loader.set_state(state)
        np.testing.assert_array_equal(
            np.stack([batch["tokens_BT"] for batch in take(loader, 5)[0]]),
            np.stack([batch["tokens_BT"][rows] for batch in expected[7:]]),
        )
    assert quarantine.count() == len(BAD) == len(notes(tmp_path))


def test_the_notes_say_what_where_and_why(mixed, tmp_path, capfd):
    path, _ = mixed
    make_train_loader(config(path), BYTES, 4, quarantine=Quarantine(tmp_path))
    told = capfd.readouterr().err
    assert told.startswith(f"puna: bad record left out: {path} line 2 is not JSON")
    assert str(tmp_path / "quarantine.jsonl") in told and told.count("\n") == 1
    data = path.read_bytes()
    for index, (note, (raw, reason)) in enumerate(zip(notes(tmp_path), BAD, strict=True)):
        assert note["source"] == str(path) and note["record"] == 2 + 3 * index
        assert reason in note["reason"]
        assert data[note["offset"] :].startswith(raw)
        assert len(note["beginning"]) <= 200
        assert note["beginning"][:5] == raw.decode("latin-1")[:5]


def test_a_bad_record_is_refused_where_that_is_the_policy(mixed):
    path, _ = mixed
    with pytest.raises(UserError, match="mixed.jsonl line 2 is not JSON .*bad_records=skip"):
        make_train_loader(config(path, bad_records="refuse"), BYTES, 4)
    with pytest.raises(UserError, match="mixed.jsonl line 2 is not JSON .*bad_records=skip"):
        HeldOutRows(config(path, bad_records="refuse"), BYTES, str(path), Room(8 + 1))


@pytest.mark.parametrize("policy", ["skip", "refuse"])
def test_mostly_bad_data_is_refused_and_not_noted(tmp_path, policy):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 49 + '{"body": "a"}\n' * 51)
    with pytest.raises(UserError, match="line 50 has no key 'text' .*set data.text_key") as caught:
        make_train_loader(
            config(path, bad_records=policy),
            BYTES,
            1,
            quarantine=Quarantine(tmp_path),
        )
    assert ("51 of the first 100 records are bad" in str(caught.value)) == (policy == "skip")
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_evaluation_and_the_tokenizer_leave_out_the_same(mixed, capfd):
    path, empty = mixed
    assert list(iter_text(config(path), str(path))) == list(iter_text(config(empty), str(empty)))
    rows = list(HeldOutRows(config(path), BYTES, str(path), Room(8 + 1)))
    told = capfd.readouterr().err
    assert f"{len(BAD)} bad records are skipped, the first: {path} line 2 is" in told
    assert told.count("\n") == 1
    expected = list(HeldOutRows(config(empty), BYTES, str(empty), Room(8 + 1)))
    assert not capfd.readouterr().err
    for one, other in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(one["tokens_BT"], other["tokens_BT"])


def test_a_record_is_counted_once(tmp_path):
    first = Quarantine(tmp_path)
    records = [BadRecord("a line", "is bad", "a", n, 0, b"\xff\n\xc3") for n in (1, 2)]
    for _ in range(2):
        first.add(records[0])
    second = Quarantine(tmp_path)  # in another process, or after a restart
    second.add(records[0])
    second.add(records[1])
    assert len(notes(tmp_path)) == first.count() == second.count() == 2
    assert notes(tmp_path)[0]["beginning"] == "\\xff\n\\xc3"
    # Two that race, and one that was killed while it wrote.
    path = tmp_path / "quarantine.jsonl"
    path.write_bytes(path.read_bytes() * 2 + b'{"source": "a", "rec')
    assert Quarantine(tmp_path).count() == 2


def test_a_run_that_begins_anew_has_no_notes_of_before(tmp_path):
    Quarantine(tmp_path).add(BadRecord("a", "is bad", "a", 1))
    assert prepare_quarantine(Mirror(tmp_path)).count() == 0


def test_a_quarantine_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "quarantine.jsonl").mkdir()
    with pytest.raises(UserError, match="quarantine.jsonl: bad records cannot be noted"):
        Quarantine(tmp_path).add(BadRecord("a", "is bad", "a", 1))
