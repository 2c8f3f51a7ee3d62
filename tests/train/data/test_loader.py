"""The training loader: which tokens are in which row, and that nothing but the state matters."""

import dataclasses
import gzip
import itertools
import json
import multiprocessing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from puna.configs.errors import UserError
from puna.configs.schema import DataConfig
from puna.models.text.tokenizer import byte_tokenizer
from puna.train.data import make_train_loader
from puna.train.data.loader import provenance
from puna.train.data.transforms import Text

BOS, EOS = 1_000_000, 1_000_001


class NumberTokenizer:
    """Texts are ids: "5 6" is [5, 6]."""

    def __init__(self, bos_id=BOS, eos_id=EOS):
        self.begin_ids, self.end_ids = ([] if i is None else [i] for i in (bos_id, eos_id))

    def encode(self, text):
        return [int(word) for word in text.split()]


NUMBERS = Text(NumberTokenizer())
BYTES = Text(byte_tokenizer())


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def write_numbers(path, lengths, first=0):
    """Write documents of these lengths in which no id occurs twice; return the path and them."""
    ids = itertools.count(first)
    documents = [[next(ids) for _ in range(n)] for n in lengths]
    return write_jsonl(path, [" ".join(map(str, ids)) for ids in documents]), documents


def settings(train, seq_len=8, **kwargs):
    return DataConfig(train=train, seq_len=seq_len, **kwargs)


def take(loader, count):
    return [next(loader) for _ in range(count)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def row_tokens(batches, row):
    """Return all tokens of a row, its last targets included."""
    return [
        token
        for batch in batches
        for token in (*batch["tokens_BT"][row].tolist(), int(batch["targets_BT"][row, -1]))
    ]


def documents_of(tokens):
    """Cut the tokens of a row into its documents; the last, unfinished one is left out."""
    documents = []
    while EOS in tokens:
        end = tokens.index(EOS)
        assert tokens[0] == BOS
        documents.append(tokens[1:end])
        tokens = tokens[end + 1 :]
    return documents


@given(
    lengths=st.lists(st.integers(1, 9), min_size=4, max_size=12),
    batch_size=st.integers(1, 4),
    seq_len=st.integers(2, 9),
    special=st.sampled_from([(BOS, EOS), (BOS, None), (None, EOS), (None, None)]),
)
def test_rows_are_their_documents_packed(tmp_path_factory, lengths, batch_size, seq_len, special):
    path, documents = write_numbers(tmp_path_factory.mktemp("data") / "a.jsonl", lengths)
    bos, eos = ([i] if i is not None else [] for i in special)
    loader = make_train_loader(
        settings(path, seq_len, shuffle=False), Text(NumberTokenizer(*special)), batch_size
    )
    batches = take(loader, 6)
    for row in range(batch_size):
        order = (documents[i % len(documents)] for i in itertools.count(row, batch_size))
        pieces = ((n, bos + ids + eos) for n, ids in enumerate(order))
        flat = ((n, token) for n, ids in pieces for token in ids)
        for batch in batches:
            owners, tokens = zip(*itertools.islice(flat, seq_len + 1), strict=True)
            breaks = [b != a for a, b in itertools.pairwise(owners)]
            segments = [1, *(1 + np.cumsum(breaks))]
            starts = np.maximum.accumulate([0, *(i * b for i, b in enumerate(breaks, 1))])
            assert batch["tokens_BT"][row].tolist() == list(tokens[:-1])
            assert batch["targets_BT"][row].tolist() == list(tokens[1:])
            assert batch["segment_ids_BT"][row].tolist() == segments[:-1]
            assert (
                batch["positions_BT"][row].tolist()
                == (np.arange(seq_len + 1) - starts)[:-1].tolist()
            )
            assert batch["weights_BT"][row].tolist() == [float(not b) for b in breaks]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=4, max_size=12),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 2**31 - 1),
)
def test_an_epoch_has_every_token_of_every_document_once(
    tmp_path_factory, lengths, batch_size, seed
):
    path, documents = write_numbers(tmp_path_factory.mktemp("data") / "a.jsonl", lengths)
    loader = make_train_loader(settings(path), NUMBERS, batch_size, seed=seed)
    batches = take(loader, 40)
    rows = [documents_of(row_tokens(batches, row)) for row in range(batch_size)]
    # Document k of row r is document r + kB of the stream.
    rounds = zip(*rows, strict=False)
    stream = [document for documents in rounds for document in documents]
    epochs = len(stream) // len(documents)
    assert epochs >= 2
    for epoch in range(epochs):
        part = stream[epoch * len(documents) : (epoch + 1) * len(documents)]
        assert sorted(part) == sorted(documents)


def test_the_order_is_of_the_seed_and_the_epoch(tmp_path):
    path, documents = write_numbers(tmp_path / "a.jsonl", [3] * 40)

    def order(seed, **kwargs):
        loader = make_train_loader(settings(path, 49, **kwargs), NUMBERS, 1, seed=seed)
        found = documents_of(row_tokens(take(loader, 8), 0))
        return found[:40], found[40:80]

    assert order(0) == order(0)
    assert order(0)[0] != order(0)[1]
    assert order(0)[0] != order(1)[0]
    assert order(0, shuffle=False) == (documents, documents)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=4, max_size=12),
    processes=st.sampled_from([1, 2, 4]),
    resumed=st.sampled_from([1, 2, 4]),
    steps=st.integers(0, 6),
)
def test_a_state_goes_on_exactly_on_any_number_of_processes(
    tmp_path_factory, lengths, processes, resumed, steps
):
    path, _ = write_numbers(tmp_path_factory.mktemp("data") / "a.jsonl", lengths)

    def loaders(count):
        groups = np.arange(4).reshape(count, -1).tolist()
        return [make_train_loader(settings(path), NUMBERS, 4, rows) for rows in groups]

    def global_batch(group):
        parts = [next(loader) for loader in group]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    expected = take(make_train_loader(settings(path), NUMBERS, 4), steps + 3)
    first = loaders(processes)
    assert_same([global_batch(first) for _ in range(steps)], expected[:steps])
    state = json.loads(json.dumps({k: v for one in first for k, v in one.get_state().items()}))
    second = loaders(resumed)
    for loader in second:
        loader.set_state(state)
    assert {k: v for one in second for k, v in one.get_state().items()} == state
    assert_same([global_batch(second) for _ in range(3)], expected[steps:])
    for loader in first + second:
        loader.close()


def test_a_loader_can_be_set_back_and_rows_can_have_any_order(tmp_path):
    path, _ = write_numbers(tmp_path / "a.jsonl", [5, 17, 2, 9, 30])
    loader = make_train_loader(settings(path), NUMBERS, 3)
    state = loader.get_state()
    batches = take(loader, 4)
    loader.set_state(state)
    assert_same(take(loader, 4), batches)
    turned = make_train_loader(settings(path), NUMBERS, 3, rows=[2, 0])
    expected = [{key: value[[2, 0]] for key, value in batch.items()} for batch in batches]
    assert_same(take(turned, 4), expected)
    assert turned.get_state().keys() == {"0", "2"}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_tokens_of_each_source_are_counted_through_an_interruption(tmp_path, workers):
    first, _ = write_numbers(tmp_path / "a.jsonl", [5, 17, 2, 9, 30])
    second, _ = write_numbers(tmp_path / "b.jsonl", [3, 40], first=1000)
    config = settings(f"3*{first},{second}", licences="cc0-1.0, ", workers=workers)

    def begin():
        return make_train_loader(config, Text(NumberTokenizer(None, None)), 3)

    loader = begin()
    batches = take(loader, 5)
    state = json.loads(json.dumps(loader.get_state()))
    loader.close()
    resumed = begin()
    resumed.set_state(state)
    batches += take(resumed, 4)
    ids = np.concatenate(
        [np.concatenate([b["tokens_BT"], b["targets_BT"][:, -1:]], axis=1) for b in batches]
    )
    found = provenance(config, resumed.get_state())
    resumed.close()
    assert found == [
        {"source": first, "licence": "cc0-1.0", "tokens": int((ids < 1000).sum())},
        {"source": second, "licence": "unknown", "tokens": int((ids >= 1000).sum())},
    ]
    assert sum(line["tokens"] for line in found) == 9 * 3 * (config.seq_len + 1)
    # A checkpoint of before they were counted.
    for place in state.values():
        del place["read"]
    older = begin()
    older.set_state(state)
    assert [line["tokens"] for line in provenance(config, older.get_state())] == [0, 0]
    with pytest.raises(UserError, match="names 1 licences and data.train=.* has 2 parts"):
        make_train_loader(dataclasses.replace(config, licences="mit"), NUMBERS, 3)


def test_resuming_reads_one_document_a_row(tmp_path):
    path, _ = write_numbers(tmp_path / "a.jsonl", [7] * 50)
    loader = make_train_loader(settings(path), NUMBERS, 2)
    take(loader, 500)
    state = loader.get_state()
    tokenizer = NumberTokenizer()
    calls = []
    encode = tokenizer.encode
    tokenizer.encode = lambda text: calls.append(text) or encode(text)
    again = make_train_loader(settings(path), Text(tokenizer), 2)
    again.set_state(state)
    assert_same([next(again)], [next(loader)])
    again.close()
    assert len(calls) < 50  # the batches read ahead, where 500 came before


def test_a_state_of_another_batch_size_is_refused(tmp_path):
    path, _ = write_numbers(tmp_path / "a.jsonl", [5] * 9)
    state = make_train_loader(settings(path), NUMBERS, 4).get_state()
    for batch_size in (2, 8):
        loader = make_train_loader(settings(path), NUMBERS, batch_size)
        with pytest.raises(UserError, match=f"train.batch_size={batch_size}, but .* of 4 rows"):
            loader.set_state(state)


@pytest.mark.parametrize(("weights", "share"), [("3*{},1*{}", 0.75), ("{},{}", 0.5)])
def test_a_mixture_keeps_its_weights(tmp_path, weights, share):
    few, _ = write_numbers(tmp_path / "few.jsonl", [2] * 7)
    many, _ = write_numbers(tmp_path / "many.jsonl", [2] * 300, first=1000)
    config = settings(weights.format(few, many), seq_len=79)
    batches = take(make_train_loader(config, NUMBERS, 2), 10)
    firsts = [
        [document[0] for document in documents_of(row_tokens(batches, row))] for row in range(2)
    ]
    stream = list(itertools.chain(*zip(*firsts, strict=False)))
    assert len(stream) > 390
    assert abs(np.mean(np.array(stream) < 1000) - share) < 0.01
    # Each part goes through its epochs on its own.
    part = [first for first in stream if first < 1000]
    assert sorted(part[:7]) == sorted(part[7:14]) == list(range(0, 14, 2))


def test_rows_that_share_a_document_begin_apart(tmp_path):
    path, documents = write_numbers(tmp_path / "a.jsonl", [400])
    loader = make_train_loader(settings(path), NUMBERS, 4)
    batches = take(loader, 2)
    assert batches[0]["tokens_BT"][:, 0].tolist() == [BOS, 99, 200, 300]
    fresh = make_train_loader(settings(path), NUMBERS, 4)
    state = fresh.get_state()
    fresh.set_state(state)
    assert_same(take(fresh, 2), batches)


def test_a_shared_document_is_tokenized_once(tmp_path):
    path, _ = write_numbers(tmp_path / "a.jsonl", [4000])
    tokenizer = NumberTokenizer()
    calls = []
    encode = tokenizer.encode
    tokenizer.encode = lambda text: calls.append(text) or encode(text)
    loader = make_train_loader(settings(path), Text(tokenizer), 8)
    take(loader, 3)
    loader.close()
    assert len(calls) == 1


def test_documents_without_ids_are_skipped(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["", "1 2 3", " ", "", "4 5"])
    loader = make_train_loader(settings(path, 20), NUMBERS, 2)
    for batch in take(loader, 3):
        assert (batch["segment_ids_BT"] > 0).all()
        assert set(batch["tokens_BT"].ravel()) == {BOS, EOS, 1, 2, 3, 4, 5}


def test_data_without_any_ids_ends_in_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["", " "])
    loader = make_train_loader(settings(path), NUMBERS, 2)
    with pytest.raises(UserError, match="no text"):
        next(loader)


def test_reader_processes_give_the_same_batches(tmp_path):
    texts = [f"{i} " * (i % 40 + 1) for i in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", [*texts, ""])
    one = make_train_loader(settings(path, 32), BYTES, 3, seed=1)
    # Two readers share three rows, unevenly.
    many = make_train_loader(settings(path, 32, workers=2), BYTES, 3, seed=1)
    expected, states = [], []
    for _ in range(6):
        expected.append(next(one))
        states.append(one.get_state())
    many.set_state(states[0])
    assert_same(take(many, 5), expected[1:])
    assert many.get_state() == states[-1]
    many.close()
    assert not multiprocessing.active_children()


def test_an_error_in_a_reader_process_is_the_same_line(tmp_path, monkeypatch):
    monkeypatch.setattr("puna.train.data.quarantine.CHECKED_CHARACTERS", 0)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": 3}\n')
    loader = make_train_loader(
        settings(str(path), workers=1, bad_records="refuse"), Text(byte_tokenizer()), 1
    )
    with pytest.raises(UserError, match="a.jsonl line 2 has no string under 'text'") as caught:
        take(loader, 3)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_in_every_format(tmp_path, workers):
    rows = [{"n": i, "text": f"document {i} " + "é words " * (i % 6)} for i in range(50)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=9)
    for name, data in (
        ("a.jsonl", lines), ("a.jsonl.zst", zstandard.compress(lines)),
        ("a.json.gz", gzip.compress(lines)), ("a.json", json.dumps(rows, indent=1).encode()),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data)
    expected = state = None
    names = ["a.jsonl", "a.jsonl.zst", "a.json.gz", "a.json", "a.parquet"]
    for name in names if not workers else names[-1:]:
        path = str(tmp_path / name)
        batches = take(make_train_loader(settings(path, 16), BYTES, 4), 9)
        expected = expected or batches
        assert_same(batches, expected)
        # From the middle, with the position that another format has saved.
        if state is None:
            first = make_train_loader(settings(str(tmp_path / "a.jsonl"), 16), BYTES, 4)
            take(first, 5)
            state = first.get_state()
        loader = make_train_loader(settings(path, 16, workers=workers), BYTES, 4)
        loader.set_state(state)
        assert_same(take(loader, 4), expected[5:])
        loader.close()
