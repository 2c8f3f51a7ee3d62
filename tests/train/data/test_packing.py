"""Packing against a reference that first concatenates everything and then splits."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from puna.configs.errors import UserError
from puna.train.data import packing

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


def make_documents(lengths):
    """Return documents of these lengths in which no id occurs twice."""
    ids = iter(range(1, sum(lengths) + 1))
    return [np.array([next(ids) for _ in range(n)], np.int32) for n in lengths]


def reference_rows(documents, length):
    """Yield (tokens, positions, segment_ids) of full rows by the definition."""
    flat = [(token, n) for n, ids in enumerate(documents) for token in ids.tolist()]
    for start in range(0, len(flat) - length + 1, length):
        row = flat[start : start + length]
        segments, positions = [1], [0]
        for (_, before), (_, now) in zip(row, row[1:], strict=False):
            segments.append(segments[-1] + (now != before))
            positions.append(positions[-1] + 1 if now == before else 0)
        yield [token for token, _ in row], positions, segments


def as_lists(row):
    return tuple(row[key].tolist() for key in ("tokens", "positions", "segment_ids"))


@given(LENGTHS, st.integers(1, 7))
def test_rows_are_the_concatenation_split(lengths, length):
    documents = make_documents(lengths)
    cursor = packing.Cursor(documents.__getitem__, 0, stop=len(documents))
    for expected in reference_rows(documents, length):
        assert as_lists(packing.pack_row(cursor, length)) == expected
    rest = packing.pack_row(cursor, length)
    used = sum(lengths) % length
    assert (rest["segment_ids"][:used] > 0).all()
    assert not any(rest[key][used:].any() for key in rest)


@given(LENGTHS, st.integers(1, 7), st.integers(0, 20), st.integers(1, 3))
def test_document_and_offset_are_the_whole_state(lengths, length, steps, stride):
    documents = make_documents(lengths)
    assume(sum(lengths) > 0)

    def read(index):  # for ever, and every stride visits every document
        return documents[(index + index // len(documents)) % len(documents)]

    cursor = packing.Cursor(read, 0, stride=stride)
    for _ in range(steps):
        packing.pack_row(cursor, length)
    again = packing.Cursor(read, cursor.document, cursor.offset, stride=stride)
    for _ in range(3):
        assert as_lists(packing.pack_row(cursor, length)) == as_lists(
            packing.pack_row(again, length)
        )
        assert (cursor.document, cursor.offset) == (again.document, again.offset)


@given(LENGTHS, st.integers(2, 7))
def test_targets_stay_in_their_document(lengths, length):
    documents = make_documents(lengths)
    owner = {token: n for n, ids in enumerate(documents) for token in ids.tolist()}
    cursor = packing.Cursor(documents.__getitem__, 0, stop=len(documents))
    while (row := packing.pack_row(cursor, length))["segment_ids"].any():
        batch = packing.to_batch(row)
        assert batch["weights_BT"].dtype == np.float32
        assert {v.dtype for k, v in batch.items() if k != "weights_BT"} == {np.dtype(np.int32)}
        for token, target, weight in zip(
            batch["tokens_BT"].tolist(),
            batch["targets_BT"].tolist(),
            batch["weights_BT"].tolist(),
            strict=True,
        ):
            follows = token and target == token + 1 and owner[token] == owner[target]
            assert weight == float(bool(follows))


def test_a_start_fraction_counts_only_in_the_first_document():
    documents = make_documents([4, 3])
    cursor = packing.Cursor(documents.__getitem__, 0, stop=2, start=0.5)
    assert packing.pack_row(cursor, 6)["tokens"].tolist() == [3, 4, 5, 6, 7, 0]
    cursor = packing.Cursor(documents.__getitem__, 0, offset=1, stop=2, start=0.5)
    assert packing.pack_row(cursor, 6)["tokens"].tolist() == [2, 3, 4, 5, 6, 7]


def test_documents_without_text_end_in_an_error():
    cursor = packing.Cursor(lambda index: np.zeros(0, np.int32), 0)
    with pytest.raises(UserError, match="no text in 10000 documents"):
        cursor.take(1)
