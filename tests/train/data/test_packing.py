"""Packing against a reference that first concatenates everything and then splits."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from puna.configs.errors import UserError
from puna.train.data import packing
from puna.train.data.examples import Example, Media
from puna.train.data.packing import Room

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


def example(ids, weights=None, media=()):
    weights = [1.0] * len(ids) if weights is None else weights
    return Example(np.array(ids, np.int32), np.array(weights, np.float32), tuple(media))


def make_documents(lengths):
    """Return documents of these lengths in which no id occurs twice."""
    ids = iter(range(1, sum(lengths) + 1))
    return [example([next(ids) for _ in range(n)]) for n in lengths]


def reference_rows(documents, length):
    """Yield (tokens, positions, segment_ids) of full rows by the definition."""
    flat = [(token, n) for n, ids in enumerate(documents) for token in ids.ids.tolist()]
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
        assert as_lists(packing.pack_row(cursor, Room(length))) == expected
    rest = packing.pack_row(cursor, Room(length))
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
        packing.pack_row(cursor, Room(length))
    again = packing.Cursor(read, cursor.document, cursor.offset, stride=stride)
    for _ in range(3):
        assert as_lists(packing.pack_row(cursor, Room(length))) == as_lists(
            packing.pack_row(again, Room(length))
        )
        assert (cursor.document, cursor.offset) == (again.document, again.offset)


@given(LENGTHS, st.integers(2, 7))
def test_targets_stay_in_their_document(lengths, length):
    documents = make_documents(lengths)
    owner = {token: n for n, ids in enumerate(documents) for token in ids.ids.tolist()}
    cursor = packing.Cursor(documents.__getitem__, 0, stop=len(documents))
    while (row := packing.pack_row(cursor, Room(length)))["segment_ids"].any():
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
    assert packing.pack_row(cursor, Room(6))["tokens"].tolist() == [3, 4, 5, 6, 7, 0]
    cursor = packing.Cursor(documents.__getitem__, 0, offset=1, stop=2, start=0.5)
    assert packing.pack_row(cursor, Room(6))["tokens"].tolist() == [2, 3, 4, 5, 6, 7]


def test_documents_without_text_end_in_an_error():
    cursor = packing.Cursor(lambda index: example([]), 0)
    with pytest.raises(UserError, match="no text in 10000 consecutive documents"):
        cursor.take(1)


@given(LENGTHS, st.integers(2, 7), st.randoms(use_true_random=False))
def test_weights_go_with_their_ids(lengths, length, random):
    documents = [
        example(d.ids, [random.choice([0.0, 0.5, 1.0]) for _ in d.ids])
        for d in make_documents(lengths)
    ]
    weight = {i: w for d in documents for i, w in zip(d.ids.tolist(), d.weights, strict=True)}
    cursor = packing.Cursor(documents.__getitem__, 0, stop=len(documents))
    while (row := packing.pack_row(cursor, Room(length)))["segment_ids"].any():
        batch = packing.to_batch(row)
        inside = row["segment_ids"][:-1] == row["segment_ids"][1:]
        for target, w, within in zip(
            batch["targets_BT"].tolist(), batch["weights_BT"], inside, strict=True
        ):
            assert w == (weight[target] if within and target else 0)


# A document is made of words of one id and pictures of several ids and tiles.
DOCUMENTS = st.lists(
    st.lists(st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 2))), max_size=6),
    min_size=1, max_size=5,
)  # fmt: skip


def illustrated(parts_of_documents):
    """Examples; word ids rise from 1, the ids of the n-th picture are -n, and so are its tiles."""
    word, picture, documents = 0, 0, []
    for parts in parts_of_documents:
        ids, media = [], []
        for part in parts:
            if part is None:
                word += 1
                ids.append(word)
                continue
            picture += 1
            size, tiles = part
            array = np.full((tiles, 2, 2, 3), -picture, np.float32)
            media.append(Media("tiles", len(ids), len(ids) + size, array))
            ids += [-picture] * size
        documents.append(example(ids, media=media))
    return documents


@given(DOCUMENTS, st.integers(5, 9), st.booleans())
def test_pictures_are_never_cut_and_come_with_their_tiles(parts, length, evaluation):
    documents = illustrated(parts)
    cursor = packing.Cursor(documents.__getitem__, 0, stop=len(documents))
    room, seen = Room(length, {"tiles": (3, 2, 2, 3)}), []
    places = []
    while (row := packing.pack_row(cursor, room))["segment_ids"].any():
        if evaluation:
            cursor.step_back()
            places.append((cursor.document, cursor.offset))
            assert len(set(places)) == len(places), "no progress"
        used = row["tokens"][row["segment_ids"] > 0].tolist()
        pictures = [i for n, i in enumerate(used) if i < 0 and (n == 0 or used[n - 1] != i)]
        # Whole, in order, with all of their tiles and no others.
        sizes = {-m.array[0, 0, 0, 0]: m for d in documents for m in d.media}
        for i in pictures:
            assert used.count(i) == sizes[-i].stop - sizes[-i].start
        tiles = [float(t) for i in pictures for t in sizes[-i].array[:, 0, 0, 0]]
        assert row["tiles"][:, 0, 0, 0].tolist() == tiles + [0.0] * (3 - len(tiles))
        assert row["num_tiles"] == len(tiles)
        seen += used
    if not evaluation:
        assert seen == [i for d in documents for i in d.ids.tolist()]
    else:
        assert set(seen) == {i for d in documents for i in d.ids.tolist()}


def test_a_batch_has_tiles_and_frames_under_the_names_of_the_model():
    clip = Media("frames", 1, 3, np.ones((1, 4, 5), np.float32))
    documents = [example([1, 7, 7, 2], media=[clip])]
    cursor = packing.Cursor(documents.__getitem__, 0, stop=1)
    room = Room(5, {"tiles": (2, 2, 2, 3), "frames": (2, 6, 5)})
    batch = packing.to_batch({k: v[None] for k, v in packing.pack_row(cursor, room).items()})
    assert batch["tiles_BIYXC"].shape == (1, 2, 2, 2, 3) and batch["num_tiles_B"].tolist() == [0]
    assert batch["num_frames_BI"].tolist() == [[4, 0]]
    assert batch["frames_BISM"][0, 0].sum() == 20 and not batch["frames_BISM"][0, 1].any()
