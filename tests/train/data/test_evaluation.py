"""Evaluation rows: each token a target once, whatever the length of a row or the batch size."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.configs.errors import UserError
from puna.configs.schema import DataConfig
from puna.models.text.tokenizer import byte_tokenizer
from puna.train.data import HeldOutRows, evaluation
from puna.train.data.packing import Room
from puna.train.data.transforms import Text

CONFIG = DataConfig()
TEXTS = st.lists(st.text("abé ", max_size=20), min_size=1, max_size=6)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@given(texts=TEXTS.filter(any), seq_len=st.integers(1, 12))
def test_every_token_is_a_target_once(tmp_path_factory, texts, seq_len):
    path = write(tmp_path_factory.mktemp("data") / "a.jsonl", texts)
    tokenizer = byte_tokenizer()
    targets = []
    rows = list(HeldOutRows(CONFIG, Text(tokenizer), path, Room(seq_len + 1)))
    for row in rows:
        assert all(array.shape == (seq_len,) for array in row.values())
        scored = row["weights_BT"] > 0
        targets += row["targets_BT"][scored].tolist()
        # A scored target is the token after its own, in the same piece.
        assert (row["segment_ids_BT"][scored] > 0).all()
        new = np.diff(row["segment_ids_BT"], prepend=0) != 0
        assert (row["positions_BT"][new] == 0).all()
        assert (np.diff(row["positions_BT"])[~new[1:] & (row["segment_ids_BT"][1:] > 0)] == 1).all()
    expected = [tokenizer.encode(text, eos=True) for text in texts if text]
    assert targets == list(itertools.chain(*expected))
    for row in rows[:-1]:
        assert (row["segment_ids_BT"] > 0).all()
    padding = rows[-1]["segment_ids_BT"] == 0
    assert not rows[-1]["weights_BT"][padding].any()
    assert not rows[-1]["tokens_BT"][padding].any()


@given(texts=TEXTS.filter(any), batch_size=st.integers(1, 5))
def test_batches_hold_the_rows_and_zeros(tmp_path_factory, texts, batch_size):
    path = write(tmp_path_factory.mktemp("data") / "a.jsonl", texts)
    rows = list(HeldOutRows(CONFIG, Text(byte_tokenizer()), path, Room(6 + 1)))
    held_out = HeldOutRows(CONFIG, Text(byte_tokenizer()), path, Room(7))
    firsts = range(0, len(rows), batch_size)
    found = [held_out.batch(n, list(range(n, n + batch_size))) for n in firsts]
    assert held_out.batch(firsts[-1] + batch_size, []) is None
    assert len(found) == -(-len(rows) // batch_size)
    for key in rows[0]:
        stacked = np.concatenate([batch[key] for batch in found])
        assert stacked.dtype == rows[0][key].dtype
        assert stacked.shape == (len(found) * batch_size, 6)
        np.testing.assert_array_equal(stacked[: len(rows)], [row[key] for row in rows])
        assert not stacked[len(rows) :].any()


def test_parts_follow_each_other(tmp_path):
    paths = [write(tmp_path / name, [name, name]) for name in ("b.jsonl", "a.jsonl")]
    rows = HeldOutRows(CONFIG, Text(byte_tokenizer()), ",".join(paths), Room(100 + 1))
    text = "".join(chr(i) for row in rows for i in row["tokens_BT"] if 0 < i < 256)
    assert text == "b.jsonlb.jsonla.jsonla.jsonl"


def test_what_cannot_be_evaluated_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(UserError, match="cannot have a weight"):
        HeldOutRows(CONFIG, Text(byte_tokenizer()), f"2*{path}", Room(8 + 1))
    with pytest.raises(UserError, match="no such file"):
        HeldOutRows(CONFIG, Text(byte_tokenizer()), f"{path}l", Room(8 + 1))
    empty = write(tmp_path / "b.jsonl", ["", ""])
    with pytest.raises(UserError, match="there is no text"):
        HeldOutRows(CONFIG, Text(byte_tokenizer()), empty, Room(8 + 1))


@given(texts=TEXTS.filter(any), asked=st.lists(st.integers(0, 12), max_size=12))
def test_rows_may_be_asked_for_in_any_order_and_again(tmp_path_factory, texts, asked):
    path = write(tmp_path_factory.mktemp("data") / "a.jsonl", texts)
    rows = list(HeldOutRows(CONFIG, Text(byte_tokenizer()), path, Room(8)))
    for kept in (1 << 20, 0):  # with and without room to keep what was read
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "KEPT_BYTES", kept)
            held_out = HeldOutRows(CONFIG, Text(byte_tokenizer()), path, Room(8))
            for number in asked:
                row = held_out.row(number)
                assert (row is None) == (number >= len(rows))
                for key in row or ():
                    np.testing.assert_array_equal(row[key], rows[number][key])


def test_only_the_first_reading_opens_and_tokenizes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", ["one text", "another"])
    held_out = HeldOutRows(CONFIG, Text(byte_tokenizer()), path, Room(8), most=2)
    first = list(held_out)
    assert len(first) == 2
    (tmp_path / "a.jsonl").unlink()
    assert all(a is b for a, b in zip(first, held_out, strict=True))
