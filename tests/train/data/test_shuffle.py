"""The shuffled order is a permutation, every one about as likely, and stays what it is."""

import itertools
import math
from collections import Counter

import grain
from hypothesis import given
from hypothesis import strategies as st

from puna.train.data import shuffle

KEYS = st.tuples(*[st.integers(0, 2**64 - 1)] * 8)


@given(length=st.integers(1, 300), keys=KEYS)
def test_it_is_a_permutation(length, keys):
    order = [shuffle.permute(index, length, keys) for index in range(length)]
    assert sorted(order) == list(range(length))


@given(length=st.integers(1, 2**40), keys=KEYS, data=st.data())
def test_it_stays_in_range_at_any_length(length, keys, data):
    index = data.draw(st.integers(0, length - 1))
    assert 0 <= shuffle.permute(index, length, keys) < length


def test_all_orders_are_about_as_likely():
    for length in (2, 3, 4):
        counts = Counter(
            tuple(shuffle.permute(i, length, shuffle._keys((seed,))) for i in range(length))
            for seed in range(2400)
        )
        expected = 2400 / math.factorial(length)
        assert counts.keys() == set(itertools.permutations(range(length)))
        # Four standard deviations of a count.
        assert all(abs(n - expected) < 4 * expected**0.5 for n in counts.values())


def test_epochs_differ_and_repeat_asks_for_them():
    data = shuffle.ShuffledMapDataset(grain.MapDataset.range(30), seed=(5, 0)).repeat()
    epochs = [[data[30 * epoch + i] for i in range(30)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_the_order_is_the_same_for_ever():
    """A run that is resumed after an upgrade must go on in the order that it began."""
    data = shuffle.ShuffledMapDataset(grain.MapDataset.range(10), seed=(0, 0)).repeat()
    assert [data[i] for i in range(10)] == [8, 9, 5, 6, 1, 2, 7, 3, 0, 4]
    assert [data[i] for i in range(10, 20)] == [4, 1, 9, 0, 5, 7, 3, 8, 2, 6]
