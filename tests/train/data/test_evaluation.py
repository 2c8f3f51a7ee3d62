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
from puna.train.data import batches, make_eval_rows

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
    rows = list(make_eval_rows(CONFIG, tokenizer, path, seq_len))
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
    rows = list(make_eval_rows(CONFIG, byte_tokenizer(), path, 6))
    found = list(batches(rows, batch_size))
    assert len(found) == -(-len(rows) // batch_size)
    for key in rows[0]:
        stacked = np.concatenate([batch[key] for batch in found])
        assert stacked.dtype == rows[0][key].dtype
        assert stacked.shape == (len(found) * batch_size, 6)
        np.testing.assert_array_equal(stacked[: len(rows)], [row[key] for row in rows])
        assert not stacked[len(rows) :].any()


def test_parts_follow_each_other(tmp_path):
    paths = [write(tmp_path / name, [name, name]) for name in ("b.jsonl", "a.jsonl")]
    rows = make_eval_rows(CONFIG, byte_tokenizer(), ",".join(paths), 100)
    text = "".join(chr(i) for row in rows for i in row["tokens_BT"] if 0 < i < 256)
    assert text == "b.jsonlb.jsonla.jsonla.jsonl"


def test_what_cannot_be_evaluated_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(UserError, match="cannot have a weight"):
        make_eval_rows(CONFIG, byte_tokenizer(), f"2*{path}", 8)
    with pytest.raises(UserError, match="no such file"):
        make_eval_rows(CONFIG, byte_tokenizer(), f"{path}l", 8)
    empty = write(tmp_path / "b.jsonl", ["", ""])
    with pytest.raises(UserError, match="there is no text"):
        next(make_eval_rows(CONFIG, byte_tokenizer(), empty, 8))
